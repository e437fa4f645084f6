"""FusedDDT against the reference and the original's numbers: same weights, same names, same results, same gradients."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

import golden_data as golden
from ddt_fast.config import DDTConfig
from ddt_fast.model.fused import FusedDDT
from ddt_fast.model.quantization import quantize_int8
from ddt_fast.model.reference import DDT
from golden_data import relative_error


def fused(name: str) -> FusedDDT:
    return FusedDDT.from_reference(golden.model(name))


def gradients(model, io) -> dict[str, torch.Tensor]:
    """By released name: the gradients of a merged parameter are split as its weights are."""
    golden.flow_matching_loss(model, io).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return model.state_dict()


@pytest.mark.parametrize("name", golden.MODELS)
def test_every_gradient_matches_the_reference(name):
    io = golden.tensors(name)
    expected, actual = gradients(golden.model(name), io), gradients(fused(name), io)
    assert expected.keys() == actual.keys()
    for parameter in expected:
        assert relative_error(actual[parameter], expected[parameter]) < 1e-4, parameter


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_under_autocast_it_errs_no_more_than_the_reference(device):
    name = "tiny_h48_d24"
    io = {key: tensor.to(device) for key, tensor in golden.tensors(name).items()}
    exact = gradients(golden.model(name).to(device), io)
    with torch.autocast(device, torch.bfloat16):
        found = [gradients(model.to(device), io) for model in (golden.model(name), fused(name))]
    plain, ours = (
        relative_error(*(torch.cat([made[key].flatten() for key in exact]) for made in (one, exact))) for one in found
    )
    assert all(gradient.dtype == torch.float32 for gradient in found[1].values())
    assert 0 < ours < 1.5 * plain


def test_state_dict_is_the_released_one_both_ways():
    reference = golden.model("tiny_h48_d24")
    model = FusedDDT.from_reference(reference)
    saved = model.state_dict()
    assert saved.keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(saved[name], tensor), name
    again = FusedDDT(reference.config)
    again.load_state_dict(saved)
    assert torch.equal(again.decoder_modulation.weight, model.decoder_modulation.weight)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())


def test_missing_names_are_reported_as_released():
    state = golden.model("tiny_h48_d24").state_dict()
    del state["blocks.1.adaLN_modulation.0.bias"]
    model = FusedDDT(golden.model_config("tiny_h48_d24"))
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in .*: "blocks\.1\.adaLN_modulation\.0\.bias"\. $'):
        model.load_state_dict(state)


def test_from_reference_keeps_dtype_and_mode_and_copies():
    reference = golden.model("tiny_h48_d24").to(torch.bfloat16).train()
    model = FusedDDT.from_reference(reference)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert model.training
    with torch.no_grad():
        model.x_embedder.proj.weight.zero_()
    assert reference.x_embedder.proj.weight.abs().sum() > 0


def test_the_weights_of_a_swiglu_stay_halves_of_one_tensor():
    model = fused("tiny_h48_d24")
    moved = copy.deepcopy(model).to(torch.bfloat16)
    for made in (model, copy.deepcopy(model), moved, moved.to_empty(device="cpu")):
        for block in made.blocks:
            w1, w3 = block.mlp.w1.weight, block.mlp.w3.weight
            assert w3.data_ptr() - w1.data_ptr() == w1.nbytes
            assert w1.is_leaf


@settings(max_examples=15, deadline=None)
@given(
    heads=st.tuples(st.integers(1, 3), st.sampled_from([4, 8, 12, 20])),
    patch=st.sampled_from([1, 2]),
    channels=st.integers(1, 3),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
)
def test_random_configurations_agree_with_the_reference(heads, patch, channels, blocks, shape):
    torch.manual_seed(0)
    batch, height, width = shape
    config = DDTConfig(channels, patch, heads[0] * heads[1], heads[0], sum(blocks), blocks[0], 5)
    reference = DDT(config)
    with torch.no_grad():
        for parameter in reference.final_layer.parameters():
            parameter.normal_(std=0.1)
    model = FusedDDT.from_reference(reference)
    x, t = torch.randn(batch, channels, height * patch, width * patch), torch.rand(batch)
    y = torch.randint(0, 6, (batch,))
    for actual, expected in zip(model(x, t, y), reference(x, t, y), strict=True):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.slow
def test_compiles_as_one_graph_forward_and_backward():
    torch.manual_seed(0)
    io = golden.tensors("tiny_h48_d24")
    model = FusedDDT(replace(golden.model_config("tiny_h48_d24"), num_blocks=3, num_encoder_blocks=2))
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses, gradients = [], []
    for run in (model, whole):
        model.zero_grad()
        losses.append(golden.flow_matching_loss(run, io))
        losses[-1].backward()
        gradients.append(model.encoder_modulation.weight.grad)
    torch.testing.assert_close(*losses)
    assert relative_error(gradients[1], gradients[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("num_blocks", "quantized"), [(9, False), (5, True)])
def test_parts_are_compiled_in_place_and_depth_costs_nothing(monkeypatch, num_blocks, quantized):
    # Dynamo alone: Inductor's C++ takes minutes, and benchmarks.cpu_sampling checks its numbers.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    counters["stats"].clear()
    torch.manual_seed(0)
    io = golden.tensors("tiny_h48_d24")
    eager = FusedDDT(replace(golden.model_config("tiny_h48_d24"), num_blocks=num_blocks)).eval()
    torch.nn.init.normal_(eager.final_layer.linear.weight, std=0.1)
    eager = quantize_int8(eager) if quantized else eager

    def copied(model):  # a packed weight cannot be copied
        return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})

    model, calls = copied(eager), []
    model.compile_parts()
    for block in model.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected, state = eager(io["x"], io["t"], io["y"])
        for compiled in (model, copied(model)):
            assert compiled.blocks[0].forward.__self__ is compiled.blocks[0]
            velocity, compiled_state = compiled(io["x"], io["t"], io["y"])
            # int8: a difference in the last bit may turn a rounding.
            assert relative_error(velocity, expected) < 2e-3
            assert relative_error(compiled_state, state) < 2e-3
            assert relative_error(compiled(io["x"], io["t"], io["y"], state)[0], expected) < 2e-3
    # Encoder and decoder blocks, first and others, the final layer, modulations and state; in both models.
    assert counters["stats"]["unique_graphs"] == 7
    assert len(calls) == 2 * (2 * num_blocks - 3), "hooks run, of the decoder's 3 fewer blocks twice"


def test_too_wide_heads_are_refused():
    with pytest.raises(ValueError, match="head dimension is 132; allowed: up to 128 for FusedDDT"):
        FusedDDT(DDTConfig(4, 2, 132, 1, 2, 1, 10))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_matches_the_reference(dtype):
    io = {name: tensor.cuda() for name, tensor in golden.tensors("tiny_h72_d72_rect").items()}
    model = fused("tiny_h72_d72_rect").cuda().to(dtype)
    with torch.no_grad():
        velocity, state = model(io["x"].to(dtype), io["t"], io["y"])
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    assert relative_error(velocity.float(), io["velocity"]) < tolerance
    assert relative_error(state.float(), io["encoder_state"]) < tolerance
