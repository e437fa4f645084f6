"""Sampling: settings become a plan, the engine executes it."""

from ddt_fast.sampling.engine import Sampler, sample
from ddt_fast.sampling.plan import SamplingPlan

__all__ = ["Sampler", "SamplingPlan", "sample"]
