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

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import environment
from benchmarks.harness import interleave, relative_error, timed
from benchmarks.models import as_vector, random_model, released_gradients, weight_bytes
from benchmarks.report import tables
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
# Of all gradients together, relative: beyond it a variant is wrong, not imprecise, and is not timed.
MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1}
SIDE = 32  # of the latents of a 256 px image
FEATURES = (256, 768)  # tokens of DINOv2 ViT-B/14 for a 256 px image, and their size


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


class Setup:
    """What all variants share: a seeded batch, on the host as a loader leaves it; the objective; by engine, made at the
    first call, the state that training changes."""

    def __init__(self, reference: DDT, batch_size: int, repa: bool, device: torch.device) -> None:
        config, generator = reference.config, torch.Generator().manual_seed(0)
        latents = torch.randn(batch_size, config.in_channels, SIDE, SIDE, generator=generator)
        labels = torch.randint(config.num_classes, (batch_size,), generator=generator)
        features = torch.randn(batch_size, *FEATURES, generator=generator).bfloat16() if repa else None
        batch = LatentBatch(latents, labels, features, None)
        self.batch = batch.pin_memory() if device.type == "cuda" else batch
        data = DataConfig(dataset="latents", image_size=8 * SIDE, autoencoder="none: latents are random")
        block = min(8, config.num_encoder_blocks)  # the 8th, as REPA has it, or the encoder's last
        training = TrainingConfig(batch_size=batch_size, repa_weight=0.5 if repa else 0.0, repa_block=block)
        self.objective = Objective(Experiment(config, data, training), device, FEATURES if repa else None)

        @cache
        def state(engine: str) -> TrainingState:
            denoiser = FusedDDT.from_reference(reference) if engine == "fused" else reference
            with torch.random.fork_rng():
                torch.manual_seed(0)
                projector = Projector(config.hidden_size, FEATURES[1]) if repa else None
            masters = TrainingModel(denoiser, projector, block).to(device).requires_grad_(True).train()
            # A step changes next to nothing, so that all variants compute on the same weights.
            optimizer = torch.optim.AdamW(masters.parameters(), lr=1e-9, weight_decay=0.0, fused=True)
            return TrainingState(masters, EMA(masters.denoiser, 0.9999), optimizer)

        self.state = state


class Step:
    """A variant on the weights, moments and averages that all variants of its engine share. Arguments of its calls are
    ignored."""

    def __init__(self, variant: Variant, setup: Setup) -> None:
        self.variant, self.setup, self.state = variant, setup, setup.state(variant.engine)
        shared = self.state.masters
        own = TrainingModel(shared.denoiser, shared.projector, shared.block)
        self.device = next(shared.parameters()).device
        dtype = torch.float32 if variant.autocast else variant.dtype
        self.replica = MixedPrecisionReplica(own, dtype, "ddp", variant.compile)

    @property
    def copied_bytes(self) -> int:
        compute = self.replica.compute
        return 0 if compute is self.replica.masters else weight_bytes(compute)

    def precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.variant.dtype) if self.variant.autocast else nullcontext()

    def forward(self) -> object:
        """Velocity and projected features, ready for a backward pass."""
        latents, labels, *_ = self.setup.batch
        with self.precision():
            t = torch.full((len(latents),), 0.5, device=self.device)
            return self.replica.compute(latents.to(self.device), t, labels.to(self.device))

    def backward(self) -> Tensor:
        """The losses; leaves the gradients in the shared weights."""
        with self.precision():
            return self.setup.objective.backward(self.replica, self.setup.batch, step=1)

    def __call__(self, *_: object) -> list[Tensor]:
        losses = self.backward()
        nn.utils.get_total_norm([p.grad for p in self.state.masters.parameters() if p.grad is not None])
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        self.replica.copy_master_weights()
        self.state.ema.update(self.state.masters.denoiser)
        return [losses]

    def check(self, *_: object) -> tuple[Tensor, Tensor]:
        """The losses, and all of the denoiser's gradients as one vector in the order of the released names; leaves no
        gradients behind."""
        losses, gradients = self.backward(), as_vector(released_gradients(self.state.masters.denoiser))
        self.state.optimizer.zero_grad()
        return losses, gradients


