"""The engine of a job: the model, its plan, and batches that fit in memory."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ddt_fast.autoencoder import Decoder, open_decoder
from ddt_fast.config import DataConfig, Experiment, SamplingConfig
from ddt_fast.device import choose_device, choose_dtype, cpu_has_int8, dtype_name
from ddt_fast.generation.settings import Draws, Engine
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.model.attention import resolve_backend
from ddt_fast.model.quantization import quantization_error, quantize_int8
from ddt_fast.model.weights import load_model
from ddt_fast.provenance import device_name, weights_sha256
from ddt_fast.ranks import Ranks
from ddt_fast.sampling import Sampler, SamplingPlan
from ddt_fast.sampling.buffers import fitting_batch_size
from ddt_fast.sampling.refresh.schedules import resolve_refresh_steps, schedule_cache_path
from ddt_fast.sampling.tuned import check_schedule
from ddt_kernels.tuning import running


@dataclass(frozen=True)
class LoadedEngine:
    """A model that is ready to draw.

    Attributes:
        sampling: with refresh steps chosen.
        size: height and width of the model's input.
        description: the model in words.
        decode: latents → pixels in [-1, 1]; None for a pixel-space model, or to write latents as they are.
        settings: everything the images depend on, as plain JSON values.
    """

    model: DDT | FusedDDT
    sampling: SamplingConfig
    data: DataConfig
    size: tuple[int, int]
    batch_size: int
    description: str
    decode: Decoder | None
    asked: Engine
    settings: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    @property
    def draws_latents(self) -> bool:
        """Whether samples are written as latents, not as images."""
        return self.decode is None and self.data.in_latents(self.model.config.in_channels)

    @property
    def plan(self) -> SamplingPlan:
        """The steps of a run."""
        return SamplingPlan.from_config(self.sampling)

    def sampler(self) -> Sampler:
        """A sampler for the batches; making it captures the CUDA graphs."""
        return Sampler(
            self.model,
            self.sampling,
            self.batch_size,
            *self.size,
            memory_budget=self.asked.budget_bytes,
            compile_model=self.asked.compile,
        )

    def made_with(self, sampler: Sampler, ranks: Ranks) -> dict[str, Any]:
        """What to record with each shard, as plain JSON values. On a GPU, with how each op runs there."""
        return {
            "engine": sampler.engine,
            "model": self.description,
            "device": device_name(sampler.device),
            "threads": torch.get_num_threads() if sampler.device.type == "cpu" else None,
            "processes": ranks.world_size,
            "batch_size": sampler.batch_size,
            "torch": torch.__version__,
            **({"kernels": running()} if sampler.device.type == "cuda" else {}),
            **({"decoded_in": self.decode.precision} if self.decode is not None else {}),
        }


def open_device(name: str) -> torch.device:
    """The device called `name`, made the current one if it is a GPU; ValueError if it cannot be used."""
    device = choose_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def load_engine(
    checkpoint: Path,
    experiment: Experiment,
    sampling: SamplingConfig,
    engine: Engine,
    device: torch.device,
    decode: Decoder | None,
    draws: Draws,
    count: int,
    ranks: Ranks,
) -> LoadedEngine:
    """Load a local checkpoint as `engine` asks, for `count` images of the size in `draws`, decoded by `decode` or the
    model's own decoder.

    Raises:
        ValueError: the size or the weights do not fit the settings, the engine does not run here, or a sample does not
            fit in the memory budget.
        OSError: a file cannot be read.
    """
    data = experiment.data
    size = data.input_size(draws.height, draws.width, experiment.model.patch_size)
    # Between int8 GEMMs, float32 is faster.
    latents = data.in_latents(experiment.model.in_channels)
    dtype = choose_dtype(engine.dtype, device, latents and engine.quantize is None)
    reference = load_model(checkpoint, device, dtype, experiment.model)
    check_schedule(reference, sampling, *size)
    model, description = _prepare(reference, engine, ranks)
    if sampling.refresh_steps == "dp":
        sampling = resolve_refresh_steps(reference, sampling, *size, schedule_cache_path(checkpoint))
    batch_size = min(engine.batch_size, count)
    if engine.budget_bytes is not None:
        plan, asked = SamplingPlan.from_config(sampling), batch_size
        batch_size = fitting_batch_size(plan, model, asked, *size, engine.budget_bytes)
        if batch_size < asked:
            ranks.say(f"memory budget {engine.memory_budget}: batches of {batch_size} instead of {asked}")
    decode = decode or open_decoder(experiment, device)
    return LoadedEngine(
        model,
        sampling,
        data,
        size,
        batch_size,
        description,
        decode,
        engine,
        {
            "image_size": data.image_size,
            "model": asdict(experiment.model),
            "weights_sha256": weights_sha256(reference),
            "dtype": dtype_name(dtype),
            "quantize": engine.quantize,
            "sampling": _sampling(sampling),
            "autoencoder_sha256": None if decode is None else decode.sha256(),
            **_normalisation(data, decode),
            **({} if size == (data.sample_size, data.sample_size) else {"input_size": size}),
        },
    )


def _sampling(sampling: SamplingConfig) -> dict[str, Any]:
    """What images depend on. Jobs of earlier versions record no schedule."""
    unread = ("cuda_graphs",) if sampling.schedule else ("cuda_graphs", "schedule")
    return {name: value for name, value in asdict(sampling).items() if name not in unread}


def _normalisation(data: DataConfig, decode: Decoder | None) -> dict[str, Any]:
    """What is undone besides the autoencoder's own scale: nothing for most models."""
    own = None if decode is None else decode.vae.config.scaling_factor
    numbers = {"scaling_factor": data.scaling_factor, "channel_stats": data.channel_stats}
    return numbers if data.channel_stats is not None or data.scaling_factor not in (None, own) else {}


def _prepare(reference: DDT, engine: Engine, ranks: Ranks) -> tuple[DDT | FusedDDT, str]:
    """The model to run, and its description."""
    parameter = next(reference.parameters())
    dtype = dtype_name(parameter.dtype)
    if engine.reference:
        return reference, f"{dtype}, reference model"
    backend = resolve_backend(engine.attention, parameter.device, parameter.dtype, reference.config.head_dim)
    model = FusedDDT.from_reference(reference, engine.attention)
    if parameter.device.type == "cuda" and engine.attention == "auto":  # chosen by time, for the first batch
        return model, dtype
    if engine.quantize is None:
        return model, f"{dtype}, attention {backend}"
    quantized, config = quantize_int8(model), reference.config
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, config.in_channels, 4 * config.patch_size, 4 * config.patch_size, generator=generator)
    t, y = torch.tensor([0.3, 0.7]), torch.tensor([0, config.num_classes])
    error = quantization_error(model, quantized, x.to(parameter.dtype), t, y)
    if not cpu_has_int8():
        ranks.say("int8: this CPU has no int8 units; expect it to be slower than float32")
    ranks.say(f"int8: relative error of a velocity {error:.2g} against {dtype}")
    return quantized, f"int8 ({dtype} between), attention {backend}"
