"""How fast a latent cache can be read, in images per second: `python -m ddt_fast.data.latent_loader FOLDER`."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from ddt_fast.command import CommandParser, run_command
from ddt_fast.data.cached_images import CachedImages
from ddt_fast.data.latent_cache import MANIFEST
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.data.loader import LatentLoader
from ddt_fast.data.verification import wrong_shards
from ddt_fast.wording import plural


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(prog="python -m ddt_fast.data.latent_loader", description=__doc__)
    parser.add_argument("folder", type=str, help="latent cache")
    parser.add_argument("--batch-size", type=int, default=256, help="samples per batch")
    parser.add_argument("--num-threads", type=int, default=2, help="batches made at the same time")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure")
    parser.add_argument("--scaling-factor", type=float, help="for shards that do not record it, such as LightningDiT's")
    parser.add_argument("--features", action="store_true", help="also read the cached DINOv2 features")
    parser.add_argument("--images", type=str, help="image folder of the cache, to read its images too")
    parser.add_argument("--verify", action="store_true", help="first compare the checksums of all shards")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, report."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    with parser.naming_options():
        dataset = LatentDataset(Path(options.folder), scaling_factor=options.scaling_factor, features=options.features)
        if options.verify:
            if not dataset.checksums:
                raise ValueError(f"{options.folder} has no {MANIFEST}, and so no checksums to verify")
            if wrong := wrong_shards(dataset, dataset.checksums):
                raise ValueError("; ".join(wrong))
        images = None if options.images is None else CachedImages(Path(options.images), dataset)
        with LatentLoader(dataset, options.batch_size, images=images, num_threads=options.num_threads) as loader:
            rate, busy = measure(loader, options.seconds)
    shape, classes = "x".join(map(str, dataset.shape)), plural(dataset.num_classes, "class")
    print(f"{plural(len(dataset), 'latent')} of {shape}, {classes}, scaled by {dataset.scaling_factor:g}")
    more = []
    if dataset.feature_shape:
        more.append("features of " + "x".join(map(str, dataset.feature_shape)))
    if images is not None:
        more.append(f"images of {images.image_size} px")
    if more:
        print("with " + " and ".join(more))
    cpus = len(os.sched_getaffinity(0))
    print(f"{rate:.0f} img/s with {plural(options.num_threads, 'thread')}, {busy:.2f} of {plural(cpus, 'CPU')} busy")


def measure(loader: LatentLoader, seconds: float) -> tuple[float, float]:
    """The images per second that a loader returns after two batches of warm-up, and the CPUs that it keeps busy."""
    next(loader)
    next(loader)
    count, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        count += len(next(loader).labels)
    elapsed = time.perf_counter() - start
    return count / elapsed, (time.process_time() - cpu) / elapsed


if __name__ == "__main__":
    run_command(main)
