"""Scores of samples against a reference: which metrics can be computed, and their values."""

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddt_fast.data.image_file import Images
from ddt_fast.evaluation.features import Extractor, FeatureAccumulator, FeatureSet, InceptionExtractor, kind_of_features
from ddt_fast.evaluation.manifold import precision_recall
from ddt_fast.evaluation.metrics import fixed_permutation, frechet_distance, inception_score, kernel_inception_distance
from ddt_fast.evaluation.names import METRICS, check_metrics
from ddt_fast.evaluation.sources import ImageSource, Source, open_source
from ddt_fast.provenance import environment
from ddt_fast.wording import plural

NUM_SPLITS = 10
NUM_NEIGHBOURS = 3
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
# The size of ADM's reference batches, which published precision and recall depend on.
REFERENCE_FEATURES = 10_000
_FEWEST = {"fid": 2, "sfid": 2, "inception_score": NUM_SPLITS, "precision": NUM_NEIGHBOURS + 1}
_FEWEST |= {"recall": NUM_NEIGHBOURS + 1, "kid": 2}
# With fewer images, the covariance of 2048 features is singular.
FEWEST_FOR_FID = 2048

BatchHook = Callable[[str, Images, int], None]


def evaluate(
    samples: str | Path | Source | FeatureSet,
    reference: str | Path | Source | FeatureSet | None = None,
    metrics: Sequence[str] = METRICS,
    make_extractor: Callable[[], Extractor] = InceptionExtractor,
    batch_size: int = 64,
    on_batch: BatchHook | None = None,
) -> dict[str, Any]:
    """Score samples against a reference.

    Args:
        samples: a file or folder, by name or opened (see `open_source`), or features from a `FeatureAccumulator`.
        reference: the same; None leaves out the metrics that need a reference.
        metrics: names from `METRICS`.
        make_extractor: called once, when images must be read; default: the Inception network on the CPU, with the
            published weights.
        batch_size: images at a time.
        on_batch: called with "samples" or "reference", each batch of images (first an empty one, before reading), and
            the number of all images.

    Returns:
        Plain JSON values: `metrics` (name to value), `not_computed` (name to reason), `samples`, `reference`,
        `features`, `settings`, `seconds`, `images_per_second`, `environment`.

    Raises:
        ValueError: an input is wrong, or nothing can be computed.
    """
    check_metrics(metrics)
    make = functools.cache(make_extractor)
    sets: dict[str, FeatureSet] = {}
    for role, given in (("samples", samples), ("reference", reference)):
        if isinstance(given, FeatureSet):
            sets[role] = given
        elif given is not None:
            sets[role] = gather(given, role, metrics, make, batch_size, on_batch)
    started = time.perf_counter()
    values, not_computed = score(sets["samples"], sets.get("reference"), metrics)
    seconds = {role: found.seconds for role, found in sets.items() if found.seconds is not None}
    timed = [found for found in sets.values() if found.seconds and found.count]
    return {
        "metrics": values,
        "not_computed": not_computed,
        **{role: _describe(found) for role, found in sets.items()},
        "features": next((found.extractor for found in sets.values() if found.extractor), None),
        "settings": {
            "inception_score_splits": NUM_SPLITS,
            "precision_recall_neighbours": NUM_NEIGHBOURS,
            "kid_subsets": KID_SUBSETS,
            "kid_subset_size": min(KID_SUBSET_SIZE, *(_num_features(found) for found in sets.values())),
        },
        "seconds": {**seconds, "metrics": time.perf_counter() - started},
        "images_per_second": (
            sum(found.count or 0 for found in timed) / sum(found.seconds or 0 for found in timed) if timed else None
        ),
        "environment": environment(torch.device("cpu")),
    }


