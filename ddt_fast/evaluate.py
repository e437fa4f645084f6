"""Score samples against a reference: FID, sFID, Inception Score, precision and recall, KID. Without arguments, score
digits drawn from the checkpoint in the package against real ones."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ddt_fast.checks import require_int, require_path
from ddt_fast.command import CommandParser, run_command
from ddt_fast.data.digits import digits
from ddt_fast.device import choose_device
from ddt_fast.evaluation.digits_score import DigitsScore, score_digits
from ddt_fast.evaluation.features import FeatureAccumulator, Features, FeatureSet, PixelExtractor, extractor_maker
from ddt_fast.evaluation.report import PICTURE_IMAGES, Progress, report_table
from ddt_fast.evaluation.scoring import METRICS, Metric, check_metrics, evaluate, gather
from ddt_fast.evaluation.sources import Images, open_sources
from ddt_fast.evaluation.statistics import save_statistics as write_statistics
from ddt_fast.files import atomic_file, check_no_folder, output_folder, write_json
from ddt_fast.generation.images import labelled_grid, to_uint8
from ddt_fast.generation.seeds import assign_labels
from ddt_fast.model import FusedDDT
from ddt_fast.model.weights import EMBEDDED_CHECKPOINT, experiment_of, load_model
from ddt_fast.sampling import sample
from ddt_fast.sampling.noise import seeded_noise

_NUM_DIGITS, _DIGITS_BATCH = 1000, 100


def build_parser() -> CommandParser:
    """The options of the command: the parameters of `score_samples`."""
    parser = CommandParser(prog="python -m ddt_fast.evaluate", description=__doc__)
    parser.add_options(score_samples)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, read, score, report, write."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    with parser.naming_options():
        score_samples(**vars(options))


def score_samples(
    samples: str | Path | None = None,
    reference: str | Path | None = None,
    *,
    metrics: Sequence[Metric] = METRICS,
    features: Features = "inception",
    inception_weights: str | None = None,
    center_crop: int | None = None,
    skip_unreadable: bool = False,
    batch_size: int = 64,
    device: str = "auto",
    output: str | Path = "metrics.json",
    save_statistics: str | Path | None = None,
) -> dict[str, Any] | None:
    """Score samples against a reference, as `python -m ddt_fast.evaluate`: FID, sFID, Inception Score, precision,
    recall, KID. Print a table, and write the scores as JSON with a picture of the samples beside it.

    Args:
        samples: an npz (arr_0, or mu and sigma), a folder of images (also in .npy files and tars) or of
            ddt_fast.sample; default: digits drawn from the checkpoint in the package, scored against real ones.
        reference: an npz or a folder, for example one of ADM's reference batches.
        metrics: fid, sfid, inception_score, precision, recall, kid; default: all that can be computed.
        features: inception, or pixels for images of up to 64x64.
        inception_weights: file of the network's weights; default: from torch's cache, else downloaded.
        center_crop: side in pixels of ADM's centre crop, for the images of a folder; default: no crop.
        skip_unreadable: leave out the images of a folder that cannot be read, and list them; default: stop at the
            first, before any work is done.
        batch_size: images at a time.
        device: auto, cpu, cuda or cuda:N.
        output: .json file for the scores; a picture of the samples goes beside it.
        save_statistics: .npz file for the samples' mu, sigma, mu_s, sigma_s, a reference for later; without
            `reference`, nothing else is done.

    Returns:
        The report of `ddt_fast.evaluation.evaluate`; None if only statistics were saved.

    Raises:
        ValueError: a setting is not allowed, a file is wrong or damaged, or nothing can be computed.
        OSError: a file cannot be read or written.
    """
    check_metrics(metrics)
    require_int("batch_size", batch_size, 1)
    file = _output_file("output", output, ".json")
    statistics = None if save_statistics is None else _output_file("save_statistics", save_statistics, ".npz")
    place, progress = choose_device(device), Progress()
    if samples is None:
        for name, value in (("reference", reference), ("save_statistics", statistics), ("center_crop", center_crop)):
            if value is not None:
                raise ValueError(f"`{name}` is for `samples`, which is not given")
        digits_report, shown, digits_score = _score_digits(place, batch_size, metrics)
        _write(file, digits_report, shown)
        print(digits_score)
        return digits_report
    # Open both first: a mistake in the reference should not wait for the samples.
    source, *others = open_sources([samples, reference], center_crop, skip_unreadable)
    make_extractor = extractor_maker(features, inception_weights, place)
    needed = [*(metrics if others or statistics is None else ()), *(("fid", "sfid") if statistics is not None else ())]
    found = gather(source, "samples", needed, make_extractor, batch_size, progress)
    if statistics is not None:
        _save_statistics(statistics, found)
        if not others:
            return None
    other = others[0] if others else None
    report = evaluate(found, other, metrics, make_extractor, batch_size, progress)
    for role, opened in zip(("samples", "reference"), (source, *others), strict=False):
        if opened.images is not None and opened.images.unreadable:
            report[role]["unreadable"] = [{"file": name, "reason": why} for name, why in opened.images.unreadable]
    _write(file, report, progress.shown)
    return report


def _write(file: Path, report: dict[str, Any], shown: dict[int, Images]) -> None:
    """Write the report, and a picture of the shown samples, which are given by place; then print the report's table."""
    write_json(file, report)
    if shown:
        with atomic_file(file.with_suffix(".png")) as picture:
            labelled_grid(np.stack(list(shown.values())), [str(place) for place in shown]).save(picture)
    print(report_table(report))


