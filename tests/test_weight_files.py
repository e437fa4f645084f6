"""Weight files from elsewhere: every reader names the file, what is wrong with it and what is expected, runs nothing in
it, and never passes on torch's advice to switch the protection off."""

import io
import pickle

import pytest
import torch
from safetensors.torch import save

from ddt_fast import load_model
from ddt_fast.data.latent_dataset import Shard, read_channel_stats
from ddt_fast.evaluation.inception_weights import load_inception
from ddt_fast.model.lightning import read_lightning


class Calls:
    """Ends the process when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def saved(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


WHOLE = saved({"a": torch.ones(3000)})
OLD = saved({"a": torch.ones(30)}, _use_new_zipfile_serialization=False)
TRUNCATED = "it is truncated"
DAMAGED = {
    "empty": (b"", "it is empty; expected"),
    "text": (b"not found", TRUNCATED),
    "one byte": (b"\x80", TRUNCATED),
    "page": (b"<!DOCTYPE html><html>404", "it is a web page; expected"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a Git LFS pointer"),
    "half": (WHOLE[: len(WHOLE) // 2], "it is truncated; expected"),
    "without the end": (WHOLE[:-10], "it is truncated; expected"),
    "half of an old one": (OLD[: len(OLD) // 2], TRUNCATED),
    "safetensors": (save({"a": torch.ones(3)}), TRUNCATED),
    "calls": (
        saved({"a": Calls()}),
        "it holds more than tensors, and was not executed: it would call or make",
    ),
    "a whole module": (saved(torch.nn.Linear(2, 2)), "it would call or make torch.nn.modules.linear.Linear"),
    "bare pickle": (pickle.dumps(Calls()), TRUNCATED),
    "TorchScript": (scripted(), "it is a TorchScript programme, which was not executed"),
}
PICKLES = {
    "pth": (load_inception, "Inception weights file", "pt_inception-2015-12-05-6726825d.pth"),
    "pt": (lambda file: read_channel_stats(file, 4), "channel statistics", "mean and std, 4 numbers each"),
    "ckpt": (read_lightning, "checkpoint", "a Lightning .ckpt"),
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("suffix", PICKLES)
def test_damaged_pickles_are_refused(tmp_path, recwarn, suffix, kind):
    read, what, expected = PICKLES[suffix]
    content, problem = DAMAGED[kind]
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=what) as refusal:
        read(file)
    message = str(refusal.value)
    assert message.startswith(f"{what} {file} ")
    if suffix == "ckpt" and kind in ("calls", "a whole module"):
        assert "was not executed" in message
    else:
        assert f"cannot be read: {problem}" in message or f"executed: {problem}" in message
        assert expected in message
    for advice in ("weights_only", "safe_globals", "trust the source", "\n"):
        assert advice not in message
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["empty", "text", "page", "pointer", "half", "cut", "pickle"])
@pytest.mark.parametrize(("read", "what"), [(load_model, "checkpoint"), (Shard, "shard")])
def test_damaged_safetensors_are_refused(tmp_path, read, what, kind):
    whole = save({"a": torch.ones(30)})
    others = {
        "half": (whole[:60], TRUNCATED),
        "cut": (whole[:-4], TRUNCATED),
        "pickle": (WHOLE, "it is a pickle, which"),
    }
    content, problem = (DAMAGED | others)[kind]
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=problem) as refusal:
        read(file)
    assert str(refusal.value).startswith(f"{what} {file} cannot be read: ")
    assert str(refusal.value).endswith("; expected a whole .safetensors file")
