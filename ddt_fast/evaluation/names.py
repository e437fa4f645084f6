"""The metrics and features by name, and their checks; nothing here needs torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from ddt_fast.checks import require_choice

Features = Literal["inception", "pixels"]
Metric = Literal["fid", "sfid", "inception_score", "precision", "recall", "kid"]
METRICS: tuple[Metric, ...] = get_args(Metric)


def check_features(features: Features, weights: str | Path | None) -> None:
    """ValueError for an unknown name, or for weights of a network that is not used."""
    require_choice("features", features, Features)
    if features == "pixels" and weights is not None:
        raise ValueError("`inception_weights` is for inception features, not for pixels")


def check_metrics(metrics: Sequence[str]) -> None:
    """ValueError for a name that is not in `METRICS`, or for no names."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        named = f"metric {unknown[0]!r} does not exist" if unknown else "no metrics are asked for"
        raise ValueError(f"{named}; allowed: {', '.join(METRICS)}")
