"""The harness: nothing wrong is timed, nothing missing is hidden, the results file is complete at any moment."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ddt_kernels
import golden_data as golden
from benchmarks import bench_kernels, gpu_run, harness
from benchmarks.harness import (
    DEVICE,
    Case,
    Ceilings,
    Inputs,
    Recorder,
    Variant,
    Workload,
    allowed_errors,
    forward,
    forward_backward,
    gpu_seconds,
    interleave,
    measure,
    relative_error,
    timing,
)
from benchmarks.models import released_gradients
from ddt_fast.model import FusedDDT
from ddt_kernels import Cost

ROOT = Path(__file__).parents[2]
CEILINGS = Ceilings({"float32": 1e11}, 1e10, "made up")


def double(x):
    return 2 * x


def make_case(variants, name="double", backward=False):
    """Doubles 64 numbers; a function stands for a variant that is ours."""
    wrap = forward_backward if backward else forward

    def inputs():
        x, gradient = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        return Inputs((x.requires_grad_(backward),), (gradient,) if backward else ())

    def build():
        ours = {name for name, function in variants.items() if callable(function)} - {"peer", "plain"}
        made = {name: Variant(lambda v=v: wrap(v), name in ours) if callable(v) else v for name, v in variants.items()}
        exact = lambda x: wrap(double)(x.to(torch.float64))  # noqa: E731
        return Workload(inputs, made, exact, torch.float32, Cost(512, 64), images=4)

    return Case("test", name, "64", tuple(variants), build, rounds=3)


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    monkeypatch.setattr(harness, "measure_ceilings", lambda: CEILINGS)


class Wrong(torch.autograd.Function):
    """The right output, another function's gradient."""

    @staticmethod
    def forward(_, x):
        return 2 * x

    @staticmethod
    def backward(_, gradient):
        return 2.001 * gradient


def broken():
    raise RuntimeError("no such\nkernel")


def test_a_variant_that_is_wrong_or_fails_gets_no_time():
    calls, runs = [], []

    def off(x):
        calls.append(x)
        return 2 * x + 1e-4

    def fails_when_timed(x):
        runs.append(x)
        if len(runs) > 1:
            raise torch.OutOfMemoryError("full")
        return 2 * x

    variants = {
        "plain": double,
        "ours": lambda x: x + x,
        "off": off,
        "nan": lambda x: torch.full_like(x, torch.nan),
        "other shape": lambda x: 2 * x[:1],
        "peer": fails_when_timed,
        "peer that breaks": Variant(broken),
        "ours that breaks": Variant(broken, ours=True),
        "not here": "not installed: pip install it",
    }
    result = measure(make_case(variants), CEILINGS)
    assert result.rounds.keys() == {"plain", "ours"}
    assert result.wrong.keys() == {"off", "nan", "other shape", "ours that breaks"}
    assert result.missing == {
        "peer that breaks": "failed: RuntimeError: no such kernel",
        "not here": "not installed: pip install it",
        "peer": "failed: OutOfMemoryError: full",
    }
    assert len(calls) == 1
    for key, reasons in (("wrong", result.wrong), ("missing", result.missing)):
        assert {entry["name"]: entry["reason"] for entry in result.record[key]} == reasons
    plain, ours = result.record["variants"]
    assert (plain["name"], plain["baseline"], ours["name"], ours["baseline"]) == ("plain", True, "ours", False)
    assert plain["seconds"]["calls"] == 3
    median = ours["seconds"]["median"]
    assert ours["ratio"] == pytest.approx(median / plain["seconds"]["median"])
    assert ours["images_per_second"] == pytest.approx(4 / median)
    # 512 bytes at 1e10 bytes/s take longer than 64 FLOPs at 1e11 FLOP/s.
    assert (ours["bound_by"], ours["floor_seconds"]) == ("copy", pytest.approx(51.2e-9))
    assert ours["share_of_ceiling"] == pytest.approx(51.2e-9 / median)
    json.dumps(result.record, allow_nan=False)


def test_a_wrong_gradient_gets_no_time():
    result = measure(make_case({"plain": double, "off": Wrong.apply}, backward=True), CEILINGS)
    assert result.rounds.keys() == {"plain"}
    assert "of output 1" in result.wrong["off"]


def test_a_wrong_baseline_gets_no_time_and_sets_no_limits():
    result = measure(make_case({"plain": lambda x: 3 * x, "ours": double, "off": lambda x: 2.01 * x}), CEILINGS)
    assert result.wrong.keys() == {"plain", "off"}
    assert [v["ratio"] for v in result.record["variants"]] == [None]


def test_variants_take_turns():
    order = []

    def noting(name):
        def run(x):
            order.append(name)
            torch.mm(torch.ones(400, 400), torch.ones(400, 400))  # long enough to be timed alone
            return 2 * x

        return run

    measure(make_case({"a": noting("a"), "b": noting("b")}), CEILINGS)
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b"] * 5  # verified, timed once, three rounds
    order.clear()
    timings = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, warmup=1)
    assert order == ["a", "b"] * 4
    assert timings["a"]["calls"] == 3


