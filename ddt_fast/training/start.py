"""Starting from trained weights instead of fresh ones."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ddt_fast.model.lightning import read_lightning
from ddt_fast.model.weights import PROJECTOR_NAME, load_model, resolve_checkpoint
from ddt_fast.training.trained import TrainedDDT


def read_start(checkpoint: str, model: TrainedDDT) -> dict[str, Tensor]:
    """Load the weights that training starts from into the model, REPA's projector too where both have one.

    A released .ckpt holds trained weights and their average; model folders and .safetensors hold the average alone, which
    then is where the weights start as well. What was found is said on stderr.

    Args:
        checkpoint: a model folder, .safetensors, .ckpt, or Hub id.
        model: on any device, not sharded yet.

    Returns:
        The averages to start from, by the names of model.denoiser's parameters.

    Raises:
        ValueError: no checkpoint, or one of another architecture.
    """
    source = resolve_checkpoint(checkpoint)
    config, denoiser = model.denoiser.config, model.denoiser
    averaged = load_model(source, config=config).state_dict()
    trained, projector, found = averaged, None, "averaged weights for both"
    if source.suffix == ".ckpt":
        released = read_lightning(source)
        projector = released.projector
        if released.raw:
            trained = load_model(source, config=config, weights="raw").state_dict()
            found = "trained and averaged weights"
    elif (source / PROJECTOR_NAME).is_file():
        projector = load_file(source / PROJECTOR_NAME)
    denoiser.load_state_dict(averaged)
    average = {name: parameter.detach().clone() for name, parameter in denoiser.named_parameters()}
    denoiser.load_state_dict(trained)
    if model.projector is not None:
        found += ", no projector for REPA: a new one"
        if projector:
            try:
                model.projector.load_state_dict(projector)
            except RuntimeError as error:
                raise ValueError(f"the projector in {source} does not fit: {' '.join(str(error).split())}") from error
            found = found.replace("no projector for REPA: a new one", "REPA's projector")
    tqdm.write(f"starting from {Path(checkpoint)}: {found}", file=sys.stderr)
    return average
