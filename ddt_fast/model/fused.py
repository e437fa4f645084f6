"""DDT on ddt_kernels: the reference's results from fewer, larger operations.

The state_dict is that of `reference.DDT`: modulations are merged on loading and split on saving.

- A block is 4 GEMMs (qkv, proj, the dual w1/w3, w2), 1 attention and 3 element-wise passes: the residual sum and the
  norm after it are one pass, even across blocks. In training, everything between qkv and proj is one operator, and so
  is the whole MLP, because they keep less for the backward pass.
- All modulations of the encoder are one GEMM on c; those of the decoder and the final layer are one GEMM on the state.

On a CPU, every operation is ddt_kernels' plain PyTorch version.
"""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, Self, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddt_fast.checks import require
from ddt_fast.config import DDTConfig
from ddt_fast.model.attention import AttentionBackend
from ddt_fast.model.attention.qkv import qkv_attention
from ddt_fast.model.base import DDTBase, Forecast, Rotary
from ddt_fast.model.reference import DDT, Attention, LabelEmbedder, PatchEmbed, RMSNorm, SwiGLU, TimestepEmbedder
from ddt_kernels import (
    gated_residual,
    gated_residual_layer_norm_modulate,
    gated_residual_rms_norm_modulate,
    rms_norm_modulate,
    swiglu_mlp,
)


