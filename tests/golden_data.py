"""The reference numbers in tests/golden (see its README.md): configurations, weights, inputs and outputs."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Module

from ddt_fast.config import DDTConfig, SamplingConfig
from ddt_fast.model.reference import DDT

GOLDEN = Path(__file__).parent / "golden"
MODELS = ("tiny_h48_d24", "tiny_h72_d72_rect", "tiny_sharing_h32")


def description(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def tensors(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.io.safetensors")


def weights(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def model_config(name: str) -> DDTConfig:
    entries = description(name)["model"]
    return DDTConfig(num_heads=entries.pop("num_groups"), **entries)


def model(name: str) -> DDT:
    ddt = DDT(model_config(name))
    ddt.load_state_dict(weights(name))
    return ddt.eval()


def flow_matching_loss(ddt: Module, io: dict[str, Tensor]) -> Tensor:
    """The loss of a model on `tensors`."""
    t = io["t"].view(-1, 1, 1, 1)
    velocity, _ = ddt(t * io["data"] + (1 - t) * io["noise"], io["t"], io["y"])
    return torch.nn.functional.mse_loss(velocity, io["data"] - io["noise"])


def sampling_runs() -> list[tuple[str, str]]:
    """Every (model, run)."""
    return [(name, run) for name in MODELS for run in description(name)["samplers"]]


def sampling_config(name: str, run: str) -> SamplingConfig:
    entries = description(name)
    settings = entries["samplers"][run]
    sharing: dict = {"refresh_every": settings.get("state_refresh_rate", 1)}
    if settings["kind"] == "sharing":
        sharing = {"refresh_steps": tuple(entries["shared_steps"][run])}
    return SamplingConfig(
        num_steps=settings["num_steps"],
        guidance_scale=settings["guidance"],
        guidance_interval=(settings.get("guidance_interval_min", 0.0), settings.get("guidance_interval_max", 1.0)),
        timeshift=settings["timeshift"],
        last_step=settings["last_step"],
        solver="lms" if settings["kind"] == "adam" else "euler",
        order=settings.get("order", 2),
        **sharing,
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; a NaN is an infinite error."""
    difference = torch.linalg.vector_norm((actual - expected).double())
    error = (difference / torch.linalg.vector_norm(expected.double())).item()
    return float("inf") if math.isnan(error) else error
