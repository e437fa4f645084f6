"""LoRA adapters of a pipeline, in files as diffusers' other transformers have them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.utils import is_peft_available
from torch import Tensor

from ddt_fast.checks import require_path
from ddt_fast.pipeline.component import check_loading
from ddt_fast.weight_files import read_safetensors

_PREFIX = "transformer."


class LoraPipeline(LoraBaseMixin):
    """The part of `DDTPipeline` that reads and writes LoRA adapters. `unload_lora_weights`, after which the transformer
    is as before and fused again, `set_adapters`, `fuse_lora` and the others are diffusers'."""

    _lora_loadable_modules = ["transformer"]  # noqa: RUF012, attributes of diffusers' class
    transformer_name = "transformer"
    transformer: Any

    def load_lora_weights(  # type: ignore[override]
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Add a LoRA adapter to the transformer, which then runs unfused.

        Args:
            pretrained_model_name_or_path_or_dict: a folder or hub id with pytorch_lora_weights.safetensors, such a
                file, or its tensors by name; names begin with "transformer.".
            adapter_name: what to call it; None numbers it.
            kwargs: weight_name and subfolder of the file, and the others of diffusers' `load_lora_adapter`.

        Raises:
            ValueError: peft is missing, the file is damaged or not safetensors, or holds no LoRA of a transformer.
        """
        if not is_peft_available():
            raise ValueError("LoRA adapters need peft: pip install peft")
        given: Any = pretrained_model_name_or_path_or_dict
        if isinstance(given, dict):
            _require_lora(given, "the dict")
            given = dict(given)
        else:
            given = require_path("pretrained_model_name_or_path_or_dict", given)
            local = given / (kwargs.get("subfolder") or "")
            if local.is_dir():
                local = local / (kwargs.get("weight_name") or LORA_WEIGHT_NAME_SAFE)
            if given.exists():
                _require_lora(read_safetensors("LoRA", local, "a whole .safetensors file"), str(local))
            given = str(given)
        check_loading(kwargs)
        options = {"use_safetensors": True, "adapter_name": adapter_name, "_pipeline": self, **kwargs}
        self.transformer.load_lora_adapter(given, prefix=self.transformer_name, **options)

    @classmethod
    def save_lora_weights(  # type: ignore[override]
        cls,
        save_directory: str | Path,
        transformer_lora_layers: Mapping[str, Tensor],
        is_main_process: bool = True,
        weight_name: str | None = None,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Write pytorch_lora_weights.safetensors, which `load_lora_weights` reads.

        Args:
            save_directory: the folder.
            transformer_lora_layers: what `peft.get_peft_model_state_dict(pipe.transformer)` returns.
            is_main_process: whether this process writes.
            weight_name: the name of the file; None for pytorch_lora_weights.safetensors.
            transformer_lora_adapter_metadata: the adapter's settings, such as `peft_config["default"].to_dict()` of the
                transformer; lora_alpha is lost without them.

        Raises:
            ValueError: there are no layers.
        """
        folder = require_path("save_directory", save_directory)
        if not transformer_lora_layers:
            raise ValueError("transformer_lora_layers is empty; expected peft.get_peft_model_state_dict(transformer)")
        cls._save_lora_weights(
            save_directory=str(folder),
            lora_layers={cls.transformer_name: dict(transformer_lora_layers)},
            lora_metadata={cls.transformer_name: transformer_lora_adapter_metadata},
            is_main_process=is_main_process,
            weight_name=weight_name or LORA_WEIGHT_NAME_SAFE,
        )


def _require_lora(tensors: Mapping[str, Tensor], where: str) -> None:
    if not any(name.startswith(_PREFIX) and "lora" in name for name in tensors):
        held = next(iter(tensors), "nothing")
        raise ValueError(f"{where} holds no LoRA of a transformer, only {held}; expected {_PREFIX}*.lora_A.*")
