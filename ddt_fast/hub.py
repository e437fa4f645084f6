"""Whether models come from the Hugging Face Hub or from its cache on this machine."""

from __future__ import annotations

import functools
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session

_SECONDS = 10.0


def cache_only(name: str) -> bool:
    """Whether a model has to be taken from the cache because the Hub does not answer: one attempt, where diffusers and
    transformers retry for half a minute. A local folder needs neither.

    Args:
        name: a local folder, or a hub id of a model with a config.json.

    Raises:
        ValueError: the Hub does not answer, and the cache has no such model; or a name that cannot be a hub id.
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
    except Exception:  # of the HTTP library, which depends on the version of huggingface_hub
        return False
    return True
