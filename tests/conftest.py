import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

KERNEL_TESTS = Path(__file__).parent / "kernels"
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# The tensors of these tests are too small to share: more threads would only wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start


@pytest.hookimpl(trylast=True)  # after -k and -m have selected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what cannot run here, with one visible skip for all cases of a GPU test and for each interpreter file."""
    groups: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        missing = _missing(item)
        if missing is not None:
            groups.setdefault(missing, []).append(item)
    for (reason, _), cases in groups.items():
        count = f" ({len(cases)} cases)" if len(cases) > 1 else ""
        cases[0].add_marker(pytest.mark.skip(reason=reason + count))
    dropped = {id(item) for cases in groups.values() for item in cases[1:]}
    items[:] = [item for item in items if id(item) not in dropped]


def _missing(item: pytest.Item) -> tuple[str, str] | None:
    """(what keeps the item from running, the test or file whose cases share a skip); None if nothing does."""
    if KERNEL_TESTS / "interpreter" in item.path.parents and not INTERPRETING:
        return "needs TRITON_INTERPRET=1, in a process of its own", str(item.path)
    if item.get_closest_marker("gpu") is None:
        return None
    test = item.nodeid.partition("[")[0]
    if not torch.cuda.is_available():
        return "needs a CUDA device", test
    if INTERPRETING and KERNEL_TESTS in item.path.parents:
        return "TRITON_INTERPRET=1 replaces the kernels under test", test
    return None


@pytest.fixture(autouse=True)
def _kernels_unverified_on_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests on a GPU compare kernels with the reference themselves, on many shapes."""
    if request.node.get_closest_marker("gpu") is not None:
        monkeypatch.setenv("DDT_KERNELS", "triton")


@pytest.fixture(scope="session", autouse=True)
def _temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Gathers in pytest's own folder, which is cleared, what others leave in the system's folder for temporary files:
    torchrun's logs, gradio_client's folder for each file, what a killed process leaves. torch's compiled code stays
    where the next run finds it."""
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", compiled)
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patch.setattr(tempfile, "tempdir", None)
        yield
