"""Which steps refresh the encoder: `probe` compares the states of all steps, `search` finds the best steps, `schedules`
keeps them beside the checkpoint."""

from ddt_fast.sampling.refresh.probe import Probe, probe_calls, probe_states
from ddt_fast.sampling.refresh.schedules import resolve_refresh_steps, schedule_cache_path
from ddt_fast.sampling.refresh.search import (
    optimal_refresh_schedule,
    optimal_refresh_steps,
    step_errors,
    uniform_refresh_steps,
)

__all__ = [
    "Probe",
    "optimal_refresh_schedule",
    "optimal_refresh_steps",
    "probe_calls",
    "probe_states",
    "resolve_refresh_steps",
    "schedule_cache_path",
    "step_errors",
    "uniform_refresh_steps",
]
