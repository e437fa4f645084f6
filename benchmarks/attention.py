"""Which attention backends work on this machine, and how fast: `python -m benchmarks.attention`.

Every installed backend is verified against plain PyTorch in higher precision, then all that are right are timed in
turn, forward and with the backward pass. `ddt_fast.model.attention` takes its "auto" order from these tables.
"""

import platform
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Ceilings, measure, randn
from benchmarks.peers import attention_backends, function_case, packed
from benchmarks.report.tables import table
from ddt_fast.checks import require, require_int
from ddt_fast.command import CommandParser, run_command
from ddt_fast.device import DTYPES, choose_device
from ddt_fast.model.attention import resolve_backend
from ddt_fast.wording import plural
from ddt_kernels import reference

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


def compare(device: torch.device, dtype: torch.dtype, shape: Shape, rounds: int) -> tuple[str, dict[str, str]]:
    """A Markdown table of every backend on views of one packed qkv, the fastest forward first, what "auto" takes
    marked; and why the others have no time."""
    B, N, H, D = shape
    plain, peers = partial(packed, reference.attention), attention_backends(device, dtype, D)
    columns: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    for backward in (False, True):
        case = function_case(
            ("attention", "forward+backward" if backward else "forward", f"B, N, H, D = {shape}"),
            lambda generator: (randn(generator, B, N, 3, H, D, dtype=dtype),),
            plain,
            peers,
            device,
            dtype,
            backward=backward,
            rounds=rounds,
        )
        result = measure(case, Ceilings({}, 1.0, ""), device)
        columns.append({v["name"]: (v["seconds"]["median"], v["error"]) for v in result.record["variants"]})
        reasons |= result.missing | result.wrong
    auto = [resolve_backend("auto", device, dtype, D, N, gradient) for gradient in (False, True)]
    rows = []
    for name in sorted(columns[0], key=columns[0].__getitem__):
        row: list[object] = [name]
        for times, chosen in zip(columns, auto, strict=True):
            median = times[name][0] if name in times else None
            fastest = min(times.values())[0]
            ratio = median and f"{median / fastest:.2f}{' (auto)' * (name == chosen)}"
            row += [median and f"{1e6 * median:.1f}", ratio]
        rows.append([*row, columns[0][name][1]])
    return table("backend | forward, µs | ratio | forward + backward, µs | ratio | error", rows), reasons


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m benchmarks.attention", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtypes", type=list[str], default=["float32", "bfloat16"], help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--shapes", type=list[Shape] | None, default=None, help="[[B,N,H,D],...]; default: DDT's")
    parser.add_argument("--rounds", type=int, default=15, help="timings per backend, whose median is printed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch on a CPU")
    options = parser.parse_args(arguments)
    device = choose_device(options.device)
    for name in ("threads", "rounds"):
        require_int(f"--{name}", getattr(options, name), 1)
    for name in options.dtypes:
        require(name in DTYPES, "--dtypes", name, ", ".join(DTYPES))
    torch.set_num_threads(options.threads)
    shapes = options.shapes or SHAPES[device.type]
    if any(min(shape) < 1 for shape in shapes):
        raise ValueError(f"--shapes is {shapes}; allowed: B, N, H and D of 1 or more")
    threads = f"{plural(torch.get_num_threads(), 'thread')} of {platform.machine()}"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    print(f"{hardware}, torch {torch.__version__}, median of {options.rounds}, in turn")
    said: dict[str, str] = {}
    for name in options.dtypes:
        for shape in shapes:
            text, reasons = compare(device, DTYPES[name], shape, options.rounds)
            print(f"\n{name}, B, N, H, D = {', '.join(map(str, shape))}\n\n{text}", flush=True)
            if reasons != said:
                print("\n".join(["", *(f"- {backend}: {reason}" for backend, reason in reasons.items())]))
            said = reasons


if __name__ == "__main__":
    run_command(main)
