"""Schedules that `ddt_fast.tune_sampler` fitted to a model: their files, and the model they are for."""

import hashlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ddt_fast.checks import require_path
from ddt_fast.config import SamplingConfig, Schedule
from ddt_fast.files import read_json
from ddt_fast.sampling.budgets import corrected_steps
from ddt_fast.wording import plural

if TYPE_CHECKING:
    from torch import nn

    from ddt_fast.model import DDT, FusedDDT

ERRORS = ("error", "error_median")
_VALUES_READ_PER_TENSOR = 256


@dataclass(frozen=True)
class Tuned:
    """A schedule, and what it was measured to be worth on noises that the fit had not seen.

    Attributes:
        schedule: times and coefficients.
        evidence: for every guidance scale a dictionary of guidance_scale, samples, and `rule` and `tuned`: errors
            against the ODE's solution, of all samples as one vector and in median, of the start and of the schedule.
    """

    schedule: Schedule
    evidence: tuple[dict[str, Any], ...]

    @classmethod
    def read(cls, file: str | Path) -> Self:
        """A file of `ddt_fast.tune_sampler`; ValueError if it is none, OSError if it cannot be read."""
        path = require_path("schedule", file)
        if not path.is_file():
            raise ValueError(f"schedule {file} is not a file; expected one that ddt_fast.tune_sampler wrote")
        content = read_json(path)
        try:
            schedule, evidence = Schedule(**content["schedule"]), tuple(content["evidence"])
            measured = [float(row[run][error]) for row in evidence for run in ("rule", "tuned") for error in ERRORS]
            measured += [float(row[name]) for row in evidence for name in ("guidance_scale", "samples")]
        except KeyError as error:
            raise ValueError(f"{file} is not a schedule of ddt_fast.tune_sampler: it lacks {error}") from error
        except TypeError as error:
            problem = "a part of it is unknown or of the wrong kind"
            raise ValueError(f"{file} is not a schedule of ddt_fast.tune_sampler: {problem}") from error
        except ValueError as error:
            raise ValueError(f"{file} is not a schedule of ddt_fast.tune_sampler: {error}") from error
        if not measured or not all(map(math.isfinite, measured)):
            raise ValueError(
                f"{file} is not a schedule of ddt_fast.tune_sampler: its evidence is missing or not finite"
            )
        return cls(schedule, evidence)

    def settings(self, config: SamplingConfig) -> SamplingConfig:
        """`config` with this schedule; the guidance scale stays."""
        steps, interval = corrected_steps(config, len(self.schedule.times), 3), self.schedule.guidance_interval
        return replace(steps, guidance_interval=interval, schedule=self.schedule)

    def expectation(self, scale: float) -> str:
        """What to expect at a guidance scale, in words."""
        row = min(self.evidence, key=lambda row: abs(row["guidance_scale"] - scale))
        before, after = ([f"{row[run][error]:.2g}" for error in ERRORS] for run in ("rule", "tuned"))
        return (
            f"{plural(len(self.schedule.times), 'step')} fitted to this model. At guidance {row['guidance_scale']:g} "
            f"the error was {after[0]} of all samples and {after[1]} in median, in place of the solver's {before[0]} "
            f"and {before[1]} ({row['samples']} samples)"
        )


def tuned_file(checkpoint: Path, num_steps: int) -> Path:
    """Where the schedule of so many steps of a local checkpoint is kept: in its folder, or beside the file. One for a
    place that cannot be written or belongs to the installed package is kept in the working folder."""
    name = f"tuned_{num_steps}_steps.json"
    beside = checkpoint / name if checkpoint.is_dir() else checkpoint.with_name(f"{checkpoint.name}.{name}")
    in_package = Path(__file__).resolve().parents[1] in checkpoint.resolve().parents
    return Path(name) if in_package or not os.access(beside.parent, os.W_OK) else beside


def model_digests(model: "DDT | FusedDDT") -> tuple[str, ...]:
    """SHA-256 of evenly spread weights of a float32 model's embedders, as they are in float32, bfloat16 and float16.
    Every engine keeps these layers as they are, and training changes them with every step."""
    import torch

    return tuple(_digest(model, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))


def check_schedule(model: "DDT | FusedDDT", config: SamplingConfig, height: int, width: int) -> None:
    """ValueError if the schedule of the settings, if any, is for another model, or another size of its input."""
    schedule = config.schedule
    if schedule is None:
        return
    if _digest(model) not in schedule.model:
        raise ValueError("the schedule was fitted to other weights than this model's; run ddt_fast.tune_sampler on it")
    if schedule.size != (height, width):
        fitted, asked = ("x".join(map(str, size)) for size in (schedule.size, (height, width)))
        raise ValueError(f"the schedule was fitted to inputs of {fitted}, not {asked}; run ddt_fast.tune_sampler there")


def _digest(model: "nn.Module", dtype: Any = None) -> str:
    import torch

    digest = hashlib.sha256()
    for name, layer in sorted(model.named_children()):
        if name.endswith("_embedder"):
            for tensor, value in sorted(layer.state_dict().items()):
                values = value.detach().flatten()[:: max(1, value.numel() // _VALUES_READ_PER_TENSOR)].cpu().to(dtype)
                digest.update(f"{name}.{tensor} {tuple(value.shape)} ".encode())
                digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
