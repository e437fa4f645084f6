"""`python -m benchmarks.report`: tables from files made by hand, and its answers to files that are wrong."""

import copy
import re
from dataclasses import replace

import pytest

import report_cases as made
from benchmarks.report import __main__ as report
from benchmarks.report import floors
from benchmarks.report.files import ROOT
from benchmarks.report.marked import fill, outside, rewrite, stale
from benchmarks.report.plots import figures
from benchmarks.report.sections import SECTIONS, texts
from ddt_fast.command import run_command
from ddt_fast.model.flops import model_flops
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import SamplingPlan

ABSOLUTE = r"img/s|FLOP/s|TB/s|\bms\b|\bMFU\b|s per image"


def rows(text):
    """Cells of a text's tables."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_on_a_cpu_there_are_ratios_and_no_speeds(tmp_path):
    files = made.results(
        tmp_path, suite=made.suite(), training_step=made.training(), cpu=made.cpu_sampling(), scaling=made.scaling()
    )
    found = texts(files, "")
    measured = "\n".join(found[name] for name in SECTIONS if name != "floors")
    assert not re.search(ABSOLUTE, measured)
    for seconds in ("0.432", "432", "12.3", "6.17", "98.7", "321", "0.777", "567.", "1134"):
        assert seconds not in measured
    assert ["", "**ddt_fast**", "0.50", "0.45 to 0.55", "65% gemm", "1.3e-03"] in rows(found["suite"])
    assert ["", "**FusedDDT, refresh 6, eager**", "0.10", "0.09 to 0.11", "2% gemm", "1.3e-03"] in rows(found["suite"])


def test_a_table_says_what_is_missing_and_where_it_comes_from(tmp_path):
    text = " ".join(texts(made.results(tmp_path, suite=made.suite()), "")["suite"].split())
    assert "Missing: peer (1 case): no wheel." in text
    assert "Wrong, so not timed: other (1 case): off by 2." in text
    assert "Not measured: evaluation: slow, B 9: not started in time." in text
    assert (
        "From `suite.json`: Some CPU, 2 threads, avx2; load before 0.25; torch 2.13.0, Python 3.11.7, triton 3.8.0; "
        "commit 0123456789ab; 2026-01-02; `python -m pytest benchmarks`." in text
    )
    assert "No GPU run exists yet" in text
    assert "Shares above 100%" not in text


def test_shares_above_the_ceiling_are_explained(tmp_path):
    content = made.suite()
    content["cases"][0]["variants"][0]["share_of_ceiling"] = 1.2
    assert "Shares above 100%" in texts(made.results(tmp_path, suite=content), "")["suite"]


def test_on_a_gpu_there_are_speeds_and_shares(tmp_path):
    files = made.results(tmp_path, gpu=made.suite(gpu=True), training_step=made.training(gpu=True))
    found = texts(files, "")
    table = rows(found["suite"])
    head = next(row for row in table if "img/s" in row)
    line = dict(zip(head, next(row for row in table if row[1] == "**ddt_fast**"), strict=True))
    assert line["ms"] == "6.17"
    assert line["middle half"] == "5.56 to 6.79"
    assert line["img/s"] == "1134"
    assert line["TFLOP/s"] == f"{4e6 / 0.0061728 / 1e12:.3g}"
    assert line["share of ceiling"] == "65% gemm"
    assert line["of the baseline's time"] == "0.50"
    assert "Some GPU, driver 123.45; Some CPU" in found["suite"]
    assert "No GPU run" not in found["suite"] + found["summary"]
    assert ["FusedDDT, bf16", "2.50", "0.38", "0.38", "0", "321", "123", "46%"] in rows(found["training step"])
    assert rows(found["summary"])[2][4:] == ["321", "46% (MFU)"]


def test_the_summary_compares_what_does_the_same_work(tmp_path):
    found = rows(texts(made.results(tmp_path, suite=made.suite(), training_step=made.training()), "")["summary"])
    assert found[2:] == [
        ["training step: some model, batch 3", "reference, fp32", "0.40: FusedDDT, bf16", "0.62: reference, bf16"],
        [
            "sampling: throughput, B 7",
            "DDT, both branches always",
            "0.40: FusedDDT, refresh 1, eager",
            "0.80: DDT, refresh 1, eager",
        ],
        ["", "", "0.10: FusedDDT, refresh 6, eager", ""],
        ["evaluation: features, B 7", "the usual way", "0.50: ddt_fast", ""],
    ]


def test_other_files_have_their_tables(tmp_path):
    others = {"pareto": made.pareto(), "candidates": made.candidates(), "scaling": made.scaling()}
    found = texts(made.results(tmp_path, cpu=made.cpu_sampling(), **others), "")
    assert ["every step refreshed", "2.3", "2.3", "422"] in rows(found["CPU sampling"])
    assert "0.24 of the reference's time in int8 compiled" in " ".join(found["CPU sampling"].split())
    assert ["int8 compiled, refresh 1", "12", "1.10", "5.0e-01"] in rows(found["CPU sampling, details"])
    setting = ["multistep 3, 25 steps, K 2 linear", "6.5", "0.0125", "0.0025", "0.0075", "0.61", "99.5%"]
    assert ["7.5", "error, median", *setting] in rows(found["pareto"])
    assert ["mine", *setting, "multistep 3, 25 steps, K 2 linear: 6.5 TFLOP"] in rows(found["pareto"])
    name = "Euler 250, --fast"
    assert [name, "6.5", *["12.5 / 2.5 / 7.5"] * 2] in rows(found["candidates"])
    assert ["all", "24.5", "0.5000 ± 0.0120", "-"] in rows(found["candidates"])
    assert [name, "6.5", "0.5000 ± 0.0120", "+0.00200 ± 0.00100"] in rows(found["candidates"])
    assert ["", "512 px", "5", "4", "1.25"] in rows(found["scaling"])
    assert ["", "1024 px, skipped: out of memory", "-", "-", "-"] in rows(found["scaling"])
    short = rows(found["candidates, in short"])
    assert [name, "6.5", "0.0125", "0.0025", "0.0075", "+0.00200 ± 0.00100"] in short
    assert len(short) == 3
    assert found["training step"] == "No `training_step.json` yet; `python -m benchmarks.training_step` makes it."


def test_the_pieces_of_a_step_are_all_of_its_products():
    for _, preset, batch in floors.SHAPES:
        config, side = PRESETS[preset].model, PRESETS[preset].data.sample_size
        pieces = floors.pieces(config, batch, side)
        flops = model_flops(config, side, side)
        for parts, expected in (
            ((floors.ENCODER,), flops.encoder),
            ((floors.MODULATIONS,), flops.modulations),
            ((floors.DECODER,), flops.decoder),
        ):
            products = [piece for piece in floors.of_parts(pieces, *parts) if "norm" not in piece.kind]
            # The activation of the MLP is plural too, the embedding of t is not.
            total = sum(piece.count * piece.cost.flops for piece in products)
            assert total == pytest.approx(batch * expected, rel=2e-3)
        kinds = floors.seconds_by_kind(pieces)
        assert sum(kinds.values()) == pytest.approx(sum(piece.seconds for piece in pieces))
        assert sum(kinds.values()) > batch * flops.total / floors.GEMM_FLOPS_PER_SECOND


def test_a_runs_floor_is_that_of_its_evaluations():
    config, published = PRESETS["xl2_256"].model, PRESETS["xl2_256"].sampling
    plan = SamplingPlan.from_config(replace(published, refresh_every=6))
    pieces = floors.pieces(config, 4, 32)
    encoder, modulations, decoder = (
        sum(piece.seconds for piece in floors.of_parts(pieces, part))
        for part in (floors.ENCODER, floors.MODULATIONS, floors.DECODER)
    )
    expected = plan.encoder_evaluations * (encoder + modulations) + plan.network_evaluations * decoder
    assert floors.sampling_seconds(plan, config, 4, 32) == pytest.approx(expected / 4)
    forecast = SamplingPlan.from_config(replace(published, refresh_every=6, state_forecast="linear"))
    more = floors.sampling_seconds(forecast, config, 4, 32)
    # A forecast reads its norms' modulations twice, and refreshes the unconditional branch twice more.
    assert 1.01 < more * 4 / expected < 1.1


@pytest.mark.parametrize("gpu", [False, True])
def test_figures_are_drawn_and_known_by_what_they_show(gpu, tmp_path):
    drawn = figures(made.results(tmp_path, suite=made.suite(gpu)))
    assert [figure.name for figure in drawn] == [
        "floors.png",
        "suite_roofline.png",
        "suite_refresh.png",
        "suite_blocks.png",
    ]
    for figure in drawn:
        assert not figure.is_current(tmp_path)
        figure.draw(tmp_path / figure.name)
        assert figure.is_current(tmp_path)
    content = made.suite(gpu)
    content["cases"][0]["variants"][0]["error"] = 0.5
    changed = figures(made.results(tmp_path, suite=content))
    assert [figure.is_current(tmp_path) for figure in changed] == [True, False, False, False]


def test_a_stack_that_lacks_a_kernel_is_not_drawn(tmp_path):
    content = made.suite()
    content["cases"] = [c for c in content["cases"] if not c["case"].startswith("swiglu")]
    assert "suite_blocks.png" not in [figure.name for figure in figures(made.results(tmp_path, suite=content))]


def test_names_are_those_of_what_is_measured():
    from benchmarks import bench_kernels, bench_sampling, models, training_step
    from benchmarks.report import other_tables, plots

    kernels = {(case.name, case.size) for case in bench_kernels.CASES}
    for shape in bench_kernels.SHAPES:
        for name, modulated, _ in plots.PIECES.values():
            sizes = [f"{shape}, modulated per {words}" for words in ("sample", "token")] if modulated else [str(shape)]
            assert {(name, size) for size in sizes} <= kernels
    assert {plots.PLAIN, plots.OURS} == {bench_kernels.EAGER, bench_kernels.OURS}
    assert all(name.count(", ") == 2 for name in bench_sampling.ALL if name != bench_sampling.BASELINE)
    assert other_tables.SETTINGS.keys() == models.SETTINGS.keys()
    ours = {variant.name for variant in training_step.VARIANTS if variant.engine == "fused"}
    assert ours == {v.name for v in training_step.VARIANTS if v.name.startswith(other_tables.OURS)}


PAGE = "# A page\n\n<!-- results: one -->\nold 1.5\n<!-- end of results -->\n\nby hand\n"


def test_markers_are_filled_again_and_again(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert stale(page, {"one": "new"}) == ["one"]
    assert rewrite(page, {"one": "new"})
    assert page.read_text() == PAGE.replace("old 1.5", "new")
    assert not rewrite(page, {"one": "new"})
    assert stale(page, {"one": "new"}) == []
    assert outside(PAGE) == "# A page\n\n\n\nby hand\n"
    empty = "<!-- results: one -->\n<!-- end of results -->"
    assert fill(fill(empty, {"one": "a\n\nb"}, ""), {"one": "a\n\nb"}, "") == empty.replace("-->\n", "-->\na\n\nb\n", 1)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (PAGE.replace("<!-- end of results -->", ""), "1 markers .* and 0 "),
        (PAGE + "<!-- end of results -->", "1 markers .* and 2 "),
        (PAGE.replace("old", "<!-- results: two -->\n"), "2 markers .* and 1 "),
        (PAGE.replace("one", "three"), "wants results called 'three'; allowed: one, two"),
    ],
)
def test_wrong_markers_are_refused(page, message):
    with pytest.raises(ValueError, match=f"a page.*{message}"):
        fill(page, {"one": "", "two": ""}, "a page")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with two pages and results."""
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "FOLDER", folder)
    (tmp_path / "README.md").write_text(PAGE.replace("one", "summary"))
    (tmp_path / "benchmarks" / "README.md").write_text(PAGE.replace("one", "suite"))
    made.results(folder, suite=made.suite())
    return tmp_path


