"""`python -m ddt_fast.sharing`: what it prints and writes, and its answers to mistakes."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from ddt_fast import sharing
from ddt_fast.model import DDT
from ddt_fast.presets import PRESETS
from ddt_fast.sampling.refresh.search import optimal_refresh_steps, uniform_refresh_steps
from sample_jobs import error_line


@pytest.fixture(autouse=True)
def _small_picture(request, monkeypatch):
    if "picture" not in request.node.name:
        monkeypatch.setattr("ddt_fast.work.sharing._plot", lambda _: Figure(figsize=(1, 1)))


def run(tmp_path, *arguments: str) -> dict:
    sharing.main([*arguments, "--output-dir", str(tmp_path)])
    return json.loads((tmp_path / "similarity.json").read_text())


@pytest.mark.slow
def test_without_arguments_it_studies_the_digits_and_draws_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sharing.main([])
    folder = tmp_path / "sharing"
    assert sorted(path.name for path in folder.iterdir()) == ["similarity.json", "similarity.png"]
    content = json.loads((folder / "similarity.json").read_text())
    # A sixth of 25 steps.
    assert len(content["chosen"]["refresh_steps"]) == 4
    printed = capsys.readouterr().out
    assert "4 of 25 steps refresh, share ratio 0.84, hold between" in printed
    assert "wrote similarity.png and similarity.json to sharing" in printed
    picture = Image.open(folder / "similarity.png")
    assert min(picture.size) > 1000
    assert len(picture.convert("RGB").getcolors(maxcolors=10**6)) > 100


def test_what_is_written_is_what_the_search_finds(tmp_path, capsys):
    content = run(tmp_path, "--num-steps", "40", "--num-refreshes", "5", "--num-samples", "3")
    similarity = np.array(content["similarity"])
    assert similarity.shape == (40, 40)
    np.testing.assert_allclose(similarity.diagonal(), 1)
    chosen, uniform = content["chosen"], content["uniform"]
    assert tuple(chosen["refresh_steps"]) == optimal_refresh_steps(similarity, 5)
    assert tuple(uniform["refresh_steps"]) == uniform_refresh_steps(40, 5)
    assert sum(chosen["errors"]) < sum(uniform["errors"])
    assert (content["share_ratio"], content["num_samples"], content["sampling"]["num_steps"]) == (0.875, 3, 40)
    printed = capsys.readouterr().out
    assert f"chosen:  {' '.join(map(str, chosen['refresh_steps']))}\n" in printed
    assert f"uniform: {' '.join(map(str, uniform['refresh_steps']))}\n" in printed
    assert f"{np.mean(chosen['errors']):.3g}" in printed
    # The text view marks refreshes, and shades by similarity.
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("similarity of the states"))
    header, rows = lines[first + 1], lines[first + 2 : first + 34]
    assert [int(row.split()[0]) for row in rows] == [cell * 40 // 32 for cell in range(32)]
    assert [row[6] for row in rows] == list(header[8::2].ljust(32))
    assert "".join(row[6] for row in rows).count("+") == 5
    shades = [[" .:-=+*#%@".index(shade) for shade in row[8::2].ljust(32)] for row in rows]
    assert all(row[i] == max(row) >= 8 for i, row in enumerate(shades))
    assert rows[0][8 + 2 * 31] == " "


@pytest.mark.parametrize(
    ("arguments", "refreshes"),
    [
        (("--num-steps", "5", "--num-refreshes", "1"), 1),
        (("--num-steps", "5", "--num-refreshes", "5"), 5),
        (("--num-steps", "1", "--last-step", "0"), 1),
        (("--checkpoint", "bare.safetensors", "--preset", "digits", "--num-steps", "6"), 1),
    ],
)
def test_any_budget_and_weights_without_config(tmp_path, monkeypatch, arguments, refreshes):
    monkeypatch.chdir(tmp_path)
    save_file(DDT(PRESETS["digits"].model).state_dict(), "bare.safetensors")
    assert len(run(tmp_path, *arguments)["chosen"]["refresh_steps"]) == refreshes


def test_every_option_reaches_the_study(tmp_path):
    integrated = "--num-steps 10 --guidance-scale 4 --guidance-interval 0.1 0.6 --timeshift 2 --last-step 0.3"
    solved = "--solver sde --order 4 --diffusion constant --diffusion-scale 0.5 --state-forecast linear"
    rare = "--guidance-every 3 --num-refreshes 4 --num-samples 2"
    found = run(tmp_path, *integrated.split(), *solved.split(), *rare.split())["sampling"]
    assert len(found.pop("refresh_steps")) == 4
    assert found == {
        **{"num_steps": 10, "guidance_scale": 4.0, "guidance_interval": [0.1, 0.6], "timeshift": 2.0, "last_step": 0.3},
        **{"solver": "sde", "order": 4, "diffusion": "constant", "diffusion_scale": 0.5, "state_forecast": "linear"},
        **{"guidance_every": 3, "refresh_every": 1, "num_refreshes": None},
        **{"guidance_forecast": "hold", "cuda_graphs": None, "schedule": None},
    }
    small = ("--num-steps", "4", "--num-refreshes", "2", "--num-samples", "2", "--dtype")
    exact, coarse = (run(tmp_path, *small, dtype)["similarity"] for dtype in ("float32", "bfloat16"))
    assert exact != coarse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-refreshes", "0"), "--num-refreshes is 0; allowed: 1 to num_steps (25)"),
        (("--num-refreshes", "26"), "--num-refreshes is 26"),
        (("--num-refreshes", "few"), "--num-refreshes is few; allowed: a whole number"),
        (("--num-samples", "0"), "--num-samples is 0; allowed: a whole number, 1 or more"),
        (("--num-steps", "-5"), "--num-steps is -5"),
        (("--refresh-every", "2"), "unrecognized arguments: --refresh-every"),
        (("--preset", "digits"), "preset is for checkpoints without config.json"),
        (("--checkpoint", "nowhere"), "checkpoint nowhere does not exist"),
        (("--device", "gpu"), "device 'gpu' cannot be used here"),
        (("--output-dir", "file"), "cannot be written"),
        (("--output-dir", "mine"), "similarity.png is a folder; a file of that name will be written"),
    ],
)
def test_mistakes_are_answered_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "similarity.png").mkdir(parents=True)
    (tmp_path / "file").touch()
    assert message in error_line(capsys, sharing.main, ["--output-dir", "out", *arguments])
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
