"""Small pipelines, of pixels and of latents, and what the tests of pipelines say again and again."""

from __future__ import annotations

from pathlib import Path

import torch

import golden_data as golden
from ddt_fast.config import DataConfig, SamplingConfig
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT
from ddt_fast.model.weights import save_model
from ddt_fast.pipeline import DDTPipeline
from sample_jobs import small_autoencoder

LATENT_MODEL = "tiny_h48_d24"
LATENT_SAMPLING = SamplingConfig(num_steps=4, guidance_scale=2.0)


def quiet(pipe: DDTPipeline) -> DDTPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def digits() -> DDTPipeline:
    """Of the model in the package."""
    return quiet(DDTPipeline.from_pretrained(EMBEDDED_CHECKPOINT))


def latent_folder(folder: Path) -> Path:
    """A model folder of 4 x 8 x 8 latents, 64 pixels, with a small autoencoder beside it."""
    vae = small_autoencoder(folder / "vae")
    save_model(golden.model(LATENT_MODEL), folder / "model", DataConfig("latents", 64, vae), LATENT_SAMPLING)
    return folder / "model"


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
