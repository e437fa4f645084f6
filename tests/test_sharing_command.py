"""`python -m ddt_fast.sharing`: what it prints and writes, and its answers to mistakes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from ddt_fast import sharing
from ddt_fast.command import run_command
from ddt_fast.model import DDT
from ddt_fast.presets import PRESETS
from ddt_fast.sampling.refresh import optimal_refresh_steps, uniform_refresh_steps


def run(tmp_path, *arguments: str) -> dict:
    sharing.main([*arguments, "--output-dir", str(tmp_path)])
    return json.loads((tmp_path / "similarity.json").read_text())


def test_without_arguments_it_studies_the_digits_in_the_package(tmp_path):
    command = [sys.executable, "-m", "ddt_fast.sharing"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    folder = tmp_path / "sharing"
    assert sorted(path.name for path in folder.iterdir()) == ["similarity.json", "similarity.png"]
    content = json.loads((folder / "similarity.json").read_text())
    # A sixth of 25 steps.
    assert len(content["chosen"]["refresh_steps"]) == 4
    assert "4 of 25 steps refresh, share ratio 0.84, hold between" in result.stdout
    assert "wrote similarity.png and similarity.json to sharing" in result.stdout


def test_what_is_written_is_what_the_search_finds(tmp_path, capsys):
    content = run(tmp_path, "--num-steps", "20", "--num-refreshes", "5", "--num-samples", "3")
    similarity = np.array(content["similarity"])
    assert similarity.shape == (20, 20)
    np.testing.assert_allclose(similarity.diagonal(), 1)
    chosen, uniform = content["chosen"], content["uniform"]
    assert tuple(chosen["refresh_steps"]) == optimal_refresh_steps(similarity, 5)
    assert tuple(uniform["refresh_steps"]) == uniform_refresh_steps(20, 5)
    assert sum(chosen["errors"]) < sum(uniform["errors"])
    assert content["share_ratio"] == 0.75
    assert content["num_samples"] == 3
    assert content["sampling"]["num_steps"] == 20
    printed = capsys.readouterr().out
    assert f"chosen:  {' '.join(map(str, chosen['refresh_steps']))}\n" in printed
    assert f"uniform: {' '.join(map(str, uniform['refresh_steps']))}\n" in printed
    assert f"{np.mean(chosen['errors']):.3g}" in printed


def test_text_view_marks_refreshes_and_shades_by_similarity(tmp_path, capsys):
    content = run(tmp_path, "--num-steps", "40", "--num-refreshes", "3")
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("similarity of the states"))
    header, rows = lines[first + 1], lines[first + 2 : first + 34]
    assert [int(row.split()[0]) for row in rows] == [cell * 40 // 32 for cell in range(32)]
    assert [row[6] for row in rows] == list(header[8::2].ljust(32))
    assert "".join(row[6] for row in rows).count("+") == len(content["chosen"]["refresh_steps"])
    shades = [[" .:-=+*#%@".index(shade) for shade in row[8::2].ljust(32)] for row in rows]
    assert all(row[i] == max(row) >= 8 for i, row in enumerate(shades))
    assert rows[0][8 + 2 * 31] == " "


def test_picture_is_a_picture(tmp_path):
    run(tmp_path, "--num-steps", "12", "--num-refreshes", "3")
    picture = Image.open(tmp_path / "similarity.png")
    assert picture.width > 1000
    assert picture.height > 1000
    assert len(picture.convert("RGB").getcolors(maxcolors=10**6)) > 100


@pytest.mark.parametrize("num_refreshes", ["1", "5"])
def test_all_or_one_refresh_is_a_budget_too(tmp_path, num_refreshes):
    content = run(tmp_path, "--num-steps", "5", "--num-refreshes", num_refreshes)
    assert len(content["chosen"]["refresh_steps"]) == int(num_refreshes)
    one_step = run(tmp_path, "--num-steps", "1", "--last-step", "0")
    assert one_step["chosen"]["refresh_steps"] == [0]


def test_every_option_reaches_the_probe_or_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "_plot", lambda _: Figure(figsize=(1, 1)))
    plain = ["--num-steps", "16", "--num-refreshes", "5", "--solver", "euler", "--guidance-scale", "2"]
    variants = [
        [],
        ["--num-refreshes", "6"],
        ["--num-samples", "4"],
        ["--num-steps", "17"],
        ["--guidance-scale", "4"],
        ["--guidance-interval", "0.1", "0.6"],
        ["--timeshift", "2"],
        ["--last-step", "0.3"],
        ["--solver", "lms"],
        ["--solver", "lms", "--order", "4"],
        ["--solver", "sde"],
        ["--solver", "sde", "--diffusion", "constant"],
        ["--solver", "sde", "--diffusion-scale", "0.5"],
        ["--state-forecast", "linear"],
        ["--state-forecast", "quadratic"],
        ["--guidance-every", "3"],
        ["--dtype", "bfloat16"],
    ]
    found = [run(tmp_path, *plain, *variant) for variant in variants]
    outcomes = {json.dumps([content["similarity"], content["chosen"]]) for content in found}
    assert len(outcomes) == len(variants)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-refreshes", "0"], "num_refreshes is 0; allowed: 1 to num_steps (25)"),
        (["--num-refreshes", "26"], "num_refreshes is 26"),
        (["--num-refreshes", "few"], "num_refreshes"),
        (["--num-samples", "0"], "--num-samples is 0; allowed: a whole number, 1 or more"),
        (["--num-steps", "-5"], "num_steps is -5"),
        (["--state-forecast", "cubic"], "cubic"),
        (["--refresh-every", "2"], "unrecognized arguments: --refresh-every"),
        (["--preset", "digits"], "--preset is for checkpoints without config.json"),
        (["--checkpoint", "nowhere"], "checkpoint nowhere does not exist"),
        (["--checkpoint", "{folder}/digits.safetensors"], "has no config.json and no --preset"),
        (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--output-dir", ""], "the output folder has an empty name"),
        (["--output-dir", "{folder}/digits.safetensors"], "cannot be written"),
        (["--output-dir", "{folder}/mine"], "similarity.png is a folder; a file of that name is to be written"),
    ],
)
def test_mistakes_are_answered_in_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "mine" / "similarity.png").mkdir(parents=True)
    save_file(DDT(PRESETS["digits"].model).state_dict(), tmp_path / "digits.safetensors")
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    if "--output-dir" not in arguments:
        arguments += ["--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: sharing.main(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_weights_without_config_are_studied_with_a_preset(tmp_path):
    save_file(DDT(PRESETS["digits"].model).state_dict(), tmp_path / "bare.safetensors")
    arguments = ["--checkpoint", str(tmp_path / "bare.safetensors"), "--preset", "digits", "--num-steps", "6"]
    assert len(run(tmp_path / "out", *arguments)["chosen"]["refresh_steps"]) == 1
