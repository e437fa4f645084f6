"""What goes on record with outputs is true of this checkout."""

import subprocess
from pathlib import Path

import pytest

from ddt_fast import provenance

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_commit_is_this_checkouts():
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    changes = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert provenance.source_commit() == {
        "commit": head.stdout.strip(),
        "uncommitted_changes": bool(changes.stdout.strip()),
    }


def test_an_installed_package_has_no_commit(tmp_path, monkeypatch):
    (tmp_path / "site-packages" / "ddt_fast").mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "site-packages" / "ddt_fast" / "provenance.py"))
    assert provenance.source_commit() == {"commit": None, "uncommitted_changes": None}
