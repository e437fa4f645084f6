"""Inputs for the attention tests, in the layouts callers use, and the checks against the reference."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ddt_kernels import reference
from kernel_testing import check_against_reference, seeded

Shape = tuple[int, int, int, int]  # B, N, H, D
LAYOUTS = ("packed", "contiguous", "heads first", "odd pitch")


def make_heads(
    shape: Shape,
    dtype: torch.dtype,
    layout: str = "packed",
    device: str = "cpu",
    size: float = 1.0,
    keys: int | None = None,
) -> list[Tensor]:
    """Seeded q, k and v, q times `size`; k and v have `keys` tokens, or as many as q.

    packed: views of one (B, N, 3, H, D), or of one such for q and one for k and v. heads first: (B, H, N, D)
    transposed. odd pitch: rows 2D + 1 elements apart, which no copy of more than one element fits.
    """
    B, N, H, D = shape
    randn = seeded(0, dtype, device)
    tokens = (N, keys or N, keys or N)
    if layout == "packed":
        heads = list(randn(B, N, 3, H, D).unbind(2))
        if keys not in (None, N):
            heads[1:] = randn(B, keys, 3, H, D).unbind(2)[1:]
    elif layout == "contiguous":
        heads = [randn(B, n, H, D) for n in tokens]
    elif layout == "heads first":
        heads = [randn(B, H, n, D).transpose(1, 2) for n in tokens]
    else:
        assert layout == "odd pitch"
        heads = [randn(B, n, H, 2 * D + 1)[..., 1 : D + 1] for n in tokens]
    heads[0].mul_(size)
    return heads


def make_grad(heads: Sequence[Tensor]) -> Tensor:
    """A gradient for the output, contiguous."""
    return torch.randn(heads[0].shape, generator=torch.Generator().manual_seed(1)).to(heads[0])


def check_attention(
    heads: Sequence[Tensor],
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    gradients: Mapping[str, Tensor],
    scale: float | None = None,
) -> None:
    """The tolerance rule, for the output and the three gradients."""

    # PyTorch's CUDA kernels read 16 bytes at a time, unasked: an odd pitch is a misaligned address to them, after which
    # the process cannot use the GPU any more.
    def attention(*tensors: Tensor) -> Tensor:
        return reference.attention(*(tensor.contiguous() for tensor in tensors), scale)

    check_against_reference(attention, dict(zip("qkv", heads, strict=True)), outputs, grads, gradients)


def check_logsumexp(heads: Sequence[Tensor], lse: Tensor, scale: float | None = None) -> None:
    """Within 1e-5 of exact, absolutely and relatively: exp2 and log2 are approximate to 2 ulps of fp32."""
    exact = reference.attention_logsumexp(heads[0].double(), heads[1].double(), scale)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)
