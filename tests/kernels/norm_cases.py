"""The norm family's ops as the tests see them: inputs, references, launchers."""

import inspect

import torch
from torch import Tensor

from ddt_kernels import norm_launch, reference
from kernel_testing import as_list, assert_as_accurate, check_against_reference

OPS = (
    "rms_norm_modulate",
    "gated_residual_rms_norm_modulate",
    "gated_residual_layer_norm_modulate",
    "gated_residual",
)


def input_names(op: str) -> list[str]:
    """The op's tensor arguments, in order."""
    return [name for name in inspect.signature(getattr(reference, op)).parameters if name != "eps"]


def make_inputs(
    op: str, shape: tuple[int, int, int], per_token: bool, dtype: torch.dtype, device: str = "cpu", strided: bool = True
) -> dict[str, Tensor]:
    """Seeded inputs. strided: x and branch are views of something larger, modulations chunks of one (B, N or 1, 6C)."""
    B, N, C = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).to(device)

    modulations = (randn(B, N if per_token else 1, 6 * C) / 2).chunk(6, dim=-1)
    tensors = {
        "x": randn(N, B, C).transpose(0, 1),
        "branch": randn(B, N + 1, 2 * C)[:, 1:, :C],
        "weight": 1 + randn(C) / 4,
        "shift": modulations[0],
        "scale": modulations[1],
        "gate": modulations[2],
    }
    return {name: tensors[name] if strided else tensors[name].contiguous() for name in input_names(op)}


def make_grads(op: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    """A gradient for each output."""
    generator = torch.Generator().manual_seed(1)
    x = inputs["x"]
    count = 2 if op == "gated_residual_rms_norm_modulate" else 1
    return [torch.randn(x.shape, generator=generator).to(x.dtype).to(x.device) for _ in range(count)]


def launch_forward(op: str, i: dict[str, Tensor]) -> list[Tensor]:
    """The op's outputs, by its CUDA launcher."""
    norm = "rms" if "rms" in op else "layer" if "layer" in op else "none"
    modulated = (i["x"], i.get("branch"), i.get("gate"), i.get("weight"), i.get("shift"), i.get("scale"))
    outputs = norm_launch.launch_forward(*modulated, 1e-6, norm, op.startswith("gated") and norm != "layer")
    return [output for output in outputs if output is not None]


def launch_backward(op: str, i: dict[str, Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    """The gradients the op's CUDA launcher writes, by input name."""
    norm = "rms" if "rms" in op else "layer" if "layer" in op else "none"
    grad_y = None if norm == "none" else grads[-1]
    grad_residual = grads[0] if op in ("gated_residual", "gated_residual_rms_norm_modulate") else None
    x = None if norm == "none" else i["x"]
    rest = (i.get("branch"), i.get("gate"), i.get("weight"), i.get("scale"))
    made = norm_launch.launch_backward(grad_residual, grad_y, x, *rest, 1e-6, norm)
    return {name: gradient for name, gradient in vars(made).items() if gradient is not None}


def check_launched(op: str, inputs: dict[str, Tensor]) -> None:
    """The tolerance rule, for what the launchers write. They write no gradient of gated_residual's x and, per token, an
    empty one of shift: those are the output's."""
    grads = make_grads(op, inputs)
    outputs, gradients = launch_forward(op, inputs), launch_backward(op, inputs, grads)
    assert gradients.keys() == inputs.keys() - ({"x"} if op == "gated_residual" else set())
    if "shift" in inputs and inputs["shift"].shape == inputs["x"].shape:
        assert gradients.pop("shift").numel() == 0
    check_against_reference(getattr(reference, op), inputs, outputs, grads, gradients)


FORECAST_OPS = OPS[:3]
Forecast = tuple[Tensor, Tensor]


def make_forecast_inputs(
    op: str, shape: tuple[int, int, int], per_token: bool, dtype: torch.dtype, history: int, device: str = "cpu"
) -> tuple[dict[str, Tensor], Forecast]:
    """Seeded inputs, the modulations as chunks of one cached (K, B, N or 1, 8C), and (weights, step), which takes row 1
    of 3."""
    B, N, C = shape
    generator = torch.Generator().manual_seed(2)
    cached = torch.randn(history, B, N if per_token else 1, 8 * C, generator=generator, dtype=torch.float64) / 2
    chunks = dict(zip(("shift", "scale", "gate"), cached.to(dtype).to(device).chunk(8, dim=-1)[2:5], strict=True))
    inputs = make_inputs(op, shape, per_token, dtype, device)
    weights = torch.tensor([[0.3, 0.7, 0.0], [1.7, -0.9, 0.2], [-1.0, 4.0, -2.0]])[:, :history].contiguous()
    return inputs | {name: chunks[name] for name in chunks if name in inputs}, (
        weights.to(device),
        torch.tensor([1], device=device),
    )


def with_forecast(op: str, inputs: dict[str, Tensor], forecast: Forecast) -> list[Tensor]:
    """The op's outputs in plain PyTorch: the reference on combined modulations."""
    combined = [t if t.ndim < 4 else reference.forecast(t, *forecast) for t in inputs.values()]
    return as_list(getattr(reference, op)(*combined))


def launch_with_forecast(op: str, i: dict[str, Tensor], forecast: Forecast) -> list[Tensor]:
    """As launch_forward."""
    norm = "rms" if "rms" in op else "layer"
    modulated = (i["x"], i.get("branch"), i.get("gate"), i.get("weight"), i["shift"], i["scale"])
    stored = op == "gated_residual_rms_norm_modulate"
    return [y for y in norm_launch.launch_forward(*modulated, 1e-6, norm, stored, forecast) if y is not None]


def check_forecast_against_reference(
    op: str, inputs: dict[str, Tensor], forecast: Forecast, outputs: list[Tensor]
) -> None:
    """The tolerance rule; the oracle combines, and does everything else, in fp64."""
    plain = with_forecast(op, inputs, forecast)
    oracles = with_forecast(op, {name: t.double() for name, t in inputs.items()}, (forecast[0].double(), forecast[1]))
    assert len(outputs) == len(oracles)
    for index, output in enumerate(outputs):
        assert_as_accurate(f"output {index}", output, plain[index], oracles[index])
