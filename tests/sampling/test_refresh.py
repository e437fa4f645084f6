"""Encoder sharing: the search against brute force and the original's choices, the probe, and schedules on disk."""

import json
import os
import time
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import golden_data as golden
from ddt_fast.config import SamplingConfig
from ddt_fast.model import FusedDDT
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT
from ddt_fast.sampling import sample
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.sampling.refresh import probe, schedules
from ddt_fast.sampling.refresh.probe import Probe, probe_calls, probe_states
from ddt_fast.sampling.refresh.schedules import resolve_refresh_steps, schedule_cache_path
from ddt_fast.sampling.refresh.search import (
    _Costs,
    _search_triples,
    optimal_refresh_schedule,
    optimal_refresh_steps,
    step_errors,
    uniform_refresh_steps,
)
from ddt_fast.sampling.solvers import lagrange_weights

SHARING = "tiny_sharing_h32"
RUNS = ("sharing_dp4", "sharing_dp5")


def random_states(num_steps: int, seed: int) -> np.ndarray:
    """Unit vectors (T, 6) on a smooth random path, and a little noise."""
    random = np.random.default_rng(seed)
    t = np.linspace(0, 1, num_steps)[:, None]
    frequencies, phases = random.uniform(0, 6, (2, 6))
    states = np.cos(frequencies * t + phases) + 0.02 * random.standard_normal((num_steps, 6))
    return states / np.linalg.norm(states, axis=1, keepdims=True)


def random_probe(num_steps: int, seed: int) -> tuple[Probe, list[np.ndarray]]:
    """Uneven times, the similarity averaged over two tokens, and these tokens' unit states."""
    tokens = [random_states(num_steps, seed), random_states(num_steps, seed + 1000)]
    times = np.random.default_rng(seed).uniform(0.5, 1.5, num_steps).cumsum() / (1.5 * num_steps)
    return Probe(tuple(times), sum(states @ states.T for states in tokens) / 2), tokens


def every_schedule(num_steps: int, num_refreshes: int):
    return [(0, *rest) for rest in combinations(range(1, num_steps), num_refreshes - 1)]


def held_error(similarity: np.ndarray, refreshes: tuple[int, ...]) -> float:
    bounds = [*refreshes, len(similarity)]
    return sum(1 - similarity[k][start] for start, end in pairwise(bounds) for k in range(start, end))


@pytest.mark.parametrize("run", RUNS)
def test_search_makes_the_originals_choice(run):
    similarity = golden.tensors(SHARING)[f"similarity.{run}"]
    expected = tuple(golden.description(SHARING)["shared_steps"][run])
    assert optimal_refresh_steps(similarity, len(expected)) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.data())
def test_held_search_is_exact(num_steps, data):
    num_refreshes = data.draw(st.integers(1, num_steps))
    # Any matrix: neither symmetric nor of unit diagonal.
    matrix = np.random.default_rng(data.draw(st.integers(0, 10**6))).uniform(-1, 1, (num_steps, num_steps))
    found = optimal_refresh_steps(matrix, num_refreshes)
    best = min(held_error(matrix, choice) for choice in every_schedule(num_steps, num_refreshes))
    assert found in every_schedule(num_steps, num_refreshes)
    assert held_error(matrix, found) == pytest.approx(best, abs=1e-12)


def test_of_equal_schedules_the_earliest_is_taken():
    assert optimal_refresh_steps(np.ones((9, 9)), 4) == (0, 1, 2, 3)
    flat = Probe(tuple(np.arange(9) / 9), np.ones((9, 9)))
    assert optimal_refresh_schedule(flat, 4, "hold") == (0, 1, 2, 3)


def written_out(probed: Probe, states: list[np.ndarray], refreshes: tuple[int, ...], forecast: str, drift: float):
    """Step errors from the states themselves."""
    history = {"hold": 1, "linear": 2, "quadratic": 3}[forecast]
    errors = np.zeros(len(probed.times))
    for k, t in enumerate(probed.times):
        nodes = [step for step in refreshes if step <= k][-history:]
        weights = lagrange_weights([probed.times[node] for node in nodes], t)
        for token in states:
            forecast_state = sum(w * token[node] for w, node in zip(weights, nodes, strict=True))
            errors[k] += ((forecast_state - token[k]) ** 2).sum() / 2 / len(states)
        errors[k] += drift * (sum(w * w for w in weights) - 1)
    return errors


