"""The work of `ddt_fast.tune_sampler`."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ddt_fast.checks import require, require_kind, require_path
from ddt_fast.config import SamplingConfig, Schedule
from ddt_fast.device import choose_dtype
from ddt_fast.files import check_no_folder, output_folder, write_json
from ddt_fast.generation.engine import open_device
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.model.settings import experiment_of, resolve_checkpoint
from ddt_fast.model.weights import load_model
from ddt_fast.provenance import environment
from ddt_fast.ranks import Ranks, process_ranks
from ddt_fast.sampling import Sampler, SamplingPlan
from ddt_fast.sampling.budgets import corrected_steps
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.sampling.refresh.probe import spread_labels
from ddt_fast.sampling.tuned import ERRORS, MAX_FITTED_STEPS, Tuned, model_digests, tuned_file
from ddt_fast.sampling.tuning import Batch, Fit, Numbers, Run
from ddt_fast.training.parallel import process_group
from ddt_fast.wording import plural

_ITERATIONS = 16
_FIRST_SEED = 1_000_000  # of the noises to fit to; those of the comparison are 0 and up
_FINE_STEPS = 64  # or five times as many as are fitted: errors of 2% of the solver's or less on the digits
_LEAN, _PATIENCE = 0.01, 3  # a fit ends after so many steps in succession that gain less


@dataclass(frozen=True)
class _Job:
    model: DDT | FusedDDT
    start: SamplingConfig
    size: tuple[int, int]
    batch_size: int
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def gather(self, values: Tensor) -> Tensor:
        """The rows of all processes, one process after the other."""
        if not dist.is_initialized():
            return values
        parts: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(parts, values)
        return torch.cat(parts)

    def total(self, sums: Tensor) -> Tensor:
        if dist.is_initialized():
            dist.all_reduce(sums)
        return sums

    def draws(self, first_seed: int, count: int) -> tuple[Tensor, Tensor]:
        """This process's noises and labels of `count`."""
        own = slice(self.ranks.rank, None, self.ranks.world_size)
        shape = (self.model.config.in_channels, *self.size)
        noise, _ = seeded_noise(range(first_seed, first_seed + count)[own], shape)
        return noise, spread_labels(count, self.model.config.num_classes)[own]

    def sample(self, config: SamplingConfig, noise: Tensor, labels: Tensor, words: str) -> Tensor:
        """Samples of a run, on the CPU."""
        sampler = Sampler(self.model, config, min(self.batch_size, len(noise)), *self.size)
        parts = list(zip(noise.split(sampler.batch_size), labels.split(sampler.batch_size), strict=True))
        bar = tqdm(parts, desc=words, unit="batch", disable=self.ranks.rank > 0, leave=False, dynamic_ncols=True)
        return torch.cat([sampler(x, y).cpu() for x, y in bar])

    def solutions(self, scale: float, noise: Tensor, labels: Tensor) -> Tensor:
        fine = replace(self.start, order=3, num_steps=_fine_steps(self.start), guidance_scale=scale)
        return self.sample(fine, noise, labels, f"solutions at guidance {scale:g}")

    def errors(self, config: SamplingConfig, noise: Tensor, labels: Tensor, solutions: Tensor) -> dict[str, float]:
        drawn = self.sample(config, noise, labels, f"comparison at guidance {config.guidance_scale:g}")
        off, norms = (self.gather(x.double().flatten(1).norm(dim=1)) for x in (drawn - solutions, solutions))
        return dict(zip(ERRORS, ((off.norm() / norms.norm()).item(), (off / norms).quantile(0.5).item()), strict=True))


