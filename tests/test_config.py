from dataclasses import asdict, replace

import pytest

from ddt_fast.config import DataConfig, DDTConfig, Experiment, SamplingConfig, TrainingConfig
from ddt_fast.presets import PRESETS

DIGITS = PRESETS["digits"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, r"num_heads is 3; allowed: a divisor of hidden_size \(64\)"),
        ({"hidden_size": 36, "num_heads": 2}, r"hidden_size / num_heads is 18; allowed: .* multiple of 4"),
        ({"num_encoder_blocks": 4}, "num_encoder_blocks is 4; allowed: 1 to 3"),
        ({"num_encoder_blocks": 9}, "num_encoder_blocks is 9"),
        ({"num_blocks": 0}, "num_blocks is 0; allowed: a whole number, 1 or more"),
        ({"in_channels": 1.5}, "in_channels is 1.5"),
        ({"num_classes": True}, "num_classes is True"),
    ],
)
def test_impossible_models_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(DIGITS.model, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": -1}, "num_steps is -1; allowed: a whole number, 1 or more"),
        ({"guidance_scale": -0.5}, "guidance_scale is -0.5; allowed: a number from 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval is .* 0 <= low < high <= 1"),
        ({"guidance_interval": (0.2,)}, "guidance_interval"),
        ({"guidance_interval": (0.2, 1.2)}, "guidance_interval"),
        ({"timeshift": 0}, "timeshift is 0; allowed: a number above 0"),
        ({"last_step": 1.0}, "last_step is 1.0; allowed: below 1"),
        ({"last_step": 0.0}, "last_step is 0.0"),
        ({"solver": "heun"}, "solver is 'heun'; allowed: euler, lms, sde"),
        ({"order": 5}, "order is 5; allowed: 1, 2, 3 or 4"),
        ({"order": 2.0}, r"order is 2\.0"),
        ({"diffusion": "none"}, "diffusion is 'none'; allowed: constant, sigma"),
        ({"refresh_every": 0}, "refresh_every is 0"),
        ({"refresh_steps": (1, 2)}, "refresh_steps is .* the first 0"),
        ({"refresh_steps": (0, 2, 2)}, "refresh_steps"),
        ({"refresh_steps": (0, 25)}, "below 25"),
        ({"refresh_steps": (0, 2), "refresh_every": 2}, "refresh_every is 2"),
        ({"state_forecast": "cubic"}, "state_forecast"),
        ({"guidance_every": 0}, "guidance_every"),
        ({"guidance_forecast": "quadratic"}, "guidance_forecast"),
        ({"cuda_graphs": 1}, "cuda_graphs is 1; allowed: true or false"),
    ],
)
def test_impossible_sampling_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(DIGITS.sampling, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, "max_steps"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; allowed: a number above 0"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas"),
        ({"ema_decay": 1.5}, "ema_decay is 1.5; allowed: a number from 0 up to 1"),
        ({"label_dropout": -0.1}, "label_dropout"),
        ({"dtype": "float16"}, "dtype is 'float16'; allowed: float32, bfloat16"),
        ({"seed": -1}, "seed"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"score_samples": 10}, "score_samples is 10; allowed: 0, or 65 and more"),
        ({"adam_betas": 0.9}, "adam_betas is 0.9"),
        ({"adam_betas": ("a", "b")}, "adam_betas"),
    ],
)
def test_impossible_training_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(DIGITS.training, **settings)


def test_model_and_data_must_agree():
    with pytest.raises(ValueError, match=r"height is 8; allowed: a positive multiple of patch_size \(3\)"):
        replace(DIGITS, model=replace(DIGITS.model, patch_size=3))
    with pytest.raises(ValueError, match="in_channels is 4; allowed: 1 for the digits"):
        replace(DIGITS, model=replace(DIGITS.model, in_channels=4))
    with pytest.raises(ValueError, match="num_classes is 1000"):
        replace(DIGITS, model=replace(DIGITS.model, num_classes=1000))
    with pytest.raises(ValueError, match="image_size is 16; allowed: 8"):
        DataConfig(image_size=16)
    with pytest.raises(ValueError, match="multiple of 8"):
        DataConfig("latents", 250, "some/vae")
    with pytest.raises(ValueError, match="autoencoder is ''; allowed: a hub id or a folder"):
        DataConfig("latents", 256, "")
    with pytest.raises(ValueError, match="in_channels is 4; allowed: 1 or 3 for pixels"):
        Experiment(PRESETS["b2_256"].model, DataConfig("latents", 16, None))
    with pytest.raises(ValueError, match="score_samples is 100; allowed: 0: only digits can be scored"):
        replace(PRESETS["b2_256"], training=replace(PRESETS["b2_256"].training, score_samples=100))


def test_presets_have_the_paper_s_values():
    b2, l2, xl2 = (768, 12, 12, 8), (1024, 16, 24, 20), (1152, 16, 28, 22)
    named = {
        "b2_256": (b2, 400_000, 0.5),
        "b2_256_without_repa": (b2, 400_000, 0),
        "l2_256": (l2, 400_000, 0.5),
        "l2_256_without_repa": (l2, 400_000, 0),
        "xl2_256": (xl2, 400_000, 0.5),
        "xl2_256_without_repa": (xl2, 400_000, 0),
        "xl2_256_256_epochs": (xl2, 1_280_000, 0.5),
        "xl2_256_400_epochs": (xl2, 2_000_000, 0.5),
        "xl2_512": (xl2, 100_000, 0.5),
    }
    assert set(PRESETS) == {"digits", *named}
    for name, (shape, steps, repa_weight) in named.items():
        preset = PRESETS[name]
        model = preset.model
        assert (model.hidden_size, model.num_heads, model.num_blocks, model.num_encoder_blocks) == shape
        assert (model.in_channels, model.patch_size, model.num_classes) == (4, 2, 1000)
        assert preset.training == TrainingConfig(
            max_steps=steps,
            batch_size=256,
            repa_weight=repa_weight,
            repa_block=8,
            learning_rate=1e-4,
            adam_betas=(0.9, 0.95),
            weight_decay=0.0,
            ema_decay=0.9999,
            label_dropout=0.1,
            dtype="bfloat16",
        )
        scale = 3.0 if name == "xl2_512" else 2.0
        assert preset.sampling == SamplingConfig(250, scale, (0.3, 1.0), 1.0, 0.04)
        assert preset.data.sample_size == (64 if name == "xl2_512" else 32)


def test_settings_survive_the_way_through_lists():
    settings = asdict(replace(DIGITS.sampling, refresh_steps=(0, 3)))
    settings["guidance_interval"], settings["refresh_steps"] = [0.3, 1.0], [0, 3]
    assert SamplingConfig(**settings) == replace(DIGITS.sampling, refresh_steps=(0, 3))


def test_derived_sizes():
    config = DDTConfig(4, 2, 1152, 16, 28, 22, 1000)
    assert (config.head_dim, config.mlp_hidden_size, config.num_decoder_blocks) == (72, 3072, 6)
    assert DDTConfig(1, 2, 64, 2, 4, 3, 10).mlp_hidden_size == 170
    assert config.num_tokens(32, 64) == 512
