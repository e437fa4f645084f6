"""Runs of a tiny model that take seconds, in this process or in others of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml

from ddt_fast.command import run_command
from ddt_fast.config import DataConfig, DDTConfig, Experiment
from ddt_fast.presets import PRESETS
from ddt_fast.train import main
from ddt_fast.training.run_folder import settings_of

CPU = torch.device("cpu")
DIGITS = PRESETS["digits"]
CLIPPED = {"warmup_steps": 8, "max_grad_norm": 0.5, "keep_checkpoints": 0}
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


@dataclass
class Started:
    """Processes that train, and the file that takes all that they print."""

    processes: list[BaseProcess]
    output: Path

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def finish(self, code: int = 0) -> str:
        """Wait for them, and return their output; AssertionError for another exit code."""
        for process in self.processes:
            process.join(240)
        output = self.output.read_text()
        assert [process.exitcode for process in self.processes] == [code] * len(self.processes), output[-4000:]
        return output


def start(experiment: Experiment, folder: Path, *options: str, processes: int = 1) -> Started:
    """`python -m ddt_fast.train` with these settings."""
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.write_text(yaml.safe_dump(settings_of(experiment)))
    command = ["--config", str(recipe), "--output-dir", str(folder), "--device", "cpu", *options]
    return launch(_train, command, output=folder.parent / f"{folder.name}.txt", processes=processes)


def launch(function: Callable[[Any], None], argument: Any, output: Path, processes: int) -> Started:
    """A function in processes that meet as torchrun's do.

    They are forked from a server that has imported everything: starting Python takes longer than such a run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "ddt_fast.train", "tiny_runs"])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for the server, which starts with the first
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output.unlink(missing_ok=True)
    started = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = context.Process(target=_run, args=(function, argument, place if processes > 1 else {}, output))
        process.start()
        started.append(process)
    return Started(started, output)


def _run(function: Callable[[Any], None], argument: Any, place: dict[str, object], output: Path) -> None:
    with output.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    function(argument)


def _train(command: list[str]) -> None:
    run_command(lambda: main(command))


def wait_for_log(started: Started, run: Path) -> None:
    """Return when the run has logged a line."""
    log = run / "log.jsonl"
    while started.running() and not (log.exists() and log.read_text()):
        time.sleep(0.02)


def log_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log_lines(run)]


def final_state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by its place in the state: weights, averages, moments."""
    reader = dcp.FileSystemReader(folder / "checkpoints" / f"step_{step:07d}" / "state")
    places = reader.read_metadata().state_dict_metadata.items()
    state = {name: torch.empty(place.size, dtype=place.properties.dtype) for name, place in places}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def assert_same_end(first: Path, second: Path, step: int) -> None:
    """Equal bit for bit, moments of the optimiser too."""
    ours, theirs = final_state(first, step), final_state(second, step)
    assert ours.keys() == theirs.keys() != set()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_same_log(first: Path, second: Path) -> None:
    """Equal except for time and memory."""
    kept = ("step", "loss", "grad_norm", "learning_rate")
    ours, theirs = ([{name: line[name] for name in kept} for line in log_lines(run)] for run in (first, second))
    assert ours == theirs
