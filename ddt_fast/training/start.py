"""Starting from trained weights."""

from torch import Tensor

from ddt_fast.model.weights import read_weight_sets
from ddt_fast.training.model import TrainingModel
from ddt_fast.wording import tell


def read_start(checkpoint: str, model: TrainingModel) -> dict[str, Tensor]:
    """Load the weights that training starts from into the model, and REPA's projector if both have one; return the
    averages to start from, by the names of model.denoiser's parameters.

    A released .ckpt holds trained weights and their average; if there is only an average, as in most model folders, the
    weights start there too. What was found is reported on stderr. ValueError if this is not a checkpoint, or has
    another architecture.

    Args:
        checkpoint: a model folder, .safetensors, .ckpt, or hub id.
        model: the model, on any device, not sharded yet.
    """
    sets = read_weight_sets(checkpoint, model.denoiser.config)
    averaged, trained = sets.ema or sets.raw, sets.raw or sets.ema
    found = ["trained weights" if sets.raw else "averaged weights only: training starts there too"]
    if sets.raw:
        found.append("their average" if sets.ema else "no average: it starts there too")
    denoiser = model.denoiser
    denoiser.load_state_dict(averaged)
    average = {name: parameter.detach().clone() for name, parameter in denoiser.named_parameters()}
    denoiser.load_state_dict(trained)
    if model.projector is not None:
        found.append("REPA's projector" if sets.projector else "no projector for REPA: a fresh one")
        if sets.projector:
            model.projector.load_state_dict(sets.projector)
    tell(f"starting from {checkpoint}: {', '.join(found)}")
    return average
