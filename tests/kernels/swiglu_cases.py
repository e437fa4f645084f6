"""Inputs and gradients for the tests of swiglu and swiglu_mlp."""

import torch
from torch import Tensor

NAMES = ("x", "w1", "w3")
LAYOUTS = ("contiguous", "rows", "transposed")


def make_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous"
) -> dict[str, Tensor]:
    """Seeded x, w1 and w3 for (B, N, C, F). layout "rows": all are columns of something wider, whose leading dimensions
    still merge; "transposed": x's do not."""
    B, N, C, F = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(device)

    x, w1, w3 = randn(B, N, C), 2 * randn(F, C) / C**0.5, randn(F, C) / C**0.5
    if layout == "rows":  # 8 columns of padding keep the pitch a multiple of 16 bytes where it was one
        x, w1, w3 = (torch.cat([tensor, randn(*tensor.shape[:-1], 8)], -1) for tensor in (x, w1, w3))
        return {name: tensor[..., :C] for name, tensor in zip(NAMES, map(place, (x, w1, w3)), strict=True)}
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    return dict(zip(NAMES, map(place, (x, w1, w3)), strict=True))


def make_mlp_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous", out: int = 0
) -> dict[str, Tensor]:
    """`make_inputs`, and w2 (out or C, F), laid out as w1 is."""
    inputs = make_inputs(shape, dtype, device, layout)
    C, F = shape[2:]
    w2 = torch.randn(out or C, F + 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / F**0.5
    w2 = w2.to(dtype).to(device)[:, :F]
    return inputs | {"w2": w2 if layout == "rows" else w2.contiguous()}


def make_grad(inputs: dict[str, Tensor]) -> Tensor:
    """A gradient of the output."""
    x, last = inputs["x"], inputs.get("w2", inputs["w1"])
    grad = torch.randn(*x.shape[:-1], last.shape[0], generator=torch.Generator().manual_seed(1))
    return grad.to(x.dtype).to(x.device)
