"""What a pipeline's own parts share: keyword arguments that a part has not are refused, where diffusers passes over
them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import signature
from typing import Any

from diffusers.configuration_utils import ConfigMixin

from ddt_fast.checks import require, require_arguments, require_kind

UPLOAD_OPTIONS = ("repo_id", "private", "token", "commit_message", "create_pr")
"""What diffusers' `save_pretrained` takes for an upload."""


def require_variant(variant: object) -> None:
    """None, or what may be a part of file names."""
    valid = variant is None or (isinstance(variant, str) and re.fullmatch(r"\w[\w.-]{0,63}", variant))
    require(bool(valid), "variant", variant, "none, or up to 64 letters, digits and ._-, such as fp16")


def require_shard_size(size: object) -> None:
    """A number of bytes, or a string, which diffusers reads."""
    valid = isinstance(size, str) or (isinstance(size, int) and not isinstance(size, bool) and size >= 1)
    require(valid, "max_shard_size", size, "a number of bytes, 1 or more, or a size such as 5GB")


class Component(ConfigMixin):
    """A diffusers `ConfigMixin` with exact keyword arguments."""

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As `ConfigMixin.from_config`, through which `from_pretrained` goes too: an object of these settings.

        Args:
            config: the settings by name.
            return_unused_kwargs: return a pair, the second part of which are keyword arguments that are no settings.
            kwargs: settings that go before those in config.

        Raises:
            ValueError: an argument that is no setting and that would not be returned, or a value that is not allowed.
        """
        require_kind("config", config, Mapping)
        if not return_unused_kwargs:
            require_arguments(cls.__name__, kwargs, list(signature(cls).parameters))
        return super().from_config(config, return_unused_kwargs, **kwargs)
