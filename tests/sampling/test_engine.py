"""`sample` against the original's runs, and its rules: one seed one image, exact savings, refused inputs."""

from dataclasses import replace

import pytest
import torch

import golden_data as golden
from ddt_fast.config import SamplingConfig
from ddt_fast.generation.seeds import seeded_noise
from ddt_fast.sampling import SamplingPlan, sample
from ddt_fast.sampling.schedule import timesteps
from golden_data import relative_error


@pytest.mark.parametrize(("name", "run"), golden.sampling_runs())
def test_samples_match_the_original(name, run):
    io = golden.tensors(name)
    result = sample(golden.model(name), io["xT"], io["y"], golden.sampling_config(name, run))
    assert relative_error(result, io[f"sample.{run}"]) < 1e-4


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


@pytest.mark.parametrize("forecast", ["hold", "linear", "quadratic"])
@pytest.mark.parametrize("refresh", [{"refresh_every": 4}, {"refresh_steps": (0, 2, 3, 9)}, {"refresh_every": 1}])
def test_left_out_evaluations_do_not_change_the_sample(forecast, refresh):
    """Includes segments that begin unguided and end guided: t = 0.3 lies inside one."""
    model, io = golden.model("tiny_h48_d24"), golden.tensors("tiny_h48_d24")
    # An extrapolated unconditional state needs earlier ones, which only a guided start makes.
    interval = (0.3, 1.0) if forecast == "hold" else (0.0, 1.0)
    config = SamplingConfig(
        num_steps=14,
        last_step=None,
        guidance_scale=3.0,
        guidance_interval=interval,
        state_forecast=forecast,
        **refresh,
    )
    with torch.no_grad():
        expected = evaluate_everything(model, io["xT"], io["y"], config)
    assert relative_error(sample(model, io["xT"], io["y"], config), expected) < 1e-5


def test_forecasts_are_nearer_to_the_truth_than_holding():
    model, io = golden.model("tiny_h48_d24"), golden.tensors("tiny_h48_d24")
    config = SamplingConfig(num_steps=60, last_step=None)
    truth = sample(model, io["xT"], io["y"], config)

    def error(**settings) -> float:
        return relative_error(sample(model, io["xT"], io["y"], replace(config, **settings)), truth)

    assert 0 < error(refresh_every=4, state_forecast="linear") < error(refresh_every=4) / 2
    assert 0 < error(guidance_every=6, guidance_forecast="linear") < error(guidance_every=6) / 2


@pytest.mark.parametrize("solver", ["euler", "sde"])
def test_one_seed_one_image_whatever_the_batch(solver):
    model = golden.model("tiny_h48_d24")
    config = SamplingConfig(num_steps=6, solver=solver)
    labels = torch.tensor([1, 2, 3, 4, 5])

    def draw(part: slice) -> torch.Tensor:
        noise, generators = seeded_noise(range(5)[part], (4, 8, 8))
        return sample(model, noise, labels[part], config, generators=generators)

    together = draw(slice(None))
    apart = torch.cat([draw(slice(0, 1)), draw(slice(1, 3)), draw(slice(3, 5))])
    assert relative_error(apart, together) < 1e-5
    assert relative_error(draw(slice(0, 1)), together[1:2]) > 0.1


def test_noise_is_the_seed_s_own():
    noise, _ = seeded_noise([7, 3], (4, 8, 8))
    assert torch.equal(noise[1], torch.randn((4, 8, 8), generator=torch.Generator("cpu").manual_seed(3)))


def test_samples_may_be_trained_on():
    model, io = golden.model("tiny_h48_d24"), golden.tensors("tiny_h48_d24")
    result = sample(model, io["xT"], io["y"], SamplingConfig(num_steps=2))
    model(result, io["t"], io["y"])[0].sum().backward()
    assert model.x_embedder.proj.weight.grad.isfinite().all()


def test_progress_sees_every_step_and_the_result():
    model, io = golden.model("tiny_h48_d24"), golden.tensors("tiny_h48_d24")
    seen = []
    config = SamplingConfig(num_steps=3)
    result = sample(model, io["xT"], io["y"], config, progress=lambda i, x: seen.append((i, x)))
    assert [i for i, _ in seen] == [1, 2, 3]
    assert torch.equal(seen[-1][1], result)


def test_cuda_graphs_without_cuda_warn_and_sample_eagerly():
    model, io = golden.model("tiny_h48_d24"), golden.tensors("tiny_h48_d24")
    config = SamplingConfig(num_steps=3)
    with pytest.warns(UserWarning, match="cuda_graphs asked for, but .* sampling eagerly"):
        result = sample(model, io["xT"], io["y"], replace(config, cuda_graphs=True))
    assert torch.equal(result, sample(model, io["xT"], io["y"], config))


@pytest.mark.gpu
def test_cuda_matches_the_cpu():
    model, io = golden.model("tiny_h48_d24").cuda(), golden.tensors("tiny_h48_d24")
    result = sample(model, io["xT"], io["y"], golden.sampling_config("tiny_h48_d24", "euler_cfg2_interval"))
    assert result.is_cuda
    assert relative_error(result.cpu(), io["sample.euler_cfg2_interval"]) < 1e-3


@pytest.mark.parametrize(
    ("noise", "labels", "settings", "message"),
    [
        (torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), {}, "noise has shape"),
        (torch.zeros(0, 4, 8, 8), torch.zeros(0).long(), {}, "noise has shape"),
        (torch.zeros(2, 4, 9, 8), torch.zeros(2).long(), {}, "height is 9"),
        (torch.zeros(2, 4, 8, 8), torch.zeros(3).long(), {}, "labels are"),
        (torch.zeros(2, 4, 8, 8), torch.zeros(2), {}, "labels are"),
        (torch.zeros(2, 4, 8, 8), torch.tensor([0, 10]), {}, "labels run from 0 to 10; allowed: 0 to 9"),
        (torch.zeros(2, 4, 8, 8), torch.tensor([-1, 3]), {}, "labels run from -1"),
        (torch.zeros(2, 4, 8, 8), torch.zeros(2).long(), {"solver": "sde"}, "0 generators for 2 samples"),
    ],
)
def test_wrong_inputs_are_refused(noise, labels, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(golden.model("tiny_h48_d24"), noise, labels, SamplingConfig(num_steps=3, **settings))
