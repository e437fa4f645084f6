"""One training step: the reference in plain PyTorch, FusedDDT, fp32 and bf16, eager and compiled; time and memory.

    python -m benchmarks.training_step --output benchmarks/results/training_step.json

A step is what `ddt_fast.training.loop` does between two batches: noise and times, forward, backward, gradient norm,
AdamW, EMA. On a CPU the model is B-shaped (12 blocks, C 384, 32x32 latents), on a GPU XL/2 with REPA on cached
features.

- Before anything is timed, each variant's gradients are compared with those of the reference in fp32.
- Variants take turns; the baseline is the reference in plain eager fp32. "autocast" is PyTorch's, as a user of the
  reference would have it; FusedDDT's bf16 is the training loop's own, a bf16 copy of fp32 master weights.
- Memory is what PyTorch's allocator hands out beyond weights, moments and averages: kept, from the end of the forward
  pass on, and the peak over forward and backward, gradients included. bf16 copies of weights count, in both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import environment
from benchmarks.harness import interleave, measure_memory, relative_error, timed
from benchmarks.models import as_vector, random_model, released_gradients
from ddt_fast.checks import require, require_int
from ddt_fast.config import DataConfig, DDTConfig, Experiment, TrainingConfig
from ddt_fast.data.loader import LatentBatch
from ddt_fast.device import choose_device
from ddt_fast.files import write_json
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.presets import PRESETS
from ddt_fast.training.ema import EMA
from ddt_fast.training.model import TrainingModel
from ddt_fast.training.objective import Objective
from ddt_fast.training.parallel import MixedPrecisionReplica, process_group
from ddt_fast.training.repa import Projector
from ddt_fast.training.state import TrainingState
from ddt_fast.training.throughput import peak_flops, training_flops

B_SHAPED = DDTConfig(4, 2, hidden_size=384, num_heads=6, num_blocks=12, num_encoder_blocks=8, num_classes=1000)
REFERENCE = "reference, fp32"
MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Of all gradients together, relative: beyond it a variant is wrong, not imprecise, and is not timed."""
FEATURES = (256, 768)
"""Tokens of DINOv2 ViT-B/14 for a 256 px image, and their size."""


@dataclass(frozen=True)
class Variant:
    """A way to compute a step's gradients."""

    name: str
    engine: str
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    compile: bool = False


VARIANTS = (
    Variant(REFERENCE, "reference"),
    Variant("reference, fp32, compiled", "reference", compile=True),
    Variant("reference, bf16 autocast", "reference", torch.bfloat16, autocast=True),
    Variant("reference, bf16 autocast, compiled", "reference", torch.bfloat16, autocast=True, compile=True),
    Variant("FusedDDT, fp32", "fused"),
    Variant("FusedDDT, fp32, compiled", "fused", compile=True),
    Variant("FusedDDT, bf16", "fused", torch.bfloat16),
    Variant("FusedDDT, bf16, compiled", "fused", torch.bfloat16, compile=True),
)


class Step:
    """A variant on the weights, moments and averages that all variants of its engine share."""

    def __init__(self, variant: Variant, state: TrainingState, objective: Objective) -> None:
        self.variant, self.state, self.objective = variant, state, objective
        shared = state.masters
        own = TrainingModel(shared.denoiser, shared.projector, shared.block)
        dtype = torch.float32 if variant.autocast else variant.dtype
        self.device = next(shared.parameters()).device
        self.replica = MixedPrecisionReplica(own, dtype, "ddp", variant.compile)
        self.copies = 0
        if self.replica.compute is not own:
            self.copies = sum(p.numel() * p.element_size() for p in self.replica.compute.parameters())

    def precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.variant.dtype) if self.variant.autocast else nullcontext()

    def forward(self, batch: LatentBatch) -> object:
        """Velocity and projected features, ready for a backward pass."""
        t = torch.full((len(batch.latents),), 0.5, device=self.device)
        with self.precision():
            return self.replica.compute(batch.latents.to(self.device), t, batch.labels.to(self.device))

    def backward(self, batch: LatentBatch) -> Tensor:
        """The losses; leaves the gradients in the shared weights."""
        with self.precision():
            return self.objective.backward(self.replica, batch, step=1)

    def __call__(self, batch: LatentBatch) -> Tensor:
        losses = self.backward(batch)
        nn.utils.get_total_norm([p.grad for p in self.state.masters.parameters() if p.grad is not None])
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        self.replica.copy_master_weights()
        self.state.ema.update(self.state.masters.denoiser)
        return losses

    def check(self, batch: LatentBatch) -> tuple[Tensor, Tensor]:
        """The losses, and all of the denoiser's gradients as one vector in the order of the released names; leaves no
        gradients behind."""
        losses, denoiser = self.backward(batch), self.state.masters.denoiser
        assert isinstance(denoiser, (DDT, FusedDDT))
        gradients = as_vector(released_gradients(denoiser))
        self.state.optimizer.zero_grad()
        return losses, gradients


def experiment_of(config: DDTConfig, batch_size: int, size: int, repa: bool) -> Experiment:
    """The settings that the objective reads, for latents of `size` x `size`."""
    data = DataConfig(dataset="latents", image_size=8 * size, autoencoder="none: latents are random")
    training = TrainingConfig(batch_size=batch_size, repa_weight=0.5 if repa else 0.0, repa_block=repa_block(config))
    return Experiment(config, data, training)


def repa_block(config: DDTConfig) -> int:
    """The 8th, as REPA has it, or the encoder's last."""
    return min(8, config.num_encoder_blocks)


