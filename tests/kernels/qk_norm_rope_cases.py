"""qk_norm_rope as the tests see it: inputs, reference, tolerance."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddt_kernels import reference
from kernel_testing import assert_as_accurate, with_gradients

DIFFERENTIABLE = ("qkv", "q_weight", "k_weight")


def make_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str = "cpu",
    strided: bool = True,
    weight_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Seeded inputs for (B, N, H, D). strided: qkv is a view of something larger, tokens outside samples."""
    B, N, H, D = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).to(device)

    qkv = randn(N, B, 4, H, D)[:, :, :3].transpose(0, 1) if strided else randn(B, N, 3, H, D)
    angles = 7 * torch.randn(N, D // 2, generator=generator)
    return {
        "qkv": qkv,
        "q_weight": (1 + randn(D) / 4).to(weight_dtype or dtype),
        "k_weight": (1 + randn(D) / 4).to(weight_dtype or dtype),
        "cos": angles.cos().to(device),
        "sin": angles.sin().to(device),
    }


def make_grad(inputs: dict[str, Tensor]) -> Tensor:
    """A gradient of the output, not contiguous."""
    generator = torch.Generator().manual_seed(1)
    B, N, _, H, D = inputs["qkv"].shape
    grad = torch.randn(B, N, H, 3, D, generator=generator).transpose(2, 3)
    return grad.to(inputs["qkv"].dtype).to(inputs["qkv"].device)


def check_against_reference(
    inputs: dict[str, Tensor],
    grad: Tensor | None,
    output: Tensor,
    gradients: Sequence[Tensor] = (),
    eps: float = 1e-6,
) -> None:
    """The tolerance rule, for the output and, given its gradient, for the gradients; v and its gradient exactly."""
    tables = (inputs["cos"], inputs["sin"])
    leaves = [inputs[name] for name in DIFFERENTIABLE]

    def function(*tensors: Tensor) -> Tensor:
        return reference.qk_norm_rope(*tensors, *tables, eps)

    wide = [tensor.double() for tensor in leaves]
    seed = make_grad(inputs) if grad is None else grad
    plain, plain_gradients = with_gradients(function, leaves, [seed])
    oracle, oracle_gradients = with_gradients(function, wide, [seed.double()])
    for index, name in enumerate("qk"):
        assert_as_accurate(name, *(tensors.select(2, index) for tensors in (output, plain[0], oracle[0])))
    assert torch.equal(output[:, :, 2], inputs["qkv"][:, :, 2])
    if grad is not None:
        for name, *results in zip(DIFFERENTIABLE, gradients, plain_gradients, oracle_gradients, strict=True):
            assert_as_accurate(f"gradient of {name}", *results)
        assert torch.equal(gradients[0][:, :, 2], grad[:, :, 2])
