"""`python -m benchmarks.candidates`: what it compares, a small run from end to end, and its answers to mistakes."""

import json
from dataclasses import replace

import pytest

from benchmarks import candidates
from benchmarks.report.other_tables import SHORT
from ddt_fast.command import run_command
from ddt_fast.presets import PRESETS


def test_what_is_compared():
    settings = dict(candidates.candidates())
    assert len(settings) == len(list(candidates.candidates())) == len(set(settings.values()))
    assert settings["Euler 250, published"] == PRESETS["xl2_256"].sampling
    assert {*candidates.FRECHET_CANDIDATES, *SHORT} <= {*settings}
    published = PRESETS["xl2_256"].sampling
    assert candidates.GUIDANCE[candidates.FRECHET_GUIDANCE] == (published.guidance_scale, published.guidance_interval)


def test_a_small_run_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    short = [(name, replace(config, num_steps=n)) for n, (name, config) in zip((4, 8), _some(), strict=True)]
    monkeypatch.setattr(candidates, "candidates", lambda: iter(short))
    monkeypatch.setattr(candidates, "GUIDANCE", {"none": (1.0, (0.0, 1.0)), "2 in (0.3, 1)": (2.0, (0.3, 1.0))})
    monkeypatch.setattr(candidates, "TRUTH", replace(candidates.TRUTH, num_steps=15))
    monkeypatch.setattr(candidates, "FRECHET_REFERENCE", ("fine", replace(candidates.TRUTH, num_steps=10)))
    monkeypatch.setattr(candidates, "FRECHET_CANDIDATES", [name for name, _ in short])
    candidates.main(["--samples", "8", "--frechet-samples", "650", "--output-dir", str(tmp_path)])
    record = json.loads((tmp_path / "candidates.json").read_text())
    rows = {(row["guidance"], row["candidate"]): row for row in record["errors"]}
    assert len(rows) == 4
    for guidance in ("none", "2 in (0.3, 1)"):
        coarse, fine = (rows[guidance, name] for name, _ in short)
        assert 1e-4 < fine["error_median"] < coarse["error_median"] < 0.5
    assert rows["none", short[0][0]]["tflop_xl2"] < rows["2 in (0.3, 1)", short[0][0]]["tflop_xl2"]
    reference, coarse, fine = record["frechet"]
    assert (reference["candidate"], "difference" in reference) == ("fine", False)
    assert abs(fine["difference"]) < abs(coarse["difference"])
    # The same seeds: of the difference far more is known than of the distance.
    assert 0 < fine["difference_sd"] < reference["frechet_sd"]
    assert "Pixel Fréchet distance of 650 samples" in capsys.readouterr().out


def _some():
    settings = dict(candidates.candidates())
    return [(name, settings[name]) for name in ("Euler 250, published", "multistep 3, 35, K 2 quadratic")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "0"], "--samples is 0; allowed: a whole number, 1 or more"),
        (["--frechet-samples", "649"], "--frechet-samples is 649; allowed: a whole number, 650 or more"),
    ],
)
def test_wrong_counts_are_one_line_and_exit_code_2(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run_command(lambda: candidates.main([*arguments, "--output-dir", str(tmp_path / "new")]))
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"error: {words}\n"
    assert not (tmp_path / "new").exists()
