"""Launchers run once per signature; what a later call hands to the driver is what Triton itself would hand to it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from benchmarks.host_time import calls
from ddt_kernels import norm_launch, runtime
from ddt_kernels.compilation import launching_into
from ddt_kernels.launcher import launcher
from ddt_kernels.runtime import empty, launch, tl, triton
from kernel_testing import BF16, COMPILES, seeded

pytestmark = COMPILES


@dataclass
class Driver:
    """Stands in for a GPU: keeps (binary, grid, arguments) of every launch, tensors as their addresses."""

    launched: list[tuple[str, tuple[int, ...], list[Any]]] = field(default_factory=list)

    def take(self) -> list[tuple[str, tuple[int, ...], list[Any]]]:
        taken, self.launched = self.launched, []
        return taken

    def receive(self, binary: Any) -> Callable[..., None]:
        def run(x: int, y: int, z: int, *rest: Any) -> None:
            self.launched.append((binary.hash, (x, y, z), [seen(arg) for arg in rest[6:]]))

        return run


def seen(arg: Any) -> Any:
    """What the driver reads of an argument."""
    if hasattr(arg, "block_shape"):
        return arg.base.data_ptr(), tuple(arg.shape), tuple(arg.strides), tuple(arg.block_shape)
    return arg.data_ptr() if isinstance(arg, torch.Tensor) else arg


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setenv("DDT_KERNELS_AUTOTUNE", "0")
    with launching_into(driver.receive):
        yield driver


def outputs(made: Any) -> list[torch.Tensor]:
    if isinstance(made, norm_launch.Gradients):
        made = tuple(vars(made).values())
    return [made] if isinstance(made, torch.Tensor) else [t for t in made or () if isinstance(t, torch.Tensor)]


CALLS = calls(tokens=16, heads=2, width=48)


def placeless(launched: Any, tensors: list[torch.Tensor]) -> Any:
    """The launches with every address as (which tensor, bytes from its start), or "scratch" outside of all."""

    def place(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(place, value))
        if not isinstance(value, int) or value < 2**22:  # no size or stride here is that large, and every address is
            return value
        for index, tensor in enumerate(tensors):
            if (
                tensor.untyped_storage().data_ptr()
                <= value
                < tensor.untyped_storage().data_ptr() + tensor.untyped_storage().nbytes()
            ):
                return index, value - tensor.untyped_storage().data_ptr()
        return "scratch"

    return [(binary, grid, [place(arg) for arg in args]) for binary, grid, args in launched]


@pytest.mark.parametrize("name", CALLS)
def test_a_known_signature_launches_what_triton_would(driver, name, monkeypatch):
    make, call = CALLS[name]
    results = []
    for seed, known in ((0, False), (1, True), (2, None)):
        inputs = make(seeded(seed, BF16))
        tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
        if known is None:  # through Triton's own launch
            monkeypatch.setattr(runtime, "_compiling", False)
        made = outputs(call(*inputs))
        results.append((placeless(driver.take(), tensors + made), [(t.shape, t.dtype, t.stride()) for t in made]))
    assert results[0][0]
    assert results[0] == results[1] == results[2]


def test_other_signatures_are_other_launches(driver):
    x, shift, scale = torch.zeros(2, 5, 73), *torch.zeros(2, 1, 2 * 73).chunk(2, -1)
    storage = torch.zeros(2 * 5 * 72 + 1, dtype=BF16)
    aligned, shifted = (storage[start : start + 720].view(2, 5, 72) for start in (0, 1))
    modulations = torch.zeros(2, 1, 144, dtype=BF16).chunk(2, -1)
    for tensor, others, eps in (
        *((x, (shift, scale), 1e-6), (x, (shift, scale), 1e-5), (x[:1], (shift[:1], scale[:1]), 1e-6)),
        *((aligned, modulations, 1e-6), (shifted, modulations, 1e-6)),
    ):
        norm_launch.launch_forward(tensor, None, None, None, *others, eps, "layer", False)
    launched = driver.take()
    assert [args[0] for _, _, args in launched[3:]] == [aligned.data_ptr(), shifted.data_ptr()]
    assert launched[3][0] != launched[4][0]  # compiled without the alignment
    assert len({(binary, grid, args[23]) for binary, grid, args in launched}) == 5


def test_a_tensor_given_twice_and_two_given_later_are_told_apart(driver):
    a, b = torch.zeros(2, 5, 72), torch.zeros(2, 5, 72)
    gate = torch.zeros(2, 1, 72)
    for x, branch in ((a, a), (a, b)):
        norm_launch.launch_forward(x, branch, gate, None, None, None, 0.0, "none", True)
    assert [args[:2] for _, _, args in driver.take()] == [[a.data_ptr(), a.data_ptr()], [a.data_ptr(), b.data_ptr()]]


@triton.jit
def copy_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr))


def test_a_launch_with_a_tensor_from_elsewhere_is_a_bug(driver):
    @launcher("copy", torch.clone, {"x": 0})
    def wrong(x: torch.Tensor) -> torch.Tensor:
        made = empty(x, x.shape)
        other = torch.empty(x.shape)
        launch(copy_kernel, (1,), x.device, x, other)
        return made

    with pytest.raises(AssertionError, match="what it allocated by `empty`"):
        wrong(torch.zeros(1, 2, 72))


def test_a_launcher_that_calls_another_is_a_bug(driver):
    @launcher("copy", torch.clone, {"x": 0})
    def inner(x: torch.Tensor) -> torch.Tensor:
        return empty(x, x.shape)

    @launcher("copy", torch.clone, {"x": 0})
    def outer(x: torch.Tensor) -> torch.Tensor:
        return inner(x)

    x = torch.zeros(1, 2, 72)
    with pytest.raises(AssertionError, match="calls no other launcher"):
        outer(x)
    assert inner(x).shape == x.shape  # and nothing is left locked
