"""The model: `reference` defines it, `fused` runs it on ddt_kernels."""

from typing import TYPE_CHECKING

from ddt_fast.lazy import lazy_names

if TYPE_CHECKING:
    from ddt_fast.model.fused import FusedDDT
    from ddt_fast.model.reference import DDT

__all__ = ["DDT", "FusedDDT"]

__getattr__, __dir__ = lazy_names(__name__, {"ddt_fast.model.fused": ["FusedDDT"], "ddt_fast.model.reference": ["DDT"]})
