"""Flow matching and REPA against their definitions: x_t = t data + (1 - t) noise, logit-normal t, cosines."""

import pytest
import torch

from ddt_fast.training.objective import FlowMatchingBatch, flow_matching_batch
from ddt_fast.training.repa import Projector, repa_loss

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


def test_the_generator_decides_everything_and_the_parts_of_a_batch_are_the_batch():
    assert not torch.equal(draw(seed=1).x, draw(seed=2).x)
    whole = draw(dropout=0.3)
    parts = [draw(dropout=0.3, part=(rank, 4)) for rank in range(4)]
    for tensor, shares in zip(whole, zip(*parts, strict=True), strict=True):
        # Equal but for the last bit: a vectorised sigmoid rounds the rest of an array in its own way.
        assert torch.allclose(tensor, torch.cat(shares), rtol=1e-6, atol=1e-6)


def test_projector_has_the_released_names_and_shapes():
    projector, tokens = Projector(48), torch.randn(2, 5, 48)
    weights = projector.state_dict()
    assert list(weights) == [f"{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")]
    assert weights["4.weight"].shape == (768, 48)
    hidden = tokens
    for layer in (0, 2):
        hidden = hidden @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
        hidden = hidden * torch.sigmoid(hidden)
    torch.testing.assert_close(projector(tokens), hidden @ weights["4.weight"].T + weights["4.bias"])


def test_the_repa_loss_is_one_minus_the_mean_cosine():
    torch.manual_seed(0)
    features = torch.randn(2, 16, 8)
    assert repa_loss(features * 3, features, (4, 4)) == pytest.approx(0, abs=1e-6)
    assert repa_loss(-features, features, (4, 4)) == pytest.approx(2)
    projected = torch.randn(2, 16, 8)
    cosines = (projected * features).sum(-1) / (projected.norm(dim=-1) * features.norm(dim=-1))
    assert repa_loss(projected, features, (4, 4)) == pytest.approx(1 - cosines.mean().item(), abs=1e-6)


def test_the_repa_loss_is_float32_whatever_comes_in():
    projected, features = torch.randn(2, 4, 8, dtype=torch.bfloat16), torch.randn(2, 4, 8).half()
    loss = repa_loss(projected, features, (2, 2))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, repa_loss(projected.float(), features.float(), (2, 2)), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(repa_loss(projected, features, (2, 2)), loss, rtol=0, atol=0)


@pytest.mark.parametrize("grid", [(8, 8), (2, 2), (2, 8)])
def test_features_are_resized_to_the_tokens(grid):
    """A linear ramp stays one under bilinear resizing, away from the edges."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    features = torch.stack([rows, columns, torch.ones(4, 4)], -1).view(1, 16, 3)
    places = [((torch.arange(size) + 0.5) * 4 / size - 0.5).clamp(0, 3) for size in grid]
    ramp = torch.stack([*torch.meshgrid(*places, indexing="ij"), torch.ones(grid)], -1).view(1, -1, 3)
    assert repa_loss(ramp, features, grid) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("projected", "features", "grid", "message"),
    [
        ((2, 15, 8), (2, 16, 8), (4, 4), "15 tokens"),
        ((2, 16, 8), (2, 15, 8), (4, 4), "15 features"),
        ((2, 16, 8), (2, 16, 7), (4, 4), "differ in B or F"),
        ((2, 16, 8), (3, 16, 8), (4, 4), "differ in B or F"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(projected, features, grid, message):
    with pytest.raises(ValueError, match=message):
        repa_loss(torch.randn(projected), torch.randn(features), grid)
