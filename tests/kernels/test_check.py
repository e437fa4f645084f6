"""`python -m ddt_kernels.check` says of every op whether it is right here and how fast, and keeps it."""

import pytest
import torch

from ddt_kernels import check, launcher, runtime, tuning, verification
from ddt_kernels.verification import Verdict
from test_launcher import gpu  # noqa: F401

SMALL = check.Sizes(batch=1, tokens=16, heads=2, head_dim=72, width=48, side=8)
