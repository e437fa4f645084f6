"""Endless batches of latents, in an order that depends only on seed and epoch."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddt_fast.checks import require, require_int
from ddt_fast.data.cached_images import CachedImages
from ddt_fast.data.source import DataSource
from ddt_fast.splitmix import GOLDEN, mix

_U64 = np.uint64


class LatentBatch(NamedTuple):
    """The training data of one step, on the CPU.

    Attributes:
        latents: (b, C, h, w) float32.
        labels: (b,) int64.
        features: (b, N', F) float16 or bfloat16 DINOv2 features of the same images; None unless the dataset has them.
        images: (b, 3, S, S) uint8 RGB, the same images; None unless the loader has them.
    """

    latents: Tensor
    labels: Tensor
    features: Tensor | None
    images: Tensor | None

    def pin_memory(self) -> "LatentBatch":
        """The same in page-locked memory."""
        return LatentBatch(*(None if tensor is None else tensor.pin_memory() for tensor in self))  # type: ignore[arg-type]


class LatentLoader:
    """An endless iterator of `LatentBatch`, batch_size / world_size samples each.

    Every epoch visits each latent once, in its own random order; batches run on across epochs, so none is short. The
    latent at position p of epoch e, its flip and its noise depend only on (seed, e, p): rank r of R takes the r-th of R
    equal parts of a global batch, and the parts together are the same batch for every R. ValueError if a value is not
    allowed, or the dataset has no flips; while iterating, an image can no longer be read.

    Args:
        dataset: the data to read.
        batch_size: samples per step over all ranks, a multiple of world_size.
        seed: seed of order, flips and noise.
        rank, world_size: this process's part of each batch.
        flips: draw the mirrored image half of the time; None does so if the dataset has mirrored images.
        images: the images of a latent cache, to return them too, cropped and mirrored as the latents are. Decoding
            takes a core some milliseconds per image: set num_threads to the number of free cores.
        num_threads: batches made at the same time, in the background.
        prefetch: batches made ahead.
        pin_memory: return page-locked memory, from which a GPU copies asynchronously.
    """

    def __init__(
        self,
        dataset: DataSource,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        flips: bool | None = None,
        images: CachedImages | None = None,
        num_threads: int = 2,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        for name, value in (("seed", seed), ("rank", rank)):
            require_int(name, value, 0)
        positive = {"batch_size": batch_size, "world_size": world_size, "num_threads": num_threads}
        for name, value in (positive | {"prefetch": prefetch}).items():
            require_int(name, value, 1)
        require(seed < 2**63, "seed", seed, "below 2^63")
        require(rank < world_size, "rank", rank, f"below world_size ({world_size})")
        require(batch_size % world_size == 0, "batch_size", batch_size, f"multiples of world_size ({world_size})")
        if flips and not dataset.has_flips:
            raise ValueError("flips is true, but the cache has no mirrored images; encode it with flips")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.flips = dataset.has_flips if flips is None else flips
        self.pin_memory = pin_memory
        self._images = images
        self._prefetch = prefetch
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="latents")
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._pending: deque[Future[LatentBatch]] = deque()
        self._position = 0  # where the next batch to return begins: epoch * len(dataset) + place in the epoch
        self._submitted = 0  # where the next batch to make begins

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
    def epoch(self) -> int:
        """The epoch that the next batch begins in."""
        return self._position // len(self.dataset)

    def state_dict(self) -> dict[str, int | str]:
        """Where the next batch begins, in which data and which order; the same on every rank."""
        epoch, position = divmod(self._position, len(self.dataset))
        data: dict[str, int | str] = {"num_samples": len(self.dataset), "dataset": self.dataset.fingerprint}
        return {"epoch": epoch, "position": position, "seed": self.seed, **data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position that `state_dict` returned. Batch size and ranks may differ: they cut the same
        sequence at other places. ValueError if the state has another seed or other data, or is not a state."""
        names = ("epoch", "position", "seed", "num_samples")
        if any(not isinstance(state.get(name), int) for name in names):
            raise ValueError(f"the data position is {state!r}; expected whole numbers {', '.join(names)}")
        for name, ours in (("seed", self.seed), ("num_samples", len(self.dataset))):
            if state[name] != ours:
                raise ValueError(f"the data position was saved with {name} {state[name]}, now it is {ours}")
        if state.get("dataset") != self.dataset.fingerprint:
            raise ValueError(
                "the data position was saved with other data of the same size: other images, another autoencoder or "
                "another scale; use the same data"
            )
        if state["epoch"] < 0 or not 0 <= state["position"] < len(self.dataset):
            raise ValueError(f"the data position is {state!r}, outside the data")
        self._drop_pending()
        self._position = self._submitted = state["epoch"] * len(self.dataset) + state["position"]

    def close(self) -> None:
        """Stop the background threads."""
        self._drop_pending()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_pending(self) -> None:
        for batch in self._pending:
            batch.cancel()
        self._pending.clear()

    def _plan(self, start: int) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.uint64]]:
        """This rank's latents in the batch at `start`, which of them are mirrored, and the seeds of their noise."""
        size = self.batch_size // self.world_size
        epochs, places = np.divmod(start + self.rank * size + np.arange(size, dtype=np.int64), len(self.dataset))
        present = np.unique(epochs).tolist()
        # Drop the orders of finished epochs: ImageNet's take 10 MB each.
        self._orders = {
            epoch: self._orders[epoch] if epoch in self._orders else self._order(epoch) for epoch in present
        }
        indices = np.empty(size, dtype=np.int64)
        for epoch, order in self._orders.items():
            indices[epochs == epoch] = order[places[epochs == epoch]]
        keys = mix(mix(mix(np.array([self.seed], dtype=_U64)) + epochs.astype(_U64)) + places.astype(_U64))
        flips = (mix(keys ^ GOLDEN) >> _U64(63)).astype(bool) & self.flips
        return indices, flips, keys >> _U64(32)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        # Sorted by hashes of our own: permutations of NumPy and torch may change with their versions.
        key = mix(mix(np.array([self.seed], dtype=_U64)) ^ _U64(epoch))
        places = np.arange(len(self.dataset), dtype=np.int64).astype(_U64)
        return np.argsort(mix(key + places), kind="stable")

    def _make(self, indices: NDArray[np.int64], flips: NDArray[np.bool_], seeds: NDArray[np.uint64]) -> LatentBatch:
        batch = LatentBatch(
            latents=self.dataset.draw(indices, flips, seeds),
            labels=self.dataset.labels[torch.from_numpy(indices)],
            features=None if self.dataset.feature_shape is None else self.dataset.features(indices, flips),
            images=None if self._images is None else self._images.read(indices, flips),
        )
        return batch.pin_memory() if self.pin_memory else batch
