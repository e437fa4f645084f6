"""A DDT as a diffusers model: its config.json and safetensors are those of our model folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import is_accelerate_available
from torch import Tensor, nn

from ddt_fast.config import DataConfig, DDTConfig, SamplingConfig
from ddt_fast.model.reference import DDT
from ddt_fast.pipeline.folder import check_weights


class DDTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """`reference.DDT` with diffusers' loading, saving, sharding, adapters and quantisation; state_dict has the released
    names.

    Args:
        in_channels, patch_size, hidden_size, num_heads, num_blocks, num_encoder_blocks, num_classes: as `DDTConfig`.
        data: the fields of a `DataConfig`: how samples become images.
        sampling: the fields of a `SamplingConfig`: how samples are best drawn.

    Raises:
        ValueError: a value that is not allowed.
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
    def from_reference(cls, model: DDT, data: DataConfig, sampling: SamplingConfig) -> DDTTransformer2DModel:
        """A model on the reference's very parts: parameters are shared, not copied."""
        with torch.device("meta"):
            transformer = cls(**asdict(model.config), data=asdict(data), sampling=asdict(sampling))
        for name, part in model.named_children():
            setattr(transformer, name, part)
        return transformer.train(model.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[Any] | None, **kwargs: Any) -> Any:
        """As diffusers' `ModelMixin.from_pretrained`, from safetensors alone: pickles are not opened.

        Args:
            pretrained_model_name_or_path: a model folder, such as a training run's model/ or a pipeline's transformer/,
                or a hub id.

        Raises:
            ValueError: no safetensors there, weights that do not fit config.json, or a corrupt one.
            OSError: nothing there.
        """
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError("use_safetensors is False; allowed: True, weights that are pickled may hold code")
        with_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_weights(folder)
        try:
            kwargs |= {"use_safetensors": True, "output_loading_info": True}
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except TypeError as error:  # config.json lacks an argument of __init__
            raise ValueError(f"{folder}: config.json is not a valid configuration: {error}") from error
        except RuntimeError as error:
            # How torch refuses weights of other shapes; diffusers itself looks at shapes where it has accelerate.
            if "size mismatch" not in str(error):
                raise
            first = str(error).splitlines()[1].strip()
            raise ValueError(f"{folder}: weights and config.json disagree: {first}") from error
        model, info = loaded
        # diffusers warns only, and leaves what is missing as memory happened to be.
        wrong = [f"{len(names)} {kind} (such as {sorted(names)[0]})" for kind, names in info.items() if names]
        if wrong:
            raise ValueError(f"{folder}: weights and config.json disagree: {', '.join(wrong)}")
        return (model, info) if with_info else model

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


def settings_of(config: Mapping[str, Any]) -> tuple[DataConfig, SamplingConfig]:
    """The data and sampling settings in a transformer's config; ValueError for wrong ones."""
    try:
        return DataConfig(**(config["data"] or {})), SamplingConfig(**(config["sampling"] or {}))
    except TypeError as error:
        raise ValueError(f"config.json is not a valid configuration: {error}") from error
