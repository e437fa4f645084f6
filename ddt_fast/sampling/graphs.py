"""Steps as CUDA graphs: one graph for each kind, captured once and replayed at every step of that kind."""

import time
from collections.abc import Callable, Iterable

import torch

from ddt_fast.sampling.tables import StepKind


class CapturedSteps:
    """One graph for every kind of step; a call with a kind replays its graph on the current stream.

    All graphs share one memory pool: no tensor made in a step is read after it, so graphs may overwrite each other's
    tensors, in any order of replays. `advance` runs a step of a kind on buffers at fixed addresses, `rewind` sets the
    step counter to 0; `seconds` is the time to warm up and capture. If capturing fails, the error is raised, with
    nothing left behind: the current stream is the caller's.
    """

    def __init__(
        self,
        advance: Callable[[StepKind], None],
        kinds: Iterable[StepKind],
        rewind: Callable[[], None],
        device: torch.device,
    ) -> None:
        started = time.perf_counter()
        self.graphs: dict[StepKind, torch.cuda.CUDAGraph] = {}
        with torch.cuda.device(device):
            current = torch.cuda.current_stream()
            try:
                self._capture(advance, list(dict.fromkeys(kinds)), rewind)
            except BaseException:
                self.graphs.clear()
                torch.cuda.set_stream(current)  # torch.cuda.graph leaves its own when a capture cannot be ended
                raise
        self.seconds = time.perf_counter() - started

    def _capture(self, advance: Callable[[StepKind], None], kinds: list[StepKind], rewind: Callable[[], None]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # The first call compiles and times kernels, and makes workspaces, which a graph must not capture.
            for kind in kinds:
                rewind()
                advance(kind)
            rewind()
        torch.cuda.synchronize()
        pool = torch.cuda.graph_pool_handle()
        for kind in kinds:
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device at the same time, to decode or to write images.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                advance(kind)
            self.graphs[kind] = graph
        torch.cuda.synchronize()

    def __call__(self, kind: StepKind) -> None:
        self.graphs[kind].replay()
