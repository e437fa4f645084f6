"""A job of the sample command, and ways to disturb it, for the tests of large jobs."""

import importlib
from pathlib import Path

import pytest
import torch

from ddt_fast.command import run_command
from ddt_fast.generation import shards
from ddt_fast.sampling.engine import Sampler

sample_command = importlib.import_module("ddt_fast.sample")

JOB = ["--num-images", "123", "--num-steps", "2", "--shard-size", "20", "--batch-size", "10"]
OUTPUTS = ["generation.json", "grid.png", "images", "samples.npz"]


def without_ranks(monkeypatch) -> None:
    """As if no launcher had started this process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def sample(folder: Path, *arguments: str, **more) -> bytes:
    sample_command.main([*arguments, "--output-dir", str(folder)], **more)
    return (folder / "samples.npz").read_bytes()


def error_line(capsys, folder: Path, *arguments: str) -> str:
    """Run a command that must fail; return the last line of stderr, where it says why."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: sample(folder, *arguments))
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def begin(folder: Path, count: int, *arguments: str) -> list[Path]:
    """Stop a job of JOB once it has `count` shards; return their files."""
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
    """A list that gets the size of every batch that is drawn from now on."""
    sizes: list[int] = []
    call = Sampler.__call__

    def plural(self, noise, *rest, **more):
        sizes.append(len(noise))
        return call(self, noise, *rest, **more)

    monkeypatch.setattr(Sampler, "__call__", plural)
    return sizes


def small_autoencoder(folder: Path) -> str:
    """A small AutoencoderKL with random weights, 8 pixels a latent as the published one, saved there."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder)
    return str(folder)