def refused(capsys, *arguments):
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: report.main(list(arguments)))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_pages_are_written_then_checked(checkout, capsys):
    assert "README.md (summary), benchmarks/README.md (suite), floors.png" in refused(capsys, "--check")
    report.main(["--write-readme"])
    page = checkout / "benchmarks" / "README.md"
    assert "](results/suite_roofline.png)" in page.read_text()
    report.main(["--check"])
    report.main(["--write-readme"])
    assert capsys.readouterr().out.count("nothing to change") == 2
    written = page.read_text()
    page.write_text(written.replace("0.50", "0.49", 1))
    assert "benchmarks/README.md (suite);" in refused(capsys, "--check")
    page.write_text(written)
    (checkout / "benchmarks" / "results" / "suite_blocks.png").unlink()
    assert "say: suite_blocks.png;" in refused(capsys, "--check")
    content = made.suite()
    content["cases"][-1]["variants"][1]["ratio"] = 0.6
    made.results(checkout / "benchmarks" / "results", suite=content)
    assert "README.md (summary), benchmarks/README.md (suite), suite_roofline.png" in refused(capsys, "--check")


def test_files_that_are_named_become_a_page_with_its_figures(checkout, tmp_path, capsys):
    made.results(tmp_path / "other", training_step=made.training())
    out = tmp_path / "out"
    report.main([str(tmp_path / "other" / "training_step.json"), "--output-dir", str(out)])
    page = (out / "report.md").read_text()
    assert "FusedDDT, bf16" in page
    assert "No `suite.json` yet" in page
    assert sorted(path.name for path in out.iterdir()) == ["floors.png", "report.md"]
    capsys.readouterr()
    report.main([])
    assert "the usual way" in capsys.readouterr().out


