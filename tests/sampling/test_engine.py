"""`sample` against the original's runs, and its rules: one seed one image, exact savings, refused inputs."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

import golden_data as golden
from ddt_fast.config import SamplingConfig
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.model.quantization import quantize_int8
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import Sampler, SamplingPlan, sample
from ddt_fast.sampling.buffers import fitting_batch_size, needed_bytes
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.sampling.schedule import timesteps
from ddt_fast.sampling.solvers import lagrange_integrals
from golden_data import relative_error

NAME = "tiny_h48_d24"


def fused(name: str = NAME) -> FusedDDT:
    return FusedDDT.from_reference(golden.model(name))


@pytest.mark.slow
@pytest.mark.parametrize("make", [golden.model, lambda name: golden.model(name).double(), fused])
@pytest.mark.parametrize(("name", "run"), golden.sampling_runs())
def test_samples_match_the_original(name, run, make):
    io, config = golden.tensors(name), golden.sampling_config(name, run)
    assert relative_error(sample(make(name), io["xT"], io["y"], config), io[f"sample.{run}"]) < 1e-4


def evaluate_everything(model, x, labels, config):
    """Euler with both branches evaluated and guided at every step, refreshes and forecasts on the states themselves."""
    times = timesteps(config.num_steps, config.last_step, config.timeshift)
    plan = SamplingPlan.from_config(config)
    null = torch.full_like(labels, model.config.num_classes)
    histories = {0: [], 1: []}
    for i, step in enumerate(plan.steps):
        velocities = []
        for branch, y in enumerate((labels, null)):
            if step.cond.encode:
                t = torch.full((len(x),), times[i])
                histories[branch].insert(0, model.encode(x, t, y))
            state = sum(w * s for w, s in zip(step.cond.state_weights, histories[branch], strict=False))
            velocities.append(model(x, None, None, state)[0])
        inside = config.guidance_interval[0] < times[i] < config.guidance_interval[1]
        scale = config.guidance_scale if inside else 1.0
        x = x + (times[i + 1] - times[i]) * (velocities[1] + scale * (velocities[0] - velocities[1]))
    return x


@pytest.mark.slow
@pytest.mark.parametrize("forecast", ["hold", "linear", "quadratic"])
@pytest.mark.parametrize("refresh", [{"refresh_every": 4}, {"refresh_steps": (0, 2, 3, 9)}, {"refresh_every": 1}])
def test_left_out_evaluations_do_not_change_the_sample(forecast, refresh):
    """Includes segments that begin unguided and end guided, t = 0.3 lies inside one, and forecasts that begin there;
    the models extrapolate modulations, the expected run extrapolates the states themselves."""
    model, io = golden.model(NAME), golden.tensors(NAME)
    config = SamplingConfig(num_steps=14, last_step=None, guidance_scale=3.0, state_forecast=forecast, **refresh)
    with torch.no_grad():
        expected = evaluate_everything(model, io["xT"], io["y"], config)
    for either in (model, FusedDDT.from_reference(model)):
        assert relative_error(sample(either, io["xT"], io["y"], config), expected) < 1e-5


@pytest.mark.parametrize("order", [2, 3])
def test_pec_predicts_evaluates_and_corrects(order):
    """Against the textbook's form, which keeps the corrected x beside the predicted one, at which it evaluates."""
    model, io = golden.model(NAME), golden.tensors(NAME)
    config = SamplingConfig(num_steps=9, guidance_scale=3.0, guidance_interval=(0.3, 0.8), solver="pec", order=order)
    steps = SamplingPlan.from_config(config).steps
    times, labels = [*(step.t for step in steps), 1.0], io["y"]
    first, last = (times.index(float(torch.tensor(bound))) for bound in (0.3, 0.8))
    null = torch.full_like(labels, model.config.num_classes)
    corrected = predicted = io["xT"]
    conds, differences, ahead = [], [], 0.0

    def moved(values, count, i):
        nodes = [times[now - k] for k in range(count)]
        weights = lagrange_integrals(nodes, times[i], times[i + 1])
        return sum(w * v for w, v in zip(weights, values, strict=False))

    with torch.no_grad():
        for now, t in enumerate(times[:-1]):
            at = torch.full((len(labels),), t)
            conds.insert(0, model(predicted, at, labels)[0])
            if first <= now < last:
                differences.insert(0, 2.0 * (conds[0] - model(predicted, at, null)[0]))
            if now:
                corrected = corrected + moved(conds, min(3, len(conds)), now - 1)
                if first < now < last:
                    corrected = corrected + moved(differences, min(3, len(differences)), now - 1)
                elif now == last:  # no evaluation corrects the last guided step
                    corrected = corrected + ahead
            predicted = corrected + moved(conds, min(order, len(conds)), now)
            if first <= now < last:
                ahead = moved(differences, min(order, len(differences)), now)
                predicted = predicted + ahead
    assert relative_error(sample(model, io["xT"], labels, config), predicted) < 1e-5


