"""What a pipeline's parts share: they refuse keyword arguments that diffusers would ignore."""

import re
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin

from ddt_fast.checks import require, require_arguments, require_kind, require_path

UPLOAD_OPTIONS = ("repo_id", "private", "token", "commit_message", "create_pr")
"""Arguments of diffusers' `save_pretrained` for an upload."""
SAVING_OPTIONS = ("save_directory", "safe_serialization", "variant", "max_shard_size", "push_to_hub")
"""Its arguments for weights."""


def check_loading(options: dict[str, Any]) -> None:
    """Check the options of `from_pretrained`, and remove use_safetensors, which must be true; ValueError otherwise."""
    safe = options.pop("use_safetensors", True)
    require(safe is not False, "use_safetensors", safe, "True, because pickled weights may hold code")
    _require_variant(options.get("variant"))


def check_saving(save_directory: object, given: Mapping[str, Any], *allowed: str) -> Path:
    """Check the arguments of `save_pretrained`, which are `allowed` besides those of an upload; return the folder.
    ValueError if an argument is unknown, a value is not allowed, or there is a file of that name."""
    require_arguments("save_pretrained", given, (*allowed, *UPLOAD_OPTIONS))
    folder = require_path("save_directory", save_directory)
    if folder.is_file():
        raise ValueError(f"save_directory {folder} is a file; expected a folder")
    safe = given.get("safe_serialization", True)
    require(bool(safe), "safe_serialization", safe, "True, because only safetensors are written")
    _require_variant(given.get("variant"))
    size = given.get("max_shard_size")
    valid = size is None or isinstance(size, str) or (type(size) is int and size >= 1)
    require(valid, "max_shard_size", size, "a number of bytes, 1 or more, or a size such as 5GB")
    return folder


def _require_variant(variant: object) -> None:
    """Require None, or a name that may be part of file names."""
    valid = variant is None or (isinstance(variant, str) and re.fullmatch(r"\w[\w.-]{0,63}", variant))
    require(bool(valid), "variant", variant, "none, or up to 64 letters, digits and ._-, such as fp16")


def takes_fields_of(settings: type) -> Callable[[Any], Any]:
    """Give an `__init__(self, **settings)` a signature with a dataclass's fields: diffusers reads the settings of a
    component, and their defaults, from its signature."""

    def decorate(init: Any) -> Any:
        own = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
        init.__signature__ = Signature([own, *signature(settings).parameters.values()])
        return init

    return decorate


class Component(ConfigMixin):
    """A diffusers `ConfigMixin` with exact keyword arguments."""

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As `ConfigMixin.from_config`, which `from_pretrained` calls too: an object with these settings, overridden by
        kwargs. ValueError if one of these is not a setting and would not be returned, or a value is not allowed."""
        require_kind("config", config, Mapping)
        if not return_unused_kwargs:
            require_arguments(cls.__name__, kwargs, list(signature(cls).parameters))
        return super().from_config(config, return_unused_kwargs, **kwargs)
