"""The interpreter computes bf16 as hardware does: through fp32, rounding to nearest even."""

import pytest
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


@triton.jit
def scalar_condition_kernel(x_ptr, condition_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    used = (i < SIZE - 1) & (tl.load(condition_ptr) != 0)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=used, other=0.0))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_scalar_comparison_masks_a_tile(dtype):
    x = torch.arange(1, 9, dtype=torch.float32)
    for condition in (0, 2):
        out = torch.empty(8)
        scalar_condition_kernel[(1,)](x, torch.tensor([condition], dtype=dtype), out, SIZE=8)
        assert torch.equal(out, x * torch.tensor([condition != 0] * 7 + [False]))


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
