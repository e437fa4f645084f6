"""`python -m benchmarks.report`: blocks say what the files hold, stale ones are found, wrong files are refused."""

import copy
import re
import shutil

import pytest

from benchmarks import candidates, cpu_sampling
from benchmarks.report import __main__ as report
from benchmarks.report import floors, tables
from benchmarks.report.files import FOLDER, ROOT, ResultsFile
from ddt_fast.files import read_json, write_json
from ddt_fast.model.flops import model_flops
from ddt_fast.presets import PRESETS

ABSOLUTE = r"img/s|FLOP/s|TB/s|\bms\b|\bMFU\b|\bs per image"
COMMITTED = [*map(ResultsFile, sorted(FOLDER.glob("*.json")))]
ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python -m measured",
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
    "cpu": {"model": "Some CPU", "flags": ["avx2"]},
    "gpus": [],
    "threads": 2,
    "load_average": [0.25, 0.5, 0.75],
    "python": "3.11.7",
    "torch": "2.13.0",
    "packages": {"triton": "3.8.0", "ddt-fast": "0.1.0"},
}
ON_GPU = {"gpus": [{"name": "Some GPU"}], "driver": "123.45"}


def variant(name, median, ratio, ours=False, flops=4_000_000):
    """As the suite writes it: quartiles 10% off, a GEMM ceiling of 1 GFLOP/s."""
    return {
        "name": name,
        "baseline": ratio == 1,
        "ours": ours,
        "seconds": {"median": median, "lower_quartile": 0.9 * median, "upper_quartile": 1.1 * median, "calls": 5},
        "ratio": ratio,
        "error": 1.3e-3,
        "images_per_second": 7 / median,
        "flops": flops,
        "bound_by": "gemm",
        "share_of_ceiling": flops / 1e9 / median,
        "note": "",
    }


def case(group, name, variants, **reasons):
    made = {"group": group, "case": name, "size": "B 7", "session": 0, "variants": variants, "missing": [], "wrong": []}
    return made | {key: [dict(zip(("name", "reason"), pair, strict=True))] for key, pair in reasons.items()}


def suite(gpu=False):
    sampling = [
        variant("DDT, both branches always", 0.4321, 1.0),
        variant("FusedDDT, refresh 6, eager", 0.0432, 0.1, ours=True, flops=1_000_000),
    ]
    evaluation = [variant("the usual way", 0.0123457, 1.0), variant("ddt_fast", 0.0061728, 0.5, ours=True)]
    reasons = {"missing": ("peer", "no wheel"), "wrong": ("other", "off by 2")}
    not_measured = [{"case": "evaluation: slow, B 9", "reason": "not started in time"}]
    return {
        "format": 1,
        "environment": copy.deepcopy(ENVIRONMENT) | (ON_GPU if gpu else {}),
        "sessions": [{"command": "python -m pytest benchmarks", "not_measured": not_measured}],
        "cases": [case("sampling", "throughput", sampling), case("evaluation", "features", evaluation, **reasons)],
    }


def training(gpu=False):
    row = {"variant": "FusedDDT, bf16", "times_faster": 2.5, "kept_of_reference": 0.375, "peak_of_reference": 0.375}
    row |= {"gradient_error": 0.0, "images_per_second": 321.0, "tflops": 123.0, "mfu": 0.456 if gpu else None}
    environment = ENVIRONMENT | (ON_GPU if gpu else {})
    return {"environment": environment, "model": "some model", "batch_size": 3, "rows": [row]}


def headline(gpu=False):
    """Of two images in two batches: a plan in 0.5 s, another in 0.125 s."""
    row = {
        "case": "some model",
        "batch_size": 2,
        "engine": "CUDA graphs",
        "plan": "refresh 1",
        "tflop_per_image": 111.0,
    }
    row |= {"seconds_per_batch": 0.5, "images_per_second": 4.0, "tflops": 444.0, "whole_run": None}
    faster = row | {"plan": "--fast", "seconds_per_batch": 0.125, "images_per_second": 16.0, "tflop_per_image": 10.0}
    faster |= {"whole_run": {"seconds": 0.13, "difference": 0.04}}
    missing = [{"case": "some model, B 256, CUDA graphs, --fast", "reason": "out of memory"}]
    environment = ENVIRONMENT | (ON_GPU if gpu else {})
    return {"environment": environment, "num_steps": 250, "headline": [faster, row], "steps": [], "missing": missing}


def results(folder, **files):
    """Written to the folder, and read."""
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return [*map(ResultsFile, sorted(folder.glob("*.json")))]


