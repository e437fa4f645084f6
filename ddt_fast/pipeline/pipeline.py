"""`DDTPipeline`: from class labels to images, with diffusers' conventions, on ddt_fast's engine."""

# Annotations are not deferred here, and __init__ uses Optional: diffusers 0.36 reads the annotations as they are.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from inspect import signature
from typing import Any, Literal, Optional, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import is_accelerate_available, logging
from diffusers.utils.torch_utils import get_device
from PIL import Image
from torch import Tensor

from ddt_fast.autoencoder import decode_latents, pixels_per_latent, quiet_casts, sized_for, undo_normalisation
from ddt_fast.checks import require_arguments, require_choice, require_int, require_kind
from ddt_fast.class_names import ClassLabel, ClassNames, default_id2label
from ddt_fast.config import SamplingConfig
from ddt_fast.generation.images import to_uint8
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.pipeline.adapters import LoraPipeline
from ddt_fast.pipeline.loading import SavedPipeline
from ddt_fast.pipeline.scheduler import DDTScheduler, per_sample
from ddt_fast.pipeline.transformer import DDTTransformer2DModel, settings_of
from ddt_fast.sampling.engine import Sampler, StopSampling
from ddt_fast.sampling.noise import normal
from ddt_fast.sampling.progress import FinishedSteps
from ddt_fast.wording import kind_of, plural

logger = logging.get_logger(__name__)

# The fields of `SamplingConfig` that a call accepts; num_steps has diffusers' name there.
_SETTINGS = [setting.name for setting in fields(SamplingConfig) if setting.name != "num_steps"]

