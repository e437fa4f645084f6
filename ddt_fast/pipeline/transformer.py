"""A DDT as a diffusers model: its config.json and safetensors are those of our model folders."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from os import PathLike
from pathlib import Path
from typing import Any, Self, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import is_accelerate_available
from torch import Tensor, nn

from ddt_fast.autoencoder import default_dtype_kept, quiet_casts
from ddt_fast.checks import require_path
from ddt_fast.config import DataConfig, DDTConfig, SamplingConfig
from ddt_fast.files import read_json
from ddt_fast.model.reference import DDT
from ddt_fast.model.settings import CONFIG_NAME
from ddt_fast.model.weights import build_model, read_folder
from ddt_fast.pipeline.component import SAVING_OPTIONS, Component, check_loading, check_saving
from ddt_fast.pipeline.folder import check_weights


class DDTTransformer2DModel(ModelMixin, Component, PeftAdapterMixin):  # type: ignore[misc]
    """`reference.DDT` with diffusers' loading, saving, sharding, adapters and quantisation. Its state_dict has the
    released names. ValueError if a value is not allowed.

    Args:
        in_channels, patch_size, hidden_size, num_heads, num_blocks, num_encoder_blocks, num_classes: as `DDTConfig`.
        data: the fields of a `DataConfig`: how samples become images.
        sampling: the fields of a `SamplingConfig`: how samples are best drawn.
    """

    _no_split_modules = ["Block"]  # type: ignore[assignment]  # noqa: RUF012, diffusers' own attribute

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        hidden_size: int,
        num_heads: int,
        num_blocks: int,
        num_encoder_blocks: int,
        num_classes: int,
        data: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, part in DDT(self.ddt_config).named_children():
            self.add_module(name, part)

    @classmethod
    def from_reference(cls, model: DDT, data: DataConfig, sampling: SamplingConfig) -> Self:
        """A model on the parts of a reference: parameters are shared, not copied."""
        with torch.device("meta"):
            transformer = cls(**asdict(model.config), data=asdict(data), sampling=asdict(sampling))
        for name, part in model.named_children():
            setattr(transformer, name, part)
        return transformer.train(model.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[Any] | None, **kwargs: Any) -> Any:
        """As diffusers' `ModelMixin.from_pretrained`, only from safetensors: pickles are not opened.

        Args:
            pretrained_model_name_or_path: a model folder, such as a training run's model/ or a pipeline's transformer/,
                or a hub id.

        Raises:
            ValueError: an argument is unknown, there are no safetensors, weights do not fit config.json, or it is
                corrupt.
            OSError: there is no model.
        """
        name = require_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        check_loading(kwargs)
        kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())
        with_info = kwargs.pop("output_loading_info", False)
        folder = Path(name, kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_weights(folder)
            _check_fits(folder, kwargs)
        try:
            kwargs |= {"use_safetensors": True, "output_loading_info": True}
            with default_dtype_kept():
                loaded: Any = super().from_pretrained(str(name), **kwargs)
        except TypeError as error:  # config.json lacks an argument of __init__
            raise ValueError(f"{folder}: config.json is not a valid configuration: {error}") from error
        except RuntimeError as error:
            # torch's refusal of weights of other shapes; diffusers itself compares shapes only if it has accelerate.
            if "size mismatch" not in str(error):
                raise
            first = str(error).splitlines()[1].strip()
            raise ValueError(f"{folder}: weights and config.json disagree: {first}") from error
        model, info = loaded
        # diffusers only warns, and leaves missing weights uninitialised.
        wrong = [f"{len(names)} {kind} (such as {sorted(names)[0]})" for kind, names in info.items() if names]
        if wrong:
            raise ValueError(f"{folder}: weights and config.json disagree: {', '.join(wrong)}")
        return (model, info) if with_info else model

    # diffusers' pipelines look in this signature for the arguments to pass.
    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | PathLike[Any],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **kwargs: Any,
    ) -> None:
        """As diffusers' `ModelMixin.save_pretrained`: config.json and safetensors, which `load_model` reads.

        ValueError if an argument is unknown, safe_serialization is False or there is a file of that name; OSError if
        the folder cannot be written.
        """
        options: dict[str, Any] = {"variant": variant, "max_shard_size": max_shard_size, **kwargs}
        options["safe_serialization"] = safe_serialization
        folder = check_saving(save_directory, options, *SAVING_OPTIONS, "is_main_process", "save_function")
        super().save_pretrained(str(folder), **options)

    def to(self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """As `torch.nn.Module.to`."""
        with quiet_casts():
            return cast(Self, super().to(*args, **kwargs))

    @property
    def ddt_config(self) -> DDTConfig:
        """The shape."""
        return DDTConfig(**{field.name: self.config[field.name] for field in fields(DDTConfig)})

    @property
    def reference(self) -> DDT:
        """This model as a `DDT`: another view of the same parts."""
        view = DDT.__new__(DDT)
        nn.Module.__init__(view)
        view.config = self.ddt_config
        for name, part in self.named_children():
            view.add_module(name, part)
        view.training = self.training
        return view

    @property
    def is_plain(self) -> bool:
        """Whether all weights are ordinary tensors of ordinary layers, neither adapted nor quantised."""
        with torch.device("meta"):
            kinds = {name: type(part) for name, part in DDT(self.ddt_config).named_modules() if name}
        own = {name: type(part) for name, part in self.named_modules() if name}
        return kinds == own and all(type(parameter.data) is Tensor for parameter in self.parameters())

    def forward(self, x: Tensor, t: Tensor, y: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The velocity at (x, t) for the labels y, and the encoder's state; see `DDT.forward`."""
        return cast(tuple[Tensor, Tensor], self.reference(x, t, y, state))


def _check_fits(folder: Path, given: Mapping[str, Any]) -> None:
    """ValueError unless the weights in a folder fit its settings, before a model of the wrong size is made. Settings in
    `given`, arguments of `from_pretrained`, override the folder's."""
    entries = {**read_json(folder / CONFIG_NAME), **given}
    if entries.get("quantization_config") and not given.get("quantization_config"):
        raise ValueError(f"{folder / CONFIG_NAME}: quantization_config is set; expected weights that are not quantised")
    if missing := [field.name for field in fields(DDTConfig) if field.name not in entries]:
        raise ValueError(f"{folder / CONFIG_NAME} is not a valid configuration: it lacks {', '.join(missing)}")
    settings_of({"data": None, "sampling": None, **entries})
    config = DDTConfig(**{field.name: entries[field.name] for field in fields(DDTConfig)})
    build_model(config, read_folder(folder, given.get("variant")), folder)


def settings_of(config: Mapping[str, Any]) -> tuple[DataConfig, SamplingConfig]:
    """The data and sampling settings in a transformer's config; ValueError for wrong ones."""
    try:
        return DataConfig(**(config["data"] or {})), SamplingConfig.saved(config["sampling"] or {})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"config.json is not a valid configuration: {error}") from error
