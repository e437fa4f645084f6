"""Python commands on this checkout, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_python(*command: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` in the repository's root, on one thread; path: a folder to import from first."""
    paths = [str(folder) for folder in (path, ROOT, ROOT / "kernels") if folder is not None]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
