"""REPA, representation alignment (arXiv 2410.06940): projected tokens of an early block are aligned with DINOv2's."""

import math

from torch import Tensor, nn
from torch.nn import functional


class Projector(nn.Sequential):
    """The MLP from a block's tokens to DINOv2's: (B, N, hidden_size) → (B, N, features).

    Its state_dict holds {0,2,4}.{weight,bias}, as released checkpoints do below `diffusion_trainer.proj.0.`.
    """

    def __init__(self, hidden_size: int, features: int = 768) -> None:
        first, second = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, hidden_size)
        super().__init__(first, nn.SiLU(), second, nn.SiLU(), nn.Linear(hidden_size, features))


def repa_loss(projected: Tensor, features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean over tokens of 1 - cosine similarity, computed in float32: a scalar between 0 and 2. ValueError if shapes do
    not match.

    Args:
        projected: (B, N, F) from `Projector`, of N tokens in a grid of (rows, columns).
        features: (B, N', F) from `ddt_fast.dinov2.DinoV2`, a square grid row by row; resized bilinearly if it differs
            from the grid of the tokens.
    """
    rows, columns = grid
    side = math.isqrt(features.shape[1])
    if projected.shape[1] != rows * columns or side * side != features.shape[1]:
        raise ValueError(
            f"{projected.shape[1]} tokens and {features.shape[1]} features per image; "
            f"expected {rows} x {columns} tokens and a square number of features"
        )
    if projected.shape[0] != features.shape[0] or projected.shape[2] != features.shape[2]:
        raise ValueError(f"projected {tuple(projected.shape)} and features {tuple(features.shape)} differ in B or F")
    features = features.float()
    if (side, side) != (rows, columns):
        image = features.transpose(1, 2).unflatten(2, (side, side))
        features = functional.interpolate(image, (rows, columns), mode="bilinear").flatten(2).transpose(1, 2)
    return (1 - functional.cosine_similarity(projected.float(), features, dim=-1)).mean()
