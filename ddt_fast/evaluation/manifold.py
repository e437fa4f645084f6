"""Improved precision and recall (arXiv 1904.06991): the share of the samples in the manifold of the real images, and
the share of the real images in the manifold of the samples.

Distances come from float32 products, a block at a time, which is fast but loses digits to cancellation. Wherever those
digits could matter, the distance is computed again from differences in float64: for any block size, the result is that
of brute force in float64.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddt_fast.checks import require_int
from ddt_fast.evaluation.inception import full_float32
from ddt_fast.wording import plural

_BLOCK = 4096
_EXACT_NUMBERS = 1 << 25  # float64 differences held at a time: 256 MiB


def precision_recall(
    samples: NDArray[np.floating] | Tensor, reference: NDArray[np.floating] | Tensor, k: int = 3
) -> tuple[float, float]:
    """The share of the samples within the reference's manifold, and of the reference within the samples' manifold.

    A set's manifold is the union of balls around its members, each reaching to the k-th nearest other member (published
    numbers have k=3 and 10,000 reference images). The computation runs on the tensors' device.

    Args:
        samples: (N, D) features.
        reference: (M, D) features.
        k: neighbours.

    Returns:
        Precision and recall, each in [0, 1].

    Raises:
        ValueError: k is below 1, there are k or fewer rows, D differs, or numbers are not finite.
    """
    given, real = _features("samples", samples, k), _features("reference", reference, k)
    if given.shape[1] != real.shape[1]:
        raise ValueError(f"samples have {plural(given.shape[1], 'number')} each, the reference {real.shape[1]}")
    real = real.to(given.device)
    centre = real.double().mean(0)
    with full_float32():
        inside_real, inside_given = _inside(_Manifold(given, centre, k), _Manifold(real, centre, k))
    return inside_real.double().mean().item(), inside_given.double().mean().item()


def _features(name: str, values: NDArray[np.floating] | Tensor, k: int) -> Tensor:
    features = torch.as_tensor(values)
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"{name} are {features.dtype} {tuple(features.shape)}; expected floating point (N, D)")
    require_int("k", k, 1)
    if len(features) <= k:
        raise ValueError(f"{len(features)} {name} have no {k}-th nearest neighbour; expected {k + 1} or more")
    if not features.isfinite().all():
        raise ValueError(f"{name} hold features that are not finite")
    return features


class _Manifold:
    """Balls around the members of a set.

    Attributes:
        features: (N, D).
        centred: (N, D) float32, moved to a common centre: distances stay the same, and less cancels in products.
        norms: (N,) squared norms of `centred`.
        radii: (N,) float32, squared distance to the k-th nearest other member, up to rounding.
    """

    def __init__(self, features: Tensor, centre: Tensor, k: int) -> None:
        self.features, self.k = features, k
        self.centred = (features - centre).float()
        self.norms = self.centred.square().sum(1)
        count = len(features)
        nearest = self.centred.new_full((count, k), torch.inf)

        def take(rows: slice, block: Tensor) -> None:
            found = block.topk(min(k, block.shape[1]), dim=1, largest=False).values
            nearest[rows] = torch.cat([nearest[rows], found], 1).topk(k, dim=1, largest=False).values

        for i in range(0, count, _BLOCK):
            for j in range(i, count, _BLOCK):
                rows, columns = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
                block = _distances(self, rows, self, columns)
                if i == j:
                    block.fill_diagonal_(torch.inf)
                else:
                    take(columns, block.T.contiguous())
                take(rows, block)
        self.radii = nearest[:, -1].clone()
        self._exact_radii = torch.full((count,), torch.nan, dtype=torch.float64, device=features.device)

    def rounding(self, norms: Tensor) -> Tensor:
        """The possible error of a float32 distance between members and points with these squared norms: many standard
        deviations of the rounding errors of two products of D terms."""
        unit = 16 * torch.finfo(torch.float32).eps * self.features.shape[1] ** 0.5
        return unit * (norms + self.norms.max())

    def exact_radii(self, members: Tensor) -> Tensor:
        """(len(members),) float64 squared radii."""
        unknown = members[self._exact_radii[members].isnan()].unique()
        for part in unknown.split(_BLOCK // 16):
            # Whatever rounding did to the radius and to a distance: none of the k nearest lies beyond.
            reach = self.radii[part] + 2 * self.rounding(self.norms[part])
            near = _distances(self, part, self, slice(None)) <= reach[:, None]
            for member, row in zip(part.tolist(), near, strict=True):
                rows = self.features[row].split(self.rows_at_once)
                distances = torch.cat([_exact_distances(some, self.features[member]) for some in rows])
                self._exact_radii[member] = distances.kthvalue(self.k + 1).values  # the nearest is the member itself
        return self._exact_radii[members]

    @property
    def rows_at_once(self) -> int:
        """How many rows to compare exactly at a time."""
        return max(1, _EXACT_NUMBERS // self.features.shape[1])


def _inside(first: _Manifold, second: _Manifold) -> tuple[Tensor, Tensor]:
    """Which members of the first lie in a ball of the second, (N,) bool, and the other way round, (M,) bool."""
    # Squared distance to the centre minus squared radius, for the deepest ball: negative is inside.
    margin1, margin2 = torch.full_like(first.norms, torch.inf), torch.full_like(second.norms, torch.inf)
    for i in range(0, len(margin1), _BLOCK):
        for j in range(0, len(margin2), _BLOCK):
            rows, columns = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
            block = _distances(first, rows, second, columns)
            margin1[rows] = torch.minimum(margin1[rows], (block - second.radii[columns]).amin(1))
            margin2[columns] = torch.minimum(margin2[columns], block.sub_(first.radii[rows, None]).amin(0))
    return _settle(first, second, margin1), _settle(second, first, margin2)


def _settle(points: _Manifold, balls: _Manifold, margin: Tensor) -> Tensor:
    """(N,) bool: which points are inside a ball, given margins that rounding may have moved."""
    inside = margin <= 0
    doubt = balls.rounding(points.norms)
    for rows in (margin.abs() <= doubt).nonzero().flatten().split(_BLOCK // 16):
        inside[rows] = False
        gaps = _distances(points, rows, balls, slice(None)) - balls.radii
        for pairs in (gaps <= doubt[rows, None]).nonzero().split(balls.rows_at_once):
            point, ball = rows[pairs[:, 0]], pairs[:, 1]
            distances = _exact_distances(points.features[point], balls.features[ball])
            inside[point[distances <= balls.exact_radii(ball)]] = True
    return inside


def _distances(a: _Manifold, rows: slice | Tensor, b: _Manifold, columns: slice) -> Tensor:
    """(rows, columns) float32 squared distances, up to rounding."""
    products = torch.addmm(b.norms[columns], a.centred[rows], b.centred[columns].T, alpha=-2)
    return products.add_(a.norms[rows, None])


def _exact_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of rows that broadcast, in float64; equal rows have distance 0."""
    return (a.double() - b.double()).square().sum(-1)
