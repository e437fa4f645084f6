"""The READMEs quote what files hold: marked texts are the report's, and every speed written by hand is known here."""

import re
from dataclasses import replace

import pytest

from benchmarks.report import __main__ as report
from benchmarks.report.files import FOLDER, ROOT, load
from benchmarks.report.marked import outside
from ddt_fast.files import read_json
from ddt_fast.model.flops import model_flops
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import SamplingPlan
from ddt_fast.sampling.fast import fast_settings
from ddt_kernels.floors import COPY_BYTES_PER_SECOND, GEMM_FLOPS_PER_SECOND

SPEED = re.compile(
    r"\d[\d.,]*\s*(?:img/s|[TG]?FLOP/s|[TG]B/s|ms\b|\u00b5s|s\b|seconds|minutes|hours|times|%"
    r"|(?:x|\u00d7)\s+(?:faster|slower|the)|of the (?:reference|baseline)'s)",
    re.IGNORECASE,
)
"""A measured number, as one would write it."""

README = (ROOT / "README.md").read_text(encoding="utf-8")
XL2, PUBLISHED = PRESETS["xl2_256"].model, PRESETS["xl2_256"].sampling


def tflop(config):
    """Per image of XL/2 at 256 px."""
    return SamplingPlan.from_config(config).flops(XL2, 32, 32) / 1e12


def test_marked_texts_and_figures_are_what_the_files_say():
    report.check(load(sorted(FOLDER.glob("*.json"))))


def test_no_speed_is_written_by_hand_that_is_not_listed_here():
    training = read_json(ROOT / "ddt_fast" / "assets" / "digits" / "training.json")
    scores = training["scores"]
    seconds = int(training["training_seconds"] + 0.5)
    minutes = 50_000 * 1e12 / GEMM_FLOPS_PER_SECOND / 60
    gemm, copy = f"{GEMM_FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s", f"{COPY_BYTES_PER_SECOND / 1e12:g} TB/s"
    known = {
        "README.md": {
            f"{seconds} s",
            f"{seconds} seconds",
            *(f"{scores[run]['accuracy']:.1%}" for run in ("unguided", "guided")),
            f"{scores['guided']['accuracy_real']:.1%}",
            "99%",  # what takes guidance: between the two
            "1.3 times",  # both Fréchet distances over the real one's, at most
            f"{minutes * tflop(PUBLISHED) / 60:.1f} hours",
            f"{minutes * tflop(replace(PUBLISHED, refresh_every=6)):.0f} minutes",
            gemm,
        },
        "benchmarks/README.md": {"9 minutes"},  # gpu_run's --minutes
        "kernels/README.md": {gemm, copy},
    }
    for page, allowed in known.items():
        text = outside((ROOT / page).read_text(encoding="utf-8"))
        assert {match[0] for match in SPEED.finditer(text)} <= allowed, page
    assert scores["unguided"]["accuracy"] < 0.99 < scores["guided"]["accuracy"]
    assert all(scores[run]["frechet"] <= 1.3 * scores[run]["frechet_real"] for run in ("unguided", "guided"))


@pytest.mark.parametrize(
    "text",
    [
        "9.1 img/s",
        "2.9 times faster",
        "3.5\u00d7 faster",
        "600 TFLOP/s",
        "3.7 TB/s",
        "12 \u00b5s",
        "0.39 of the reference's time",
    ],
)
def test_speeds_are_recognised(text):
    assert SPEED.search(f"It reaches {text}.")


def test_the_digits_scores_are_those_of_the_package():
    scores = read_json(ROOT / "ddt_fast" / "assets" / "digits" / "training.json")["scores"]
    for name, run in (("without guidance", "unguided"), ("guidance 1.5 in (0.3, 1), the preset's default", "guided")):
        values = "{accuracy:.1%} | {frechet:.3f} | {nearest:.2f}".format(**scores[run])
        assert f"| {name} | {values} |" in README
    real = "{accuracy_real:.1%} (held out) | {frechet_real:.3f} (half against half) | {nearest_real:.2f} (to the"
    assert f"| real digits | {real.format(**scores['guided'])}" in README


def test_the_counts_are_the_plans():
    sixth = replace(PUBLISHED, refresh_every=6)
    assert f" | 500 | {500 * model_flops(XL2, 32, 32).total / 1e12:.1f} |" in README
    for config in (PUBLISHED, sixth, fast_settings(PUBLISHED)):
        evaluations = SamplingPlan.from_config(config).network_evaluations
        assert f" | {evaluations} | {tflop(config):.1f} |" in README
    fast = 50_000 * tflop(fast_settings(PUBLISHED)) * 1e12 / GEMM_FLOPS_PER_SECOND / 60
    assert f"and {fast:.0f} with `--fast` ({tflop(fast_settings(PUBLISHED)):.1f};" in README
