"""The train and sample commands as a user runs them, and one `error:` line with exit code 2 for every mistake."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ddt_fast.command import run_command
from ddt_fast.evaluation.digits_score import score_digits
from ddt_fast.generation.images import to_uint8
from ddt_fast.model.reference import DDT
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT
from ddt_fast.model.weights import load_model
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import SamplingPlan
from ddt_fast.sampling import sample as library_sample
from ddt_fast.sampling.budgets import fast_settings
from ddt_fast.sampling.noise import seeded_noise
from sample_jobs import error_line, sample_command

train_command = importlib.import_module("ddt_fast.train")


@pytest.mark.slow
def test_sample_without_arguments_draws_digits_from_the_package(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "ddt_fast.sample"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "img/s" in result.stdout
    folder = tmp_path / "samples"
    saved = np.load(folder / "samples.npz")
    assert saved["arr_0"].shape == (100, 8, 8, 3)
    assert saved["arr_0"].dtype == np.uint8
    assert saved["labels"].tolist() == [i % 10 for i in range(100)]
    assert saved["seeds"].tolist() == list(range(100))
    pictures = sorted((folder / "images").iterdir())
    assert len(pictures) == 100
    assert pictures[13].name == "00013_class_3_seed_13.png"
    np.testing.assert_array_equal(np.asarray(Image.open(pictures[13])), saved["arr_0"][13])
    assert Image.open(folder / "grid.png").width > 600


def sample(tmp_path, *arguments: str) -> np.lib.npyio.NpzFile:
    sample_command.main([*arguments, "--output-dir", str(tmp_path), "--overwrite"])
    return np.load(tmp_path / "samples.npz")


@pytest.mark.slow
def test_embedded_checkpoint_meets_its_numbers(tmp_path):
    for options, accuracy in (([], 0.99), (["--guidance-scale", "1"], 0.97)):
        saved = sample(tmp_path, "--num-images", "250", "--num-png", "0", *options)
        images = torch.from_numpy(saved["arr_0"][..., :1]).permute(0, 3, 1, 2) / 127.5 - 1
        score = score_digits(images, torch.from_numpy(saved["labels"]))
        assert score.accuracy >= accuracy
        assert score.nearest >= 0.9 * score.nearest_real
    assert score.frechet <= 1.3 * score.frechet_real


@pytest.mark.slow
def test_every_sampling_option_changes_the_images(tmp_path):
    plain = "--num-images 4 --num-steps 8 --refresh-every 2 --guidance-scale 3 --solver euler"
    variants = [
        *("", "--num-steps 9", "--guidance-scale 5", "--guidance-interval 0.1 0.6", "--timeshift 2", "--last-step 0.3"),
        *(
            "--solver lms",
            "--solver lms --order 4",
            "--solver pec",
            "--solver pec --order 3",
            "--solver sde",
            "--solver sde --diffusion constant",
        ),
        *("--solver sde --diffusion-scale 0.5", "--refresh-every 4", "--refresh-every 1 --refresh-steps 0 5"),
        *("--state-forecast linear", "--guidance-every 3", "--guidance-every 3 --guidance-forecast linear"),
        *("--classes 5", "--first-seed 9", "--dtype bfloat16", "--quantize int8"),
    ]
    results = [sample(tmp_path, *f"{plain} {variant}".split())["arr_0"].tobytes() for variant in variants]
    assert len(set(results)) == len(variants)


def test_height_and_width_are_the_images_in_pixels(tmp_path, capsys):
    saved = sample(tmp_path, "--num-images", "3", "--num-steps", "3", "--height", "12", "--width", "6", "--reference")
    assert saved["arr_0"].shape == (3, 12, 6, 3)
    noise, _ = seeded_noise(range(3), (1, 12, 6))
    model, sampling = load_model(EMBEDDED_CHECKPOINT), replace(PRESETS["digits"].sampling, num_steps=3)
    drawn = library_sample(model, noise, torch.arange(3), sampling)
    np.testing.assert_array_equal(saved["arr_0"], to_uint8(drawn))
    arguments = ["--num-images", "3", "--num-steps", "3", "--reference", "--output-dir", str(tmp_path)]
    line = error_line(capsys, sample_command.main, arguments)
    assert "holds finished samples with other settings (input_size [12, 6], now null)" in line


def test_cuda_graphs_without_cuda_say_so_in_one_line(tmp_path, capsys):
    arguments = ["--num-images", "2", "--num-steps", "2", "--cuda-graphs", "--device", "cpu"]
    run_command(lambda: sample_command.main([*arguments, "--output-dir", str(tmp_path)]))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == ["warning: cuda_graphs is set, but the model is on cpu, not on CUDA; sampling eagerly"]


def test_ways_to_compute_leave_the_images_alone(tmp_path, capsys):
    arguments = ["--num-images", "6", "--num-steps", "6", "--refresh-every", "2", "--state-forecast", "linear"]
    fused = sample(tmp_path / "fused", *arguments)["arr_0"].astype(int)
    assert "float32, attention sdpa_flash, eager; batches of 6 keep" in capsys.readouterr().out
    others = {
        "reference": (["--reference"], "float32, reference model, eager"),
        "math": (["--attention", "sdpa_math"], "attention sdpa_math"),
        "memory": (["--memory-budget", "400kB"], "memory budget 400kB: batches of"),
    }
    for name, (option, said) in others.items():
        images = sample(tmp_path / name, *arguments, *option)["arr_0"].astype(int)
        assert np.abs(images - fused).max() <= 1, name
        output = capsys.readouterr().out
        assert said in output
        if name == "memory":
            assert float(re.search(r"keep ([\d.]+) KiB between steps", output)[1]) <= 400e3 / 1024


def test_int8_says_its_error(tmp_path, capsys):
    exact = sample(tmp_path / "a", "--num-images", "10")["arr_0"].astype(int)
    capsys.readouterr()
    int8 = sample(tmp_path / "b", "--num-images", "10", "--quantize", "int8")["arr_0"].astype(int)
    error = re.search(r"int8: relative error of a velocity ([\d.e-]+) against float32", capsys.readouterr().out)
    assert 0 < float(error[1]) < 0.1
    assert 0 < np.abs(int8 - exact).mean() < 8


def test_fast_and_a_budget_choose_the_steps_and_give_way_to_options(tmp_path, capsys):
    def said(*options: str) -> str:
        sample(tmp_path, "--num-images", "2", *options)
        return capsys.readouterr().out

    def evaluations(**settings) -> str:
        plan = SamplingPlan.from_config(replace(fast_settings(PRESETS["digits"].sampling), **settings))
        return f"{plan.network_evaluations} network evaluations, {plan.encoder_evaluations} encoder runs"

    assert evaluations(guidance_every=2) in said("--fast", "--guidance-every", "2")
    output = said("--budget", "0.001")
    assert re.search(
        r"^budget of 0\.001 TFLOP: \d+ steps of solver pec, order 3, with an edge at 0\.3", output, re.MULTILINE
    )
    assert "in median (256 samples, benchmarks.pareto, commit" in output
    for options, message in (
        (["--fast", "--budget", "1"], "--fast and --budget both choose the steps; give one of them"),
        (["--budget", "1", "--num-steps", "8"], "--num-steps and --budget are both given; --budget chooses it"),
        (["--budget", "1e-9"], "--budget is 1e-09 TFLOP an image; allowed: "),
        (["--budget", "nan"], "--budget is nan"),
    ):
        assert message in error_line(capsys, sample_command.main, options)


def test_the_best_refreshes_are_found_once_and_kept_beside_the_checkpoint(tmp_path, capsys):
    shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "model")
    arguments = ["--checkpoint", str(tmp_path / "model"), "--num-images", "4", "--num-steps", "12"]
    arguments += ["--refresh-steps", "dp", "--num-refreshes", "4"]
    first = sample(tmp_path / "a", *arguments)["arr_0"]
    assert "refresh at 4 of 12 steps (0, " in capsys.readouterr().out
    assert (tmp_path / "model" / "refresh_schedules.json").is_file()
    again = sample(tmp_path / "b", *arguments)["arr_0"]
    assert f"from {tmp_path / 'model' / 'refresh_schedules.json'}" in capsys.readouterr().out
    np.testing.assert_array_equal(first, again)


@pytest.mark.slow
def test_compiled_samples_are_the_eager_ones(tmp_path, capsys):
    arguments = ["--num-images", "4", "--num-steps", "3", "--quantize", "int8", "--guidance-scale", "1"]
    eager = sample(tmp_path / "eager", *arguments)["arr_0"].astype(int)
    compiled = sample(tmp_path / "compiled", *arguments, "--compile")["arr_0"].astype(int)
    told = capsys.readouterr().err
    assert told.count("compiling the model (torch.compile)") == 1
    assert len(re.findall(r"compiled: the first step took \d+\.\d s", told)) == 1
    allowed = 8  # a rounding of activations may fall the other way
    assert abs(eager - compiled).max() <= allowed


@pytest.mark.slow
def test_a_run_is_kept_sampled_from_and_repeated_by_its_recipe(tmp_path, capsys):
    run, output = tmp_path / "run", ["--output-dir", str(tmp_path / "run")]
    short = ["--training.max_steps", "4", "--training.batch_size", "16", "--training.score_samples", "70"]
    train_command.main([*short, "--sampling.num_steps", "2", *output])
    assert "class accuracy" in capsys.readouterr().out
    first = json.loads((run / "training.json").read_text())
    for more, message in (
        ([], "holds an earlier run"),
        (["--overwrite", "--preset", "xl2_256"], "data.folder is null; name the folder of cached"),
        (["--overwrite", "--resume", "auto"], "--overwrite and --resume are both given"),
    ):
        assert message in error_line(capsys, train_command.main, [*output, *more])
    train_command.main(["--config", str(run / "recipe.yaml"), "--overwrite", *output])
    assert json.loads((run / "training.json").read_text())["scores"] == first["scores"]
    saved = sample(tmp_path / "out", "--checkpoint", str(run / "model"), "--num-images", "3")
    assert saved["arr_0"].shape == (3, 8, 8, 3)


def test_config_file_preset_and_overrides(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("preset: l2_256\nmodel:\n  num_classes: 5\ntraining:\n  max_steps: 7\n")
    arguments = ["--config", str(tmp_path / "my.yaml"), "--training.max_steps", "8", "--print_config"]
    with pytest.raises(SystemExit, match="0"):
        train_command.main(arguments)
    printed = capsys.readouterr().out
    for line in ("hidden_size: 1024", "num_classes: 5", "max_steps: 8", "preset: l2_256"):
        assert line in printed


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """Files that commands are pointed at by mistake."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "corrupt.safetensors").write_bytes(b"x" * 100)
    (folder / "mine" / "images").mkdir(parents=True)
    (folder / "mine" / "images" / "mine.txt").touch()
    save_file(DDT(PRESETS["digits"].model).state_dict(), folder / "digits.safetensors")
    for name, text in {
        "broken": "a: [1\nb: {",
        "list": "- 1\n",
        "empty": "",
        "null": "training: null\n",
        "nested": "config: key.yaml\n",
        "preset": "preset: l2_256\n",
        "overwrite": "overwrite: maybe\n",
        "key": "model:\n  hiden_size: 5\n",
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


MISTAKES = {
    train_command: [
        (["--preset", "xxl"], "preset 'xxl' does not exist; allowed: digits, b2_256"),
        (["--preset"], "expected one argument"),
        (["--config", "nowhere.yaml"], "config file nowhere.yaml cannot be read: No such file"),
        (["--config", "{folder}"], "cannot be read: Is a directory"),
        (["--config", "{folder}/empty.yaml"], "empty.yaml holds nothing; expected settings"),
        (["--config", "{folder}/null.yaml"], "null.yaml holds nothing under training; expected settings"),
        (["--config", "{folder}/nested.yaml"], "names another config file"),
        (["--preset", "digits", "--config", "{folder}/preset.yaml"], "presets digits and l2_256 are both named"),
        (["--pres", "xl2_256"], "unrecognized arguments: --pres xl2_256; nearest: --preset"),
        (["--config", "{folder}/overwrite.yaml"], "overwrite is 'maybe'; allowed: true or false"),
        (["--config", "{folder}/broken.yaml"], "broken.yaml is not valid YAML"),
        (["--config", "{folder}/list.yaml"], "list.yaml holds a list"),
        (["--config", "{folder}/key.yaml"], "hiden_size"),
        (["--training.max_step=3"], "--training.max_step=3; nearest: --training.max_steps"),
        (["--zzz"], "unrecognized arguments: --zzz; --help lists the options"),
        (["--training.max_steps", "many"], "--training.max_steps is many; allowed: a whole number"),
        (["--sampling.guidance_scale", "nan"], "--sampling.guidance_scale is nan; allowed: a finite number"),
        (["--model.patch_size", "3"], "height is 8; allowed: a positive multiple of patch_size (3)"),
        (["--preset", "xl2_256"], "data.folder is null; name the folder of cached latents"),
        (["--preset", "xl2_256", "--data.folder", "nowhere"], "latent cache nowhere does not exist"),
        (["--training.init", "nowhere.ckpt"], "checkpoint nowhere.ckpt does not exist"),
        (["--resume", "nowhere"], "nowhere is not a checkpoint of a run"),
        (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--output-dir", "{folder}/broken.yaml/x"], "cannot be written"),
    ],
    sample_command: [
        (["--num-steps", "-5"], "--num-steps is -5"),
        (["--num-images", "0"], "--num-images is 0; allowed: a whole number, 1 or more"),
        (["--classes", "3", "10"], "class 10 does not exist; allowed: 0 to 9"),
        (["--seeds", "1", "2", "--num-images", "3"], "--seeds holds 2 seeds for 3 images"),
        (["--first-seed", "-4"], "seed -4 does not exist; allowed: 0 to 2^63 - 1"),
        (["--seeds", "1", "--first-seed", "3"], "--seeds and --first-seed are both given"),
        (["--num-images", "1000000000000000"], "out of memory"),
        (["--timeshift", "1e300"], "timeshift 1e+300"),
        (["--output-dir", "{folder}/mine"], "holds mine.txt, which ddt-fast did not write"),
        (["--guidance-scale", "-1"], "--guidance-scale is -1.0"),
        (["--guidance-interval", "nan", "1"], "--guidance-interval is nan; allowed: a finite number"),
        (["--height", "9"], "--height is 9; allowed: a positive multiple of 2 pixels"),
        (["--width", "nan"], "--width is nan; allowed: a whole number"),
        (["--solver", "heun"], "heun"),
        (["--num-refreshes", "4"], "--num-refreshes is 4; allowed: none"),
        (["--reference", "--quantize", "int8"], "--reference is plain PyTorch"),
        (["--memory-budget", "10B"], "one 8x8 sample keeps"),
        (["--refresh-steps", "dp"], "--num-refreshes is None; allowed: 1 to num_steps (25)"),
        (["--refresh-steps", "0", "x"], "--refresh-steps is 0 x; allowed: step numbers, or dp"),
        (["--checkpoint", "nowhere"], "checkpoint nowhere does not exist"),
        (["--checkpoint", "{folder}"], "holds no diffusion_pytorch_model.safetensors"),
        (["--checkpoint", "{folder}/corrupt.safetensors", "--preset", "digits"], "cannot be read: it is truncated"),
        (["--checkpoint", "{folder}/digits.safetensors"], "has no config.json, and --preset is not given"),
        (["--checkpoint", "{folder}/digits.safetensors", "--preset", "b2_256"], "disagree"),
        (["--preset", "digits"], "preset is for checkpoints without config.json"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--output-dir", "{folder}/digits.safetensors"], "cannot be written"),
    ],
}


@pytest.mark.parametrize(
    ("command", "arguments", "message"), [(command, *case) for command, cases in MISTAKES.items() for case in cases]
)
def test_mistakes_are_answered_in_one_line(tmp_path, places, capsys, command, arguments, message):
    arguments = [argument.format(folder=places) for argument in arguments]
    if "--output-dir" not in arguments:
        arguments += ["--output-dir", str(tmp_path / "out")]
    assert message in error_line(capsys, command.main, arguments)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_weights_without_config_sample_with_a_preset(tmp_path, places):
    arguments = ["--checkpoint", str(places / "digits.safetensors"), "--preset", "digits"]
    assert sample(tmp_path / "out", *arguments, "--num-images", "2", "--num-steps", "2")["arr_0"].shape == (2, 8, 8, 3)
