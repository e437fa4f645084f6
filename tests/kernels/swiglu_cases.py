"""swiglu as its tests see it: inputs and the comparison with the reference."""

import torch
from torch import Tensor

from ddt_kernels import reference
from kernel_testing import assert_as_accurate, with_gradients

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


def make_grad(inputs: dict[str, Tensor]) -> Tensor:
    """A gradient of the output."""
    x, w1 = inputs["x"], inputs["w1"]
    grad = torch.randn(*x.shape[:-1], w1.shape[0], generator=torch.Generator().manual_seed(1))
    return grad.to(x.dtype).to(x.device)


def check_against_reference(inputs: dict[str, Tensor], grad: Tensor, y: Tensor, gradients: dict[str, Tensor]) -> None:
    """The tolerance rule, for the output and every gradient given."""
    tensors = list(inputs.values())
    (plain,), plain_gradients = with_gradients(reference.swiglu, tensors, [grad])
    (oracle,), oracles = with_gradients(reference.swiglu, [t.double() for t in tensors], [grad.double()])
    assert_as_accurate("y", y, plain, oracle)
    for index, name in enumerate(NAMES):
        if name in gradients:
            assert_as_accurate(f"gradient of {name}", gradients[name], plain_gradients[index], oracles[index])
