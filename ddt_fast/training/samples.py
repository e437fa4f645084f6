"""Previews of a model during training: labelled grids of samples, and scores of digits."""

from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from ddt_fast.autoencoder import Decoder, open_decoder, undo_normalisation
from ddt_fast.class_names import class_names_of
from ddt_fast.config import Experiment, SamplingConfig
from ddt_fast.device import choose_dtype
from ddt_fast.evaluation.digits_score import DigitsScore, score_digits
from ddt_fast.generation.images import labelled_grid, to_uint8
from ddt_fast.generation.seeds import assign_labels
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.sampling import sample
from ddt_fast.sampling.noise import seeded_noise


class Preview:
    """Draws from an experiment's models with its sampling settings, which its data have completed. ValueError if the
    autoencoder that turns samples into images cannot be loaded."""

    def __init__(self, experiment: Experiment, device: torch.device) -> None:
        self._experiment, self._device = experiment, device
        self._names = class_names_of(experiment)
        self._decode: Decoder | None = None
        if experiment.training.sample_every:
            try:
                self._decode = open_decoder(experiment, device)
            except ValueError as error:
                raise ValueError(f"{error}; or train without grids of samples, with training.sample_every 0") from error

    def autoencoder_sha256(self) -> str | None:
        """Checksum of the autoencoder's weights; None if no autoencoder is needed."""
        return None if self._decode is None else self._decode.sha256()

    def grid(self, model: DDT) -> Image.Image:
        """A labelled grid of class-balanced samples."""
        labels = assign_labels(self._experiment.training.sample_images, self._experiment.model.num_classes)
        samples = self._draw(model, labels, self._experiment.sampling)
        images = undo_normalisation(samples, self._experiment.data) if self._decode is None else self._decode(samples)
        return labelled_grid(to_uint8(images), [self._names.short(label) for label in labels.tolist()])

    def score(self, model: DDT, num_samples: int) -> dict[str, DigitsScore]:
        """Scores of class-balanced digits, drawn without guidance and with the sampling settings."""
        labels = assign_labels(num_samples, self._experiment.model.num_classes)
        sampling = self._experiment.sampling
        configs = {"unguided": replace(sampling, guidance_scale=1.0), "guided": sampling}
        return {kind: score_digits(self._draw(model, labels, config), labels) for kind, config in configs.items()}

    def _draw(self, model: DDT, labels: Tensor, config: SamplingConfig) -> Tensor:
        data = self._experiment.data
        dtype = choose_dtype("auto", self._device, latents=data.in_latents(self._experiment.model.in_channels))
        fused = FusedDDT.from_reference(model).to(self._device, dtype)
        shape = (self._experiment.model.in_channels, data.sample_size, data.sample_size)
        noise, generators = seeded_noise(range(len(labels)), shape)
        return sample(fused, noise, labels, config, generators=generators)