def _output_file(name: str, given: str | Path, suffix: str) -> Path:
    path = require_path(name, given)
    if path.suffix != suffix or path.is_dir():
        raise ValueError(f"{name} is {str(given)!r}; expected the name of a {suffix} file")
    check_no_folder(path.with_suffix(".png"))
    output_folder(path.parent)
    return path


def _save_statistics(path: Path, samples: FeatureSet) -> None:
    if samples.pool is None:
        raise ValueError(f"{samples.source} is a single image; statistics need 2 or more")
    write_statistics(path, samples.pool, samples.spatial, samples.statistics_count)
    print(f"wrote {path}, statistics of {samples.source}")


def _score_digits(
    device: torch.device, batch_size: int, metrics: Sequence[str]
) -> tuple[dict[str, Any], dict[int, Images], DigitsScore]:
    """Score digits of the embedded checkpoint against all real ones, in pixels."""
    experiment = experiment_of(EMBEDDED_CHECKPOINT, None)
    model = FusedDDT.from_reference(load_model(EMBEDDED_CHECKPOINT, device, torch.float32))
    real, _ = digits()
    labels = assign_labels(_NUM_DIGITS, experiment.model.num_classes)
    drawn = []
    with tqdm(total=_NUM_DIGITS, desc="sampling", unit="img", dynamic_ncols=True) as bar:
        for start in range(0, _NUM_DIGITS, _DIGITS_BATCH):
            part = slice(start, start + _DIGITS_BATCH)
            noise, generators = seeded_noise(range(_NUM_DIGITS)[part], real.shape[1:])
            drawn.append(
                sample(model, noise.to(device), labels[part].to(device), experiment.sampling, generators=generators)
            )
            bar.update(len(drawn[-1]))
    samples = torch.cat(drawn).cpu()
    extractor = PixelExtractor(device)
    sets = []
    for name, images in (("digits of the embedded checkpoint", samples), ("scikit-learn's digits", real)):
        accumulator = FeatureAccumulator(extractor, batch_size)
        accumulator.add(to_uint8(images))
        sets.append(accumulator.finish(name))
    report = evaluate(sets[0], sets[1], metrics)
    digits_score = score_digits(samples, labels)
    report["digits"] = asdict(digits_score)
    places = np.linspace(0, _NUM_DIGITS - 1, PICTURE_IMAGES).round().astype(int).tolist()
    return report, dict(zip(places, to_uint8(samples[places]), strict=True)), digits_score


if __name__ == "__main__":
    run_command(main)
