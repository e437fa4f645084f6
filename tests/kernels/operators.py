"""The differentiable operators, for the tests of properties they share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import attention_cases
import ddt_kernels
import norm_cases
import qk_norm_rope_cases
import swiglu_cases
from kernel_testing import BF16, FP32, as_list, check_against_reference, with_gradients

Inputs = dict[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operator:
    """One operator; the norms' are one, listed once per public function and granularity, the MLP's without and with
    biases.

    make: inputs by name, in order, from (shape, dtype, layout, device). make_grads: gradients of the outputs.
    saved: what the backward operator takes after those gradients, from the inputs and the operator's outputs.
    constants: what the registered operator takes after the tensors; all its possible values.
    flops: bounds of the cost function, from the shape and whether it is the backward pass.
    fixed: inputs without gradient. outputs: of the public function; the registered operator may have more.
    as_reference: on a CPU its results are the reference's, bit for bit. public_options: keywords for gradcheck.
    """

    name: str
    shape: Shape
    tiny: Shape  # for gradcheck
    gpu_shapes: tuple[Shape, ...]
    graph_shape: Shape
    layouts: tuple[str, ...]
    make: Callable[[Any, torch.dtype, str, str], Inputs]
    make_grads: Callable[[Inputs], list[Tensor]]
    saved: Callable[[Inputs, Sequence[Tensor]], list[object]]
    flops: Callable[[Any, bool], tuple[int, int]]
    constants: tuple[tuple[object, ...], ...] = ((),)
    fixed: tuple[str, ...] = ()
    outputs: int = 1
    granularity: str = ""
    as_reference: bool = True
    public_options: tuple[dict[str, float], ...] = ({},)

    def __str__(self) -> str:
        return f"{self.name}-{self.granularity}" if self.granularity else self.name

    @property
    def is_norm(self) -> bool:
        return self.granularity in ("sample", "token")

    @property
    def function_name(self) -> str:
        return self.name.partition(",")[0]

    @property
    def public(self) -> Callable[..., Any]:
        return norm_cases.function_of(self.name, ddt_kernels)

    @property
    def reference(self) -> Callable[..., Any]:
        return norm_cases.function_of(self.name)

    @property
    def registered(self) -> Callable[..., Any]:
        return getattr(torch.ops.ddt_kernels, "norm_modulate" if self.is_norm else self.name).default

    @property
    def backward(self) -> Callable[..., Any]:
        return getattr(torch.ops.ddt_kernels, f"{'norm_modulate' if self.is_norm else self.name}_backward").default

    def arguments(self, inputs: Inputs, constants: tuple[object, ...] | None = None) -> list[object]:
        """Those of the registered operator."""
        tensors = [inputs.get(name) for name in norm_cases.INPUTS] + [None, None] if self.is_norm else inputs.values()
        return [*tensors, *(self.constants[0] if constants is None else constants)]

    def inputs(
        self, dtype: torch.dtype = FP32, layout: str = "", shape: Shape | None = None, device: str = "cpu"
    ) -> Inputs:
        """Seeded inputs."""
        return self.make(shape or self.shape, dtype, layout or self.layouts[0], device)

    def leaves(self, inputs: Inputs) -> list[Tensor]:
        """Those that have a gradient, as leaves that require it."""
        return [t.detach().requires_grad_() for name, t in inputs.items() if name not in self.fixed]

    def of_leaves(self, function: Callable[..., Any], inputs: Inputs) -> Callable[..., Any]:
        """`function` of the inputs, as a function of `leaves` alone."""
        fixed = [inputs[name] for name in self.fixed]  # which come last
        return lambda *leaves, **options: function(*leaves, *fixed, **options)

    def forward_results(self, inputs: Inputs, constants: tuple[object, ...] | None = None) -> list[Tensor]:
        """All outputs of the registered operator."""
        return as_list(self.registered(*self.arguments(inputs, constants)))

    def backward_arguments(self, inputs: Inputs) -> list[object]:
        """Those of the backward operator."""
        grads: list[Tensor | None] = [*self.make_grads(inputs)]
        if self.is_norm and len(grads) == 1:
            grads.insert(norm_cases.keeps(self.name), None)
        return [*grads, *self.saved(inputs, self.forward_results(inputs))]

    def checked(self, inputs: Inputs) -> list[Tensor]:
        """The public function's outputs, within the tolerance rule, as are the gradients of the leaves."""
        grads = self.make_grads(inputs)
        outputs, gradients = with_gradients(self.of_leaves(self.public, inputs), self.leaves(inputs), grads)
        named = dict(zip((name for name in inputs if name not in self.fixed), gradients, strict=True))
        if self.name == "qk_norm_rope":
            qk_norm_rope_cases.check_qk_norm_rope(inputs, outputs, grads, named)
        elif self.name == "attention":
            attention_cases.check_attention(list(inputs.values()), outputs, grads, named)
        else:
            check_against_reference(self.reference, inputs, outputs, grads, named, self.fixed)
        return outputs


