"""DINOv2 (arXiv 2304.07193): images → patch tokens, the features that REPA aligns with.

It needs transformers, an optional extra: pip install ".[repa]" in the checkout.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddt_fast.device import float32_as
from ddt_fast.hub import cache_only
from ddt_fast.provenance import weights_sha256
from ddt_fast.weight_files import reason_in

DEFAULT_ENCODER = "facebook/dinov2-base"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoV2:
    """A frozen DINOv2, with or without registers: images → patch tokens.

    Preprocessing is REPA's and DDT's: [0, 1], ImageNet mean and std, resized bicubically without antialiasing to
    224/256 of the size. Position embeddings are resized bicubically with antialiasing, which transformers omits for
    DINOv2. ValueError if transformers is missing, or the model is neither a local folder nor on the Hub, or is not a
    DINOv2.

    Args:
        name: hub id or local folder, such as facebook/dinov2-base (ViT-B/14, the paper's), -small or -large.
        device, dtype: the device and dtype to compute with.

    Attributes:
        name: as given.
        feature_size: size F of a token; 768 for ViT-B/14.
        patch_size: side of a patch in pixels, 14.
    """

    def __init__(
        self, name: str = DEFAULT_ENCODER, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        model = _load(name)
        self.name = name
        self.feature_size = int(model.config.hidden_size)
        self.patch_size = int(model.config.patch_size)
        self._extra_tokens = 1 + int(getattr(model.config, "num_register_tokens", 0))
        # In float32, whatever the model's dtype: they are resized from these for every new grid.
        self._positions = model.embeddings.position_embeddings.detach()
        self._grid = math.isqrt(self._positions.shape[1] - 1)
        self.model = model.to(device, dtype)
        self._mean, self._std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (_IMAGENET_MEAN, _IMAGENET_STD)
        )

    def grid(self, image_size: int) -> int:
        """Rows, and columns, of tokens for an image of this side in pixels; ValueError for sizes that do not divide
        into patches."""
        grid, rest = divmod(image_size * 224, 256 * self.patch_size)
        if rest or not grid:
            step = 256 * self.patch_size // math.gcd(224, 256 * self.patch_size)
            raise ValueError(
                f"image size is {image_size}; allowed: multiples of {step}, which DINOv2 divides into patches of "
                f"{self.patch_size} after resizing to 224/256"
            )
        return grid

    def sha256(self) -> str:
        """Checksum of the weights and their names, in the dtype they are used in."""
        self._resize_positions(math.isqrt(self._positions.shape[1] - 1))
        return weights_sha256(self.model)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 images → (B, N', F) patch tokens after the final norm, row by row, on the model's device
        and in its dtype, without class token and registers. N' is 256 for S = 256, 1024 for S = 512. ValueError if the
        images have another shape or dtype, or a size that does not divide into patches."""
        side = images.shape[-1]
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected torch.uint8 (B, 3, S, S)")
        grid = self.grid(side)
        self._resize_positions(grid)
        pixels = images.to(self._mean.device, non_blocking=True).float() / 255
        pixels = (pixels - self._mean) / self._std
        pixels = functional.interpolate(pixels, (grid * self.patch_size,) * 2, mode="bicubic")
        with float32_as("ieee"):
            return self.model(pixels.to(self.model.dtype)).last_hidden_state[:, self._extra_tokens :]

    def _resize_positions(self, grid: int) -> None:
        """Give the model position embeddings for this grid, which it then does not resize."""
        if grid == self._grid:
            return
        first, patches = self._positions[:, :1], self._positions[:, 1:]
        side = math.isqrt(patches.shape[1])
        if grid != side:
            image = patches.transpose(1, 2).unflatten(2, (side, side))
            image = functional.interpolate(image, (grid, grid), mode="bicubic", antialias=True)
            patches = image.flatten(2).transpose(1, 2)
        weight = torch.cat([first, patches], 1).to(self.model.device, self.model.dtype)
        self.model.embeddings.position_embeddings = nn.Parameter(weight, requires_grad=False)
        self._grid = grid


def _load(name: str) -> Any:
    """The model in float32 on the CPU, in evaluation mode and without gradients."""
    try:
        # Optional, and slow to import.
        from transformers import AutoConfig, AutoModel
    except (ImportError, RuntimeError) as error:
        raise ValueError(f'DINOv2 needs transformers, pip install ".[repa]" in the checkout: {error}') from error
    try:
        local: dict[str, Any] = {"local_files_only": cache_only(name)}
        config = AutoConfig.from_pretrained(name, **local)
        kind = config.model_type
        if known := kind in ("dinov2", "dinov2_with_registers"):
            options = local | {"config": config, "attn_implementation": "sdpa", "output_loading_info": True}
            model, report = AutoModel.from_pretrained(name, dtype=torch.float32, **options)
    except Exception as error:  # from transformers, the Hub, safetensors or the unpickler
        raise ValueError(
            f"DINOv2 {name} could not be loaded: {reason_in(name, error)}; expected a local folder or hub id such as "
            f"{DEFAULT_ENCODER} ('hf download {DEFAULT_ENCODER} --local-dir FOLDER' fetches it)"
        ) from error
    if not known:
        raise ValueError(f"{name} is a {kind}; expected a DINOv2, such as {DEFAULT_ENCODER}")
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"DINOv2 {name} lacks {len(missing)} of its weights, such as {missing[0]}")
    return model.eval().requires_grad_(False)
