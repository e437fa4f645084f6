"""`python -m ddt_kernels.check`: whether every kernel is right on this GPU, and how fast each implementation is.

Verifies every op anew, forward and backward, at the shapes of DDT-XL/2 (256 px), several at a time in processes of
their own; then times what runs, beside plain PyTorch. Prints a table and the choices made by timing, and keeps both
for later runs. Exits with 1 if a kernel failed: PyTorch runs in its place then, so results are right all the same.
Exit code 2: no NVIDIA GPU, or a wrong argument.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ddt_kernels as ops
from ddt_kernels import launcher, reference, runtime, tuning, verification
from ddt_kernels.cost import Cost
from ddt_kernels.store import environment, store

Tensors = tuple[Any, ...]
PROCESSES = min(8, os.cpu_count() or 1)  # that verify at a time: mostly Triton's compiler, on the CPU


@dataclass(frozen=True)
class Sizes:
    """Of XL/2 at 256 px: images, tokens, heads, their width, the MLP's width, the side of a latent."""

    batch: int = 64
    tokens: int = 256
    heads: int = 16
    head_dim: int = 72
    width: int = 3072
    side: int = 32

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Case:
    """An op on inputs. With `backward`, the gradients of the first `differentiable` ones count too."""

    op: str
    kind: str
    dtype: torch.dtype
    make: Callable[[Callable[..., Tensor]], Tensors]  # the arguments, from a randn
    run: Callable[..., Any]
    plain: Callable[..., Any]  # the same by PyTorch
    cost: Cost
    backward: bool = False
    differentiable: int | None = None  # None: all

    def call(self, function: Callable[..., Any], device: torch.device) -> Callable[[], object]:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(self.dtype)

        args = self.make(randn)
        if not self.backward:
            return torch.no_grad()(lambda: function(*args))
        inputs = [arg.detach().requires_grad_() for arg in args[: self.differentiable]]
        leaves = (*inputs, *args[len(inputs) :])

        def forward_backward() -> object:
            with torch.enable_grad():
                made = function(*leaves)
                outputs = made if isinstance(made, tuple) else (made,)
                return torch.autograd.grad(outputs, inputs, outputs)

        return forward_backward


def cases(sizes: Sizes) -> Iterator[Case]:
    """bf16, then what fp32 changes."""
    half, full = torch.bfloat16, torch.float32
    for dtype in (half, full):
        for backward in (False, True):
            yield from _norm_cases(sizes, dtype, backward)
            yield from _layer_cases(sizes, dtype, backward)
    yield from _sampling_cases(sizes, half)


def _norm_cases(sizes: Sizes, dtype: torch.dtype, backward: bool) -> Iterator[Case]:
    B, N, C = sizes.batch, sizes.tokens, sizes.channels
    shape, kinds = (B, N, C), (False, True) if dtype == torch.bfloat16 else (False,)

    def cost(function: Callable[..., Cost], per_token: bool, **options: Any) -> Cost:
        made = function(*shape, dtype, per_token, **options)
        return made + function(*shape, dtype, per_token, backward=True, **options) if backward else made

    for per_token in kinds:

        def rms(randn: Callable[..., Tensor], rows: int = N if per_token else 1) -> Tensors:
            return randn(*shape), randn(C), *randn(B, rows, 6 * C).chunk(6, -1)[:2]

        def gated(randn: Callable[..., Tensor], rows: int = N if per_token else 1) -> Tensors:
            shift, scale, gate = randn(B, rows, 6 * C).chunk(6, -1)[:3]
            return randn(*shape), randn(*shape), gate, randn(C), shift, scale

        def layer(randn: Callable[..., Tensor], rows: int = N if per_token else 1) -> Tensors:
            shift, scale, gate = randn(B, rows, 6 * C).chunk(6, -1)[:3]
            return randn(*shape), randn(*shape), gate, shift, scale

        kind = "per token" if per_token else "per sample"
        for name, make in (
            ("rms_norm_modulate", rms),
            ("gated_residual_rms_norm_modulate", gated),
            ("gated_residual_layer_norm_modulate", layer),
        ):
            run, plain = getattr(ops, name), getattr(reference, name)
            yield Case(name, kind, dtype, make, run, plain, cost(getattr(ops, f"{name}_cost"), per_token), backward)


