"""Fitting a schedule: its derivatives, what is kept, and its file."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import golden_data as golden
from ddt_fast.config import SamplingConfig, Schedule
from ddt_fast.files import read_json
from ddt_fast.model import FusedDDT
from ddt_fast.model.quantization import quantize_int8
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT
from ddt_fast.model.weights import load_model
from ddt_fast.pipeline import DDTPipeline, DDTScheduler
from ddt_fast.sampling import Sampler, SamplingPlan
from ddt_fast.sampling import sample as library_sample
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.sampling.tuned import Tuned, check_schedule, model_digests, tuned_file
from ddt_fast.sampling.tuning import Batch, Fit, Numbers, Run
from ddt_fast.tune_sampler import fit_schedule
from ddt_fast.tune_sampler import main as tune_command
from ddt_fast.work import tune_sampler as work
from golden_data import relative_error
from sample_jobs import error_line, sample, sample_error

START = SamplingConfig(num_steps=5, solver="pec", order=2, guidance_interval=(0.3, 0.8))


def tiny(kind=golden.DDT):
    model = golden.model("tiny_h48_d24").requires_grad_(False)
    return model if kind is golden.DDT else FusedDDT.from_reference(model)


def batch(count: int, strength: float = 1.5) -> Batch:
    noise, _ = seeded_noise(range(count), (4, 8, 8))
    solution, _ = seeded_noise(range(100, 100 + count), (4, 8, 8))
    return Batch(noise, torch.arange(count) % 10, torch.full((count, 1, 1, 1), strength), solution)


def schedule_of(numbers: Numbers, vector: np.ndarray, model: torch.nn.Module) -> Schedule:
    times, cond, diff = numbers.steps(vector)
    return Schedule(
        tuple(times), *(tuple(map(tuple, rows)) for rows in (cond, diff)), (0.3, 0.8), model_digests(model), (8, 8)
    )


def moved(numbers: Numbers) -> np.ndarray:
    """Parameters away from the solver's own."""
    return 0.2 * np.random.default_rng(0).standard_normal(numbers.size)


def test_parameters_of_zero_are_the_solvers_own_numbers_and_their_derivatives_are_right():
    numbers, plan = Numbers(START), SamplingPlan.from_config(START)
    times, cond, diff = numbers.steps(numbers.vector(np.zeros(numbers.size)))
    np.testing.assert_allclose(times, [step.t for step in plan.steps], atol=1e-7)
    for own, rows in ((cond, "velocity_coefficients"), (diff, "difference_coefficients")):
        for row, step in zip(own, plan.steps, strict=True):
            wanted = getattr(step.coefficients, rows)
            np.testing.assert_allclose(row[: len(wanted)], wanted, atol=1e-7)
            assert not any(row[len(wanted) :])
    at = moved(numbers)
    change = 1e-6 * np.random.default_rng(1).standard_normal(numbers.size)
    difference = numbers.vector(at + change) - numbers.vector(at - change)
    np.testing.assert_allclose(2 * numbers.jacobian(at) @ change, difference, atol=1e-11)


@pytest.mark.parametrize("kind", [golden.DDT, FusedDDT])
def test_derivatives_are_those_of_the_whole_run(kind):
    """Against autograd through all steps at once."""
    model, numbers, data = tiny(kind), Numbers(START), batch(3)
    vector, null = numbers.vector(moved(numbers)), torch.full((3,), 10)
    free = torch.tensor(np.tile(vector, (3, 1)), dtype=torch.float32, requires_grad=True)
    places, count = numbers.places, len(numbers.guided)
    x, velocities, differences = data.noise, [], []
    for i, guided in enumerate(numbers.guided):
        velocities.insert(0, model(x, free[:, i], data.labels)[0])
        if guided:
            differences.insert(0, velocities[0] - model(x, free[:, i], null)[0])
        for place, values, factor in ((i, velocities, 1.0), (count + i, differences, data.strength)):
            weights = free[:, places[place] : places[place + 1]].T
            for weight, value in zip(weights, values, strict=False):
                x = x + factor * weight[:, None, None, None] * value
    directions = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(0))
    wanted = [torch.autograd.grad((x * one).sum(), free, retain_graph=True)[0] for one in directions]
    found = Run(model, numbers).derivatives(vector, data, lambda _: directions.clone())
    assert relative_error(found, torch.stack(wanted)) < 1e-5


