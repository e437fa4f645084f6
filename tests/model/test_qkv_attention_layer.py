"""What an attention layer runs between its GEMMs: which operators, with and without gradients, and the same numbers."""

from functools import partial

import pytest
import torch
from torch.nn.utils import prune

from ddt_fast import DDTConfig, FusedDDT
from ddt_fast.model.attention import attention
from ddt_fast.model.attention.qkv import qkv_attention
from ddt_fast.model.base import rotary_tables
from ddt_kernels import qk_norm_rope
from dispatched import operators_of

MANY, FEW = 24, 16  # tokens: more than FEW_TOKENS in fp32, and as many


def make_inputs(tokens):
    """qkv, q_weight, k_weight, cos and sin, by name, for 2 samples and 3 heads of 12."""
    generator = torch.Generator().manual_seed(0)
    qkv, *weights = (torch.randn(size, generator=generator) for size in ((2, tokens, 3, 3, 12), (12,), (12,)))
    tables = rotary_tables(12, 4, tokens // 4)
    return dict(zip(("qkv", "q_weight", "k_weight", "cos", "sin"), (qkv, *weights, *tables), strict=True))


def expected(inputs, backend="auto"):
    return attention(*qk_norm_rope(*inputs.values()).unbind(2), backend)


@pytest.mark.parametrize(
    ("tokens", "backend", "names"),
    [
        (MANY, "auto", ["qkv_attention"]),
        (MANY, "sdpa_flash", ["qkv_attention"]),
        (FEW, "sdpa_flash", ["qkv_attention"]),
        (FEW, "auto", ["qk_norm_rope"]),
        (MANY, "sdpa_math", ["qk_norm_rope"]),
    ],
)
@pytest.mark.parametrize("trained", ["qkv", "q_weight", "k_weight"])
def test_with_gradients_it_is_one_operator_where_the_backend_is_ours(tokens, backend, names, trained):
    inputs = make_inputs(tokens)
    inputs[trained].requires_grad_()
    kept = inputs["qkv"].detach().clone()
    out, seen = operators_of(partial(qkv_attention, overwrite=True), *inputs.values(), backend)
    assert [name for name in seen if name != "attention"] == names
    wanted = expected(inputs, backend)
    torch.testing.assert_close(out, wanted)
    gradients = [torch.autograd.grad(result.square().sum(), inputs[trained])[0] for result in (out, wanted)]
    torch.testing.assert_close(*gradients)
    assert torch.equal(inputs["qkv"], kept)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "no_grad"])
def test_without_gradients_q_and_k_are_overwritten(frozen):
    inputs = make_inputs(MANY)
    inputs["q_weight"].requires_grad_(not frozen)
    with torch.no_grad():
        wanted, normed = expected(inputs), qk_norm_rope(*inputs.values())
    with torch.set_grad_enabled(frozen):
        out, seen = operators_of(partial(qkv_attention, overwrite=True), *inputs.values())
    assert seen == ["qk_norm_rope_"]
    assert torch.equal(out, wanted)
    assert torch.equal(inputs["qkv"], normed)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [True, False])
def test_compiled_it_changes_nothing_in_place(gradient):
    inputs = make_inputs(MANY)
    inputs["qkv"].requires_grad_(gradient)
    kept = inputs["qkv"].detach().clone()
    torch._dynamo.reset()
    compiled = torch.compile(qkv_attention, fullgraph=True, backend="aot_eager")
    out = compiled(*inputs.values(), overwrite=True)
    torch.testing.assert_close(out, expected(inputs))
    assert torch.equal(inputs["qkv"], kept)


def make_model():
    """A FusedDDT, and arguments."""
    config = DDTConfig(3, 2, hidden_size=48, num_heads=4, num_blocks=3, num_encoder_blocks=2, num_classes=5)
    torch.manual_seed(0)
    return FusedDDT(config), (torch.randn(2, 3, 12, 12), torch.rand(2), torch.tensor([1, 5]))


def test_every_block_of_a_fused_model_runs_it():
    model, (x, t, y) = make_model()
    trained, seen = operators_of(model, x, t, y)
    assert seen.count("qkv_attention") == 3
    with torch.no_grad():
        sampled, seen = operators_of(model, x, t, y)
    assert seen.count("qk_norm_rope_") == 3
    assert "qkv_attention" not in seen
    torch.testing.assert_close(sampled[0], trained[0])


def test_what_a_hook_keeps_is_not_overwritten():
    model, arguments = make_model()
    kept = []
    model.blocks[0].attn.qkv.register_forward_hook(lambda layer, inputs, output: kept.append((inputs[0], output)))
    with torch.no_grad():
        _, seen = operators_of(model, *arguments)
    ((x, qkv),) = kept
    weight = model.blocks[0].attn.qkv.weight.detach()
    torch.testing.assert_close(qkv.detach(), x.detach() @ weight.T)
    assert sorted(name for name in seen if "qk_norm_rope" in name) == ["qk_norm_rope", *["qk_norm_rope_"] * 2]


def test_hooks_of_an_mlp_run():
    model, arguments = make_model()
    expected = model(*arguments)[1].detach()
    mlp = model.blocks[0].mlp
    calls = []
    mlp.w1.register_forward_hook(lambda *_: calls.append("w1"))
    torch.testing.assert_close(model(*arguments)[1].detach(), expected)
    assert calls == ["w1"]
    # Pruning makes the weight in a hook, anew at every call.
    prune.random_unstructured(mlp.w2, "weight", 0.5)
    for _ in range(2):
        model(*arguments)[1].sum().backward()
    assert torch.equal(mlp.w2.weight_orig.grad == 0, mlp.w2.weight_mask == 0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_fused_model_samples_under_vmap():
    model, (x, t, y) = make_model()
    with torch.no_grad():
        made = torch.vmap(lambda image: model(image[None], t[:1], y[:1])[1])(x)
        torch.testing.assert_close(made, torch.stack([model(image[None], t[:1], y[:1])[1] for image in x]))
