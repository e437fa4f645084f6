"""The parts of training, and short runs of the whole in one process."""

import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import CPU, DIGITS, TINY, digits, latents, log_lines

from ddt_fast import load_model
from ddt_fast.config import DataConfig
from ddt_fast.model.reference import DDT
from ddt_fast.model.weights import CLASS_TABLE, save_model
from ddt_fast.training import run
from ddt_fast.training.ema import EMA
from ddt_fast.training.loop import clip_gradients, learning_rate, train
from ddt_fast.training.plots import plot_runs
from ddt_fast.training.run import build_model
from ddt_fast.training.samples import Preview
from ddt_fast.training.state import read_start


def test_ema_forgets_the_start_and_then_decays_constantly():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(model, 0.5)
    model.weight.data.fill_(3.0)
    start = ema.weights["weight"].item()
    ema.update(model)
    assert ema.weights["weight"].item() == pytest.approx(start * 2 / 11 + 3 * 9 / 11)
    for _ in range(60):
        ema.update(model)
    model.weight.data.fill_(5.0)
    ema.update(model)
    assert ema.weights["weight"].item() == pytest.approx(0.5 * 3 + 0.5 * 5)


def test_an_average_that_was_handed_over_is_not_forgotten():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(model, 0.999)
    ema.start_from({"weight": torch.full((1, 1), 7.0)})
    ema.update(model)
    assert ema.weights["weight"].item() == pytest.approx(0.999 * 7 + 0.001 * model.weight.item())


def test_learning_rate_warms_up_and_stays():
    settings = replace(DIGITS.training, learning_rate=0.1, warmup_steps=4)
    assert [learning_rate(settings, step) for step in (1, 2, 4, 5)] == pytest.approx([0.025, 0.05, 0.1, 0.1])
    assert learning_rate(replace(settings, warmup_steps=0), 1) == 0.1


def test_gradients_are_scaled_to_the_norm_but_only_down():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(model, None).tolist() == [5.0]
    assert clip_gradients(model, 6.0).tolist() == [5.0]
    assert model.weight.grad.tolist() == [[3.0, 4.0]]
    clip_gradients(model, 1.0)
    assert torch.allclose(model.weight.grad, torch.tensor([[0.6, 0.8]]), atol=1e-5)


@pytest.mark.slow
def test_short_run_writes_everything_and_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "plot_runs", plot_runs)  # which other tests leave out
    experiment = digits(40, batch_size=64, checkpoint_every=10, keep_checkpoints=2, sample_every=20, sample_images=10)
    result = train(experiment, tmp_path, CPU)
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(5, 41, 5))
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert all(line["images_per_second"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_0000030", "step_0000040"]
    saved, early = load_model(tmp_path / "model"), load_model(tmp_path / "checkpoints" / "step_0000030" / "model")
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor)
    assert not torch.equal(saved.final_layer.linear.weight, early.final_layer.linear.weight)
    for picture in ("samples.png", "curves.png", "samples/samples_step_0000020.png"):
        assert Image.open(tmp_path / picture).size[0] > 600
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["training"]["max_steps"] == 40
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 40
    assert not list(tmp_path.glob("**/.*step*"))


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("six") / "run"
    train(digits(6), folder, CPU)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "reference", "gradient_checkpointing": True},
        {"gradient_checkpointing": True},
        {"accumulation_steps": 4},
        {"parallel": "fsdp"},
        {"engine": "reference", "parallel": "fsdp", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_how_a_step_is_computed_does_not_change_the_run(six_steps, tmp_path, settings):
    expected = load_model(six_steps / "model")
    actual = train(digits(6, **settings), tmp_path, CPU).model
    for (name, ours), theirs in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5), name


def test_another_seed_gives_other_weights(six_steps, tmp_path):
    ours, other = load_model(six_steps / "model"), train(digits(6, seed=1), tmp_path, CPU).model
    assert not torch.equal(ours.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


def test_bfloat16_keeps_float32_weights(six_steps, tmp_path):
    result = train(digits(6, dtype="bfloat16"), tmp_path, CPU)
    assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())
    low, full = (log_lines(path)[-1]["loss"] for path in (tmp_path, six_steps))
    assert low == pytest.approx(full, rel=0.02)
    assert low != full


