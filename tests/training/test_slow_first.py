"""The first process may take longer with what it does alone than the collectives of training wait."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from PIL import Image
from tiny_runs import CPU, digits, launch

from ddt_fast.training.loop import train
from ddt_fast.training.samples import Preview

SECONDS = 3


def slow_grid(preview, model):
    time.sleep(SECONDS + 1)
    return Image.new("RGB", (2, 2))


def train_slowly(folder: Path) -> None:
    Preview.grid = slow_grid
    dist.init_process_group("gloo")
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=SECONDS), dist.group.WORLD)
    train(digits(4, sample_every=2), folder, CPU)
    assert (folder / "samples.png").exists(), "returned before the first process had drawn"
    print("came to the end")


@pytest.mark.slow
def test_others_wait_while_samples_are_drawn(tmp_path):
    output = launch(train_slowly, tmp_path / "run", tmp_path / "output.txt", processes=2).finish()
    assert output.count("came to the end") == 2
    assert (tmp_path / "run" / "samples" / "samples_step_0000002.png").exists()
