"""The training loop."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddt_fast.config import Experiment, TrainingConfig
from ddt_fast.evaluation.digits_score import DigitsScore
from ddt_fast.model.reference import DDT
from ddt_fast.training.run import open_run


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run."""

    step: int
    """The last step: max_steps, or less if the run was told to stop."""
    model: DDT | None
    """The averaged model, on the CPU; None in processes other than the first, and after an early stop."""
    scores: dict[str, DigitsScore]
    """Scores of its samples, by kind of sampling; empty without scoring."""


def train(experiment: Experiment, output_dir: Path, device: torch.device, resume: str | None = None) -> TrainingResult:
    """Train a DDT by flow matching, in the processes that torchrun started; write everything under output_dir.

    Written: recipe.yaml (every setting, for `--config`), log.jsonl (a line every log_every steps), checkpoints/
    (`training.checkpoint`), samples/ (grids), and at the end model/ (the averaged weights), samples.png, curves.png and
    training.json (provenance and scores). Progress goes to stderr. SIGTERM saves a checkpoint and ends the run.

    resume: None starts from scratch and removes an earlier run in the folder; "auto" continues from its latest
    checkpoint, if any; else the folder of a checkpoint. A continued run ends as an uninterrupted one would: on a CPU,
    with the same number of processes and threads, bit for bit.

    Raises:
        ValueError: the data cannot be trained on, the checkpoint cannot be continued, the sampling settings cannot be
            run, output_dir holds files of the same names that are not a run's, or a loss is not finite.
        OSError: outputs cannot be written.
    """
    settings = experiment.training
    with open_run(experiment, output_dir, device, resume) as run:
        state, means = run.state, RunningMeans(settings, device)
        while state.step < settings.max_steps and not run.stop.agreed():
            state.step += 1
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(settings, state.step)
            losses = run.objective.backward(run.replica, next(run.loader), state.step)
            norm = clip_gradients(state.masters, settings.max_grad_norm)
            state.optimizer.step()
            state.optimizer.zero_grad()
            run.replica.copy_master_weights()
            state.ema.update(state.masters.denoiser)

            means.add(losses, norm)
            run.advance()
            last = state.step == settings.max_steps
            if state.step % settings.log_every == 0 or last:
                run.report(means.metrics(state.step) | run.throughput.read())
            if state.step % settings.checkpoint_every == 0 and not last:
                means.check(state.step)
                run.save()
            if settings.sample_every and state.step % settings.sample_every == 0 and not last:
                run.draw()
        means.check(state.step)
        run.save(wait=True)
        if state.step < settings.max_steps:
            return TrainingResult(state.step, None, {})
        return TrainingResult(state.step, *run.finish())


def learning_rate(settings: TrainingConfig, step: int) -> float:
    """The learning rate of a step, counted from 1: it rises linearly over the warm-up, then is constant."""
    return settings.learning_rate * min(1.0, step / max(1, settings.warmup_steps))


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scale the gradients down to max_norm if their norm is above it; the norm of all together, (1,) float32."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).view(1)


class RunningMeans:
    """Means over the steps since the last line of the log; only reading them waits for the device."""

    def __init__(self, settings: TrainingConfig, device: torch.device) -> None:
        self._settings = settings
        self._sums = torch.zeros(3, device=device)
        self._steps = 0

    def add(self, losses: Tensor, norm: Tensor) -> None:
        """Add one step's losses (2,), of flow matching and REPA, and its gradient norm (1,)."""
        self._sums += torch.cat([losses, norm])
        self._steps += 1

    def metrics(self, step: int) -> dict[str, float]:
        """The means over all processes; starts again. ValueError as `check`."""
        loss, repa, norm = self.check(step)
        self._sums.zero_()
        self._steps = 0
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate(self._settings, step)}
        return metrics | ({"repa_loss": repa} if self._settings.repa_weight else {})

    def check(self, step: int) -> list[float]:
        """The means so far, over all processes: losses of flow matching and REPA, gradient norm. ValueError if one is
        not finite, so that ruined weights never replace a good checkpoint."""
        sums = self._sums / (max(1, self._steps) * dist.get_world_size())
        dist.all_reduce(sums)
        loss, repa, norm = sums.tolist()
        for name, value in (("loss", loss + repa), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise ValueError(f"the {name} is {value} by step {step}; use a lower learning_rate")
        return [loss, repa, norm]
