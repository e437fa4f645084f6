"""Drawing, and what happens beside it: decoding, conversion, errors of the background thread."""

import threading
import time

import numpy as np
import pytest
import torch

from ddt_fast.config import DataConfig, SamplingConfig
from ddt_fast.generation.background import Background, PixelConverter
from ddt_fast.generation.engine import LoadedEngine
from ddt_fast.generation.folder import JobFolder
from ddt_fast.generation.images import to_uint8
from ddt_fast.generation.job import Job
from ddt_fast.generation.npz import open_images
from ddt_fast.generation.seeds import Assignment, assign_labels
from ddt_fast.generation.settings import Engine, Outputs
from ddt_fast.model.reference import DDT
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT, read_experiment
from ddt_fast.model.weights import load_model
from ddt_fast.presets import PRESETS
from ddt_fast.ranks import Ranks
from ddt_fast.sampling import sample
from ddt_fast.sampling.noise import seeded_noise


class Colours:
    """Stands for a VAE's decoder: three channels, twice the side; remembers who called it with how many."""

    batch_size = 2
    precision = "float32"

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        self.calls.append((threading.current_thread().name, len(latents)))
        return torch.cat([latents, -latents, latents / 2], 1).repeat_interleave(2, 2).repeat_interleave(2, 3)


def job(folder, model, sampling, assignment, batch_size, decode=None) -> Job:
    outputs = Outputs(num_png=0, shard_size=8)
    engine = LoadedEngine(model, sampling, DataConfig(), (8, 8), batch_size, "model", decode, Engine(), {})
    return Job(assignment, engine, JobFolder(folder, {}, len(assignment), 8, outputs, Ranks()))


@pytest.mark.slow
def test_images_are_the_decoded_samples_of_their_seeds(tmp_path):
    model, config = load_model(EMBEDDED_CHECKPOINT), read_experiment(EMBEDDED_CHECKPOINT).sampling
    assignment = Assignment.of_draws(assign_labels(20, 10), range(20), shuffle=True)
    decode = Colours()
    running = job(tmp_path, model, config, assignment, 5, decode)
    running.run()
    running.finish()
    noise, _ = seeded_noise(assignment.seeds.tolist(), (1, 8, 8))
    labels = torch.from_numpy(assignment.labels)
    direct = torch.cat([sample(model, noise[i : i + 5], labels[i : i + 5], config) for i in range(0, 20, 5)])
    images = open_images(tmp_path / "samples.npz")
    assert images.shape == (20, 16, 16, 3)
    np.testing.assert_array_equal(images, to_uint8(Colours()(direct)))
    assert [count for _, count in decode.calls] == [2, 2, 1, 2, 1] * 2 + [2, 2]
    assert {name.split("_")[0] for name, _ in decode.calls} == {"images"}
    assert not list((tmp_path / "images").iterdir())


def test_samples_that_are_not_finite_are_refused(tmp_path):
    model = DDT(PRESETS["digits"].model)
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(float("nan"))
    assignment = Assignment.of_draws(torch.tensor([1, 2]), [5, 6], shuffle=False)
    running = job(tmp_path, model, SamplingConfig(num_steps=2), assignment, 2)
    with pytest.raises(ValueError, match="the sample of seed 5 is not finite"):
        running.run()
    assert running.folder.shards.missing() == [0]
    samples = torch.zeros(5, 1, 2, 2)
    samples[3, 0, 1, 1] = float("inf")
    with pytest.raises(ValueError, match="the sample of seed 13 is not finite"):
        PixelConverter(torch.device("cpu"), None, 2)(samples, np.arange(10, 15))


def full_disk() -> None:
    time.sleep(0.05)
    raise OSError("disk full")


@pytest.mark.parametrize("later", [0, 5])
def test_an_error_ends_it_and_later_tasks_do_not_run(later):
    ran = []

    def use() -> None:
        with Background(2) as background:
            background.submit(ran.append, 1)
            background.submit(full_disk)
            for _ in range(later):
                background.submit(ran.append, 2)

    with pytest.raises(OSError, match="disk full"):
        use()
    assert ran == [1]


def test_an_error_outside_stops_the_tasks():
    ran = []

    def use() -> None:
        with Background(2) as background:
            background.submit(time.sleep, 0.05)
            background.submit(ran.append, 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert ran == []


def test_no_more_than_asked_for_are_waiting():
    running, most = [0], [0]

    def task() -> None:
        time.sleep(0.01)
        running[0] -= 1

    with Background(2) as background:
        for _ in range(8):
            background.submit(task)
            running[0] += 1
            most[0] = max(most[0], running[0])
    assert most[0] <= 3


@pytest.mark.gpu
def test_a_gpu_converts_beside_the_sampling_what_a_cpu_converts():
    device = torch.device("cuda")
    samples = torch.randn(7, 1, 8, 8, device=device)
    torch.cuda.synchronize()
    convert = PixelConverter(device, Colours(), 3)
    convert(samples, np.arange(7))  # page-locked memory is had from the system once, which waits for all streams
    later = torch.cuda.Event()
    ready = convert.mark()
    torch.cuda._sleep(2_000_000_000)  # the sampling of the next batch
    later.record()
    ready.synchronize()
    images = convert(samples, np.arange(7))
    assert not later.query(), "the conversion waited for the other stream"
    np.testing.assert_array_equal(images, to_uint8(Colours()(samples.cpu())))