def _layer_cases(sizes: Sizes, dtype: torch.dtype, backward: bool) -> Iterator[Case]:
    B, N, H, D, width = sizes.batch, sizes.tokens, sizes.heads, sizes.head_dim, sizes.width
    C = sizes.channels

    def heads(randn: Callable[..., Tensor]) -> Tensors:
        return randn(B, N, 3, H, D), randn(D), randn(D), randn(N, D // 2).float(), randn(N, D // 2).float()

    def qkv(randn: Callable[..., Tensor]) -> Tensors:
        return randn(B, N, 3, H, D).unbind(2)

    def mlp(randn: Callable[..., Tensor]) -> Tensors:
        w1, w3 = (randn(2, width, C) * C**-0.5).unbind(0)
        return randn(B, N, C), w1, w3, randn(C, width) * width**-0.5

    def cost(function: Callable[..., Cost], *shape: int, **options: Any) -> Cost:
        made = function(*shape, dtype, **options)
        return made + function(*shape, dtype, backward=True) if backward else made

    yield Case(
        "qk_norm_rope", "copied", dtype, heads, ops.qk_norm_rope, reference.qk_norm_rope,
        cost(ops.qk_norm_rope_cost, B, N, H, D), backward, differentiable=3,
    )  # fmt: skip
    yield Case(
        "attention", "packed", dtype, qkv, ops.attention, _attention, cost(ops.attention_cost, B, N, H, D), backward
    )
    if dtype == torch.bfloat16:
        training = {"training": True} if backward else {}
        yield Case(
            "swiglu_mlp", f"F {width}", dtype, mlp, ops.swiglu_mlp, _mlp,
            cost(ops.swiglu_mlp_cost, B, N, C, width, **training), backward,
        )  # fmt: skip


def _sampling_cases(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    B, N, C, side = sizes.batch, sizes.tokens, sizes.channels, sizes.side

    def forecast(randn: Callable[..., Tensor]) -> Tensors:
        shift, scale, gate = randn(2, B, N, 3 * C).chunk(3, -1)
        weights, step = randn(4, 2).float(), torch.zeros(1, dtype=torch.int64, device=shift.device)
        return randn(B, N, C), randn(B, N, C), gate, randn(C), shift, scale, weights, step

    def step(randn: Callable[..., Tensor]) -> Tensors:
        tokens, row = randn(2 * B, (side // 2) ** 2, 16), randn(4, 10).float()
        counter = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        return randn(B, 4, side, side).float(), tokens[:B], tokens[B:], row, counter

    def plainly(x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, *others: Tensor) -> Any:
        shift, scale, *forecast = others
        gate, shift, scale = (reference.forecast(history, *forecast) for history in (gate, shift, scale))
        return reference.gated_residual_rms_norm_modulate(x, branch, gate, weight, shift, scale)

    name = "gated_residual_rms_norm_modulate"
    yield Case(
        name, "per token, forecast from 2", dtype, forecast,
        lambda *args: ops.gated_residual_rms_norm_modulate(*args[:-2], forecast=args[-2:]), plainly,
        getattr(ops, f"{name}_cost")(B, N, C, dtype, True, history=2),
    )  # fmt: skip
    yield Case(
        "guided_step", "Euler, guided", dtype, step, lambda *args: ops.guided_step(*args, patch_size=2),
        lambda *args: reference.guided_step(*args, patch_size=2),
        ops.guided_step_cost(B, 4, side, side, dtype),
    )  # fmt: skip


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _mlp(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches: bytes/s of a copy, read and written; FLOP/s of a square bf16 GEMM."""

    copy_bytes_per_second: float
    gemm_flops_per_second: float

    @classmethod
    def measure(cls, device: torch.device, gibibytes: float = 1.0, side: int = 8192) -> "Ceilings":
        source = torch.empty(int(gibibytes * 2**30), dtype=torch.int8, device=device)
        target, a = torch.empty_like(source), torch.ones(side, side, dtype=torch.bfloat16, device=device)
        copy = tuning.milliseconds_of(lambda _: target.copy_(source), "", device)
        gemm = tuning.milliseconds_of(lambda _: a @ a, "", device)
        return cls(2e3 * source.numel() / copy, 2e3 * side**3 / gemm)

    def floor(self, cost: Cost) -> tuple[float, str]:
        """The least milliseconds, and what bounds them."""
        copy, gemm = cost.bytes_moved / self.copy_bytes_per_second, cost.flops / self.gemm_flops_per_second
        return (1e3 * copy, "copy") if copy >= gemm else (1e3 * gemm, "gemm")


def check(device: torch.device, sizes: Sizes, ceilings: Ceilings, processes: int = PROCESSES) -> list[dict[str, Any]]:
    """A row for every case: op, kind, dtype, verdict, error, milliseconds, share of the ceiling."""
    calls = {}
    for case in cases(sizes):
        with launcher.collecting() as specs:
            case.call(case.run, device)()
        calls[case] = specs
    verdicts = verification.verify_all([spec for specs in calls.values() for spec in specs], device, processes)
    return [
        _row(case, [(spec["op"], verdicts[verification.key_of(spec)]) for spec in specs], device, ceilings)
        for case, specs in calls.items()
    ]


def _row(
    case: Case, verdicts: Sequence[tuple[str, verification.Verdict]], device: torch.device, ceilings: Ceilings
) -> dict[str, Any]:
    failed = {f"{op} FAILED: {found.reason}" for op, found in verdicts if found.reason}
    left_out = {f"{op} without {name}: {why}" for op, found in verdicts for name, why in found.candidates.items()}
    runs = {"ours": case.call(case.run, device), "torch": case.call(case.plain, device)}
    times = {name: tuning.milliseconds_of(lambda call: call(), run, device) for name, run in runs.items()}
    # In fp32, which no tensor core multiplies, only memory has a measured ceiling.
    cost = case.cost if case.dtype != torch.float32 else Cost(case.cost.bytes_moved, 0)
    floor, bound = ceilings.floor(cost)
    return {
        "op": case.op,
        "kind": f"{case.kind}, forward{' and backward' if case.backward else ''}",
        "dtype": str(case.dtype).removeprefix("torch."),
        "verdict": "FAILED" if failed else "right",
        "notes": sorted(failed | left_out),
        "error": max((found.share for _, found in verdicts), default=0.0),
        "milliseconds": times["ours"],
        "torch_milliseconds": times["torch"],
        "share_of_ceiling": floor / times["ours"],
        "bound_by": bound,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For a terminal."""
    cells = [("op", "dtype", "shape and pass", "error", "verdict", "ms", "PyTorch", "ceiling")]
    for row in rows:
        share = f"{row['share_of_ceiling']:.0%} of {row['bound_by']}"
        times = f"{row['milliseconds']:.3f}", f"{row['torch_milliseconds']:.3f}"
        cells.append(
            (
                row["op"],
                row["dtype"],
                row["kind"],
                "-" if row["verdict"] == "FAILED" else f"{row['error']:.2f}",
                row["verdict"],
                *times,
                share,
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([*lines, *sorted({note for row in rows for note in row["notes"]})])


def chosen() -> list[str]:
    """The implementations chosen by timing, a line each."""
    lines = []
    for choice in tuning.choices():
        times = ", ".join(f"{name} {time:.3f} ms" for name, time in choice.milliseconds.items())
        lines.append(f"{choice.op}: {choice.chosen} ({times})")
    return lines


def report(device: torch.device, sizes: Sizes, ceilings: Ceilings, seconds: float, rows: Any) -> dict[str, Any]:
    """What --output holds."""
    return {
        "environment": {**environment(device), "python": platform.python_version(), "command": sys.argv},
        "sizes": asdict(sizes),
        "ceilings": asdict(ceilings),
        "seconds": seconds,
        "rows": rows,
        "choices": [
            {"op": c.op, "key": str(c.key), "chosen": c.chosen, "milliseconds": c.milliseconds}
            for c in tuning.choices()
        ],
        "running": tuning.running(),
    }


def device_in_use() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, prints, returns the exit code."""
    summary, details = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(prog="python -m ddt_kernels.check", description=summary, epilog=details)
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write everything as JSON")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "error: PyTorch sees no NVIDIA GPU here; python -m ddt_kernels.aot compiles every kernel without one",
            file=sys.stderr,
        )
        return 2
    if not runtime.HAS_TRITON:
        print("error: there is no triton to check: pip install triton, and unset DDT_KERNELS=torch", file=sys.stderr)
        return 2
    device, sizes, started = device_in_use(), Sizes(), time.perf_counter()
    print(f"verifying and timing on {torch.cuda.get_device_name(device)}: about a minute", flush=True)
    ceilings = Ceilings.measure(device)
    rows = check(device, sizes, ceilings)
    made = report(device, sizes, ceilings, time.perf_counter() - started, rows)
    if options.output is not None:
        temporary = options.output.with_name(options.output.name + ".tmp")
        temporary.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, options.output)
    print(table(rows), *chosen(), sep="\n")
    copy, gemm = ceilings.copy_bytes_per_second / 1e12, ceilings.gemm_flops_per_second / 1e12
    print(f"ceilings measured here: copy {copy:.2f} TB/s, bf16 GEMM {gemm:.0f} TFLOP/s; kept in {store(device).path}")
    failures = sum(row["verdict"] == "FAILED" for row in rows)
    print(f"{len(rows)} cases in {made['seconds']:.0f} s, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