def test_quartiles_and_median():
    assert [*timing([5.0, 1.0, 2.0, 4.0, 3.0]).values()] == [2, 3, 4, 1, 5, 5]
    assert [*timing([2.0]).values()] == [2, 2, 2, 2, 2, 1]


def test_other_variants_than_named_are_refused():
    with pytest.raises(ValueError, match="expected \\('another',\\)"):
        measure(replace(make_case({"plain": double}), variants=("another",)), CEILINGS)


@pytest.mark.slow
def test_the_file_is_complete_when_a_run_is_cut_off(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    path = tmp_path / "results.json"
    made = Recorder(path)
    plain = {"plain": double, "peer": "not here"}
    made.measure(make_case(plain))
    with pytest.raises(KeyboardInterrupt):
        made.measure(make_case({"plain": Variant(interrupted)}, name="cut off"))
    content = json.loads(path.read_text())
    assert [case["case"] for case in content["cases"]] == ["double"]
    assert content["sessions"][0]["finished"] is None
    assert content["sessions"][0]["ceilings"]["gemm_flops_per_second"] == {"float32": 1e11}

    later = Recorder(path, append=True)
    later.measure(make_case(plain, name="another"))
    later.measure(make_case(plain))
    later.finish()
    content = json.loads(path.read_text())
    assert [(case["case"], case["session"]) for case in content["cases"]] == [("another", 1), ("double", 1)]
    assert [session["finished"] is None for session in content["sessions"]] == [True, False]
    content["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"torch 1\.0"):
        Recorder(path, append=True)


def test_a_case_that_is_not_measured_is_noted_once(tmp_path):
    path = tmp_path / "results.json"
    made, case = Recorder(path), replace(make_case({"plain": "never"}), build=broken)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such"):
            made.measure(case)
    late = Recorder(path, append=True, time_limit=-1.0)
    assert late.measure(case) is None
    first, second = json.loads(path.read_text())["sessions"]
    assert first["not_measured"] == [{"case": "test: double, 64", "reason": "RuntimeError: no such kernel"}]
    assert "time limit" in second["not_measured"][0]["reason"]


def test_allowed_errors():
    ulp = torch.finfo(torch.float32).eps
    assert allowed_errors([0.0, 1e-6], torch.float32) == [16 * ulp, 2e-6 + 16 * ulp]
    assert allowed_errors([0.002], torch.bfloat16) == [0.004 + 2.0**-8]
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(34**-0.5)
    assert relative_error(torch.tensor([2.0]), torch.zeros(1)) == 2


def test_gradients_of_both_models_have_the_released_names_and_shapes():
    io, reference = golden.tensors("tiny_h48_d24"), golden.model("tiny_h48_d24")
    gradients = []
    for model in (reference, FusedDDT.from_reference(reference)):
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        model.requires_grad_(True)(io["xT"], io["t"], io["y"])[0].square().sum().backward()
        gradients.append(released_gradients(model))
        assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert gradients[0].keys() == reference.state_dict().keys()
    for name, gradient in gradients[0].items():
        assert golden.relative_error(gradients[1][name], gradient) < 1e-4, name


def test_every_public_op_has_a_case():
    helpers = ("_cost", "_coefficients")
    ops = [name for name in ddt_kernels.__all__ if name != "Cost" and not name.endswith(helpers)]
    titles = [case.title.replace(",", "") for case in bench_kernels.CASES]
    for op in ops:
        assert any(title.startswith(f"kernels: {op} ") for title in titles), op
        if not op.endswith("_") and op != "guided_step":
            assert any(title.startswith(f"kernels: {op} forward+backward") for title in titles), op


def test_cases_can_be_told_apart():
    modules = [importlib.import_module(f"benchmarks.{name}") for name in (*gpu_run.SHARES, "bench_evaluation")]
    cases = [case for module in modules for case in module.CASES]
    assert len({case.title for case in cases}) == len(cases)
    assert all(len(set(case.variants)) == len(case.variants) > 1 for case in cases)
    assert {case.group for case in cases} == {"kernels", "model", "sampling", "training", "data", "evaluation"}


LIST_ON_GPU = """
import sys, torch
sys.modules["jsonargparse"] = sys.modules["diffusers"] = None
torch.cuda.is_available = lambda: True
from test_harness import *
test_cases_can_be_told_apart()
test_every_public_op_has_a_case()
assert "XL/2 512 px" in " ".join(case.title for case in bench_kernels.CASES)
"""


@pytest.mark.slow
def test_the_gpus_cases_can_be_listed_without_one():
    """Nothing is allocated before it is measured, and packages that the GPU machine lacks are not imported."""
    folders = (ROOT, ROOT / "kernels", ROOT / "tests", ROOT / "tests" / "benchmarks")
    environment = {"PYTHONPATH": ":".join(map(str, folders)), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", LIST_ON_GPU], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_clock():
    assert 1e-3 < gpu_seconds(lambda: torch.cuda._sleep(4_000_000)) < 20e-3