def uniform_drift(probed: Probe, states: list[np.ndarray], num_refreshes: int, forecast: str) -> float:
    uniform = uniform_refresh_steps(len(probed.times), num_refreshes)
    return 0.0 if forecast == "hold" else written_out(probed, states, uniform, forecast, 0.0).mean()


@pytest.mark.parametrize("forecast", ["hold", "linear", "quadratic"])
def test_step_errors_are_distances_of_unit_states_and_amplified_drift(forecast):
    probed, states = random_probe(12, 3)
    refreshes = (0, 2, 3, 7)
    errors = step_errors(probed, refreshes, forecast)
    drift = uniform_drift(probed, states, 4, forecast)
    np.testing.assert_allclose(errors, written_out(probed, states, refreshes, forecast, drift), atol=1e-12)
    assert (errors[list(refreshes)] < 1e-12).all()
    assert (np.delete(errors, refreshes) > 1e-4).all()
    if forecast == "hold":
        np.testing.assert_allclose(errors.sum(), held_error(probed.similarity, refreshes), atol=1e-12)


@pytest.mark.parametrize("forecast", ["hold", "linear", "quadratic"])
@settings(max_examples=20, deadline=None)
@given(num_steps=st.integers(1, 9), seed=st.integers(0, 10**6), data=st.data())
def test_forecast_search_is_exact(forecast, num_steps, seed, data):
    num_refreshes = data.draw(st.integers(1, num_steps))
    probed, states = random_probe(num_steps, seed)
    drift = uniform_drift(probed, states, num_refreshes, forecast)

    def total(refreshes: tuple[int, ...]) -> float:
        return written_out(probed, states, refreshes, forecast, drift).sum()

    found = optimal_refresh_schedule(probed, num_refreshes, forecast)
    choices = every_schedule(num_steps, num_refreshes)
    assert found in choices
    assert total(found) == pytest.approx(min(map(total, choices)), rel=1e-9, abs=1e-12)


