"""The VAE between latents and pixels: diffusers' AutoencoderKL with its own scaling."""

from __future__ import annotations

import torch
from torch import Tensor


class Decoder:
    """Latents → pixels in [-1, 1].

    Args:
        name: hub id or local folder of a diffusers AutoencoderKL.
        device, dtype: where and in what to decode.

    Raises:
        ValueError: the autoencoder is neither local nor to be had from the Hub.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        # diffusers takes seconds to import; pixel-space models never need it.
        from diffusers import AutoencoderKL

        try:
            self.vae = AutoencoderKL.from_pretrained(name, torch_dtype=dtype).to(device).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"autoencoder {name} could not be loaded: {reason}") from error

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """(N, 4, h, w) latents → (N, 3, 8h, 8w) float32, one image at a time: memory does not grow with N."""
        scaling, dtype, device = self.vae.config.scaling_factor, self.vae.dtype, self.vae.device
        images = [self.vae.decode(z[None].to(device, dtype) / scaling).sample.float() for z in latents]
        return torch.cat(images)
