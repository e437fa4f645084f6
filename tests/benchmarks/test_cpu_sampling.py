"""The CPU benchmark on a tiny model: it counts and composes what the engine runs, and times nothing that is wrong."""

import pytest
import torch

import golden_data as golden
from benchmarks.cpu_sampling import (
    PUBLISHED,
    SETTINGS,
    StepCosts,
    composed,
    measure_forward,
    measure_sampling,
    published_run,
)
from benchmarks.environment import environment
from benchmarks.timing import Timing, interleave
from ddt_fast.model import FusedDDT
from ddt_fast.model.quantization import quantize_int8
from ddt_fast.sampling import Sampler

SIZE = 8


def test_variants_take_turns():
    order = []
    timings = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, calls=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert timings["a"].calls == 3
    assert 0 <= timings["a"].minimum <= timings["a"].median <= timings["a"].maximum


def test_quartiles_and_median():
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.minimum, timing.lower_quartile, timing.median, timing.upper_quartile, timing.maximum) == (
        1,
        2,
        3,
        4,
        5,
    )
    assert Timing.of([2.0]) == Timing(2, 2, 2, 2, 2, 1)


def test_environment_says_where_and_what():
    record = environment()
    assert record["torch"] == torch.__version__
    assert record["cpu"]["model"]
    assert record["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("setting", SETTINGS)
def test_parts_are_all_that_a_run_does(setting):
    model = FusedDDT.from_reference(golden.model("tiny_h48_d24"))
    noise, labels = torch.randn(1, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    costs = StepCosts(Sampler(model, SETTINGS[setting], 1, SIZE, SIZE), noise, labels)
    plan = costs.sampler.plan
    assert sum(costs.counts.values()) == len(plan.steps) + 1
    assert costs.functions().keys() == costs.counts.keys()
    # A decoder run costs 1, all else nothing: what is composed are the plan's network evaluations.
    price = {
        part: Timing.of([part.count("decode 1") + 2 * part.count("decode 2") + part.count("afresh")])
        for part in costs.counts
    }
    assert composed(costs.counts, price) == plan.network_evaluations


def test_the_published_run_is_the_engines_exactly():
    reference = golden.model("tiny_h48_d24")
    noise = torch.randn(2, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 0])
    expected = Sampler(reference, PUBLISHED, 2, SIZE, SIZE)(noise, labels)
    assert golden.relative_error(published_run(reference, noise, labels, PUBLISHED), expected) < 1e-5


def test_both_parts_run_and_refuse_what_is_wrong():
    reference = golden.model("tiny_h48_d24")
    model = FusedDDT.from_reference(reference)
    models = {"reference, fp32 eager": reference, "fp32 eager": model, "int8 eager": quantize_int8(model)}
    rows = measure_forward(models, SIZE, calls=1)
    assert rows[0]["of_reference"] == 1
    assert [row["relative_error"] < limit for row, limit in zip(rows, (1e-9, 1e-5, 0.01), strict=True)] == [True] * 3
    engines = {"int8 eager": models["int8 eager"]}
    sampling, runs = measure_sampling(reference, engines, SIZE, batch_size=1, calls=1, run_steps=24)
    assert [row["network_evaluations"] for row in sampling["settings"]] == [422, 422, 268]
    assert [run["setting"] for run in runs] == ["published", *SETTINGS]
    assert 1e-5 < runs[1]["relative_error"] < 0.01
    wrong = FusedDDT.from_reference(reference)
    wrong.final_layer.linear.bias.data += 1
    with pytest.raises(ValueError, match="not timed"):
        measure_forward({**models, "wrong": wrong}, SIZE, calls=1)
