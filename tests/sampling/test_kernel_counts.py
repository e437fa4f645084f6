"""How many kernels a step launches: what the host must do at every step without CUDA graphs."""

import re
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddt_fast import DDT, DDTConfig, FusedDDT, SamplingConfig
from ddt_fast.sampling import Sampler

KERNELS_IN = {"swiglu_mlp": 2}  # the dual GEMM, and the one after it
DOCS = Path(__file__).parents[2] / "docs" / "sampling.md"


class Launches(TorchDispatchMode):
    """Counts the kernels that a GPU would run: an operation that makes or changes data is one, unless KERNELS_IN knows
    better; views and allocations are none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def memory(values):
            return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}

        before = memory((args, kwargs))
        made = function(*args, **(kwargs or {}))
        name = function.name().split("::")[1].split(".")[0]
        if (memory(made) - before or function._schema.is_mutable) and not name.startswith(("empty", "new_empty")):
            self.count += KERNELS_IN.get(name, 1)
        return made


@torch.no_grad()
def test_the_table_in_the_documentation():
    """Of a model as deep as XL/2; its width does not matter."""
    model = FusedDDT.from_reference(DDT(DDTConfig(4, 2, 32, 2, 28, 22, num_classes=10)))
    sampler = Sampler(model, SamplingConfig(refresh_every=6), 2, 8, 8)
    counts = {}
    for kind in dict.fromkeys(sampler.kinds):
        sampler.buffers.rewind()
        with Launches() as launches:
            sampler._advance(kind)
        counts["refresh" if kind.encode else "reuse", kind.guided] = launches.count
    rows = re.findall(r"\| (refresh|reuse): [\w ]+ \| (\d+) \| (\d+) \|", DOCS.read_text())
    documented = {(kind, guided): int(n) for kind, *both in rows for guided, n in zip((True, False), both, strict=True)}
    assert counts == documented
