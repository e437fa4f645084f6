"""The models against numbers of the original implementation; what the reference is by itself, and costs."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import golden_data as golden
from ddt_fast.config import DDTConfig
from ddt_fast.model import FusedDDT
from ddt_fast.model.base import rotary_tables
from ddt_fast.model.flops import model_flops
from ddt_fast.model.reference import DDT, rotate
from ddt_fast.presets import PRESETS
from golden_data import relative_error


@pytest.mark.parametrize("make", [lambda model: model, FusedDDT.from_reference], ids=["DDT", "FusedDDT"])
@pytest.mark.parametrize("name", golden.MODELS)
def test_forward_matches_the_original(name, make):
    model, io = make(golden.model(name)), golden.tensors(name)
    with torch.no_grad():
        velocity, state = model(io["x"], io["t"], io["y"])
        reused, same_state = model(io["x"], io["t_reuse"], io["y"], state)
    assert relative_error(velocity, io["velocity"]) < 1e-5
    assert relative_error(state, io["encoder_state"]) < 1e-5
    assert relative_error(reused, io["velocity_reuse"]) < 1e-5
    assert same_state is state


@pytest.mark.parametrize("name", golden.MODELS)
def test_gradients_match_the_original(name):
    model, io = golden.model(name), golden.tensors(name)
    loss = golden.flow_matching_loss(model, io)
    loss.backward()
    assert loss.item() == pytest.approx(io["fm_loss"].item(), rel=1e-5)
    gradients = {key.removeprefix("grad."): value for key, value in io.items() if key.startswith("grad.")}
    assert len(gradients) == 10
    for parameter, expected in gradients.items():
        assert relative_error(model.get_parameter(parameter).grad, expected) < 1e-4, parameter


def test_xl2_has_the_released_names_and_shapes_in_order():
    with torch.device("meta"):
        model = DDT(PRESETS["xl2_256"].model)
    released = json.loads((golden.GOLDEN / "ddt_xl2_22en6de_keys.json").read_text())
    assert [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()] == list(released.items())
    assert sum(parameter.numel() for parameter in model.parameters()) == 674_646_352


def test_modulations_are_affine_in_the_state():
    model, io = golden.model("tiny_h48_d24"), golden.tensors("tiny_h48_d24")
    with torch.no_grad():
        first, second = (model.encode(io["x"], t, io["y"]) for t in (io["t"], io["t_reuse"]))
        blend = model.decode(io["x"], model.decoder_modulations(1.7 * second - 0.7 * first))
        blended = 1.7 * model.decoder_modulations(second) - 0.7 * model.decoder_modulations(first)
    assert relative_error(model.decode(io["x"], blended), blend) < 1e-5


def test_rotation_keeps_norms_and_depends_on_relative_position():
    cos, sin = rotary_tables(16, 4, 4)
    assert cos.shape == sin.shape == (16, 8)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 16, 1, 16)
    rotated_q, rotated_k = rotate(q, cos, sin), rotate(k, cos, sin)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1))
    products = (rotated_q[0, :, 0] @ rotated_k[0, :, 0].T).view(4, 4, 4, 4)
    torch.testing.assert_close(products[0, 0, 1, 2], products[2, 1, 3, 3], rtol=1e-4, atol=1e-4)


def test_a_fresh_model_predicts_zero_velocity():
    model = DDT(golden.model_config("tiny_h48_d24"))
    velocity, _ = model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 10]))
    assert torch.equal(velocity, torch.zeros(2, 4, 8, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near(dtype):
    model, io = golden.model("tiny_h48_d24").to(dtype), golden.tensors("tiny_h48_d24")
    with torch.no_grad():
        velocity, _ = model(io["x"].to(dtype), io["t"], io["y"])
    assert velocity.dtype == dtype
    assert relative_error(velocity.float(), io["velocity"]) < 0.03


@pytest.mark.parametrize(
    ("x_shape", "state_shape", "message"),
    [
        ((2, 3, 8, 8), None, "x has shape"),
        ((2, 4, 7, 8), None, "height is 7; allowed: a positive multiple of patch_size"),
        ((2, 4, 8, 8), (2, 4, 48), "state has shape"),
    ],
)
def test_wrong_shapes_are_refused(x_shape, state_shape, message):
    model = golden.model("tiny_h48_d24")
    state = None if state_shape is None else torch.zeros(state_shape)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(x_shape), torch.zeros(2), torch.zeros(2, dtype=torch.int64), state)


def test_flops_are_what_pytorch_counts():
    config = DDTConfig(4, 2, 64, 4, 5, 3, 10)
    with torch.device("meta"):
        model, x, t, y = DDT(config), torch.zeros(1, 4, 8, 12), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    counters = [FlopCounterMode(display=False) for _ in range(3)]
    with counters[0]:
        state = model.encode(x, t, y)
    with counters[1]:
        modulations = model.decoder_modulations(state)
    with counters[2]:
        model.decode(x, modulations)
    cost = model_flops(config, 8, 12)
    assert [counter.get_total_flops() for counter in counters] == [cost.encoder, cost.modulations, cost.decoder]


def test_flops_of_xl2_at_256_and_512_pixels():
    model = PRESETS["xl2_256"].model
    assert model_flops(model, 32, 32).total / 1e9 == pytest.approx(263, abs=0.5)
    assert model_flops(model, 64, 64).total / 1e9 == pytest.approx(1152, abs=0.5)
    assert model_flops(model, 32, 32).modulations / 1e9 == pytest.approx(25.8, abs=0.05)
