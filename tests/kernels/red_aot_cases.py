"""Configurations that must not ship, each for one reason: `python -m ddt_kernels.aot --module red_aot_cases` is red."""

from unittest.mock import patch

import torch

from ddt_kernels import attention_launch
from ddt_kernels.compilation import AotCase, Budget
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
def chain_kernel(x_ptr, count, SIZE: tl.constexpr):
    """Each load needs what the one before it returned."""
    i = tl.arange(0, SIZE)
    for _ in range(count):
        i = tl.load(x_ptr + tl.load(x_ptr + i))
        tl.debug_barrier()
    tl.store(x_ptr + i, i)


@triton.jit
def invalid_kernel(x_ptr):
    tl.static_assert(False, "cannot be compiled")


def _chain(configuration: str, i: torch.Tensor, count: int, budget: Budget) -> AotCase:
    run = lambda: launch(chain_kernel, (1,), i.device, i, count, SIZE=128)  # noqa: E731
    return AotCase(configuration, run, budgets={"chain_kernel": budget})


def _serialised() -> None:
    """Attention with a tile for which 128 registers are too few to run wgmmas asynchronously."""
    q = torch.empty(2, 1000, 16, 128, dtype=torch.bfloat16, device="meta")
    tile = attention_launch.TileConfig(128, 64, 8, 3, max_registers=128)
    with patch.object(attention_launch, "forward_candidates", lambda *_: (tile,)):
        attention_launch.launch_forward(q, q, q, 0.1)


def aot_cases() -> list[AotCase]:
    device = torch.device("meta")
    i = torch.empty(1 << 20, dtype=torch.int32, device=device)
    x, h = torch.empty(1 << 20, device=device), torch.empty(1 << 20, dtype=torch.bfloat16, device=device)
    return [
        AotCase("spills", lambda: launch(spilling_kernel, (1,), device, x, SIZE=16384, num_warps=1)),
        AotCase("too big", lambda: launch(oversized_kernel, (1,), device, h, M=128, K=512, num_warps=8)),
        AotCase("no mma", lambda: launch(plain_kernel, (1,), device, x, SIZE=128), tensor_cores=("plain_kernel",)),
        AotCase("no bulk copy", lambda: launch(plain_kernel, (1,), device, x, SIZE=128), bulk_copies=("plain_kernel",)),
        _chain("phases", i, 4, Budget(phases=1, barriers=1)),
        _chain("barriers", i, 4, Budget(phases=2)),
        _chain("slow", i, 4, Budget(phases=2, barriers=1, bytes=512)),
        _chain("excused", i, 4, Budget(phases=2, barriers=1, bytes=512, latency_bound="a chain")),
        _chain("constant", i, 1, Budget(phases=2, barriers=1)),
        AotCase("serialised", _serialised),
        AotCase("invalid", lambda: launch(invalid_kernel, (1,), device, x)),
        AotCase("nothing", lambda: None),
        AotCase("good", lambda: launch(plain_kernel, (1,), device, x, SIZE=128)),
    ]
