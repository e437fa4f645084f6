"""Inputs, references and launchers for the tests of the norm family."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddt_kernels import norm_launch, reference
from kernel_testing import check_against_reference, seeded

KEPT = "gated_residual_layer_norm_modulate, kept"
NORMS = ("rms_norm_modulate", "layer_norm_modulate")
OPS = (*NORMS, *(f"gated_residual_{norm}" for norm in NORMS), KEPT, "gated_residual")
FORECAST_OPS = OPS[:4]
INPUTS = ("x", "branch", "gate", "weight", "shift", "scale")
Forecast = tuple[Tensor, Tensor]


def function_of(op: str, module: Any = reference) -> Callable[..., Any]:
    """The op in `module`; one "kept" also returns x'."""
    name, _, kept = op.partition(", ")
    return partial(getattr(module, name), keep=True) if kept else getattr(module, name)


def keeps(op: str) -> bool:
    """Whether the op returns x'."""
    return op in (KEPT, "gated_residual", "gated_residual_rms_norm_modulate")


def norm_of(op: str) -> str:
    """The launchers' name of the op's norm."""
    return "rms" if "rms" in op else "layer" if "layer" in op else "none"


def input_names(op: str) -> list[str]:
    """The op's tensor arguments, in order."""
    return [name for name in inspect.signature(function_of(op)).parameters if name not in ("eps", "keep")]


def make_inputs(
    op: str, shape: tuple[int, int, int], per_token: bool, dtype: torch.dtype, device: str = "cpu", strided: bool = True
) -> dict[str, Tensor]:
    """Seeded inputs. strided: x and branch are views of something larger, modulations chunks of one (B, N or 1, 6C)."""
    B, N, C = shape
    randn = seeded(0, dtype, device)
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
    x, generator = inputs["x"], torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator).to(x) for _ in range(keeps(op) + (op != "gated_residual"))]


def launch_forward(op: str, i: dict[str, Tensor], forecast: Forecast | None = None) -> list[Tensor]:
    """The op's outputs, by its CUDA launcher."""
    inputs = (i.get(name) for name in INPUTS)
    return [
        y for y in norm_launch.launch_forward(*inputs, 1e-6, norm_of(op), keeps(op), *(forecast or ())) if y is not None
    ]


def launch_backward(op: str, i: dict[str, Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    """The gradients the op's CUDA launcher writes, by input name."""
    norm = norm_of(op)
    grad_y = None if norm == "none" else grads[-1]
    grad_residual = grads[0] if keeps(op) else None
    x = None if norm == "none" else i["x"]
    rest = (i.get("branch"), i.get("gate"), i.get("weight"), i.get("scale"))
    made = norm_launch.launch_backward(grad_residual, grad_y, x, *rest, 1e-6, norm)
    return {name: gradient for name, gradient in vars(made).items() if gradient is not None}


def check_launched(op: str, inputs: dict[str, Tensor]) -> None:
    """The tolerance rule, for what the launchers write. They write no gradient of gated_residual's x and, per token, an
    empty one for shift, since both equal a gradient of an output."""
    grads = make_grads(op, inputs)
    outputs, gradients = launch_forward(op, inputs), launch_backward(op, inputs, grads)
    assert gradients.keys() == inputs.keys() - ({"x"} if op == "gated_residual" else set())
    if "shift" in inputs and inputs["shift"].shape == inputs["x"].shape:
        assert gradients.pop("shift").numel() == 0
    check_against_reference(function_of(op), inputs, outputs, grads, gradients)


def make_forecast_inputs(
    op: str, shape: tuple[int, int, int], per_token: bool, dtype: torch.dtype, history: int, device: str = "cpu"
) -> tuple[dict[str, Tensor], Forecast]:
    """Seeded inputs, the modulations as chunks of one cached (K, B, N or 1, 8C), and (weights, step), which takes row 1
    of 3."""
    B, N, C = shape
    cached = seeded(2, dtype, device)(history, B, N if per_token else 1, 8 * C) / 2
    chunks = dict(zip(("shift", "scale", "gate"), cached.chunk(8, dim=-1)[2:5], strict=True))
    inputs = make_inputs(op, shape, per_token, dtype, device)
    weights = torch.tensor([[0.3, 0.7, 0.0], [1.7, -0.9, 0.2], [-1.0, 4.0, -2.0]])[:, :history].contiguous()
    inputs |= {name: chunks[name] for name in chunks if name in inputs}
    return inputs, (weights.to(device), torch.tensor([1], device=device))


def with_forecast(op: str, forecast: Forecast) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The op in plain PyTorch: the reference on combined modulations."""
    return lambda *tensors: function_of(op)(*(t if t.ndim < 4 else reference.forecast(t, *forecast) for t in tensors))
