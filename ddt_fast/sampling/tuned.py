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
MAX_FITTED_STEPS = 100
"""A Hessian of about 900 parameters; a solver needs no help there."""

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
        """A file of `ddt_fast.tune_sampler`; ValueError if it is another one, OSError if it cannot be read."""
        path = require_path("schedule", file)
        if not path.is_file():
            raise ValueError(f"schedule is {file}, which is not a file; expected one that ddt_fast.tune_sampler wrote")
        content = read_json(path)
        try:
            for part, kind in (("schedule", dict), ("evidence", list)):
                if not isinstance(content.get(part), kind):
                    raise ValueError(f"it has no {part}")
            if not content["evidence"] or not all(map(_is_evidence, content["evidence"])):
                raise ValueError("its evidence is missing or not numbers")
            return cls(Schedule.from_dict(content["schedule"]), tuple(content["evidence"]))
        except ValueError as error:
            raise ValueError(f"{file} is not a schedule of ddt_fast.tune_sampler: {error}") from error

    def settings(self, config: SamplingConfig) -> SamplingConfig:
        """`config` with this schedule; the guidance scale stays."""
        steps, interval = corrected_steps(config, len(self.schedule.times), 3), self.schedule.guidance_interval
        return replace(steps, guidance_interval=interval, schedule=self.schedule)

    def expectation(self, scale: float) -> str:
        """What to expect at a guidance scale, in words."""
        row = min(self.evidence, key=lambda row: abs(row["guidance_scale"] - scale))
        measured = f"guidance {row['guidance_scale']:g}" + ", the nearest measured," * (row["guidance_scale"] != scale)
        before, after = ([f"{row[run][error]:.2g}" for error in ERRORS] for run in ("rule", "tuned"))
        return (
            f"{plural(len(self.schedule.times), 'fitted step')}. At {measured} the error was {after[0]} of all samples "
            f"and {after[1]} in median, in place of the solver's {before[0]} and {before[1]} ({row['samples']} samples)"
        )


def _is_evidence(row: Any) -> bool:
    """Whether it has the numbers of `Tuned.evidence`."""
    if not isinstance(row, dict) or not all(isinstance(row.get(run), dict) for run in ("rule", "tuned")):
        return False
    numbers = [row.get(name) for name in ("guidance_scale", "samples")]
    numbers += [row[run].get(error) for run in ("rule", "tuned") for error in ERRORS]
    return all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in numbers)


def tuned_file(checkpoint: Path, num_steps: int) -> Path:
    """Where the schedule of so many steps of a local checkpoint is kept: in its folder, or beside the file. One for a
    place that cannot be written or belongs to the installed package is kept in the working folder."""
    name = f"tuned_{num_steps}_steps.json"
    beside = checkpoint / name if checkpoint.is_dir() else checkpoint.with_name(f"{checkpoint.name}.{name}")
    in_package = Path(__file__).resolve().parents[1] in checkpoint.resolve().parents
    return Path(f"{checkpoint.name}_{name}") if in_package or not os.access(beside.parent, os.W_OK) else beside


def model_digests(model: "DDT | FusedDDT") -> tuple[str, ...]:
    """SHA-256 of evenly spread weights of a float32 model, as they are in float32, bfloat16 and float16."""
    import torch

    return tuple(_digest(model, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))


def check_schedule(model: "DDT | FusedDDT", config: SamplingConfig, height: int, width: int) -> None:
    """ValueError if the schedule of the settings, if any, is for another model, or another size of its input. A
    quantised model is not compared: check the one it was made from."""
    from ddt_fast.model.quantization import is_quantized

    schedule = config.schedule
    if schedule is None or is_quantized(model):
        return
    if _digest(model) not in schedule.model:
        raise ValueError("the schedule was fitted to other weights than this model's; run ddt_fast.tune_sampler on it")
    if schedule.size != (height, width):
        fitted, asked = ("x".join(map(str, size)) for size in (schedule.size, (height, width)))
        raise ValueError(f"the schedule was fitted to inputs of {fitted}, not {asked}; run ddt_fast.tune_sampler there")


def _digest(model: "nn.Module", dtype: Any = None) -> str:
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        values = value.detach().flatten()[:: max(1, value.numel() // _VALUES_READ_PER_TENSOR)].cpu().to(dtype)
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
