"""Files of a request's images, with their true pixels: PNGs, and a zip of them with samples.npz and settings.json."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from ddt_fast.generation.npz import write_npz
from ddt_fast.webdemo.drawing import Drawn
from ddt_fast.webdemo.models import Images


def image_names(drawn: Drawn) -> list[str]:
    """One name per image, in the manner of the sample command."""
    request = drawn.request
    pairs = enumerate(zip(request.labels, request.seeds, strict=True))
    return [f"{i:05d}_class_{label}_seed_{seed}.png" for i, (label, seed) in pairs]


def captions(drawn: Drawn) -> list[str]:
    """What stands below each image: its class, and its seed."""
    request = drawn.request
    names = [request.model.class_name(label) for label in request.labels]
    return [f"{name} · seed {seed}" for name, seed in zip(names, request.seeds, strict=True)]


def write_pngs(images: Images, names: list[str], folder: Path) -> list[Path]:
    """Write (N, H, W, 3) images; their paths."""
    paths = [folder / name for name in names]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    return paths


def write_zip(drawn: Drawn, pngs: list[Path], folder: Path) -> Path:
    """Write the zip; `pngs` are the images, written already."""
    request = drawn.request
    write_npz(
        folder / "samples.npz",
        drawn.images.shape,
        [drawn.images],
        labels=np.array(request.labels),
        seeds=np.array(request.seeds),
    )
    settings = {"model": request.model.name, "labels": request.labels, "seeds": request.seeds}
    (folder / "settings.json").write_text(json.dumps(settings | asdict(request.sampling), indent=1) + "\n")
    path = folder / f"{request.model.name.strip('/').split('/')[-1]}_seed_{request.seeds[0]}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in [*pngs, folder / "samples.npz", folder / "settings.json"]:
            archive.write(file, file.name)
    return path
