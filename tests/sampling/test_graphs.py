"""Captured steps give the eager result, bit for bit, for every kind of plan: recorded graphs here, real on CUDA."""

from dataclasses import replace

import pytest
import torch

import golden_data as golden
from ddt_fast.config import SamplingConfig
from ddt_fast.model import FusedDDT
from ddt_fast.sampling import Sampler
from ddt_fast.sampling.engine import StopSampling
from ddt_fast.sampling.graphs import CapturedSteps
from ddt_fast.sampling.noise import seeded_noise
from recorded_graphs import RecordedGraph, play_graphs

PLANS = {
    "as published": {},
    "shared": {"refresh_every": 3},
    "uneven": {"refresh_steps": (0, 1, 4, 9)},
    "linear": {"refresh_every": 3, "state_forecast": "linear"},
    "quadratic": {"refresh_every": 2, "state_forecast": "quadratic", "guidance_interval": (0.5, 0.9)},
    "rare guidance": {"refresh_every": 2, "guidance_every": 3},
    "forecasts": {"refresh_every": 3, "state_forecast": "linear", "guidance_every": 3, "guidance_forecast": "linear"},
    "multistep": {"solver": "lms", "order": 3, "refresh_every": 2},
    "corrected": {"solver": "pec", "order": 3, "guidance_interval": (0.3, 0.8)},
    "corrected, shared": {
        **{"solver": "pec", "refresh_every": 2, "state_forecast": "quadratic"},
        **{"guidance_every": 2, "guidance_interval": (0.0, 1.0)},
    },
    "stochastic": {"solver": "sde"},
    "unguided": {"guidance_scale": 1.0, "refresh_every": 4},
}


def model_on(device: str, kind: type) -> torch.nn.Module:
    reference = golden.model("tiny_h48_d24")
    return (reference if kind is golden.DDT else FusedDDT.from_reference(reference)).to(device)


def draw(sampler: Sampler, seeds: range) -> torch.Tensor:
    noise, generators = seeded_noise(seeds, (4, 8, 8))
    return sampler(noise, torch.tensor([seed % 10 for seed in seeds]), generators=generators)


def captured_on_cpu(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> CapturedSteps:
    """Does on a CPU what a Sampler with cuda_graphs does on CUDA."""
    buffers = play_graphs(monkeypatch)
    buffers += [value for value in vars(sampler.buffers).values() if isinstance(value, torch.Tensor)]
    captured = sampler._capture()
    sampler._execute, sampler.fixed_shape = captured, True
    return captured


@pytest.fixture
def stand_in_gpu(monkeypatch):
    """A CPU that a Sampler takes for a GPU, with recorded graphs."""
    play_graphs(monkeypatch)
    monkeypatch.setattr("ddt_fast.sampling.engine.on_gpu", lambda device: True)


def test_graphs_are_the_default_on_a_gpu_and_can_be_turned_off(stand_in_gpu):
    model, config = model_on("cpu", FusedDDT), SamplingConfig(num_steps=4, refresh_every=2)
    engines = [Sampler(model, replace(config, cuda_graphs=given), 3, 8, 8).engine for given in (None, True, False)]
    assert engines == ["CUDA graphs", "CUDA graphs", "eager"]


def test_a_capture_that_fails_is_a_warning_and_the_same_images(stand_in_gpu, monkeypatch):
    model, config = model_on("cpu", FusedDDT), SamplingConfig(num_steps=6, refresh_every=2, solver="lms")
    eager = Sampler(model, replace(config, cuda_graphs=False), 3, 8, 8)
    current, streams = object(), []

    class Graph:
        def __init__(self, *args, **options): ...

        def __enter__(self): ...

        def __exit__(self, *args):
            raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    message = r"cannot be captured \(CUDA error: .* capturing\); sampling eagerly"
    with pytest.warns(UserWarning, match=message) as warned:
        failed = Sampler(model, config, 3, 8, 8)
    assert len(warned) == 1
    assert (failed.engine, failed.capture_seconds, failed.fixed_shape) == ("eager", 0.0, False)
    assert streams == [current], "the failed capture's stream is left"
    for seeds in (range(3), range(2)):
        assert torch.equal(draw(failed, seeds), draw(eager, seeds))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [*((name, FusedDDT) for name in PLANS), ("forecasts", golden.DDT)])
