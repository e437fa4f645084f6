"""Sample from a DDT: `python -m ddt_fast.sample` alone draws digits from the checkpoint in the package.

Under torchrun the processes share the work. A job that was stopped, in whatever way, goes on when started again.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, get_args

import jsonargparse
import torch
from tqdm import tqdm

from ddt_fast.autoencoder import Decoder
from ddt_fast.command import CommandParser, choose_device, choose_dtype, parse_bytes, run_command
from ddt_fast.config import Experiment, GuidanceForecast, SamplingConfig
from ddt_fast.files import output_folder
from ddt_fast.generation.background import OnImages
from ddt_fast.generation.finish import GRID_IMAGES
from ddt_fast.generation.images import grid_columns
from ddt_fast.generation.job import Generation, check_output
from ddt_fast.generation.scored import add_scoring_options, chosen_scoring
from ddt_fast.generation.seeds import IntArray, Job, assign_labels
from ddt_fast.generation.shards import Images, differences
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.model.attention import ATTENTION_BACKENDS, resolve_backend
from ddt_fast.model.cpu import cpu_has_int8
from ddt_fast.model.packed import pack_bf16
from ddt_fast.model.quantization import quantization_error, quantize_int8
from ddt_fast.model.weights import has_config, load_model
from ddt_fast.provenance import device_name, environment, weights_sha256
from ddt_fast.ranks import Ranks, process_ranks
from ddt_fast.sampling import Sampler, SamplingPlan
from ddt_fast.sampling import sample as sample_function
from ddt_fast.sampling.buffers import fitting_batch_size, format_bytes
from ddt_fast.sampling.fast import FAST_SUMMARY, fast_settings
from ddt_fast.sampling.schedule_cache import schedule_cache_path
from ddt_fast.sampling.sharing import resolve_refresh_steps
from ddt_fast.sampling_options import add_checkpoint_options, add_solver_options, chosen_checkpoint, given_settings
from ddt_fast.wording import counted

ALL_PNG, SOME_PNG = 1000, 100
"""Jobs of up to ALL_PNG images write all as PNGs too, larger ones SOME_PNG, unless told."""

SHARD_IMAGES = 256
"""Images of a shard, in whole batches: a minute or less of work, and even shares for eight processes."""


def build_parser() -> jsonargparse.ArgumentParser:
    """The options of the command; sampling settings that are not given are the checkpoint's own."""
    parser = CommandParser(prog="python -m ddt_fast.sample", description=__doc__)
    add_checkpoint_options(parser)
    add_solver_options(parser)
    add = parser.add_argument
    add("--num-images", type=int, help="default: 100 digits, 16 otherwise, or one per seed")
    add("--classes", type=int, nargs="+", help="classes to go round; default: all")
    add("--seeds-per-class", type=int, help="that many images of every class, in place of --num-images")
    add("--class-seeds", type=int, nargs="+", help="draw every class with each of these seeds")
    add("--seeds", type=int, nargs="+", help="one per image, in their order; default: --first-seed and up")
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
    add("--output-dir", type=str, default="samples", help="where samples.npz, images, grid.png, generation.json go")
    add("--num-png", type=int, help=f"images kept as PNGs too; default: up to {ALL_PNG} all, of more {SOME_PNG}")
    add("--shard-size", type=int, help=f"images per shard; default: about {SHARD_IMAGES}, whole batches")
    add("--keep-shards", action="store_true", help="do not remove the shards when samples.npz is written")
    add("--overwrite", action="store_true", help="drop what an earlier job left in the output folder, begin anew")
    add_scoring_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None, on_images: OnImages | None = None) -> None:
    """Parse, sample, write, report.

    Args:
        arguments: of the command line; None: this process's.
        on_images: called with positions in samples.npz (n,) and images (n, H, W, 3) uint8, each of this process's
            images once: those of earlier calls first, then, from a background thread, batch by batch as they are drawn.
    """
    options = build_parser().parse_args(arguments)
    ranks = process_ranks()
    device = choose_device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True  # a job that goes on shall decode as it would have
    checkpoint, experiment = chosen_checkpoint(options)
    job, order = _job(options, experiment)
    sampling = _sampling(options, experiment)
    # float32 is the faster choice between int8 GEMMs.
    latents = experiment.data.autoencoder is not None and options.quantize is None
    dtype = choose_dtype(options.dtype, device, latents)
    budget = None if options.memory_budget is None else parse_bytes(options.memory_budget)
    output_dir = output_folder(options.output_dir)
    check_output(output_dir)
    scoring = chosen_scoring(options, output_dir, len(job), experiment.data.image_size, device, ranks)
    reference = load_model(checkpoint, device, dtype, None if has_config(checkpoint) else experiment.model)
    model, description = _engine_model(reference, options, ranks)
    size = experiment.data.sample_size
    if sampling.refresh_steps == "dp":
        sampling = resolve_refresh_steps(reference, sampling, size, size, schedule_cache_path(checkpoint))
    plan = SamplingPlan.from_config(sampling)
    batch_size = min(options.batch_size, len(job))
    if budget is not None:
        fitting = fitting_batch_size(plan, model, batch_size, size, size, budget)
        if fitting < batch_size:
            _say(ranks, f"memory budget {options.memory_budget}: batches of {fitting} instead of {batch_size}")
        batch_size = fitting
    autoencoder = experiment.data.autoencoder
    decode = None
    if autoencoder is not None:
        decode = Decoder(autoencoder, device, batch_size=8 if device.type == "cuda" else 1)
    generation = Generation(
        output_dir,
        job,
        {
            **order,
            "image_size": experiment.data.image_size,
            "model": asdict(experiment.model),
            "weights_sha256": weights_sha256(reference),
            "dtype": str(dtype).removeprefix("torch."),
            "quantize": options.quantize,
            "sampling": _without_engine(sampling),
            "autoencoder_sha256": None if decode is None else weights_sha256(decode.vae),
        },
        ranks=ranks,
        shard_size=options.shard_size,
        default_shard_size=batch_size * max(1, SHARD_IMAGES // batch_size),
        overwrite=options.overwrite,
    )

    tera = plan.flops(experiment.model, size, size) / 1e12
    interval = "{:g}, {:g}".format(*sampling.guidance_interval)
    _say(ranks, f"{checkpoint}: {sampling.solver}, guidance {sampling.guidance_scale:g} in ({interval})")
    _say(
        ranks,
        f"{counted(len(job), 'image')}, {counted(len(plan.steps), 'step')}, per image: "
        f"{counted(plan.network_evaluations, 'network evaluation')}, "
        f"{counted(plan.encoder_evaluations, 'encoder run')}, {tera * 1e3:.3g} GFLOP",
    )
    if generation.found:
        print(f"{ranks.who}{generation.found}")
    if on_images is not None:
        generation.feed_found(on_images)
    hooks = [] if on_images is None else [on_images]
    if scoring is not None:
        scoring.begin(generation)
        hooks.append(scoring.take)
    if generation.todo:
        sampler = Sampler(model, sampling, batch_size, size, size, memory_budget=budget, compile_model=options.compile)
        _run(generation, sampler, decode, description, hooks)
    if scoring is not None:
        scoring.save()
    earlier = generation.record
    record = generation.finish(
        {
            "checkpoint": str(checkpoint),
            "autoencoder": autoencoder,
            "network_evaluations": plan.network_evaluations,
            "encoder_evaluations": plan.encoder_evaluations,
            "tflop_per_image": tera,
            **environment(device),
        },
        num_png=_num_png(options, len(job)),
        columns=grid_columns(len(set(job.labels.tolist()))),
        keep_shards=options.keep_shards,
    )
    if record is None:
        print(f"{ranks.who}finished its shards; the last process to finish writes {output_dir / 'samples.npz'}")
    elif record is not earlier:
        print(f"{ranks.who}wrote images/, grid.png, samples.npz and generation.json to {output_dir}")
    if scoring is not None:
        scoring.finish(generation)


def _run(
    generation: Generation, sampler: Sampler, decode: Decoder | None, description: str, hooks: list[OnImages]
) -> None:
    """Draw what is to be drawn, with a progress bar, and say how fast it was."""
    ranks, device = generation.ranks, sampler.device
    captured = f", captured in {sampler.capture_seconds:.1f} s" if sampler.capture_seconds else ""
    _say(
        ranks,
        f"{description}, {sampler.engine}{captured}; batches of {sampler.batch_size} keep "
        f"{format_bytes(sampler.buffers.kept_bytes)} between steps",
    )
    made_with = {
        "engine": sampler.engine,
        "model": description,
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "processes": ranks.world_size,
        "batch_size": sampler.batch_size,
        "torch": torch.__version__,
    }
    changed = []
    if found := generation.found_made_with():
        rounding = ("engine", "model", "device", "threads", "batch_size", "torch")
        changed = differences({name: found[name] for name in rounding}, {name: made_with[name] for name in rounding})
    if changed:
        print(f"{ranks.who}found shards were made with {'; '.join(changed)}: images agree but for rounding")

    def on_images(positions: IntArray, images: Images) -> None:
        for hook in hooks:
            hook(positions, images)

    with tqdm(
        total=generation.num_images,
        desc=f"{ranks.who}{sampler.engine}, {description}",
        unit="img",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} img [{elapsed}<{remaining}, {rate_fmt}]",
        smoothing=0,
        disable=ranks.rank > 0,
        dynamic_ncols=True,
    ) as bar:

        def show(done: float) -> None:
            bar.n = done
            bar.update(0)

        generation.run(
            sampler,
            decode,
            decode_batch_size=1 if decode is None else decode.batch_size,
            made_with=made_with,
            on_images=on_images if hooks else None,
            progress=show,
        )
    seconds = generation.timings
    print(f"{ranks.who}{generation.num_images / seconds.sampling:.1f} img/s on {device}, {description}")
    print(
        f"{ranks.who}{seconds.sampling:.1f} s, in the background of which decoding {seconds.decoding:.1f} s, "
        f"writing {seconds.writing:.1f} s" + (f", features {seconds.hook:.1f} s" if hooks else "")
    )


