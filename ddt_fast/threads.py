"""How many CPU threads a command computes with. Library functions leave PyTorch's setting alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ddt_fast.config import DDTConfig
from ddt_fast.device import choose_device
from ddt_fast.ranks import process_ranks
from ddt_fast.wording import plural

# Up to this hidden size, operations are too short for more threads to share.
_SMALL_WIDTH, _SMALL_THREADS = 256, 4


@contextmanager
def threads_for(model: DDTConfig | None, device: str) -> Iterator[None]:
    """Compute with a number of threads that suits the model, and print it. On a GPU, do neither.

    OMP_NUM_THREADS decides if it is set. Otherwise a small model gets up to 4, and any other model, or
    None, all that PyTorch would use. ValueError if the device cannot be used.
    """
    if choose_device(device).type != "cpu":
        yield
        return
    before = chosen = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ:
        why = ", from OMP_NUM_THREADS"
    elif model is not None and model.hidden_size <= _SMALL_WIDTH:
        chosen, why = min(before, _SMALL_THREADS), " for a small model; OMP_NUM_THREADS changes that"
    else:
        why = "; OMP_NUM_THREADS changes that"
    process_ranks().say(f"CPU: {plural(chosen, 'thread')}{why}")
    torch.set_num_threads(chosen)
    try:
        yield
    finally:
        torch.set_num_threads(before)
