"""Flow matching: what a DDT is trained to minimise (DDT paper, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def flow_matching_loss(
    model: nn.Module,
    data: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    label_dropout: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean squared error of the velocity at a random time of every sample's straight path from noise to data.

    x_t = t data + (1 - t) noise, target data - noise, t = sigmoid(N(0, 1)) (logit-normal), labels dropped to the null
    class with chance label_dropout.

    Args:
        model: (x, t, y) → (velocity, state).
        data: (B, channels, height, width) float32, the clean samples.
        labels: (B,) int64.
        num_classes: also the index of the null class.
        label_dropout: between 0 and 1.
        generator: on the data's device; None is torch's default one.

    Returns:
        The loss, a float32 scalar.
    """
    batch, device = data.shape[0], data.device
    t = torch.randn(batch, generator=generator, device=device).sigmoid()
    noise = torch.randn(data.shape, generator=generator, device=device)
    dropped = torch.rand(batch, generator=generator, device=device) < label_dropout
    labels = labels.masked_fill(dropped, num_classes)
    along = t.view(-1, 1, 1, 1)
    velocity, _ = model(along * data + (1 - along) * noise, t, labels)
    return nn.functional.mse_loss(velocity.float(), data - noise)
