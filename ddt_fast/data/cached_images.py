"""The images behind a latent cache, read again to compute features during training instead of caching them."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddt_fast.data.image_file import UnreadableImageError
from ddt_fast.data.image_folder import list_images
from ddt_fast.data.latent_cache import names_sha256
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.wording import plural


class CachedImages:
    """The centre crops that the latents of a cache were encoded from. ValueError if root is not an image folder or its
    file names differ from the cache's, or the dataset is LightningDiT's, which does not record its images.

    Args:
        root: the image folder that the cache was made from, wherever it is now.
        dataset: the cache.
    """

    def __init__(self, root: Path, dataset: LatentDataset) -> None:
        settings = dataset.settings
        if settings is None:
            raise ValueError("LightningDiT's shards do not record their images; expected a cache of ddt-fast")
        folder = list_images(root, settings.class_names)
        if len(folder.files) != settings.num_images:
            raise ValueError(
                f"{root} holds {plural(len(folder.files), 'image')}; the cache was made from {settings.num_images}"
            )
        if names_sha256(folder.files) != settings.images_sha256:
            raise ValueError(f"{root} holds other file names than the image folder that the cache was made from")
        self._folder = folder
        self._places = dataset.image_places()
        self.image_size = settings.image_size

    def read(self, indices: NDArray[np.int64], flips: NDArray[np.bool_]) -> Tensor:
        """The images of the latents `indices`, mirrored where flips is true: (n, 3, S, S) uint8 RGB. ValueError if an
        image can no longer be read; the message names the file."""
        images = np.empty((len(indices), 3, self.image_size, self.image_size), dtype=np.uint8)
        for image, place, flip in zip(images, self._places[indices].tolist(), flips.tolist(), strict=True):
            try:
                pixels = self._folder.read(place, self.image_size).numpy()
            except UnreadableImageError as error:
                path = self._folder.images.root / self._folder.files[place]
                raise ValueError(f"{path} was readable when its latent was cached, but now is not: {error}") from error
            image[:] = pixels[..., ::-1] if flip else pixels
        return torch.from_numpy(images)
