"""The parts of training, and a short run of the whole."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
import yaml
from PIL import Image

from ddt_fast import load_model
from ddt_fast.config import Experiment
from ddt_fast.model.reference import DDT
from ddt_fast.presets import PRESETS
from ddt_fast.training import loop
from ddt_fast.training.ema import EMA
from ddt_fast.training.loop import shuffled_batches, train

DIGITS = PRESETS["digits"]


def short(steps: int = 30, **settings) -> Experiment:
    training = replace(
        DIGITS.training, max_steps=steps, batch_size=64, checkpoint_every=10, log_every=5, score_samples=0, **settings
    )
    return replace(DIGITS, training=training, sampling=replace(DIGITS.sampling, num_steps=4))


def test_ema_forgets_the_start_and_then_decays_constantly():
    model = DDT(DIGITS.model)
    parameter = model.blocks[0].norm1.weight
    ema = EMA(model, 0.5)
    averaged = ema.model.blocks[0].norm1.weight
    with torch.no_grad():
        parameter.fill_(3.0)
    ema.update(model)
    assert averaged[0].item() == pytest.approx(1 * 2 / 11 + 3 * 9 / 11)
    for _ in range(60):
        ema.update(model)
    with torch.no_grad():
        parameter.fill_(5.0)
    ema.update(model)
    assert averaged[0].item() == pytest.approx(0.5 * 3 + 0.5 * 5)


def test_every_epoch_holds_every_index_once_in_its_own_order():
    indices = torch.cat(list(islice(shuffled_batches(10, 4, seed=1), 5)))
    first, second = indices[:10], indices[10:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert not torch.equal(first, second)
    assert torch.equal(indices, torch.cat(list(islice(shuffled_batches(10, 4, seed=1), 5))))
    assert len(next(shuffled_batches(10, 64, seed=0))) == 64


def test_short_run_writes_everything_and_learns(tmp_path):
    result = train(short(), tmp_path, torch.device("cpu"))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert all(line["images_per_second"] > 0 for line in lines)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_0000010", "step_0000020"]
    saved, early = load_model(tmp_path / "model"), load_model(tmp_path / "checkpoints" / "step_0000010")
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor)
    assert not torch.equal(saved.final_layer.linear.weight, early.final_layer.linear.weight)
    assert Image.open(tmp_path / "samples.png").size[0] > 600
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert recipe["training"]["max_steps"] == 30
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 30
    assert not list(tmp_path.glob(".*"))


def test_same_seed_same_weights(tmp_path):
    runs = [train(short(3, seed=seed), tmp_path / f"{i}", torch.device("cpu")) for i, seed in enumerate((0, 0, 1))]
    first, second, other = (run.model.blocks[0].attn.qkv.weight for run in runs)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_bfloat16_keeps_float32_weights(tmp_path):
    result = train(short(6, dtype="bfloat16"), tmp_path, torch.device("cpu"))
    assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())
    train(short(6), tmp_path / "float32", torch.device("cpu"))
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
    train(short(1, learning_rate=0.003, adam_betas=(0.8, 0.7), weight_decay=0.2), tmp_path, torch.device("cpu"))
    assert (seen["lr"], seen["betas"], seen["weight_decay"]) == (0.003, (0.8, 0.7), 0.2)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) by step 5; take a lower learning_rate"):
        train(short(30, learning_rate=1e30), tmp_path, torch.device("cpu"))
    assert not (tmp_path / "model").exists()


def test_the_model_is_saved_before_it_is_scored(tmp_path, monkeypatch):
    def failing(*_):
        raise RuntimeError("no score")

    monkeypatch.setattr(loop, "score_model", failing)
    experiment = short(2)
    scored = replace(experiment, training=replace(experiment.training, score_samples=70))
    with pytest.raises(RuntimeError, match="no score"):
        train(scored, tmp_path, torch.device("cpu"))
    assert load_model(tmp_path / "model").config == DIGITS.model


def test_a_second_run_leaves_nothing_of_the_first(tmp_path):
    train(short(30), tmp_path, torch.device("cpu"))
    train(short(2), tmp_path, torch.device("cpu"))
    assert not (tmp_path / "checkpoints").exists()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_folders_of_the_user_are_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "my_code.py").touch()
    with pytest.raises(ValueError, match=r"holds my_code\.py, which ddt-fast did not write"):
        train(short(2), tmp_path, torch.device("cpu"))
    assert (tmp_path / "model" / "my_code.py").exists()


@pytest.mark.gpu
def test_short_run_on_cuda(tmp_path):
    result = train(short(), tmp_path, torch.device("cuda"))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert next(result.model.parameters()).is_cuda
    assert load_model(result.folder).config == DIGITS.model
