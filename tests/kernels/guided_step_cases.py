"""Inputs for the guided_step tests, and the check against the reference."""

import torch
from torch import Tensor

from ddt_kernels import reference
from ddt_kernels.guided_step import ROW
from kernel_testing import assert_as_accurate, seeded

Inputs = dict[str, Tensor | None]
OUTPUTS = ("x", "velocity_history", "difference_history")


def make_inputs(
    shape: tuple[int, int, int, int],
    patch_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    guided: bool = True,
    velocities: int = 0,
    differences: int = 0,
    noise: bool = False,
    steps: int | None = 3,
    device: str = "cpu",
) -> Inputs:
    """Seeded inputs for x (B, C, H, W), in the op's order. Tokens are chunks of a CFG batch with rows of another width;
    steps: of the table, whose row 1 is taken; None: a single row."""
    B, C, H, W = shape
    randn = seeded(0, torch.float32, device)
    N, features = H * W // patch_size**2, C * patch_size**2
    cond, uncond = randn(2 * B, N, features + 3).to(dtype)[..., :features].chunk(2)
    return {
        "x": randn(*shape),
        "v_cond": cond,
        "v_uncond": uncond if guided else None,
        "coefficients": randn(ROW) if steps is None else randn(steps, ROW),
        "step": None if steps is None else torch.tensor([1], device=device),
        "velocity_history": randn(velocities, *shape) if velocities else None,
        "difference_history": randn(differences, *shape) if differences else None,
        "noise": randn(*shape) if noise else None,
    }


def fresh(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """A copy, histories included; dtype: of everything but the step."""
    copies = {name: None if t is None else t.clone() for name, t in inputs.items()}
    if dtype is None:
        return copies
    return {name: t if t is None or name == "step" else t.to(dtype) for name, t in copies.items()}


def results(inputs: Inputs, after: Tensor) -> dict[str, Tensor]:
    """What a call wrote, by name: x' and the histories given."""
    named = inputs | {"x": after}
    return {name: tensor for name in OUTPUTS if (tensor := named[name]) is not None}


def check_against_reference(inputs: Inputs, patch_size: int, made: dict[str, Tensor]) -> None:
    """The tolerance rule for everything a call on these inputs (as they were before it) wrote."""
    plain, oracle = fresh(inputs), fresh(inputs, torch.float64)
    expected = results(plain, reference.guided_step(*plain.values(), patch_size=patch_size))
    oracles = results(oracle, reference.guided_step(*oracle.values(), patch_size=patch_size))
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        assert_as_accurate(name, tensor, expected[name], oracles[name])
