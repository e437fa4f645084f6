"""The Hugging Face Hub, and its cache on this machine."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session

from ddt_fast.wording import one_line

_SECONDS = 10.0


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, user/model."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def fetch(name: str, patterns: Sequence[str], **options: Any) -> Path:
    """Download the files of a Hub repository that match the patterns, or take them from the cache without a network;
    return the local folder. ValueError if the Hub does not provide the repository.

    Args:
        name: the repository's hub id.
        patterns: file names with wildcards.
        options: of `huggingface_hub.snapshot_download`.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, TypeError) as error:
        raise ValueError(f"{name} does not exist here, and the Hub does not provide it: {one_line(error)}") from error


def cache_only(name: str) -> bool:
    """Whether a model must come from the cache because the Hub does not answer.

    One attempt decides, where diffusers and transformers retry for half a minute. A local folder needs neither.
    ValueError if the Hub does not answer and the cache does not hold the model, or the name cannot be a hub id.

    Args:
        name: a local folder, or the hub id of a model with a config.json.
    """
    if Path(name).is_dir():
        return False
    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    if _hub_answers():
        return False
    if not cached:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        raise ValueError(f"there is no such folder, {why}, and its cache on this machine does not hold the model")
    return True


@functools.cache
def _hub_answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # the HTTP library's, which depends on the version of huggingface_hub
        return False
    return True
