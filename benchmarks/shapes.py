"""Where benchmarks run and on what sizes: DDT-XL/2's in bf16 on a GPU, small ones in fp32 on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@dataclass(frozen=True)
class Shape:
    """B images of `side` x `side` tokens, C channels, H heads, F wide in the MLP."""

    name: str
    batch: int
    side: int
    channels: int
    heads: int
    width: int

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def head_dim(self) -> int:
        return self.channels // self.heads

    @property
    def activations(self) -> tuple[int, int, int]:
        return self.batch, self.tokens, self.channels

    def __str__(self) -> str:
        return f"{self.name} B {self.batch} N {self.tokens} C {self.channels} {dtype_name(DTYPE)}"


SHAPES = (
    [Shape("XL/2 256 px", 128, 16, 1152, 16, 3072), Shape("XL/2 512 px", 32, 32, 1152, 16, 3072)]
    if ON_GPU
    else [Shape("small", 4, 16, 288, 4, 768)]
)


def randn(generator: torch.Generator, *size: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Normal numbers on the generator's device, drawn in fp32."""
    return torch.randn(*size, generator=generator, device=generator.device).to(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
