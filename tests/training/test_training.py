"""The parts of training, and short runs of the whole in one process."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import DIGITS, digits

from ddt_fast import load_model
from ddt_fast.training.ema import EMA
from ddt_fast.training.loop import clip_gradients, learning_rate, train
from ddt_fast.training.samples import Preview

CPU = torch.device("cpu")


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


def test_short_run_writes_everything_and_learns(tmp_path):
    experiment = digits(40, batch_size=64, checkpoint_every=10, keep_checkpoints=2, sample_every=20, sample_images=10)
    result = train(experiment, tmp_path, CPU)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
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


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "reference"},
        {"gradient_checkpointing": True},
        {"engine": "reference", "gradient_checkpointing": True},
        {"accumulation_steps": 4},
        {"parallel": "fsdp"},
        {"engine": "reference", "parallel": "fsdp", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_how_a_step_is_computed_does_not_change_the_run(tmp_path, settings):
    expected = train(digits(6), tmp_path / "a", CPU).model
    actual = train(digits(6, **settings), tmp_path / "b", CPU).model
    for (name, ours), theirs in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5), name


def test_same_seed_same_weights(tmp_path):
    runs = [train(digits(3, seed=seed), tmp_path / f"{i}", CPU) for i, seed in enumerate((0, 0, 1))]
    first, second, other = (run.model.blocks[0].attn.qkv.weight for run in runs)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_bfloat16_keeps_float32_weights(tmp_path):
    result = train(digits(6, dtype="bfloat16"), tmp_path, CPU)
    assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())
    train(digits(6), tmp_path / "float32", CPU)
    low, full = (
        json.loads((path / "log.jsonl").read_text().splitlines()[-1]) for path in (tmp_path, tmp_path / "float32")
    )
    assert low["loss"] == pytest.approx(full["loss"], rel=0.02)
    assert low["loss"] != full["loss"]


def test_optimizer_gets_its_settings(tmp_path, monkeypatch):
    seen = {}
    original = torch.optim.AdamW

    def recording(parameters, **settings):
        seen.update(settings)
        return original(parameters, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", recording)
    train(digits(1, learning_rate=0.003, adam_betas=(0.8, 0.7), weight_decay=0.2), tmp_path, CPU)
    assert (seen["lr"], seen["betas"], seen["weight_decay"]) == (0.003, (0.8, 0.7), 0.2)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) by step 5; take a lower learning_rate"):
        train(digits(30, learning_rate=1e30), tmp_path, CPU)
    assert not (tmp_path / "model").exists()


def test_the_model_is_saved_before_it_is_scored(tmp_path, monkeypatch):
    def failing(*_):
        raise RuntimeError("no score")

    monkeypatch.setattr(Preview, "score", failing)
    with pytest.raises(RuntimeError, match="no score"):
        train(digits(2, score_samples=70), tmp_path, CPU)
    assert load_model(tmp_path / "model").config == digits(2).model


def test_a_second_run_leaves_nothing_of_the_first(tmp_path):
    train(digits(10, sample_every=5, sample_images=2), tmp_path, CPU)
    train(digits(2), tmp_path, CPU)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0000002"]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "samples").exists()


def test_folders_of_the_user_are_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "my_code.py").touch()
    with pytest.raises(ValueError, match=r"holds my_code\.py, which ddt-fast did not write"):
        train(digits(2), tmp_path, CPU)
    assert (tmp_path / "model" / "my_code.py").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_short_run_on_cuda(tmp_path, parallel, compile):
    experiment = digits(40, batch_size=64, dtype="bfloat16", parallel=parallel, compile=compile)
    result = train(experiment, tmp_path, torch.device("cuda", 0))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert result.model is not None
    assert load_model(tmp_path / "model").config == experiment.model
