"""The autoencoder between pixels and latents: diffusers' AutoencoderKL."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddt_fast.config import DataConfig, Experiment
from ddt_fast.device import dtype_name, float32_as
from ddt_fast.hub import cache_only
from ddt_fast.provenance import weights_sha256
from ddt_fast.weight_files import reason_in

_EXAMPLE = "stabilityai/sd-vae-ft-ema"
_AS_IT_IS = DataConfig("latents")


def load_vae(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the diffusers AutoencoderKL of a hub id or local folder, for inference; ValueError if there is none."""
    # diffusers takes seconds to import, and pixel-space models do not need it.
    from diffusers import AutoencoderKL

    try:
        options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": cache_only(name)}
        # By default, diffusers prints five lines of advice if accelerate, which is not needed here, is missing.
        options |= {"low_cpu_mem_usage": False, "use_safetensors": True, "output_loading_info": True}
        with default_dtype_kept():
            vae, info = AutoencoderKL.from_pretrained(name, **options)
        if missing := info["missing_keys"]:  # diffusers only warns, and leaves them uninitialised
            raise ValueError(f"{len(missing)} of its tensors are missing, such as {sorted(missing)[0]}")
        return vae.to(device).eval().requires_grad_(False)
    except MemoryError:
        raise
    except Exception as error:  # diffusers may raise anything on a damaged config.json
        raise ValueError(
            f"autoencoder {name} could not be loaded: {reason_in(name, error)}; expected the local folder or hub id of "
            f"an AutoencoderKL, such as {_EXAMPLE} ('hf download {_EXAMPLE} --local-dir FOLDER' fetches it)"
        ) from error


@contextmanager
def default_dtype_kept() -> Iterator[None]:
    """Restore torch's default dtype, which diffusers changes while loading, and leaves changed if it fails."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def quiet_casts() -> Iterator[None]:
    """Drop the warning of diffusers 0.42 at every cast of a model that it "should be kept in float32: []": no module of
    ours should. May be nested."""

    def names_modules(record: logging.LogRecord) -> bool:  # one per call: the inner block must not remove the outer's
        return "should be kept in float32: []" not in record.getMessage()

    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addFilter(names_modules)
    try:
        yield
    finally:
        logger.removeFilter(names_modules)


class Decoder:
    """A model's latents → pixels in [-1, 1]. ValueError if the autoencoder is neither a local folder nor on the Hub, or
    its latents have another size.

    Args:
        name: hub id or local folder of a diffusers AutoencoderKL.
        device, dtype: the device and dtype to decode with.
        batch_size: latents decoded at a time; a larger batch keeps a GPU busier and takes more memory. None: as for
            `decode_latents`.
        data: the latents' size, and what training did to them.

    Attributes:
        data: the same, with this autoencoder.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        batch_size: int | None = None,
        data: DataConfig = _AS_IT_IS,
    ) -> None:
        self.vae = load_vae(name, device, dtype)
        self.batch_size = batch_size or _batch_size(device)
        self.data = replace(sized_for(self.vae, name, data), autoencoder=name)

    def sha256(self) -> str:
        """Checksum of the weights and their names, in the dtype they are used in."""
        return weights_sha256(self.vae)

    @property
    def precision(self) -> str:
        """What it computes in: "tf32", or a dtype."""
        dtype, device = self.vae.dtype, self.vae.device
        return "tf32" if dtype == torch.float32 and device.type == "cuda" else dtype_name(dtype)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) latents → (N, 3, H, W) float32; the memory that decoding itself takes does not grow with N."""
        return decode_latents(self.vae, latents, self.batch_size, self.data)


def open_decoder(experiment: Experiment, device: torch.device, name: str | None = None) -> Decoder | None:
    """The decoder of a model's samples: the one of that name, else the model's own, if any.

    Raises:
        ValueError: it cannot be loaded, does not fit the samples, or the samples are pixels.
    """
    model, data = experiment.model, experiment.data
    if name is not None and not data.in_latents(model.in_channels):
        raise ValueError(f"autoencoder is {name!r}; allowed: none, this model draws pixels")
    name = name or data.autoencoder
    if name is None:
        return None
    decoder = Decoder(name, device, data=data)
    channels = decoder.vae.config.latent_channels
    if channels != model.in_channels:
        raise ValueError(f"autoencoder {name} has latents of {channels} channels; the model's have {model.in_channels}")
    return decoder


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor, batch_size: int | None = None, data: DataConfig = _AS_IT_IS) -> Tensor:
    """Latents (N, C, h, w) of a model of these data → pixels (N, 3, H, W) float32, around [-1, 1], on the autoencoder's
    device. They are decoded in its dtype, or in float32 if that is float16 and its config has force_upcast, batch_size
    at a time: by default, 8 on a GPU and 1 on a CPU. On a GPU, float32 is TF32 here."""
    scaling, device = float(vae.config.scaling_factor), vae.device
    parts = latents.split(batch_size or _batch_size(device))
    with _upcast(vae), float32_as("tf32"):
        undone = (undo_normalisation(x.to(device), data, scaling) for x in parts)
        return torch.cat([vae.decode(z.to(vae.dtype)).sample.float() for z in undone])


@contextmanager
def _upcast(vae: Any) -> Iterator[None]:
    """Hold an autoencoder that overflows in float16, such as SDXL's, in float32; its float16 weights come back."""
    if vae.dtype != torch.float16 or not vae.config.force_upcast:
        yield
        return
    with quiet_casts():
        vae.to(torch.float32)
        try:
            yield
        finally:
            vae.to(torch.float16)


