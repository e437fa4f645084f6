"""What a pipeline draws: the images of ddt_fast.sample, by seed; its output types, callbacks, dtypes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.callbacks import PipelineCallback

from ddt_fast import FusedDDT, load_model
from ddt_fast.autoencoder import Decoder
from ddt_fast.config import SamplingConfig
from ddt_fast.generation.images import to_uint8
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT, read_experiment
from ddt_fast.pipeline import DDTPipeline
from ddt_fast.sampling import sample
from ddt_fast.sampling.noise import seeded_noise
from pipeline_cases import digits, quiet, seeded


def draw(pipe, labels, steps=None, seeds=(0,), **more):
    return pipe(labels, steps, generator=seeded(*seeds), output_type="latent", **more).images


def drawn(checkpoint, labels, seeds, dtype=torch.float32, **settings):
    """By ddt_fast.sample."""
    experiment = read_experiment(checkpoint)
    size = experiment.data.sample_size
    noise, generators = seeded_noise(seeds, (experiment.model.in_channels, size, size))
    model = FusedDDT.from_reference(load_model(checkpoint, dtype=dtype))
    config = replace(experiment.sampling, **settings)
    return sample(model, noise, torch.tensor(labels), config, generators=generators)


@pytest.mark.slow
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
    assert torch.equal(draw(pipe, [3, "1", 4], 6, (7, 8, 9), **settings), expected)
    config = replace(pipe.scheduler.sampling_config, num_steps=6, **settings)
    assert torch.equal(draw(pipe, [3, "1", 4], None, (7, 8, 9), sampling=config), expected)
    alone = pipe("4", 6, generator=seeded(9)[0], output_type="latent", **settings).images
    torch.testing.assert_close(alone, expected[2:], rtol=1e-5, atol=1e-5)


def test_settings_override_those_of_sampling_and_of_the_scheduler(pipe):
    """None leaves a setting, last_step 0 means 1 / steps, and one way to refresh takes the place of another."""
    base = SamplingConfig(num_steps=4, solver="lms", refresh_steps=(0, 2), last_step=0.3)
    changes = {"guidance_scale": 3.0, "refresh_every": 2, "refresh_steps": None, "last_step": None}
    given = {"guidance_scale": 3.0, "refresh_every": 2, "last_step": 0, "order": None}
    expected = draw(pipe, [3], sampling=replace(base, **changes))
    assert torch.equal(draw(pipe, [3], sampling=base, **given), expected)
    own = pipe.scheduler
    pipe.scheduler = type(own)(num_steps=3, solver="euler", last_step=None)
    try:
        assert pipe.scheduler.sampling_config == SamplingConfig(num_steps=3, last_step=None)
        expected = draw(pipe, [3], sampling=SamplingConfig(num_steps=3, last_step=None))
        assert torch.equal(draw(pipe, [3]), expected)
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


def test_sizes_and_dtypes(latent_model):
    pipe = quiet(DDTPipeline.from_pretrained(latent_model, torch_dtype=torch.bfloat16))
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.dtype == torch.bfloat16
    coarse = draw(pipe, [2])
    assert coarse.dtype == torch.float32
    assert pipe([2], generator=seeded(0)).images[0].size == (64, 64)
    exact = draw(pipe.to(torch.float32), [2])
    assert 0 < (coarse - exact).norm() / exact.norm() < 0.05
    assert pipe([1], height=32, width=96).images[0].size == (96, 32)
    assert pipe([1], height=32, width=96, output_type="latent").images.shape == (1, 4, 4, 12)


def test_moving_and_casting_is_quiet(caplog, recwarn, latent_model):
    with_vae = DDTPipeline.from_pretrained(latent_model)
    for pipe in (digits(), with_vae):
        for place in (("cpu", torch.float16), (torch.float16,), ("cpu",), (torch.float32,)):
            pipe.to(*place)
    assert with_vae.vae.dtype == torch.float32
    pipe.transformer.to(torch.bfloat16).to("cpu", torch.float32)
    assert caplog.text == ""
    assert [str(warning.message) for warning in recwarn] == []


def test_images_per_label_and_given_latents(pipe):
    expected = draw(pipe, [3, 3, 8, 8], 4, range(4))
    assert torch.equal(draw(pipe, [3, 8], 4, range(4), num_images_per_label=2), expected)
    noise = seeded_noise(range(4), (1, 8, 8))[0]
    assert torch.equal(pipe(torch.tensor([3, 3, 8, 8]), 4, latents=noise, output_type="latent").images, expected)


def test_one_generator_for_all_images(pipe):
    """The first image is that of its seed; without a generator torch's own is drawn from."""
    together, alone = (pipe(labels, 4, generator=seeded(5)[0], output_type="pt").images for labels in ([3, 3], [3]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[1], together[0])
    torch.manual_seed(3)
    first, second = (pipe([3], 4, output_type="latent").images for _ in range(2))
    assert not torch.equal(second, first)
    torch.manual_seed(3)
    assert torch.equal(pipe([3], 4, output_type="latent").images, first)


def test_callbacks_see_every_step_and_may_interrupt(pipe):
    seen, times = [], []

    def look(pipeline, step, t, tensors):
        assert pipeline is pipe
        assert pipeline.num_timesteps == 5
        assert step == len(seen)
        seen.append(tensors["latents"])
        times.append(float(t))
        return tensors

    def stop(pipeline, step, _t, _tensors):
        pipeline._interrupt = step == 1

    plain = draw(pipe, [3], 5)
    assert torch.equal(draw(pipe, [3], 5, callback_on_step_end=look), plain)
    assert times == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert torch.equal(seen[4], plain), "the tensors are copies, which later steps leave alone"
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(draw(pipe, [3], 5, callback_on_step_end=stop), seen[1])
    assert pipe.interrupt
    assert torch.equal(draw(pipe, [3], 5), plain)
    assert not pipe.interrupt


class Halve(PipelineCallback):
    tensor_inputs = ("latents",)

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        return {"latents": callback_kwargs["latents"] / 2} if step_index == pipeline.num_timesteps - 1 else {}


def test_the_run_continues_from_what_a_callback_returns(pipe):
    noise = seeded_noise([9], (1, 8, 8))[0]

    def other_start(_pipe, step, _t, tensors):
        return {"latents": noise} if step == 0 else None

    changed = draw(pipe, [3], 2, solver="euler", guidance_scale=1.0, callback_on_step_end=other_start)
    with torch.no_grad():
        expected = noise + 0.5 * pipe.transformer(noise, torch.tensor([0.5]), torch.tensor([3]))[0]
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(draw(pipe, [3], 3, callback_on_step_end=Halve()), draw(pipe, [3], 3) / 2)


def test_progress_bar(pipe, capsys):
    pipe.set_progress_bar_config(desc="drawing")
    pipe([3], 3)
    assert "drawing: 100%" in capsys.readouterr().err
    quiet(pipe)
    pipe([3], 3)
    assert capsys.readouterr().err == ""


def test_changed_weights_are_sampled_from():
    pipe = digits()
    before = draw(pipe, [3], 3)
    with torch.no_grad():
        pipe.transformer.final_layer.linear.weight.mul_(0.5)
    assert not torch.equal(draw(pipe, [3], 3), before)
    pipe.transformer.load_state_dict(load_model(EMBEDDED_CHECKPOINT).state_dict())
    assert torch.equal(draw(pipe, [3], 3), before)


@pytest.mark.parametrize(
    "settings", [{"solver": "euler", "timeshift": 2.0}, {"solver": "lms", "order": 3}, {"solver": "pec", "order": 3}]
)
def test_the_scheduler_alone_takes_the_same_steps(pipe, settings):
    settings = {"guidance_scale": 1.0, **settings}
    scheduler = type(pipe.scheduler)(**{**pipe.scheduler.config, **settings})
    scheduler.set_timesteps(6)
    x, y = seeded_noise([0], (1, 8, 8))[0], torch.tensor([3])
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.transformer(x, t.expand(1), y)[0], t, x).prev_sample
    expected = draw(pipe, [3], 6, **settings)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="allowed at step 6: none, call set_timesteps"):
        scheduler.step(x, 0.0, x)


@pytest.fixture
def overflowing(latent_model, tmp_path):
    """A function: a float16 pipeline whose vae overflows in float16, with this force_upcast."""

    def make(force_upcast):
        vae = AutoencoderKL.from_pretrained(read_experiment(latent_model).data.autoencoder)
        with torch.no_grad():
            vae.decoder.conv_in.weight *= 3e5
            vae.decoder.conv_in.bias *= 3e5
        vae.register_to_config(force_upcast=force_upcast)
        vae.save_pretrained(tmp_path / "vae")
        options = {"torch_dtype": torch.float16, "vae": tmp_path / "vae"}
        return quiet(DDTPipeline.from_pretrained(latent_model, **options))

    return make


def test_a_vae_that_overflows_in_float16_decodes_in_float32(overflowing, caplog):
    pipe = overflowing(force_upcast=True)
    given = {"latents": seeded_noise([0], (4, 8, 8))[0]}
    caplog.clear()  # diffusers recommends accelerate
    images = pipe([2], output_type="np", **given).images
    assert pipe.vae.dtype == torch.float16
    assert caplog.text == ""
    exact = Decoder(pipe.data.autoencoder, torch.device("cpu"))
    exact.vae.load_state_dict(pipe.vae.state_dict())
    pixels = exact(pipe([2], output_type="latent", **given).images)
    assert np.array_equal(images, (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(pipe([2], **given).images[0]), to_uint8(pixels)[0])


@pytest.mark.slow
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_images_that_are_not_finite_are_refused(overflowing, output_type):
    pipe = overflowing(force_upcast=False)
    message = r"the sample of seed 7 is not finite; the vae decodes in torch.float16; .*pipe\.vae\.to\(torch\.float32\)"
    with pytest.raises(ValueError, match=message):
        pipe([2], generator=seeded(7), output_type=output_type)
    with pytest.raises(ValueError, match=r"^sample 0 is not finite"):
        pipe([2, 3], generator=seeded(7)[0], output_type=output_type)
    pipe.vae.to(torch.float32)
    assert np.isfinite(np.asarray(pipe([2], generator=seeded(7), output_type=output_type).images)).all()


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_samples_that_are_not_finite_are_refused(output_type):
    pipe = digits()
    with torch.no_grad():
        pipe.transformer.final_layer.linear.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="the sample of seed 5 is not finite; check the weights and the settings"):
        pipe([3, 4], 2, generator=seeded(5, 6), output_type=output_type)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"solver": "sde", "cuda_graphs": True}])
def test_a_generator_of_the_gpu_draws_there(settings):
    pipe = digits().to("cuda")

    def there():
        return [torch.Generator("cuda").manual_seed(seed) for seed in (0, 1)]

    given = {"output_type": "latent", **settings}
    first, second = (pipe([3, 4], 4, generator=there(), **given).images for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, draw(pipe, [3, 4], 4, (0, 1), **settings))
    if not settings:
        noise = torch.stack([torch.randn(1, 8, 8, generator=one, device="cuda") for one in there()])
        assert torch.equal(pipe([3, 4], 4, latents=noise, **given).images, first)


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
