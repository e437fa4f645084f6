"""REPA: the projector and the loss."""

import numpy as np
import pytest
import torch

from ddt_fast.training.repa import Projector, repa_loss


def test_projector_has_the_released_names_and_shapes():
    projector = Projector(48)
    shapes = {name: tuple(weight.shape) for name, weight in projector.state_dict().items()}
    assert shapes == {
        "0.weight": (48, 48),
        "0.bias": (48,),
        "2.weight": (48, 48),
        "2.bias": (48,),
        "4.weight": (768, 48),
        "4.bias": (768,),
    }
    tokens = torch.randn(2, 5, 48)
    weights = projector.state_dict()
    hidden = tokens
    for layer in (0, 2):
        hidden = hidden @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
        hidden = hidden * torch.sigmoid(hidden)
    torch.testing.assert_close(projector(tokens), hidden @ weights["4.weight"].T + weights["4.bias"])


def test_loss_is_one_minus_the_mean_cosine():
    torch.manual_seed(0)
    features = torch.randn(2, 16, 8)
    assert repa_loss(features * 3, features, (4, 4)) == pytest.approx(0, abs=1e-6)
    assert repa_loss(-features, features, (4, 4)) == pytest.approx(2)
    projected = torch.randn(2, 16, 8)
    cosines = [
        float(p @ f / (p.norm() * f.norm()))
        for p, f in zip(projected.flatten(0, 1), features.flatten(0, 1), strict=True)
    ]
    assert repa_loss(projected, features, (4, 4)) == pytest.approx(1 - np.mean(cosines), abs=1e-6)


def test_loss_is_float32_whatever_comes_in():
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
