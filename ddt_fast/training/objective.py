"""Flow matching: the loss of a DDT (DDT paper, section 3)."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ddt_fast.config import Experiment
from ddt_fast.data.loader import LatentBatch
from ddt_fast.device import DTYPES
from ddt_fast.dinov2 import DinoV2
from ddt_fast.training.parallel import MixedPrecisionReplica
from ddt_fast.training.repa import repa_loss


class FlowMatchingBatch(NamedTuple):
    """Points on straight paths from noise to data, and the velocities there."""

    x: Tensor
    """(B, channels, height, width) float32, t data + (1 - t) noise."""
    t: Tensor
    """(B,) float32 in (0, 1), logit-normal: sigmoid(N(0, 1))."""
    labels: Tensor
    """(B,) int64, some replaced with the null class."""
    target: Tensor
    """As x, data - noise."""


def flow_matching_batch(
    data: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    label_dropout: float,
    generator: torch.Generator,
    part: tuple[int, int] = (0, 1),
) -> FlowMatchingBatch:
    """Draw a time, noise and dropout for every sample.

    Args:
        data: (B, channels, height, width) float32, the clean samples.
        labels: (B,) int64.
        num_classes: also the index of the null class.
        label_dropout: chance of the null class, 0 to 1.
        generator: on the data's device.
        part: (r, R): the samples are the r-th of R equal parts of a batch. Numbers are drawn for the whole batch, so
            that they do not depend on how many processes share it.
    """
    index, parts = part
    batch, device = data.shape[0], data.device
    own = slice(index * batch, (index + 1) * batch)
    t = torch.randn(parts * batch, generator=generator, device=device)[own].sigmoid()
    noise = torch.randn((parts * batch, *data.shape[1:]), generator=generator, device=device)[own]
    dropped = torch.rand(parts * batch, generator=generator, device=device)[own] < label_dropout
    along = t.view(-1, 1, 1, 1)
    x = along * data + (1 - along) * noise
    return FlowMatchingBatch(x, t, labels.masked_fill(dropped, num_classes), data - noise)


class Objective:
    """The gradients of an experiment's loss: flow matching, plus repa_weight times REPA's. ValueError if REPA's encoder
    cannot be loaded.

    `feature_size` is the size F of the features that REPA compares with, None without REPA; `feature_shape` is (N', F)
    of the data's own, if any.
    """

    def __init__(self, experiment: Experiment, device: torch.device, feature_shape: tuple[int, int] | None) -> None:
        self._model, self._settings, self._device = experiment.model, experiment.training, device
        size = experiment.data.sample_size // experiment.model.patch_size
        self._grid = (size, size)
        self._generator = torch.Generator(device)
        self._encoder: DinoV2 | None = None
        if self._settings.repa_weight and experiment.data.images is not None:
            self._encoder = DinoV2(self._settings.repa_encoder, device, DTYPES[self._settings.dtype])
            self.feature_size: int | None = self._encoder.feature_size
        else:
            self.feature_size = None if feature_shape is None else feature_shape[1]

    def encoder_sha256(self) -> str | None:
        """Checksum of the weights of REPA's encoder; None if features are not computed here."""
        return None if self._encoder is None else self._encoder.sha256()

    def backward(self, replica: MixedPrecisionReplica, batch: LatentBatch, step: int) -> Tensor:
        """Leave the gradients of one step in the replica's masters, from this process's share of its batch; return the
        losses of flow matching and of REPA (0 without REPA), (2,) float32, means over this share. Random numbers depend
        only on the step and the seed."""
        settings = self._settings
        # Neighbouring seeds and steps give distant seeds, which also differ from torch's and the data's.
        self._generator.manual_seed((settings.seed * 0x9E3779B97F4A7C15 + step) % 2**63)
        points = flow_matching_batch(
            batch.latents.to(self._device, non_blocking=True),
            batch.labels.to(self._device, non_blocking=True),
            num_classes=self._model.num_classes,
            label_dropout=settings.label_dropout,
            generator=self._generator,
            part=(dist.get_rank(), dist.get_world_size()),
        )
        parts = settings.accumulation_steps
        losses = torch.zeros(2, device=self._device)
        features = self._features(batch).chunk(parts) if self.feature_size is not None else [None] * parts
        chunks = zip(*(tensor.chunk(parts) for tensor in points), features, strict=True)
        for part, (x, t, labels, target, aligned) in enumerate(chunks, start=1):
            with replica.part(last=part == parts):
                velocity, projected = replica.compute(x, t, labels)
                flow = F.mse_loss(velocity.float(), target)
                repa = flow.new_zeros(()) if projected is None else repa_loss(projected, aligned, self._grid)
                ((flow + settings.repa_weight * repa) / parts).backward()
            losses += torch.stack([flow, repa]).detach() / parts
        return losses

    def _features(self, batch: LatentBatch) -> Tensor:
        """DINOv2's features, cached or computed now: (B, N', F)."""
        if self._encoder is None:
            assert batch.features is not None
            return batch.features.to(self._device, non_blocking=True)
        assert batch.images is not None
        parts = batch.images.chunk(self._settings.accumulation_steps)
        return torch.cat([self._encoder(part.to(self._device, non_blocking=True)) for part in parts])
