"""What a pipeline draws: the images of ddt_fast.sample, by seed; its output types, callbacks, dtypes."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback

from ddt_fast import FusedDDT, load_model
from ddt_fast.autoencoder import Decoder
from ddt_fast.config import SamplingConfig
from ddt_fast.generation.images import to_uint8
from ddt_fast.model.weights import EMBEDDED_CHECKPOINT, read_experiment
from ddt_fast.pipeline import DDTPipeline
from ddt_fast.sampling import sample
from ddt_fast.sampling.noise import seeded_noise
from pipeline_cases import digits, quiet, seeded


def drawn(checkpoint, labels, seeds, dtype=torch.float32, **settings):
    """By ddt_fast.sample."""
    experiment = read_experiment(checkpoint)
    size = experiment.data.sample_size
    noise, generators = seeded_noise(seeds, (experiment.model.in_channels, size, size))
    model = FusedDDT.from_reference(load_model(checkpoint, dtype=dtype))
    config = replace(experiment.sampling, **settings)
    return sample(model, noise, torch.tensor(labels), config, generators=generators)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 3.0, "guidance_interval": (0.1, 0.7), "timeshift": 2.0, "last_step": 0.1},
        {"refresh_every": 3, "state_forecast": "linear", "guidance_every": 2, "guidance_forecast": "linear"},
        {"refresh_steps": (0, 2, 3), "solver": "euler"},
        {"solver": "sde", "diffusion": "sine", "diffusion_scale": 0.5},
        {"order": 3, "guidance_scale": 1.0},
    ],
)
def test_a_seed_gives_the_image_that_sample_gives(pipe, settings):
    expected = drawn(EMBEDDED_CHECKPOINT, [3, 1, 4], [7, 8, 9], num_steps=6, **settings)
    draw = {"generator": seeded(7, 8, 9), "output_type": "latent"}
    assert torch.equal(pipe([3, "1", 4], 6, **draw, **settings).images, expected)
    config = replace(pipe.scheduler.sampling_config, num_steps=6, **settings)
    draw["generator"] = seeded(7, 8, 9)
    assert torch.equal(pipe([3, "1", 4], sampling=config, **draw).images, expected)
    alone = pipe("4", 6, generator=seeded(9)[0], output_type="latent", **settings).images
    torch.testing.assert_close(alone, expected[2:], rtol=1e-5, atol=1e-5)


def test_settings_override_those_of_sampling_and_of_the_scheduler(pipe):
    """None leaves a setting, last_step 0 means 1 / steps, and one way to refresh takes the place of another."""
    draw = partial(pipe, [3], output_type="latent")
    base = SamplingConfig(num_steps=4, solver="lms", refresh_steps=(0, 2), last_step=0.3)
    changes = {"guidance_scale": 3.0, "refresh_every": 2, "refresh_steps": None, "last_step": None}
    expected = draw(sampling=replace(base, **changes), generator=seeded(1)).images
    given = {"guidance_scale": 3.0, "refresh_every": 2, "last_step": 0, "order": None}
    assert torch.equal(draw(sampling=base, generator=seeded(1), **given).images, expected)
    own = pipe.scheduler
    pipe.scheduler = type(own)(num_steps=3, solver="euler", last_step=None)
    try:
        assert pipe.scheduler.sampling_config == SamplingConfig(num_steps=3, last_step=None)
        expected = draw(sampling=SamplingConfig(num_steps=3, last_step=None), generator=seeded(0)).images
        assert torch.equal(draw(generator=seeded(0)).images, expected)
    finally:
        pipe.scheduler = own


def test_latents_become_the_images_of_the_command(latent_model):
    pipe = quiet(DDTPipeline.from_pretrained(latent_model))
    latents = drawn(latent_model, [2, 5], [0, 1])
    pixels = Decoder(read_experiment(latent_model).data.autoencoder, torch.device("cpu"))(latents)
    images = pipe([2, 5], generator=seeded(0, 1)).images
    assert [image.mode for image in images] == ["RGB", "RGB"]
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), to_uint8(pixels))
    array = pipe([2, 5], generator=seeded(0, 1), output_type="np").images
    assert array.shape == (2, 64, 64, 3)
    assert np.array_equal(array, (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
    (tensor,) = pipe([2, 5], generator=seeded(0, 1), output_type="pt", return_dict=False)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)


def test_other_sizes(latent_model):
    pipe = quiet(DDTPipeline.from_pretrained(latent_model))
    assert pipe([1], height=32, width=96).images[0].size == (96, 32)
    assert pipe([1], height=32, width=96, output_type="latent").images.shape == (1, 4, 4, 12)


def test_images_per_label_and_given_latents(pipe):
    draw = partial(pipe, num_inference_steps=4, output_type="latent")
    expected = draw([3, 3, 8, 8], generator=seeded(0, 1, 2, 3)).images
    assert torch.equal(draw([3, 8], num_images_per_label=2, generator=seeded(0, 1, 2, 3)).images, expected)
    noise = seeded_noise(range(4), (1, 8, 8))[0]
    assert torch.equal(draw(torch.tensor([3, 3, 8, 8]), latents=noise).images, expected)


def test_one_generator_for_all_images(pipe):
    """The first image is that of its seed; without a generator torch's own is drawn from."""
    draw = partial(pipe, num_inference_steps=4, output_type="latent")
    together, alone = (draw(labels, generator=seeded(5)[0]).images for labels in ([3, 3], [3]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[1], together[0])
    torch.manual_seed(3)
    first = draw([3]).images
    assert not torch.equal(draw([3]).images, first)
    torch.manual_seed(3)
    assert torch.equal(draw([3]).images, first)


def test_callbacks_see_every_step(pipe):
    seen, times = [], []

    def look(pipeline, step, t, tensors):
        assert pipeline is pipe
        assert pipeline.num_timesteps == 5
        seen.append((step, tensors["latents"]))
        times.append(float(t))
        return tensors

    plain = pipe([3], 5, generator=seeded(0), output_type="latent").images
    watched = pipe([3], 5, generator=seeded(0), output_type="latent", callback_on_step_end=look).images
    assert torch.equal(watched, plain)
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4]
    assert times == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert torch.equal(seen[-1][1], plain), "the tensors are copies, which later steps leave alone"
    assert not torch.equal(seen[0][1], seen[1][1])


