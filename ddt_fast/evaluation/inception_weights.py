"""The published weights of the Inception network: from torch's cache, downloaded, or from a file of the user's."""

import os
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from urllib.error import URLError

import torch
from torch import Tensor, nn

from ddt_fast.checks import require_path
from ddt_fast.evaluation.inception import Inception
from ddt_fast.files import file_sha256
from ddt_fast.weight_files import read_pickle

WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
# torch-fidelity publishes the same bytes under its own name.
_CACHED_NAMES = (WEIGHTS_FILE, "weights-inception-2015-12-05-6726825d.pth")
_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_FILE}"
_SHA256_START = "6726825d"


@dataclass(frozen=True)
class InceptionWeights:
    """Where a network's weights came from.

    Attributes:
        path: the file.
        sha256: the file's checksum, in hex.
    """

    path: Path
    sha256: str

    @property
    def published(self) -> bool:
        """Whether published scores use these weights."""
        return self.sha256.startswith(_SHA256_START)


def load_inception(
    path: str | Path | None = None, device: torch.device | str = "cpu"
) -> tuple[Inception, InceptionWeights]:
    """The network with the weights of `path`, folded for speed, on `device`. ValueError if the file is missing, cannot
    be downloaded, or holds something else.

    Args:
        path: a state dict with the names of `pt_inception-2015-12-05-6726825d.pth`; None: that file, from torch's cache
            of downloads, else downloaded into it.
        device: where the network goes.
    """
    file = _find_weights() if path is None else require_path("inception_weights", path)
    with torch.device("meta"):  # random weights would take time
        network = Inception()
    _load(network, _read(file), file)
    network = network.fold().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network, InceptionWeights(file, file_sha256(file))


def _find_weights() -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in _CACHED_NAMES:
        if (folder / name).is_file():
            return folder / name
    target = folder / WEIGHTS_FILE
    print(f"downloading {_URL} to {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(_URL, os.fspath(target), hash_prefix=_SHA256_START)
    except (URLError, OSError, RuntimeError) as error:
        raise ValueError(
            f"the Inception weights {WEIGHTS_FILE} are not in {folder} and cannot be downloaded ({error}); "
            f"put the file there, or name it with `inception_weights`"
        ) from error
    return target


def _read(file: Path) -> dict[str, Tensor]:
    content = read_pickle("Inception weights file", file, WEIGHTS_FILE)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"Inception weights {file} do not hold a state dict; expected {WEIGHTS_FILE}")
    return content


def _load(network: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    broken = next((name for name, value in weights.items() if not value.isfinite().all()), None)
    problem = f"{broken} has values that are not finite"
    try:
        network.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    except RuntimeError as error:  # its second line says what does not fit
        broken, problem = "keys", shorten(str(error).splitlines()[1].strip(), 150)
    if broken is not None:
        raise ValueError(f"Inception weights {file} do not fit: {problem}; expected {WEIGHTS_FILE}")
    network.eval().requires_grad_(False)
