"""The interpreter computes bf16 as hardware does: through fp32, rounding to nearest even."""

import torch

from ddt_kernels.runtime import tl, triton


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    offsets = i[:, None] * SIZE + i[None, :]
    tl.store(out_ptr + offsets, tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)))


@triton.jit
def elementwise_kernel(a_ptr, b_ptr, out_ptr, sum_ptr, bound, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    for _ in range(0, bound):
        a = tl.where(a > b, a + b, -a * b)
    tl.store(out_ptr + i, a)
    tl.store(sum_ptr, tl.sum(a, axis=0))


@triton.jit
def cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


def test_dot_of_bf16():
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.zeros(16, 16)
    dot_kernel[(1,)](a, b, out, SIZE=16)
    torch.testing.assert_close(out, a.float() @ b.float())


def test_arithmetic_comparison_and_sum_of_bf16():
    a, b = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    out, total = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(1)
    elementwise_kernel[(1,)](a, b, out, total, 1, SIZE=64)
    expected = torch.where(a > b, a + b, -a * b)
    assert torch.equal(out, expected)
    torch.testing.assert_close(total, expected.float().sum()[None].bfloat16().float())


def test_casts_round_to_nearest_even():
    ties = 1 + (2 * torch.arange(64, dtype=torch.float32) + 1) * 2.0**-8  # halfway between two neighbours in bf16
    x = torch.cat([ties, -ties, ties * (1 + 2.0**-20), torch.tensor([float("inf"), float("nan"), 0.0, 3e38] * 16)])
    out = torch.zeros(256, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, SIZE=256)
    assert torch.equal(out.nan_to_num(7), x.bfloat16().nan_to_num(7))


def test_fresh_allocations_are_nan():
    x = torch.zeros(2)
    assert torch.empty(3).isnan().all()
    assert x.new_empty(3).isnan().all()
    assert torch.empty_like(x).isnan().all()