def gather(
    place: str | Path | Source,
    role: str = "samples",
    metrics: Sequence[str] = METRICS,
    make_extractor: Callable[[], Extractor] = InceptionExtractor,
    batch_size: int = 64,
    on_batch: BatchHook | None = None,
) -> FeatureSet:
    """Read what the metrics need from a file or folder.

    If a file holds statistics, FID and sFID use them instead of its images, as ADM's evaluator does: in ADM's reference
    batches, the statistics are of the whole data set and the images are 10,000 of it. For precision, recall and KID, a
    larger reference is reduced to 10,000 images by a fixed permutation. ValueError if the file is missing, damaged or
    has the wrong content.

    Args:
        place: a file or folder, by name or opened (see `open_source`).
        role: "samples" or "reference".
        metrics, make_extractor, batch_size, on_batch: as for `evaluate`.
    """
    source = place if isinstance(place, Source) else open_source(place)
    path, images = source.path, source.images
    found = FeatureSet(str(path), pool=source.pool, spatial=source.spatial, statistics_count=source.statistics_count)
    if images is None:
        return found
    of_features = {"precision", "recall", "kid"} | ({"inception_score"} if role == "samples" else set())
    keep: bool | frozenset[int] = bool(of_features.intersection(metrics))
    if not (keep or ("fid" in metrics and source.pool is None) or ("sfid" in metrics and source.spatial is None)):
        return replace(found, count=images.count, size=images.size)
    if role == "samples" and "inception_score" in metrics and images.sorted_by_class:
        warnings.warn(
            f"{path} is sorted by class; it is shuffled here before the Inception Score splits it, but ADM's evaluator "
            "does not shuffle and would give a far lower score",
            stacklevel=2,
        )
    if role == "reference" and keep and images.count > REFERENCE_FEATURES:
        keep = frozenset(fixed_permutation(images.count)[:REFERENCE_FEATURES].tolist())
    started = time.perf_counter()
    accumulator = FeatureAccumulator(make_extractor(), batch_size, keep)
    show = on_batch or (lambda *_: None)
    show(role, np.empty((0, *images.size, 3), np.uint8), images.count)
    for batch in _read_ahead(images, batch_size):
        accumulator.add(batch)
        show(role, batch, images.count)
    own = accumulator.finish(str(path))
    if source.pool is not None:
        # A file with a Gaussian only for FID does not say of how many images; its own images may be some of them.
        if source.spatial is None and own.spatial is not None and "sfid" in metrics:
            warnings.warn(f"{path} holds no mu_s, sigma_s: sFID uses its {plural(images.count, 'image')}", stacklevel=2)
        own = replace(own, pool=source.pool, statistics_count=source.statistics_count)
    return replace(own, spatial=source.spatial or own.spatial, seconds=time.perf_counter() - started)


def score(
    samples: FeatureSet, reference: FeatureSet | None, metrics: Sequence[str] = METRICS
) -> tuple[dict[str, float], dict[str, str]]:
    """The metrics that can be computed, by name (with `inception_score_std`, `kid_std`), and why the others cannot.
    ValueError if features have different D, or no metric can be computed."""
    wanted, missing = computable(samples, reference, metrics)
    values: dict[str, float] = {}
    if "inception_score" in wanted and samples.probabilities is not None:
        mean, deviation = inception_score(samples.probabilities.cpu().numpy(), NUM_SPLITS)
        values |= {"inception_score": mean, "inception_score_std": deviation}
    if reference is None:
        return values, missing
    _warn_of_doubts(samples, reference, "fid" in wanted)
    for name, own, other in (("fid", samples.pool, reference.pool), ("sfid", samples.spatial, reference.spatial)):
        if name in wanted and own is not None and other is not None:
            values[name] = frechet_distance(own.mu, own.sigma, other.mu, other.sigma)
    given, real = samples.features, reference.features
    if given is not None and real is not None:
        if "precision" in wanted or "recall" in wanted:
            both = zip(("precision", "recall"), precision_recall(given, real, NUM_NEIGHBOURS), strict=True)
            values |= {name: value for name, value in both if name in wanted}
        if "kid" in wanted:
            size = min(KID_SUBSET_SIZE, len(given), len(real))
            mean, deviation = kernel_inception_distance(given, real, KID_SUBSETS, size)
            values |= {"kid": mean, "kid_std": deviation}
    return values, missing