@pytest.mark.slow
def test_forecasts_are_nearer_to_the_truth_than_holding():
    model, io = golden.model(NAME), golden.tensors(NAME)
    config = SamplingConfig(num_steps=36, last_step=None)
    truth = sample(model, io["xT"], io["y"], config)

    def error(**settings) -> float:
        return relative_error(sample(model, io["xT"], io["y"], replace(config, **settings)), truth)

    assert 0 < error(refresh_every=4, state_forecast="linear") < error(refresh_every=4) / 2
    assert 0 < error(guidance_every=6, guidance_forecast="linear") < error(guidance_every=6) / 2


@pytest.mark.parametrize("solver", ["euler", "sde"])
def test_one_seed_one_image_in_any_batch(solver):
    model, labels = golden.model(NAME), torch.tensor([1, 2, 3, 4, 5])
    config = SamplingConfig(num_steps=6, solver=solver)

    def draw(part: slice) -> torch.Tensor:
        noise, generators = seeded_noise(range(5)[part], (4, 8, 8))
        return sample(model, noise, labels[part], config, generators=generators)

    alone = torch.randn((4, 8, 8), generator=torch.Generator("cpu").manual_seed(3))
    assert torch.equal(seeded_noise([7, 3], (4, 8, 8))[0][1], alone)
    together = draw(slice(None))
    apart = torch.cat([draw(slice(0, 1)), draw(slice(1, 3)), draw(slice(3, 5))])
    assert relative_error(apart, together) < 1e-5
    assert relative_error(draw(slice(0, 1)), together[1:2]) > 0.1


def test_samples_may_be_trained_on():
    model, io = golden.model(NAME), golden.tensors(NAME)
    result = sample(model, io["xT"], io["y"], SamplingConfig(num_steps=2))
    model(result, io["t"], io["y"])[0].sum().backward()
    assert model.x_embedder.proj.weight.grad.isfinite().all()


def test_progress_sees_every_step_and_cuda_graphs_without_cuda_warn():
    model, io = golden.model(NAME), golden.tensors(NAME)
    seen, config = [], SamplingConfig(num_steps=3)
    result = sample(model, io["xT"], io["y"], config, progress=lambda i, x: seen.append((i, x)))
    assert [i for i, _ in seen] == [1, 2, 3]
    assert torch.equal(seen[-1][1], result)
    with pytest.warns(UserWarning, match="cuda_graphs is set, but .* sampling eagerly"):
        assert torch.equal(sample(model, io["xT"], io["y"], replace(config, cuda_graphs=True)), result)


