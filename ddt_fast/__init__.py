"""ddt-fast: train DDT (Decoupled Diffusion Transformer, arXiv 2504.05741), sample from it, score its samples."""

from ddt_fast.config import DDTConfig, SamplingConfig
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.model.weights import load_model
from ddt_fast.sampling import sample

__version__ = "0.1.0"

__all__ = ["DDT", "DDTConfig", "FusedDDT", "SamplingConfig", "load_model", "sample"]