def rows(name, files):
    """Cells of a block's tables."""
    lines = [line for line in report.block_text(name, files).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_pages_and_figures_are_what_the_files_say():
    report.check(COMMITTED)


def test_on_a_cpu_there_are_ratios_and_no_speeds(tmp_path):
    files = results(tmp_path, suite=suite(), training_step=training())
    text = "\n".join(report.block_text(name, files) for name in ("suite", "training step"))
    text += "".join(report.block_text(name, COMMITTED) for name in report.BLOCKS if name != "floors")
    assert not re.search(ABSOLUTE, text)
    assert ["", "**ddt_fast**", "0.50", "0.45 to 0.55", "65% gemm", "1.3e-03"] in rows("suite", files)
    assert ["", "**FusedDDT, refresh 6, eager**", "0.10", "0.09 to 0.11", "2% gemm", "1.3e-03"] in rows("suite", files)


def test_a_table_says_what_is_missing_and_where_it_comes_from(tmp_path):
    content = suite()
    text = " ".join(report.block_text("suite", results(tmp_path, suite=content)).split())
    for words in (
        "Missing: peer (1 case): no wheel.",
        "Wrong, so not timed: other (1 case): off by 2.",
        "Not measured: evaluation: slow, B 9: not started in time.",
        "From `suite.json`: Some CPU, 2 threads, avx2; load before 0.25; torch 2.13.0, Python 3.11.7, triton 3.8.0; "
        "commit 0123456789ab; 2026-01-02; `python -m pytest benchmarks`.",
        "No GPU run exists yet",
    ):
        assert words in text
    assert "Shares above 100%" not in text
    content["cases"][0]["variants"][0]["share_of_ceiling"] = 1.2
    assert "Shares above 100%" in report.block_text("suite", results(tmp_path, suite=content))


def test_on_a_gpu_there_are_speeds_and_shares(tmp_path):
    files = results(tmp_path, gpu=suite(gpu=True), training_step=training(gpu=True))
    table = rows("suite", files)
    head = next(row for row in table if "img/s" in row)
    line = dict(zip(head, next(row for row in table if row[1] == "**ddt_fast**"), strict=True))
    assert (line["ms"], line["img/s"], line["TFLOP/s"]) == ("6.17", "1134", f"{4e6 / 0.0061728 / 1e12:.3g}")
    assert (line["share of ceiling"], line["of the baseline's time"]) == ("65% gemm", "0.50")
    text = report.block_text("suite", files)
    assert "Some GPU, driver 123.45; Some CPU" in text
    assert "No GPU run" not in text
    assert ["FusedDDT, bf16", "2.50", "0.38", "0.38", "0", "321", "123", "46%"] in rows("training step", files)


def test_headline_numbers_are_those_of_the_file(tmp_path):
    files = results(tmp_path, headline=headline(gpu=True))
    table = rows("headline", files)
    line = dict(zip(table[0], table[2], strict=True))
    assert line == {
        **{"case": "some model, B 2", "engine": "CUDA graphs", "plan": "--fast", "TFLOP an image": "10"},
        **{"of refresh 1's time": "0.25", "s per image": "0.0625", "img/s": "16", "TFLOP/s": "444"},
        "a whole run": "+4.0%",
    }
    assert table[3][-1] == "-"
    text = " ".join(report.block_text("headline", files).split())
    assert "Missing: some model, B 256, CUDA graphs, --fast: out of memory." in text
    assert "Some GPU, driver 123.45" in text
    on_cpu = report.block_text("headline", results(tmp_path, headline=headline()))
    assert not re.search(ABSOLUTE, on_cpu)
    assert report.block_text("headline", results(tmp_path / "other", suite=suite())) == ""


def test_other_tables_hold_their_files_numbers(tmp_path):
    record = {file.kind: file.record for file in COMMITTED}
    setting = record["cpu_sampling"]["sampling"]["settings"][0]
    row = next(row for row in rows("CPU sampling", COMMITTED) if row[0] == "every step refreshed")
    assert row[1] == f"{setting['times_faster_than_published']:.1f}"
    first = record["candidates"]["errors"][0]
    cells = next(row for row in rows("candidates", COMMITTED) if row[0] == first["candidate"])
    errors = (first["error"], first["error_median"], first["error_p90"])
    assert cells[2] == " / ".join(f"{1000 * error:.3g}" for error in errors)
    affordable = [p for p in record["pareto"]["points"] if p["series"][:9] == "corrected" and p["tflop_xl2"] <= 10]
    cells = next(row for row in rows("pareto", COMMITTED) if row[0] == "10")
    assert cells[6].split(" / ")[0] == f"{1000 * min(p['error'] for p in affordable):.3g}"
    fast = next(r for r in record["forecast"]["results"] if r["series"] == "K 6, M 10, linear")
    cells = next(row for row in rows("forecast", COMMITTED) if "K = 6 and M = 10" in row[0])
    assert cells[1:3] == [f"{fast['error']:.4f}", f"{fast['error_median']:.4f}"]
    assert len(rows("candidates, in short", COMMITTED)) == 2 + len(tables.SHORT)
    text = report.block_text("training step", results(tmp_path, suite=suite()))
    assert text == "No `training_step.json` yet; `python -m benchmarks.training_step` makes it."


def test_names_in_tables_are_those_of_what_is_measured():
    assert tables.CPU_SETTINGS.keys() == cpu_sampling.SETTINGS.keys()
    (record,) = [file.record for file in COMMITTED if file.kind == "candidates"]
    other = candidates.FRECHET_GUIDANCE + candidates.OTHER_MODEL
    assert {*candidates.GUIDANCE, other} == {row["guidance"] for row in record["errors"]}


def test_the_pieces_of_a_step_are_all_of_its_products():
    for _, preset, batch in floors.SHAPES:
        config, side = PRESETS[preset].model, PRESETS[preset].data.sample_size
        pieces, flops = list(floors.pieces(config, batch, side)), model_flops(config, side, side)
        for part in (floors.ENCODER, floors.MODULATIONS, floors.DECODER):
            products = [piece for piece in pieces if piece.part == part and "norm" not in piece.kind]
            # The activation of the MLP is counted too, the embedding of t is not.
            total = sum(piece.count * piece.cost.flops for piece in products)
            assert total == pytest.approx(batch * getattr(flops, part), rel=2e-3)
        total = sum(piece.seconds for piece in pieces)
        assert total > batch * flops.total / floors.GEMM_FLOPS_PER_SECOND


PAGE = "# A page\n\n<!-- results: suite -->\nold\n<!-- end of results -->\n\nby hand\n"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with two pages and results."""
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "FOLDER", folder)
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "docs" / "sampling.md").write_text(PAGE.replace("suite", "pareto"))
    results(folder, suite=suite())
    shutil.copy(FOLDER / "pareto.json", folder)
    return tmp_path


@pytest.mark.slow
def test_blocks_are_written_in_any_page_then_checked(checkout, capsys):
    def stale():
        with pytest.raises(ValueError, match="not what the results files say") as error:
            report.main(["--check"])
        return re.search(r"say: (.*);", str(error.value))[1]

    assert stale() == "README.md (suite), docs/sampling.md (pareto), pareto.png"
    report.main(["--write-readme"])
    report.main(["--check"])
    report.main(["--write-readme"])
    assert capsys.readouterr().out.count("nothing to change") == 2
    page = checkout / "README.md"
    written = page.read_text()
    assert written.startswith("# A page\n\n<!-- results: suite -->\n**No GPU run")
    assert written.endswith("<!-- end of results -->\n\nby hand\n")
    page.write_text(written.replace("0.50", "0.49", 1))
    assert stale() == "README.md (suite)"
    page.write_text(written)
    content = suite()
    content["cases"][-1]["variants"][1]["ratio"] = 0.6
    results(checkout / "benchmarks" / "results", suite=content)
    assert stale() == "README.md (suite)"
    write_json(checkout / "benchmarks" / "results" / "pareto.json", read_json(FOLDER / "pareto.json"))
    assert stale() == "README.md (suite), pareto.png"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "message"),
    [
        (PAGE.replace("<!-- end of results -->", ""), "1 markers .* and 0 "),
        (PAGE + "<!-- end of results -->", "1 markers .* and 2 "),
        (PAGE.replace("old", "<!-- results: pareto -->\n"), "2 markers .* and 1 "),
        (PAGE.replace("suite", "three"), "asks for results called 'three'; allowed: suite, CPU sampling"),
    ],
)
def test_wrong_markers_are_refused(checkout, page, message):
    (checkout / "README.md").write_text(page)
    for option in ("--check", "--write-readme"):
        with pytest.raises(ValueError, match=f"README.md .*{message}"):
            report.main([option])


def test_files_that_are_named_become_a_page_with_its_figures(checkout, tmp_path, capsys):
    results(tmp_path / "benchmarks", training_step=training())
    out = tmp_path / "out"
    report.main([str(tmp_path / "benchmarks" / "training_step.json"), "--output-dir", str(out)])
    page = (out / "report.md").read_text()
    assert "FusedDDT, bf16" in page
    assert "No `suite.json` yet" in page
    report.main([str(FOLDER / "pareto.json"), "--output-dir", str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["pareto.png", "report.md"]
    shutil.copy(FOLDER / "pareto.json", out)
    assert ResultsFile(out / "pareto.json").picture_is_current()
    capsys.readouterr()
    report.main([])
    assert "the usual way" in capsys.readouterr().out


def test_a_malformed_file_is_refused_by_name(tmp_path):
    def message(content):
        write_json(tmp_path / "mine.json", content)
        with pytest.raises(ValueError, match=r"mine\.json") as error:
            report.main([str(tmp_path / "mine.json")])
        return str(error.value)

    assert "has format 2; allowed: 1" in message(suite() | {"format": 2})
    assert "is not a results file; allowed: those of suite, cpu_sampling" in message({"environment": {}})
    lacking = suite()
    del lacking["cases"][0]["variants"][0]["ratio"]
    assert "KeyError: 'ratio'" in message(lacking)
    pareto = read_json(FOLDER / "pareto.json")
    del pareto["points"][0]["tflop_xl2"]
    assert "KeyError" in message(pareto)


def test_every_page_with_a_block_is_looked_at():
    marked = {page for page in ROOT.rglob("*.md") if "<!-- results:" in page.read_text(encoding="utf-8")}
    assert marked <= set(report.pages())