def _norm(name: str, granularity: str) -> Operator:
    def saved(inputs: Inputs, outputs: Sequence[Tensor]) -> list[object]:
        """No shift, and no x where it is not read."""
        unread = ("shift",) if "scale" in inputs else ("shift", "x")
        return [None if key in unread else inputs.get(key) for key in norm_cases.INPUTS if key != "shift"] + [1e-6]

    return Operator(
        name,
        shape=(2, 3, 20),
        tiny=(2, 3, 8),
        gpu_shapes=((3, 24, 72), (2, 40, 341), (8, 256, 1152), (2, 256, 1152), (3, 1, 2047), (1, 3, 6144)),
        graph_shape=(4, 256, 1152),
        layouts=("strided", "contiguous"),
        make=lambda shape, dtype, layout, device: norm_cases.make_inputs(
            name, shape, granularity == "token", dtype, device, layout == "strided"
        ),
        make_grads=lambda inputs: norm_cases.make_grads(name, inputs),
        saved=saved,
        flops=lambda shape, backward: (2 * math.prod(shape), 30 * math.prod(shape)),
        constants=((1e-6, norm_cases.keeps(name)),),
        outputs=norm_cases.keeps(name) + (name != "gated_residual"),
        granularity=granularity,
    )


def _attention_flops(shape: Shape, backward: bool) -> tuple[int, int]:
    products = (5 if backward else 2) * 2 * math.prod(shape) * shape[1]
    return products, products


def _qk_flops(shape: Shape, backward: bool) -> tuple[int, int]:
    elements = 14 * math.prod(shape)
    return (2 * elements, 3 * elements) if backward else (elements, elements)


def _qkv_flops(shape: Shape, backward: bool) -> tuple[int, int]:
    products, elements = _attention_flops(shape, backward)[0], 14 * math.prod(shape)
    return products + (3 if backward else 1) * elements, products + (4 if backward else 1) * elements


def _mlp_flops(gemms: int) -> Callable[[Shape, bool], tuple[int, int]]:
    def flops(shape: Shape, backward: bool) -> tuple[int, int]:
        B, N, C, F = shape
        products = gemms * (2 if backward else 1) * 2 * B * N * C * F
        return products + 1, products + (20 if backward else 10) * B * N * F

    return flops


def _make_qkv(shape: Shape, dtype: torch.dtype, layout: str, device: str) -> Inputs:
    return qk_norm_rope_cases.make_inputs(shape, dtype, device, layout == "strided")


def _make_heads(shape: Shape, dtype: torch.dtype, layout: str, device: str) -> Inputs:
    return dict(zip("qkv", attention_cases.make_heads(shape, dtype, layout, device), strict=True))


def _make_mlp(make: Callable[..., Inputs]) -> Callable[[Any, torch.dtype, str, str], Inputs]:
    return lambda shape, dtype, layout, device: make(shape[:4], dtype, device, layout, *shape[4:])


