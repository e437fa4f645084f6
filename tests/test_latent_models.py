"""What training does to latents, their size and their classes' names go from the data through a run into its model, and
are undone wherever samples become images: shards of LightningDiT, with a scaling of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from latent_cases import write_cache
from safetensors.torch import save_file

import ddt_fast.convert as convert
import ddt_fast.train as train_command
from ddt_fast.config import DataConfig, DDTConfig, Experiment, SamplingConfig, TrainingConfig
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.generation.images import to_uint8
from ddt_fast.model.settings import read_experiment
from ddt_fast.pipeline import DDTPipeline
from ddt_fast.presets import PRESETS
from ddt_fast.training.loop import train
from ddt_fast.training.run_folder import settings_of
from ddt_fast.training.samples import Preview
from pipeline_cases import quiet, seeded
from sample_jobs import sample, sample_error, small_autoencoder

CPU = torch.device("cpu")
MEAN, STD = (1.0, -0.5, 0.25, 2.0), (2.0, 0.5, 1.5, 3.0)
NORMALISATIONS = {"statistics": {"scaling_factor": 1.0, "stats": True}, "scale": {"scaling_factor": 0.7}}


def write_shards(folder: Path, channels: int = 4, side: int = 4, classes: int = 3) -> torch.Tensor:
    """LightningDiT's shards and statistics of twelve latents, which are returned."""
    folder.mkdir()
    latents = torch.randn(12, channels, side, side, generator=torch.Generator().manual_seed(0))
    stats = {"mean": torch.tensor(MEAN * (channels // 4)), "std": torch.tensor(STD * (channels // 4))}
    torch.save({name: part.view(1, -1, 1, 1) for name, part in stats.items()}, folder / "latents_stats.pt")
    save_file(
        {"latents": latents, "labels": torch.arange(12) % classes}, folder / "latents_rank00_shard000.safetensors"
    )
    return latents


def experiment(data: DataConfig, **training: object) -> Experiment:
    """One step of a small model of these data, with 3 classes."""
    settings = {"max_steps": 1, "batch_size": 4, "sample_every": 0, "dtype": "float32", **training}
    model = DDTConfig(4, 2, 32, 2, 3, 2, 3)
    return Experiment(model, data, TrainingConfig(**settings), SamplingConfig(num_steps=2, last_step=None))


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr("ddt_fast.training.run.plot_runs", lambda logs, output: None)


@pytest.fixture(params=NORMALISATIONS)
def normalised(request, tmp_path) -> Experiment:
    """An experiment with latents of each normalisation."""
    write_shards(tmp_path / "shards")
    numbers = dict(NORMALISATIONS[request.param])
    if numbers.pop("stats", False):
        numbers["channel_stats"] = str(tmp_path / "shards" / "latents_stats.pt")
    vae = small_autoencoder(tmp_path / "vae")
    return experiment(DataConfig("latents", 32, vae, folder=str(tmp_path / "shards"), **numbers))


def right(x: torch.Tensor, data: DataConfig, decode: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    """The images of what a model draws, by the book."""
    z = x / data.scaling_factor
    if data.channel_stats is not None:
        z = z * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)
    return to_uint8(torch.cat([decode(one[None]) for one in z]))


@pytest.mark.slow
def test_what_training_does_to_latents_is_undone_everywhere(normalised, tmp_path, monkeypatch):
    data = normalised.data
    train(normalised, tmp_path / "run", CPU)
    folder = tmp_path / "run" / "model"
    kept = json.loads((folder / "config.json").read_text())["data"]
    assert kept["scaling_factor"] == data.scaling_factor
    assert kept["channel_stats"] == (None if data.channel_stats is None else [list(MEAN), list(STD)])
    assert kept["folder"] is None

    pipe = quiet(DDTPipeline.from_pretrained(folder))
    labels = [0, 1, 2]
    x = pipe(labels, generator=seeded(0, 1, 2), output_type="latent").images
    expected = right(x, data, lambda z: pipe.vae.decode(z).sample)
    assert expected.std() > 0
    assert not np.array_equal(expected, to_uint8(pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample))

    def close(images: np.ndarray) -> None:
        assert np.abs(images.astype(int) - expected).max() <= 1

    close(np.stack(pipe(labels, generator=seeded(0, 1, 2)).images))
    pipe.save_pretrained(tmp_path / "pipeline")
    sources = {"run": folder, "pipeline": tmp_path / "pipeline"}
    for name, source in sources.items():
        sample(tmp_path / name, "--checkpoint", str(source), "--num-images", "3", "--dtype", "float32")
        close(np.load(tmp_path / name / "samples.npz")["arr_0"])

    drawn: list[np.ndarray] = []
    preview = Preview(
        replace(normalised, data=read_experiment(folder).data, training=TrainingConfig(sample_images=3)), CPU
    )
    monkeypatch.setattr(preview, "_draw", lambda *_: x)
    monkeypatch.setattr("ddt_fast.training.samples.labelled_grid", lambda images, _: drawn.append(images))
    preview.grid(None)
    close(drawn[0])


def test_data_taught_and_decoded_are_the_data(normalised, tmp_path):
    data = normalised.data
    dataset = LatentDataset(Path(data.folder), scaling_factor=data.scaling_factor, channel_stats=data.channel_stats)
    taught = dataset.draw(np.arange(4), np.zeros(4, bool), np.arange(4, dtype=np.uint64))
    decode = Preview(replace(normalised, data=dataset.described(data), training=TrainingConfig()), CPU)._decode
    stored = dataset._shards[0].tensors["latents"][:4]
    torch.testing.assert_close(decode(taught), decode.vae.decode(stored).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_continues_whatever_its_data_say_of_themselves(normalised, tmp_path):
    train(normalised, tmp_path / "run", CPU)
    assert "class_names: null" in (tmp_path / "run" / "recipe.yaml").read_text()
    numbers = tmp_path / "run" / "checkpoints" / "step_0000001" / "trainer.json"
    saved = json.loads(numbers.read_text())
    for name in ("pixels_per_latent", "class_names"):  # a checkpoint of before
        assert saved["settings"]["data"].pop(name, 0) is None
    numbers.write_text(json.dumps(saved))
    longer = replace(normalised, training=replace(normalised.training, max_steps=2))
    assert train(longer, tmp_path / "run", CPU, "auto").step == 2


@pytest.mark.slow
def test_conversion_keeps_the_numbers_and_says_when_it_cannot(normalised, tmp_path, capsys):
    train(normalised, tmp_path / "run", CPU)
    own = read_experiment(tmp_path / "run" / "model").data
    convert.main([str(tmp_path / "run"), str(tmp_path / "folder")])
    capsys.readouterr()
    convert.main([str(tmp_path / "run"), str(tmp_path / "out.ckpt")])
    lost = "has no place for it: how latents were normalised (scaling_factor "
    assert lost in capsys.readouterr().out
    for name in ("run/recipe.yaml", "run/model/config.json"):
        out = tmp_path / Path(name).name
        convert.main([str(tmp_path / "out.ckpt"), str(out), "--config", str(tmp_path / name)])
        found = read_experiment(out).data
        assert (found.scaling_factor, found.channel_stats) == (own.scaling_factor, own.channel_stats)
    assert read_experiment(tmp_path / "folder").data == own


def test_the_size_of_a_latent_comes_from_the_data(tmp_path, capsys):
    """VA-VAE's: 16 pixels a latent."""
    write_shards(tmp_path / "shards", 8)
    vae = small_autoencoder(tmp_path / "vae", 5, 8)
    data = DataConfig("latents", 64, vae, folder=str(tmp_path / "shards"), scaling_factor=1.0)
    model = DDTConfig(8, 1, 32, 2, 3, 2, 3)
    made = replace(experiment(data), model=model)
    train(made, tmp_path / "run", CPU)
    kept = read_experiment(tmp_path / "run" / "model").data
    assert (kept.image_size, kept.pixels_per_latent, kept.sample_size) == (64, 16, 4)
    job = ["--checkpoint", str(tmp_path / "run" / "model"), "--num-images", "2", "--dtype", "float32"]
    sample(tmp_path / "out", *job)
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape == (2, 64, 64, 3)
    pipe = quiet(DDTPipeline.from_pretrained(tmp_path / "run" / "model"))
    assert pipe(0, height=32, width=96).images[0].size == (96, 32)
    other = small_autoencoder(tmp_path / "other", 4, 8)
    narrow = small_autoencoder(tmp_path / "narrow", 5, 4)
    cases = {
        other: "turns 8x8 pixels into one latent position; expected one for images of 64 pixels with latents of 4x4",
        narrow: "has latents of 4 channels; the model's have 8",
    }
    for name, message in cases.items():
        assert message in sample_error(capsys, tmp_path / "bad", *job, "--autoencoder", name)
    refusals = [
        (replace(made, model=replace(model, in_channels=4)), "in_channels is 4; allowed: 8, .*`model.in_channels` 8"),
        (replace(made, data=replace(data, autoencoder=None, image_size=66)), "is 66; allowed: a multiple of 4, the"),
    ]
    for wrong, message in refusals:
        with pytest.raises(ValueError, match=message):
            train(wrong, tmp_path / "wrong", CPU)


@pytest.mark.parametrize(
    ("settings", "factor", "message"),
    [
        ({"image_size": 16, "autoencoder": "vae"}, 8, None),
        ({"image_size": 16}, 8, None),
        ({"image_size": 2}, 1, None),
        ({"image_size": 32, "autoencoder": "vae"}, 0, "is 32; allowed: 16, the size that .*cache was made at"),
        ({"image_size": 8}, 0, "image_size is 8; allowed: 16"),
    ],
)
def test_a_cache_knows_the_size_of_its_images(tmp_path, settings, factor, message):
    dataset = LatentDataset(write_cache(tmp_path / "cache", 8))
    data = DataConfig("latents", **settings)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            dataset.described(data)
        return
    found = dataset.described(data)
    assert (found.pixels_per_latent, found.sample_size, found.scaling_factor) == (factor, 2, 0.5)
    assert found.class_names == tuple(f"class {label}" for label in range(5))


@pytest.mark.slow
def test_the_numbers_of_a_model_train_the_next_one(normalised, tmp_path):
    """config.json's statistics in place of the file's path, through YAML."""
    train(normalised, tmp_path / "run", CPU)
    kept = read_experiment(tmp_path / "run" / "model").data
    data = replace(kept, folder=normalised.data.folder)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings_of(replace(normalised, data=data))))
    train_command.main(["--config", str(recipe), "--output-dir", str(tmp_path / "next"), "--device", "cpu"])
    assert read_experiment(tmp_path / "next" / "model").data == kept


@pytest.mark.slow
def test_latents_without_an_autoencoder_are_sampled_as_they_are(tmp_path, capsys):
    write_shards(tmp_path / "shards")
    stats = str(tmp_path / "shards" / "latents_stats.pt")
    data = DataConfig("latents", 4, None, folder=str(tmp_path / "shards"), scaling_factor=0.5, channel_stats=stats)
    train(experiment(data, sample_every=1), tmp_path / "run", CPU)
    assert "no grids of samples: they would be latents" in capsys.readouterr().err
    assert not (tmp_path / "run" / "samples.png").exists()
    folder = tmp_path / "run" / "model"
    job = ["--checkpoint", str(folder), "--num-images", "3", "--dtype", "float32"]

    (tmp_path / "out" / "images").mkdir(parents=True)  # of an earlier job
    taken: list[np.ndarray] = []
    sample(tmp_path / "out", *job, on_images=lambda _, latents: taken.append(latents))
    assert "latents, not pictures (no autoencoder is named)" in capsys.readouterr().out
    pipe = quiet(DDTPipeline.from_pretrained(folder))
    x = pipe([0, 1, 2], generator=seeded(0, 1, 2), output_type="latent").images
    z = x / 0.5 * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)
    with np.load(tmp_path / "out" / "samples.npz") as saved:
        assert saved["latents"].dtype == np.float32
        np.testing.assert_allclose(saved["latents"], z, rtol=1e-4, atol=1e-4)
        assert saved["labels"].tolist() == [0, 1, 2]
        np.testing.assert_array_equal(np.concatenate(taken), saved["latents"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["generation.json", "samples.npz"]
    sample(tmp_path / "out", *job, on_images=lambda _, latents: taken.append(latents))  # finished before
    np.testing.assert_array_equal(taken[-1], taken[0])
    with pytest.raises(ValueError, match="needs a vae; allowed without: latent"):
        pipe(0)
    assert "--num-png needs pictures; name an --autoencoder" in sample_error(
        capsys, tmp_path / "x", *job, "--num-png", "2"
    )
    assert "draws latents; name an --autoencoder" in sample_error(capsys, tmp_path / "x", *job, "--evaluate", "y.npz")

    vae = small_autoencoder(tmp_path / "vae")
    sample(tmp_path / "decoded", *job, "--autoencoder", vae)
    images = np.load(tmp_path / "decoded" / "samples.npz")["arr_0"]
    decoded = quiet(DDTPipeline.from_single_file(folder, vae=vae))
    expected = to_uint8(torch.cat([decoded.vae.decode(one[None]).sample for one in z]))
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert np.abs(np.stack(decoded([0, 1, 2], generator=seeded(0, 1, 2)).images).astype(int) - expected).max() <= 1
    decoded.save_pretrained(tmp_path / "pipeline")
    sample(tmp_path / "saved", "--checkpoint", str(tmp_path / "pipeline"), *job[2:])
    assert np.abs(np.load(tmp_path / "saved" / "samples.npz")["arr_0"].astype(int) - expected).max() <= 1
    alone = shutil.copytree(tmp_path / "pipeline" / "transformer", tmp_path / "alone")
    sample(tmp_path / "as_before", "--checkpoint", str(alone), *job[2:])
    np.testing.assert_array_equal(np.load(tmp_path / "as_before" / "samples.npz")["latents"], taken[0])


def test_pixels_take_no_autoencoder(tmp_path, capsys):
    assert "this model draws pixels" in sample_error(capsys, tmp_path, "--autoencoder", "some/vae")
    assert PRESETS["digits"].data.in_latents(1) is False
