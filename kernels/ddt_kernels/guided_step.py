# mypy: allow-untyped-defs, allow-untyped-decorators
"""One sampling step after the network: unpatchify, guidance and a linear solver's update, in one pass.

    x' = c_x · x + Σ_k c_v[k] · v_k + Σ_k c_d[k] · d_k + c_n · noise

v_0 = v_cond, unpatchified, and v_k is that of k steps ago; d = v_cond - v_uncond is the guidance difference, and d_k
the k-th newest. Each has its own coefficients, because differences begin where guidance does and may be evaluated more
rarely. A row of ten (c_x, c_n, c_v[0..3], c_d[0..3]) describes any solver and any guidance of a sampling plan. What a
step remembers is two small tensors, newest first; the op shifts them itself, since it reads their elements for
the sum anyway. So nothing on the host depends on the step: with a table of rows and a step counter on the device, one
launch with fixed arguments serves every step of its kind, inside a CUDA graph too.

Why it looks like this. The tensors are small (16 KB of x per sample at 256 px), so what counts is one launch instead of
about ten. Lanes run along the image, so x, noise and histories move in 16-byte accesses; the tokens, which the previous
GEMM has just left in the L2 cache, are gathered. Sizes are constexprs: a sampler has only one, and the index arithmetic
becomes shifts. A step outside the table reads no coefficients and gives NaN: checking it would make the host wait.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddt_kernels import reference
from ddt_kernels.checks import DEVICES, FLOATS, check_tensor, check_unit_stride, fail
from ddt_kernels.compilation import AotCase
from ddt_kernels.cost import Cost
from ddt_kernels.launcher import launcher
from ddt_kernels.runtime import cdiv, launch, tl, triton

TERMS = 4  # velocities, and differences, for which a row has coefficients, including the newest
ROW = 2 + 2 * TERMS
_BLOCK = 512


@triton.jit
def _coefficient(row_ptr, index: tl.constexpr, known):
    return tl.load(row_ptr + index, mask=known, other=float("nan"))


@triton.jit
def _term(coefficient, value):
    return tl.where(coefficient == 0, 0.0, coefficient * value)


@triton.jit
def _remember(history_ptr, newest, row_ptr, FIRST: tl.constexpr, known, entry, offset, mask, DEPTH: tl.constexpr):
    """Σ_k c[FIRST + k] · (k-th entry of the history), which moves down by one, with `newest` in front."""
    total = tl.zeros_like(newest)
    for k in tl.static_range(DEPTH):
        older = tl.load(history_ptr + (k * entry + offset), mask=mask)
        total += _term(_coefficient(row_ptr, FIRST + k, known), older)
        tl.store(history_ptr + (k * entry + offset), newest, mask=mask)
        newest = older
    return total


@triton.jit
def _load_tokens(ptr, b, stride_b, n, stride_n, feature, mask):
    return tl.load(ptr + (b * stride_b + n * stride_n + feature), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def guided_step_kernel(
    x_ptr,  # (B, C, HEIGHT, WIDTH) fp32 contiguous, as are noise, out and every entry of a history
    cond_ptr,  # (B, N, C·P·P), last dimension contiguous
    uncond_ptr,  # the same or None
    coefficients_ptr,  # (steps, 10) fp32 contiguous
    step_ptr,  # one integer, or None: the first row
    velocity_ptr,  # (VELOCITIES, ...), updated
    difference_ptr,  # (DIFFERENCES, ...), updated where uncond is given
    noise_ptr,  # or None
    out_ptr,  # may be x
    steps,
    blocks,  # programs per sample
    entry,  # B · C · HEIGHT · WIDTH: elements of a history's entry
    cond_sb,
    cond_sn,
    uncond_sb,
    uncond_sn,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    VELOCITIES: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    i = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = i < C * HEIGHT * WIDTH
    offset = b * (C * HEIGHT * WIDTH) + i
    w, h, c = i % WIDTH, i // WIDTH % HEIGHT, i // (WIDTH * HEIGHT)
    n = (h // P * (WIDTH // P) + w // P).to(tl.int64)
    feature = (c * P + h % P) * P + w % P

    entry_64 = tl.zeros([], tl.int64) + entry
    step, known = tl.zeros([], tl.int64), True
    if step_ptr is not None:
        step = tl.load(step_ptr).to(tl.int64)
        known = (step >= 0) & (step < steps)
    row_ptr = coefficients_ptr + step * 10

    velocity = _load_tokens(cond_ptr, b, cond_sb, n, cond_sn, feature, mask)
    total = _term(_coefficient(row_ptr, 0, known), tl.load(x_ptr + offset, mask=mask))
    total += _term(_coefficient(row_ptr, 2, known), velocity)
    total += _remember(velocity_ptr, velocity, row_ptr, 3, known, entry_64, offset, mask, VELOCITIES)
    if uncond_ptr is not None:
        difference = velocity - _load_tokens(uncond_ptr, b, uncond_sb, n, uncond_sn, feature, mask)
        total += _term(_coefficient(row_ptr, 6, known), difference)
        total += _remember(difference_ptr, difference, row_ptr, 7, known, entry_64, offset, mask, DIFFERENCES)
    else:
        for k in tl.static_range(DIFFERENCES):
            difference = tl.load(difference_ptr + (k * entry_64 + offset), mask=mask)
            total += _term(_coefficient(row_ptr, 6 + k, known), difference)
    if noise_ptr is not None:
        total += _term(_coefficient(row_ptr, 1, known), tl.load(noise_ptr + offset, mask=mask))
    tl.store(out_ptr + offset, total, mask=mask)


def _plain_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    coefficients: Tensor,
    step: Tensor | None,
    velocity_history: Tensor | None,
    difference_history: Tensor | None,
    noise: Tensor | None,
    out: Tensor,
    patch_size: int,
) -> None:
    state = (velocity_history, difference_history, noise)
    out.copy_(reference.guided_step(x, v_cond, v_uncond, coefficients, step, *state, patch_size=patch_size))


@launcher(
    "guided_step",
    _plain_step,
    samples=dict.fromkeys(("v_cond", "v_uncond", "x", "noise", "out"), 0)
    | dict.fromkeys(("velocity_history", "difference_history"), 1),
    compiled=True,
    writes=("out", "velocity_history", "difference_history"),
)
def launch_guided_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    coefficients: Tensor,
    step: Tensor | None,
    velocity_history: Tensor | None,
    difference_history: Tensor | None,
    noise: Tensor | None,
    out: Tensor,
    patch_size: int,
) -> None:
    """Runs the kernel, writing x' to `out`, which may be x."""
    B, C, height, width = x.shape
    blocks = cdiv(C * height * width, _BLOCK)
    uncond_strides = (0, 0) if v_uncond is None else (v_uncond.stride(0), v_uncond.stride(1))
    launch(
        guided_step_kernel,
        (B * blocks,),
        x.device,
        *(x, v_cond, v_uncond, coefficients, step, velocity_history, difference_history, noise, out),
        *(coefficients.numel() // ROW, blocks, x.numel(), v_cond.stride(0), v_cond.stride(1), *uncond_strides),
        C=C,
        HEIGHT=height,
        WIDTH=width,
        P=patch_size,
        VELOCITIES=0 if velocity_history is None else velocity_history.shape[0],
        DIFFERENCES=0 if difference_history is None else difference_history.shape[0],
        BLOCK=_BLOCK,
        num_warps=4,
    )


def aot_cases() -> list[AotCase]:
    """XL/2 at 256 px: Euler without and with guidance, and all options at once."""
    B, N = 128, 256
    x = torch.empty(B, 4, 32, 32, device="meta")
    tokens = torch.empty(2 * B, N, 16, dtype=torch.bfloat16, device="meta")
    table, step = torch.empty(250, ROW, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    velocities = differences = torch.empty(TERMS - 1, *x.shape, device="meta")
    cond, uncond = tokens.chunk(2)
    return [
        AotCase("bf16", lambda: launch_guided_step(x, cond, None, table, step, None, None, None, x, 2)),
        AotCase("bf16 guided", lambda: launch_guided_step(x, cond, uncond, table, step, None, None, None, x, 2)),
        AotCase(
            "fp32 guided, 4 velocities, 4 differences, noise",
            lambda: launch_guided_step(x, cond.float(), uncond.float(), table, step, velocities, differences, x, x, 2),
        ),
    ]


def guided_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    coefficients: Tensor,
    step: Tensor | None = None,
    velocity_history: Tensor | None = None,
    difference_history: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    patch_size: int,
) -> Tensor:
    """x' = c_x · x + Σ_k c_v[k] · v_k + Σ_k c_d[k] · d_k + c_n · noise, where v_0 = v_cond and d_0 = v_cond - v_uncond.

    A tensor whose coefficient is 0 is ignored, whatever it holds: histories may start uninitialised.

    Args:
        x: (B, C, H, W) fp32, contiguous.
        v_cond: (B, H/p · W/p, C·p·p), the final layer's tokens, features in (channel, row, column) order; bf16, fp16 or
            fp32; any strides except in the last dimension.
        v_uncond: like v_cond, if this step evaluated the unconditional branch; else None.
        coefficients: (10,) fp32 without `step`, (steps, 10) with it, contiguous; rows of guided_step_coefficients.
        step: int32 or int64, shape () or (1,), on x's device: the row to use. The host never reads it; outside the
            table, every result is NaN on a GPU and an IndexError on a CPU.
        patch_size: p, which divides H and W.
        velocity_history: (1 to 3, B, C, H, W) fp32, contiguous: v_1, v_2, ..; earlier conditional velocities, newest
            first. Updated: v_0 is put in front, the oldest dropped. None: only c_v[0] is used.
        difference_history: (1 to 3, B, C, H, W) fp32, contiguous: earlier guidance differences, newest first. With
            v_uncond they are d_1, d_2, .., and are updated: d_0 is put in front, the oldest dropped. Without it they
            are d_0, d_1, .., and stay. None: only c_d[0] is used, and not without v_uncond.
        noise: (B, C, H, W) fp32, contiguous, or None.

    Returns: x', a new tensor. Not differentiable.

    Raises: ValueError on any other shape, dtype, device mix or stride, or if autograd would have to record it.
    Source: classifier-free guidance, arXiv 2207.12598; linear multistep and Euler-Maruyama steps are linear.
    """
    state = (velocity_history, difference_history, noise)
    _check("guided_step", x, v_cond, v_uncond, coefficients, step, *state, patch_size)
    out = x.new_empty(x.shape)
    _operator(x, v_cond, v_uncond, coefficients, step, *state, out, patch_size)
    return out


def guided_step_(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    coefficients: Tensor,
    step: Tensor | None = None,
    velocity_history: Tensor | None = None,
    difference_history: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    patch_size: int,
) -> Tensor:
    """guided_step in place: x becomes x' and is returned. For samplers with static buffers, such as CUDA graphs."""
    state = (velocity_history, difference_history, noise)
    _check("guided_step_", x, v_cond, v_uncond, coefficients, step, *state, patch_size)
    _operator(x, v_cond, v_uncond, coefficients, step, *state, x, patch_size)
    return x


def guided_step_coefficients(
    velocity_coefficients: Sequence[float],
    difference_coefficients: Sequence[float] = (),
    x_coefficient: float = 1.0,
    noise_coefficient: float = 0.0,
) -> tuple[float, ...]:
    """A step's row for guided_step, (c_x, c_n, c_v[0..3], c_d[0..3]).

    Args:
        velocity_coefficients: c_v, 1 to 4, newest first; (dt,) for Euler.
        difference_coefficients: c_d, up to 4, newest first; ((w - 1) dt,) for Euler and guidance of scale w.
        x_coefficient, noise_coefficient: c_x and c_n.

    Raises: ValueError for too many coefficients, or no velocity coefficient.
    """
    row = [x_coefficient, noise_coefficient]
    named = {"velocity_coefficients": velocity_coefficients, "difference_coefficients": difference_coefficients}
    for (name, given), least in zip(named.items(), (1, 0), strict=True):
        if not least <= len(given) <= TERMS:
            fail("guided_step_coefficients", name, f"has length {len(given)}", f"{least} to {TERMS}")
        row += [*given, *[0.0] * (TERMS - len(given))]
    return tuple(row)


def guided_step_cost(
    batch: int,
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    guided: bool = True,
    velocities: int = 0,
    differences: int = 0,
    noise: bool = False,
) -> Cost:
    """Bytes and FLOPs of one call on tokens of `dtype`. guided: with v_uncond; velocities, differences: the depths of
    the histories given."""
    tensors = 2 + 2 * velocities + noise  # x, x', every past velocity read and written
    tensors += differences * (1 + guided)
    terms = 2 + velocities + noise + differences + guided
    elements = batch * channels * height * width
    bytes_moved = (4 * tensors + (1 + guided) * dtype.itemsize) * elements + 4 * ROW
    return Cost(bytes_moved, (2 * terms - 1 + guided) * elements)


def _check(
    op: str,
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    coefficients: Tensor,
    step: Tensor | None,
    velocity_history: Tensor | None,
    difference_history: Tensor | None,
    noise: Tensor | None,
    patch_size: int,
) -> None:
    named = {"x": x, "v_cond": v_cond, "coefficients": coefficients}
    optional = {"v_uncond": v_uncond, "step": step, "noise": noise}
    optional |= {"velocity_history": velocity_history, "difference_history": difference_history}
    for name, tensor in (named | {name: given for name, given in optional.items() if given is not None}).items():
        check_tensor(op, name, tensor)
    if x.ndim != 4 or x.numel() == 0:
        fail(op, "x", f"has shape {tuple(x.shape)}", "shape (B, C, H, W), not empty")
    if x.device.type not in DEVICES:
        fail(op, "x", f"is on {x.device}", "a CPU or CUDA tensor")
    B, C, H, W = x.shape
    p = patch_size
    if not isinstance(p, int) or p < 1 or H % p or W % p:
        fail(op, "patch_size", f"is {p!r}", f"a positive divisor of H {H} and W {W}")
    if v_cond.dtype not in FLOATS:
        fail(op, "v_cond", f"is {v_cond.dtype}", "bfloat16, float16 or float32")
    _check_tensor(op, "x", x, x, x.shape)
    tokens = (B, (H // p) * (W // p), C * p * p)
    for name, velocity in (("v_cond", v_cond), ("v_uncond", v_uncond)):
        if velocity is not None:
            _check_tensor(op, name, velocity, x, tokens, v_cond.dtype, contiguous=False)
            check_unit_stride(op, name, velocity)
    if step is None:
        _check_tensor(op, "coefficients", coefficients, x, (ROW,))
    else:
        if coefficients.ndim != 2 or coefficients.shape[0] < 1 or coefficients.shape[1] != ROW:
            given = f"has shape {tuple(coefficients.shape)}"
            fail(op, "coefficients", given, f"(steps, {ROW}), because step is given")
        _check_tensor(op, "coefficients", coefficients, x, coefficients.shape)
        if step.dtype not in (torch.int32, torch.int64):
            fail(op, "step", f"is {step.dtype}", "torch.int32 or torch.int64")
        _check_tensor(op, "step", step, x, () if step.ndim == 0 else (1,), step.dtype)
    for name, history in (("velocity_history", velocity_history), ("difference_history", difference_history)):
        if history is not None:
            if history.ndim != 5 or not 1 <= history.shape[0] < TERMS:
                shape = f"(1 to {TERMS - 1}, {', '.join(map(str, x.shape))})"
                fail(op, name, f"has shape {tuple(history.shape)}", shape)
            _check_tensor(op, name, history, x, (history.shape[0], *x.shape))
    if noise is not None:
        _check_tensor(op, "noise", noise, x, x.shape)


def _check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    x: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    contiguous: bool = True,
) -> None:
    if tensor.shape != tuple(shape):
        fail(op, name, f"has shape {tuple(tensor.shape)}", f"{tuple(shape)}")
    if tensor.dtype != dtype:
        fail(op, name, f"is {tensor.dtype}", f"{dtype}")
    if tensor.device != x.device:
        fail(op, name, f"is on {tensor.device}", f"{x.device}, like x")
    if contiguous and not tensor.is_contiguous():
        fail(op, name, f"has strides {tensor.stride()}", "a contiguous tensor")
    if tensor.requires_grad and torch.is_grad_enabled():
        fail(op, name, "requires a gradient", "torch.no_grad() around it: this op has no gradient")


@torch.library.custom_op(
    "ddt_kernels::guided_step",
    mutates_args=("velocity_history", "difference_history", "out"),
    device_types="cuda",
)
def _operator(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    coefficients: Tensor,
    step: Tensor | None,
    velocity_history: Tensor | None,
    difference_history: Tensor | None,
    noise: Tensor | None,
    out: Tensor,
    patch_size: int,
) -> None:
    """One operator for both functions: `out` is a new tensor or x itself."""
    state = (velocity_history, difference_history, noise)
    launch_guided_step(x, v_cond, v_uncond, coefficients, step, *state, out, patch_size)


@_operator.register_kernel("cpu")
def _(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    coefficients: Tensor,
    step: Tensor | None,
    velocity_history: Tensor | None,
    difference_history: Tensor | None,
    noise: Tensor | None,
    out: Tensor,
    patch_size: int,
) -> None:
    state = (velocity_history, difference_history, noise)
    _plain_step(x, v_cond, v_uncond, coefficients, step, *state, out, patch_size)


@_operator.register_fake
def _(*arguments: object) -> None:
    return None
