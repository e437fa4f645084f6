"""How one device's measured times would add up on many: formulas, no measurement.

Sampling: processes share nothing. Shards of a job belong to them by number alone (shard k to rank k % n), so a job ends
with the rank that has the most batches. Training: data parallel; gradients are averaged by a ring all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BACKWARD_SHARE = 2 / 3
"""Of a training step's computation: backward has twice the FLOPs of forward."""


@dataclass(frozen=True)
class SamplingJob:
    """A generation job on devices that are all as fast as the one measured.

    Attributes:
        images: of the job.
        shard_size: images of a shard.
        batch_size: images of a batch; a smaller one at the end of a shard is filled up and takes as long.
        batch_seconds: of one batch on one device.
        start_seconds: of every rank, all at the same time: interpreter, imports, weights, capture of graphs.
    """

    images: int
    shard_size: int
    batch_size: int
    batch_seconds: float
    start_seconds: float

    def batches(self, ranks: int) -> list[int]:
        """Of every rank."""
        shards = -(-self.images // self.shard_size)
        last = self.images - (shards - 1) * self.shard_size
        whole = -(-self.shard_size // self.batch_size)
        counts = [len(range(rank, shards, ranks)) * whole for rank in range(ranks)]
        counts[(shards - 1) % ranks] += -(-last // self.batch_size) - whole
        return counts

    def seconds(self, ranks: int) -> float:
        """Until the last rank is done."""
        return self.start_seconds + max(self.batches(ranks)) * self.batch_seconds

    def efficiency(self, ranks: int) -> float:
        """Share of n times one rank's speed that n ranks reach."""
        return self.seconds(1) / (ranks * self.seconds(ranks))


def ring_seconds(ranks: int, num_bytes: float, bandwidth: float) -> float:
    """A ring all-reduce: each rank sends 2 (n - 1) / n of the bytes, at `bandwidth` bytes/s; latency is left out."""
    return 2 * (ranks - 1) / ranks * num_bytes / bandwidth


@dataclass(frozen=True)
class TrainingStep:
    """Data-parallel training with a ring all-reduce.

    Attributes:
        batches, seconds: measured on one device: batch sizes, ascending, and what a step takes with each.
        gradient_bytes: that ranks exchange in a step.
    """

    batches: Sequence[int]
    seconds: Sequence[float]
    gradient_bytes: int

    def compute_seconds(self, batch: int) -> float | None:
        """A step's, on one device: between measured batches along a line, beyond the largest at its time per image;
        None below the smallest."""
        if batch < self.batches[0]:
            return None
        for i, measured in enumerate(self.batches):
            if batch <= measured:
                if batch == measured:
                    return self.seconds[i]
                low, high = self.batches[i - 1], measured
                share = (batch - low) / (high - low)
                return self.seconds[i - 1] * (1 - share) + self.seconds[i] * share
        return self.seconds[-1] * batch / self.batches[-1]

    def step_seconds(self, ranks: int, batch: int, bandwidth: float, overlapped: bool) -> float | None:
        """Of `batch` images a rank. Not overlapped: the all-reduce follows the computation. Overlapped, at best: it
        runs beside the backward pass, and only what it takes longer is waited for."""
        compute = self.compute_seconds(batch)
        if compute is None:
            return None
        exchange = ring_seconds(ranks, self.gradient_bytes, bandwidth)
        if not overlapped:
            return compute + exchange
        backward = BACKWARD_SHARE * compute
        return compute - backward + max(backward, exchange)

    def efficiency(
        self, ranks: int, bandwidth: float, overlapped: bool, *, batch: int | None = None, total: int | None = None
    ) -> float | None:
        """Share of n times one rank's speed that n ranks reach, with `batch` images each (weak scaling) or `total` ones
        shared by all (strong scaling: against one rank that has them all); None where that is not known, or does not
        divide."""
        assert (batch is None) != (total is None)
        if total is not None:
            if total % ranks:
                return None
            alone, each = self.compute_seconds(total), total // ranks
        else:
            assert batch is not None
            alone, each = self.compute_seconds(batch), batch
        step = self.step_seconds(ranks, each, bandwidth, overlapped)
        if alone is None or step is None:
            return None
        return alone / step if total is None else alone / (ranks * step)
