"""Runs the sample command again and again in children that are killed: `python killed_jobs.py FOLDER MODE COUNT ARGS…`

MODE "random" kills all processes of a job at random moments, COUNT trials; "renames" kills a job just before, and just
after, each of its first COUNT renames. Every trial is started again until it ends by itself, in a folder of its own.
Children are forked, so that nothing is imported twice; the parent computes nothing, which is what makes that safe.
"""

import importlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # its import and the next one's would be every child's own

import ddt_fast.generation.job  # noqa: F401

sample_command = importlib.import_module("ddt_fast.sample")


def start(arguments: list[str], rank: int, world_size: int, before: Callable[[], None] = lambda: None) -> int:
    """Fork a process of the job; its output goes to FOLDER/../log.txt."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(Path(arguments[-1]).parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        torch.set_num_threads(1)
        before()
        sample_command.main(arguments)
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def run(arguments: list[str], world_size: int = 1) -> float:
    """A job to its end; the seconds it took."""
    began = time.perf_counter()
    children = [start(arguments, rank, world_size) for rank in range(world_size)]
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes == [0] * world_size, codes
    return time.perf_counter() - began


def random_trials(folder: Path, count: int, arguments: list[str]) -> None:
    seconds = run([*arguments, "--output-dir", str(folder / "whole")], 2)
    rng = random.Random(0)
    for trial in range(count):
        output = ["--output-dir", str(folder / f"trial-{trial}")]
        kills = 1 + trial % 3
        for _ in range(kills):
            children = [start([*arguments, *output], rank, 2) for rank in range(2)]
            time.sleep(rng.uniform(0, seconds))
            for child in children:
                os.kill(child, signal.SIGKILL)
            for child in children:
                os.waitpid(child, 0)
        run([*arguments, *output], 1 + trial % 2)


def rename_trials(folder: Path, count: int, arguments: list[str]) -> None:
    run([*arguments, "--output-dir", str(folder / "whole")])
    for trial in range(count):
        for after in (False, True):
            output = ["--output-dir", str(folder / f"trial-{trial}-{'after' if after else 'before'}")]

            def before(number: int = trial, after: bool = after) -> None:
                left, replace = [number], os.replace

                def dying(*names: str) -> None:
                    left[0] -= 1
                    if left[0] >= 0:
                        return replace(*names)
                    if after:
                        replace(*names)
                    os.kill(os.getpid(), signal.SIGKILL)

                os.replace = dying

            child = start([*arguments, *output], 0, 1, before)
            status = os.waitpid(child, 0)[1]
            print(trial, after, "killed" if os.WIFSIGNALED(status) else "ended")
            run([*arguments, *output])


if __name__ == "__main__":
    trials = {"random": random_trials, "renames": rename_trials}[sys.argv[2]]
    trials(Path(sys.argv[1]), int(sys.argv[3]), sys.argv[4:])
