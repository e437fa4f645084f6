import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddt_fast.config import DDTConfig
from ddt_fast.model.flops import model_flops
from ddt_fast.model.reference import DDT
from ddt_fast.presets import PRESETS


def test_count_equals_what_pytorch_counts():
    config = DDTConfig(4, 2, 64, 4, 5, 3, 10)
    with torch.device("meta"):
        model, x, t, y = DDT(config), torch.zeros(1, 4, 8, 12), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    cost = model_flops(config, 8, 12)

    def counted(run):
        with FlopCounterMode(display=False) as counter:
            result = run()
        counts.append(counter.get_total_flops())
        return result

    counts: list[int] = []
    state = counted(lambda: model.encode(x, t, y))
    modulations = counted(lambda: model.decoder_modulations(state))
    counted(lambda: model.decode(x, modulations))
    assert counts == [cost.encoder, cost.modulations, cost.decoder]


def test_xl2_at_256_and_512_pixels():
    model = PRESETS["xl2_256"].model
    assert model_flops(model, 32, 32).total / 1e9 == pytest.approx(263, abs=0.5)
    assert model_flops(model, 64, 64).total / 1e9 == pytest.approx(1152, abs=0.5)
    assert model_flops(model, 32, 32).modulations / 1e9 == pytest.approx(25.8, abs=0.05)