def test_optimizer_gets_its_settings(tmp_path, monkeypatch):
    made = Mock(wraps=torch.optim.AdamW)
    monkeypatch.setattr(torch.optim, "AdamW", made)
    train(digits(1, learning_rate=0.003, adam_betas=(0.8, 0.7), weight_decay=0.2), tmp_path, CPU)
    assert made.call_args.kwargs == {"lr": 0.003, "betas": (0.8, 0.7), "weight_decay": 0.2, "fused": True}


def test_the_model_is_saved_before_it_is_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(Preview, "score", lambda *_: load_model(tmp_path / "model") and {})
    assert train(digits(2, score_samples=70), tmp_path, CPU).scores == {}


def test_a_second_run_leaves_nothing_of_the_first(ten):
    (ten / "samples").mkdir()
    (ten / "samples" / "samples_step_0000005.png").touch()
    train(digits(2), ten, CPU)
    assert [path.name for path in (ten / "checkpoints").iterdir()] == ["step_0000002"]
    assert len(log_lines(ten)) == 1
    assert not (ten / "samples").exists()


def test_classes_without_data_are_warned_of(latent_cache, tmp_path):
    experiment = latents(latent_cache, 1)
    more = replace(experiment, model=replace(experiment.model, num_classes=3))
    with pytest.warns(UserWarning, match="holds 2 classes, num_classes is 3: the other classes are never trained"):
        train(more, tmp_path / "three", CPU)


def test_what_cannot_be_trained_is_refused_before_anything_is_removed(ten, latent_cache):
    drawn = latents(latent_cache, 1, sample_every=1)
    without_autoencoder = replace(drawn, data=replace(drawn.data, autoencoder=str(ten)))
    (ten / "model" / "my_code.py").touch()
    for experiment, message in (
        (digits(2), r"holds my_code\.py, which ddt-fast did not write"),
        (without_autoencoder, r"could not be loaded: .*; expected .*; or train without .* training.sample_every 0"),
    ):
        with pytest.raises(ValueError, match=message):
            train(experiment, ten, CPU)
        assert (ten / "model" / "my_code.py").exists()
        assert len(list((ten / "checkpoints").iterdir())) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_short_run_on_cuda(tmp_path, parallel, compile):
    experiment = digits(40, batch_size=64, dtype="bfloat16", parallel=parallel, compile=compile)
    train(experiment, tmp_path, torch.device("cuda", 0))
    lines = log_lines(tmp_path)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert load_model(tmp_path / "model").config == experiment.model


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_weights_of_another_number_of_classes_start_with_fresh_class_embeddings(tmp_path, capsys, engine):
    seven, ours = DDT(replace(TINY, num_classes=7)), replace(digits(1, engine=engine), model=TINY)
    raw = {name: tensor + 1 for name, tensor in seven.state_dict().items()}
    save_model(seven, tmp_path / "model", DataConfig("latents", 8), ours.sampling, raw)
    torch.manual_seed(0)
    model = build_model(ours, CPU, None)
    fresh = model.denoiser.state_dict()[CLASS_TABLE].clone()
    average = read_start(str(tmp_path / "model"), model)
    assert "their average, 7 classes there, 10 here: fresh class embeddings" in capsys.readouterr().err
    weights = model.denoiser.state_dict()
    null = seven.state_dict()[CLASS_TABLE][-1]
    for table, row in ((weights[CLASS_TABLE], null + 1), (average[CLASS_TABLE], null)):
        assert torch.equal(table[:-1], fresh[:-1])
        assert torch.equal(table[-1], row)
    others = {name for name in raw if name != CLASS_TABLE}
    assert all(torch.equal(weights[name], raw[name]) for name in others)
    wider = replace(TINY, num_classes=7, hidden_size=48)
    with pytest.raises(ValueError, match=r"hidden_size 32 in .*model, 48 in the config"):
        read_start(str(tmp_path / "model"), build_model(replace(ours, model=replace(wider, num_classes=10)), CPU, None))
