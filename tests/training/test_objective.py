"""The training objective against its definition: x_t = t data + (1 - t) noise, target data - noise, logit-normal t."""

import pytest
import torch

from ddt_fast.training.objective import FlowMatchingBatch, flow_matching_batch, flow_matching_loss

DATA = torch.linspace(-3, 3, 4000).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
LABELS = torch.arange(4000) % 10


def draw(dropout: float = 0.0, seed: int = 0, part: tuple[int, int] = (0, 1)) -> FlowMatchingBatch:
    own = slice(part[0] * 4000 // part[1], (part[0] + 1) * 4000 // part[1])
    generator = torch.Generator().manual_seed(seed)
    settings = {"num_classes": 10, "label_dropout": dropout, "generator": generator, "part": part}
    return flow_matching_batch(DATA[own], LABELS[own], **settings)


def test_path_and_target_run_from_noise_to_data():
    points = draw()
    t = points.t.view(-1, 1, 1, 1)
    noise = DATA - points.target
    assert torch.allclose(points.x, t * DATA + (1 - t) * noise, atol=1e-5)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert (noise * DATA).mean().item() == pytest.approx(0, abs=0.05)


def test_the_loss_is_the_mean_squared_error_in_float32():
    velocity = torch.full((2, 1, 2, 2), 1.5, dtype=torch.bfloat16)
    loss = flow_matching_loss(velocity, torch.full((2, 1, 2, 2), -0.5))
    assert (loss.item(), loss.dtype) == (4.0, torch.float32)


def test_time_is_logit_normal():
    logits = draw().t.logit()
    assert logits.mean().item() == pytest.approx(0, abs=0.06)
    assert logits.std().item() == pytest.approx(1, abs=0.05)
    assert (logits.abs() < 1).float().mean().item() == pytest.approx(0.683, abs=0.03)


def test_labels_are_dropped_to_the_null_class():
    assert torch.equal(draw(dropout=0.0).labels, LABELS)
    assert (draw(dropout=1.0).labels == 10).all()
    dropped = draw(dropout=0.1).labels
    assert (dropped == 10).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(dropped[dropped != 10], LABELS[dropped != 10])


def test_the_generator_decides_everything():
    assert torch.equal(draw(seed=1).x, draw(seed=1).x)
    assert not torch.equal(draw(seed=1).x, draw(seed=2).x)


def test_the_parts_of_a_batch_are_the_batch():
    whole = draw(dropout=0.3)
    parts = [draw(dropout=0.3, part=(rank, 4)) for rank in range(4)]
    for tensor, shares in zip(whole, zip(*parts, strict=True), strict=True):
        # Equal but for the last bit: a vectorised sigmoid rounds the rest of an array in its own way.
        assert torch.allclose(tensor, torch.cat(shares), rtol=1e-6, atol=1e-6)
