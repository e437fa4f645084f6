"""Results files, read and checked: what is missing or of another type is a ValueError that names file and place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import FORMAT
from ddt_fast.files import read_json

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "results"

KINDS = {
    "suite": ("pytest benchmarks --benchmark-only --results benchmarks/results/suite.json", ("format", "cases")),
    "cpu_sampling": ("python -m benchmarks.cpu_sampling", ("forward", "sampling", "runs")),
    "training_step": ("python -m benchmarks.training_step", ("batch_size", "rows")),
    "forecast": ("python -m benchmarks.forecast", ("num_samples", "results")),
    "pareto": ("python -m benchmarks.pareto", ("points", "recommended")),
    "candidates": ("python -m benchmarks.candidates", ("errors", "frechet")),
    "scaling": ("python -m benchmarks.scaling", ("counted", "measured", "simulated")),
}
"""By kind of file: the command that writes one, and the keys it is known by."""


class Fields:
    """An object of a JSON file, asked for values of a type.

    Args:
        content: the object.
        place: file and place in it, for messages.
    """

    def __init__(self, content: Any, place: str) -> None:
        if not isinstance(content, dict):
            raise ValueError(f"{place} is {_shown(content)}; wanted an object")
        self._content, self.place = content, place

    def text(self, name: str) -> str:
        return str(self._get(name, str, "a string"))

    def number(self, name: str) -> float:
        value = self._get(name, (int, float), "a number")
        if isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{self.place}.{name} is {value}; wanted a number")
        return float(value)

    def positive(self, name: str) -> float:
        value = self.number(name)
        if value <= 0:
            raise ValueError(f"{self.place}.{name} is {value:g}; wanted more than 0")
        return value

    def integer(self, name: str) -> int:
        return int(self._get(name, int, "an integer"))

    def flag(self, name: str) -> bool:
        return bool(self._get(name, bool, "true or false"))

    def has(self, name: str) -> bool:
        """Whether it is there, and not null."""
        return self._content.get(name) is not None

    def optional(self, name: str) -> float | None:
        """A number; None where it is missing or null."""
        return self.number(name) if self.has(name) else None

    def object(self, name: str) -> Fields:
        return Fields(self._get(name, dict, "an object"), f"{self.place}.{name}")

    def objects(self, name: str) -> list[Fields]:
        return [Fields(item, f"{self.place}.{name}[{i}]") for i, item in enumerate(self.values(name))]

    def values(self, name: str) -> list[Any]:
        return list(self._get(name, list, "a list"))

    def __iter__(self) -> Iterator[str]:
        """Its names."""
        return iter(self._content)

    def _get(self, name: str, kind: Any, words: str) -> Any:
        if name not in self._content:
            raise ValueError(f"{self.place} has no {name!r}")
        value = self._content[name]
        if not isinstance(value, kind):
            raise ValueError(f"{self.place}.{name} is {_shown(value)}; wanted {words}")
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


@dataclass(frozen=True)
class Variant:
    """One way to do a case's work, as the suite measured it; see `benchmarks.results`. Times are seconds."""

    name: str
    baseline: bool
    ours: bool
    median: float
    lower: float
    upper: float
    ratio: float | None
    error: float
    images_per_second: float | None
    flops: float | None
    bytes: float | None
    floor: float | None
    bound_by: str
    share: float | None
    note: str

    @classmethod
    def read(cls, fields: Fields) -> Variant:
        seconds = fields.object("seconds")
        floor = fields.optional("floor_seconds")
        return cls(
            name=fields.text("name"),
            baseline=fields.flag("baseline"),
            ours=fields.flag("ours"),
            median=seconds.positive("median"),
            lower=seconds.positive("lower_quartile"),
            upper=seconds.positive("upper_quartile"),
            ratio=fields.optional("ratio"),
            error=fields.number("error"),
            images_per_second=fields.optional("images_per_second"),
            flops=fields.optional("flops"),
            bytes=fields.optional("bytes"),
            floor=floor,
            bound_by="" if floor is None else fields.text("bound_by"),
            share=fields.optional("share_of_ceiling"),
            note=fields.text("note"),
        )


@dataclass(frozen=True)
class CaseResult:
    """A case of the suite. wrong, missing: (variant, reason) of what has no time. gemm, copy: the ceilings measured in
    its session, FLOP/s of its dtype (None where not measured) and bytes/s."""

    group: str
    name: str
    size: str
    variants: tuple[Variant, ...]
    wrong: tuple[tuple[str, str], ...]
    missing: tuple[tuple[str, str], ...]
    command: str
    gemm: float | None
    copy: float

    @property
    def title(self) -> str:
        return f"{self.group}: {self.name}, {self.size}"

    @property
    def baseline(self) -> Variant | None:
        return next((variant for variant in self.variants if variant.baseline), None)


