"""ddt-fast: train DDT (Decoupled Diffusion Transformer, arXiv 2504.05741), sample from it, score its samples.

Each command is a function here, with the same defaults and errors:

    python -m ddt_fast.train            train_model(experiment, output_dir)
    python -m ddt_fast.sample           generate(checkpoint, output_dir, draws=Draws(num_images=50_000))
    python -m ddt_fast.evaluate         score_samples(samples, reference)
    python -m ddt_fast.cache_latents    encode_image_folder(images, output)
    python -m ddt_fast.convert          convert_checkpoint(source, out)
    python -m ddt_fast.sharing          study_refreshes(checkpoint)
    python -m ddt_fast.tune_sampler     fit_schedule(checkpoint)

The package also has

    Draws, Engine, Outputs, Scoring     what `generate` draws, with which engine, what it writes, how it scores
    load_model(path), DDT, FusedDDT     the model
    sampling.sample, sampling.Sampler   samples of a model in memory, as tensors
    DDTPipeline                         the model in diffusers
    write_model_card(folder)            the README.md of a model folder

See `help(ddt_fast.generate)` and so on.
"""

import sys
from typing import TYPE_CHECKING

if sys.argv[:1] == ["-m"]:  # `python -m ddt_fast.COMMAND` imports the package before the command
    from ddt_fast.interrupts import handle_interrupts

    handle_interrupts()

from ddt_fast.config import DDTConfig, SamplingConfig
from ddt_fast.lazy import lazy_names

if TYPE_CHECKING:
    from ddt_fast.cache_latents import encode_image_folder
    from ddt_fast.convert import convert_checkpoint
    from ddt_fast.evaluate import score_samples
    from ddt_fast.generation.job import generate
    from ddt_fast.generation.settings import Draws, Engine, Outputs, Scoring
    from ddt_fast.model import DDT, FusedDDT
    from ddt_fast.model.card import write_model_card
    from ddt_fast.model.weights import load_model
    from ddt_fast.pipeline import DDTPipeline
    from ddt_fast.sharing import study_refreshes
    from ddt_fast.train import train_model
    from ddt_fast.tune_sampler import fit_schedule

__version__ = "0.1.0"

__all__ = [
    "DDT",
    "DDTConfig",
    "DDTPipeline",
    "Draws",
    "Engine",
    "FusedDDT",
    "Outputs",
    "SamplingConfig",
    "Scoring",
    "convert_checkpoint",
    "encode_image_folder",
    "fit_schedule",
    "generate",
    "load_model",
    "score_samples",
    "study_refreshes",
    "train_model",
    "write_model_card",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ddt_fast.cache_latents": ["encode_image_folder"],
        "ddt_fast.convert": ["convert_checkpoint"],
        "ddt_fast.evaluate": ["score_samples"],
        "ddt_fast.generation.job": ["generate"],
        "ddt_fast.generation.settings": ["Draws", "Engine", "Outputs", "Scoring"],
        "ddt_fast.model": ["DDT", "FusedDDT"],
        "ddt_fast.model.card": ["write_model_card"],
        "ddt_fast.model.weights": ["load_model"],
        "ddt_fast.pipeline": ["DDTPipeline"],
        "ddt_fast.sharing": ["study_refreshes"],
        "ddt_fast.train": ["train_model"],
        "ddt_fast.tune_sampler": ["fit_schedule"],
    },
)
