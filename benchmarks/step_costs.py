"""The parts of a sampling run, one by one: to be timed or profiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.timing import Timing
from ddt_fast.sampling import Sampler
from ddt_fast.sampling.tables import StepKind


class StepCosts:
    """The parts a sampler's run is made of, as functions to be timed; a part is named by a string.

    Args:
        sampler: its buffers are written to.
        noise, labels: of a batch.
    """

    def __init__(self, sampler: Sampler, noise: Tensor, labels: Tensor) -> None:
        self.sampler, self.noise, self.labels = sampler, noise, labels
        # Which slot a refresh writes to is no matter for its time.
        self.kinds = [replace(kind, slot=0) for kind in sampler.kinds]

    @property
    def counts(self) -> dict[str, int]:
        """How often a run has each part."""
        return {"start": 1} | {_words(kind): count for kind, count in Counter(self.kinds).items()}

    def functions(self) -> dict[str, Callable[[], object]]:
        """By part: a function that does it once. "start" is all that precedes the first step, and the encoder's
        modulations for all steps."""
        self.start()
        functions: dict[str, Callable[[], object]] = {"start": self.start}
        return functions | {_words(kind): partial(self.step, self.kinds.index(kind)) for kind in self.kinds}

    @torch.no_grad()
    def start(self) -> None:
        self.sampler.buffers.start(self.noise, self.labels)
        for step in range(len(self.kinds)):
            self.sampler.buffers.prepare_conditions(step)

    @torch.no_grad()
    def step(self, number: int) -> None:
        buffers = self.sampler.buffers
        buffers.x.copy_(self.noise)
        buffers.step.fill_(number)
        self.sampler._advance(self.sampler.kinds[number])


def _words(kind: StepKind) -> str:
    parts = [f"encode {kind.encode}"] if kind.encode else []
    parts.append(f"decode {kind.decode}" + (" forecast" if kind.forecast else ""))
    if kind.fresh_uncond:
        parts.append("unconditional afresh")
    return ", ".join(parts) + ("" if kind.guided else ", unguided")


def composed(counts: dict[str, int], timings: dict[str, Timing]) -> float:
    """Seconds of a run that has each part so often."""
    return sum(count * timings[part].median for part, count in counts.items())
