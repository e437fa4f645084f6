"""`pytest benchmarks/ --benchmark-only`: every case measured once, shown by pytest-benchmark.

pytest-benchmark times one function after another; here the variants of a case take turns instead (`measure`). So a
case is measured when the first of its tests runs, and every variant's test plays its own rounds back: its timer is a
clock that goes only as far as the recorded seconds say. Statistics and tables are pytest-benchmark's, the numbers are
the interleaved ones.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import Case
from benchmarks.results import Recorder, summary
from benchmarks.shapes import DEVICE


class PlaybackClock:
    """A timer that stands still until `advance` is called."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = PlaybackClock()
RECORDER = pytest.StashKey[Recorder]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ddt-fast benchmarks")
    group.addoption("--results", metavar="FILE", help="write everything measured to this JSON file, case by case")
    group.addoption("--append", action="store_true", help="keep the other cases that the file of --results holds")
    group.addoption("--only", default="", metavar="WORDS", help="cases whose title has these words")
    group.addoption("--time-limit", type=float, metavar="SECONDS", help="start no case later than this")


def pytest_configure(config: pytest.Config) -> None:
    results = config.getoption("--results")
    path = None if results is None else Path(results)
    try:
        recorder = Recorder(path, DEVICE, config.getoption("--append"), config.getoption("--time-limit"))
    except (ValueError, OSError) as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[RECORDER] = recorder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        words = metafunc.config.getoption("--only")
        cases = [case for case in metafunc.module.CASES if words in case.title]
        pairs = [(case, variant) for case in cases for variant in case.variants]
        ids = ["-".join((case.name, case.size, variant)).replace(" ", "_") for case, variant in pairs]
        metafunc.parametrize(("case", "variant"), pairs, ids=ids)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture
def replay(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Case, str], None]:
    """Measure a case, or look up what was measured, and report one variant of it."""
    recorder = request.config.stash[RECORDER]

    def report(case: Case, variant: str) -> None:
        if not recorder.in_time(case):
            pytest.skip("out of time")
        result = recorder.measure(case)
        if variant in result.missing:
            pytest.skip(f"{variant}: {result.missing[variant]}")
        if variant in result.wrong:
            pytest.fail(f"{case.title}, {variant}: {result.wrong[variant]}", pytrace=False)
        rounds = result.rounds[variant]
        benchmark.name = variant
        benchmark.group = case.title
        benchmark.extra_info |= next(v for v in result.record["variants"] if v["name"] == variant)
        recorded = cycle(rounds)
        benchmark.pedantic(lambda: CLOCK.advance(next(recorded)), rounds=len(rounds))

    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus != pytest.ExitCode.INTERRUPTED:
        session.config.stash[RECORDER].finish()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    recorder = config.stash[RECORDER]
    if not recorder.results and not recorder.session["not_measured"]:
        return
    terminalreporter.section("ratios, shares of the ceiling, and what is missing")
    for line in summary(recorder):
        terminalreporter.write_line(line)
