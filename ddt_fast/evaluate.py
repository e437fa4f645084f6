"""Score samples against a reference: FID, sFID, Inception Score, precision and recall, KID. Without arguments: digits
drawn from the checkpoint in the package, against real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ddt_fast.checks import require_int, require_path
from ddt_fast.command import CommandParser, run_command
from ddt_fast.data.digits import digits
from ddt_fast.device import choose_device
from ddt_fast.evaluation.digits_score import score_digits
from ddt_fast.evaluation.features import (
    FeatureAccumulator,
    FeatureSet,
    PixelExtractor,
)
from ddt_fast.evaluation.inception_weights import WEIGHTS_FILE
from ddt_fast.evaluation.report import PICTURE_IMAGES, Features, Progress, extractor_maker, report_table, write_report
from ddt_fast.evaluation.scoring import METRICS, check_metrics, evaluate, gather
from ddt_fast.evaluation.sources import CROP_HELP, Images, open_sources
from ddt_fast.evaluation.statistics import save_statistics
from ddt_fast.files import atomic_file, output_folder
from ddt_fast.generation.images import labelled_grid, to_uint8
from ddt_fast.generation.seeds import assign_labels
from ddt_fast.model import FusedDDT
from ddt_fast.model.weights import EMBEDDED_CHECKPOINT, experiment_of, load_model
from ddt_fast.sampling import sample
from ddt_fast.sampling.noise import seeded_noise

_NUM_DIGITS, _DIGITS_BATCH = 1000, 100


def build_parser() -> jsonargparse.ArgumentParser:
    """The options of the command."""
    parser = CommandParser(prog="python -m ddt_fast.evaluate", description=__doc__)
    add = parser.add_argument
    add("--samples", type=str, help="an npz (arr_0, or mu and sigma), or a folder of images")
    add("--reference", type=str, help="the same, for example one of ADM's reference batches")
    add("--center-crop", type=int, metavar="SIZE", help=CROP_HELP)
    add("--metrics", choices=METRICS, nargs="+", default=list(METRICS), help="default: all that can be computed")
    add("--features", choices=["inception", "pixels"], default="inception", help="pixels: for images of up to 64x64")
    add("--inception-weights", type=str, help=f"{WEIGHTS_FILE}; default: from torch's cache, else downloaded")
    add("--batch-size", type=int, default=64, help="images at a time")
    add("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    add("--output", type=str, default="metrics.json", help="what was found; a picture of the samples goes beside it")
    add("--save-statistics", type=str, help="npz for the samples' mu, sigma, mu_s, sigma_s, to be a reference later")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, read, score, report, write."""
    score_samples(**vars(build_parser().parse_args(arguments)))


def score_samples(
    samples: str | Path | None = None,
    reference: str | Path | None = None,
    *,
    metrics: Sequence[str] = METRICS,
    features: Features = "inception",
    inception_weights: str | None = None,
    center_crop: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
    output: str | Path = "metrics.json",
    save_statistics: str | Path | None = None,
) -> dict[str, Any] | None:
    """Score samples against a reference, as `python -m ddt_fast.evaluate`: FID, sFID, Inception Score, precision,
    recall, KID; print a table, and write it as JSON with a picture of the samples beside it.

    Args:
        samples: an npz (`arr_0`, or mu and sigma) or a folder of images; None: digits drawn from the checkpoint in the
            package, against real ones.
        reference: the same, for example one of ADM's reference batches.
        metrics: of `ddt_fast.evaluation.scoring.METRICS`.
        features: "inception", or "pixels" for images of up to 64x64.
        inception_weights: file; default: from torch's cache, else downloaded.
        center_crop: side in pixels of the centre crop to take of a folder's images; None takes them whole.
        batch_size: images at a time.
        device: "auto", "cpu", "cuda" or "cuda:N".
        output: the .json file to write.
        save_statistics: .npz file for the samples' mu, sigma, mu_s, sigma_s, to be a reference later; without a
            reference nothing else is done.

    Returns:
        The report, as `ddt_fast.evaluation.evaluate`; None where only statistics were saved.

    Raises:
        ValueError: settings that are not allowed, wrong or damaged files, or nothing can be computed.
        OSError: files that cannot be read or written.
    """
    check_metrics(metrics)
    require_int("--batch-size", batch_size, 1)
    report_file = _output_file("--output", output, ".json")
    picture = report_file.with_suffix(".png")
    if picture.is_dir():
        raise ValueError(f"{picture} is a folder; a file of that name is to be written")
    statistics = None
    if save_statistics is not None:
        statistics = _output_file("--save-statistics", save_statistics, ".npz")
    place = choose_device(device)
    if samples is None:
        if reference is not None or statistics is not None:
            raise ValueError("--reference and --save-statistics are for --samples, which is not given")
        if center_crop is not None:
            raise ValueError("--center-crop is for --samples and --reference, which are not given")
        report, shown = _score_digits(place, batch_size, metrics)
    else:
        # Both at once: a mistake in the reference should not wait for the samples.
        sources = open_sources([samples, reference], center_crop)
        source, other = sources[0], sources[1] if reference is not None else None
        make_extractor = extractor_maker(features, inception_weights, place)
        if statistics is not None and other is None:
            wanted = ["fid", "sfid"]
            _save_statistics(statistics, gather(source, "samples", wanted, make_extractor, batch_size, Progress()))
            return None
        progress = Progress()
        wanted = [*metrics, *(["fid", "sfid"] if statistics is not None else [])]
        found = gather(source, "samples", wanted, make_extractor, batch_size, progress)
        if statistics is not None:
            _save_statistics(statistics, found)
        report = evaluate(found, other, metrics, make_extractor, batch_size, progress)
        shown = progress.shown
    print(report_table(report))
    write_report(report_file, report)
    if shown:
        with atomic_file(picture) as temporary:
            _grid(shown).save(temporary)
    print(f"wrote {report_file}" + (f" and {picture.name}" if shown else ""))
    return report


def _output_file(option: str, name: str | Path, suffix: str) -> Path:
    path = require_path(option, name)
    if path.suffix != suffix or path.is_dir():
        raise ValueError(f"{option} is {str(name)!r}; wanted the name of a {suffix} file")
    output_folder(path.parent)
    return path


def _save_statistics(path: Path, samples: FeatureSet) -> None:
    if samples.pool is None:
        raise ValueError(f"{samples.source} is a single image; statistics need 2 or more")
    save_statistics(path, samples.pool, samples.spatial, samples.statistics_count)
    print(f"wrote {path}, statistics of {samples.source}")


def _score_digits(
    device: torch.device, batch_size: int, metrics: Sequence[str]
) -> tuple[dict[str, Any], dict[int, Images]]:
    """Digits from the embedded checkpoint against all real ones, in pixels."""
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
    print(digits_score)
    report["digits"] = asdict(digits_score)
    places = np.linspace(0, _NUM_DIGITS - 1, PICTURE_IMAGES).round().astype(int).tolist()
    return report, dict(zip(places, to_uint8(samples[places]), strict=True))


def _grid(shown: dict[int, Images]) -> Image.Image:
    return labelled_grid(np.stack(list(shown.values())), [str(place) for place in shown])


if __name__ == "__main__":
    run_command(main)