def states(reference: DDT, repa: bool, device: torch.device) -> Callable[[str], TrainingState]:
    """What training changes, by engine: made at the first call, shared after."""
    made: dict[str, TrainingState] = {}

    def state(engine: str) -> TrainingState:
        if engine not in made:
            denoiser = FusedDDT.from_reference(reference) if engine == "fused" else reference
            with torch.random.fork_rng():
                torch.manual_seed(0)
                projector = Projector(reference.config.hidden_size, FEATURES[1]) if repa else None
            masters = (
                TrainingModel(denoiser, projector, repa_block(reference.config)).to(device).requires_grad_(True).train()
            )
            # A step changes next to nothing, so that all variants compute on the same weights.
            optimizer = torch.optim.AdamW(masters.parameters(), lr=1e-9, weight_decay=0.0, fused=True)
            made[engine] = TrainingState(masters, EMA(masters.denoiser, 0.9999), optimizer)
        return made[engine]

    return state


def random_batch(config: DDTConfig, size: int, batch_size: int, repa: bool) -> LatentBatch:
    """Seeded latents, labels and features, on the host as a loader leaves them."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch_size, config.in_channels, size, size, generator=generator)
    labels = torch.randint(config.num_classes, (batch_size,), generator=generator)
    features = torch.randn(batch_size, *FEATURES, generator=generator).bfloat16() if repa else None
    return LatentBatch(latents, labels, features, None)


def measure(
    config: DDTConfig, batch_size: int, calls: int, repa: bool, device: torch.device, variants: tuple[Variant, ...]
) -> Iterator[dict[str, Any]]:
    """A row for every variant, the baseline first.

    Raises:
        ValueError: a variant's gradients are wrong.
    """
    size = 32
    batch = random_batch(config, size, batch_size, repa)
    objective = Objective(experiment_of(config, batch_size, size, repa), device, FEATURES if repa else None)
    state = states(random_model(config, device=device), repa, device)
    steps, errors, first = {}, {}, {}
    expected: Tensor | None = None
    for variant in variants:
        step = Step(variant, state(variant.engine), objective)
        first[variant.name] = timed(partial(step.backward, batch))
        step.state.optimizer.zero_grad()
        _, gradients = step.check(batch)
        expected = gradients if expected is None else expected
        errors[variant.name] = relative_error(gradients, expected)
        if not errors[variant.name] <= MAX_ERROR[variant.dtype]:
            raise ValueError(f"{variant.name}: gradients are off by {errors[variant.name]:.2g}; not timed")
        steps[variant.name] = step
    timings = interleave({name: partial(step, batch) for name, step in steps.items()}, calls)
    flops = training_flops(config, size, size, repa) * batch_size
    baseline: dict[str, Any] = {}
    for variant in variants:
        step, seconds = steps[variant.name], timings[variant.name]
        forward, whole = (measure_memory(partial(part, batch), device) for part in (step.forward, step.backward))
        step.state.optimizer.zero_grad()
        peak = peak_flops(device, variant.dtype)
        row: dict[str, Any] = {
            "variant": variant.name,
            "seconds": seconds.as_dict(),
            "images_per_second": batch_size / seconds.median,
            "tflops": flops / seconds.median / 1e12,
            "mfu": None if peak is None else flops / seconds.median / peak,
            "kept_bytes": forward.kept + step.copies,
            "peak_bytes": whole.peak + step.copies,
            "gradient_error": errors[variant.name],
            "first_call_seconds": first[variant.name],
        }
        baseline = baseline or row
        row["times_faster"] = baseline["seconds"]["median"] / seconds.median
        for name in ("kept", "peak"):
            row[f"{name}_of_reference"] = row[f"{name}_bytes"] / baseline[f"{name}_bytes"]
        yield row


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/training_step.json"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, help="default: 4 on a CPU, 32 on a GPU")
    parser.add_argument("--calls", type=int, default=5, help="of every variant")
    parser.add_argument("--only", nargs="+", help="variants to measure beside the baseline, such as 'FusedDDT, bf16'")
    options = parser.parse_args(arguments)
    device = choose_device(options.device)
    gpu = device.type == "cuda"
    # 32: the reference in fp32 keeps 1.2 GB an image, beside 25 GB that the variants share; a GPU has 80 GB or more.
    batch_size = options.batch_size if options.batch_size is not None else 32 if gpu else 4
    require_int("--batch-size", batch_size, 1)
    require_int("--calls", options.calls, 1)
    variants = {variant.name: variant for variant in VARIANTS}
    for name in options.only or ():
        require(name in variants, "--only", name, ", ".join(variants))
    chosen = [variant for variant in VARIANTS if variant.name in (REFERENCE, *(options.only or variants))]
    torch._dynamo.config.recompile_limit = 128
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    config = PRESETS["xl2_256"].model if gpu else B_SHAPED
    record: dict[str, Any] = {
        "environment": environment(),
        "model": "XL/2, 256 px, REPA" if gpu else "B-shaped: 12 blocks, C 384, 32x32 latents, no REPA",
        "batch_size": batch_size,
        "rows": [],
    }
    with process_group(device):
        for row in measure(config, batch_size, options.calls, gpu, device, tuple(chosen)):
            record["rows"].append(row)
            words = "{variant:36} {times_faster:.2f}x, kept {kept_of_reference:.2f}, peak {peak_of_reference:.2f}"
            print((words + ", gradients off by {gradient_error:.2g}").format(**row))
    write_json(options.output, record)


if __name__ == "__main__":
    from ddt_fast.command import run_command

    run_command(main)