def test_replayed_graphs_equal_eager_steps(name, kind, monkeypatch):
    config = SamplingConfig(num_steps=11, last_step=None, **PLANS[name])
    model = model_on("cpu", kind)
    eager, graphs = (Sampler(model, config, 3, 8, 8) for _ in range(2))
    captured = captured_on_cpu(graphs, monkeypatch)
    assert len(captured.graphs) == len(set(graphs.kinds)) < len(graphs.kinds)
    for seeds in (range(3), range(7, 10)):
        assert torch.equal(draw(graphs, seeds), draw(eager, seeds))


def test_a_smaller_batch_is_filled_up_and_captures_nothing(monkeypatch):
    config = SamplingConfig(num_steps=6, refresh_every=2)
    model = model_on("cpu", FusedDDT)
    graphs, eager = (Sampler(model, config, 4, 8, 8) for _ in range(2))
    captured = captured_on_cpu(graphs, monkeypatch)
    recorded = {kind: len(graph.calls) for kind, graph in captured.graphs.items()}
    whole = draw(eager, range(4))
    assert torch.equal(draw(graphs, range(2)), whole[:2])
    assert torch.equal(draw(graphs, range(4)), whole)
    assert {kind: len(graph.calls) for kind, graph in captured.graphs.items()} == recorded


def test_between_replays_as_between_eager_steps_x_may_be_changed_and_the_run_ended(monkeypatch):
    config = SamplingConfig(num_steps=8, refresh_every=2, solver="lms")
    model = model_on("cpu", FusedDDT)
    graphs, eager = Sampler(model, config, 3, 8, 8), Sampler(model, config, 2, 8, 8)
    captured_on_cpu(graphs, monkeypatch)
    noise, labels = seeded_noise(range(2), (4, 8, 8))[0], torch.tensor([1, 2])

    def results(sampler):
        def halve(done, x):
            if done == 3:
                x.mul_(0.5)

        def stop(done, _x):
            if done == 5:
                raise StopSampling

        return [sampler(noise, labels, progress=progress) for progress in (halve, stop, None)]

    expected = results(eager)
    assert not torch.equal(expected[0], expected[2])
    seen = []
    eager(noise, labels, progress=lambda _, x: seen.append(x.clone()))
    assert torch.equal(expected[1], seen[4])
    assert all(torch.equal(*pair) for pair in zip(results(graphs), expected, strict=True))


def test_a_plan_has_few_kinds_of_steps():
    fast = SamplingConfig(refresh_every=6, state_forecast="linear", guidance_every=10, guidance_forecast="linear")
    model = golden.model("tiny_h48_d24")
    assert len(set(Sampler(model, SamplingConfig(), 1, 8, 8).kinds)) == 2
    assert len(set(Sampler(model, SamplingConfig(refresh_every=6), 1, 8, 8).kinds)) <= 6
    assert len(set(Sampler(model, fast, 1, 8, 8).kinds)) <= 12


def test_recorded_graphs_notice_what_real_ones_would():
    """The stand-in itself: a number from Python is frozen, a tensor read on the host is refused."""
    x, out, factor = torch.ones(2), torch.zeros(2), 2.0
    graph = RecordedGraph()
    with graph:
        out.copy_(x[:1] * factor)
    factor = 5.0
    x.fill_(3)
    graph.replay()
    assert out.tolist() == [6.0, 6.0]
    with pytest.raises(AssertionError, match="_local_scalar_dense"), RecordedGraph():
        x[0].item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [golden.DDT, FusedDDT])
@pytest.mark.parametrize("name", PLANS)
def test_cuda_graphs_equal_the_eager_result(name, kind, dtype):
    settings = {"num_steps": 11, "last_step": None, **PLANS[name]}
    model = model_on("cuda", kind).to(dtype)
    eager = draw(Sampler(model, SamplingConfig(**settings), 3, 8, 8), range(3))
    graphs = Sampler(model, SamplingConfig(**settings, cuda_graphs=True), 3, 8, 8)
    assert graphs.engine == "CUDA graphs"
    assert graphs.capture_seconds > 0
    for _ in range(2):
        assert torch.equal(draw(graphs, range(3)), eager)


@pytest.mark.gpu
def test_cuda_graphs_allocate_nothing_while_replaying():
    config = SamplingConfig(num_steps=12, refresh_every=3, state_forecast="linear", cuda_graphs=True)
    sampler = Sampler(model_on("cuda", FusedDDT), config, 4, 8, 8)
    draw(sampler, range(4))
    sampler.buffers.rewind()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    for kind in sampler.kinds:
        sampler._execute(kind)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations
