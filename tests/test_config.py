from dataclasses import asdict, replace

import pytest

from ddt_fast.config import DataConfig, DDTConfig, Experiment, SamplingConfig, TrainingConfig
from ddt_fast.presets import PRESETS

DIGITS, B2 = PRESETS["digits"], PRESETS["b2_256"]

IMPOSSIBLE = {
    "model": [
        ({"num_heads": 3}, r"num_heads is 3; allowed: a divisor of hidden_size \(64\)"),
        ({"hidden_size": 36, "num_heads": 2}, r"hidden_size / num_heads is 18; allowed: .* multiple of 4"),
        ({"num_encoder_blocks": 4}, "num_encoder_blocks is 4; allowed: 1 to 3"),
        ({"num_blocks": 0}, "num_blocks is 0; allowed: a whole number, 1 or more"),
        ({"in_channels": 1.5}, "in_channels is 1.5"),
        ({"num_classes": True}, "num_classes is True"),
    ],
    "sampling": [
        ({"num_steps": -1}, "num_steps is -1; allowed: a whole number, 1 or more"),
        ({"num_steps": 100_001}, "num_steps is 100001; allowed: a whole number, 1 to 100000"),
        ({"guidance_scale": -0.5}, "guidance_scale is -0.5; allowed: a number from 0"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval is .* 0 <= low < high <= 1"),
        ({"guidance_interval": (0.2,)}, "guidance_interval"),
        ({"guidance_interval": ("a", "b")}, "guidance_interval"),
        ({"timeshift": 0}, "timeshift is 0; allowed: a number above 0"),
        ({"last_step": 1.0}, "last_step is 1.0; allowed: below 1"),
        ({"solver": "heun"}, "solver is 'heun'; allowed: euler, lms, pec, sde"),
        ({"order": 5}, "order is 5; allowed: 1 to 4 with solver lms"),
        ({"solver": "pec", "order": 4}, "order is 4; allowed: 1 to 3 with solver pec"),
        ({"diffusion": "none"}, "diffusion is 'none'; allowed: constant, sigma"),
        ({"diffusion_scale": -1}, "diffusion_scale is -1"),
        ({"refresh_every": 0}, "refresh_every is 0"),
        ({"refresh_steps": (1, 2)}, "refresh_steps is .* the first 0"),
        ({"refresh_steps": (0, 2, 2)}, "refresh_steps"),
        ({"refresh_steps": (0, 1.5)}, "refresh_steps"),
        ({"refresh_steps": (0, 25)}, "below 25"),
        ({"refresh_steps": (0, 2), "refresh_every": 2}, "refresh_every is 2"),
        ({"refresh_steps": "dp"}, "num_refreshes is None; allowed: 1 to num_steps"),
        ({"refresh_steps": "dp", "num_refreshes": 26}, r"num_refreshes is 26; allowed: 1 to num_steps \(25\)"),
        ({"num_refreshes": 3}, "num_refreshes is 3; allowed: none, unless"),
        ({"state_forecast": "cubic"}, "state_forecast"),
        ({"guidance_every": 0}, "guidance_every"),
        ({"guidance_forecast": "quadratic"}, "guidance_forecast"),
        ({"cuda_graphs": 1}, "cuda_graphs is 1; allowed: true or false"),
    ],
    "training": [
        ({"max_steps": 0}, "max_steps"),
        ({"seed": -1}, "seed"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; allowed: a number above 0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0; allowed: a number above 0"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas"),
        ({"adam_betas": ("a", "b")}, "adam_betas"),
        ({"ema_decay": 1.5}, "ema_decay is 1.5; allowed: a number from 0 up to 1"),
        ({"label_dropout": -0.1}, "label_dropout"),
        ({"dtype": "float16"}, "dtype is 'float16'; allowed: float32, bfloat16"),
        ({"compile": "yes"}, "compile is 'yes'; allowed: true or false"),
        ({"accumulation_steps": 3}, r"accumulation_steps is 3; allowed: a divisor of batch_size \(128\)"),
        ({"score_samples": 10}, "score_samples is 10; allowed: 0, or 65 or more"),
        ({"wandb": ""}, "wandb is ''; allowed: the name of a project, or null"),
        ({"repa_encoder": ""}, "repa_encoder is ''; allowed: a hub id or a folder"),
    ],
    "data": [
        ({"dataset": "cifar"}, "dataset is 'cifar'; allowed: digits, latents"),
        ({"image_size": 16}, "image_size is 16; allowed: 8"),
        ({"folder": "x"}, "folder is 'x'; allowed: null for the digits"),
        ({"dataset": "latents", "image_size": 250, "autoencoder": "x"}, r"a multiple of pixels_per_latent \(8\)"),
        ({"dataset": "latents", "autoencoder": ""}, "autoencoder is ''; allowed: a hub id or a folder"),
        ({"dataset": "latents", "scaling_factor": 0}, "scaling_factor is 0; allowed: a number above 0"),
        ({"dataset": "latents", "pixels_per_latent": 0}, "pixels_per_latent is 0; allowed: a whole number, 1 or more"),
        (
            {"dataset": "latents", "channel_stats": [[0.0], [0.0]]},
            "channel_stats is .*; allowed: .* deviations above 0",
        ),
        ({"dataset": "latents", "channel_stats": [[0.0, 1.0], [1.0]]}, "channel_stats is"),
        ({"dataset": "latents", "channel_stats": [[float("nan")], [1.0]]}, "channel_stats is"),
        ({"dataset": "latents", "class_names": ["cat", 3]}, "class_names is .*; allowed: a list of names, or null"),
        ({"class_names": ["cat"]}, "class_names is .*; allowed: null for the digits"),
    ],
}


@pytest.mark.parametrize(
    ("part", "settings", "message"), [(part, *case) for part, cases in IMPOSSIBLE.items() for case in cases]
)
def test_impossible_settings_are_refused(part, settings, message):
    with pytest.raises(ValueError, match=message):
        replace(getattr(DIGITS, part), **settings)


@pytest.mark.parametrize(
    ("preset", "part", "settings", "message"),
    [
        (DIGITS, "model", {"patch_size": 3}, r"height is 8; allowed: a positive multiple of patch_size \(3\)"),
        (DIGITS, "model", {"in_channels": 4}, "in_channels is 4; allowed: 1 for the digits"),
        (DIGITS, "model", {"num_classes": 1000}, "num_classes is 1000"),
        (DIGITS, "training", {"repa_weight": 0.5}, "repa_weight is 0.5; allowed: 0 for the digits"),
        (B2, "training", {"repa_block": 9}, r"repa_block is 9; allowed: 1 to num_encoder_blocks \(8\)"),
        (B2, "data", {"channel_stats": ((0.0,), (1.0,))}, "in_channels is 4; allowed: 1, the channels of channel_st"),
        (B2, "data", {"class_names": ("a",) * 1001}, "num_classes is 1000; allowed: 1001 or more"),
        (B2, "training", {"score_samples": 100}, "score_samples is 100; allowed: 0: only digits can be scored"),
    ],
)
def test_model_data_and_training_must_agree(preset, part, settings, message):
    changed = replace(getattr(preset, part), **settings)
    with pytest.raises(ValueError, match=message):
        replace(preset, **{part: changed})


SIZES = {"b2": (768, 12, 12, 8), "l2": (1024, 16, 24, 20), "xl2": (1152, 16, 28, 22)}
STEPS = {"xl2_256_256_epochs": 1_280_000, "xl2_256_400_epochs": 2_000_000, "xl2_512": 100_000}


@pytest.mark.parametrize("name", [f"{size}_256{repa}" for size in SIZES for repa in ("", "_without_repa")] + [*STEPS])
def test_presets_have_the_papers_values(name):
    size, scale = (512, 3.0) if name == "xl2_512" else (256, 2.0)
    # The other settings' defaults are the paper's, which test_defaults_are_the_papers pins.
    assert PRESETS[name] == Experiment(
        DDTConfig(4, 2, *SIZES[name.partition("_")[0]], num_classes=1000),
        DataConfig("latents", size, "stabilityai/sd-vae-ft-ema"),
        TrainingConfig(max_steps=STEPS.get(name, 400_000), repa_weight=0 if "without" in name else 0.5),
        SamplingConfig(guidance_scale=scale),
    )
    assert len(PRESETS) == 10


def test_defaults_are_the_papers():
    training = TrainingConfig()
    assert (training.batch_size, training.learning_rate, training.adam_betas) == (256, 1e-4, (0.9, 0.95))
    assert (training.weight_decay, training.ema_decay, training.label_dropout) == (0, 0.9999, 0.1)
    assert (training.repa_block, training.dtype) == (8, "bfloat16")
    assert SamplingConfig() == SamplingConfig(250, 2.0, (0.3, 1.0), 1.0, 0.04, "euler")


def test_settings_survive_the_way_through_lists():
    settings = asdict(replace(DIGITS.sampling, refresh_steps=(0, 3)))
    settings["guidance_interval"], settings["refresh_steps"] = [0.3, 1.0], [0, 3]
    assert SamplingConfig(**settings) == replace(DIGITS.sampling, refresh_steps=(0, 3))


def test_derived_sizes():
    config = DDTConfig(4, 2, 1152, 16, 28, 22, 1000)
    assert (config.head_dim, config.mlp_hidden_size, config.num_decoder_blocks) == (72, 3072, 6)
    assert DDTConfig(1, 2, 64, 2, 4, 3, 10).mlp_hidden_size == 170
    assert config.num_tokens(32, 64) == 512
    assert [PRESETS[name].data.sample_size for name in ("xl2_256", "xl2_512", "digits")] == [32, 64, 8]


def test_what_samples_are_follows_from_the_data():
    latents = DataConfig("latents", 256, pixels_per_latent=16)
    assert (latents.sample_size, latents.in_latents(3)) == (16, True)
    cases = [(DataConfig(), 1, False), (DataConfig("latents", 64), 3, False), (DataConfig("latents", 64), 4, True)]
    assert [data.in_latents(channels) for data, channels, _ in cases] == [latent for *_, latent in cases]
