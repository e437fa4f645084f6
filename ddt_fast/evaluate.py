"""Score samples against a reference: FID, sFID, Inception Score, precision and recall, KID. Without arguments, score
digits drawn from the checkpoint in the package against real ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddt_fast.checks import require_int, require_path
from ddt_fast.command import CommandParser, run_command
from ddt_fast.evaluation.names import METRICS, Features, Metric, check_features, check_metrics
from ddt_fast.files import check_no_folder, output_folder
from ddt_fast.presets import PRESETS


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
        _check(**{name: value for name, value in vars(options).items() if name not in ("device", "skip_unreadable")})
        from ddt_fast.threads import threads_for

        digits = PRESETS["digits"].model if options.samples is None else None
        with threads_for(digits, options.device):
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
        The report of `ddt_fast.evaluation.scoring.evaluate`; None if only statistics were saved.

    Raises:
        ValueError: a setting is not allowed, a file is wrong or damaged, or nothing can be computed.
        OSError: a file cannot be read or written.
    """
    file, statistics = _check(
        samples, reference, metrics, features, inception_weights, center_crop, batch_size, output, save_statistics
    )
    from ddt_fast.work import evaluate as work

    if samples is None:
        return work.score_package_digits(file, device, batch_size, metrics)
    opened = samples, reference, center_crop, skip_unreadable
    network = features, inception_weights
    return work.score_files(*opened, file, statistics, device, batch_size, metrics, *network)


def _check(
    samples: str | Path | None,
    reference: str | Path | None,
    metrics: Sequence[Metric],
    features: Features,
    inception_weights: str | None,
    center_crop: int | None,
    batch_size: int,
    output: str | Path,
    save_statistics: str | Path | None,
) -> tuple[Path, Path | None]:
    """The files to write; ValueError for settings that are not allowed."""
    check_metrics(metrics)
    check_features(features, inception_weights)
    require_int("batch_size", batch_size, 1)
    if samples is None:
        of_samples = {"reference": reference, "save_statistics": save_statistics, "center_crop": center_crop}
        for name, value in of_samples.items():
            if value is not None:
                raise ValueError(f"`{name}` is for `samples`, which is not given")
    statistics = None if save_statistics is None else _output_file("save_statistics", save_statistics, ".npz")
    return _output_file("output", output, ".json"), statistics


def _output_file(name: str, given: str | Path, suffix: str) -> Path:
    path = require_path(name, given)
    if path.suffix != suffix or path.is_dir():
        raise ValueError(f"{name} is {str(given)!r}; expected the name of a {suffix} file")
    check_no_folder(path.with_suffix(".png"))
    output_folder(path.parent)
    return path


if __name__ == "__main__":
    run_command(main)