def test_the_run_continues_from_what_a_callback_returns(pipe):
    noise = seeded_noise([9], (1, 8, 8))[0]

    def other_start(_pipe, step, _t, tensors):
        return {"latents": noise} if step == 0 else None

    settings = {"solver": "euler", "output_type": "latent", "guidance_scale": 1.0}
    changed = pipe([3], 2, generator=seeded(0), callback_on_step_end=other_start, **settings).images
    with torch.no_grad():
        expected = noise + 0.5 * pipe.transformer(noise, torch.tensor([0.5]), torch.tensor([3]))[0]
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)


def test_a_callback_may_interrupt(pipe):
    seen = []

    def stop(pipeline, step, _t, tensors):
        seen.append(tensors["latents"])
        pipeline._interrupt = step == 1

    stopped = pipe([3], 6, generator=seeded(0), output_type="latent", callback_on_step_end=stop).images
    assert len(seen) == 2
    assert pipe.interrupt
    assert torch.equal(stopped, seen[1])
    whole = pipe([3], 6, generator=seeded(0), output_type="latent").images
    assert not pipe.interrupt
    assert not torch.equal(whole, stopped)


def test_callbacks_of_diffusers_kind(pipe):
    class Halve(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            return {"latents": callback_kwargs["latents"] / 2} if step_index == pipeline.num_timesteps - 1 else {}

    plain = pipe([3], 3, generator=seeded(0), output_type="latent").images
    halved = pipe([3], 3, generator=seeded(0), output_type="latent", callback_on_step_end=Halve()).images
    assert torch.equal(halved, plain / 2)


def test_progress_bar(pipe, capsys):
    pipe.set_progress_bar_config(desc="drawing")
    pipe([3], 3)
    assert "drawing: 100%" in capsys.readouterr().err
    quiet(pipe)
    pipe([3], 3)
    assert capsys.readouterr().err == ""


def test_dtype(latent_model):
    pipe = quiet(DDTPipeline.from_pretrained(latent_model, torch_dtype=torch.bfloat16))
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.dtype == torch.bfloat16
    coarse = pipe([2], generator=seeded(0), output_type="latent").images
    assert coarse.dtype == torch.float32
    exact = quiet(pipe.to(torch.float32))([2], generator=seeded(0), output_type="latent").images
    assert 0 < (coarse - exact).norm() / exact.norm() < 0.05
    assert pipe([2], generator=seeded(0)).images[0].size == (64, 64)


def test_changed_weights_are_sampled_from():
    pipe = digits()
    before = pipe([3], 3, generator=seeded(0), output_type="latent").images
    with torch.no_grad():
        pipe.transformer.final_layer.linear.weight.mul_(0.5)
    after = pipe([3], 3, generator=seeded(0), output_type="latent").images
    assert not torch.equal(after, before)
    pipe.transformer.load_state_dict(load_model(EMBEDDED_CHECKPOINT).state_dict())
    assert torch.equal(pipe([3], 3, generator=seeded(0), output_type="latent").images, before)


def test_the_scheduler_alone_takes_the_same_steps(pipe):
    noise = seeded_noise([0], (1, 8, 8))[0]
    for settings in ({"solver": "euler", "timeshift": 2.0}, {"solver": "lms", "order": 3}):
        scheduler = type(pipe.scheduler)(**{**pipe.scheduler.config, **settings})
        scheduler.set_timesteps(6)
        x, y = noise, torch.tensor([3])
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(pipe.transformer(x, t.expand(1), y)[0], t, x).prev_sample
        expected = pipe([3], 6, guidance_scale=1.0, generator=seeded(0), output_type="latent", **settings).images
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="allowed at step 6: none, call set_timesteps"):
            scheduler.step(x, 0.0, x)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"solver": "sde", "cuda_graphs": True}])
def test_a_generator_of_the_gpu_draws_there(settings):
    pipe = digits().to("cuda")
    draw = lambda **more: pipe([3, 4], 4, output_type="latent", **settings, **more).images  # noqa: E731
    drawn = [draw(generator=[torch.Generator("cuda").manual_seed(seed) for seed in (0, 1)]) for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.allclose(drawn[0], draw(generator=seeded(0, 1)))
    if not settings:
        generators = [torch.Generator("cuda").manual_seed(seed) for seed in (0, 1)]
        noise = torch.stack([torch.randn(1, 8, 8, generator=one, device="cuda") for one in generators])
        assert torch.equal(draw(latents=noise), drawn[0])


@pytest.mark.gpu
def test_cuda_graphs_draw_the_eager_images():
    pipe = digits().to("cuda")
    seen = []
    eager = pipe([3, 4], generator=seeded(0, 1), output_type="latent").images
    pipe.enable_cuda_graphs()
    look = lambda _pipe, _step, _t, tensors: seen.append(tensors["latents"])  # noqa: E731
    for _ in range(2):
        replayed = pipe([3, 4], generator=seeded(0, 1), output_type="latent", callback_on_step_end=look).images
        torch.testing.assert_close(replayed, eager)
    assert len(seen) == 50
    assert not torch.equal(seen[0], seen[1])
