"""How commands start and end: options are read before anything slow is imported, and Ctrl-C ends them at any time."""

import os
import signal
import subprocess
import sys

import pytest

from ddt_fast.__main__ import COMMANDS

HEAVY = ("torch", "numpy", "diffusers", "transformers", "triton", "matplotlib", "sklearn", "scipy", "gradio", "PIL")
PROBE = """
import runpy, sys
code, sys.argv = None, ["-m", *sys.argv[2:]]
try:
    runpy.run_module(sys.orig_argv[sys.orig_argv.index("--") + 1], run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code
print("code", code, "imported", *(name for name in HEAVY if name in sys.modules))
"""


def imported(*command: str) -> str:
    """Run a command of the package; its exit code, and the slow packages that it imported."""
    code = PROBE.replace("HEAVY", str(HEAVY))
    run = subprocess.run([sys.executable, "-c", code, "--", *command], capture_output=True, text=True)
    return run.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_slow(command):
    assert imported(f"ddt_fast.{command}", "--help") == "code 0 imported"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("", ),
        ("train", "--no-such-option"),
        ("train", "--preset", "none"),
        ("train", "--training.max_steps", "many"),
        ("train", "--sampling.num_steps", "-1"),
        ("sample", "--num-steps", "ten"),
        ("sample", "--num-steps", "-5"),
        ("sample", "--num-images", "0"),
        ("sample", "--guidance-scale", "nan"),
        ("sample", "--memory-budget", "lots"),
        ("sample", "--checkpoint", ""),
        ("evaluate", "--metrics", "none"),
        ("evaluate", "--output", "scores.txt"),
        ("convert",),
        ("convert", "a", "b", "--preset", "digits", "--config", "c"),
        ("cache_latents", "--images", "a"),
        ("cache_latents", "--images", "a", "--output", "a/b"),
        ("sharing", "--num-samples", "0"),
        ("tune_sampler", "--num-steps", "10", "--num-samples", "0"),
        ("demo", "--port", "0"),
        ("demo", "--host", "no.such.address.invalid"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_options_import_nothing_slow(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, *options = arguments
    module = f"ddt_fast.{command}" if command else "ddt_fast.__main__"
    assert imported(module, *options) == "code 2 imported"


def hears_interrupts() -> None:
    """In a new process: a shell's background jobs, and their children, are started deaf to interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


MOMENTS = (
    "ddt_fast.config",
    "jsonargparse",
    "ddt_fast.presets",
    "torch._C",
    "torch.nn",
    "ddt_fast.evaluation.statistics",
    "img/s",
)
"""Modules that have just been imported, in this order, and the progress bar."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_at_any_time_ends_a_command_in_one_line(moment, tmp_path):
    command = ["-X", "importtime", "-m", "ddt_fast.sample", "--num-images", "50000", "--output-dir", str(tmp_path)]
    run = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=hears_interrupts,
    )
    told = b""
    while f" {moment}\n".encode() not in told and f"{moment}]".encode() not in told:
        told += (read := os.read(run.stderr.fileno(), 1 << 16))
        assert read, told
    run.send_signal(signal.SIGINT)
    lines = run.communicate(timeout=60)[1].decode().replace("\r", "\n").splitlines()
    ours = [line for line in lines if line.strip() and "img/s" not in line and not line.startswith("import time:")]
    assert (run.returncode, ours) == (130, ["interrupted"])


def test_an_interrupt_that_an_extension_module_would_swallow_ends_the_command(tmp_path):
    (tmp_path / "swallows.py").write_text("try:\n    import slow\nexcept KeyboardInterrupt:\n    pass\n")
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('ran on')\n")
    code = "import sys; sys.argv = ['-m']; import ddt_fast; from ddt_fast.command import run_command\n"
    code += "def main():\n    import swallows\nrun_command(main)\n"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        preexec_fn=hears_interrupts,
    )
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "interrupted\n")


def test_importing_the_library_leaves_interrupts_alone():
    code = "import signal, ddt_fast; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, preexec_fn=hears_interrupts).stdout == b"True\n"
