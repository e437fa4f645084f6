"""Inputs and gradients for the tests of swiglu and swiglu_mlp."""

import torch
from torch import Tensor

from kernel_testing import seeded

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


def make_grad(inputs: dict[str, Tensor]) -> Tensor:
    """A gradient of the output."""
    x, last = inputs["x"], inputs.get("w2", inputs["w1"])
    return torch.randn(*x.shape[:-1], last.shape[0], generator=torch.Generator().manual_seed(1)).to(x)