def computable(
    samples: FeatureSet, reference: FeatureSet | None, metrics: Sequence[str] = METRICS
) -> tuple[list[str], dict[str, str]]:
    """The metrics that can be computed, and why the others cannot; values are not looked at. ValueError if features
    have different D or are of different kinds, or no metric can be computed."""
    check_metrics(metrics)
    both = [("samples", samples), *([] if reference is None else [("reference", reference)])]
    kinds = [kind_of_features(found.extractor) for _, found in both if found.extractor]
    if len({*kinds}) > 1:
        raise ValueError(f"samples have features of {kinds[0]}, the reference of {kinds[1]}; they must match")
    wanted: list[str] = []
    missing: dict[str, str] = {}
    for name in (name for name in METRICS if name in metrics):
        needed = both[:1] if name == "inception_score" else both
        reasons = [_lacking(name, role, found) for role, found in needed]
        if reference is None and name != "inception_score":
            reasons = ["no reference is given"]
        if reason := next(filter(None, reasons), None):
            missing[name] = reason
            continue
        wanted.append(name)
        dims = [data.shape[-1] for _, found in needed if (data := _data(name, found)) is not None]
        if len({*dims}) > 1:
            raise ValueError(f"samples have {plural(dims[0], 'feature')}, the reference {dims[1]}; they must match")
    if not wanted:
        raise ValueError("; ".join(f"{name} cannot be computed: {reason}" for name, reason in missing.items()))
    return wanted, missing


def _data(metric: str, found: FeatureSet) -> NDArray[np.float64] | Tensor | None:
    """What a metric compares: the mean (D,) of FID's or sFID's Gaussian, or the features (N, D)."""
    if metric in ("fid", "sfid"):
        gaussian = found.pool if metric == "fid" else found.spatial
        return None if gaussian is None else gaussian.mu
    return found.features


def _lacking(metric: str, role: str, found: FeatureSet) -> str | None:
    """Why a metric cannot be computed of a set; None if it can."""
    data, count, fewest = _data(metric, found), found.count, _FEWEST[metric]
    if metric in ("fid", "sfid"):
        if data is not None:
            return None
        if count is None:
            names = "mu, sigma" if metric == "fid" else "mu_s, sigma_s"
            return f"{role}: {found.source} holds no {names}, and no images"
        if count >= fewest:
            return "these features have no part for sFID"
    else:
        if data is None:
            return f"{role}: {found.source} holds only statistics, no images"
        if metric == "inception_score" and found.probabilities is None:
            return "these features have no class probabilities"
        count = len(data)
    return f"{role}: {plural(count, 'image')}; {fewest} or more are needed" if count < fewest else None


def _warn_of_doubts(samples: FeatureSet, reference: FeatureSet, fid: bool) -> None:
    if samples.size and reference.size and samples.size != reference.size:
        (height, width), (other_height, other_width) = samples.size, reference.size
        warnings.warn(f"samples have {width}x{height} pixels, the reference {other_width}x{other_height}", stacklevel=4)
    for role, found in (("samples", samples), ("reference", reference)):
        count, pool = found.statistics_count, found.pool
        if fid and count is not None and pool is not None and count < FEWEST_FOR_FID <= len(pool.mu):
            warnings.warn(
                f"FID of {plural(count, 'image')} ({role}) is far too high: its bias falls with their number, and "
                "published values use 50,000 samples",
                stacklevel=4,
            )


def _num_features(found: FeatureSet) -> int:
    return 0 if found.features is None else len(found.features)


def _read_ahead(images: ImageSource, batch_size: int) -> Iterator[Images]:
    """The batches; the next one is read while one is in use."""
    batches = images.batches(batch_size)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def _describe(found: FeatureSet) -> dict[str, Any]:
    return {
        "source": found.source,
        "num_images": found.count,
        "num_features": _num_features(found),
        "statistics_of": found.statistics_count,
        "height": found.size[0] if found.size else None,
        "width": found.size[1] if found.size else None,
    }
