"""Inputs and gradients for the tests of swiglu and swiglu_mlp."""

import torch
from torch import Tensor

from ddt_kernels.swiglu_launch import launch_activation
from kernel_testing import FP32, FP64, seeded

LAYOUTS = ("contiguous", "rows", "transposed")


def make_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous"
) -> dict[str, Tensor]:
    """Seeded x, w1 and w3 for (B, N, C, F). layout "rows": all are columns of something wider, whose leading dimensions
    still merge; "transposed": x's do not."""
    B, N, C, F = shape
    randn = seeded(0, torch.float64)
    pad = 8 if layout == "rows" else 0  # which keeps the pitch a multiple of 16 bytes where it was one
    sizes = {"x": ((B, N), 1.0), "w1": ((F,), 2 / C**0.5), "w3": ((F,), C**-0.5)}
    inputs = {n: (randn(*rows, C + pad) * size).to(dtype).to(device)[..., :C] for n, (rows, size) in sizes.items()}
    if layout == "transposed":
        inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    return inputs


def make_mlp_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous", out: int = 0
) -> dict[str, Tensor]:
    """`make_inputs`, and w2 (out or C, F), laid out as w1 is."""
    inputs = make_inputs(shape, dtype, device, layout)
    C, F = shape[2:]
    w2 = seeded(2, dtype, device)(out or C, F + 8)[:, :F].mul_(F**-0.5)
    return inputs | {"w2": w2 if layout == "rows" else w2.contiguous()}


def make_biased_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous", out: int = 0
) -> dict[str, Tensor]:
    """`make_mlp_inputs`, and the biases b1, b3 and b2."""
    inputs, randn = make_mlp_inputs(shape, dtype, device, layout, out), seeded(3, dtype, device)
    rows = {"b1": inputs["w1"], "b3": inputs["w3"], "b2": inputs["w2"]}
    return inputs | {name: randn(weight.shape[0]) for name, weight in rows.items()}


def make_grad(inputs: dict[str, Tensor]) -> Tensor:
    """A gradient of the output."""
    x, last = inputs["x"], inputs.get("w2", inputs["w1"])
    return torch.randn(*x.shape[:-1], last.shape[0], generator=torch.Generator().manual_seed(1)).to(x)


def silu_gates() -> Tensor:
    """fp32, from 0 to the far ends of what an exponential can take, where bf16 has many, and every size below 1."""
    size = torch.cat([torch.logspace(-38, 0, 2000, dtype=FP64), torch.linspace(1, 200, 20000, dtype=FP64)])
    return torch.cat([-size.flip(0), torch.zeros(1), size]).to(FP32)


def assert_silu(gate: Tensor, y: Tensor) -> None:
    """What `swiglu_kernels` says of its error."""
    exact = gate.double() * torch.sigmoid(gate.double())
    allowed = (4 + 0.62 * gate.double().clamp(max=0).abs()) * 2**-23 * exact.abs()
    excess = (y.double() - exact).abs() - allowed.clamp_min(1.1e-36)
    assert (excess <= 0).all(), f"at {gate[excess.argmax()]}: {y[excess.argmax()]}"


def check_silu(device: str) -> None:
    """By the kernel of one pass, with up = 1 and fp32 results."""
    gate = silu_gates()
    y = launch_activation(torch.stack([gate, torch.ones_like(gate)], -1).to(device))
    assert_silu(gate, y[:, 0].cpu())
