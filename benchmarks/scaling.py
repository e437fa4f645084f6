"""Cost as the work grows: image size, batch, depth, refresh periods, ranks.

    python -m benchmarks.scaling --output-dir benchmarks/results

writes scaling.json and scaling.png and prints tables, in three parts that are never mixed:

- counted: FLOPs, cache bytes, weights and evaluations of XL/2 from the plan; floors are FLOPs at a stated ceiling;
- measured: times on this device as ratios to a base case, beside the ratios of the counted FLOPs. On a CPU a small
  model in fp32, on a GPU XL/2 in bf16 up to 1024 px and batches of 256; what does not fit the memory is skipped and
  listed;
- simulated: 1 to 64 ranks, from the times measured here on one device, and from XL/2's floor, which is the fastest
  that a device can compute, hence the hardest to keep up with for a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.rank_simulation import SamplingJob, TrainingStep
from benchmarks.scaling_counts import (
    LATENT,
    PLANS,
    XL2,
    by_batch,
    by_depth,
    by_image_size,
    by_refresh,
    num_parameters,
)
from benchmarks.scaling_figure import plot
from benchmarks.scaling_measured import CPU_SIZES, GPU_SIZES, Sizes, measure, start_seconds, sweeps
from benchmarks.tables import table, write_record
from ddt_fast.checks import require_int, require_number
from ddt_fast.command import CommandParser, run_command
from ddt_fast.device import choose_device
from ddt_fast.files import output_folder
from ddt_fast.sample import SHARD_IMAGES
from ddt_fast.training.parallel import process_group
from ddt_fast.training.throughput import training_flops

RANKS = (1, 2, 4, 8, 16, 32, 64)
IMAGES = 50_000
BANDWIDTHS = {"450 GB/s (NVLink 4)": 450e9, "50 GB/s (400 Gb/s network)": 50e9, "12.5 GB/s (100 Gb/s network)": 12.5e9}
"""Bytes/s that each rank sends: the slowest link of the ring."""

TOTAL_BATCH = 256
"""Of training, shared by all ranks (strong scaling)."""

GRADIENT_BYTES = 4
"""Per parameter: gradients are averaged in float32."""

FLOOR_START_SECONDS, FLOOR_BATCH, FLOOR_TRAINING_BATCH = 30.0, 64, 32
"""Of XL/2's simulation: seconds, and images a batch of a rank, in sampling and in training of weak scaling."""

ASSUMPTIONS = (
    "every rank is as fast as the one device measured, whatever the others do: no shared power, host or memory limits",
    f"sampling: {IMAGES} images in shards of {SHARD_IMAGES} or whole batches, shard k belongs to rank k % n; ranks "
    "start at the same time, each with the same start-up; decoding and writing hide behind sampling; the final merge "
    "of the shards is left out",
    "training: data parallel; float32 gradients in one ring all-reduce, 2 (n - 1) / n of the bytes at the stated "
    "bandwidth, the same for every n; no latency",
    "overlapped: the all-reduce runs beside the backward pass (two thirds of a step) at no cost to it, at best",
    "step times between measured batches lie on a line; beyond the largest measured batch they grow with the images",
    "XL/2's floor: FLOPs at the stated ceiling; sampling in batches of "
    f"{FLOOR_BATCH} after {FLOOR_START_SECONDS:.0f} s of start-up (assumed)",
)


def count(ceiling: float, bandwidth: float) -> dict[str, Any]:
    """The counted part; `ceiling` in FLOP/s, `bandwidth` in bytes/s."""
    return {
        "model": "XL/2, bf16",
        "plans": {name: f"{len(plan.steps)} steps, NFE {plan.network_evaluations}" for name, plan in PLANS.items()},
        "ceiling_tflops": ceiling / 1e12,
        "copy_terabytes_per_second": bandwidth / 1e12,
        "image_size": by_image_size(ceiling),
        "batch": by_batch(ceiling, bandwidth),
        "depth": by_depth(ceiling),
        "refresh": by_refresh(ceiling),
    }


