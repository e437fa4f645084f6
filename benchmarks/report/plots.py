"""Figures: achieved against the ceilings, time against refresh, a block's time by kernel.

A figure carries the digest of what it was drawn from, so that one of other results is found out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.figures import figure
from benchmarks.report import floors
from benchmarks.report.files import CaseResult, Results, ResultsFile, Variant
from ddt_fast.presets import PRESETS


@dataclass(frozen=True)
class Figure:
    """A file to be drawn.

    Attributes:
        name: of the file.
        title: what it shows.
        digest: of what it is drawn from.
        of_suite: whether that is a suite's results.
        draw: writes it to a path.
    """

    name: str
    title: str
    digest: str
    of_suite: bool
    draw: Callable[[Path], None]

    def link(self, folder: str) -> str:
        """To it, in Markdown."""
        return f"![{self.title}]({folder}{self.name})"

    def is_current(self, folder: Path) -> bool:
        """Whether the file in `folder` was drawn from the same."""
        from PIL import Image

        path = folder / self.name
        if not path.is_file():
            return False
        with Image.open(path) as image:
            return bool(image.info.get("Description") == self.digest)


FLOORS_TITLE = "Arithmetic, not a measurement: floors of XL/2's blocks on an H200, 32,768 rows"


def figures(results: Results) -> list[Figure]:
    """All that there is something to show in."""
    title, digest = FLOORS_TITLE, _digest(floors.section().encode())
    made = [Figure("floors.png", title, digest, False, partial(_plot_floors, title=title, digest=digest))]
    for file in results.of("suite"):
        where = "on a GPU" if file.gpu else "on a CPU"
        kinds: dict[str, tuple[str, Callable[[ResultsFile], Any], Callable[..., None]]] = {
            "roofline": (f"Achieved against the ceilings measured in the same run, {where}", _points, _plot_roofline),
            "refresh": (f"Sampling over what is refreshed, {where}", _sampling_cases, _plot_refresh),
            "blocks": (f"A block's time by kernel, {where}; its plain GEMMs are not among them", _stacks, _plot_blocks),
        }
        for kind, (title, select, plot) in kinds.items():
            data = select(file)
            if data:
                name, digest = f"{file.path.stem}_{kind}.png", _digest(file.path.read_bytes())
                made.append(Figure(name, title, digest, True, partial(plot, title=title, digest=digest, data=data)))
    return made


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _points(file: ResultsFile) -> list[tuple[str, Variant, float, float]]:
    """(group, variant, intensity over the ridge's, FLOP/s over the GEMM ceiling) of all that has FLOPs and bytes."""
    return [
        (
            case.group,
            variant,
            variant.flops / variant.bytes * case.copy / case.gemm,
            variant.flops / variant.median / case.gemm,
        )
        for case in file.cases
        for variant in case.variants
        if variant.flops and variant.bytes and case.gemm
    ]


def _plot_roofline(path: Path, title: str, digest: str, data: Sequence[tuple[str, Variant, float, float]]) -> None:
    with figure(path, 1, 1, (11, 7), title, digest) as (axis,):
        low, high = min(point[2] for point in data) / 2, max(max(point[2] for point in data) * 2, 4)
        axis.plot([low, 1, high], [low, 1, 1], color="black", label="ceilings: copy, then GEMM")
        kinds = {
            "ours": ("o", lambda v: v.ours),
            "baseline": ("x", lambda v: v.baseline),
            "others": ("^", lambda v: not v.ours and not v.baseline),
        }
        for i, group in enumerate(dict.fromkeys(point[0] for point in data)):
            for kind, (marker, belongs) in kinds.items():
                chosen = [(x, y) for name, variant, x, y in data if name == group and belongs(variant)]
                if chosen:
                    axis.scatter(*zip(*chosen, strict=True), marker=marker, color=f"C{i}", label=f"{group}, {kind}")
        axis.set(xscale="log", yscale="log", xlabel="FLOP per compulsory byte, of those where both ceilings meet")
        axis.set(ylabel="FLOP/s, share of the GEMM ceiling")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")


def _sampling_cases(file: ResultsFile) -> list[tuple[bool, CaseResult]]:
    """With a baseline and runs of ours."""
    return [
        (file.gpu, case)
        for case in file.cases
        if case.group == "sampling"
        and case.baseline is not None
        and any(v.name.count(", ") >= 2 for v in case.variants)
    ]


def _plot_refresh(path: Path, title: str, digest: str, data: Sequence[tuple[bool, CaseResult]]) -> None:
    with figure(path, 1, len(data), (7 * len(data), 6), title, digest) as axes:
        for axis, (gpu, case) in zip(axes, data, strict=True):
            # "MODEL, SETTING, ENGINE"
            runs = {tuple(v.name.split(", ")): v for v in case.variants if v.name.count(", ") == 2}
            settings = list(dict.fromkeys(setting for _, setting, _ in runs))
            for model, engine in dict.fromkeys((model, engine) for model, _, engine in runs):
                own = [(i, runs.get((model, setting, engine))) for i, setting in enumerate(settings)]
                places = [(i, _height(variant, gpu)) for i, variant in own if variant is not None]
                axis.plot(*zip(*places, strict=True), marker="o", label=f"{model}, {engine}")
            base = case.baseline
            assert base is not None
            axis.axhline(_height(base, gpu), color="black", linestyle=":", label=base.name)
            axis.set_xticks(range(len(settings)), settings)
            axis.set(title=f"{case.name}: {case.size}", ylabel="img/s" if gpu else "time, of the baseline's")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")


def _height(variant: Variant, gpu: bool) -> float:
    value = variant.images_per_second if gpu else variant.ratio
    return float("nan") if value is None else value


PIECES = {
    "norm, residual (2)": ("gated_residual_rms_norm_modulate forward", True, 2),
    "q, k norm and RoPE": ("qk_norm_rope forward", False, 1),
    "attention": ("attention forward", False, 1),
    "SwiGLU": ("swiglu forward", False, 1),
}
"""A block's kernels: their cases, whether those are told apart by what is modulated, calls a block."""

PLAIN, OURS, CEILINGS = "plain PyTorch", "ddt_kernels", "at the ceilings\nof this run"
Stack = tuple[str, dict[str, float]]


def _stacks(file: ResultsFile) -> dict[str, list[Stack]]:
    """By block: (what, seconds by kernel) at the ceilings, of ours, the fastest others and plain PyTorch; on a CPU
    as shares of plain PyTorch's whole."""
    cases = {(case.name, case.size): case for case in file.cases if case.group == "kernels"}
    made: dict[str, list[Stack]] = {}
    for shape in dict.fromkeys(size for name, size in cases if name == "attention forward"):
        for block, words in (("encoder block", "sample"), ("decoder block", "token")):
            sizes = {
                piece: f"{shape}, modulated per {words}" if told else shape for piece, (_, told, _) in PIECES.items()
            }
            found = {piece: cases.get((PIECES[piece][0], sizes[piece])) for piece in PIECES}
            # A stack that lacks a kernel would look fast.
            rows = {piece: _kernel_seconds(case) for piece, case in found.items() if case is not None}
            if len(rows) < len(PIECES) or not all(rows.values()):
                continue
            whole = sum(PIECES[piece][2] * row[PLAIN] for piece, row in rows.items())
            unit = 1e-6 if file.gpu else whole
            what = f"{block}, {shape}" + (", µs" if file.gpu else ", of plain PyTorch's time")
            made[what] = [
                (name, {piece: PIECES[piece][2] * row[name] / unit for piece, row in rows.items()})
                for name in (CEILINGS, OURS, "fastest other", PLAIN)
            ]
    return made


def _kernel_seconds(case: CaseResult) -> dict[str, float]:
    """Empty where one of them is missing."""
    times = {variant.name: variant.median for variant in case.variants}
    floor = next((variant.floor for variant in case.variants if variant.floor), None)
    others = [variant.median for variant in case.variants if not variant.ours]
    if floor is None or not {PLAIN, OURS} <= times.keys():
        return {}
    return {CEILINGS: floor, OURS: times[OURS], "fastest other": min(others), PLAIN: times[PLAIN]}


def _plot_blocks(path: Path, title: str, digest: str, data: dict[str, list[Stack]]) -> None:
    with figure(path, 1, len(data), (7 * len(data), 6), title, digest) as axes:
        for axis, (what, stacks) in zip(axes, data.items(), strict=True):
            _stack(axis, stacks)
            axis.set(title=what, ylabel="time")


def _plot_floors(path: Path, title: str, digest: str) -> None:
    with figure(path, 1, len(floors.SHAPES), (7 * len(floors.SHAPES), 6), title, digest) as axes:
        for axis, (name, preset, batch) in zip(axes, floors.SHAPES, strict=True):
            config = PRESETS[preset].model
            made = [p for p in floors.pieces(config, batch, PRESETS[preset].data.sample_size) if p.in_block]
            bars = {
                "encoder block": ((floors.ENCODER,), config.num_encoder_blocks),
                "decoder block,\nrefreshed": ((floors.MODULATIONS, floors.DECODER), config.num_decoder_blocks),
                "decoder block,\nmodulations kept": ((floors.DECODER,), config.num_decoder_blocks),
            }
            stacks = [
                (
                    bar,
                    {
                        kind: 1e6 * s / blocks
                        for kind, s in floors.seconds_by_kind(floors.of_parts(made, *parts)).items()
                    },
                )
                for bar, (parts, blocks) in bars.items()
            ]
            _stack(axis, stacks)
            axis.set(title=f"XL/2, {name}, {batch} images, bf16", ylabel="floor, µs per block")


def _stack(axis: Any, stacks: Sequence[Stack]) -> None:
    """Bars of pieces on top of each other, the piece's colour the same in every bar."""
    kinds = list(dict.fromkeys(kind for _, parts in stacks for kind in parts))
    bottom = [0.0] * len(stacks)
    for kind in kinds:
        heights = [parts.get(kind, 0.0) for _, parts in stacks]
        axis.bar(range(len(stacks)), heights, bottom=bottom, width=0.6, label=kind)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axis.set_xticks(range(len(stacks)), [name for name, _ in stacks])
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize="small")
