"""`DDTPipeline`: from class labels to images, by diffusers' conventions, on our engine."""

# Annotations are not deferred here, and __init__'s are of the older kind: diffusers 0.36 reads them as they are.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from inspect import signature
from typing import Any, Literal, Optional, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from ddt_fast.autoencoder import decode_latents, decoded_by, pixels_per_latent, undo_normalisation
from ddt_fast.checks import require_arguments, require_choice, require_int, require_kind
from ddt_fast.class_names import ClassLabel, ClassNames, default_id2label
from ddt_fast.config import SamplingConfig
from ddt_fast.generation.images import to_uint8
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.pipeline.loading import SavedPipeline
from ddt_fast.pipeline.scheduler import DDTScheduler, per_sample
from ddt_fast.pipeline.transformer import DDTTransformer2DModel, settings_of
from ddt_fast.sampling.engine import Progress, Sampler, StopSampling
from ddt_fast.sampling.noise import normal
from ddt_fast.sampling.plan import SamplingPlan
from ddt_fast.wording import plural

logger = logging.get_logger(__name__)

# The fields of `SamplingConfig` that a call takes as they are: num_steps goes by diffusers' name.
_SETTINGS = [setting.name for setting in fields(SamplingConfig) if setting.name != "num_steps"]

OutputType = Literal["pil", "np", "pt", "latent"]
StepCallback = Callable[["DDTPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]


class DDTPipeline(SavedPipeline):
    """Images of classes, drawn by a DDT.

    The transformer's weights are merged for sampling, into a copy that is made anew when they have changed; what is
    written to a weight's `.data` goes unnoticed until `pipe.to(...)`. One thread at a time may call a pipeline.

    Args:
        transformer: the model.
        vae: from its latents to pixels; None for a model of pixels.
        scheduler: the sampling settings that hold where a call does not say otherwise.
        id2label: label → names of the class, separated by commas; None for ImageNet's where the model has 1000 classes
            of latents, "0" to "9" for the digits, else none.

    Raises:
        ValueError: parts that do not fit together.
    """

    _optional_components = ["vae"]  # noqa: RUF012, attributes of diffusers' class
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        transformer: DDTTransformer2DModel,
        vae: Optional[AutoencoderKL],  # noqa: UP045
        scheduler: DDTScheduler,
        id2label: Optional[dict] = None,  # noqa: UP045
    ) -> None:
        super().__init__()
        # torch.compile hides a module in one of its own.
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
                self.data = decoded_by(vae, self.data.autoencoder or "vae", self.data)
        if id2label is None:
            id2label = default_id2label(self.data.dataset, config.num_classes)
        self.class_names = ClassNames(config.num_classes, id2label)
        self.register_to_config(id2label={str(label): name for label, name in self.id2label.items()})
        self._cuda_graphs = False
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
        """Whether the latest call was told to end early: a callback may set `pipe._interrupt`."""
        return self._interrupt

    def get_label_ids(self, label: ClassLabel | Sequence[ClassLabel]) -> list[int]:
        """The labels of classes given by name or number; ValueError names what comes near an unknown or ambiguous
        one."""
        return self.class_names.labels(label)

    def enable_cuda_graphs(self) -> None:
        """Replay the sampling loop as CUDA graphs, captured at the first call of a shape and setting.

        Raises:
            ValueError: the transformer is not on a CUDA device.
        """
        device = self.transformer.device
        if device.type != "cuda":
            there = "" if torch.cuda.is_available() else ", and torch sees none here"
            raise ValueError(f"CUDA graphs need a CUDA device, the transformer is on {device}{there}; pipe.to('cuda')")
        self._cuda_graphs = True

    def disable_cuda_graphs(self) -> None:
        """Run the sampling loop eagerly again."""
        self._cuda_graphs = False

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `DiffusionPipeline.to`: a device, a dtype, or both, and silence_dtype_warnings; ValueError for others."""
        require_arguments("to", kwargs, ("device", "dtype", "silence_dtype_warnings"))
        self._engine = self._sampler = None  # before others take their memory
        return super().to(*args, **kwargs)

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
            class_labels: a class, or several: labels, 0 to num_classes - 1, or names, as in `pipe.id2label`.
            num_inference_steps, guidance_scale: `SamplingConfig.num_steps` and guidance_scale; see settings.
            sampling: how to draw; None for the scheduler's settings.
            num_images_per_label: so many images of each entry of class_labels, one after the other.
            height, width: of the images in pixels; None for the size the model was trained at.
            generator: one per image, or one that is drawn from for one image after the other; None for torch's own of
                the CPU. One of the CPU that was seeded gives the image that its seed has everywhere in ddt_fast; one of
                the pipeline's own device draws there, and gives images of its own.
            latents: (N, in_channels, h, w) standard normal, to start from in place of the generators' noise.
            output_type: "pil", a list of RGB images; "np", (N, H, W, channels) float32 in [0, 1]; "pt", (N, channels,
                H, W) likewise; "latent", (N, in_channels, h, w) float32, what the model draws
                (`ddt_fast.autoencoder.undo_normalisation` makes them what its data were).
            return_dict: ImagePipelineOutput with `images`; else a tuple of them alone.
            callback_on_step_end: called after every step as callback(pipe, step, t, {"latents": x}), x (N, in_channels,
                h, w) float32, a copy. The next step continues from a returned {"latents": y}. When it sets
                `pipe._interrupt`, that was the last step.
            callback_on_step_end_tensor_inputs: which tensors it is given: "latents", or none.
            settings: any other field of `SamplingConfig`, such as refresh_every=2, in place of that in `sampling`; None
                leaves it, and last_step 0 means 1 / steps.

        Raises:
            ValueError: an unknown or ambiguous class, an unknown setting or one that is not allowed, sizes that do not
                fit the model, another number of generators than of images, or generators on a device that is neither
                the CPU nor the pipeline's.
        """
        self._check_output(output_type)
        require_int("num_images_per_label", num_images_per_label, 1)
        config = self._config(sampling, num_inference_steps, {"guidance_scale": guidance_scale, **settings})
        names = _tensor_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        ids = self.get_label_ids(class_labels)  # type: ignore[arg-type]
        count, shape = len(ids) * num_images_per_label, self._latent_shape(height, width)
        sampler = self._sampler_for(config, count, *shape[1:])  # refuses what memory cannot hold
        labels = torch.tensor(ids).repeat_interleave(num_images_per_label)
        generators = per_sample(generator, count, self.transformer.device)
        if latents is None:
            latents = normal(shape, generators)
        _require_latents("latents are", latents, (count, *shape), f" for {plural(count, 'image')}")
        self._interrupt, self._num_timesteps = False, len(sampler.plan.steps)
        with self.progress_bar(total=self._num_timesteps) as bar:
            progress = self._after_step(callback_on_step_end, names, sampler.plan, bar.update)
            samples = sampler(latents, labels, generators=generators, progress=progress)
        images = self._finished(samples, output_type)
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
        """The settings of a call: `sampling`, or the scheduler's, where a setting is None."""
        require_arguments("DDTPipeline", settings, [*signature(self.__call__).parameters, *_SETTINGS])
        own = self.scheduler.sampling_config if sampling is None else sampling
        require_kind("sampling", own, SamplingConfig)
        given = {name: value for name, value in {"num_steps": num_steps, **settings}.items() if value is not None}
        if self._cuda_graphs:
            given.setdefault("cuda_graphs", True)
        if given.get("last_step") == 0:
            given["last_step"] = None
        if "refresh_steps" in given:
            given = {"refresh_every": 1, "num_refreshes": None, **given}
        elif "refresh_every" in given:
            given |= {"refresh_steps": None, "num_refreshes": None}
        elif own.refresh_steps not in (None, "dp") and given.get("num_steps", own.num_steps) != own.num_steps:
            steps = f"{own.num_steps} steps, not for {given['num_steps']}"
            raise ValueError(f"refresh_steps are for {steps}; give refresh_every or refresh_steps")
        return replace(own, **given)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(channels, height, width) of what the model sees, for pixels; ValueError for sizes it cannot see."""
        config = self.transformer.ddt_config
        factor = self.data.image_size // self.data.sample_size if self.vae is None else pixels_per_latent(self.vae)
        multiple = factor * config.patch_size
        for name, size in (("height", height), ("width", width)):
            if size is not None and not (type(size) is int and size > 0 and size % multiple == 0):
                raise ValueError(f"{name} is {size!r}; allowed: a positive multiple of {multiple} pixels")
        size = self.data.image_size
        return config.in_channels, (height or size) // factor, (width or size) // factor

    def _sampler_for(self, config: SamplingConfig, count: int, height: int, width: int) -> Sampler:
        """The latest sampler again, with its buffers and graphs, where nothing has changed since; else a new one."""
        if hasattr(self.transformer, "_hf_hook") or hasattr(self.transformer, "_diffusers_hook"):
            raise ValueError("the transformer is offloaded, which the sampler bypasses; call pipe.to(device) instead")
        model, reusable = self._engine_model()
        key = (config, count, height, width)
        if self._sampler is not None and self._sampler[0] == key and self._sampler[1].model is model:
            return self._sampler[1]
        self._sampler = None
        sampler = Sampler(model, config, count, height, width)
        if reusable:
            self._sampler = key, sampler
        return sampler

    def _engine_model(self) -> tuple[DDT | FusedDDT, bool]:
        """What samples: the fused model, made anew when the transformer's weights have changed, or, where layers have
        adapters or are quantised, the transformer itself. And whether a sampler of it may serve another call."""
        key = _fingerprint(self.transformer)
        if self._engine is None or self._engine[0] != key:
            self._engine = self._sampler = None
            plain = self.transformer.is_plain and self.transformer.ddt_config.head_dim <= 128
            reference = self.transformer.reference
            if not plain:
                logger.warning("The transformer is adapted, quantised or has wide heads: it runs as it is, not fused.")
            # A copy, since sampling merges weights that have names of their own.
            model = FusedDDT.from_reference(reference).requires_grad_(False) if plain else reference
            self._engine = key, model, plain
        return self._engine[1:]

    def _after_step(
        self, call: StepCallback | None, names: list[str], plan: SamplingPlan, advance: Callable[[], object]
    ) -> Progress:
        """diffusers' callback_on_step_end as the engine's `progress`: advance the bar, then hand out the latents and
        take them back."""
        times = torch.tensor([step.t for step in plan.steps])

        def progress(done: int, x: Tensor) -> None:
            advance()
            returned = call(self, done - 1, times[done - 1], {name: x.clone() for name in names}) if call else None
            if not (returned is None or isinstance(returned, Mapping)):
                raise ValueError(f"callback_on_step_end returned a {type(returned).__name__}; expected None or a dict")
            if returned is not None and "latents" in returned:
                _require_latents("callback_on_step_end returned latents", returned["latents"], tuple(x.shape))
                x.copy_(returned["latents"])
            if self._interrupt:
                raise StopSampling

        return progress

    def _finished(self, samples: Tensor, output_type: OutputType) -> Any:
        if output_type == "latent":
            return samples
        samples = self.pixels(samples)
        if output_type == "pil":
            return [Image.fromarray(image) for image in to_uint8(samples)]
        images = (samples / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.cpu().permute(0, 2, 3, 1).numpy()

    def pixels(self, samples: Tensor) -> Tensor:
        """What the model draws, (N, in_channels, h, w) → pixels (N, channels, H, W) float32, around [-1, 1]."""
        if self.vae is None:
            return undo_normalisation(samples, self.data)
        return decode_latents(self.vae, samples, data=self.data)


def _tensor_names(call: StepCallback | None, names: Sequence[str]) -> list[str]:
    """The tensors that a callback_on_step_end is given; ValueError for others than there are, or for no function."""
    if call is not None and not callable(call):
        raise ValueError(f"callback_on_step_end is a {type(call).__name__}; expected a function")
    names = getattr(call, "tensor_inputs", names)
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"callback_on_step_end_tensor_inputs is {names!r}; expected a list of names")
    for name in names:
        if name not in DDTPipeline._callback_tensor_inputs:
            raise ValueError(f"callback_on_step_end_tensor_inputs names {name!r}; allowed: latents")
    return list(names)


def _require_latents(what: str, latents: object, shape: tuple[int, ...], purpose: str = "") -> None:
    """ValueError unless these are numbers of this shape."""
    if not isinstance(latents, Tensor):
        raise ValueError(f"{what} a {type(latents).__name__}; expected a tensor {shape}{purpose}")
    if latents.shape != shape:
        raise ValueError(f"{what} {tuple(latents.shape)}; expected {shape}{purpose}")
    if not latents.is_floating_point() or latents.layout != torch.strided or latents.is_meta:
        raise ValueError(f"{what} {latents.dtype}, {latents.layout}, on {latents.device}; expected dense floats")


def _fingerprint(model: torch.nn.Module) -> list[Any]:
    """Differs when a weight has been replaced, moved, cast or written to."""
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