class FusedSwiGLU(SwiGLU):
    """`SwiGLU` by one operator. The weights w1 and w3 are the halves of one tensor, which the operator reads in place;
    it would copy them into one at every call."""

    def __init__(self, config: DDTConfig) -> None:
        super().__init__(config)
        self._join()

    def _join(self) -> None:
        if _is_plain(self.w1) and _is_plain(self.w3):
            self.w1.weight.data, self.w3.weight.data = torch.stack([self.w1.weight.data, self.w3.weight.data])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """After `.to` and its like, which make tensors one by one."""
        super()._apply(fn, recurse)
        self._join()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a copy."""
        super().__setstate__(state)
        self._join()

    def forward(self, x: Tensor) -> Tensor:
        if not all(_is_plain(layer) for layer in (self.w1, self.w2, self.w3)):
            return super().forward(x)
        # They have x's dtype except under torch.autocast, which casts for Linears but not for operators like this one.
        w1, w3, w2 = (layer.weight.to(x.dtype) for layer in (self.w1, self.w3, self.w2))
        return swiglu_mlp(x, w1, w3, w2)


class FusedAttention(Attention):
    def __init__(self, config: DDTConfig, backend: AttentionBackend) -> None:
        super().__init__(config)
        self.backend = backend

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        norms = self.q_norm.weight, self.k_norm.weight
        y = qkv_attention(qkv, *norms, cos, sin, self.backend, overwrite=_is_alone(self.qkv))
        return self.proj(y.flatten(2))


class FusedBlock(nn.Module):
    """A block without adaLN_modulation, which `FusedDDT` merges with those of the other blocks."""

    def __init__(self, config: DDTConfig, backend: AttentionBackend) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size)
        self.attn = FusedAttention(config, backend)
        self.norm2 = RMSNorm(config.hidden_size)
        self.mlp = FusedSwiGLU(config)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        modulation: Sequence[Tensor],
        rotary: Rotary,
        forecast: Forecast | None,
    ) -> tuple[Tensor, Tensor]:
        """(x, branch, gate) before the block → (x, branch) after it. The residual stream is x + gate * branch; before
        the first block it is x, and branch and gate are None.

        modulation: shift_msa, scale_msa, gate_msa, shift_mlp and scale_mlp. The block's gate_mlp is the next block's
        `gate`, because that block adds the branch.
        """
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp = modulation
        if branch is None or gate is None:
            y = rms_norm_modulate(x, self.norm1.weight, shift_msa, scale_msa, forecast=forecast)
        else:
            x, y = gated_residual_rms_norm_modulate(
                x, branch, gate, self.norm1.weight, shift_msa, scale_msa, forecast=forecast
            )
        attended = self.attn(y, *rotary)
        x, y = gated_residual_rms_norm_modulate(
            x, attended, gate_msa, self.norm2.weight, shift_mlp, scale_mlp, forecast=forecast
        )
        return x, self.mlp(y)


class FusedFinalLayer(nn.Module):
    def __init__(self, config: DDTConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.in_channels * config.patch_size**2)

    def forward(
        self, h: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, forecast: Forecast | None
    ) -> Tensor:
        return self.linear(gated_residual_layer_norm_modulate(h, branch, gate, shift, scale, forecast=forecast))


class FusedDDT(DDTBase):
    """`reference.DDT` on fused operations, with the same arguments and state_dict, and the same results up to rounding.
    ValueError if head_dim is above 128, the attention kernel's limit.

    attention_backend: one of `ATTENTION_BACKENDS`; "auto" suits device, dtype and head dimension.
    """

    def __init__(self, config: DDTConfig, attention_backend: AttentionBackend = "auto") -> None:
        super().__init__()
        require(config.head_dim <= 128, "head dimension", config.head_dim, "up to 128 for FusedDDT")
        self.config = config
        c = config.hidden_size
        self.x_embedder = PatchEmbed(config)
        self.s_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(c)
        self.y_embedder = LabelEmbedder(config.num_classes, c)
        self.final_layer = FusedFinalLayer(config)
        self.blocks = nn.ModuleList(FusedBlock(config, attention_backend) for _ in range(config.num_blocks))
        self.encoder_modulation = nn.Linear(c, self.condition_size)
        self.decoder_modulation = nn.Linear(c, self.modulation_size)
        self.register_state_dict_post_hook(_split_modulations)
        self.register_load_state_dict_pre_hook(_merge_modulations)
        self.load_state_dict(DDT(config).state_dict())

    @classmethod
    def from_reference(cls, model: DDT, attention_backend: AttentionBackend = "auto") -> Self:
        """A FusedDDT with a copy of the reference's weights, in their dtype and on their device."""
        parameter = next(model.parameters())
        with torch.device("meta"):
            fused = cls(model.config, attention_backend)
        fused = fused.to(parameter.dtype).to_empty(device=parameter.device)
        fused.load_state_dict(model.state_dict())
        return fused.train(model.training).requires_grad_(parameter.requires_grad)

    def compile_parts(self) -> None:
        """Compile blocks, final layer, modulations and state in place, each at its first calls, once for each shape.
        All blocks share one compiled function, so the depth of the model costs nothing; hooks run outside it."""
        # Beyond dynamo's limit, 8, a function runs eagerly, and a single plan may call a block in 8 ways.
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 128)
        parts: list[tuple[str, Any]] = [("forward", self.blocks), ("forward", [self.final_layer])]
        parts += [(name, [self]) for name in ("decoder_modulations", "_state")]
        for name, modules in parts:
            compiled = torch.compile(getattr(type(modules[0]), name), dynamic=False, fullgraph=True)
            for module in modules:
                setattr(module, name, MethodType(compiled, module))  # a deep copy binds it to the copy

    @property
    def condition_size(self) -> int:
        return 6 * self.config.num_encoder_blocks * self.config.hidden_size

    def condition(self, t_embedding: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        return _linear(self.encoder_modulation, F.silu(t_embedding + self.y_embedder(y)[:, None]), out)

    def _encode(
        self, tokens: Tensor, t_embedding: Tensor, condition: Tensor, rotary: Rotary, features_after: int | None
    ) -> tuple[Tensor, Tensor | None]:
        blocks = self._blocks(slice(self.config.num_encoder_blocks))
        chunks, split = condition.chunk(6 * len(blocks), dim=-1), features_after or 0
        s, features = self.s_embedder(tokens), None
        if split:
            # The sum is done here instead of in the next block's norm.
            s = features = gated_residual(*self._run(blocks[:split], s, chunks[: 6 * split], rotary))
        if split == len(blocks):
            return F.silu(t_embedding + s), features
        s, branch, gate = self._run(blocks[split:], s, chunks[6 * split :], rotary)
        return self._state(t_embedding, s, branch, gate), features

    def _state(self, t_embedding: Tensor, s: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return F.silu(t_embedding + gated_residual(s, branch, gate))

    def decoder_modulations(self, state: Tensor, out: Tensor | None = None) -> Tensor:
        return _linear(self.decoder_modulation, state, out)

    def decode_tokens(
        self, tokens: Tensor, modulations: Tensor, rotary: Rotary, forecast: Forecast | None = None
    ) -> Tensor:
        blocks = self._blocks(slice(self.config.num_encoder_blocks, None))
        *chunks, shift, scale = modulations.chunk(6 * len(blocks) + 2, dim=-1)
        h, branch, gate = self._run(blocks, self.x_embedder(tokens), chunks, rotary, forecast)
        return self.final_layer(h, branch, gate, shift, scale, forecast)

    def _run(
        self,
        blocks: Sequence[FusedBlock],
        x: Tensor,
        modulation: Sequence[Tensor],
        rotary: Rotary,
        forecast: Forecast | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run blocks on x (B, N, C), with six modulations each; return (x, branch, gate), whose sum x + gate * branch
        is part of the next norm."""
        branch: Any = None
        gate: Any = None
        for i, block in enumerate(blocks):
            *parts, next_gate = modulation[6 * i : 6 * i + 6]
            x, branch = self._call(block, x, branch, gate, parts, rotary, forecast)
            gate = next_gate
        return x, branch, gate

    def _blocks(self, part: slice) -> list[FusedBlock]:
        return cast(list[FusedBlock], self.blocks[part])


def _linear(layer: nn.Module, x: Tensor, out: Tensor | None) -> Tensor:
    """layer(x), written to `out` if given."""
    if out is None:
        return layer(x)
    if _is_plain(layer):
        torch.addmm(layer.bias, x.flatten(0, 1), layer.weight.t(), out=out.flatten(0, 1))
        return out
    return out.copy_(layer(x))


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether only the layer's weight matters: it is neither quantised nor adapted, and has no hooks."""
    return _is_alone(layer) and type(layer.weight) in (nn.Parameter, Tensor)


def _is_alone(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether nothing else sees the layer's output: adapters and hooks may keep it, or change the weight first."""
    hooked = layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks
    return type(layer) is nn.Linear and not hooked


def _released_names(config: DDTConfig) -> dict[str, list[tuple[str, int]]]:
    """Merged layer → the released layers it holds, in order, with their rows."""
    c = config.hidden_size
    block = [(f"blocks.{i}.adaLN_modulation.0", 6 * c) for i in range(config.num_blocks)]
    split = config.num_encoder_blocks
    return {
        "encoder_modulation": block[:split],
        "decoder_modulation": [*block[split:], ("final_layer.adaLN_modulation.0", 2 * c)],
    }


def _split_modulations(model: FusedDDT, state_dict: dict[str, Tensor], prefix: str, _: Any) -> None:
    for merged, layers in _released_names(model.config).items():
        for kind in ("weight", "bias"):
            parts = state_dict.pop(f"{prefix}{merged}.{kind}").split([rows for _, rows in layers])
            for (name, _), part in zip(layers, parts, strict=True):
                state_dict[f"{prefix}{name}.{kind}"] = part


def _merge_modulations(
    model: FusedDDT,
    state_dict: dict[str, Tensor],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    for merged, layers in _released_names(model.config).items():
        for kind, current in model.get_submodule(merged).named_parameters():
            names = [f"{prefix}{name}.{kind}" for name, _ in layers]
            # Missing tensors are reported by their released names; the merged tensor keeps its rows.
            missing += [name for name in names if name not in state_dict]
            parts = current.split([rows for _, rows in layers])
            parts = [state_dict.pop(name, part) for name, part in zip(names, parts, strict=True)]
            state_dict[f"{prefix}{merged}.{kind}"] = torch.cat(parts)