def undo_normalisation(samples: Tensor, data: DataConfig, own_scale: float = 1.0) -> Tensor:
    """Samples (N, C, h, w) as a model of these data draws them → what its data were before training normalised them:
    x / scaling_factor * std + mean, float32; own_scale is the factor where the data name none."""
    undone = samples.float() / (data.scaling_factor or own_scale)
    if isinstance(data.channel_stats, tuple):
        mean, std = torch.tensor(data.channel_stats, dtype=torch.float32, device=undone.device)[..., None, None]
        undone = undone * std + mean
    return undone


def _batch_size(device: torch.device) -> int:
    return 8 if device.type == "cuda" else 1


def pixels_per_latent(vae: Any) -> int:
    """Side of the square of pixels for one latent position of an AutoencoderKL."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def sized_for(vae: Any, name: str, data: DataConfig) -> DataConfig:
    """The data of a model's samples with the image size and pixels per latent of the autoencoder that decodes them;
    ValueError if its latents have another size."""
    factor, side = pixels_per_latent(vae), data.sample_size
    # Without an autoencoder, the size of a latent may stand for the size of its image.
    if data.autoencoder is None and data.image_size == side:
        data = replace(data, image_size=side * factor, pixels_per_latent=factor)
    if data.image_size != side * factor:
        size = f"images of {data.image_size} pixels with latents of {side}x{side}"
        raise ValueError(
            f"autoencoder {name} turns {factor}x{factor} pixels into one latent position; expected one for {size}"
        )
    return data


class Encoder:
    """Pixels → the posterior of their latents, before scaling. ValueError if the autoencoder is neither a local folder
    nor on the Hub, or shifts its latents, which `Decoder` would not undo.

    Args:
        name: hub id or local folder of a diffusers AutoencoderKL.
        device, dtype: the device and dtype to encode with.

    Attributes:
        name: as given.
        scaling_factor: factor from a drawn latent to a model's input.
        latent_channels: C of a latent.
        pixels_per_latent: side of the square of pixels for one latent position.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.name = name
        self.vae = load_vae(name, device, dtype)
        config = self.vae.config
        if config.shift_factor:
            raise ValueError(f"autoencoder {name} has shift_factor {config.shift_factor}; allowed: none or 0")
        self.scaling_factor = float(config.scaling_factor)
        self.latent_channels = int(config.latent_channels)
        self.pixels_per_latent = pixels_per_latent(self.vae)

    def sha256(self) -> str:
        """Checksum of the weights and their names, in the dtype they are used in."""
        return weights_sha256(self.vae)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) uint8 images → mean and logvar, each (N, C, h, w) float32 on the CPU, with logvar in
        [-30, 20]."""
        pixels = images.to(self.vae.device, non_blocking=True).float() / 127.5 - 1
        with float32_as("ieee"):
            posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return posterior.mean.float().cpu(), posterior.logvar.float().cpu()
