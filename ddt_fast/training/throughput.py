"""The speed of training: img/s, TFLOP/s, MFU and memory."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ddt_fast.config import DDTConfig
from ddt_fast.model.flops import model_flops

_PEAK_TFLOPS = {
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": 312.0,
    r"H100 80GB HBM3": 989.4,
    r"H100 PCIe": 756.0,
    r"H100 NVL|H200 NVL": 835.5,
    r"H200": 989.4,
    r"B200": 2250.0,
    r"L40S": 362.05,
    r"GeForce RTX 4090": 165.2,
}
"""Dense bf16 and fp16 TFLOP/s with fp32 accumulation, by CUDA's name of the GPU. Source: NVIDIA's data sheets, whose
figures for Hopper and Blackwell are for sparse matrices, twice these."""


def training_flops(config: DDTConfig, height: int, width: int, projector: bool) -> int:
    """Matrix-multiplication FLOPs of training per image or latent of this size: forward, and twice that for backward.
    ValueError if patch_size does not divide the size.

    Recomputation by gradient checkpointing is not counted, as usual for MFU, nor is DINOv2's forward pass, which cached
    features do not need. REPA's projector, an MLP C -> C -> C -> 768, runs on every token.
    """
    forward = model_flops(config, height, width).total
    if projector:
        c = config.hidden_size
        forward += 2 * config.num_tokens(height, width) * (c * c + c * c + c * 768)
    return 3 * forward


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak dense FLOP/s of a GPU in bfloat16 or float16; None for other dtypes, CPUs, GPUs that are not listed here,
    and slices of a GPU (MIG)."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
    return next((peak * 1e12 for pattern, peak in _PEAK_TFLOPS.items() if re.fullmatch(pattern, name)), None)


class Throughput:
    """Counts images and time between log lines. An image takes `flops_per_image` (see `training_flops`) in `dtype`;
    `world_size` GPUs, or processes on CPUs, share the images."""

    def __init__(
        self, flops_per_image: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, world_size: int = 1
    ) -> None:
        self._flops, self._device, self._world_size = flops_per_image, device, world_size
        self._peak = peak_flops(device, dtype)
        self._images, self._start = 0, self._now()

    def add(self, images: int) -> None:
        """Count the images of a step, over all ranks."""
        self._images += images

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside: sampling, saving, compiling."""
        start = self._now()
        try:
            yield
        finally:
            self._start += self._now() - start

    def read(self) -> dict[str, float]:
        """The rates since the last call or the start, for the log; starts again.

        images_per_second over all ranks; tflops_per_second of one device; mfu, its share of the device's peak, if the
        peak is known; memory_gb (10^9 bytes), the peak memory of this rank's tensors on its GPU, or of this process in
        RAM, if the system reports it.
        """
        now = self._now()
        rate = self._images / (now - self._start)
        flops = rate * self._flops / self._world_size
        self._images, self._start = 0, now
        values = {"images_per_second": rate, "tflops_per_second": flops / 1e12}
        if self._peak is not None:
            values["mfu"] = flops / self._peak
        if (memory := _peak_memory(self._device)) is not None:
            values["memory_gb"] = memory / 1e9
        return values

    def _now(self) -> float:
        # The GPU lags behind: without waiting, the time of its last steps would count towards what comes next.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _peak_memory(device: torch.device) -> int | None:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    # In bytes on macOS, elsewhere in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
