"""`pytest benchmarks/ --benchmark-only`: every case measured once, shown by pytest-benchmark where it is installed.

pytest-benchmark times one function after another; here the variants of a case take turns instead. So a case is measured
when the first of its tests runs, and every variant's test plays its own rounds back: its timer is a clock that advances
only by the recorded seconds. Statistics and tables are pytest-benchmark's, the numbers are the interleaved ones.
"""

import math
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import Case, Recorder, Result
from benchmarks.report.tables import suite_group, suite_groups


class PlaybackClock:
    """A timer that stands still until `advance` is called."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class NoBenchmark:
    """Stands in for pytest-benchmark where it is not installed."""

    @pytest.fixture
    def benchmark(self) -> None:
        return None


CLOCK, RECORDER = PlaybackClock(), pytest.StashKey[Recorder]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ddt-fast benchmarks")
    group.addoption("--results", type=Path, metavar="FILE", help="write everything measured to this JSON file")
    group.addoption("--append", action="store_true", help="keep the other cases that the file of --results holds")
    group.addoption("--only", default="", metavar="WORDS", help="cases whose title has these words")
    group.addoption("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="start no case later")


def pytest_configure(config: pytest.Config) -> None:
    try:
        recorder = Recorder(*map(config.getoption, ("--results", "--append", "--time-limit")))
    except (ValueError, OSError) as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[RECORDER] = recorder
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(NoBenchmark())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        words = metafunc.config.getoption("--only")
        pairs = [(case, name) for case in metafunc.module.CASES if words in case.title for name in case.variants]
        ids = ["-".join((case.name, case.size, variant)).replace(" ", "_") for case, variant in pairs]
        metafunc.parametrize(("case", "variant"), pairs, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items if config.pluginmanager.hasplugin("benchmark") else ():
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture
def replay(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Case, str], None]:
    """Measure a case, or look up what was measured, and report one variant of it."""

    def report(case: Case, variant: str) -> None:
        result = request.config.stash[RECORDER].measure(case)
        if result is None:
            pytest.skip("out of time")
        if variant in result.missing:
            pytest.skip(f"{variant}: {result.missing[variant]}")
        if variant in result.wrong:
            pytest.fail(f"{case.title}, {variant}: {result.wrong[variant]}", pytrace=False)
        if benchmark is not None:
            rounds = result.rounds[variant]
            benchmark.name, benchmark.group, recorded = variant, case.title, cycle(rounds)
            benchmark.pedantic(lambda: CLOCK.advance(next(recorded)), rounds=len(rounds))

    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus != pytest.ExitCode.INTERRUPTED:
        session.config.stash[RECORDER].finish()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The report's tables of what this process measured."""
    recorder = config.stash[RECORDER]
    cases = [result.record for result in recorder.results.values() if isinstance(result, Result)]
    record = recorder.content | {"sessions": [recorder.session], "cases": cases}
    for group in suite_groups(record):
        terminalreporter.section(f"{group}: ratios, shares of the ceiling, and what is missing")
        for paragraph in suite_group(record, group):
            terminalreporter.write_line(f"{paragraph}\n")
