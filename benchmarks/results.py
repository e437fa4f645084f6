"""The file that a run of the benchmarks writes: one JSON object, whole at any moment.

    format        1
    environment   hardware, driver, versions, commit, command (`environment.environment`)
    sessions      one for every process that wrote to the file:
        started, finished         times; finished is null where the process was cut off
        command, load_average     load before anything was measured; each case has its own, after
        ceilings, ceilings_after  GEMM FLOP/s by dtype, copy bytes/s, measured before the first and after the last case
        not_measured              [{case, reason}]: cases that were chosen and have no result
    cases         in the order they were measured:
        group, case, size, dtype  what
        session                   number of its session
        clock                     how it was timed
        variants                  [{name, baseline, ours, seconds: {median, lower_quartile, upper_quartile, minimum,
                                  maximum, calls: rounds}, calls_per_round, ratio: median over the baseline's, error,
                                  allowed_error, images_per_second, flops, bytes, floor_seconds, bound_by: "gemm" or
                                  "copy", share_of_ceiling: floor_seconds over the median, note}]
        wrong                     [{name, reason}]: wrong output, or failed though it is ours; never timed
        missing                   [{name, reason}]: not installed, or not usable on this machine
        gpu_before, gpu_after     clocks, temperature, power; null without a GPU
        load_average

Numbers that do not apply are null. On a CPU what counts are the ratios; caches serve its small cases, so that shares of
the copy ceiling may pass 1.
"""

from __future__ import annotations

import datetime
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.environment import environment
from benchmarks.measure import Result, measure
from ddt_fast.files import read_json, write_json
from ddt_fast.wording import plural

FORMAT = 1


class Recorder:
    """Measures cases, each once, and writes the file after every one.

    Args:
        path: of the file; None writes none.
        device: where to measure.
        append: keep the cases of a file that is there, but for those measured again.
        time_limit: seconds from now after which no case is started; None for no limit.
        ceilings: what measures them.

    Raises:
        ValueError: a file to append to that is none of these.
    """

    def __init__(
        self,
        path: Path | None,
        device: torch.device,
        append: bool = False,
        time_limit: float | None = None,
        ceilings: Callable[[torch.device], Ceilings] = measure_ceilings,
    ) -> None:
        self.path, self.device, self._measure_ceilings = path, device, ceilings
        self._started, self._time_limit = time.monotonic(), time_limit
        self.results: dict[str, Result] = {}
        self._failed: dict[str, Exception] = {}
        here = environment()
        self._content: dict[str, Any] = {"format": FORMAT, "environment": here, "sessions": [], "cases": []}
        if append and path is not None and path.exists():
            self._content = read_json(path)
            if self._content.get("format") != FORMAT:
                raise ValueError(f"{path} has format {self._content.get('format')!r}; allowed: {FORMAT}")
            for name in ("commit", "cpu", "gpus", "torch"):
                there = self._content["environment"].get(name)
                if there != here[name]:
                    raise ValueError(f"{path} holds results of {name} {there}, here it is {here[name]}; name another")
        self.session: dict[str, Any] = {"started": _now(), "finished": None}
        self.session |= {name: here[name] for name in ("command", "load_average")}
        self.session |= {"ceilings": None, "ceilings_after": None, "not_measured": []}
        self._content["sessions"].append(self.session)
        self._ceilings: Ceilings | None = None

    def measure(self, case: Case) -> Result:
        """The case's result, measured at the first call; raises what building it raised, at every call."""
        if case.title in self._failed:
            raise self._failed[case.title]
        if case.title in self.results:
            return self.results[case.title]
        if self._ceilings is None:
            self._ceilings = self._measure_ceilings(self.device)
            self.session["ceilings"] = self._ceilings.as_dict()
        try:
            result = measure(case, self._ceilings, self.device)
        except Exception as error:
            self._failed[case.title] = error
            self.skip(case, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            raise
        result.record["session"] = len(self._content["sessions"]) - 1
        self.results[case.title] = result
        self._add(result.record)
        return result

    def in_time(self, case: Case) -> bool:
        """Whether the case is measured already, or may be started; where not, that is noted."""
        limit = self._time_limit
        late = limit is not None and time.monotonic() - self._started > limit
        if late and case.title not in self.results:
            self.skip(case, f"not started within the time limit of {limit:g} s")
            return False
        return True

    def skip(self, case: Case, reason: str) -> None:
        """Note that a case was not measured."""
        entry = {"case": case.title, "reason": reason}
        if entry not in self.session["not_measured"]:
            self.session["not_measured"].append(entry)
            self._write()

    def finish(self) -> None:
        """Measure the ceilings again, and close the session, if anything was measured."""
        if self._ceilings is None:
            return
        self.session["ceilings_after"] = self._measure_ceilings(self.device).as_dict()
        self.session["finished"] = _now()
        self._write()

    def _add(self, record: dict[str, Any]) -> None:
        def key(case: dict[str, Any]) -> tuple[str, str, str]:
            return case["group"], case["case"], case["size"]

        others = [case for case in self._content["cases"] if key(case) != key(record)]
        self._content["cases"] = [*others, record]
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, self._content)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def summary(recorder: Recorder) -> Iterator[str]:
    """What pytest-benchmark's table does not say, line by line."""
    for title, result in recorder.results.items():
        yield title
        for variant in result.record["variants"]:
            parts = [f"{variant['seconds']['median'] * 1e3:10.4f} ms"]
            parts.append("" if variant["ratio"] is None else f"x{variant['ratio']:.3f}")
            share = variant["share_of_ceiling"]
            parts.append("" if share is None else f"{share:.0%} of {variant['bound_by']}")
            rate = variant["images_per_second"]
            parts.append("" if rate is None else f"{rate:.2f} img/s")
            parts.append(f"error {variant['error']:.1e}")
            yield f"  {variant['name']:44s}" + "".join(f" {part:>14s}" for part in parts)
        yield from (f"  {name}: {reason}" for name, reason in result.wrong.items())
    missing: dict[tuple[str, str], int] = defaultdict(int)
    for result in recorder.results.values():
        for name, reason in result.missing.items():
            missing[name, reason] += 1
    for (name, reason), count in missing.items():
        yield f"missing in {plural(count, 'case')}: {name}: {reason}"
    for entry in recorder.session["not_measured"]:
        yield f"not measured: {entry['case']}: {entry['reason']}"
    if recorder.session["ceilings"] is not None:
        yield f"ceilings: {recorder.session['ceilings']}"
    yield f"{torch.get_num_threads()} CPU threads, load average before {recorder.session['load_average']}"
