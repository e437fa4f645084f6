"""The model: `reference` defines it, `fused` runs it on ddt_kernels."""

from ddt_fast.model.fused import FusedDDT
from ddt_fast.model.reference import DDT

__all__ = ["DDT", "FusedDDT"]
