"""What is measured: cases, each a piece of work and the ways to do it, of which the first is the baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddt_kernels import Cost

Run = Callable[["Inputs"], Sequence[Tensor]]
"""Does the work once and returns what is to be verified."""


@dataclass(frozen=True)
class Inputs:
    """What one call reads.

    Attributes:
        tensors: the arguments; where gradients are timed, those that require one.
        gradients: of the outputs; empty where no gradient is timed.
    """

    tensors: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] = ()

    def to(self, dtype: torch.dtype) -> Inputs:
        """A copy with floating-point tensors in `dtype`."""

        def copy(tensor: Tensor) -> Tensor:
            made = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
            return made.clone().requires_grad_(tensor.requires_grad)

        return Inputs(tuple(map(copy, self.tensors)), tuple(map(copy, self.gradients)))

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors if tensor.requires_grad]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.tensors, *self.gradients))


@dataclass(frozen=True)
class Variant:
    """One way to do a case's work.

    Attributes:
        make: prepares it, imports and compilation included, outside of what is timed.
        ours: it is this repository's; a peer otherwise, which may turn out not to work on this machine.
        check: what to compare, from what was made and inputs; None compares what the timed run returns.
        expected: the right result, where it is another one than the case's.
        cost: where it is another one than the case's.
        note: for the results.
    """

    make: Callable[[], Any]
    ours: bool = False
    check: Callable[[Any, Inputs], Sequence[Tensor]] | None = None
    expected: Run | None = None
    cost: Cost | None = None
    note: str = ""


@dataclass(frozen=True)
class Workload:
    """A case with its tensors.

    Attributes:
        inputs: of a call, by the number of the set, the same for the same number; calls rotate over several sets.
        variants: by name; a string is the reason why that one is missing here.
        expected: the right result, in higher precision; None where every variant has its own.
        dtype: what the work is done in.
        cost: of one call, as a roofline counts it.
        images: that one call makes or reads.
        tolerance: largest relative error allowed; None: `measure.limits`.
        clean_up: called when the case is over.
    """

    inputs: Callable[[int], Inputs]
    variants: Mapping[str, Variant | str]
    expected: Run | None
    dtype: torch.dtype
    cost: Cost | None = None
    images: int | None = None
    tolerance: float | None = None
    clean_up: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Case:
    """What stands in one table.

    Attributes:
        group: "kernels", "model", ...
        name: what is done.
        size: on what.
        variants: their names, the baseline's first; those of `build`.
        build: makes the tensors.
        hide_launches: see `timing.EventClock`.
        seconds: that timing should take in all.
        rounds: None: as many as the time allows, 5 to 50.
    """

    group: str
    name: str
    size: str
    variants: tuple[str, ...]
    build: Callable[[], Workload]
    hide_launches: bool = False
    seconds: float = 1.0
    rounds: int | None = None

    @property
    def title(self) -> str:
        return f"{self.group}: {self.name}, {self.size}"


def forward(function: Callable[..., Any]) -> Run:
    """Calls `function` on the tensors, for inference."""

    def run(inputs: Inputs) -> Sequence[Tensor]:
        with torch.no_grad():
            return _outputs(function(*inputs.tensors))

    return run


def forward_backward(function: Callable[..., Any]) -> Run:
    """Calls `function` on the tensors, then computes the gradients in all that require one."""

    def run(inputs: Inputs) -> Sequence[Tensor]:
        outputs = _outputs(function(*inputs.tensors))
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, inputs.leaves, inputs.gradients)]

    return run


def in_precision(run: Run, dtype: torch.dtype) -> Run:
    """`run` on the same inputs in a wider dtype."""
    return lambda inputs: run(inputs.to(dtype))


def wider(dtype: torch.dtype) -> torch.dtype:
    """What the right result is computed in."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def with_gradients(inputs: Inputs, gradients: tuple[Tensor, ...], fixed: int = 0) -> Inputs:
    """The same, to be differentiated in all tensors but the last `fixed`."""
    count = len(inputs.tensors) - fixed
    leaves = (tensor.detach().requires_grad_() for tensor in inputs.tensors[:count])
    return Inputs((*leaves, *inputs.tensors[count:]), gradients)


def _outputs(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)
