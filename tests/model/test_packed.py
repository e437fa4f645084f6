"""bf16 on packed weights against the model it was made from, on small models."""

import pytest
import torch

import golden_data as golden
from ddt_fast.model.cpu import pack_bf16_weight
from ddt_fast.model.fused import FusedDDT
from ddt_fast.model.packed import PackedLinear, pack_bf16
from golden_data import relative_error

packs = pytest.mark.skipif(
    pack_bf16_weight(torch.ones(4, 4, dtype=torch.bfloat16)) is None, reason="this CPU packs no bf16 weights"
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@packs
@pytest.mark.parametrize("has_bias", [True, False])
def test_one_packed_weight_serves_every_number_of_rows(has_bias):
    weight, bias = random(96, 130, seed=1), random(96, seed=2) if has_bias else None
    layer = PackedLinear(weight, bias)
    for rows in (1, 3, 64, 1, 500):
        x = random(2, rows, 130, seed=rows)
        y = layer(x)
        assert y.dtype == torch.bfloat16
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert relative_error(y.double(), expected) < 2**-8
    heads = x.unflatten(-1, (10, 13))
    assert torch.equal(layer(heads, features=2), y)


@packs
@pytest.mark.parametrize("name", golden.MODELS)
def test_a_packed_model_errs_as_bf16_does(name):
    reference, io = golden.model(name), golden.tensors(name)
    model = FusedDDT.from_reference(reference).to(torch.bfloat16)
    packed, x = pack_bf16(model), io["x"].bfloat16()
    with torch.no_grad():
        expected = reference(io["x"], io["t"], io["y"])[0]
        errors = [relative_error(m(x, io["t"], io["y"])[0].float(), expected) for m in (model, packed)]
    assert 0 < errors[1] < 1.5 * errors[0]
    with pytest.raises(ValueError, match="neither saved nor loaded"):
        packed.state_dict()


def test_what_cannot_be_packed_is_left_as_it_is(monkeypatch):
    model = FusedDDT.from_reference(golden.model("tiny_h48_d24"))
    assert pack_bf16(model) is model
    half = model.to(torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {}, raising=False)
    assert pack_bf16(half) is half
