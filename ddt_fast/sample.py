"""Sample from a DDT: `python -m ddt_fast.sample` alone draws digits from the checkpoint in the package."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import jsonargparse
import numpy as np
import torch
from tqdm import tqdm

from ddt_fast.autoencoder import Decoder
from ddt_fast.command import CommandParser, choose_device, choose_dtype, parse_bytes, run_command
from ddt_fast.config import Experiment, GuidanceForecast, SamplingConfig
from ddt_fast.files import output_folder
from ddt_fast.generation.job import Job, check_output, generate, save_images
from ddt_fast.generation.seeds import assign_labels
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.model.attention import ATTENTION_BACKENDS, resolve_backend
from ddt_fast.model.cpu import cpu_has_int8
from ddt_fast.model.packed import pack_bf16
from ddt_fast.model.quantization import quantization_error, quantize_int8
from ddt_fast.model.weights import has_config, load_model
from ddt_fast.sampling import Sampler, SamplingPlan
from ddt_fast.sampling import sample as sample_function
from ddt_fast.sampling.buffers import fitting_batch_size, format_bytes
from ddt_fast.sampling.fast import FAST_SUMMARY, fast_settings
from ddt_fast.sampling.schedule_cache import schedule_cache_path
from ddt_fast.sampling.sharing import resolve_refresh_steps
from ddt_fast.sampling_options import add_checkpoint_options, add_solver_options, chosen_checkpoint, given_settings


def build_parser() -> jsonargparse.ArgumentParser:
    """The options of the command; sampling settings that are not given are the checkpoint's own."""
    parser = CommandParser(prog="python -m ddt_fast.sample", description=__doc__)
    add_checkpoint_options(parser)
    add_solver_options(parser)
    add = parser.add_argument
    add("--num-images", type=int, help="default: 100 digits, 16 otherwise, or one per seed")
    add("--classes", type=int, nargs="+", help="classes to go round; default: all")
    add("--seeds", type=int, nargs="+", help="one per image; default: --first-seed and up")
    add("--first-seed", type=int, help="seed of the first image, the next image has the next seed; default: 0")
    add("--refresh-every", type=int, help="run the encoder at every K-th step")
    add("--refresh-steps", type=str, nargs="+", help='run the encoder at these steps, the first 0; or "dp": the best')
    add("--num-refreshes", type=int, help="how many, for --refresh-steps dp; found by a probe, then kept")
    add("--guidance-every", type=int, help="evaluate the unconditional branch at every M-th guided step")
    add("--guidance-forecast", choices=get_args(GuidanceForecast), help="the guidance difference between those")
    add("--fast", action="store_true", help=f"the recommended shortcut: {FAST_SUMMARY}; options given go before it")
    add("--cuda-graphs", action="store_true", help="replay the loop as CUDA graphs")
    add("--batch-size", type=int, default=100, help="images drawn at a time")
    add("--memory-budget", type=str, help="for what is kept between steps, e.g. 8GiB; makes batches fit")
    add("--attention", choices=ATTENTION_BACKENDS, default="auto", help="attention implementation")
    add("--compile", action="store_true", help="run the model through torch.compile: slow to start, then faster")
    add("--quantize", choices=["int8"], help="CPU: 8-bit weights and activations; the error is measured and printed")
    add("--reference", action="store_true", help="run the plain PyTorch model instead of the fused one")
    add("--output-dir", type=str, default="samples", help="where images, grid.png and samples.npz go")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, sample, write, report."""
    options = build_parser().parse_args(arguments)
    device = choose_device(options.device)
    checkpoint, experiment = chosen_checkpoint(options)
    job, sampling = _job(options, experiment)
    # float32 is the faster choice between int8 GEMMs.
    latents = experiment.data.autoencoder is not None and options.quantize is None
    dtype = choose_dtype(options.dtype, device, latents)
    budget = None if options.memory_budget is None else parse_bytes(options.memory_budget)
    output_dir = output_folder(options.output_dir)
    check_output(output_dir)
    reference = load_model(checkpoint, device, dtype, None if has_config(checkpoint) else experiment.model)
    model, description = _engine_model(reference, options)
    size = experiment.data.sample_size
    if sampling.refresh_steps == "dp":
        sampling = resolve_refresh_steps(reference, sampling, size, size, schedule_cache_path(checkpoint))
    plan = SamplingPlan.from_config(sampling)
    batch_size = min(options.batch_size, len(job.seeds))
    if budget is not None:
        fitting = fitting_batch_size(plan, model, batch_size, size, size, budget)
        if fitting < batch_size:
            print(f"memory budget {options.memory_budget}: batches of {fitting} instead of {batch_size}")
        batch_size = fitting
    sampler = Sampler(model, sampling, batch_size, size, size, memory_budget=budget, compile_model=options.compile)
    autoencoder = experiment.data.autoencoder
    decode = Decoder(autoencoder, device) if autoencoder is not None else None

    interval = "{:g}, {:g}".format(*sampling.guidance_interval)
    print(f"{checkpoint}: {sampling.solver}, guidance {sampling.guidance_scale:g} in ({interval})")
    print(
        f"{len(job.seeds)} images, {len(plan.steps)} steps, per image: {plan.network_evaluations} network evaluations, "
        f"{plan.encoder_evaluations} encoder runs, {plan.flops(experiment.model, size, size) / 1e9:.3g} GFLOP"
    )
    captured = f", captured in {sampler.capture_seconds:.1f} s" if sampler.capture_seconds else ""
    print(
        f"{description}, {sampler.engine}{captured}; batches of {batch_size} keep "
        f"{format_bytes(sampler.buffers.kept_bytes)} between steps"
    )
    started = time.perf_counter()
    num_batches = -(-len(job.seeds) // batch_size)
    with tqdm(total=num_batches * len(plan.steps), unit="step", dynamic_ncols=True) as bar:
        images = np.concatenate(list(generate(sampler, job, decode, progress=lambda *_: bar.update())))
    seconds = time.perf_counter() - started
    save_images(images, job, output_dir)
    print(f"{len(images) / seconds:.1f} img/s on {device}, {description}")
    print(f"wrote images/, grid.png and samples.npz to {output_dir}")


def _engine_model(reference: DDT, options: Any) -> tuple[DDT | FusedDDT, str]:
    """The model as the options want it run, and that in words."""
    parameter = next(reference.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    if options.reference:
        if options.quantize or options.compile or options.attention != "auto":
            raise ValueError("--reference is plain PyTorch; it goes without --quantize, --compile and --attention")
        return reference, f"{dtype}, reference model"
    config = reference.config
    backend = resolve_backend(options.attention, parameter.device, parameter.dtype, config.head_dim)
    model = FusedDDT.from_reference(reference, options.attention)
    if options.quantize is None:
        return pack_bf16(model), f"{dtype}, attention {backend}"
    quantized = quantize_int8(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, config.in_channels, 4 * config.patch_size, 4 * config.patch_size, generator=generator)
    t, y = torch.tensor([0.3, 0.7]), torch.tensor([0, config.num_classes])
    error = quantization_error(model, quantized, x.to(parameter.dtype), t, y)
    if not cpu_has_int8():
        print("int8: this CPU has no units for it; expect it to be slower than float32")
    print(f"int8: relative error of a velocity {error:.2g} against {dtype}")
    return quantized, f"int8 ({dtype} between), attention {backend}"


def _job(options: Any, experiment: Experiment) -> tuple[Job, SamplingConfig]:
    """Labels and seeds, and sampling settings, as the options say; ValueError for values that are not allowed."""
    given = given_settings(options)
    if "refresh_steps" in given:
        given = {"refresh_every": 1, "num_refreshes": None, **given, "refresh_steps": _steps(given["refresh_steps"])}
    elif "refresh_every" in given:
        given |= {"refresh_steps": None, "num_refreshes": None}
    sampling = experiment.sampling
    if options.fast:
        sampling = fast_settings(replace(sampling, num_steps=given.get("num_steps", sampling.num_steps)))
    sampling = replace(sampling, **given)
    if options.seeds and options.first_seed is not None:
        raise ValueError("--seeds and --first-seed are both given; give one")
    seeds = options.seeds
    default_count = len(seeds) if seeds else 100 if experiment.data.autoencoder is None else 16
    count = default_count if options.num_images is None else options.num_images
    for name, value in (("--num-images", count), ("--batch-size", options.batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed: 1 or more")
    if seeds and len(seeds) != count:
        raise ValueError(f"--seeds gives {len(seeds)} seeds for {count} images; wanted one each")
    first_seed = options.first_seed or 0
    for seed in seeds or (first_seed, first_seed + count - 1):
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed} does not exist; allowed: 0 to 2^63 - 1")
    seeds = seeds or range(first_seed, first_seed + count)
    labels = assign_labels(count, experiment.model.num_classes, options.classes)
    return Job(labels, seeds), sampling


def _steps(words: list[str]) -> tuple[int, ...] | Literal["dp"]:
    if words == ["dp"]:
        return "dp"
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--refresh-steps is {' '.join(words)}; allowed: step numbers, or dp")
    return tuple(int(word) for word in words)


class _CallableModule(types.ModuleType):
    """Importing this file binds it to the name ddt_fast.sample, which is also the library's function `sample`: both
    work when the module can be called."""

    __call__ = staticmethod(sample_function)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    run_command(main)
