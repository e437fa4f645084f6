"""The model: `reference` defines it."""

from ddt_fast.model.reference import DDT

__all__ = ["DDT"]
