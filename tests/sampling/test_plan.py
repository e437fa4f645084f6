"""The solvers' steps, and the plan of a run: which parts of the network are evaluated at which step."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import golden_data as golden
from ddt_fast.config import SamplingConfig
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import SamplingPlan
from ddt_fast.sampling.schedule import timesteps
from ddt_fast.sampling.solvers import (
    DIFFUSIONS,
    corrected_multistep,
    euler,
    euler_maruyama,
    lagrange_integrals,
    lagrange_weights,
    linear_multistep,
)

XL2 = PRESETS["xl2_256"]


def plan(**settings) -> SamplingPlan:
    return SamplingPlan.from_config(replace(XL2.sampling, **settings))


def test_published_default_needs_422_evaluations_instead_of_500():
    published = plan()
    assert len(published.steps) == 250
    assert published.network_evaluations == published.encoder_evaluations == 422
    assert sum(step.guided for step in published.steps) == 172
    assert published.state_history == 1


@pytest.mark.parametrize(
    ("settings", "tflop"),
    [
        ({"refresh_every": 2}, 66),
        ({"refresh_every": 6}, 36.5),
        ({"refresh_every": 10}, 30.5),
        ({"refresh_every": 6, "guidance_every": 10}, 26.3),
        ({"refresh_every": 10, "guidance_every": 10}, 22.7),
    ],
)
def test_flops_of_xl2_at_256_pixels(settings, tflop):
    assert plan(**settings).flops(XL2.model, 32, 32) / 1e12 == pytest.approx(tflop, abs=0.25)


def test_no_guidance_means_no_unconditional_branch():
    unguided = plan(guidance_scale=1.0, refresh_every=4)
    assert unguided.network_evaluations == 250
    assert all(step.uncond is None and not step.guided for step in unguided.steps)
    assert unguided.difference_history == 0


# The bounds of an interval are strict, in float32: linspace(0, 10/11, 11) is i / 11, and 0.3 < i / 11 < 0.6.
INSIDE = {"num_steps": 11, "last_step": None, "guidance_interval": (0.3, 0.6)}
ON_BOUNDS = {"num_steps": 10, "last_step": 0.1, "guidance_interval": (0.3, 0.6)}
BEGINS_UNGUIDED = {"num_steps": 10, "last_step": 0.1, "refresh_every": 5, "guidance_interval": (0.25, 1.0)}
SEGMENTS_UNGUIDED = {"num_steps": 12, "last_step": 1 / 12, "refresh_every": 3, "guidance_interval": (0.55, 0.8)}


@pytest.mark.parametrize(
    ("settings", "branch", "encoded", "decoded"),
    [
        (INSIDE, "uncond", [4, 5, 6], [4, 5, 6]),
        (ON_BOUNDS, "uncond", [4, 5], [4, 5]),
        (BEGINS_UNGUIDED, "uncond", [0, 5], [3, 4, 5, 6, 7, 8, 9]),
        (SEGMENTS_UNGUIDED, "uncond", [6, 9], [7, 8, 9]),
        ({"num_steps": 10, "refresh_steps": (0, 1, 7), "guidance_scale": 1.0}, "cond", [0, 1, 7], list(range(10))),
    ],
)
def test_where_a_branch_is_evaluated(settings, branch, encoded, decoded):
    """A segment that begins unguided and ends guided encodes at its start; one without a guided step never does."""
    branches = [getattr(step, branch) for step in plan(**settings).steps]
    assert [i for i, one in enumerate(branches) if one and one.encode] == encoded
    assert [i for i, one in enumerate(branches) if one and one.decode] == decoded
    if branch == "uncond":
        assert [i for i, step in enumerate(plan(**settings).steps) if step.guided] == decoded


def test_forecast_weights_follow_the_line_and_the_parabola_through_the_last_states():
    settings = {"num_steps": 10, "last_step": 0.1, "refresh_every": 3, "guidance_scale": 1.0}
    linear = plan(**settings, state_forecast="linear")
    assert linear.state_history == 2
    assert linear.steps[2].cond.state_weights == (1.0,)
    assert linear.steps[3].cond.state_weights == (1.0,)
    assert linear.steps[5].cond.state_weights == pytest.approx((5 / 3, -2 / 3), abs=1e-6)
    quadratic = plan(**settings, state_forecast="quadratic")
    assert quadratic.state_history == 3
    assert quadratic.steps[5].cond.state_weights == pytest.approx((5 / 3, -2 / 3), abs=1e-6)
    # Nodes 6, 3, 0 at 7: (7·4)/(3·6), (1·7)/(3·-3), (1·4)/(-6·-3).
    assert quadratic.steps[7].cond.state_weights == pytest.approx((14 / 9, -7 / 9, 2 / 9), abs=1e-5)


def test_rare_guidance_evaluates_a_fresh_unconditional_branch():
    sparse = plan(num_steps=20, last_step=0.05, refresh_every=4, guidance_every=3, guidance_forecast="linear")
    guided = [i for i, step in enumerate(sparse.steps) if step.guided]
    evaluated = [i for i, step in enumerate(sparse.steps) if step.uncond is not None]
    assert evaluated == guided[::3]
    for i in evaluated:
        assert sparse.steps[i].uncond.encode
        assert sparse.steps[i].uncond.decode
    # Steps of 0.05 at guidance 2.
    differences = [step.coefficients.difference_coefficients for step in sparse.steps]
    assert all(differences[i] == pytest.approx((0.05,), abs=1e-6) for i in evaluated)
    assert differences[evaluated[0] + 1] == pytest.approx((0.05,), abs=1e-6)
    assert differences[evaluated[1] + 1] == pytest.approx((0.05 * 4 / 3, -0.05 / 3), abs=1e-6)


configs = st.builds(
    SamplingConfig,
    num_steps=st.integers(3, 40),
    guidance_scale=st.sampled_from([1.0, 2.0, 4.0]),
    guidance_interval=st.sampled_from([(0.0, 1.0), (0.3, 1.0), (0.2, 0.5)]),
    timeshift=st.sampled_from([0.5, 1.0, 3.0]),
    last_step=st.sampled_from([None, 0.04, 0.5]),
    solver=st.sampled_from(["euler", "lms", "pec", "sde"]),
    order=st.integers(1, 3),
    refresh_every=st.integers(1, 50),
    state_forecast=st.sampled_from(["hold", "linear", "quadratic"]),
    guidance_every=st.integers(1, 12),
    guidance_forecast=st.sampled_from(["hold", "linear"]),
)


@given(configs)
def test_every_plan_can_be_executed(config):
    """What a step reads was made before, histories suffice, weights sum to one, velocities to the step's length."""
    built = SamplingPlan.from_config(config)
    states = {"cond": 0, "uncond": 0}
    differences = 0
    for i, step in enumerate(built.steps):
        for name, branch in (("cond", step.cond), ("uncond", step.uncond)):
            if branch is None:
                continue
            states[name] += branch.encode
            if branch.decode:
                assert len(branch.state_weights) <= min(states[name], built.state_history)
                assert sum(branch.state_weights) == pytest.approx(1, abs=1e-6)
        evaluated = step.uncond is not None and step.uncond.decode
        differences += evaluated
        if built.cached_branches == 2 and step.uncond is not None:  # refreshed together
            assert step.uncond.encode == step.cond.encode
            assert not step.uncond.decode or step.uncond.state_weights == step.cond.state_weights
        assert step.cond.decode
        c = step.coefficients
        assert len(c.velocity_coefficients) <= min(i, built.velocity_history) + 1
        assert len(c.difference_coefficients) <= min(differences, built.difference_history + evaluated)
        assert max(len(c.velocity_coefficients), len(c.difference_coefficients)) <= 4
        if config.solver != "sde":
            length = (*(step.t for step in built.steps), 1.0)[i + 1] - step.t
            assert sum(c.velocity_coefficients) == pytest.approx(length, abs=1e-6)
            if config.solver == "pec" and step.guided:
                assert sum(c.difference_coefficients) == pytest.approx((config.guidance_scale - 1) * length, abs=1e-6)
    assert built.encoder_evaluations <= built.network_evaluations + states["uncond"]
    assert built.network_evaluations <= 2 * config.num_steps


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


