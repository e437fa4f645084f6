"""Batches of latents without end, in an order that (seed, epoch) alone decides.

`python -m ddt_fast.data.latent_loader FOLDER` measures how many images per second come out of a cache.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddt_fast.data.cached_images import CachedImages
from ddt_fast.data.digits import DigitsDataset
from ddt_fast.data.latent_cache import MANIFEST
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.data.verification import wrong_shards
from ddt_fast.wording import plural

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_U64 = np.uint64


class LatentBatch(NamedTuple):
    """What a model is trained on in one step, on the CPU.

    Attributes:
        latents: (b, C, h, w) float32.
        labels: (b,) int64.
        features: (b, N', F) float16 or bfloat16 DINOv2 features of the same images; None unless the dataset has them.
        images: (b, 3, S, S) uint8 RGB, the same images; None unless the loader knows their folder.
    """

    latents: Tensor
    labels: Tensor
    features: Tensor | None
    images: Tensor | None

    def pin_memory(self) -> LatentBatch:
        """The same in page-locked memory."""
        return LatentBatch(
            self.latents.pin_memory(),
            self.labels.pin_memory(),
            None if self.features is None else self.features.pin_memory(),
            None if self.images is None else self.images.pin_memory(),
        )


class LatentLoader:
    """An endless iterator of `LatentBatch`, batch_size / world_size samples each.

    Every epoch visits each latent once, in its own random order; batches run on across epochs, so none is short. What
    comes at position p of epoch e, its flip and its noise depend on (seed, e, p) alone: rank r of R takes the r-th of R
    equal parts of a global batch, and the parts together are the same batch whatever R is.

    Args:
        dataset: the latents, and features if it was opened with them; or the digits, whose pixels stand for latents.
        batch_size: samples per step over all ranks, a multiple of world_size.
        seed: of order, flips and noise.
        rank, world_size: which part of each batch is this process's.
        flips: draw the mirrored image half of the time; None: where the dataset has them.
        images: the image folder that the cache was made from; batches then hold the images too, cropped and mirrored as
            the latents are. Decoding takes a core some milliseconds per image: give num_threads as many as are free.
        num_threads: batches that are being made at the same time, in the background.
        prefetch: batches that are made ahead.
        pin_memory: return page-locked memory, from which a GPU copies asynchronously.

    Raises:
        ValueError: values that are not allowed, flips of a dataset without them, or another image folder than the
            cache's; while iterating, an image that cannot be read any more.
    """

    def __init__(
        self,
        dataset: LatentDataset | DigitsDataset,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        flips: bool | None = None,
        images: Path | None = None,
        num_threads: int = 2,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        for name, value, low in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("world_size", world_size, 1),
            ("rank", rank, 0),
            ("num_threads", num_threads, 1),
            ("prefetch", prefetch, 1),
        ):
            if value < low:
                raise ValueError(f"{name} is {value}; allowed: {low} or more")
        if seed >= 2**63:
            raise ValueError(f"seed is {seed}; allowed: below 2^63")
        if rank >= world_size:
            raise ValueError(f"rank is {rank}; allowed: below world_size ({world_size})")
        if batch_size % world_size:
            raise ValueError(f"batch_size is {batch_size}; allowed: multiples of world_size ({world_size})")
        if flips and not dataset.has_flips:
            raise ValueError("flips are asked for, but the cache has none; encode it with --flips")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.flips = dataset.has_flips if flips is None else flips
        self.pin_memory = pin_memory
        self._images = None
        if images is not None:
            if not isinstance(dataset, LatentDataset):
                raise ValueError("images go with cached latents; the digits have none beside themselves")
            self._images = CachedImages(images, dataset)
        self._prefetch = prefetch
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="latents")
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._pending: deque[Future[LatentBatch]] = deque()
        self._position = 0  # of the next batch to be returned: epoch * len(dataset) + place in the epoch
        self._submitted = 0  # of the next batch to be made

    def __iter__(self) -> Iterator[LatentBatch]:
        return self

    def __next__(self) -> LatentBatch:
        while len(self._pending) < self._prefetch:
            self._pending.append(self._pool.submit(self._make, *self._plan(self._submitted)))
            self._submitted += self.batch_size
        batch = self._pending[0].result()  # one that fails stays: no batch is ever skipped
        self._pending.popleft()
        self._position += self.batch_size
        return batch

    @property
    def feature_shape(self) -> tuple[int, int] | None:
        """(N', F) of the features in a batch; None where there are none."""
        return self.dataset.feature_shape if isinstance(self.dataset, LatentDataset) else None

    @property
    def epoch(self) -> int:
        """The epoch that the next batch begins in."""
        return self._position // len(self.dataset)

    def state_dict(self) -> dict[str, int | str]:
        """Where the next batch begins, with what it must agree on; the same on every rank."""
        epoch, position = divmod(self._position, len(self.dataset))
        data: dict[str, int | str] = {"num_samples": len(self.dataset), "dataset": self.dataset.fingerprint}
        return {"epoch": epoch, "position": position, "seed": self.seed, **data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken: the next batch is the one that would have come next.

        Batch size and ranks may differ; they only cut the same sequence elsewhere.

        Raises:
            ValueError: the state is of another seed, of other data, or no state at all.
        """
        names = ("epoch", "position", "seed", "num_samples")
        if any(not isinstance(state.get(name), int) for name in names):
            raise ValueError(f"the data position is {state!r}; wanted whole numbers {', '.join(names)}")
        for name, ours in (("seed", self.seed), ("num_samples", len(self.dataset))):
            if state[name] != ours:
                raise ValueError(f"the data position was saved with {name} {state[name]}, now it is {ours}")
        if state.get("dataset") != self.dataset.fingerprint:
            raise ValueError(
                "the data position was saved with other data, of as many samples: from other images or another "
                "autoencoder, or scaled differently; take the same"
            )
        if state["epoch"] < 0 or not 0 <= state["position"] < len(self.dataset):
            raise ValueError(f"the data position is {state!r}, outside the data")
        self._drop_pending()
        self._position = self._submitted = state["epoch"] * len(self.dataset) + state["position"]

    def close(self) -> None:
        """Stop the background threads."""
        self._drop_pending()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> LatentLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_pending(self) -> None:
        for batch in self._pending:
            batch.cancel()
        self._pending.clear()

    def _plan(self, start: int) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.uint64]]:
        """Which latents this rank takes from the batch at `start`, which of them mirrored, and their noise's seeds."""
        size = self.batch_size // self.world_size
        epochs, places = np.divmod(start + self.rank * size + np.arange(size, dtype=np.int64), len(self.dataset))
        present = np.unique(epochs).tolist()
        # Orders of epochs that are over are let go: one of ImageNet is 10 MB.
        self._orders = {
            epoch: self._orders[epoch] if epoch in self._orders else self._order(epoch) for epoch in present
        }
        indices = np.empty(size, dtype=np.int64)
        for epoch, order in self._orders.items():
            indices[epochs == epoch] = order[places[epochs == epoch]]
        keys = _mix(_mix(_mix(np.array([self.seed], dtype=_U64)) + epochs.astype(_U64)) + places.astype(_U64))
        flips = (_mix(keys ^ _GOLDEN) >> _U64(63)).astype(bool) & self.flips
        return indices, flips, keys >> _U64(32)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        # Sorting by hashes is ours alone to change; permutations of numpy and torch may change with their versions.
        key = _mix(_mix(np.array([self.seed], dtype=_U64)) ^ _U64(epoch))
        places = np.arange(len(self.dataset), dtype=np.int64).astype(_U64)
        return np.argsort(_mix(key + places), kind="stable")

    def _make(self, indices: NDArray[np.int64], flips: NDArray[np.bool_], seeds: NDArray[np.uint64]) -> LatentBatch:
        batch = LatentBatch(
            latents=self.dataset.draw(indices, flips, seeds),
            labels=self.dataset.labels[torch.from_numpy(indices)],
            features=self.dataset.features(indices, flips)
            if isinstance(self.dataset, LatentDataset) and self.feature_shape
            else None,
            images=None if self._images is None else self._images.read(indices, flips),
        )
        return batch.pin_memory() if self.pin_memory else batch


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each number hashed to 64 bits that look random (the finaliser of splitmix64, Steele et al. 2014)."""
    values = values + _GOLDEN
    values = (values ^ (values >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> _U64(27))) * _U64(0x94D049BB133111EB)
    return values ^ (values >> _U64(31))


def measure(loader: LatentLoader, seconds: float) -> tuple[float, float]:
    """Images per second that come out of a loader, after two batches to warm up, and the CPUs it kept busy."""
    next(loader)
    next(loader)
    count, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        count += len(next(loader).labels)
    elapsed = time.perf_counter() - start
    return count / elapsed, (time.process_time() - cpu) / elapsed


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, report."""
    # A loader needs no jsonargparse; a GPU machine for benchmarks may have none.
    from ddt_fast.command import CommandParser

    parser = CommandParser(prog="python -m ddt_fast.data.latent_loader", description=__doc__)
    parser.add_argument("folder", type=str, help="latent cache")
    parser.add_argument("--batch-size", type=int, default=256, help="samples per batch")
    parser.add_argument("--num-threads", type=int, default=2, help="batches made at the same time")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure")
    parser.add_argument("--scaling-factor", type=float, help="for shards that do not say, as LightningDiT's")
    parser.add_argument("--features", action="store_true", help="read the cached DINOv2 features too")
    parser.add_argument("--images", type=str, help="image folder of the cache; its images are read too")
    parser.add_argument("--verify", action="store_true", help="compare the checksums of all shards first")
    options = parser.parse_args(arguments)
    dataset = LatentDataset(
        Path(options.folder),
        scaling_factor=options.scaling_factor,
        features=options.features,
    )
    if options.verify:
        if not dataset.checksums:
            raise ValueError(f"{options.folder} has no {MANIFEST}, so there are no checksums to verify")
        if wrong := wrong_shards(dataset, dataset.checksums):
            raise ValueError("; ".join(wrong))
    images = None if options.images is None else Path(options.images)
    with LatentLoader(dataset, options.batch_size, images=images, num_threads=options.num_threads) as loader:
        rate, busy = measure(loader, options.seconds)
    shape = "x".join(str(size) for size in dataset.shape)
    classes = plural(dataset.num_classes, "class")
    print(f"{plural(len(dataset), 'latent')} of {shape}, {classes}, scaled by {dataset.scaling_factor:g}")
    more = []
    if dataset.feature_shape:
        more.append("features of " + "x".join(str(size) for size in dataset.feature_shape))
    if images is not None and dataset.settings:
        more.append(f"images of {dataset.settings.image_size} px")
    if more:
        print("with " + " and ".join(more))
    cpus = len(os.sched_getaffinity(0))
    print(f"{rate:.0f} img/s with {plural(options.num_threads, 'thread')}, {busy:.2f} of {plural(cpus, 'CPU')} busy")


if __name__ == "__main__":
    from ddt_fast.command import run_command

    run_command(main)