def test_bounded_search_is_exact_within_its_bound():
    probed, states = random_probe(13, 5)
    longest = 4
    found = _search_triples(_Costs(probed, "quadratic"), 5, longest)
    allowed = [c for c in every_schedule(13, 5) if max(np.diff([*c, 13])) <= longest]
    best = min(written_out(probed, states, choice, "quadratic", 0.0).sum() for choice in allowed)
    assert found in allowed
    assert written_out(probed, states, found, "quadratic", 0.0).sum() == pytest.approx(best, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("forecast", ["hold", "linear", "quadratic"])
def test_the_published_length_is_searched_in_seconds(forecast):
    found = random_probe(250, 0)[0]
    started = time.perf_counter()
    steps = optimal_refresh_schedule(found, 42, forecast)
    assert time.perf_counter() - started < (1 if forecast == "hold" else 60)
    assert len(set(steps)) == 42
    chosen, even = (step_errors(found, s, forecast).sum() for s in (steps, uniform_refresh_steps(250, 42)))
    assert chosen < even


def test_uniform_steps_are_even_and_start_at_0():
    assert uniform_refresh_steps(12, 4) == (0, 3, 6, 9)
    for num_refreshes in range(1, 251):
        steps = uniform_refresh_steps(250, num_refreshes)
        gaps = np.diff([*steps, 250])
        assert len(steps) == num_refreshes
        assert steps[0] == 0
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("run", RUNS)
def test_probe_finds_the_originals_similarity(run, monkeypatch):
    io = golden.tensors(SHARING)
    monkeypatch.setattr(probe, "seeded_noise", lambda seeds, shape: (io[f"probe_noise.{run}"], []))
    monkeypatch.setattr(probe, "spread_labels", lambda *_: io[f"probe_labels.{run}"])
    found = probe_states(golden.model(SHARING), golden.sampling_config(SHARING, run), 8, 8)
    expected = io[f"similarity.{run}"].double().numpy()
    np.testing.assert_allclose(found.similarity, expected, atol=2e-6)
    assert found.times == pytest.approx(io[f"timesteps.{run}"][:-1].tolist())


SMALL = SamplingConfig(num_steps=6, guidance_scale=2.0, last_step=None)
DP = replace(SMALL, refresh_steps="dp", num_refreshes=3)


@pytest.fixture(scope="module")
def model():
    return golden.model(SHARING)


@pytest.fixture(scope="module")
def small(model):
    """The similarity of SMALL's probe."""
    return probe_states(model, SMALL, 8, 8).similarity


def test_probe_is_the_same_in_small_batches(model, small, monkeypatch):
    calls = []
    monkeypatch.setattr(probe, "_STATE_BYTES", 3 * 6 * 2 * 16 * 32 * 4)
    monkeypatch.setattr(probe, "_GRAM_BYTES", 5 * 6 * 32 * 8)
    parts = probe_states(model, SMALL, 8, 8, progress=lambda: calls.append(1))
    np.testing.assert_allclose(parts.similarity, small, atol=1e-7)
    assert len(calls) == probe_calls(model, SMALL, 8, 8) == 18


def test_probe_counts_the_branches_that_share(model, small):
    changes = ({"guidance_every": 3}, {"guidance_scale": 1.0})
    fresh, unguided = (probe_states(model, replace(SMALL, **change), 8, 8).similarity for change in changes)
    assert np.abs(small - fresh).max() > 1e-6
    assert np.abs(unguided - fresh).max() > 1e-6
    for similarity in (small, fresh, unguided):
        np.testing.assert_allclose(similarity.diagonal(), 1, atol=1e-12)
        np.testing.assert_allclose(similarity, similarity.T, atol=1e-12)
    shared = replace(DP, state_forecast="linear")
    np.testing.assert_array_equal(probe_states(model, shared, 8, 8).similarity, small)


@pytest.mark.parametrize("solver", ["euler", "lms", "pec", "sde"])
def test_probe_runs_every_solver_as_the_sampler_does(model, solver, monkeypatch):
    """The probe's last x, read where the model sees it, is the sampler's."""
    config = replace(SMALL, solver=solver)
    noise, generators = seeded_noise([0, 1, 2], (4, 8, 8))
    seen, expected = [], []
    labels = torch.tensor([0, 333, 666])
    sample(model, noise, labels, config, generators=generators, progress=lambda _, x: expected.append(x.clone()))
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda x, t, y: seen.append((x, int(y[0]))) or encode(x, t, y))
    probe_states(model, config, 8, 8, num_samples=3)
    conditional = [x for x, label in seen if label == 0]
    torch.testing.assert_close(conditional[-1], expected[-2], atol=1e-4, rtol=1e-4)


def broken_model():
    model = golden.model(SHARING)
    torch.nn.init.constant_(model.s_embedder.proj.bias, float("nan"))
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: optimal_refresh_steps(np.ones((3, 4)), 1), r"shape \(3, 4\); expected \(T, T\)"),
        (lambda _: optimal_refresh_steps(np.full((3, 3), np.nan), 1), "not finite"),
        (lambda _: optimal_refresh_steps(np.ones((3, 3)), 0), "num_refreshes is 0; allowed: 1 to 3"),
        (lambda _: optimal_refresh_steps(np.ones((3, 3)), 2.0), "num_refreshes is 2.0"),
        (lambda _: optimal_refresh_schedule(random_probe(3, 0)[0], 2, "cubic"), "forecast is 'cubic'; allowed: hold"),
        (lambda model: probe_states(model, SMALL, 8, 8, num_samples=0), "num_samples is 0"),
        (lambda model: probe_states(model, SMALL, 7, 8), r"height is 7; .* multiple of patch_size \(2\)"),
        (lambda _: probe_states(broken_model(), SMALL, 8, 8), "state of step 0 is not finite"),
    ],
)
def test_what_cannot_be_used_is_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def resolve(model, cache, config=DP):
    lines: list[str] = []
    return resolve_refresh_steps(model, config, 8, 8, cache, lines.append), lines


