"""Fused Triton kernels for adaLN transformers (DDT, DiT, SiT, LightningDiT), forward and backward.

Public functions take and return tensors; on CUDA they launch Triton kernels, on a CPU they run `ddt_kernels.reference`,
the same functions in plain PyTorch, without triton. On a GPU, kernels are verified before their first launch, and the
fastest of several implementations runs (`verification`, `tuning`; `python -m ddt_kernels.check`). Each is a registered
operator: autograd, torch.compile(fullgraph=True) and CUDA graphs work. Compiled for a CPU, all but guided_step become
plain PyTorch in the graph, for Inductor to fuse. A user's mistake is a ValueError before any launch. `FUNCTION_cost`
gives the bytes and FLOPs of a call; `python -m ddt_kernels.aot` compiles every kernel without a GPU.

The Triton dialect of this package
----------------------------------
Sizes: B batch, N tokens, C channels, H heads, D head dim, F SwiGLU width, M = B·N rows, K a forecast's
cached entries. Constexprs are UPPER CASE.
A tile's name ends in its shape: x_KRW is [K, R, W]; each op lists its letters at the top of its file. `x_ptr` is a
pointer, `x_sk, x_sb, x_sn` its strides in elements (entry, batch, token; the last stride is 1), `mask_…` says which
elements may be accessed. Row offsets are int64 (B·N·6C overflows int32); arithmetic, reductions and eps are fp32; every
load and store that could leave its tensor is masked; unused pointers are None; each result is rounded once, at the
store. No atomics: sums over programs are fp32 partial sums added in a fixed order. The configuration is a pure function
of shape, dtype and chip, or the fastest of a few candidates (`tuning`; DDT_KERNELS_AUTOTUNE=0 never times).

How an op is built
------------------
1. `reference.py`: the function and, if it is differentiable, FUNCTION_backward in closed form.
2. Kernels (`from ddt_kernels.runtime import tl, triton`, never `import triton`), with the formulas and the reason for
   the layout at the top of the file; a `launcher.launcher` with its plain version, which picks a configuration once per
   signature, through `tuning.choose` if there are several to time.
3. Operators: torch.library.custom_op("ddt_kernels::FUNCTION", mutates_args=(), device_types="cuda") around the
   launcher, register_kernel("cpu") around the reference (contiguous results), register_fake, register_autograd; the
   backward pass is an operator of its own. Save only inputs where recomputing the rest is free.
4. The public function: checks (`checks.py`), then the operator, or the plain function where `runtime.inlined` says so.
   FUNCTION_cost next to it. Both are exported here.
5. `aot_cases()` in the launcher's module: `compilation.AotCase`s that call the launcher on meta tensors; `aot` finds
   the function by its name.
6. Tests: an entry in tests/kernels/operators.py (opcheck, gradcheck, compile, bad arguments, cost, GPU); anything
   special in tests/kernels/test_OP.py; tests/kernels/interpreter/test_OP_interpreted.py (launcher against reference).
   Tolerances are in `kernel_testing.py`.
An op with one kernel fits in one file; past 400 lines, split it like norm_*.py: kernels, launch, operator, modulate.
"""

from ddt_kernels.attention import attention, attention_cost
from ddt_kernels.cost import Cost
from ddt_kernels.guided_step import guided_step, guided_step_, guided_step_coefficients, guided_step_cost
from ddt_kernels.norm_modulate import (
    gated_residual,
    gated_residual_cost,
    gated_residual_layer_norm_modulate,
    gated_residual_layer_norm_modulate_cost,
    gated_residual_rms_norm_modulate,
    gated_residual_rms_norm_modulate_cost,
    layer_norm_modulate,
    layer_norm_modulate_cost,
    rms_norm_modulate,
    rms_norm_modulate_cost,
)
from ddt_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_, qk_norm_rope_cost
from ddt_kernels.qkv_attention import qkv_attention, qkv_attention_cost
from ddt_kernels.swiglu import swiglu, swiglu_cost
from ddt_kernels.swiglu_mlp import swiglu_mlp, swiglu_mlp_cost

__all__ = [
    "Cost",
    "attention",
    "attention_cost",
    "gated_residual",
    "gated_residual_cost",
    "gated_residual_layer_norm_modulate",
    "gated_residual_layer_norm_modulate_cost",
    "gated_residual_rms_norm_modulate",
    "gated_residual_rms_norm_modulate_cost",
    "guided_step",
    "guided_step_",
    "guided_step_coefficients",
    "guided_step_cost",
    "layer_norm_modulate",
    "layer_norm_modulate_cost",
    "qk_norm_rope",
    "qk_norm_rope_",
    "qk_norm_rope_cost",
    "qkv_attention",
    "qkv_attention_cost",
    "rms_norm_modulate",
    "rms_norm_modulate_cost",
    "swiglu",
    "swiglu_cost",
    "swiglu_mlp",
    "swiglu_mlp_cost",
]
