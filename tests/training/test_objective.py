"""The training objective against its definition: x_t = t data + (1 - t) noise, target data - noise, logit-normal t."""

import pytest
import torch
from torch import Tensor

from ddt_fast.training.objective import flow_matching_loss

DATA = torch.linspace(-3, 3, 4000).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
LABELS = torch.arange(4000) % 10


class Recorder(torch.nn.Module):
    """Predicts `velocity` and remembers what it was asked."""

    def __init__(self, velocity: float = 0.0) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.x, self.t, self.y = x, t, y
        return torch.full_like(x, self.velocity), x


def record(dropout: float = 0.0, velocity: float = 0.0, seed: int = 0) -> tuple[Recorder, Tensor]:
    model, generator = Recorder(velocity), torch.Generator().manual_seed(seed)
    loss = flow_matching_loss(model, DATA, LABELS, num_classes=10, label_dropout=dropout, generator=generator)
    return model, loss


def test_path_and_target_run_from_noise_to_data():
    model, loss = record(velocity=0.5)
    t = model.t.view(-1, 1, 1, 1)
    noise = (model.x - t * DATA) / (1 - t)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert (noise * DATA).mean().item() == pytest.approx(0, abs=0.05)
    assert loss.item() == pytest.approx((0.5 - (DATA - noise)).square().mean().item(), rel=1e-4)


def test_time_is_logit_normal():
    logits = record()[0].t.logit()
    assert logits.mean().item() == pytest.approx(0, abs=0.06)
    assert logits.std().item() == pytest.approx(1, abs=0.05)
    assert (logits.abs() < 1).float().mean().item() == pytest.approx(0.683, abs=0.03)


def test_labels_are_dropped_to_the_null_class():
    assert torch.equal(record(dropout=0.0)[0].y, LABELS)
    assert (record(dropout=1.0)[0].y == 10).all()
    dropped = record(dropout=0.1)[0].y
    assert (dropped == 10).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(dropped[dropped != 10], LABELS[dropped != 10])


def test_the_generator_decides_everything():
    assert record(seed=1)[1] == record(seed=1)[1]
    assert record(seed=1)[1] != record(seed=2)[1]