NORMS = tuple(_norm(name, granularity) for name in norm_cases.OPS for granularity in ("sample", "token"))
QK_NORM_ROPE = Operator(
    "qk_norm_rope",
    shape=(2, 3, 2, 12),
    tiny=(2, 3, 2, 4),
    gpu_shapes=((3, 24, 3, 72), (8, 256, 16, 72), (20, 256, 16, 72), (2, 40, 5, 20), (3, 1, 12, 64), (2, 9, 2, 256)),
    graph_shape=(4, 256, 16, 72),
    layouts=("strided", "contiguous"),
    make=_make_qkv,
    make_grads=lambda inputs: [qk_norm_rope_cases.make_grad(inputs)],
    saved=lambda inputs, outputs: [*inputs.values(), 1e-6],
    flops=_qk_flops,
    constants=((1e-6,),),
    fixed=qk_norm_rope_cases.FIXED,
)
ATTENTION = Operator(
    "attention",
    shape=(2, 5, 3, 12),
    tiny=(2, 3, 2, 4),
    gpu_shapes=(
        *((3, 24, 2, 72), (2, 256, 16, 72), (1, 1, 3, 24), (2, 130, 12, 64), (1, 1000, 2, 128)),
        *((2, 200, 3, head_dim) for head_dim in (16, 20, 80, 96)),
    ),
    graph_shape=(4, 256, 16, 72),
    layouts=attention_cases.LAYOUTS,
    make=_make_heads,
    make_grads=lambda inputs: [attention_cases.make_grad(list(inputs.values()))],
    saved=lambda inputs, outputs: [*outputs, *inputs.values(), 12**-0.5],
    flops=_attention_flops,
    constants=((12**-0.5,),),
    as_reference=False,
    public_options=({}, {"scale": 0.7}),
)
QKV_ATTENTION = Operator(
    "qkv_attention",
    shape=(2, 5, 3, 12),
    tiny=(2, 3, 2, 8),
    gpu_shapes=(
        *((3, 24, 3, 72), (8, 256, 16, 72), (2, 40, 5, 20), (3, 1, 12, 64)),
        *((2, 130, 2, 128), (1, 1000, 2, 80)),
    ),
    graph_shape=(4, 256, 16, 72),
    layouts=("strided", "contiguous"),
    make=_make_qkv,
    make_grads=lambda inputs: [qk_norm_rope_cases.make_grad(inputs)[:, :, 0]],
    saved=lambda inputs, outputs: [*outputs, *inputs.values(), 1e-6, 12**-0.5],
    flops=_qkv_flops,
    constants=((1e-6, 12**-0.5),),
    fixed=qk_norm_rope_cases.FIXED,
    as_reference=False,
    public_options=({}, {"scale": 0.7}),
)
SWIGLU = Operator(
    "swiglu",
    shape=(2, 3, 20, 12),
    tiny=(2, 3, 6, 4),
    gpu_shapes=((3, 24, 72, 170), (2, 40, 341, 909), (1, 40, 64, 170), (8, 256, 1152, 3072), (1, 256, 1152, 3072)),
    graph_shape=(4, 256, 1152, 3072),
    layouts=swiglu_cases.LAYOUTS,
    make=lambda shape, dtype, layout, device: swiglu_cases.make_inputs(shape, dtype, device, layout),
    make_grads=lambda inputs: [swiglu_cases.make_grad(inputs)],
    saved=lambda inputs, outputs: [*inputs.values(), outputs[1], False],
    flops=_mlp_flops(2),
    constants=((None, None, True), (None, None, False)),
)
SWIGLU_MLP = Operator(
    "swiglu_mlp",
    shape=(2, 3, 20, 12),
    tiny=(2, 3, 6, 4, 5),
    gpu_shapes=((3, 24, 72, 170, 40), (2, 40, 341, 909), (8, 256, 1152, 3072)),
    graph_shape=(4, 256, 1152, 3072),
    layouts=swiglu_cases.LAYOUTS,
    make=_make_mlp(swiglu_cases.make_mlp_inputs),
    make_grads=lambda inputs: [swiglu_cases.make_grad(inputs)],
    saved=lambda inputs, outputs: [*inputs.values(), outputs[1], False],
    flops=_mlp_flops(3),
    constants=((None, None, None, True), (None, None, None, False)),
)
BIASED_MLP = replace(
    SWIGLU_MLP,
    granularity="biased",
    layouts=("contiguous",),
    make=_make_mlp(swiglu_cases.make_biased_inputs),
    saved=lambda inputs, outputs: [*list(inputs.values())[:4], outputs[1], True],
    constants=((True,), (False,)),
)
OPERATORS = (*NORMS, QK_NORM_ROPE, ATTENTION, QKV_ATTENTION, SWIGLU, SWIGLU_MLP, BIASED_MLP)
NAMED = (*NORMS[1::2], *(op for op in OPERATORS[len(NORMS) :] if op != SWIGLU_MLP))
"""One of each name: the norms per token, the MLP with biases."""


def cost(op: Operator, constants: tuple[object, ...] = (), backward: bool = False) -> ddt_kernels.Cost:
    """By the operator's cost function, for its shape in bf16."""
    options: dict[str, object] = {"per_token": op.granularity == "token"} if op.is_norm else {}
    if op.name == norm_cases.KEPT:
        options["keep"] = True
    if op.name.startswith("swiglu"):
        options = {"training": not backward and constants[-1], "biased": op.granularity == "biased"}
    function: Callable[..., ddt_kernels.Cost] = getattr(ddt_kernels, f"{op.function_name}_cost")
    return function(*op.shape, BF16, backward=backward, **options)