def corrected(times, order):
    always = [True] * (len(times) - 1)
    return corrected_multistep(times, order, always, always)


@pytest.mark.parametrize(("order", "factor"), [(1, 3.7), (2, 7), (3, 4)])
def test_half_the_step_divides_the_error_of_pec_and_a_linear_velocity_is_exact(order, factor):
    """On x' = x from x(0) = 1, with uneven steps; the third order's errors are 1e-7 there, and change sign."""

    def end(count: int) -> float:
        times = [(i / count) ** 1.3 for i in range(count + 1)]
        x, velocities = 1.0, []
        for row in corrected(times, order):
            velocities.insert(0, x)
            x += sum(c * v for c, v in zip(row, velocities, strict=False))
        return x

    coarse, fine = (abs(end(count) - math.e) for count in (80, 160))
    assert coarse > factor * fine
    assert coarse < (1e-3, 1e-5, 2e-7)[order - 1]
    times = [0.0, 0.1, 0.25, 0.3, 0.5, 0.8, 1.0]
    x = sum(c * times[i - k] for i, row in enumerate(corrected(times, max(order, 2))) for k, c in enumerate(row))
    assert x == pytest.approx(0.5, abs=1e-12)


def test_rows_of_pec_by_hand():
    """Even steps of 1: Adams-Bashforth (3/2, -1/2), Adams-Moulton (5, 8, -1) / 12."""
    rows = corrected([0, 1, 2, 3, 4], 2)
    assert rows[0] == pytest.approx((1,))
    assert rows[1] == pytest.approx((3 / 2 + 1 / 2, -1 / 2 + 1 / 2 - 1))
    assert rows[2] == pytest.approx((3 / 2 + 5 / 12, -1 / 2 + 8 / 12 - 3 / 2, -1 / 12 + 1 / 2))
    assert rows[3] == pytest.approx(rows[2])
    # Evaluated at every second step and used from step 1 on: step 1 waits for the correction of step 3.
    rows = corrected_multistep([0, 1, 2, 3, 4, 5], 2, [i in (1, 3) for i in range(5)], [i > 0 for i in range(5)])
    assert rows[:3] == [(), pytest.approx((1,)), pytest.approx((1,))]
    # Steps 1 and 2 with the line through times 1 and 3, and the prediction of step 3 with the same line.
    assert rows[3] == pytest.approx((1 + 5 / 4, 1 - 2 - 1 / 4))
    assert rows[4] == pytest.approx((7 / 4, -3 / 4))


