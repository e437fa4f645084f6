"""Configurations that must not ship, each for one reason: `python -m ddt_kernels.aot --module red_aot_cases` is red."""

import torch

from ddt_kernels.compilation import AotCase
from ddt_kernels.runtime import launch, tl, triton


@triton.jit
def spilling_kernel(x_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(x_ptr + i, x * tl.sum(x))


@triton.jit
def oversized_kernel(x_ptr, M: tl.constexpr, K: tl.constexpr):
    m, k = tl.arange(0, M), tl.arange(0, K)
    x = tl.load(x_ptr + m[:, None] * K + k[None, :])
    y = tl.load(x_ptr + k[:, None] * M + m[None, :])
    tl.store(x_ptr + m[:, None] * M + m[None, :], tl.dot(x, y).to(tl.bfloat16))


@triton.jit
def plain_kernel(x_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(x_ptr + i, tl.load(x_ptr + i) + 1)


@triton.jit
def invalid_kernel(x_ptr):
    tl.static_assert(False, "cannot be compiled")


def aot_cases() -> list[AotCase]:
    device = torch.device("meta")
    x, h = torch.empty(1 << 20, device=device), torch.empty(1 << 20, dtype=torch.bfloat16, device=device)
    return [
        AotCase("spills", lambda: launch(spilling_kernel, (1,), device, x, SIZE=16384, num_warps=1)),
        AotCase("too big", lambda: launch(oversized_kernel, (1,), device, h, M=128, K=512, num_warps=8)),
        AotCase("no mma", lambda: launch(plain_kernel, (1,), device, x, SIZE=128), tensor_cores=("plain_kernel",)),
        AotCase("no bulk copy", lambda: launch(plain_kernel, (1,), device, x, SIZE=128), bulk_copies=("plain_kernel",)),
        AotCase("invalid", lambda: launch(invalid_kernel, (1,), device, x)),
        AotCase("nothing", lambda: None),
        AotCase("good", lambda: launch(plain_kernel, (1,), device, x, SIZE=128)),
    ]