@pytest.mark.parametrize("kind", [golden.DDT, FusedDDT])
def test_the_sampler_runs_a_schedule_as_the_fit_does(kind):
    model, numbers, data = tiny(kind), Numbers(START), batch(3, 2.0)
    vector = numbers.vector(moved(numbers))
    config = replace(START, guidance_scale=3.0, schedule=schedule_of(numbers, vector, model))
    drawn = library_sample(model, data.noise, data.labels, config)
    assert relative_error(drawn, Run(model, numbers)(vector, data)[0]) < 1e-5
    assert relative_error(drawn, library_sample(model, data.noise, data.labels, replace(config, schedule=None))) > 1e-3
    unguided = SamplingPlan.from_config(replace(config, guidance_scale=1.0))
    assert unguided.network_evaluations == 5
    assert SamplingConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_a_fit_comes_nearer_with_every_step():
    model, numbers = tiny(), Numbers(START)
    fine = replace(START, num_steps=64, order=3, guidance_scale=2.5)
    data = batch(16)
    data = replace(data, solution=library_sample(model, data.noise, data.labels, fine))
    parts = [Batch(*(tensor[part] for tensor in vars(data).values())) for part in (slice(0, 9), slice(9, 16))]
    fit = Fit(Run(model, numbers), parts, lambda sums: sums, lambda values: values, seed=0)
    losses = [fit.distances.mean()]
    for _ in range(8):
        gain = fit.iterate()
        losses.append(fit.distances.mean())
        assert losses[-1].item() == pytest.approx((1 - gain) * losses[-2].item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2
    vector = numbers.vector(fit.parameters)
    config = replace(fine, num_steps=5, schedule=schedule_of(numbers, vector, model))
    drawn = library_sample(model, data.noise, data.labels, config)
    assert data.residuals(drawn).norm(dim=1).mean() == pytest.approx(losses[-1].item(), rel=1e-3)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> tuple[Tuned, str]:
    """A schedule of six steps for the digits, and its file."""
    file = str(tmp_path_factory.mktemp("fitted") / "tuned.json")
    start = replace(START, num_steps=6, guidance_interval=(0.3, 1.0))
    tuned = fit_schedule(start=start, guidance_scales=[2.0], num_samples=24, output=file)
    assert tuned is not None
    return tuned, file


@pytest.mark.slow
def test_the_command_fits_a_model_and_sample_uses_it(fitted, tmp_path, capsys):
    tuned, file = fitted
    (row,) = tuned.evidence
    assert row["samples"] == 24
    assert row["tuned"]["error_median"] < 0.7 * row["rule"]["error_median"]
    assert row["tuned"]["error"] < row["rule"]["error"]
    assert Tuned.read(file) == tuned
    sample(tmp_path / "a", "--schedule", file, "--num-images", "2", "--guidance-scale", "2")
    output = capsys.readouterr().out
    assert f"schedule {file}: 6 fitted steps. At guidance 2 the error was" in output
    assert "2 images, 6 steps, per image: 11 network evaluations" in output
    settings = json.loads((tmp_path / "a" / "generation.json").read_text())["settings"]["sampling"]
    assert settings["schedule"]["times"] == list(tuned.schedule.times)
    pipe = DDTPipeline.from_pretrained(EMBEDDED_CHECKPOINT)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(2)]
    config = tuned.settings(replace(pipe.scheduler.sampling_config, guidance_scale=2.0))
    images = pipe(class_labels=[0, 1], sampling=config, generator=seeds, output_type="np").images
    with np.load(tmp_path / "a" / "samples.npz") as file:
        assert np.abs(255 * images - file["arr_0"]).max() <= 1


