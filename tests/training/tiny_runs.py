"""Runs of a tiny model that take seconds, in this process or in others of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from ddt_fast.config import DataConfig, DDTConfig, Experiment
from ddt_fast.presets import PRESETS
from ddt_fast.training.run_folder import settings_of

DIGITS = PRESETS["digits"]
TINY = DDTConfig(1, 2, 32, 2, 3, 2, 10)


def digits(steps: int, **settings: object) -> Experiment:
    """A small DDT on the digits, without samples or scores."""
    quick = {"batch_size": 16, "log_every": 5, "checkpoint_every": 5, "sample_every": 0, "score_samples": 0}
    training = replace(DIGITS.training, max_steps=steps, **{**quick, **settings})
    return replace(DIGITS, model=TINY, training=training, sampling=replace(DIGITS.sampling, num_steps=2))


def latents(folder: Path, steps: int, **settings: object) -> Experiment:
    """A small DDT with REPA on the cache in `folder`, 4 x 2 x 2 latents of 2 classes."""
    experiment = digits(steps, **settings)
    training = replace(experiment.training, repa_weight=0.5, repa_block=1)
    data = DataConfig("latents", 16, "none", folder=str(folder))
    return replace(experiment, model=DDTConfig(4, 2, 32, 2, 3, 2, 2), data=data, training=training)


def start(experiment: Experiment, folder: Path, *options: str, processes: int = 1) -> subprocess.Popen[str]:
    """`python -m ddt_fast.train` with these settings, under torchrun where there are several processes."""
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.write_text(yaml.safe_dump(settings_of(experiment)))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "ddt_fast.train", "--config", str(recipe), "--output-dir", str(folder), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *options], env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for it, and return its output; AssertionError for another exit code."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit code {process.returncode}: {out[-1000:]}{err[-3000:]}"
    return out + err


def final_state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by its place in the state: weights, averages, moments."""
    file = folder / "whole.pt"
    dcp_to_torch_save(folder / "checkpoints" / f"step_{step:07d}" / "state", file)
    state = torch.load(file, weights_only=True)
    file.unlink()
    flat: dict[str, torch.Tensor] = {}

    def walk(prefix: str, part: object) -> None:
        if isinstance(part, torch.Tensor):
            flat[prefix] = part
        elif isinstance(part, dict):
            for name, inner in part.items():
                walk(f"{prefix}/{name}", inner)

    walk("", state)
    assert flat
    return flat
