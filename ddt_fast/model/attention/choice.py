"""Which backend "auto" takes on a GPU: the fastest there, of those that are right.

Each is verified and timed once for a shape, by `ddt_kernels`, which keeps what it finds (`ddt_kernels.store`). Forward
alone and forward with backward are two choices.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ddt_fast.model.attention.backends import BACKENDS, unavailable
from ddt_fast.provenance import package_version
from ddt_kernels import tuning, verification
from ddt_kernels.runtime import next_power_of_2

Shape = tuple[int, int, int, int]
PACKAGES = ("flash-attn", "flash-attn-4", "xformers")

_settled: dict[tuple[Any, ...], str] = {}


def fastest(names: Sequence[str], shape: Shape, dtype: torch.dtype, device: torch.device, gradient: bool) -> str:
    """Of these backends, in the order that decides ties, the one for q, k and v (B, N, H, D) from one packed tensor;
    sdpa_math if all are wrong. gradient: the backward pass counts too."""
    case = (*names, shape, dtype, device, gradient)
    if case in _settled:
        return _settled[case]
    right = [name for name in names if _is_right(name, shape, dtype, device, gradient)] or ["sdpa_math"]
    op, (batch, *sizes) = "attention with gradients" if gradient else "attention", shape
    key = (next_power_of_2(batch), *sizes, dtype, *_versions())
    run = partial(_run, cache(partial(_inputs, shape, dtype, device, gradient)))
    chosen = tuning.implementation(op, key, right, run, device)
    if len(right) == 1 or tuning.can_time(device):
        _settled[case] = chosen
    return chosen


def latest(names: Sequence[str], dtype: torch.dtype, device: torch.device, head_dim: int, gradient: bool) -> str:
    """What `fastest` took last for such heads, whatever the other sizes; else the first of `names`. For compiled
    functions, in which nothing is timed."""
    for (*_, shape, known_dtype, known_device, known_gradient), chosen in reversed(_settled.items()):
        if (shape[-1], known_dtype, known_device, known_gradient) == (head_dim, dtype, device, gradient):
            return chosen
    return names[0]


@cache
def _versions() -> tuple[str, ...]:
    return tuple(f"{name} {version}" for name in PACKAGES if (version := package_version(name)))


def _is_right(name: str, shape: Shape, dtype: torch.dtype, device: torch.device, gradient: bool) -> bool:
    if name == "triton":
        return True  # ddt_kernels verifies its kernels itself
    batch, tokens, heads, head_dim = shape
    q, k, v = torch.empty(batch, tokens, 3, heads, head_dim, dtype=dtype, device="meta").unbind(2)
    args = (name, q, k, v, q.new_empty(shape)) if gradient else (name, q, k, v)
    verdict = verification.verdict(attend_with_gradients if gradient else attend, args, {}, device)
    if verdict.reason:
        verification.warn_once(f"attention backend {name!r} is left out", verdict.reason)
    return not verdict.reason


def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A backend as `ddt_kernels.verification` calls it, in a process that has imported none yet."""
    if (why := unavailable(name, q.device, q.dtype, q.shape[-1])) is not None:
        raise RuntimeError(why)
    return BACKENDS[name].call(q, k, v)


def attend_with_gradients(name: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k and v."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        out = attend(name, *inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def _plainly(function: Any, name: str, *tensors: Tensor) -> Any:
    """With every score kept, sample by sample."""
    made = [function("sdpa_math", *(tensor[None] for tensor in sample)) for sample in zip(*tensors, strict=True)]
    return torch.cat(made) if isinstance(made[0], Tensor) else tuple(map(torch.cat, zip(*made, strict=True)))


for _function in (attend, attend_with_gradients):
    vars(_function).update(
        op=_function.__name__,
        plain=partial(_plainly, _function),
        samples=dict.fromkeys(("q", "k", "v", "grad"), 0),
        compiled=False,
    )


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device, gradient: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, head_dim = shape
    with torch.inference_mode(False):
        qkv = torch.randn(batch, tokens, 3, heads, head_dim, dtype=dtype, device=device, requires_grad=gradient)
        return qkv, torch.randn(shape, dtype=dtype, device=device)


def _run(inputs: Any, name: str) -> None:
    qkv, grad = inputs()
    with torch.inference_mode(False), torch.set_grad_enabled(qkv.requires_grad):
        out = BACKENDS[name].call(*qkv.unbind(2))
        if qkv.requires_grad:
            torch.autograd.grad(out, qkv, grad)