def changed(place, value):
    """A suite's content with a value at a place; None takes the key away."""
    content = copy.deepcopy(made.suite())
    *path, last = place
    holder = content
    for key in path:
        holder = holder[key]
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    return content


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format",), 2, "has format 2; allowed: 1"),
        (("cases",), None, "is no results file; allowed: those of suite, cpu_sampling"),
        (("environment", "torch"), None, ".environment has no 'torch'"),
        (("cases", 0, "variants", 0, "ratio"), "1.0", ".cases[0].variants[0].ratio is '1.0'; wanted a number"),
        (("cases", 0, "variants", 0, "error"), float("nan"), ".cases[0].variants[0].error is nan; wanted a number"),
        (("cases", 0, "variants", 0, "seconds", "median"), 0, ".seconds.median is 0; wanted more than 0"),
        (("cases", 0, "variants"), {}, ".cases[0].variants is {}; wanted a list"),
        (("cases", 0), 5, ".cases[0] is 5; wanted an object"),
        (("cases", 0, "session"), 1, ".cases[0].session is 1; allowed: 0 to 0"),
        (("sessions", 0, "ceilings"), None, ".sessions[0] has no 'ceilings'"),
    ],
)
def test_a_malformed_file_is_one_line(place, value, message, tmp_path, capsys):
    path = tmp_path / "mine.json"
    made.write_json(path, changed(place, value))
    assert message in refused(capsys, str(path))


def test_other_mistakes_are_one_line(checkout, tmp_path, capsys):
    assert "No such file" in refused(capsys, str(tmp_path / "absent.json"))
    (tmp_path / "text.json").write_text("{")
    assert "is not valid JSON" in refused(capsys, str(tmp_path / "text.json"))
    assert "--check writes nothing" in refused(capsys, "--check", "--write-readme")
    content = made.pareto()
    content["recommended"][0]["point"] = 2
    made.results(checkout / "benchmarks" / "results", pareto=content)
    assert "pareto.json.recommended[0].point is 2; allowed: 0 to 1" in refused(capsys)


def test_the_page_is_where_the_command_looks_for_it():
    assert all((ROOT / name).is_file() for name in report.PAGES)