def _say(ranks: Ranks, text: str) -> None:
    """Print what all processes would say alike, once."""
    if ranks.rank == 0:
        print(text)


def _without_engine(sampling: SamplingConfig) -> dict[str, Any]:
    """The sampling settings that the images depend on."""
    return {name: value for name, value in asdict(sampling).items() if name != "cuda_graphs"}


def _num_png(options: Any, count: int) -> int:
    default = count if count <= ALL_PNG else SOME_PNG
    return default if options.num_png is None else min(options.num_png, count)


def _engine_model(reference: DDT, options: Any, ranks: Ranks) -> tuple[DDT | FusedDDT, str]:
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
        _say(ranks, "int8: this CPU has no units for it; expect it to be slower than float32")
    _say(ranks, f"int8: relative error of a velocity {error:.2g} against {dtype}")
    return quantized, f"int8 ({dtype} between), attention {backend}"


def _job(options: Any, experiment: Experiment) -> tuple[Job, dict[str, Any]]:
    """The job that the options name, and the same in words: plain JSON values; ValueError for what is not allowed."""
    num_classes = experiment.model.num_classes
    kinds = ("seeds", "class_seeds", "seeds_per_class", "num_images")
    given = [f"--{kind.replace('_', '-')}" for kind in kinds if getattr(options, kind) is not None]
    if len(given) > 1 and given != ["--seeds", "--num-images"]:
        raise ValueError(f"{given[0]} and {given[1]} are both given; give one")
    if (options.seeds or options.class_seeds) and options.first_seed is not None:
        raise ValueError(f"{given[0]} and --first-seed are both given; give one")
    for name in ("num_images", "seeds_per_class", "batch_size", "shard_size"):
        _require_at_least(options, name, 1)
    _require_at_least(options, "num_png", 0)
    num_chosen = len(options.classes or range(num_classes))
    seeds = options.seeds or [seed for seed in options.class_seeds or () for _ in range(num_chosen)]
    default_count = len(seeds) or (100 if experiment.data.autoencoder is None else 16)
    if options.seeds_per_class is not None:
        default_count = options.seeds_per_class * num_chosen
    count = default_count if options.num_images is None else options.num_images
    if seeds and len(seeds) != count:
        raise ValueError(f"--seeds gives {counted(len(seeds), 'seed')} for {counted(count, 'image')}; wanted one each")
    first_seed = options.first_seed or 0
    for seed in seeds or (first_seed, first_seed + count - 1):
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed} does not exist; allowed: 0 to 2^63 - 1")
    labels = assign_labels(count, num_classes, options.classes)
    # Seeds that are named come in the order they are named in; so do few images, which are for looking at.
    shuffle = options.seeds is None and count > GRID_IMAGES
    words = {
        "num_images": count,
        "classes": options.classes or "all",
        "seeds": options.seeds or f"{first_seed} and up",
        "order": "shuffled" if shuffle else "as drawn",
    }
    if options.class_seeds:
        words["seeds"] = {"of every class": options.class_seeds}
    return Job.of_draws(labels, seeds or range(first_seed, first_seed + count), shuffle=shuffle), words


def _require_at_least(options: Any, name: str, minimum: int) -> None:
    value = getattr(options, name)
    if value is not None and value < minimum:
        raise ValueError(f"--{name.replace('_', '-')} is {value}; allowed: {minimum} or more")


def _sampling(options: Any, experiment: Experiment) -> SamplingConfig:
    """The sampling settings that the options name; ValueError for values that are not allowed."""
    given = given_settings(options)
    if "refresh_steps" in given:
        given = {"refresh_every": 1, "num_refreshes": None, **given, "refresh_steps": _steps(given["refresh_steps"])}
    elif "refresh_every" in given:
        given |= {"refresh_steps": None, "num_refreshes": None}
    sampling = experiment.sampling
    if options.fast:
        sampling = fast_settings(replace(sampling, num_steps=given.get("num_steps", sampling.num_steps)))
    return replace(sampling, **given)


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
