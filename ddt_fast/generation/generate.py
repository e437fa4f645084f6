"""The job of `python -m ddt_fast.sample` as one function: any number of samples, in as many processes as there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from ddt_fast.autoencoder import Decoder, deterministic_convolutions
from ddt_fast.checks import require, require_int, require_kind, whole_numbers
from ddt_fast.command import parse_bytes
from ddt_fast.config import Experiment, SamplingConfig
from ddt_fast.device import choose_device, choose_dtype, cpu_has_int8
from ddt_fast.evaluation.report import Features
from ddt_fast.files import output_folder
from ddt_fast.generation.background import OnImages
from ddt_fast.generation.finish import GRID_IMAGES
from ddt_fast.generation.images import grid_columns
from ddt_fast.generation.job import Generation, check_output
from ddt_fast.generation.scored import chosen_scoring
from ddt_fast.generation.seeds import IntArray, Job, assign_labels
from ddt_fast.generation.shards import Images, differences
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.model.attention import AttentionBackend, resolve_backend
from ddt_fast.model.quantization import quantization_error, quantize_int8
from ddt_fast.model.weights import EMBEDDED_CHECKPOINT, experiment_of, has_config, load_model, resolve_checkpoint
from ddt_fast.provenance import device_name, environment, weights_sha256
from ddt_fast.ranks import Ranks, process_ranks
from ddt_fast.sampling import Sampler, SamplingPlan
from ddt_fast.sampling.buffers import fitting_batch_size, format_bytes
from ddt_fast.sampling.refresh import resolve_refresh_steps, schedule_cache_path
from ddt_fast.wording import plural

ALL_PNG, SOME_PNG = 1000, 100
"""Jobs of up to ALL_PNG images write all as PNGs too, larger ones SOME_PNG, unless told."""

SHARD_IMAGES = 256
"""Images of a shard, in whole batches: a minute or less of work, and even shares for eight processes."""


@deterministic_convolutions()
def generate(
    checkpoint: str | Path = EMBEDDED_CHECKPOINT,
    output_dir: str | Path = "samples",
    *,
    preset: str | None = None,
    sampling: SamplingConfig | None = None,
    num_images: int | None = None,
    classes: Sequence[int] | None = None,
    seeds_per_class: int | None = None,
    class_seeds: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    first_seed: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 100,
    memory_budget: str | None = None,
    attention: AttentionBackend = "auto",
    compile: bool = False,
    quantize: Literal["int8"] | None = None,
    reference: bool = False,
    num_png: int | None = None,
    shard_size: int | None = None,
    keep_shards: bool = False,
    overwrite: bool = False,
    evaluate: str | None = None,
    metrics: Sequence[str] | None = None,
    evaluate_features: Features | None = None,
    inception_weights: str | None = None,
    center_crop: int | None = None,
    on_images: OnImages | None = None,
) -> Path:
    """Draw a job of samples and write it, as `python -m ddt_fast.sample`; one that was stopped goes on where it was.

    Under torchrun the processes share the work. Written to output_dir: samples.npz (`arr_0` (N, H, W, 3) uint8,
    `labels`, `seeds`), images/ (PNGs), grid.png, generation.json (settings, counts, hardware, commit), and with
    `evaluate` metrics.json. What is done is printed.

    Args:
        checkpoint: model or pipeline folder, .safetensors, released .ckpt or hub id; default: the package's digits.
        output_dir: the job's folder.
        preset: settings for a checkpoint without config.json, one of `ddt_fast.presets.PRESETS`.
        sampling: how samples are drawn; None as the checkpoint says.
        num_images: default: one a seed, else 100 digits, 16 of others.
        classes: to go round; default: all.
        seeds_per_class: so many images of every class, in place of num_images.
        class_seeds: draw every class with each of these seeds.
        seeds: one an image, in their order; default: first_seed and up.
        first_seed: of the first image, the next image has the next one; default: 0.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16", "float16"; "auto" is bfloat16 for latents where the device has units for it.
        batch_size: images drawn at a time.
        memory_budget: for what is kept between steps, such as "8GiB"; batches are made to fit.
        attention: implementation, one of `ddt_fast.model.attention.ATTENTION_BACKENDS`.
        compile: run the model through torch.compile.
        quantize: "int8", on a CPU: 8-bit weights and activations.
        reference: run the plain PyTorch model instead of the fused one.
        num_png: images kept as PNGs too; default: all of up to 1000, of more 100.
        shard_size: images a shard; default: about 256, whole batches.
        keep_shards: do not remove the shards when samples.npz is written.
        overwrite: drop what an earlier job left in the folder.
        evaluate: npz or folder of images to score the samples against.
        metrics: of `ddt_fast.evaluation.scoring.METRICS`; default: all that can be computed.
        evaluate_features: "inception", or "pixels" for images of up to 64x64.
        inception_weights: file; default: from torch's cache, else downloaded.
        center_crop: side in pixels of the centre crop to take of the images of a folder that `evaluate` names.
        on_images: called with positions in samples.npz (n,) and images (n, H, W, 3) uint8, each of this process's
            images once: those of earlier calls first, then, from a background thread, batch by batch as they are drawn.

    Returns:
        The folder.

    Raises:
        ValueError: settings that are not allowed or contradict each other, or a folder with another job in it.
        OSError: files that cannot be read or written.
    """
    ranks = process_ranks()
    place = choose_device(device)
    if place.type == "cuda":
        place = torch.device("cuda", place.index or 0)
        torch.cuda.set_device(place)
    source = resolve_checkpoint(checkpoint)
    experiment = experiment_of(source, preset)
    sampling = experiment.sampling if sampling is None else sampling
    require_kind("sampling", sampling, SamplingConfig)
    for name, value, minimum in (("batch-size", batch_size, 1), ("shard-size", shard_size, 1), ("num-png", num_png, 0)):
        _require_at_least(name, value, minimum)
    require(quantize in (None, "int8"), "--quantize", quantize, "int8")
    lists = {"--classes": classes, "--class-seeds": class_seeds, "--seeds": seeds}
    classes, class_seeds, seeds = (whole_numbers(name, values) for name, values in lists.items())
    draws = _Draws(num_images, classes, seeds_per_class, class_seeds, seeds, first_seed)
    job, order = _job(draws, experiment)
    # float32 is the faster choice between int8 GEMMs.
    latents = experiment.data.autoencoder is not None and quantize is None
    weight_dtype = choose_dtype(dtype, place, latents)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    folder = output_folder(output_dir)
    check_output(folder)
    scoring = chosen_scoring(
        evaluate,
        metrics,
        evaluate_features,
        inception_weights,
        center_crop,
        output_dir=folder,
        count=len(job),
        size=experiment.data.image_size,
        device=place,
        ranks=ranks,
    )
    loaded = load_model(source, place, weight_dtype, None if has_config(source) else experiment.model)
    model, description = _engine_model(loaded, ranks, attention, compile, quantize, reference)
    size = experiment.data.sample_size
    if sampling.refresh_steps == "dp":
        sampling = resolve_refresh_steps(loaded, sampling, size, size, schedule_cache_path(source))
    plan = SamplingPlan.from_config(sampling)
    batch_size = min(batch_size, len(job))
    if budget is not None:
        fitting = fitting_batch_size(plan, model, batch_size, size, size, budget)
        if fitting < batch_size:
            _say(ranks, f"memory budget {memory_budget}: batches of {fitting} instead of {batch_size}")
        batch_size = fitting
    autoencoder = experiment.data.autoencoder
    decode = None
    if autoencoder is not None:
        decode = Decoder(autoencoder, place)
    generation = Generation(
        folder,
        job,
        {
            **order,
            "image_size": experiment.data.image_size,
            "model": asdict(experiment.model),
            "weights_sha256": weights_sha256(loaded),
            "dtype": str(weight_dtype).removeprefix("torch."),
            "quantize": quantize,
            "sampling": _without_engine(sampling),
            "autoencoder_sha256": None if decode is None else decode.sha256(),
        },
        ranks=ranks,
        shard_size=shard_size,
        default_shard_size=batch_size * max(1, SHARD_IMAGES // batch_size),
        overwrite=overwrite,
    )

    tera = plan.flops(experiment.model, size, size) / 1e12
    interval = "{:g}, {:g}".format(*sampling.guidance_interval)
    _say(ranks, f"{source}: {sampling.solver}, guidance {sampling.guidance_scale:g} in ({interval})")
    _say(
        ranks,
        f"{plural(len(job), 'image')}, {plural(len(plan.steps), 'step')}, per image: "
        f"{plural(plan.network_evaluations, 'network evaluation')}, "
        f"{plural(plan.encoder_evaluations, 'encoder run')}, {tera * 1e3:.3g} GFLOP",
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
        sampler = Sampler(model, sampling, batch_size, size, size, memory_budget=budget, compile_model=compile)
        _run(generation, sampler, decode, description, hooks)
    if scoring is not None:
        scoring.save()
    earlier = generation.record
    record = generation.finish(
        {
            "checkpoint": str(source),
            "autoencoder": autoencoder,
            "network_evaluations": plan.network_evaluations,
            "encoder_evaluations": plan.encoder_evaluations,
            "tflop_per_image": tera,
            **environment(place),
        },
        num_png=min(num_png, len(job)) if num_png is not None else _default_num_png(len(job)),
        columns=grid_columns(len(set(job.labels.tolist()))),
        keep_shards=keep_shards,
    )
    if record is None:
        print(f"{ranks.who}finished its shards; the last process to finish writes {folder / 'samples.npz'}")
    elif record is not earlier:
        print(f"{ranks.who}wrote images/, grid.png, samples.npz and generation.json to {folder}")
    if scoring is not None:
        scoring.finish(generation)
    return folder


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


def _default_num_png(count: int) -> int:
    return count if count <= ALL_PNG else SOME_PNG


def _engine_model(
    reference: DDT, ranks: Ranks, attention: AttentionBackend, compile: bool, quantize: str | None, plain: bool
) -> tuple[DDT | FusedDDT, str]:
    """The model as it is to be run, and that in words."""
    parameter = next(reference.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    if plain:
        if quantize or compile or attention != "auto":
            raise ValueError("--reference is plain PyTorch; it goes without --quantize, --compile and --attention")
        return reference, f"{dtype}, reference model"
    config = reference.config
    backend = resolve_backend(attention, parameter.device, parameter.dtype, config.head_dim)
    model = FusedDDT.from_reference(reference, attention)
    if quantize is None:
        return model, f"{dtype}, attention {backend}"
    quantized = quantize_int8(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, config.in_channels, 4 * config.patch_size, 4 * config.patch_size, generator=generator)
    t, y = torch.tensor([0.3, 0.7]), torch.tensor([0, config.num_classes])
    error = quantization_error(model, quantized, x.to(parameter.dtype), t, y)
    if not cpu_has_int8():
        _say(ranks, "int8: this CPU has no units for it; expect it to be slower than float32")
    _say(ranks, f"int8: relative error of a velocity {error:.2g} against {dtype}")
    return quantized, f"int8 ({dtype} between), attention {backend}"


@dataclass(frozen=True)
class _Draws:
    """Which samples are asked for; see `generate`."""

    num_images: int | None
    classes: Sequence[int] | None
    seeds_per_class: int | None
    class_seeds: Sequence[int] | None
    seeds: Sequence[int] | None
    first_seed: int | None


def _job(draws: _Draws, experiment: Experiment) -> tuple[Job, dict[str, Any]]:
    """The job that was asked for, and the same in words: plain JSON values; ValueError for what is not allowed."""
    num_classes = experiment.model.num_classes
    kinds = ("seeds", "class_seeds", "seeds_per_class", "num_images")
    given = [f"--{kind.replace('_', '-')}" for kind in kinds if getattr(draws, kind) is not None]
    if len(given) > 1 and given != ["--seeds", "--num-images"]:
        raise ValueError(f"{given[0]} and {given[1]} are both given; give one")
    if (draws.seeds or draws.class_seeds) and draws.first_seed is not None:
        raise ValueError(f"{given[0]} and --first-seed are both given; give one")
    _require_at_least("num-images", draws.num_images, 1)
    _require_at_least("seeds-per-class", draws.seeds_per_class, 1)
    num_chosen = len(draws.classes or range(num_classes))
    seeds = draws.seeds or [seed for seed in draws.class_seeds or () for _ in range(num_chosen)]
    default_count = len(seeds) or (100 if experiment.data.autoencoder is None else 16)
    if draws.seeds_per_class is not None:
        default_count = draws.seeds_per_class * num_chosen
    count = default_count if draws.num_images is None else draws.num_images
    if seeds and len(seeds) != count:
        raise ValueError(f"--seeds gives {plural(len(seeds), 'seed')} for {plural(count, 'image')}; wanted one each")
    require(
        draws.first_seed is None or type(draws.first_seed) is int, "--first-seed", draws.first_seed, "a whole number"
    )
    first_seed = draws.first_seed or 0
    for seed in seeds or (first_seed, first_seed + count - 1):
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed} does not exist; allowed: 0 to 2^63 - 1")
    labels = assign_labels(count, num_classes, draws.classes)
    # Seeds that are named come in the order they are named in; so do few images, which are for looking at.
    shuffle = draws.seeds is None and count > GRID_IMAGES
    words: dict[str, Any] = {
        "num_images": count,
        "classes": list(draws.classes) if draws.classes else "all",
        "seeds": list(draws.seeds) if draws.seeds else f"{first_seed} and up",
        "order": "shuffled" if shuffle else "as drawn",
    }
    if draws.class_seeds:
        words["seeds"] = {"of every class": list(draws.class_seeds)}
    return Job.of_draws(labels, seeds or range(first_seed, first_seed + count), shuffle=shuffle), words


def _require_at_least(name: str, value: int | None, minimum: int) -> None:
    if value is not None:
        require_int(f"--{name}", value, minimum)
