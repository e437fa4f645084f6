"""Sampling: settings become a plan, the engine executes it."""

from ddt_fast.sampling.engine import Sampler, sample
from ddt_fast.sampling.plan import SamplingPlan
from ddt_fast.sampling.refresh import optimal_refresh_steps

__all__ = ["Sampler", "SamplingPlan", "optimal_refresh_steps", "sample"]
