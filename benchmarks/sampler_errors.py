"""What `benchmarks.forecast`, `.pareto` and `.candidates` share: runs of the digits model that comes with the package,
how far their samples are from the true ones, what settings cost; options, and the results file."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ddt_fast
import ddt_kernels
from benchmarks.environment import environment
from benchmarks.harness import relative_error
from benchmarks.report.files import ResultsFile
from ddt_fast import SamplingConfig, load_model
from ddt_fast.checks import require_int
from ddt_fast.command import CommandParser
from ddt_fast.evaluation.digits_score import score_digits
from ddt_fast.files import atomic_file, file_sha256, output_folder
from ddt_fast.generation.seeds import assign_labels
from ddt_fast.model import FusedDDT
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT
from ddt_fast.presets import PRESETS
from ddt_fast.provenance import weights_sha256
from ddt_fast.sampling import Sampler, SamplingPlan
from ddt_fast.sampling.noise import seeded_noise

SIZE, BATCH = 8, 256  # side of the digits in pixels; samples drawn at a time
PUBLISHED = PRESETS["xl2_256"].sampling
# Even steps: the published last one is ten times as long as the others, a bad choice for the solver's error alone.
BASE = replace(PUBLISHED, last_step=None)
# Far fewer evaluations of the encoder and of guidance, for 250 Euler steps.
SHARED: dict[str, Any] = {
    **{"refresh_every": 6, "state_forecast": "linear"},
    **{"guidance_every": 10, "guidance_forecast": "linear"},
}


class DigitsRuns:
    """Draws the same samples, seeds 0 and on, by any settings, with a trained model on the CPU.

    Args:
        num_samples: scores need 65 or more.
        keep: folder in which samples are kept, to be read instead of drawn again.
        checkpoint: the model, the package's own or another of the digits.
        dtype: what the model computes in.
    """

    def __init__(
        self,
        num_samples: int,
        keep: str | None = None,
        checkpoint: Path = EMBEDDED_CHECKPOINT,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        # Not compiled: settings differ in the shapes of what they keep, and each would be compiled anew.
        self.model, self.num_samples, self._keep = digits_model(checkpoint, dtype), num_samples, kept_samples(keep)
        self._weights = weights_sha256(self.model)
        self.labels = assign_labels(num_samples, self.model.config.num_classes)
        self.noise, _ = seeded_noise(range(num_samples), (self.model.config.in_channels, SIZE, SIZE))

    def __call__(self, config: SamplingConfig) -> Tensor:
        """The samples, (num_samples, 1, 8, 8) float32."""
        starts = range(0, self.num_samples, BATCH)
        return torch.cat([self._batch(config, start, min(start + BATCH, self.num_samples)) for start in starts])

    def _batch(self, config: SamplingConfig, start: int, end: int) -> Tensor:
        settings = hashlib.sha256(f"{config} {self._weights}".encode()).hexdigest()[:16]
        file = self._keep and self._keep / f"{settings}_{start}_{end}.safetensors"
        if file is not None and file.is_file():
            return load_file(file)["samples"]
        sampler = Sampler(self.model, config, end - start, SIZE, SIZE)
        samples = sampler(self.noise[start:end], self.labels[start:end])
        if file is not None:
            with atomic_file(file) as temporary:
                save_file({"samples": samples}, temporary)
        return samples

    def scores(self, samples: Tensor, *names: str) -> dict[str, float]:
        """Fréchet distance and class accuracy of samples that a run drew, and other fields of their DigitsScore."""
        score = score_digits(samples, self.labels)
        return {name: getattr(score, name) for name in ("frechet", "accuracy", *names)}


def kept_samples(folder: str | None) -> Path | None:
    """The part of the folder of --keep that holds what this code draws; None without one. Samples depend on the two
    packages' files, the weights among them, and on PyTorch: another version of any is another part."""
    if folder is None:
        return None
    digest = hashlib.sha256(torch.__version__.encode())
    for package in (ddt_fast, ddt_kernels):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*")):
            if file.suffix in (".py", ".safetensors", ".json"):
                digest.update(f"{file.relative_to(root)} {file_sha256(file)}".encode())
    return output_folder(Path(folder) / digest.hexdigest()[:16])


@cache
def digits_model(checkpoint: Path = EMBEDDED_CHECKPOINT, dtype: torch.dtype = torch.float32) -> FusedDDT:
    """A trained model, the package's own or another, on the CPU."""
    return FusedDDT.from_reference(load_model(checkpoint, dtype=dtype))


def sample_errors(samples: Tensor, truth: Tensor) -> dict[str, float]:
    """Relative L2 distances of samples (N, C, H, W) from the true ones.

    error: of all samples as one vector. One that lies near a fork and goes another way outweighs hundreds.
    error_median, error_p90: of each sample by itself, the median and the 90% quantile.
    """
    off = (samples - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    median, p90 = off.quantile(torch.tensor([0.5, 0.9])).tolist()
    return {"error": relative_error(samples, truth), "error_median": median, "error_p90": p90}


def xl2_tflop(config: SamplingConfig) -> float:
    preset = PRESETS["xl2_256"]
    return SamplingPlan.from_config(config).flops(preset.model, preset.data.sample_size, preset.data.sample_size) / 1e12


def digits_mflop(plan: SamplingPlan) -> float:
    return plan.flops(digits_model().config, SIZE, SIZE) / 1e6


def read_options(
    name: str,
    description: str | None,
    arguments: list[str] | None,
    numbers: Mapping[str, tuple[Any, int, str]],
    **texts: str,
) -> Any:
    """The options of `benchmarks.NAME`, as attributes; ValueError for a number that is not allowed.

    Args:
        numbers: by option the default, a list where it takes several, the least that is allowed, and the help.
        texts: the help of options that take a text, by name.
    """
    parser = CommandParser(prog=f"python -m benchmarks.{name}", description=(description or "").splitlines()[0])
    parser.add_argument("--output-dir", default="benchmarks/results")
    parser.add_argument("--keep", help="folder in which samples are kept, for a command that was stopped to continue")
    for option, (default, _, words) in numbers.items():
        nargs = "+" if isinstance(default, list) else None
        parser.add_argument(option, type=int, default=default, help=words, nargs=nargs)
    for option, words in texts.items():
        parser.add_argument("--" + option.replace("_", "-"), help=words)
    options = parser.parse_args(arguments)
    for option, (_, least, _) in numbers.items():
        given = options[option[2:].replace("-", "_")]
        for number in given if isinstance(given, list) else [given]:
            require_int(option, number, least)
    return options


def run_study(name: str, options: Any, measure: Callable[[str | None], dict[str, Any]]) -> dict[str, Any]:
    """Write what `measure` returns for --keep to NAME.json, and draw its picture."""
    path = output_folder(options.output_dir) / f"{name}.json"
    record = {"environment": environment(), **measure(options.keep)}
    write_record(path, record)
    ResultsFile(path).draw()
    return record


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write an object as JSON, an item of a list a line, floats rounded to 5 significant digits."""
    lines = []
    for name, value in json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.5g}")).items():
        items = value if isinstance(value, list) else []
        text = "[\n  " + ",\n  ".join(map(json.dumps, items)) + "\n ]" if items else json.dumps(value)
        lines.append(f" {json.dumps(name)}: {text}")
    with atomic_file(path) as file:
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
