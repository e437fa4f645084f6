"""Progress as it happens: on a GPU a step has not run when it has been launched."""

from collections import deque
from collections.abc import Callable

import torch

IN_FLIGHT = 8
"""Steps that stay launched ahead of those counted, so that the GPU never waits for the host."""


class FinishedSteps:
    """Calls `done` for every step that has finished, with what `launched` got for it. On a GPU that is when a few more
    steps have been launched; leaving the `with` block waits for the last."""

    def __init__(self, device: torch.device, done: Callable[[float], object]) -> None:
        self._on_gpu, self._done = device.type == "cuda", done
        self._launched: deque[tuple[torch.cuda.Event, float]] = deque()

    def launched(self, amount: float = 1) -> None:
        """Call it after each step, on the stream of the step."""
        if not self._on_gpu:
            self._done(amount)
            return
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._launched.append((event, amount))
        if len(self._launched) > IN_FLIGHT:
            self._wait()

    def __enter__(self) -> "FinishedSteps":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        while self._launched and kind is None:
            self._wait()

    def _wait(self) -> None:
        event, amount = self._launched.popleft()
        event.synchronize()
        self._done(amount)