def test_schedules_are_probed_once_and_then_read(model, small, tmp_path):
    cache = tmp_path / "refresh_schedules.json"
    first, said = resolve(model, cache)
    assert first == replace(SMALL, refresh_steps=optimal_refresh_steps(small, 3))
    assert len(said) == 1
    for words in ("refresh at 3 of 6 steps (0, ", "uniform", "from a probe of"):
        assert words in said[0]
    variants = [DP, replace(DP, num_refreshes=2), replace(DP, state_forecast="linear"), replace(DP, guidance_scale=3.0)]
    found = [resolve(model, cache, config)[0] for config in variants]
    assert found[0] == first
    assert len(json.loads(cache.read_text())["schedules"]) == len(variants)
    for config, expected in zip(variants, found, strict=True):
        again, said = resolve(model, cache, config)
        assert again == expected
        assert said[0].endswith(f"from {cache}")
    assert [path.name for path in tmp_path.iterdir()] == ["refresh_schedules.json"]


def test_without_a_schedule_to_find_or_a_cache_nothing_is_kept(model, tmp_path):
    assert resolve(model, tmp_path / "c.json", SMALL) == (SMALL, [])
    first, said = resolve(model, None)
    assert "from a probe" in said[-1]
    (tmp_path / "file").touch()
    found, said = resolve(model, tmp_path / "file" / "c.json")
    assert found == first
    assert "could not be kept in" in said[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_another_process_stored_meanwhile_is_kept(model, tmp_path, monkeypatch):
    cache = tmp_path / "c.json"

    def probe_beside_another(*arguments, **settings):
        monkeypatch.setattr(schedules, "probe_states", probe_states)
        resolve(model, cache, replace(DP, num_refreshes=2))
        return probe_states(*arguments, **settings)

    monkeypatch.setattr(schedules, "probe_states", probe_beside_another)
    resolve(model, cache)
    assert len(json.loads(cache.read_text())["schedules"]) == 2


def entry(steps):
    return json.dumps({"schedules": {"KEY": {"refresh_steps": steps, "mean_error": 1, "mean_error_uniform": 1}}})


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", '{"schedules": 3}', '{"schedules": {"KEY": 3}}', "\x00\xff"),
        *map(entry, ([0, 1], [1, 2, 3], [0, 2, 99], "abc", None, [0, 1.5, 2])),
    ],
)
def test_a_malformed_cache_is_reported_and_rebuilt(model, small, tmp_path, content):
    cache = tmp_path / "c.json"
    cache.write_bytes(content.replace("KEY", schedules.schedule_key(model, DP, 8, 8)).encode("latin-1"))
    found, said = resolve(model, cache)
    assert found.refresh_steps == optimal_refresh_steps(small, 3)
    assert len(said) == 2
    assert str(cache) in said[0]
    assert "is not a" in said[0]
    assert "from a probe" in said[1]
    assert resolve(model, cache) == (found, [f"{said[1].split('; from')[0]}; from {cache}"])


def test_key_tells_models_and_settings_apart(model):
    def key(model=model, width=8, **changes):
        return schedules.schedule_key(model, replace(DP, **changes), 8, width)

    other = golden.model(SHARING)
    with torch.no_grad():
        other.blocks[1].mlp.w2.weight.mul_(1.001)
    keys = [
        *(key(), key(other), key(golden.model(SHARING).bfloat16()), key(width=16), key(num_refreshes=4)),
        *(key(state_forecast="linear"), key(timeshift=2.0), key(guidance_every=2)),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == key(golden.model(SHARING)) == key(FusedDDT.from_reference(model)) == key(cuda_graphs=True)
    assert keys[-1] == key(guidance_every=3, guidance_forecast="linear")


def test_where_the_cache_lies(tmp_path, monkeypatch):
    said: list[str] = []
    assert schedule_cache_path(tmp_path, said.append) == tmp_path / "refresh_schedules.json"
    beside = tmp_path / "model.ckpt.refresh_schedules.json"
    assert schedule_cache_path(tmp_path / "model.ckpt", said.append) == beside
    assert said == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = tmp_path / "cache" / "ddt_fast" / "refresh_schedules.json"
    assert schedule_cache_path(EMBEDDED_CHECKPOINT, said.append) == expected
    assert "belongs to the package" in said[0]
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert schedule_cache_path(tmp_path, said.append) == expected
    assert "cannot be written" in said[1]
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert schedule_cache_path(tmp_path, said.append) == tmp_path / ".cache" / "ddt_fast" / "refresh_schedules.json"
