"""One background thread decodes, converts and writes samples while the next ones are drawn."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ddt_fast.data.image_file import Images
from ddt_fast.generation.images import quantize_pixels
from ddt_fast.generation.seeds import IntArray
from ddt_fast.generation.shards import ShardFolder

Decode = Callable[[Tensor], Tensor]
OnImages = Callable[[IntArray, Images], object]


class Background:
    """Runs tasks in order in one thread, with at most `depth` of them waiting. A task's error is raised by a later
    `submit`, or on leaving the context; tasks after it do not run."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._pool = ThreadPoolExecutor(1, "images")
        self._pending: deque[Future[None]] = deque()
        self._broken = False

    def __enter__(self) -> Self:
        return self

    def submit(self, task: Callable[..., object], *arguments: Any) -> None:
        """Queue task(*arguments); wait while the queue is full."""
        while len(self._pending) >= self._depth:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._run, task, *arguments))

    def _run(self, task: Callable[..., object], *arguments: Any) -> None:
        if self._broken:
            return
        try:
            task(*arguments)
        except BaseException:
            self._broken = True
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._broken = self._broken or kind is not None
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self._pending:
                future.result()


class PixelConverter:
    """Samples on a device → uint8 images on the host; on a GPU, on a stream of its own, beside the sampling.

    Args:
        device: the samples' device.
        decode: samples → pixels in [-1, 1], or the latents to write; None for samples that are pixels.
        batch_size: samples decoded at a time, which bounds the memory for pixels as floats.
        quantize: whether to convert to uint8 images; False leaves latents (n, C, h, w) float32.
    """

    def __init__(self, device: torch.device, decode: Decode | None, batch_size: int, quantize: bool = True) -> None:
        self._decode, self._batch_size, self._quantize = decode, batch_size, quantize
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> torch.cuda.Event | None:
        """An event that is ready when the samples queued so far are; None on a CPU."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._stream.device))
        return event

    def __call__(self, samples: Tensor, seeds: IntArray) -> Images:
        """Finished samples (n, C, h, w) → images (n, H, W, 3) uint8; ValueError if one is not finite."""
        parts, finite = [], []
        with torch.cuda.stream(self._stream):  # does nothing without a GPU
            if self._stream is not None:
                samples.record_stream(self._stream)
            for part in samples.split(self._batch_size):
                images = part if self._decode is None else self._decode(part)
                finite.append(images.isfinite().flatten(1).all(1))
                pixels = quantize_pixels(images) if self._quantize else images
                if self._stream is not None:
                    # Only a copy to page-locked memory does not make the host, and with it the other stream, wait.
                    host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
                    pixels = host.copy_(pixels, non_blocking=True)
                parts.append(pixels)
            if self._stream is not None:
                self._stream.synchronize()
            broken = (~torch.cat(finite).cpu()).nonzero()
        if len(broken):
            seed = seeds[int(broken[0])]
            raise ValueError(f"the sample of seed {seed} is not finite; check the weights and the settings")
        return torch.cat(parts).numpy()


@dataclass
class Timings:
    """Seconds spent by this process: from the first batch to the last image, and meanwhile in the background thread."""

    sampling: float = 0.0
    decoding: float = 0.0
    writing: float = 0.0
    hook: float = 0.0


@dataclass
class ShardWriter:
    """Takes samples batch by batch, in the order of their positions, and writes each shard when it is complete, with
    `made_with` (plain JSON values). `hooks` are called with positions (n,) and images (n, H, W, 3) of every batch."""

    folder: ShardFolder
    converter: PixelConverter
    made_with: dict[str, Any]
    hooks: Sequence[OnImages]
    timings: Timings
    _images: list[Images] = field(default_factory=list, init=False)
    _shard_began: float = field(default_factory=time.perf_counter, init=False)

    def take(
        self, shard: int, positions: slice, samples: Tensor, seeds: IntArray, ready: torch.cuda.Event | None
    ) -> None:
        """Take the samples at these positions of the shard."""
        if ready is not None:
            ready.synchronize()
        began = time.perf_counter()
        images = self.converter(samples, seeds)
        decoded = time.perf_counter()
        self.timings.decoding += decoded - began
        for hook in self.hooks:
            hook(np.arange(positions.start, positions.stop), images)
        hooked = time.perf_counter()
        self.timings.hook += hooked - decoded if self.hooks else 0.0
        self._images.append(images)
        if positions.stop == self.folder.positions(shard).stop:
            seconds = hooked - self._shard_began
            content = self._images[0] if len(self._images) == 1 else np.concatenate(self._images)
            self.folder.write(shard, content, {**self.made_with, "seconds": seconds})
            self._images, self._shard_began = [], hooked
            self.timings.writing += time.perf_counter() - hooked
