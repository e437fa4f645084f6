"""Inputs for the qk_norm_rope tests, and the check against the reference."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ddt_kernels import reference
from kernel_testing import check_against_reference, seeded

FIXED = ("cos", "sin")


def make_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str = "cpu",
    strided: bool = True,
    weight_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Seeded inputs for (B, N, H, D). strided: qkv is a view of something larger, tokens outside samples."""
    B, N, H, D = shape
    randn = seeded(0, dtype, device)
    qkv = randn(N, B, 4, H, D)[:, :, :3].transpose(0, 1) if strided else randn(B, N, 3, H, D)
    angles = 7 * seeded(1, torch.float32, device)(N, D // 2)
    return {
        "qkv": qkv,
        "q_weight": (1 + randn(D) / 4).to(weight_dtype or dtype),
        "k_weight": (1 + randn(D) / 4).to(weight_dtype or dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }


def make_grad(inputs: dict[str, Tensor]) -> Tensor:
    """A gradient of the output, not contiguous."""
    B, N, _, H, D = inputs["qkv"].shape
    return torch.randn(B, N, H, 3, D, generator=torch.Generator().manual_seed(1)).transpose(2, 3).to(inputs["qkv"])


def check_qk_norm_rope(
    inputs: dict[str, Tensor],
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor] = (),
    gradients: Mapping[str, Tensor] | None = None,
    eps: float = 1e-6,
) -> None:
    """The tolerance rule, for q and k and, given a gradient of the output, for the gradients; v and its own exactly."""

    def heads(*tensors: Tensor) -> tuple[Tensor, ...]:
        return reference.qk_norm_rope(*tensors, eps).unbind(2)

    by_head = [part for grad in grads for part in grad.unbind(2)]
    check_against_reference(heads, inputs, outputs[0].unbind(2), by_head, gradients, FIXED)
    assert torch.equal(outputs[0][:, :, 2], inputs["qkv"][:, :, 2])
    if gradients is not None:
        assert torch.equal(gradients["qkv"][:, :, 2], grads[0][:, :, 2])
