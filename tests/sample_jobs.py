"""A job of the sample command, and ways to disturb it."""

import importlib
import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

from ddt_fast.command import run_command
from ddt_fast.generation import shards
from ddt_fast.sampling.engine import Sampler

sample_command = importlib.import_module("ddt_fast.sample")

JOB = ["--num-images", "123", "--num-steps", "1", "--shard-size", "20", "--batch-size", "10"]
OUTPUTS = ["generation.json", "grid.png", "images", "samples.npz"]


def as_rank(monkeypatch, rank: int, world_size: int, folder: Path, *arguments: str) -> None:
    """Run the command as one of several processes."""
    with monkeypatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", str(world_size))
        sample_command.main([*arguments, "--output-dir", str(folder)])


def sample(folder: Path, *arguments: str, **more) -> bytes:
    """Run the command; return samples.npz."""
    sample_command.main([*arguments, "--output-dir", str(folder)], **more)
    return (folder / "samples.npz").read_bytes()


@cache
def whole() -> Path:
    """The folder of JOB, undisturbed."""
    folder = Path(tempfile.mkdtemp())
    sample(folder, *JOB)
    return folder


def error_line(capsys, main: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> str:
    """Run a command that must fail with one `error:` line and exit code 2; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(arguments))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert lines[-1] == errors[0]
    return errors[0]


def sample_error(capsys, folder: Path, *arguments: str) -> str:
    """The error line of the sample command in a folder."""
    return error_line(capsys, sample_command.main, [*arguments, "--output-dir", str(folder)])


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Within, no file grows past `size` bytes: a write fails half-way, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def begin(folder: Path, count: int, *arguments: str) -> list[Path]:
    """Stop a job (JOB, changed by the arguments) once it has `count` shards; return their files."""
    write = shards.ShardFolder.write

    def interrupted(self, shard, *rest):
        if shard >= count:
            raise KeyboardInterrupt
        write(self, shard, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.ShardFolder, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(folder, *JOB, *arguments)
    files = sorted(folder.glob("shards-*/shard-*.safetensors"))
    assert len(files) == count
    return files


def drawn(monkeypatch) -> list[int]:
    """A list that gets the size of every batch drawn from now on."""
    whole()  # what a test compares with is not counted
    sizes: list[int] = []
    call = Sampler.__call__

    def noted(self, noise, *rest, **more):
        sizes.append(len(noise))
        return call(self, noise, *rest, **more)

    monkeypatch.setattr(Sampler, "__call__", noted)
    return sizes


def small_autoencoder(folder: Path, levels: int = 4, channels: int = 4) -> str:
    """A small AutoencoderKL with random weights, 2^(levels - 1) pixels per latent (8 in the published one), saved
    there."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
    AutoencoderKL(3, 3, down, up, (8,) * levels, norm_num_groups=4, latent_channels=channels).save_pretrained(folder)
    return str(folder)
