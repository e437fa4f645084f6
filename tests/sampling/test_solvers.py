import math

import numpy as np
import pytest

import golden_data as golden
from ddt_fast.sampling.schedule import timesteps
from ddt_fast.sampling.solvers import (
    DIFFUSIONS,
    euler,
    euler_maruyama,
    lagrange_integrals,
    lagrange_weights,
    linear_multistep,
)


@pytest.mark.parametrize(("name", "run"), golden.sampling_runs())
def test_timesteps_equal_the_original(name, run):
    config = golden.sampling_config(name, run)
    expected = golden.tensors(name)[f"timesteps.{run}"].tolist()
    assert list(timesteps(config.num_steps, config.last_step, config.timeshift)) == expected


@pytest.mark.parametrize("run", ["lms2", "lms3_refresh2", "lms4"])
def test_multistep_weights_match_the_original(run):
    config = golden.sampling_config("tiny_h48_d24", run)
    times = timesteps(config.num_steps, config.last_step, config.timeshift)
    steps = linear_multistep(times, config.order)
    originals = golden.description("tiny_h48_d24")["lms_coeffs"][run]
    for i, (step, original) in enumerate(zip(steps, originals, strict=True)):
        ours = np.array(step.velocity_coefficients)[::-1] / (times[i + 1] - times[i])
        # The original integrates numerically in float32.
        np.testing.assert_allclose(ours, original, atol=5e-4)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_multistep_of_order_k_is_exact_for_polynomial_velocities_of_degree_below_k(order):
    times = [0.0, 0.1, 0.25, 0.3, 0.5, 0.8, 1.0]
    x, velocities = 0.0, []
    for i, step in enumerate(linear_multistep(times, order)):
        velocities.insert(0, order * times[i] ** (order - 1))
        if i < order - 1:
            x = times[i + 1] ** order
        else:
            x += sum(c * v for c, v in zip(step.velocity_coefficients, velocities, strict=False))
        assert len(step.velocity_coefficients) == min(order, i + 1)
    assert x == pytest.approx(1.0, abs=1e-12)


def test_lagrange_weights_interpolate_and_integrate():
    nodes = [0.1, 0.4, 0.6]
    values = [t**2 - t for t in nodes]
    at = lagrange_weights(nodes, 0.9)
    assert sum(w * v for w, v in zip(at, values, strict=True)) == pytest.approx(0.9**2 - 0.9)
    over = lagrange_integrals(nodes, 0.2, 0.7)
    exact = (0.7**3 - 0.2**3) / 3 - (0.7**2 - 0.2**2) / 2
    assert sum(w * v for w, v in zip(over, values, strict=True)) == pytest.approx(exact)
    with pytest.raises(ValueError, match="5 nodes"):
        lagrange_integrals([0, 1, 2, 3, 4], 0, 1)


@pytest.mark.parametrize("diffusion", list(DIFFUSIONS))
def test_sde_keeps_the_marginals_of_the_ode(diffusion):
    """For N(0.5, 0.2^2) data the velocity is known in closed form; mean and spread at t = 1 must be the data's."""
    mean, spread = 0.5, 0.2
    rng = np.random.default_rng(0)
    x = rng.standard_normal(20_000)
    times = timesteps(400, None, 1.0)
    for t, step in zip(times, euler_maruyama(times, DIFFUSIONS[diffusion]), strict=False):
        variance = (t * spread) ** 2 + (1 - t) ** 2
        data = mean + t * spread**2 / variance * (x - t * mean)
        noise = (1 - t) / variance * (x - t * mean)
        x = step.x_coefficient * x + step.velocity_coefficients[0] * (data - noise)
        if step.noise_coefficient:
            x = x + step.noise_coefficient * rng.standard_normal(x.shape)
    assert x.mean() == pytest.approx(mean, abs=0.01)
    assert x.std() == pytest.approx(spread, rel=0.05)


def test_sde_with_zero_diffusion_is_euler_and_its_last_step_is_without_noise():
    times = timesteps(5)
    assert euler_maruyama(times, lambda t: 0.0) == euler(times)
    noises = [step.noise_coefficient for step in euler_maruyama(times, lambda t: 2.0)]
    assert noises[-1] == 0
    assert noises[0] == pytest.approx(math.sqrt(2 * 0.2))


def test_timeshift_moves_steps_to_the_noise_and_keeps_the_ends():
    plain, shifted = timesteps(10), timesteps(10, timeshift=3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert all(s < p for s, p in zip(shifted[1:-1], plain[1:-1], strict=True))
    assert timesteps(1) == (0.0, 1.0)


@pytest.mark.parametrize("settings", [(50, None, 1e-9), (50, None, 1e300), (50, 1e-9, 1.0)])
def test_times_that_coincide_are_refused(settings):
    with pytest.raises(ValueError, match=r"timeshift .* and last_step .* leave some of 50 steps no time"):
        timesteps(*settings)