def fit(
    checkpoint: str | Path,
    start: SamplingConfig | None,
    preset: str | None,
    scales: tuple[float, ...],
    num_samples: int,
    batch_size: int,
    output: str | Path | None,
    device: str,
    dtype: str,
) -> Tuned | None:
    """Fit a schedule; arguments and errors are those of `ddt_fast.tune_sampler.fit_schedule`."""
    place, source, ranks = open_device(device), resolve_checkpoint(checkpoint), process_ranks()
    experiment = experiment_of(source, preset)
    if start is None:
        start = corrected_steps(experiment.sampling, 10, 2)
    _check_start(start)
    start = replace(start, guidance_scale=scales[0])
    plan, model_size = SamplingPlan.from_config(start), (experiment.data.sample_size,) * 2
    file = tuned_file(source, start.num_steps) if output is None else require_path("output", output)
    _check_replaceable(file)
    output_folder(file.parent)  # before the work, not after it
    num_samples -= num_samples % len(scales)
    reference = load_model(source, place, torch.float32, experiment.model).requires_grad_(False)
    digests = model_digests(reference)
    reference = reference.to(choose_dtype(dtype, place, experiment.data.in_latents(experiment.model.in_channels)))
    # On a CPU, the gradients of plain PyTorch are faster.
    model = reference if place.type == "cpu" else FusedDDT.from_reference(reference)
    model.gradient_checkpointing = place.type != "cpu"
    job = _Job(model, start, model_size, batch_size, ranks)
    ranks.say(f"{source}: {_costs(job, plan, scales, num_samples)}")
    if file.exists():
        ranks.say(f"{file} will be replaced if the new fit is kept")
    with process_group(place) if ranks.world_size > 1 else nullcontext():
        numbers = Numbers(start)
        vector = _fit(job, numbers, scales, num_samples // len(scales))
        times, *rows = numbers.steps(torch.tensor(vector, dtype=torch.float32).double().numpy())
        cond, diff = (tuple(map(tuple, part)) for part in rows)
        schedule = Schedule(tuple(times), cond, diff, start.guidance_interval, digests, model_size)
        tuned = Tuned(schedule, tuple(_compare(job, schedule, scales, num_samples // len(scales))))
    return _finish(tuned, file, job, {"checkpoint": str(source), "num_samples": num_samples, **environment(place)})


def _fit(job: _Job, numbers: Numbers, scales: Sequence[float], count: int) -> Any:
    parts = []
    for i, scale in enumerate(scales):
        noise, labels = job.draws(_FIRST_SEED + i * count, count)
        strength = torch.full((len(noise), 1, 1, 1), scale - 1)
        parts.append((noise, labels, strength, job.solutions(scale, noise, labels)))
    data = [torch.cat(tensors).to(job.device).split(job.batch_size) for tensors in zip(*parts, strict=True)]
    batches = [Batch(*tensors) for tensors in zip(*data, strict=True)]
    found = Fit(Run(job.model, numbers), batches, job.total, job.gather, seed=job.ranks.rank)
    with tqdm(total=_ITERATIONS, desc="fit", disable=job.ranks.rank > 0, leave=False, dynamic_ncols=True) as bar:
        lean = 0
        for _ in range(_ITERATIONS):
            lean = lean + 1 if found.iterate() < _LEAN else 0
            bar.set_postfix_str(f"mean error {found.distances.mean():.4g}")
            bar.update()
            if lean == _PATIENCE:
                break
    return numbers.vector(found.parameters)


def _compare(job: _Job, schedule: Schedule, scales: Sequence[float], count: int) -> list[dict[str, Any]]:
    """The evidence, a row for each scale."""
    rows, noise, labels = [], *job.draws(0, count)
    for scale in scales:
        solutions, rule = job.solutions(scale, noise, labels), replace(job.start, guidance_scale=scale)
        runs = {"rule": rule, "tuned": replace(rule, schedule=schedule)}
        errors = {name: job.errors(config, noise, labels, solutions) for name, config in runs.items()}
        rows.append({"guidance_scale": scale, "samples": count, **errors})
    return rows


def _finish(tuned: Tuned, file: Path, job: _Job, about: dict[str, Any]) -> Tuned | None:
    """Write the schedule if it is better everywhere, and say what was found."""
    worse = [
        f"{name} at guidance {row['guidance_scale']:g}"
        for row in tuned.evidence
        for error, name in zip(ERRORS, ("the error of all samples", "the median error"), strict=True)
        if not row["tuned"][error] < row["rule"][error]
    ]
    if not worse and job.ranks.rank == 0:
        start = {name: value for name, value in asdict(job.start).items() if name in ("num_steps", "order")}
        write_json(file, {"schedule": asdict(tuned.schedule), "evidence": tuned.evidence, "start": start, **about})
    lines = [f"{'on other noises':<18}{'error of all samples':>28}{'median error':>28}"]
    for row in tuned.evidence:
        cells = (f"{row['rule'][error]:.3g} to {row['tuned'][error]:.3g}" for error in ERRORS)
        lines.append(f"guidance {row['guidance_scale']:<9g}" + "".join(f"{cell:>28}" for cell in cells))
    job.ranks.say("\n".join(lines))
    if worse:
        help = "more samples (--num-samples) or fewer scales (--guidance-scales) may help"
        job.ranks.say(f"not kept: {' and '.join(worse)} did not fall; {help}")
        return None
    job.ranks.say(f"wrote {file}; `python -m ddt_fast.sample --schedule {file}` uses it with this checkpoint")
    return tuned


def _costs(job: _Job, plan: SamplingPlan, scales: Sequence[float], num_samples: int) -> str:
    """What will be done and what it costs, counted."""
    run = plan.flops(job.model.config, *job.size)
    fine = SamplingPlan.from_config(replace(job.start, num_steps=_fine_steps(job.start)))
    # A Gauss-Newton step: a run, once more with gradients, two backward passes (by inputs alone, so each as much as a
    # run, and with checkpointing as two), and a trial.
    fitting = (7 if job.model.gradient_checkpointing else 5) * _ITERATIONS * run * num_samples
    total = fitting + 2 * num_samples * (fine.flops(job.model.config, *job.size) + run)
    amount = f"{total / 1e15:.3g} PFLOP" if total > 1e15 else f"{total / 1e12:.3g} TFLOP"
    return (
        f"fit {plural(job.start.num_steps, 'step')} of order {job.start.order} at guidance "
        f"{', '.join(f'{scale:g}' for scale in scales)}, {num_samples} samples: about {amount}, counted"
    )


def _fine_steps(start: SamplingConfig) -> int:
    return max(_FINE_STEPS, 5 * start.num_steps)


def _check_start(start: SamplingConfig) -> None:
    require_kind("start", start, SamplingConfig)
    require(start.solver == "pec", "start.solver", start.solver, "pec, which is what is fitted")
    everything = start.refresh_every == start.guidance_every == 1 and start.refresh_steps is None
    if not everything or start.schedule is not None:
        raise ValueError("start shares evaluations or has a schedule; expected `sampling.budgets.corrected_steps`")
    require(start.num_steps <= MAX_FITTED_STEPS, "num_steps", start.num_steps, f"up to {MAX_FITTED_STEPS} to fit")


def _check_replaceable(file: Path) -> None:
    """ValueError if the file exists and is not a schedule."""
    check_no_folder(file)
    if file.exists():
        try:
            Tuned.read(file)
        except ValueError as error:
            raise ValueError(f"output: {error}; name another file") from error
