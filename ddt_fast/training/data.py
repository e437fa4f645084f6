"""The data that an experiment names, as batches without end."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from ddt_fast.config import Experiment
from ddt_fast.data.digits import DigitsDataset
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.data.latent_loader import LatentLoader
from ddt_fast.data.verification import verify_together
from ddt_fast.wording import plural


def open_loader(experiment: Experiment, device: torch.device, group: dist.ProcessGroup) -> LatentLoader:
    """This process's share of the experiment's batches. All processes of the group call it together.

    Raises:
        ValueError: no or unusable data, shards of another checksum, data that do not fit the model, or a batch that the
            processes cannot share.
    """
    data, model, training = experiment.data, experiment.model, experiment.training
    shares = dist.get_world_size() * training.accumulation_steps
    if training.batch_size % shares:
        raise ValueError(
            f"batch_size is {training.batch_size}; allowed: multiples of {shares}, processes times accumulation_steps"
        )
    dataset: LatentDataset | DigitsDataset
    if data.dataset == "digits":
        dataset = DigitsDataset()
    elif data.folder is None:
        raise ValueError("data.folder is null; name the folder of cached latents (ddt_fast.cache_latents makes one)")
    else:
        dataset = LatentDataset(
            Path(data.folder),
            shape=(model.in_channels, data.sample_size, data.sample_size),
            scaling_factor=data.scaling_factor,
            channel_stats=None if data.channel_stats is None else Path(data.channel_stats),
            features=training.repa_weight > 0 and data.images is None,
        )
        classes = f"{data.folder} holds {plural(dataset.num_classes, 'class')}"
        if dataset.num_classes > model.num_classes:
            raise ValueError(f"{classes}, num_classes is {model.num_classes}; allowed: as many or more")
        if dataset.num_classes < model.num_classes and dist.get_rank() == 0:
            warnings.warn(
                f"{classes}, num_classes is {model.num_classes}: the others are never trained, but are sampled unless "
                "classes are chosen",
                stacklevel=2,
            )
        if data.verify:
            verify_together(dataset, group)
    return LatentLoader(
        dataset,
        training.batch_size,
        seed=training.seed,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        images=Path(data.images) if training.repa_weight and data.images is not None else None,
        pin_memory=device.type == "cuda",
    )
