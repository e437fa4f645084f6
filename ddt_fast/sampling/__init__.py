"""Sampling: `plan` turns settings into steps, `engine` runs them, `refresh` finds the best steps to refresh the encoder
at."""

from typing import TYPE_CHECKING

from ddt_fast.lazy import lazy_names

if TYPE_CHECKING:
    from ddt_fast.sampling.engine import Sampler, sample
    from ddt_fast.sampling.plan import SamplingPlan
    from ddt_fast.sampling.refresh.search import optimal_refresh_steps

__all__ = ["Sampler", "SamplingPlan", "optimal_refresh_steps", "sample"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ddt_fast.sampling.engine": ["Sampler", "sample"],
        "ddt_fast.sampling.plan": ["SamplingPlan"],
        "ddt_fast.sampling.refresh.search": ["optimal_refresh_steps"],
    },
)