@pytest.mark.gpu
def test_cuda_matches_the_cpu():
    model, io = golden.model(NAME).cuda(), golden.tensors("tiny_h48_d24")
    result = sample(model, io["xT"], io["y"], golden.sampling_config(NAME, "euler_cfg2_interval"))
    assert result.is_cuda
    assert relative_error(result.cpu(), io["sample.euler_cfg2_interval"]) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("settings", "states", "fields"),
    [
        ({"refresh_every": 3}, 2, 0),
        ({"refresh_every": 3, "guidance_scale": 1.0}, 1, 0),
        ({"refresh_every": 3, "guidance_interval": (0.951, 0.952)}, 1, 0),
        ({"refresh_every": 3, "state_forecast": "linear"}, 4, 0),
        ({"refresh_every": 3, "state_forecast": "quadratic", "guidance_every": 4}, 3, 1),
        ({"solver": "lms", "order": 3, "guidance_scale": 1.0}, 1, 2),
        ({"solver": "pec", "order": 3}, 2, 6),
    ],
)
def test_what_is_kept_is_what_the_plan_predicted(settings, states, fields, dtype):
    """Held modulations are two chunks more than six a decoder block, per token; a field is a float32 latent."""
    model = fused().to(dtype)
    sampler = Sampler(model, SamplingConfig(num_steps=12, **settings), 5, 8, 12)
    predicted = sampler.plan.cache_bytes(model.config, 8, 12, dtype)
    modulations = states * 24 * (6 * 2 + 2) * 48 * dtype.itemsize
    assert predicted == modulations + fields * 4 * 8 * 12 * 4
    draw = torch.randn(5, 4, 8, 12), torch.tensor([0, 1, 2, 3, 4])
    sampler(*draw)
    assert sampler.buffers.kept_bytes - sampler.buffers.conditions.nbytes == 5 * predicted
    assert sampler.buffers.kept_bytes >= needed_bytes(sampler.plan, model, 5, 8, 12)


def test_xl2_keeps_22_megabytes_a_state():
    plan = SamplingPlan.from_config(SamplingConfig(guidance_scale=1.0))
    assert plan.cache_bytes(PRESETS["xl2_256"].model, 32, 32, torch.bfloat16) / 1e6 == pytest.approx(22.4, abs=0.05)
    assert plan.cache_bytes(PRESETS["xl2_512"].model, 64, 64, torch.bfloat16) / 1e6 == pytest.approx(90, abs=0.5)


def test_encoder_modulations_are_computed_ahead_within_the_budget():
    """However few refreshes a budget holds, the samples are the same; distinct labels are computed once."""
    model = fused()
    config = SamplingConfig(num_steps=10, refresh_every=2)
    noise, labels = torch.randn(6, 4, 8, 8), torch.tensor([1, 1, 7, 1, 7, 7])
    rows = []
    condition = model.condition
    model.condition = lambda t, y, out=None: rows.append(len(y)) or condition(t, y, out)
    everything = Sampler(model, config, 6, 8, 8)
    expected = everything(noise, labels)
    assert rows == [5 * 3]
    rows.clear()
    least = needed_bytes(everything.plan, model, 6, 8, 8)
    within = Sampler(model, config, 6, 8, 8, memory_budget=least)
    assert relative_error(within(noise, labels), expected) < 1e-6  # another row count, another rounding of the GEMM
    assert rows == [2 * 3, 2 * 3, 3]
    with pytest.raises(ValueError, match=r"batches of 6 keep .* between steps, the memory budget is .* up to 5"):
        Sampler(model, config, 6, 8, 8, memory_budget=least - 1)
    for fits in (1, 3, 8):
        assert fitting_batch_size(within.plan, model, 8, 8, 8, needed_bytes(within.plan, model, fits, 8, 8)) == fits
    with pytest.raises(ValueError, match=r"one 8x8 sample keeps .* the memory budget is 10 bytes"):
        fitting_batch_size(within.plan, model, 8, 8, 8, 10)