def measure_all(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """The measured part."""
    rows: dict[str, Any] = {
        "device": str(device),
        "model": vars(sizes.model),
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "pixels": sizes.pixels,
        "image_batch": sizes.image_batch,
        "sampling": {"steps": sizes.sampling_steps, "batch": sizes.sampling_batch},
        "rank_start_seconds": start_seconds(min(3, sizes.calls)),
    }
    with process_group(device):
        for name, points in sweeps(sizes, device):
            rows[name] = measure(points, sizes.calls)
    return rows


def simulate(measured: dict[str, Any], sizes: Sizes, ceiling: float) -> list[dict[str, Any]]:
    """The simulated part: a source of single-device times each."""
    first = measured["refresh"][0]
    training = [row for row in measured["training batch"] if "skipped" not in row]
    training.sort(key=lambda row: row["images"])
    here = (
        SamplingJob(
            IMAGES,
            _shard_size(sizes.sampling_batch),
            sizes.sampling_batch,
            first["seconds"]["median"],
            measured["rank_start_seconds"] + first["capture_seconds"],
        ),
        TrainingStep(
            [row["images"] for row in training],
            [row["seconds"]["median"] for row in training],
            GRADIENT_BYTES * num_parameters(sizes.model),
        ),
        training[-1]["images"],
    )
    side = 256 // LATENT
    floor = (
        SamplingJob(
            IMAGES,
            _shard_size(FLOOR_BATCH),
            FLOOR_BATCH,
            FLOOR_BATCH * PLANS["--fast"].flops(XL2, side, side) / ceiling,
            FLOOR_START_SECONDS,
        ),
        TrainingStep(
            [1],
            [training_flops(XL2, side, side, projector=True) / ceiling],
            GRADIENT_BYTES * num_parameters(XL2),
        ),
        FLOOR_TRAINING_BATCH,
    )
    sources = {
        f"measured here: {measured['device']}, {sizes.pixels} px, {sizes.sampling_steps} steps": here,
        "XL/2, 256 px, --fast, at its floor": floor,
    }
    return [{"label": "simulated", "from": source, **_simulated(*inputs)} for source, inputs in sources.items()]


def _shard_size(batch: int) -> int:
    """As `ddt_fast.sample` chooses it."""
    return batch * max(1, SHARD_IMAGES // batch)


def _simulated(job: SamplingJob, step: TrainingStep, weak_batch: int) -> dict[str, Any]:
    sampling = [
        {"ranks": n, "seconds": job.seconds(n), "efficiency": job.efficiency(n), "most_batches": max(job.batches(n))}
        for n in RANKS
    ]
    training = []
    for link, bandwidth in BANDWIDTHS.items():
        for overlapped in (False, True):
            for n in RANKS:
                row: dict[str, Any] = {"bandwidth": link, "overlapped": overlapped, "ranks": n}
                row["weak_efficiency"] = step.efficiency(n, bandwidth, overlapped, batch=weak_batch)
                row["strong_efficiency"] = step.efficiency(n, bandwidth, overlapped, total=TOTAL_BATCH)
                training.append(row)
    return {
        "sampling_inputs": vars(job),
        "training_inputs": vars(step) | {"weak_batch_per_rank": weak_batch, "strong_total_batch": TOTAL_BATCH},
        "sampling": sampling,
        "training": training,
    }


def report(record: dict[str, Any]) -> str:
    """The tables."""
    counted, measured = record["counted"], record["measured"]
    parts = [
        f"## Counted: {counted['model']}, floors at {counted['ceiling_tflops']:g} TFLOP/s (stated, not measured here)",
        _columns(
            counted["image_size"],
            {
                "image_size": "px",
                "tokens": "tokens",
                "gflop_per_forward": "GFLOP a forward",
                "attention_share": "attention's share",
                "tflop_per_image published": "TFLOP an image, published",
                "tflop_per_image --fast": "--fast",
                "floor_seconds_per_image --fast": "floor, s",
                "cache_megabytes_per_image --fast": "cache, MB",
            },
        ),
        _columns(
            counted["batch"],
            {
                "batch": "batch, 256 px",
                "tflop_per_pair": "TFLOP a guidance pair",
                "compute_floor_seconds": "floor, s",
                "weights_read_share": "reading the weights / floor",
                "cache_gigabytes K 6": "cache K 6, GB",
                "cache_gigabytes --fast": "cache --fast, GB",
            },
        ),
        _columns(
            counted["depth"],
            {
                "model": "model, 256 px",
                "blocks": "blocks",
                "parameters": "parameters",
                "gflop_per_forward": "GFLOP a forward",
                "encoder_share": "encoder's share",
                "tflop_per_image published": "TFLOP an image, published",
                "tflop_per_image --fast": "--fast",
            },
        ),
        _columns(
            counted["refresh"],
            {
                "refresh_every": "K, 256 px",
                "network_evaluations": "NFE",
                "encoder_evaluations": "encoder runs",
                "tflop_per_image": "TFLOP an image",
                "of_every_step": "of K 1",
                "floor_seconds_per_image": "floor, s",
            },
        ),
        f"## Measured here: {measured['device']}, {measured['dtype']}, C {measured['model']['hidden_size']}",
    ]
    for name in ("image size", "batch", "depth", "refresh", "training batch"):
        rows = [
            [row["at"], f"skipped: {row['skipped']}", None, None]
            if "skipped" in row
            else [row["at"], row["measured_ratio"], row["counted_ratio"], row["measured_over_counted"]]
            for row in measured[name]
        ]
        parts.append(table([name, "time, ratio to the first", "FLOPs, ratio", "time / FLOPs"], rows))
    parts.append("## Simulated, not measured\n\nAssumptions:\n- " + "\n- ".join(record["assumptions"]))
    for source in record["simulated"]:
        head = [
            "ranks",
            "hours, sampling",
            "efficiency",
            *(f"training at {link.split(' (')[0]}" for link in BANDWIDTHS),
        ]
        parts.append(f"Simulated from {source['from']}; training: weak scaling, not overlapped / overlapped")
        parts.append(table(head, [_simulated_row(source, n) for n in RANKS]))
    return "\n\n".join(parts)


def _columns(rows: Sequence[dict[str, Any]], names: dict[str, str]) -> str:
    return table(list(names.values()), [[row[name] for name in names] for row in rows])


def _simulated_row(source: dict[str, Any], ranks: int) -> list[object]:
    sampling = next(row for row in source["sampling"] if row["ranks"] == ranks)
    training = [
        " / ".join(
            f"{row['weak_efficiency']:.1%}"
            for row in source["training"]
            if row["ranks"] == ranks and row["bandwidth"] == link
        )
        for link in BANDWIDTHS
    ]
    return [ranks, sampling["seconds"] / 3600, f"{sampling['efficiency']:.1%}", *training]


def main(arguments: list[str] | None = None, sizes: Sizes | None = None) -> None:
    """Count, measure, simulate, write, plot, print; `sizes` None: the device's."""
    parser = CommandParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="benchmarks/results")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's own choice")
    parser.add_argument("--ceiling-tflops", type=float, default=790.0, help="of a large bf16 GEMM; default: one H200's")
    parser.add_argument("--copy-terabytes", type=float, default=4.3, help="per second, of a copy; default: one H200's")
    options = parser.parse_args(arguments)
    require_number("--ceiling-tflops", options.ceiling_tflops, 0, float("inf"), open_low=True)
    require_number("--copy-terabytes", options.copy_terabytes, 0, float("inf"), open_low=True)
    if options.threads is not None:
        require_int("--threads", options.threads, 1)
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    sizes = sizes or (GPU_SIZES if device.type == "cuda" else CPU_SIZES)
    folder = output_folder(options.output_dir)
    ceiling = options.ceiling_tflops * 1e12
    record: dict[str, Any] = {"environment": environment(), "assumptions": list(ASSUMPTIONS)}
    record["counted"] = count(ceiling, options.copy_terabytes * 1e12)
    record["measured"] = measure_all(sizes, device)
    record["simulated"] = simulate(record["measured"], sizes, ceiling)
    write_record(folder / "scaling.json", record)
    plot(record, folder / "scaling.png")
    print(report(record))


if __name__ == "__main__":
    run_command(main)
