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
    randn = seeded(0, dtype, device)
    pad = 8 if layout == "rows" else 0  # which keeps the pitch a multiple of 16 bytes where it was one
    x, w1, w3 = (randn(*rows, C + pad)[..., :C] for rows in ((B, N), (F,), (F,)))
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    return {"x": x, "w1": w1.mul_(2 / C**0.5), "w3": w3.mul_(C**-0.5)}


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
    return seeded(1, x.dtype, x.device)(*x.shape[:-1], last.shape[0])
