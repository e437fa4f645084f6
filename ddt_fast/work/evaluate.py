"""The work of `ddt_fast.evaluate`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ddt_fast.data.digits import digits
from ddt_fast.device import choose_device
from ddt_fast.evaluation.digits_score import score_digits
from ddt_fast.evaluation.features import FeatureAccumulator, PixelExtractor, extractor_maker
from ddt_fast.evaluation.names import Features, Metric
from ddt_fast.evaluation.report import PICTURE_IMAGES, Progress, report_table
from ddt_fast.evaluation.scoring import evaluate, gather
from ddt_fast.evaluation.sources import Images, open_sources, unreadable_images
from ddt_fast.evaluation.statistics import save_statistics as write_statistics
from ddt_fast.files import atomic_file, write_json
from ddt_fast.generation.images import labelled_grid, to_uint8
from ddt_fast.generation.seeds import assign_labels
from ddt_fast.model import FusedDDT
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT, experiment_of
from ddt_fast.model.weights import load_model
from ddt_fast.sampling import sample
from ddt_fast.sampling.noise import seeded_noise

_NUM_DIGITS, _DIGITS_BATCH = 1000, 100


def score_package_digits(file: Path, device: str, batch_size: int, metrics: Sequence[Metric]) -> dict[str, Any]:
    """Score digits drawn from the checkpoint in the package against real ones, and write the report to `file`."""
    place = choose_device(device)
    experiment = experiment_of(EMBEDDED_CHECKPOINT, None)
    model = FusedDDT.from_reference(load_model(EMBEDDED_CHECKPOINT, place, torch.float32))
    real, _ = digits()
    labels = assign_labels(_NUM_DIGITS, experiment.model.num_classes)
    drawn = []
    with tqdm(total=_NUM_DIGITS, desc="sampling", unit="img", dynamic_ncols=True) as bar:
        for start in range(0, _NUM_DIGITS, _DIGITS_BATCH):
            part = slice(start, start + _DIGITS_BATCH)
            noise, generators = seeded_noise(range(_NUM_DIGITS)[part], real.shape[1:])
            drawn.append(
                sample(model, noise.to(place), labels[part].to(place), experiment.sampling, generators=generators)
            )
            bar.update(len(drawn[-1]))
    samples = torch.cat(drawn).cpu()
    extractor = PixelExtractor(place)
    sets = []
    for name, images in (("digits of the embedded checkpoint", samples), ("scikit-learn's digits", real)):
        accumulator = FeatureAccumulator(extractor, batch_size)
        accumulator.add(to_uint8(images))
        sets.append(accumulator.finish(name))
    report = evaluate(sets[0], sets[1], metrics)
    digits_score = score_digits(samples, labels)
    report["digits"] = asdict(digits_score)
    places = np.linspace(0, _NUM_DIGITS - 1, PICTURE_IMAGES).round().astype(int).tolist()
    _write(file, report, dict(zip(places, to_uint8(samples[places]), strict=True)))
    print(digits_score)
    return report


def score_files(
    samples: str | Path,
    reference: str | Path | None,
    center_crop: int | None,
    skip_unreadable: bool,
    file: Path,
    statistics: Path | None,
    device: str,
    batch_size: int,
    metrics: Sequence[Metric],
    features: Features,
    inception_weights: str | None,
) -> dict[str, Any] | None:
    """Score samples, write the report to `file` and their statistics to `statistics`; arguments and errors are those of
    `ddt_fast.evaluate.score_samples`."""
    place, progress = choose_device(device), Progress()
    # Open both first: a mistake in the reference should not wait for the samples.
    source, *others = open_sources([samples, reference], center_crop, skip_unreadable)
    make_extractor = extractor_maker(features, inception_weights, place)
    needed = [*(metrics if others or statistics is None else ()), *(("fid", "sfid") if statistics is not None else ())]
    found = gather(source, "samples", needed, make_extractor, batch_size, progress)
    if statistics is not None:
        if found.pool is None:
            raise ValueError(f"{found.source} is a single image; statistics need 2 or more")
        write_statistics(statistics, found.pool, found.spatial, found.statistics_count)
        print(f"wrote {statistics}, statistics of {found.source}")
        if not others:
            return None
    other = others[0] if others else None
    report = evaluate(found, other, metrics, make_extractor, batch_size, progress)
    for role, opened in zip(("samples", "reference"), (source, *others), strict=False):
        report[role] |= unreadable_images(opened)
    return _write(file, report, progress.shown)


def _write(file: Path, report: dict[str, Any], shown: dict[int, Images]) -> dict[str, Any]:
    """Write the report, and a picture of the shown samples, which are given by place; then print the report's table."""
    write_json(file, report)
    if shown:
        with atomic_file(file.with_suffix(".png")) as picture:
            labelled_grid(np.stack(list(shown.values())), [str(place) for place in shown]).save(picture)
    print(report_table(report))
    return report