def measure_memory(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes above what was allocated before, by PyTorch's allocator: what is left when the call returns, its result
    alive, and the peak."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        kept, peak = torch.cuda.memory_allocated(device) - before, torch.cuda.max_memory_allocated(device) - before
        del result
        return kept, peak
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return now, peak


def measure(
    config: DDTConfig, batch_size: int, calls: int, repa: bool, device: torch.device, variants: tuple[Variant, ...]
) -> Iterator[dict[str, Any]]:
    """A row for every variant, the baseline first; ValueError where a variant's gradients are wrong."""
    setup = Setup(random_model(config, device=device), batch_size, repa, device)
    steps: dict[Variant, Step] = {}
    errors, first = {}, {}
    expected: Tensor | None = None
    for variant in variants:
        step = steps[variant] = Step(variant, setup)
        first[variant] = timed(step.backward)
        step.state.optimizer.zero_grad()
        _, gradients = step.check()
        expected = gradients if expected is None else expected
        error = errors[variant] = relative_error(gradients, expected)
        if not error <= MAX_ERROR[variant.dtype]:
            raise ValueError(f"{variant.name}: gradients are off by {error:.2g}; not timed")
    timings = interleave(steps, calls)
    flops = training_flops(config, SIDE, SIDE, repa) * batch_size
    baseline: dict[str, Any] = {}
    for variant, step in steps.items():
        (kept, _), (_, peak) = (measure_memory(part, device) for part in (step.forward, step.backward))
        step.state.optimizer.zero_grad()
        seconds, fastest = timings[variant]["median"], peak_flops(device, variant.dtype)
        row: dict[str, Any] = {
            "variant": variant.name,
            "seconds": timings[variant],
            "images_per_second": batch_size / seconds,
            "tflops": flops / seconds / 1e12,
            "mfu": fastest and flops / seconds / fastest,
            "kept_bytes": kept + step.copied_bytes,
            "peak_bytes": peak + step.copied_bytes,
            "gradient_error": errors[variant],
            "first_call_seconds": first[variant],
        }
        baseline = baseline or row
        row["times_faster"] = baseline["seconds"]["median"] / seconds
        for name in ("kept", "peak"):
            row[f"{name}_of_reference"] = row[f"{name}_bytes"] / baseline[f"{name}_bytes"]
        yield row


def main(arguments: list[str] | None = None) -> None:
    from ddt_fast.command import CommandParser  # needs jsonargparse, which a GPU machine may lack

    parser = CommandParser(prog="python -m benchmarks.training_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/training_step.json"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, help="default: 4 on a CPU, 32 on a GPU")
    parser.add_argument("--calls", type=int, default=5, help="of every variant")
    parser.add_argument("--only", nargs="+", help="variants to measure beside the baseline, such as 'FusedDDT, bf16'")
    options = parser.parse_args(arguments)
    require_int("--calls", options.calls, 1)
    if options.batch_size is not None:
        require_int("--batch-size", options.batch_size, 1)
    names = [variant.name for variant in VARIANTS]
    for name in options.only or ():
        require(name in names, "--only", name, ", ".join(names))
    run(options.output, options.only or names, options.batch_size, options.calls, choose_device(options.device))


def run(
    output: Path,
    names: Sequence[str],
    batch_size: int | None,
    calls: int,
    device: torch.device,
    config: DDTConfig | None = None,
) -> None:
    """Measure these variants beside the baseline, write the file and print its table. config: on a CPU, of a model
    other than B_SHAPED."""
    gpu = device.type == "cuda"
    # 32: the reference in fp32 keeps 1.2 GB an image, beside 25 GB that the variants share; a GPU has 80 GB or more.
    batch_size = batch_size or (32 if gpu else 4)
    torch._dynamo.config.recompile_limit = 128
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    config = PRESETS["xl2_256"].model if gpu else config or B_SHAPED
    size = "B-shaped: " * (config == B_SHAPED) + f"{config.num_blocks} blocks, C {config.hidden_size}"
    model = "XL/2, 256 px, REPA" if gpu else f"{size}, 32x32 latents, no REPA"
    record: dict[str, Any] = {"environment": environment(), "model": model, "batch_size": batch_size}
    with process_group(device):
        chosen = tuple(variant for variant in VARIANTS if variant.name in (REFERENCE, *names))
        record["rows"] = list(measure(config, batch_size, calls, gpu, device, chosen))
    write_json(output, record)
    print("\n\n".join(tables.training_step(record)))


if __name__ == "__main__":
    from ddt_fast.command import run_command

    run_command(main)
