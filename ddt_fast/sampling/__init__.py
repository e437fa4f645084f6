"""Sampling: settings become a plan (`plan`), the engine executes it (`engine`); `refresh` finds the best steps at which
to refresh the encoder."""

from ddt_fast.sampling.engine import Sampler, sample
from ddt_fast.sampling.plan import SamplingPlan
from ddt_fast.sampling.refresh import optimal_refresh_steps

__all__ = ["Sampler", "SamplingPlan", "optimal_refresh_steps", "sample"]
