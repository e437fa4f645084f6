"""Results files made by hand, small and with numbers that cannot be mistaken."""

import copy

from benchmarks.report.files import load
from ddt_fast.files import write_json

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python -m measured",
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
    "cpu": {"model": "Some CPU", "flags": ["avx2"]},
    "gpus": [],
    "threads": 2,
    "load_average": [0.25, 0.5, 0.75],
    "python": "3.11.7",
    "torch": "2.13.0",
    "packages": {"triton": "3.8.0", "ddt-fast": "0.1.0"},
}
ON_GPU = {"gpus": [{"name": "Some GPU"}], "driver": "123.45"}


def variant(name, median, ratio, baseline=False, ours=False, images=None, flops=4_000_000, moved=1000):
    """As the suite writes it: quartiles 10% off, a GEMM ceiling of 1 GFLOP/s."""
    return {
        "name": name,
        "baseline": baseline,
        "ours": ours,
        "seconds": {"median": median, "lower_quartile": 0.9 * median, "upper_quartile": 1.1 * median, "calls": 5},
        "ratio": ratio,
        "error": 1.3e-3,
        "images_per_second": images,
        "flops": flops,
        "bytes": moved,
        "floor_seconds": flops / 1e9,
        "bound_by": "gemm",
        "share_of_ceiling": flops / 1e9 / median,
        "note": "",
    }


def case(group, name, variants, size="B 7", missing=(), wrong=()):
    return {
        "group": group,
        "case": name,
        "size": size,
        "dtype": "float32",
        "session": 0,
        "variants": variants,
        "missing": [{"name": name, "reason": reason} for name, reason in missing],
        "wrong": [{"name": name, "reason": reason} for name, reason in wrong],
    }


def kernel_cases(shape):
    """What a block's stack is made of: plain PyTorch takes 10 ms, ours 5 ms, another 4 ms."""
    names = ["qk_norm_rope forward", "attention forward", "swiglu forward"]
    sizes = [(name, shape) for name in names]
    sizes += [("gated_residual_rms_norm_modulate forward", f"{shape}, modulated per {w}") for w in ("sample", "token")]
    for name, size in sizes:
        variants = [
            variant("plain PyTorch", 0.010, 1.0, baseline=True),
            variant("ddt_kernels", 0.005, 0.5, ours=True),
            variant("torch.compile", 0.004, 0.4),
        ]
        yield case("kernels", name, variants, size)


def suite(gpu=False):
    """Groups kernels, sampling and evaluation; one case not measured."""
    sampling = [
        variant("DDT, both branches always", 0.4321, 1.0, baseline=True, images=16.2),
        variant("DDT, refresh 1, eager", 0.3456, 0.8, images=20.3),
        variant("FusedDDT, refresh 1, eager", 0.1728, 0.4, ours=True, images=40.6),
        variant("FusedDDT, refresh 6, eager", 0.0432, 0.1, ours=True, images=162.0, flops=1_000_000),
    ]
    evaluation = [
        variant("the usual way", 0.0123457, 1.0, baseline=True, images=567.0),
        variant("ddt_fast", 0.0061728, 0.5, ours=True, images=1134.0),
    ]
    session = {
        "command": "python -m pytest benchmarks",
        "ceilings": {"gemm_flops_per_second": {"float32": 1e9}, "copy_bytes_per_second": 1e8},
        "not_measured": [{"case": "evaluation: slow, B 9", "reason": "not started in time"}],
    }
    return {
        "format": 1,
        "environment": copy.deepcopy(ENVIRONMENT) | (ON_GPU if gpu else {}),
        "sessions": [session],
        "cases": [
            *kernel_cases("small N 256"),
            case("sampling", "throughput", sampling),
            case("evaluation", "features", evaluation, missing=[("peer", "no wheel")], wrong=[("other", "off by 2")]),
        ],
    }


