"""Check and time every attention backend on this machine, with and without the backward pass."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ddt_fast.command import CommandParser, run_command
from ddt_fast.device import DTYPES, choose_device
from ddt_fast.model.attention import AttentionBackend, attention, available_backends, resolve_backend
from ddt_fast.wording import plural

Shape = tuple[int, int, int, int]

# (B, N, H, D): the digits model, XL/2 at 256 and 512 px, L/2, the widest head the Triton kernel takes; on a CPU also
# few tokens, where the order changes.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": (
        *((256, 16, 2, 32), (64, 32, 2, 32), (32, 16, 16, 72), (2, 16, 16, 72), (2, 128, 16, 72), (2, 256, 16, 72)),
        *((1, 1024, 16, 72), (2, 256, 16, 64), (2, 256, 8, 128)),
    ),
    "cuda": ((256, 16, 2, 32), (128, 256, 16, 72), (32, 1024, 16, 72), (128, 256, 16, 64), (32, 1024, 8, 128)),
}
MIN_SAMPLE_SECONDS = 2e-3  # calls are repeated until one timing takes as long: a clock read costs nothing beside it


@dataclass(frozen=True)
class Measurement:
    """One backend on one shape and dtype: medians in µs and the largest error of its output, or why there are none."""

    forward: float | None = None
    with_backward: float | None = None
    error: float | None = None
    reason: str | None = None


def measure(device: torch.device, dtype: torch.dtype, shape: Shape, rounds: int = 15) -> dict[str, Measurement]:
    """Every backend on views of one packed qkv: first checked, then timed in turn, `rounds` times.

    shape: (B, N, H, D). Errors are those against sdpa_math in fp32 (fp64 for fp32 tensors). Right is what errs, in the
    output and in the gradients, at most twice as far as sdpa_math does in `dtype`, plus two ulps of the largest
    element; in fp32 32 ulps, which admits other exponentials and products of three TF32 ones, and no single TF32.
    What is missing, raises or is wrong is not timed.
    """
    B, N, H, D = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, N, 3, H, D, generator=generator).to(device, dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(device, dtype)

    def run(backend: str, qkv: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.unbind(2)
        out = attention(q, k, v, cast(AttentionBackend, backend))
        return out.detach(), *torch.autograd.grad(out, qkv, grad)

    wide = torch.float64 if dtype == torch.float32 else torch.float32
    exact = run("sdpa_math", qkv.detach().to(wide).requires_grad_(), grad.to(wide))

    def errors(backend: str) -> list[float]:
        return [(x - y).abs().max().item() for x, y in zip(run(backend, qkv, grad), exact, strict=True)]

    floor = (2 if dtype.itemsize == 2 else 32) * torch.finfo(dtype).eps
    limits = [2 * e + floor * x.abs().max().item() for e, x in zip(errors("sdpa_math"), exact, strict=True)]
    results = {}
    for backend, reason in available_backends(device, dtype, D).items():
        if reason is not None:
            results[backend] = Measurement(reason=f"missing: {reason}")
            continue
        try:
            found = errors(backend)
        except Exception as error:  # a package's or a driver's: to be shown, not to end the run
            results[backend] = Measurement(reason=f"failed: {type(error).__name__}: {' '.join(str(error).split())}")
            continue
        within = all(error <= limit for error, limit in zip(found, limits, strict=True))
        wrong = f"wrong: output and gradients off by {found[0]:.2g} and {found[1]:.2g}"
        results[backend] = Measurement(error=found[0], reason=None if within else wrong)

    def forward(backend: str) -> None:
        with torch.no_grad():
            q, k, v = qkv.unbind(2)
            attention(q, k, v, cast(AttentionBackend, backend))

    right = [backend for backend, result in results.items() if result.reason is None]
    calls: dict[tuple[str, bool], Callable[[], object]] = {}
    for backend in right:
        calls[backend, False] = partial(forward, backend)
        calls[backend, True] = partial(run, backend, qkv, grad)
    medians = _medians(calls, device, rounds)
    for backend in right:
        results[backend] = replace(
            results[backend], forward=medians[backend, False], with_backward=medians[backend, True]
        )
    return results


def _medians(
    calls: dict[tuple[str, bool], Callable[[], object]], device: torch.device, rounds: int
) -> dict[tuple[str, bool], float]:
    """µs per call, each the median of `rounds` timings; the calls take turns, so that a slow minute hits all."""

    def seconds(call: Callable[[], object], repeats: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    repeats = {key: max(1, round(MIN_SAMPLE_SECONDS / seconds(call, 1))) for key, call in calls.items()}
    samples: dict[tuple[str, bool], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            samples[key].append(seconds(call, repeats[key]) / repeats[key] * 1e6)
    return {key: statistics.median(times) for key, times in samples.items()}


def table(results: dict[str, Measurement], chosen: str, chosen_with_gradient: str) -> str:
    """Markdown, the fastest forward first; ratios are to the fastest's time, what "auto" takes is marked."""
    timed = sorted((r.forward, r.with_backward or 0.0, name, r.error) for name, r in results.items() if r.forward)
    lines = [
        "| backend | forward, µs | ratio | forward + backward, µs | ratio | largest error |",
        "|---|---|---|---|---|---|",
    ]
    for forward, both, backend, error in timed:
        ratio = f"{forward / timed[0][0]:.2f}{' (auto)' if backend == chosen else ''}"
        ratio_both = f"{both / min(t[1] for t in timed):.2f}{' (auto)' if backend == chosen_with_gradient else ''}"
        lines.append(f"| {backend} | {forward:.1f} | {ratio} | {both:.1f} | {ratio_both} | {error:.2g} |")
    return "\n".join(lines)


def main() -> None:
    parser = CommandParser(prog="python -m ddt_fast.model.attention", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtypes", type=list[str], default=["float32", "bfloat16"], help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--shapes", type=list[Shape] | None, default=None, help="[[B,N,H,D],...]; default: DDT's")
    parser.add_argument("--rounds", type=int, default=15, help="timings per backend, whose median is printed")
    parser.add_argument("--threads", type=int | None, default=None, help="of PyTorch on a CPU")
    args = parser.parse_args()
    device = choose_device(args.device)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads is {args.threads}; allowed: 1 or more")
        torch.set_num_threads(args.threads)
    if args.rounds < 1:
        raise ValueError(f"--rounds is {args.rounds}; allowed: 1 or more")
    unknown = [name for name in args.dtypes if name not in DTYPES]
    if unknown:
        raise ValueError(f"--dtypes has {unknown[0]!r}; allowed: {', '.join(DTYPES)}")
    shapes = args.shapes or SHAPES["cuda" if device.type == "cuda" else "cpu"]
    if any(min(shape) < 1 for shape in shapes):
        raise ValueError(f"--shapes is {shapes}; allowed: B, N, H and D of 1 or more")
    threads = f"{plural(torch.get_num_threads(), 'thread')} of {platform.machine()}"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    print(f"{hardware}, torch {torch.__version__}, median of {args.rounds}, interleaved")
    said = ""
    for name in args.dtypes:
        for shape in shapes:
            auto = [resolve_backend("auto", device, DTYPES[name], shape[3], shape[1], grad) for grad in (False, True)]
            print(f"\n{name}, B, N, H, D = {', '.join(map(str, shape))}\n")
            results = measure(device, DTYPES[name], shape, args.rounds)
            print(table(results, *auto))
            missing = "".join(f"\n- {backend} {r.reason}" for backend, r in results.items() if r.reason)
            if missing != said:
                print(missing)
                said = missing


if __name__ == "__main__":
    run_command(main)
