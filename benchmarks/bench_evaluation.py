"""Scoring: Inception features per second, precision and recall; and latents decoded per second.

Peers are what the usual scripts do: the network with its batch norms apart, and compiled; all distances at once. The
network's weights are random, of the size of trained ones; its time does not depend on them.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import DEVICE, ON_GPU, Case, Inputs, Run, Variant, Workload, forward, randn
from benchmarks.peers import COMPILE
from ddt_fast.autoencoder import decode_latents
from ddt_fast.evaluation.inception import Inception, full_float32
from ddt_fast.evaluation.manifold import precision_recall
from ddt_kernels import Cost

PLAIN, OURS = "batch norms apart, NCHW", "ddt_fast, batch norms folded"


def inception_case(batch: int, detail: str, peer: str) -> Case:
    def inputs() -> Inputs:
        generator, size = torch.Generator(DEVICE).manual_seed(0), (batch, 3, 256, 256)
        return Inputs((torch.randint(256, size, generator=generator, device=DEVICE, dtype=torch.uint8),))

    def build() -> Workload:
        exact = random_inception()
        cost = Cost(4 * 24_000_000, batch * flops_per_image(exact))

        def variant(make: Callable[[Inception], Callable[..., Any]], ours: bool = False) -> Variant:
            return Variant(lambda: features_of(make(copy.deepcopy(exact).to(DEVICE, torch.float32))), ours)

        variants = {
            PLAIN: variant(lambda network: network),
            OURS: variant(Inception.fold, ours=True),
            COMPILE: variant(lambda network: torch.compile(network, dynamic=False)),
        }
        right = features_of(exact.to(DEVICE, torch.float64))
        return Workload(inputs, {name: variants[name] for name in names}, right, torch.float32, cost, images=batch)

    names, size = (PLAIN, peer), f"B {batch}, 256 px, float32"
    return Case("evaluation", f"Inception features{detail}", size, names, build, seconds=3.0)


def features_of(network: Callable[..., Any]) -> Run:
    """A network's features, without TF32."""

    @full_float32()
    def features(images: Tensor) -> Any:
        return network(images)

    return forward(features)


def random_inception() -> Inception:
    """Weights under which activations neither vanish nor blow up."""
    generator = torch.Generator().manual_seed(0)
    network = Inception()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
    return network


def flops_per_image(network: Inception) -> int:
    """A multiply-add being 2."""
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 299, 299, dtype=torch.uint8))
    return counter.get_total_flops()


def features(number: int, count: int, dims: int) -> Tensor:
    """Correlated rows, on the CPU."""
    generator = torch.Generator().manual_seed(number)
    mixing = torch.randn(dims, dims, generator=generator) / dims**0.5
    return torch.randn(count, dims, generator=generator) @ mixing + number / 10


def all_distances(samples: Tensor, real: Tensor) -> Tensor:
    """Precision and recall from all distances at once, in float64."""
    shares = []
    for points, manifold in ((samples.double(), real.double()), (real.double(), samples.double())):
        radii = torch.cdist(manifold, manifold).kthvalue(4).values  # the nearest is the member itself
        shares.append((torch.cdist(points, manifold) <= radii).any(1).double().mean())
    return torch.stack(shares)


def precision_recall_case(count: int, dims: int) -> Case:
    names = ("all distances in float64, at once", "ddt_fast")

    def inputs() -> Inputs:
        return Inputs(tuple(features(i, count, dims).to(DEVICE) for i in range(2)))

    def ours(samples: Tensor, real: Tensor) -> Tensor:
        return torch.tensor(precision_recall(samples, real), dtype=torch.float64)

    def build() -> Workload:
        right = forward(all_distances)
        made = {names[0]: Variant(lambda: right), names[1]: Variant(lambda: forward(ours), ours=True)}
        cost = Cost(2 * 4 * count * dims, 3 * 2 * count * count * dims)
        return Workload(inputs, made, right, torch.float32, cost, tolerance=1e-9)

    size = f"{count} of {dims} features each"
    return Case("evaluation", "precision and recall", size, names, build, seconds=2.0)


def decode_case(batch: int, side: int) -> Case:
    """The autoencoder of the released models, with random weights."""
    names, dtype = ("diffusers' AutoencoderKL, all at once", "ddt_fast"), torch.float32

    def inputs() -> Inputs:
        return Inputs((randn(torch.Generator(DEVICE).manual_seed(0), batch, 4, side, side, dtype=dtype),))

    def build() -> Workload:
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            missing: dict[str, Variant | str] = dict.fromkeys(
                names, "diffusers is not installed: pip install diffusers"
            )
            return Workload(inputs, missing, lambda x: x.tensors, dtype)
        channels = (128, 256, 512, 512)
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae: Any = AutoencoderKL(block_out_channels=channels, layers_per_block=2, **kinds)
        vae = vae.to(DEVICE).requires_grad_(False)
        exact = copy.deepcopy(vae).double()
        made = {
            names[0]: Variant(lambda: forward(lambda z: vae.decode(z / vae.config.scaling_factor).sample)),
            names[1]: Variant(lambda: forward(partial(decode_latents, vae)), ours=True),
        }
        right = forward(lambda z: exact.decode(z.double() / vae.config.scaling_factor).sample)
        # PyTorch's convolutions may run in TF32.
        return Workload(inputs, made, right, dtype, images=batch, tolerance=1e-2)

    return Case("evaluation", "VAE decoding", f"B {batch}, {8 * side} px, float32", names, build, seconds=2.0)


BATCH = 64 if ON_GPU else 4
CASES = [
    inception_case(BATCH, "", OURS),
    decode_case(*((16, 32) if ON_GPU else (1, 8))),
    precision_recall_case(*((10_000, 2048) if ON_GPU else (1500, 512))),
    inception_case(BATCH, ", compiled", COMPILE),
]


def test_evaluation(case: Case, variant: str, replay: Callable[[Case, str], None]) -> None:
    replay(case, variant)