@pytest.mark.slow
def test_a_file_beside_the_checkpoint_is_found(fitted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert str(tuned_file(EMBEDDED_CHECKPOINT, 6)) == "digits_tuned_6_steps.json"
    assert tuned_file(tmp_path, 6) == tmp_path / "tuned_6_steps.json"
    assert tuned_file(tmp_path / "a.ckpt", 6) == tmp_path / "a.ckpt.tuned_6_steps.json"
    shutil.copy(fitted[1], "digits_tuned_6_steps.json")
    run = ("--solver", "pec", "--num-steps", "6", "--num-images", "2", "--overwrite")
    sample(tmp_path / "out", *run)
    found = "found digits_tuned_6_steps.json: 6 fitted steps; --schedule digits_tuned_6_steps.json takes them"
    assert found in capsys.readouterr().out
    sample(tmp_path / "out", *run, "--guidance-interval", "0.5", "1")
    assert "found" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_schedule_is_for_one_model_and_one_size_and_its_evidence_is_there(fitted, tmp_path, capsys):
    tuned, file = fitted
    content = read_json(Path(file))
    times = content["schedule"]["times"]
    nan = {"error": math.nan, "error_median": math.nan}
    own = content["schedule"]
    others = own["velocities"][1:]
    wrong = {
        "other": content | {"schedule": own | {"model": ["a", "b", "c"]}},
        "bare": {name: value for name, value in content.items() if name != "evidence"},
        "empty": content | {"evidence": []},
        "odd": content | {"evidence": [{"guidance_scale": 2}]},
        "nan": content | {"evidence": [{"guidance_scale": 2, "samples": 1, "rule": nan, "tuned": nan}]},
        "more": content | {"schedule": own | {"more": 1}},
        "else": content | {"schedule": own | {"guidance_interval": [0.5, 0.8]}},
        "end": content | {"schedule": own | {"guidance_interval": [0.3, 0.9999]}},
        "back": content | {"schedule": own | {"times": own["times"][::-1]}},
        "short": content | {"schedule": own | {"velocities": [[0.1]]}},
        "none": content | {"schedule": own | {"velocities": [[], *others]}},
        "word": content | {"schedule": own | {"velocities": ["a", *others]}},
        "huge": content | {"schedule": own | {"velocities": [[10**400], *others]}},
        "true": content | {"schedule": own | {"velocities": [[True], *others]}},
    }
    for name, entries in wrong.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    (tmp_path / "text.json").write_text("tuned")
    for options, message in (
        (["other"], "the schedule was fitted to other weights than this model's; run ddt_fast.tune_sampler on it"),
        (["bare"], "bare.json is not a schedule of ddt_fast.tune_sampler: it has no evidence"),
        (["empty"], "its evidence is missing or not numbers"),
        (["odd"], "its evidence is missing or not numbers"),
        (["nan"], "its evidence is missing or not numbers"),
        (
            ["more"],
            "the entries of a schedule are times, velocities, differences, guidance_interval, model, size, more; ",
        ),
        (["else"], "guidance_interval is not that of the steps that have differences"),
        (["end"], "guidance_interval is not that of the steps that have differences"),
        (["back"], "times do not ascend from 0 and stay below 1"),
        (["short"], "velocities and differences are not for 6 steps, the number of times"),
        (["none"], "a step has no coefficient, or more than 4"),
        (["word"], "velocities holds something else than lists of finite numbers"),
        (["huge"], "velocities holds something else than lists of finite numbers"),
        (["true"], "velocities holds something else than lists of finite numbers"),
        (["text"], "text.json is not valid JSON"),
        (["missing"], "missing.json, which is not a file; expected one that ddt_fast.tune_sampler wrote"),
        ([file, "--height", "16", "--width", "16"], "the schedule was fitted to inputs of 8x8, not 16x16"),
        ([file, "--num-steps", "6"], "--num-steps and --schedule are both given; --schedule chooses it"),
        ([file, "--guidance-interval", "0", "1"], "--guidance-interval and --schedule are both given"),
        ([file, "--fast"], "--fast and --schedule both choose the steps; give one of them"),
    ):
        place = options[0] if options[0] == file else str(tmp_path / f"{options[0]}.json")
        assert message in sample_error(capsys, tmp_path / "out", "--schedule", place, *options[1:])
    with pytest.raises(ValueError, match=r"num_steps is 7; allowed: 6 with this schedule"):
        tuned.settings(START).override(num_steps=7)
    config = tuned.settings(START)
    for dtype in (torch.bfloat16, torch.float16):
        check_schedule(load_model(EMBEDDED_CHECKPOINT, dtype=dtype), config, 8, 8)
    with pytest.raises(ValueError, match="fitted to other weights"):
        Sampler(tiny(), config, 1, 8, 8)
    half = load_model(EMBEDDED_CHECKPOINT)
    half.blocks[0].attn.qkv.weight.mul_(0.5)
    with pytest.raises(ValueError, match="fitted to other weights"):
        Sampler(FusedDDT.from_reference(half), config, 1, 8, 8)
    quantized = quantize_int8(FusedDDT.from_reference(load_model(EMBEDDED_CHECKPOINT)))
    assert len(Sampler(quantized, config, 1, 8, 8).plan.steps) == 6
    assert DDTScheduler(**vars(config)).sampling_config == config
    with pytest.raises(ValueError, match=r"the entries of a schedule are ; expected times, velocities"):
        SamplingConfig(schedule={})
    narrow = replace(START, guidance_interval=(1e-7, 0.9999999))
    numbers = Numbers(narrow)
    times, cond, diff = numbers.steps(numbers.vector(np.zeros(numbers.size)))
    Schedule(tuple(times), cond, diff, narrow.guidance_interval, tuned.schedule.model, (8, 8))


def test_a_fit_that_is_worse_anywhere_is_not_written(tmp_path, monkeypatch, capsys):
    """A schedule that is the rule itself is better nowhere."""
    monkeypatch.setattr(Fit, "iterate", lambda self: 0.0)
    file = tmp_path / "tuned.json"
    options = ["--num-steps", "3", "--num-samples", "16", "--guidance-scales", "2", "4", "--output", str(file)]
    monkeypatch.setattr(work, "_FINE_STEPS", 12)
    with pytest.raises(SystemExit) as caught:
        tune_command(options)
    assert caught.value.code == 1
    output = capsys.readouterr().out
    assert "fit 3 steps of order 2 at guidance 2, 4, 16 samples: about " in output
    assert "not kept: the error of all samples at guidance 2 and the median error at guidance 2 and" in output
    assert not file.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --budget and --num-steps"),
        (["--budget", "5", "--num-steps", "5"], "give one of --budget and --num-steps"),
        (["--budget", "5", "--order", "2"], "--order is for --num-steps; a budget chooses its own"),
        (["--budget", "1e-9"], "--budget is 1e-09 TFLOP an image; allowed: "),
        (["--num-steps", "5", "--guidance-scales", "1"], "--guidance-scales is 1.0; allowed: numbers other than 1"),
        (["--num-steps", "5", "--guidance-scales", "2", "2"], "--guidance-scales is (2.0, 2.0); allowed: different"),
        (["--num-steps", "5", "--num-samples", "3"], "--num-samples is 3; allowed: a whole number, 24 or more"),
        (["--num-steps", "5", "--order", "4"], "--order is 4; allowed: 1 to 3 with solver pec"),
        (["--num-steps", "1"], "--num-steps is 1; expected 2 or more, one for each part of the times"),
        (["--num-steps", "101"], "--num-steps is 101; allowed: up to 100 to fit"),
        (["--num-steps", "5", "--output", "setup.py"], "output: setup.py is not valid JSON: "),
        (["--num-steps", "5", "--output", "/proc/x/y.json"], "/proc/x"),
        (
            ["--budget", "5"],
            "--budget of 5 TFLOP an image affords this model 105 steps; allowed: what affords up to 100",
        ),
        (
            ["--num-steps", "5", "--guidance-scales", "1e30"],
            "--guidance-scales is 1e+30; allowed: a number from 0 up to 100",
        ),
    ],
)
def test_refused_options(options, message, capsys):
    assert message in error_line(capsys, tune_command, options)
