"""Host time of a launch, without a GPU: what the CPU does from a launcher's call to the driver's.

    python -m benchmarks.host_time

writes host_time.json and prints its table. Kernels are compiled for sm_90 and handed to a stand-in for the driver, so
the driver's own time (about 5 µs a launch) is left out. Outputs are allocated on the CPU, of few tokens: large ones
take a CPU long, but not a GPU's allocator. "decided each time" runs the launcher and Triton's own launch at every call;
"known signature" is what every call but the first does (`ddt_kernels.runtime.launcher`). Both take turns in one run;
the fastest round counts, as other programs only add to it. The backward passes of the norms and of qk_norm_rope end in
sums by torch, which are counted here.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.report import tables
from ddt_fast.command import CommandParser, run_command
from ddt_fast.files import write_json
from ddt_kernels import attention_launch, norm_launch, qk_norm_rope_launch, runtime, swiglu_launch
from ddt_kernels.compilation import launching_into
from ddt_kernels.guided_step import launch_guided_step

Make = Callable[..., tuple[Any, ...]]
Call = Callable[..., Any]
ROUNDS, CALLS_A_ROUND = 100, 25


def calls(tokens: int, heads: int, width: int) -> dict[str, tuple[Make, Call]]:
    """By name, inputs from a `randn` of bf16, and a launcher's call on them. One image; heads of 72."""
    channels = 72 * heads

    def norm(randn: Callable[..., Tensor]) -> tuple[Any, ...]:
        shift, scale, gate = randn(2, 1, 6 * channels).chunk(6, -1)[:3]
        return randn(2, tokens, channels), randn(2, tokens, channels), gate, randn(channels), shift, scale

    def qkv(randn: Callable[..., Tensor]) -> tuple[Any, ...]:
        table = randn(tokens, 36).float()
        return randn(2, tokens, 3, heads, 72), randn(72), randn(72), table, table.clone(), 1e-6

    def attended(randn: Callable[..., Tensor]) -> tuple[Any, ...]:
        lse = randn(2, heads, tokens).float()
        return *randn(2, tokens, 3, heads, 72).unbind(2), randn(2, tokens, heads, 72), lse

    def mlp(randn: Callable[..., Tensor]) -> tuple[Any, ...]:
        return randn(2, tokens, channels), *randn(2 * width, channels).chunk(2)  # as FusedDDT has them

    def step(randn: Callable[..., Tensor]) -> tuple[Any, ...]:
        counter = torch.ones(1, dtype=torch.int64)
        return randn(2, 4, 8, 8).float(), randn(2, 16, 16), randn(2, 16, 16), randn(5, 10).float(), counter

    guided: Call = launch_guided_step
    return {
        "norm forward": (
            norm,
            lambda x, branch, gate, weight, shift, scale: norm_launch.launch_forward(
                x, branch, gate, weight, shift, scale, 1e-6, "rms", True
            ),
        ),
        "norm backward": (
            norm,
            lambda x, branch, gate, weight, _, scale: norm_launch.launch_backward(
                x, branch, x, branch, gate, weight, scale, 1e-6, "rms"
            ),
        ),
        "qk_norm_rope in place": (
            qkv,
            lambda x, wq, wk, cos, sin, eps: qk_norm_rope_launch.launch_forward(x, wq, wk, cos, sin, eps, x),
        ),
        "qk_norm_rope backward": (
            qkv,
            lambda x, wq, wk, cos, sin, eps: qk_norm_rope_launch.launch_backward(x, x, wq, wk, cos, sin, eps),
        ),
        "attention forward": (attended, lambda q, k, v, *_: attention_launch.launch_forward(q, k, v, 0.1)),
        "attention backward": (
            attended,
            lambda q, k, v, out, lse: attention_launch.launch_backward(out, out, lse, q, k, v, 0.1),
        ),
        "swiglu forward": (mlp, lambda x, w1, w3: swiglu_launch.launch_forward(x, w1, w3, True, False)),
        "guided_step": (step, lambda x, *i: guided(x, *i, None, None, None, x, 2)),
    }


def microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS_A_ROUND):
        call()
    return (time.perf_counter() - start) / CALLS_A_ROUND * 1e6


def measure() -> list[dict[str, Any]]:
    """Of every launcher: its launches, and host microseconds a call, both ways."""
    rows = []
    launches: list[str] = []

    def receive(binary: Any) -> Callable[..., None]:
        return lambda *arguments: launches.append(binary.name)

    with launching_into(receive), torch.no_grad():
        for name, (make, call) in calls(tokens=4, heads=16, width=3072).items():
            inputs = make(lambda *size: torch.randn(*size).to(torch.bfloat16))
            known = lambda inputs=inputs, call=call: call(*inputs)  # noqa: E731
            known()
            launches.clear()
            known()
            kernels = list(launches)
            times: dict[str, list[float]] = {"decided": [], "known": []}
            for _ in range(ROUNDS):
                times["known"].append(microseconds(known))
                with patch.object(runtime, "_compiling", False):
                    times["decided"].append(microseconds(known))
                launches.clear()
            fastest = {kind: min(values) for kind, values in times.items()}
            rows.append({"call": name, "launches": kernels, **fastest})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m benchmarks.host_time", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/host_time.json"))
    options = parser.parse_args(arguments)
    os.environ["DDT_KERNELS_AUTOTUNE"] = "0"
    torch.set_num_threads(1)
    record = {"environment": environment(), "host_time": measure()}
    write_json(options.output, record)
    print("\n\n".join(tables.host_time(record)))


if __name__ == "__main__":
    run_command(main)
