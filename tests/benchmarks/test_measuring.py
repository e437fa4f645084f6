"""The harness: nothing wrong is timed, nothing missing is hidden, the results file is whole at any moment."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ddt_kernels
import golden_data as golden
from benchmarks import bench_kernels, suite
from benchmarks.cases import Case, Inputs, Variant, Workload, forward, forward_backward, in_precision, with_gradients
from benchmarks.ceilings import Ceilings
from benchmarks.measure import limits_from, measure, number_of_sets, relative_error
from benchmarks.models import released_gradients
from benchmarks.results import Recorder, summary
from benchmarks.timing import EventClock
from ddt_fast.model import FusedDDT
from ddt_kernels import Cost
from python_processes import run_python

CPU = torch.device("cpu")
CEILINGS = Ceilings({"float32": 1e11}, 1e10, "made up")


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def make_case(variants: dict[str, Variant | str], name: str = "double", backward: bool = False) -> Case:
    wrap = forward_backward if backward else forward

    def inputs(number: int) -> Inputs:
        x, gradient = torch.randn(2, 64, generator=torch.Generator().manual_seed(number))
        return with_gradients(Inputs((x,)), (gradient,)) if backward else Inputs((x,))

    def build() -> Workload:
        return Workload(
            inputs, variants, in_precision(wrap(double), torch.float64), torch.float32, Cost(512, 64), images=4
        )

    return Case("test", name, "64", tuple(variants), build, rounds=3)


def recorder(path=None, **options) -> Recorder:
    return Recorder(path, CPU, ceilings=lambda _: CEILINGS, **options)


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


def test_what_is_wrong_or_fails_gets_no_time():
    calls = []

    def never_again(x):
        calls.append(x)
        return 2 * x + 1e-4

    variants = {
        "plain": Variant(lambda: forward(double)),
        "ours": Variant(lambda: forward(lambda x: x + x), ours=True),
        "off": Variant(lambda: forward(never_again)),
        "nan": Variant(lambda: forward(lambda x: torch.full_like(x, torch.nan)), ours=True),
        "peer that breaks": Variant(broken),
        "ours that breaks": Variant(broken, ours=True),
        "not here": "not installed: pip install it",
    }
    result = measure(make_case(variants), CEILINGS, CPU)
    assert result.rounds.keys() == {"plain", "ours"}
    assert result.wrong.keys() == {"off", "nan", "ours that breaks"}
    assert result.missing == {
        "peer that breaks": "failed: RuntimeError: no such kernel",
        "not here": "not installed: pip install it",
    }
    assert len(calls) == 1
    record = result.record
    assert [v["name"] for v in record["variants"]] == ["plain", "ours"]
    assert [v["baseline"] for v in record["variants"]] == [True, False]
    assert {entry["name"] for entry in record["missing"]} == {"peer that breaks", "not here"}
    assert {entry["name"] for entry in record["wrong"]} == set(result.wrong)
    plain, ours = record["variants"]
    assert plain["seconds"]["calls"] == 3
    assert ours["ratio"] == pytest.approx(ours["seconds"]["median"] / plain["seconds"]["median"])
    assert ours["images_per_second"] == pytest.approx(4 / ours["seconds"]["median"])
    # 512 bytes at 1e10 bytes/s take longer than 64 FLOPs at 1e11 FLOP/s.
    assert (ours["bound_by"], ours["floor_seconds"]) == ("copy", pytest.approx(51.2e-9))
    assert ours["share_of_ceiling"] == pytest.approx(51.2e-9 / ours["seconds"]["median"])
    json.dumps(record, allow_nan=False)


def test_a_wrong_gradient_gets_no_time():
    variants = {
        "plain": Variant(lambda: forward_backward(double)),
        "off": Variant(lambda: forward_backward(Wrong.apply), ours=True),
    }
    result = measure(make_case(variants, backward=True), CEILINGS, CPU)
    assert result.rounds.keys() == {"plain"}
    assert "of output 1" in result.wrong["off"]


def test_a_wrong_baseline_gets_no_time_and_is_no_measure():
    variants = {
        "plain": Variant(lambda: forward(lambda x: 3 * x)),
        "ours": Variant(lambda: forward(double), ours=True),
        "off": Variant(lambda: forward(lambda x: 2.01 * x)),
        "of another shape": Variant(lambda: forward(lambda x: 2 * x[:1])),
    }
    result = measure(make_case(variants), CEILINGS, CPU)
    assert result.wrong.keys() == {"plain", "off", "of another shape"}
    assert [v["ratio"] for v in result.record["variants"]] == [None]


def test_variants_of_a_case_take_turns():
    order = []

    def noting(name):
        def run(x):
            order.append(name)
            torch.mm(torch.ones(400, 400), torch.ones(400, 400))  # long enough to be timed alone
            return 2 * x

        return Variant(lambda: forward(run))

    measure(make_case({"a": noting("a"), "b": noting("b")}), CEILINGS, CPU)
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b"] * 5  # verified, timed once, three rounds


def test_what_fails_only_when_timed_is_left_out():
    def once():
        calls = []

        def run(x):
            calls.append(x)
            if len(calls) > 1:
                raise torch.OutOfMemoryError("full")
            return 2 * x

        return forward(run)

    result = measure(make_case({"plain": Variant(lambda: forward(double)), "greedy": Variant(once)}), CEILINGS, CPU)
    assert result.rounds.keys() == {"plain"}
    assert result.missing == {"greedy": "failed: OutOfMemoryError: full"}


def test_other_variants_than_named_are_refused():
    case = replace(make_case({"plain": Variant(lambda: forward(double))}), variants=("another",))
    with pytest.raises(ValueError, match="wanted \\('another',\\)"):
        measure(case, CEILINGS, CPU)


def test_the_file_is_whole_when_a_run_is_cut_off(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    path = tmp_path / "results.json"
    made = recorder(path)
    plain = {"plain": Variant(lambda: forward(double)), "peer": "not here"}
    made.measure(make_case(plain))
    with pytest.raises(KeyboardInterrupt):
        made.measure(make_case({"plain": Variant(interrupted)}, name="cut off"))
    content = json.loads(path.read_text())
    assert [case["case"] for case in content["cases"]] == ["double"]
    assert content["sessions"][0]["finished"] is None
    assert content["sessions"][0]["ceilings"]["gemm_flops_per_second"] == {"float32": 1e11}

    later = recorder(path, append=True)
    later.measure(make_case(plain, name="another"))
    later.measure(make_case(plain))
    later.finish()
    content = json.loads(path.read_text())
    assert [(case["case"], case["session"]) for case in content["cases"]] == [("another", 1), ("double", 1)]
    assert [session["finished"] is None for session in content["sessions"]] == [True, False]
    assert any("missing in 2 cases: peer: not here" in line for line in summary(later))


def test_results_of_another_machine_are_not_added_to(tmp_path):
    path = tmp_path / "results.json"
    recorder(path).measure(make_case({"plain": Variant(lambda: forward(double))}))
    content = json.loads(path.read_text())
    content["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"torch 1\.0"):
        recorder(path, append=True)


def test_a_case_that_cannot_be_built_is_noted_once(tmp_path):
    def build():
        raise OSError("no space")

    path = tmp_path / "results.json"
    made, case = recorder(path), replace(make_case({"plain": "never"}), build=build)
    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            made.measure(case)
    (entry,) = json.loads(path.read_text())["sessions"][0]["not_measured"]
    assert entry == {"case": "test: double, 64", "reason": "OSError: no space"}


def test_without_pytest_and_out_of_time(tmp_path, capsys):
    path = tmp_path / "results.json"
    right = make_case({"plain": Variant(lambda: forward(double))})
    assert suite.run([right], recorder(path))
    assert not suite.run([replace(right, build=broken)], recorder(path))
    assert suite.run([right], recorder(path, time_limit=-1.0))
    content = json.loads(path.read_text())
    assert content["cases"] == []
    assert "time limit" in content["sessions"][0]["not_measured"][0]["reason"]


def test_allowed_errors():
    ulp = torch.finfo(torch.float32).eps
    assert limits_from([0.0, 1e-6], torch.float32) == [16 * ulp, 2e-6 + 16 * ulp]
    assert limits_from([0.002], torch.bfloat16) == [0.004 + 2.0**-8]
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(34**-0.5)
    assert relative_error(torch.tensor([2.0]), torch.zeros(1)) == 2
    assert number_of_sets(100, CPU) == 1


def test_gradients_of_both_models_have_the_released_names_and_shapes():
    io = golden.tensors("tiny_h48_d24")
    reference = golden.model("tiny_h48_d24")
    models = [reference, FusedDDT.from_reference(reference)]
    gradients = []
    for model in models:
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
    differentiable = [op for op in ops if not op.endswith("_") and op != "guided_step"]
    for op in differentiable:
        assert any(title.startswith(f"kernels: {op} forward+backward") for title in titles), op


def test_cases_can_be_told_apart():
    modules = [importlib.import_module(f"benchmarks.{name}") for name in suite.MODULES]
    cases = [case for module in modules for case in module.CASES]
    assert len({case.title for case in cases}) == len(cases)
    assert all(len(set(case.variants)) == len(case.variants) > 1 for case in cases)
    assert {case.group for case in cases} == {"kernels", "model", "sampling", "training", "data", "evaluation"}


LIST_ON_GPU = """
import sys, torch
sys.modules["jsonargparse"] = sys.modules["diffusers"] = None
torch.cuda.is_available = lambda: True
from test_measuring import *
test_cases_can_be_told_apart()
test_every_public_op_has_a_case()
assert "XL/2 512 px" in " ".join(case.title for case in bench_kernels.CASES)
"""


def test_the_gpus_cases_can_be_listed_without_one():
    """Nothing is allocated before it is measured, and what the GPU machine has not installed is not imported."""
    done = run_python("-c", LIST_ON_GPU, paths=[Path(__file__).parent, Path(__file__).parents[1]])
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("hide_launches", [False, True])
def test_events_time_what_the_device_does(hide_launches):
    clock = EventClock(hide_launches)

    def run():
        torch.cuda._sleep(4_000_000)

    clock(run)
    assert 1e-3 < clock(run) < 20e-3


@pytest.mark.gpu
def test_inputs_do_not_fit_the_gpus_cache():
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    assert number_of_sets(cache // 2, torch.device("cuda")) == 4
    assert number_of_sets(10 * cache, torch.device("cuda")) == 2
