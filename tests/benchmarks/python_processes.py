"""Python commands on this checkout, in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_python(*command: str, paths: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` in the repository's root, on one thread; paths: folders to import from first."""
    folders = [str(folder) for folder in (*paths, ROOT, ROOT / "kernels")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
