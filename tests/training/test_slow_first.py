"""The first process may take longer with what it does alone than the collectives of training wait."""

import os
import subprocess
import sys

SCRIPT = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from PIL import Image
from tiny_runs import digits
from ddt_fast.training.loop import train
from ddt_fast.training.samples import Preview

SECONDS = 4

def slow_grid(self, model):
    time.sleep(SECONDS + 3)
    return Image.new("RGB", (2, 2))

Preview.grid = slow_grid
dist.init_process_group("gloo")
dist.barrier()

dist.distributed_c10d._set_pg_timeout(timedelta(seconds=SECONDS), dist.group.WORLD)
folder = Path(sys.argv[1])
train(digits(4, sample_every=2), folder, torch.device("cpu"))
assert (folder / "samples.png").exists(), "returned before the first process had drawn"
print("rank", dist.get_rank(), "came to the end")
"""


def test_others_wait_while_samples_are_drawn(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), environment.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("came to the end") == 2
    assert (tmp_path / "run" / "samples" / "samples_step_0000002.png").exists()