class ResultsFile:
    """A file of any kind.

    Attributes:
        name: its path within the repository, else its name.
        kind: one of KINDS.
        content: all of it.
        environment: where and when it was made.
        gpu: whether on one.
    """

    def __init__(self, path: Path) -> None:
        path = path.resolve()
        self.path = path
        self.name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
        self.content = Fields(read_json(path), self.name)
        kinds = [kind for kind, (_, keys) in KINDS.items() if {*keys} <= {*self.content}]
        if not kinds:
            raise ValueError(f"{self.name} is no results file; allowed: those of {', '.join(KINDS)}")
        self.kind = kinds[0]
        self.environment = self.content.object("environment")
        self.gpu = bool(self.environment.values("gpus"))
        self.cases: list[CaseResult] = []
        self.not_measured: list[tuple[str, str]] = []
        if self.kind == "suite":
            self._read_suite()

    def _read_suite(self) -> None:
        if self.content.integer("format") != FORMAT:
            raise ValueError(f"{self.name} has format {self.content.integer('format')}; allowed: {FORMAT}")
        sessions = self.content.objects("sessions")
        for fields in self.content.objects("cases"):
            number = fields.integer("session")
            if not 0 <= number < len(sessions):
                raise ValueError(f"{fields.place}.session is {number}; allowed: 0 to {len(sessions) - 1}")
            ceilings = sessions[number].object("ceilings")
            self.cases.append(
                CaseResult(
                    group=fields.text("group"),
                    name=fields.text("case"),
                    size=fields.text("size"),
                    variants=tuple(Variant.read(variant) for variant in fields.objects("variants")),
                    wrong=_reasons(fields, "wrong"),
                    missing=_reasons(fields, "missing"),
                    command=sessions[number].text("command"),
                    gemm=ceilings.object("gemm_flops_per_second").optional(fields.text("dtype")),
                    copy=ceilings.positive("copy_bytes_per_second"),
                )
            )
        measured = {case.title for case in self.cases}
        for session in sessions:
            for entry in session.objects("not_measured"):
                if entry.text("case") not in measured:
                    self.not_measured.append((entry.text("case"), entry.text("reason")))

    @property
    def groups(self) -> list[str]:
        """In the order in which they were measured, those of which nothing was included."""
        titles = [title.split(":")[0] for title, _ in self.not_measured]
        return list(dict.fromkeys([*(case.group for case in self.cases), *titles]))

    def provenance(self, group: str | None = None) -> str:
        """One line: file, hardware, versions, commit, command; of a suite's group, the commands that measured it."""
        env = self.environment
        cpu = env.object("cpu")
        flags = ", ".join(map(str, cpu.values("flags")))
        hardware = f"{cpu.text('model')}, {plural(env.integer('threads'), 'thread')}, {flags}"
        if self.gpu:
            names = [gpu.text("name") for gpu in env.objects("gpus")]
            driver = f", driver {env.text('driver')}" if env.has("driver") else ""
            hardware = f"{', '.join(names)}{driver}; {hardware}"
        versions = [f"torch {env.text('torch')}", f"Python {env.text('python')}"]
        packages = env.object("packages")
        versions += [f"{name} {packages.text(name)}" for name in packages if name != "ddt-fast"]
        commit = env.text("commit")[:12] if env.has("commit") else "not known"
        if env.has("uncommitted_changes") and env.flag("uncommitted_changes"):
            commit += " with uncommitted changes"
        load = f"load before {env.values('load_average')[0]}; " if env.has("load_average") else ""
        commands = [env.text("command")]
        if group is not None:
            commands = list(dict.fromkeys(case.command for case in self.cases if case.group == group)) or commands
        return (
            f"From `{self.name}`: {hardware}; {load}{', '.join(versions)}; commit {commit}; "
            f"{env.text('date')[:10]}; {', '.join(f'`{command}`' for command in commands)}."
        )


def plural(number: int, what: str) -> str:
    """ "1 thread", "2 threads"."""
    return f"{number} {what}" + "s" * (number != 1)


def _reasons(fields: Fields, name: str) -> tuple[tuple[str, str], ...]:
    return tuple((entry.text("name"), entry.text("reason")) for entry in fields.objects(name))


class Results:
    """All files of a report."""

    def __init__(self, files: Sequence[ResultsFile]) -> None:
        self.files = list(files)

    def of(self, kind: str) -> list[ResultsFile]:
        return [file for file in self.files if file.kind == kind]

    def cases(self, gpu: bool) -> Iterator[tuple[ResultsFile, CaseResult]]:
        """Those of all suites that ran on a GPU, or not."""
        for file in self.of("suite"):
            if file.gpu == gpu:
                yield from ((file, case) for case in file.cases)


def load(paths: Sequence[Path]) -> Results:
    """The files, checked.

    Raises:
        ValueError: one is malformed.
        OSError: one cannot be read.
    """
    return Results([ResultsFile(path) for path in paths])