def test_a_sampler_draws_one_batch_after_another_and_nothing_of_a_broken_one_reaches_the_next():
    model = golden.model(NAME)
    config = SamplingConfig(num_steps=8, solver="lms", order=4, refresh_every=2, state_forecast="quadratic")
    sampler = Sampler(model, config, 3, 8, 8)
    for count in (3, 1, 3):
        noise, labels = torch.randn(count, 4, 8, 8), torch.randint(0, 10, (count,))
        expected = sample(model, noise, labels, config)
        assert torch.equal(sampler(noise, labels), expected)
        assert not sampler(noise * float("nan"), labels).isfinite().any()
        assert torch.equal(sampler(noise, labels), expected)


def test_inference_mode_and_autocast_around_a_call_change_nothing():
    model = fused()
    sampler = Sampler(model, SamplingConfig(num_steps=2), 2, 8, 8)
    noise, labels = torch.randn(1, 4, 8, 8), torch.tensor([1])
    with torch.inference_mode():
        first = sampler(noise, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sampler(noise, labels), first)
    assert torch.equal(sampler(noise, labels), first)


@pytest.mark.slow
def test_two_compiled_samplers_stay_compiled(monkeypatch):
    """More kinds of calls than dynamo keeps by default; past that it would raise, or run eagerly."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    model = fused()
    config = SamplingConfig(
        num_steps=12, guidance_interval=(0.3, 0.8), refresh_every=4, state_forecast="linear", last_step=None
    )
    for count in (3, 2):
        noise, labels = torch.randn(count, 4, 8, 8), torch.arange(count)
        sampler = Sampler(copy.deepcopy(model), config, count, 8, 8, compile_model=True)
        assert sampler.engine == "eager, torch.compile"
        assert relative_error(sampler(noise, labels), sample(model, noise, labels, config)) < 1e-5


def test_best_refreshes_without_a_place_to_keep_them():
    config = SamplingConfig(num_steps=6, refresh_steps="dp", num_refreshes=2)
    sampler = Sampler(quantize_int8(fused()), config, 2, 8, 8)
    assert sum(step.cond.encode for step in sampler.plan.steps) == 2


IMAGE, LABELS = (4, 8, 8), torch.zeros(2).long()


@pytest.mark.parametrize(
    ("noise", "labels", "message"),
    [
        (torch.zeros(2, 3, 8, 8), LABELS, r"noise has shape \(2, 3, 8, 8\); expected \(B, 4, height, width\)"),
        (torch.zeros(2, 4, 9, 8), LABELS, "height is 9"),
        (torch.zeros(4, *IMAGE), torch.zeros(4).long(), "expected up to 3 samples of 8x8"),
        (torch.zeros(2, 4, 8, 12), LABELS, "expected up to 3 samples of 8x8"),
        (None, LABELS, "noise is NoneType; expected a tensor of floats"),
        (torch.zeros(2, *IMAGE), torch.zeros(3).long(), "labels are"),
        (torch.zeros(2, *IMAGE), [1, 1], "labels are a list; expected a tensor"),
        (torch.zeros(2, *IMAGE), torch.tensor([0, 10]), "labels run from 0 to 10; allowed: 0 to 9"),
        (torch.zeros(2, *IMAGE), LABELS, "0 generators for 2 samples; expected one each"),
    ],
)
def test_wrong_inputs_are_refused(noise, labels, message):
    sampler = Sampler(golden.model(NAME), SamplingConfig(num_steps=2, solver="sde"), 3, 8, 8)
    with pytest.raises(ValueError, match=message):
        sampler(noise, labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 10**9}, r"batches of 1000000000 keep .* the device has .* batches of up to"),
        ({"memory_budget": "8GiB"}, "memory_budget is '8GiB'; allowed: a whole number of bytes"),
        ({"height": 65536, "width": 65536}, "one 65536x65536 sample keeps .* between steps, the device has"),
        ({"compile_model": True}, "compile_model needs a FusedDDT"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with torch.device("meta"):
        model = DDT(golden.model_config(NAME))
    with pytest.raises(ValueError, match=message):
        Sampler(model, SamplingConfig(num_steps=2), **{"batch_size": 1, "height": 8, "width": 8, **arguments})