OutputType = Literal["pil", "np", "pt", "latent"]
StepCallback = Callable[["DDTPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]


class DDTPipeline(SavedPipeline, LoraPipeline):
    """Draws images of classes with a DDT.

    For sampling, the transformer's weights are merged into a copy, which is made again when they change; changes of a
    weight's `.data` go unnoticed until `pipe.to(...)`. One thread at a time may call a pipeline.

    Args:
        transformer: the model.
        vae: turns its latents into pixels; None for a pixel-space model.
        scheduler: the default sampling settings of a call.
        id2label: label → names of the class, separated by commas; None for ImageNet's if the model has 1000 classes of
            latents, "0" to "9" for the digits, else none.

    Raises:
        ValueError: the parts do not fit together.
    """

    _optional_components = ["vae"]  # noqa: RUF012, attributes of diffusers' class
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012
    model_cpu_offload_seq = "transformer->vae"  # type: ignore[assignment]

    def __init__(
        self,
        transformer: DDTTransformer2DModel,
        vae: Optional[AutoencoderKL],  # noqa: UP045
        scheduler: DDTScheduler,
        id2label: Optional[dict] = None,  # noqa: UP045
    ) -> None:
        super().__init__()
        # torch.compile wraps a module in one of its own.
        require_kind("transformer", getattr(transformer, "_orig_mod", transformer), DDTTransformer2DModel)
        require_kind("scheduler", scheduler, DDTScheduler)
        if vae is not None:
            require_kind("vae", getattr(vae, "_orig_mod", vae), AutoencoderKL)
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        config = transformer.ddt_config
        self.data, _ = settings_of(transformer.config)
        if vae is not None:
            if vae.config["latent_channels"] != config.in_channels:
                channels = f"{vae.config['latent_channels']} channels, the transformer takes {config.in_channels}"
                raise ValueError(f"the vae's latents have {channels}; they must match")
            scaling = vae.config["scaling_factor"]
            if not (isinstance(scaling, (int, float)) and 0 < scaling < float("inf")):
                raise ValueError(f"the vae has scaling_factor {scaling!r}; expected a positive number")
            if vae.config["shift_factor"]:
                raise ValueError(f"the vae has shift_factor {vae.config['shift_factor']}; allowed: none or 0")
            if self.data.in_latents(config.in_channels):
                self.data = sized_for(vae, "vae", self.data)
        if id2label is None:
            id2label = default_id2label(self.data.dataset, config.num_classes, self.data.class_names)
        self.class_names = ClassNames(config.num_classes, id2label)
        self.register_to_config(id2label={str(label): name for label, name in self.id2label.items()})
        self._cuda_graphs: bool | None = None
        self._interrupt = False
        self._num_timesteps = 0
        self._engine: tuple[Any, DDT | FusedDDT, bool] | None = None
        self._sampler: tuple[Any, Sampler] | None = None

    @property
    def id2label(self) -> dict[int, str]:
        """Label → names of the class."""
        return self.class_names.id2label

    @property
    def num_timesteps(self) -> int:
        """Steps of the latest call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the latest call was told to end early; a callback may set `pipe._interrupt`."""
        return self._interrupt

    def get_label_ids(self, label: ClassLabel | Sequence[ClassLabel]) -> list[int]:
        """The labels of classes given by name or number; a ValueError names the nearest to an unknown or ambiguous
        one."""
        return self.class_names.labels(label)

    def enable_cuda_graphs(self) -> None:
        """Replay the sampling loop as CUDA graphs, captured at the first call with a shape and settings: the default on
        a GPU. ValueError if the transformer is not on a CUDA device."""
        device = self.transformer.device
        if device.type != "cuda":
            there = "" if torch.cuda.is_available() else ", and torch sees none here"
            raise ValueError(f"CUDA graphs need a CUDA device, the transformer is on {device}{there}; pipe.to('cuda')")
        self._cuda_graphs = True

    def disable_cuda_graphs(self) -> None:
        """Run the sampling loop eagerly."""
        self._cuda_graphs = False

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `DiffusionPipeline.to`: a device, a dtype, or both, and silence_dtype_warnings; ValueError for others."""
        require_arguments("to", kwargs, ("device", "dtype", "silence_dtype_warnings"))
        self._engine = self._sampler = None  # free their memory first
        kwargs.setdefault("silence_dtype_warnings", True)  # that float16 fails on a CPU: it does not
        with quiet_casts():
            return super().to(*args, **kwargs)

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """As in diffusers: keep the models on the CPU, and move each to the GPU for as long as it runs. ValueError if
        accelerate is missing, or there is no GPU."""
        if not is_accelerate_available():
            raise ValueError("enable_model_cpu_offload needs accelerate: pip install accelerate")
        if device is None and get_device() == "cpu":
            raise ValueError("enable_model_cpu_offload needs a GPU, and torch sees none here")
        super().enable_model_cpu_offload(gpu_id, device)  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabel | Sequence[ClassLabel] | Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        sampling: SamplingConfig | None = None,
        num_images_per_label: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **settings: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            class_labels: one or more classes: labels, 0 to num_classes - 1, or names, as in `pipe.id2label`.
            num_inference_steps, guidance_scale: num_steps and guidance_scale of `SamplingConfig`; see settings.
            sampling: the sampling settings; None for the scheduler's.
            num_images_per_label: images per entry of class_labels, one after another.
            height, width: size of the images in pixels; None for the size the model was trained at.
            generator: one per image, or one for all images in turn; None for torch's own on the CPU. A seeded one on
                the CPU gives the image of its seed everywhere in ddt_fast; one on the pipeline's device gives others.
            latents: (N, in_channels, h, w) standard normal, to start from instead of the generators' noise.
            output_type: "pil", a list of RGB images; "np", (N, H, W, channels) float32 in [0, 1]; "pt", (N, channels,
                H, W) likewise; "latent", the model's output, (N, in_channels, h, w) float32, which
                `ddt_fast.autoencoder.undo_normalisation` turns into latents like its data's.
            return_dict: return an ImagePipelineOutput with `images`; else a tuple of the images.
            callback_on_step_end: called after every step as callback(pipe, step, t, {"latents": x}), with a copy of x
                (N, in_channels, h, w) float32. The next step continues from a returned {"latents": y}. If it sets
                `pipe._interrupt`, this was the last step.
            callback_on_step_end_tensor_inputs: the tensors to give it: "latents", or none.
            settings: other fields of `SamplingConfig`, such as refresh_every=2; see `SamplingConfig.override`.

        Raises:
            ValueError: a class is unknown or ambiguous, a setting, a size or the generators are not allowed, or a
                sample is not finite.
        """
        self._check_output(output_type)
        require_int("num_images_per_label", num_images_per_label, 1)
        config = self._config(sampling, num_inference_steps, {"guidance_scale": guidance_scale, **settings})
        names = _tensor_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        ids = self.get_label_ids(class_labels)  # type: ignore[arg-type]
        count, shape = len(ids) * num_images_per_label, self._latent_shape(height, width)
        offloaded = _move_in("transformer", self.transformer)
        sampler = self._sampler_for(config, count, *shape[1:])  # ValueError if memory cannot hold it
        labels = torch.tensor(ids).repeat_interleave(num_images_per_label)
        latents, generators, whose = self._start(latents, generator, count, shape)
        samples = self._draw(sampler, latents, labels, generators, callback_on_step_end, names)
        if offloaded:
            del sampler
            self._engine = self._sampler = None  # before the vae is moved in
        images = self._finished(samples, output_type, whose)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_output(self, output_type: str) -> None:
        require_choice("output_type", output_type, OutputType)
        if self.lacks_vae and output_type != "latent":
            raise ValueError(f"output_type is {output_type!r}, which needs a vae; allowed without: latent")

    @property
    def lacks_vae(self) -> bool:
        """Whether samples are latents that nothing here decodes."""
        return self.vae is None and self.data.in_latents(self.transformer.ddt_config.in_channels)

    def _config(
        self, sampling: SamplingConfig | None, num_steps: int | None, settings: dict[str, Any]
    ) -> SamplingConfig:
        """The settings of a call: `sampling` or the scheduler's, with those given."""
        require_arguments("DDTPipeline", settings, [*signature(self.__call__).parameters, *_SETTINGS])
        own = self.scheduler.sampling_config if sampling is None else sampling
        require_kind("sampling", own, SamplingConfig)
        if settings.get("cuda_graphs") is None:
            settings["cuda_graphs"] = self._cuda_graphs
        return own.override(num_steps=num_steps, **settings)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(channels, height, width) of the model's input for images of this size; ValueError if it does not fit."""
        config = self.transformer.ddt_config
        factor = self.data.image_size // self.data.sample_size if self.vae is None else pixels_per_latent(self.vae)
        multiple = factor * config.patch_size
        for name, size in (("height", height), ("width", width)):
            if size is not None and not (type(size) is int and size > 0 and size % multiple == 0):
                raise ValueError(f"{name} is {size!r}; allowed: a positive multiple of {multiple} pixels")
        size = self.data.image_size
        return config.in_channels, (height or size) // factor, (width or size) // factor

    def _sampler_for(self, config: SamplingConfig, count: int, height: int, width: int) -> Sampler:
        """The latest sampler, with its buffers and graphs, if nothing has changed since; else a new one."""
        model, reusable = self._engine_model()
        if config.cuda_graphs is None and not reusable:
            config = replace(config, cuda_graphs=False)  # they would serve one call
        key = (config, count, height, width)
        if self._sampler is not None and self._sampler[0] == key and self._sampler[1].model is model:
            return self._sampler[1]
        self._sampler = None
        sampler = Sampler(model, config, count, height, width)
        if reusable:
            self._sampler = key, sampler
        return sampler

    def _engine_model(self) -> tuple[DDT | FusedDDT, bool]:
        """The model to sample with, and whether its sampler may serve another call. It is the fused model, made again
        when the transformer's weights change, or the transformer itself if layers are adapted or quantised."""
        key = _fingerprint(self.transformer)
        if self._engine is None or self._engine[0] != key:
            self._engine = self._sampler = None
            plain = self.transformer.is_plain and self.transformer.ddt_config.head_dim <= 128
            reference = self.transformer.reference
            if not plain:
                logger.warning("The transformer is adapted, quantised or has wide heads: it runs as it is, not fused.")
            # A copy, because the fused model merges weights.
            model = FusedDDT.from_reference(reference).requires_grad_(False) if plain else reference
            self._engine = key, model, plain
        return self._engine[1:]

    def _start(
        self,
        latents: Tensor | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        count: int,
        shape: tuple[int, int, int],
    ) -> tuple[Tensor, list[torch.Generator], list[str]]:
        """The noise to start from, `latents` if given, each sample's generator, and what to call it in an error."""
        generators = per_sample(generator, count, self.transformer.device)
        whose = _sample_names(generators if latents is None and generator is not None else [], count)
        latents = normal(shape, generators) if latents is None else latents
        _require_latents("latents are", latents, (count, *shape), f" for {plural(count, 'image')}")
        return latents, generators, whose

    def _draw(
        self,
        sampler: Sampler,
        latents: Tensor,
        labels: Tensor,
        generators: list[torch.Generator],
        call: StepCallback | None,
        names: list[str],
    ) -> Tensor:
        """The samples; every step advances the bar and passes the tensors of these names to `call`, diffusers'
        callback_on_step_end."""
        times = torch.tensor([step.t for step in sampler.plan.steps])

        def progress(done: int, x: Tensor) -> None:
            steps.launched()
            returned = call(self, done - 1, times[done - 1], {name: x.clone() for name in names}) if call else None
            if not (returned is None or isinstance(returned, Mapping)):
                raise ValueError(f"callback_on_step_end returned {kind_of(returned)}; expected None or a dict")
            if returned is not None and "latents" in returned:
                _require_latents("callback_on_step_end returned latents", returned["latents"], tuple(x.shape))
                x.copy_(returned["latents"])
            if self._interrupt:
                raise StopSampling

        self._interrupt, self._num_timesteps = False, len(times)
        with (
            self.progress_bar(total=self._num_timesteps) as bar,
            FinishedSteps(sampler.device, bar.update) as steps,
        ):
            return sampler(latents, labels, generators=generators, progress=progress)

    def _finished(self, samples: Tensor, output_type: OutputType, whose: Sequence[str]) -> Any:
        _require_finite(samples, whose, "check the weights and the settings")
        if output_type == "latent":
            return samples
        samples = self.pixels(samples, whose)
        if output_type == "pil":
            return [Image.fromarray(image) for image in to_uint8(samples)]
        images = (samples / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.cpu().permute(0, 2, 3, 1).numpy()

    def pixels(self, samples: Tensor, whose: Sequence[str] = ()) -> Tensor:
        """What the model draws, (N, in_channels, h, w) → pixels (N, channels, H, W) float32, around [-1, 1]. ValueError
        if pixels are not finite.

        Args:
            samples: as from output_type "latent".
            whose: what to call each sample in the error; () numbers them.
        """
        if self.vae is None:
            return undo_normalisation(samples, self.data)
        _move_in("vae", self.vae)
        pixels = decode_latents(self.vae, samples, data=self.data)
        remedy = f"the vae decodes in {self.vae.dtype}; allowed where that overflows: pipe.vae.to(torch.float32)"
        _require_finite(pixels, whose, remedy)
        return pixels


def _move_in(name: str, model: torch.nn.Module) -> bool:
    """Move a model of `enable_model_cpu_offload` to the GPU, and the one before it to the CPU; return whether it is
    one. ValueError if it is offloaded in another way, which the pipeline would bypass."""
    hook: Any = getattr(model, "_hf_hook", None)
    if hasattr(model, "_diffusers_hook") or (hook is not None and type(hook).__name__ != "CpuOffload"):
        raise ValueError(
            f"the {name} is offloaded, which the pipeline would bypass; use pipe.to(device) or "
            "pipe.enable_model_cpu_offload()"
        )
    if hook is not None:
        hook.pre_forward(model)
    return hook is not None


def _sample_names(generators: Sequence[torch.Generator], count: int) -> list[str]:
    """What to call the samples in an error: by their seeds if each has a generator of its own."""
    if len({id(generator) for generator in generators}) == count:
        return [f"the sample of seed {generator.initial_seed()}" for generator in generators]
    return [f"sample {i}" for i in range(count)]


def _require_finite(images: Tensor, whose: Sequence[str], remedy: str) -> None:
    """Require finite (N, C, H, W); the message names the first that is not."""
    broken = (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if broken:
        name = whose[broken[0]] if whose else f"sample {broken[0]}"
        raise ValueError(f"{name} is not finite; {remedy}")


def _tensor_names(call: StepCallback | None, names: Sequence[str]) -> list[str]:
    """The tensors to give a callback_on_step_end; ValueError for unknown names, or if it is not a function."""
    if call is not None and not callable(call):
        raise ValueError(f"callback_on_step_end is {kind_of(call)}; expected a function")
    names = getattr(call, "tensor_inputs", names)
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"callback_on_step_end_tensor_inputs is {names!r}; expected a list of names")
    for name in names:
        if name not in DDTPipeline._callback_tensor_inputs:
            raise ValueError(f"callback_on_step_end_tensor_inputs names {name!r}; allowed: latents")
    return list(names)


def _require_latents(what: str, latents: object, shape: tuple[int, ...], purpose: str = "") -> None:
    """Require floats of this shape."""
    if not isinstance(latents, Tensor):
        raise ValueError(f"{what} {kind_of(latents)}; expected a tensor {shape}{purpose}")
    if latents.shape != shape:
        raise ValueError(f"{what} {tuple(latents.shape)}; expected {shape}{purpose}")
    if not latents.is_floating_point() or latents.layout != torch.strided or latents.is_meta:
        raise ValueError(f"{what} {latents.dtype}, {latents.layout}, on {latents.device}; expected dense floats")
    if not latents.isfinite().all():
        raise ValueError(f"{what} not finite: they hold NaN or infinity; expected finite numbers")


def _fingerprint(model: torch.nn.Module) -> list[Any]:
    """A value that changes when a weight is replaced, moved, cast or written to."""
    return [
        (
            id(weight),
            weight.dtype,
            weight.device,
            weight.data_ptr() if type(weight.data) is Tensor else 0,
            0 if weight.is_inference() else weight._version,
        )
        for weight in model.parameters()
    ]
