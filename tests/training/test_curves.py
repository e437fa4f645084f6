"""Plots of training curves, and the command that draws them."""

import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ddt_fast.training import curves
from ddt_fast.training.log import TrainingLog
from ddt_fast.training.plots import plot_runs

PANELS = ["loss", "REPA loss", "gradient norm", "learning rate", "img/s"]


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Every figure that is saved, as matplotlib has it."""
    saved = []
    save = Figure.savefig

    def record(figure, *args, **kwargs):
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved


def write(folder: Path, rows: list[dict]) -> Path:
    with TrainingLog(folder, settings={}) as log:
        for row in rows:
            log.write(row["step"], {name: value for name, value in row.items() if name != "step"})
    return folder / "log.jsonl"


def run(count: int, repa: bool = True, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(1, count + 1):
        row = {"step": 100 * i, "loss": 0.8 + i**-0.5 + 0.01 * rng.normal(), "grad_norm": 0.2 + 0.02 * rng.random()}
        row |= {"learning_rate": 1e-4 * min(1, i / 20), "images_per_second": 500 + rng.normal(), "memory_gb": 3.0}
        rows.append(row | ({"repa_loss": 0.5 + i**-0.5} if repa else {}))
    return rows


def plot(log: Path) -> None:
    plot_runs({log.parent.name: log}, log.with_name("curves.png"))


def panels(figure: Figure) -> dict:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_panels_hold_what_was_logged_faint_and_a_smooth_line_through_it(tmp_path, figures):
    rows = run(400)
    plot(write(tmp_path, rows))
    axes = panels(figures[0])
    assert list(axes) == PANELS
    raw, smooth = axes["loss"].lines
    np.testing.assert_array_equal(raw.get_xdata(), [row["step"] for row in rows])
    np.testing.assert_allclose(raw.get_ydata(), [row["loss"] for row in rows])
    truth = 0.8 + np.arange(1, 401) ** -0.5
    inner = slice(40, -20)
    assert np.abs(smooth.get_ydata() - truth)[inner].max() < 0.3 * np.abs(raw.get_ydata() - truth)[inner].max()
    (rate,) = axes["learning rate"].lines
    np.testing.assert_allclose(rate.get_ydata(), [row["learning_rate"] for row in rows])
    assert [text.get_text() for text in axes["loss"].get_legend().get_texts()] == [tmp_path.name]
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1650, 1425)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "log.jsonl"]


def test_a_single_line_of_one_number_is_a_point(tmp_path, figures):
    plot(write(tmp_path, [{"step": 7, "loss": 1.0}]))
    ((title, axes),) = panels(figures[0]).items()
    (line,) = axes.lines
    assert (title, list(line.get_xdata()), list(line.get_ydata()), line.get_marker()) == ("loss", [7], [1], ".")


@pytest.mark.filterwarnings("error")
def test_nulls_are_gaps_and_spikes_do_not_flatten_the_rest(tmp_path, figures):
    rows = run(200)
    for row in rows[50:80]:
        row["loss"] = row["repa_loss"] = float("nan")
    for row in rows:
        row["repa_loss"] = float("nan")
    rows[150]["loss"], rows[160]["grad_norm"], rows[170]["grad_norm"] = 1e6, 1e3, 0.0
    plot(write(tmp_path, rows))
    axes = panels(figures[0])
    assert "REPA loss" not in axes
    assert np.isnan(axes["loss"].lines[0].get_ydata()).sum() == 30
    assert axes["loss"].get_ylim()[1] < 2
    assert axes["gradient norm"].get_yscale() == "log"
    assert np.nanmax(axes["gradient norm"].lines[1].get_ydata()) < 1


@pytest.mark.filterwarnings("error")
def test_constant_metrics_are_drawn(tmp_path):
    metrics = {"loss": 0.0, "grad_norm": 0.0, "learning_rate": 1.0, "images_per_second": -1.0}
    plot(write(tmp_path, [{"step": step, **metrics} for step in range(1, 60)]))
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        ('{"step": 1, "loss": null}\n', "holds nothing to plot"),
        ('nonsense\n{"step": 1, "loss": 1}\n', "line 1: not a line"),
    ],
)
def test_logs_that_cannot_be_plotted(tmp_path, content, message):
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        plot(tmp_path / "log.jsonl")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.slow
def test_the_command_overlays_runs_by_the_names_of_their_folders(tmp_path, monkeypatch, figures, capsys):
    monkeypatch.chdir(tmp_path)
    for folder, rows in (("a/run", run(50, repa=False)), ("b/run", run(3)), ("c", run(30, seed=1))):
        write(Path(folder), rows)
    curves.main(["a/run", "c"])
    curves.main(["a/run", "b/run", "--output", "out/both.png"])
    assert capsys.readouterr().out == "wrote curves.png\nwrote out/both.png\n"
    legends = [[text.get_text() for text in figure.axes[0].get_legend().get_texts()] for figure in figures]
    assert legends == [["run", "c"], ["a/run", "b/run"]]
    axes = panels(figures[0])
    assert list(axes) == PANELS
    colours = [line.get_color() for line in axes["loss"].lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert {line.get_color() for line in axes["REPA loss"].lines} == {colours[2]}
    for arguments, message in (
        (["c", "--output", "out"], "out is a folder; a file of that name will be written"),
        (["absent"], "absent/log.jsonl is missing; a training run writes it"),
    ):
        with pytest.raises(ValueError, match=message):
            curves.main(arguments)