def test_pec_does_not_extrapolate_through_values_of_nearly_one_time():
    """A guidance interval of 1e-5 makes a step as short; its rounding errors would be magnified 30,000 times."""
    rows = corrected([0, 1, 1.00001, 2, 3], 3)
    assert rows[2] == pytest.approx((0.99999, 0, 0), abs=2e-5)  # Euler
    assert rows[3] == pytest.approx((3 / 2 + 1 / 2, -1 / 2 + 1 / 2 - 1), abs=2e-5)  # as after a first step
    for interval in ((0.3, 0.30001), (0.3, 0.3000001), (1e-6, 1.0), (0.0, 0.999999)):
        built = plan(num_steps=8, solver="pec", guidance_interval=interval, guidance_scale=2.0)
        steps = [step.coefficients for step in built.steps]
        assert max(abs(c) for step in steps for c in step.velocity_coefficients) < 1
        assert sum(sum(step.velocity_coefficients) for step in steps) == pytest.approx(1, abs=1e-9)
        width = np.diff(np.float64(np.float32(interval))).item()
        assert sum(sum(step.difference_coefficients) for step in steps) == pytest.approx(width, abs=1e-9)


def test_pec_divides_the_times_at_the_bounds_of_guidance():
    parts = {(0.3, 1.0): [4, 17], (0.3, 0.8): [4, 12, 5], (0.0, 1.0): [21], (0.0, 0.5): [11, 10]}
    for interval, counts in parts.items():
        built = plan(num_steps=21, solver="pec", guidance_interval=interval)
        times = np.array([*(step.t for step in built.steps), 1.0])
        bounds = sorted({0.0, *np.float32(interval).tolist(), 1.0})
        assert set(bounds) <= set(times.tolist())
        assert np.histogram(times[:-1], [*bounds[:-1], 1.0])[0].tolist() == counts
        low, high = np.float32(interval)
        assert [step.guided for step in built.steps] == [low <= t < high for t in times[:-1]]
        lengths = np.diff(times)
        ordinary = lengths[-3]
        assert lengths[-2:] == pytest.approx(np.array([0.55, 0.35]) * ordinary, abs=1e-6)
        first = built.steps.index(next(step for step in built.steps if step.guided))
        assert lengths[first] == pytest.approx(0.8 * lengths[first + 1], abs=1e-6)
        # The differences' history begins at the bound; that of the velocities does not.
        assert len(built.steps[first].coefficients.difference_coefficients) == 1
        assert len(built.steps[first].coefficients.velocity_coefficients) == min(first + 1, 3)


def test_pec_with_timeshift_keeps_the_bounds_and_too_few_steps_are_refused():
    shifted = [step.t for step in plan(num_steps=10, solver="pec", timeshift=3.0).steps]
    assert np.float32(0.3) in np.float32(shifted)
    even = [step.t for step in plan(num_steps=10, solver="pec").steps]
    assert sum(t < 0.3 for t in shifted) > sum(t < 0.3 for t in even)
    with pytest.raises(ValueError, match="num_steps is 2; expected 3 or more, one for each part of the times"):
        plan(num_steps=2, solver="pec", guidance_interval=(0.3, 0.8))
    with pytest.raises(ValueError, match=r"timeshift 1e-12 and guidance_interval .* leave some of 9 steps no time"):
        plan(num_steps=9, solver="pec", timeshift=1e-12)


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