def training(gpu=False):
    def row(name, faster, memory):
        return {
            "variant": name,
            "times_faster": faster,
            "kept_of_reference": memory,
            "peak_of_reference": memory,
            "gradient_error": 0.0,
            "images_per_second": 321.0,
            "tflops": 123.0,
            "mfu": 0.456 if gpu else None,
        }

    rows = [row("reference, fp32", 1.0, 1.0), row("reference, bf16", 1.6, 0.7), row("FusedDDT, bf16", 2.5, 0.375)]
    environment = ENVIRONMENT | (ON_GPU if gpu else {})
    return {"environment": environment, "model": "some model", "batch_size": 3, "rows": rows}


def cpu_sampling():
    def setting(engine, name, faster):
        return {
            "engine": engine,
            "setting": name,
            "times_faster_than_published": faster,
            "network_evaluations": 422,
            "seconds_per_image": 98.7,
        }

    names = ("refresh 1", "refresh 6")
    settings = [setting(engine, name, 2.34) for engine in ("int8 compiled", "bf16 compiled") for name in names]
    forward = [
        {"variant": name, "of_reference": share, "relative_error": 0.0123}
        for name, share in (("reference, fp32 eager", 1.0), ("int8 compiled", 0.24))
    ]
    run = {"engine": "int8 compiled", "setting": "refresh 1", "num_steps": 12, "relative_error": 0.5}
    return {
        "environment": ENVIRONMENT,
        "model": "XL/2",
        "batch_size": 1,
        "forward": forward,
        "sampling": {"settings": settings},
        "runs": [run | {"seconds": 11.0, "composed_seconds": 10.0}],
    }


def pareto():
    settings = {
        "num_steps": 25,
        "solver": "lms",
        "order": 3,
        "refresh_every": 2,
        "state_forecast": "linear",
        "guidance_every": 1,
        "guidance_forecast": "hold",
    }
    errors = {"error": 0.0125, "error_median": 0.0025, "error_p90": 0.0075}
    point = errors | {"tflop_xl2": 6.5, "frechet": 0.61, "accuracy": 0.995, "settings": settings}
    return {
        "environment": ENVIRONMENT,
        "samples": 449,
        "truth": {"what": "a fine run", "frechet": 0.6},
        "points": [point | {"error": 0.5}, point | {"name": "mine"}],
        "recommended": [{"by": by, "budget_tflop_xl2": 7.5, "point": 1} for by in ("error", "error_median")],
        "better_than_named": [{"point": 1, "cheapest": 0}],
    }


def candidates():
    errors = {"error": 0.0125, "error_median": 0.0025, "error_p90": 0.0075}
    rows = [
        errors | {"candidate": "Euler 250, --fast", "guidance": g, "tflop_xl2": t}
        for g, t in (("none", 3.5), ("strong", 6.5))
    ]
    first = {"candidate": "all", "tflop_xl2": 24.5, "frechet": 0.5, "frechet_sd": 0.012}
    second = first | {"candidate": "Euler 250, --fast", "tflop_xl2": 6.5, "difference": 0.002, "difference_sd": 0.001}
    frechet = {"frechet_samples": 1300, "frechet_guidance": "strong", "frechet": [first, second]}
    return {"environment": ENVIRONMENT, "samples": 256, "errors": rows, **frechet}


def scaling():
    def row(at, measured, plural):
        ratios = {"measured_ratio": measured, "counted_ratio": plural, "measured_over_counted": measured / plural}
        return {"at": at, **ratios, "seconds": {"median": 0.777}}

    sweeps = ("image size", "batch", "depth", "refresh", "training batch")
    rows = [row("256 px", 1.0, 1.0), row("512 px", 5.0, 4.0), {"at": "1024 px", "skipped": "out of memory"}]
    measured = {"dtype": "float32", "model": {"hidden_size": 256}} | dict.fromkeys(sweeps, rows)
    return {"environment": ENVIRONMENT, "plural": {}, "measured": measured, "simulated": []}


def results(folder, **files):
    """Written to the folder, and read."""
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return load(sorted(folder.glob("*.json")))
