"""The benchmarks without pytest: `python -m benchmarks.suite --results FILE [bench_kernels ...]`.

Measures the same cases and writes the same file; what is lost are pytest-benchmark's tables. For machines that have no
pytest, which is also why it has no other dependency.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.gpu_run import SHARES
from benchmarks.results import Recorder, summary
from benchmarks.shapes import DEVICE

MODULES = tuple(SHARES)
"""In the order of what is wanted most, should time run out."""


def run(cases: list[Case], recorder: Recorder) -> bool:
    """Measure cases one after the other; whether nothing was wrong."""
    right = True
    for case in cases:
        if not recorder.in_time(case):
            continue
        print(case.title, flush=True)
        try:
            right &= not recorder.measure(case).wrong
        except Exception as error:  # noted in the file; the other cases are to be measured
            print(f"{case.title}: {type(error).__name__}: {error}", file=sys.stderr)
            right = False
    recorder.finish()
    return right


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=list(MODULES), help=f"of {', '.join(MODULES)}")
    parser.add_argument("--results", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--append", action="store_true", help="keep the other cases that the file holds")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no case later than this")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose title has these words")
    options = parser.parse_args()
    unknown = [name for name in options.modules if name not in MODULES]
    if unknown:
        parser.error(f"no module {unknown[0]!r}; allowed: {', '.join(MODULES)}")
    modules = [importlib.import_module(f"benchmarks.{name}") for name in options.modules]
    cases = [case for module in modules for case in module.CASES if options.only in case.title]
    recorder = Recorder(options.results, DEVICE, options.append, options.time_limit)
    right = run(cases, recorder)
    print("\n".join(summary(recorder)))
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
