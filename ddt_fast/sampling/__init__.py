"""Sampling: `plan` turns settings into steps, `engine` runs them, `refresh` finds the best steps to refresh the encoder
at."""

from ddt_fast.sampling.engine import Sampler, sample
from ddt_fast.sampling.plan import SamplingPlan
from ddt_fast.sampling.refresh import optimal_refresh_steps

__all__ = ["Sampler", "SamplingPlan", "optimal_refresh_steps", "sample"]
