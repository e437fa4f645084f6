"""The training log: what is written, what a resumed run keeps, and TensorBoard and W&B as they really write."""

import http.server
import json
import os
import struct
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from PIL import Image

from ddt_fast.training.log import LOG_NAMES, TrainingLog, read_log

NAN = float("nan")


def steps_of(folder: Path) -> list[int]:
    return [row["step"] for row in read_log(folder / "log.jsonl")]


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((8, 6))


def test_a_line_is_on_disk_at_once_and_is_json_whatever_the_numbers(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    with TrainingLog(tmp_path / "new" / "run", settings={}) as log:
        log.write(100, {"loss": 0.5, "learning_rate": 1e-4})
        log.write(200, {"loss": NAN, "grad_norm": float("inf"), "learning_rate": -float("inf")})
        lines = (tmp_path / "new/run/log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert list(rows[0]) == ["step", "loss", "learning_rate", "seconds"]
    assert rows[0]["loss"] == 0.5
    assert [rows[1][name] for name in ("step", "loss", "grad_norm", "learning_rate")] == [200, None, None, None]
    assert 0 <= rows[0]["seconds"] <= rows[1]["seconds"] < 60


def test_a_resumed_run_drops_later_lines_and_a_torn_one_and_continues_the_clock(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [f'{{"step": {step}, "loss": {step / 7}, "seconds": {1000 * step}}}\n' for step in (10, 20, 30)]
    path.write_text("".join(lines) + '{"step": 40, "los')
    with TrainingLog(tmp_path, settings={}, first_step=20) as log:
        assert path.read_text() == "".join(lines[:2])
        log.write(30, {"loss": NAN})
    assert steps_of(tmp_path) == [10, 20, 30]
    assert 20_000 <= read_log(path)[-1]["seconds"] < 20_060
    assert os.listdir(tmp_path) == ["log.jsonl"]
    # A torn line goes, even if its step comes before the checkpoint.
    with path.open("a") as file:
        file.write('{"step": 1')
    TrainingLog(tmp_path, settings={}, first_step=30).close()
    assert steps_of(tmp_path) == [10, 20, 30]
    assert path.read_text().endswith("}\n")


def test_a_new_run_replaces_an_earlier_log_and_saves_images(tmp_path):
    (tmp_path / "log.jsonl").write_text("an earlier run's, damaged\nmore\n")
    with TrainingLog(tmp_path, settings={}) as log:
        log.write(1, {"loss": 1.0})
        log.image(100, "grid", picture())
    assert steps_of(tmp_path) == [1]
    assert os.listdir(tmp_path / "samples") == ["grid_step_0000100.png"]
    with Image.open(tmp_path / "samples/grid_step_0000100.png") as image:
        assert image.tobytes() == picture().tobytes()


@pytest.mark.parametrize("line", ["damaged", "[]", '{"loss": 1}', '{"step": "1"}'])
def test_damage_elsewhere_is_an_error_and_nothing_is_lost(tmp_path, line):
    text = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: not a line of a training log"):
        TrainingLog(tmp_path, settings={}, first_step=5)
    assert (tmp_path / "log.jsonl").read_text() == text


def tensorboard_events(folder: Path):
    """As TensorBoard's own pages read them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def test_tensorboard_reads_what_was_written_and_forgets_what_a_resumed_run_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    with TrainingLog(tmp_path, tensorboard=True, settings={}) as log:
        for step in (10, 20, 30):
            log.write(step, {"loss": step / 8, "grad_norm": NAN})
        log.image(20, "samples", picture())
        # Before close: a kill must not lose what the next run does not repeat.
        assert [event.step for event in tensorboard_events(tmp_path).Scalars("loss")] == [10, 20, 30]
    with TrainingLog(tmp_path, tensorboard=True, settings={}, first_step=20) as log:
        log.write(30, {"loss": -1.0})
    events = tensorboard_events(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 1.25), (20, 2.5), (30, -1.0)]
    assert [event.step for event in events.Scalars("grad_norm")] == [10, 20]
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (20, 8, 6)


def test_a_watcher_that_fails_is_left_out_and_the_run_continues(tmp_path, monkeypatch, capsys):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    def full(*_):
        raise OSError("no space left")

    with TrainingLog(tmp_path, tensorboard=True, settings={}) as log:
        monkeypatch.setattr(tensorboard.SummaryWriter, "add_scalar", full)
        log.write(1, {"loss": 1.0})
        log.write(2, {"loss": 1.0})
    assert steps_of(tmp_path) == [1, 2]
    said = "warning: TensorBoard failed and is switched off for the rest of the run: no space left\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("module", "found", "options", "message"),
    [
        ("torch.utils.tensorboard", None, {"tensorboard": True}, "pip install tensorboard"),
        ("wandb", None, {"wandb": "ddt"}, "pip install wandb"),
        # A folder called wandb imports as an empty package.
        ("wandb", types.ModuleType("wandb"), {"wandb": "ddt"}, "pip install wandb"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, found, options, message):
    monkeypatch.setitem(sys.modules, module, found)
    with pytest.raises(ValueError, match=message):
        TrainingLog(tmp_path, settings={}, **options)


WANDB_RUNS = """
import sys
from pathlib import Path
from PIL import Image
from ddt_fast.training.log import TrainingLog
settings = {"model": {"hidden_size": 64}}
for first_step in map(int, sys.argv[2:]):
    try:
        with TrainingLog(Path(sys.argv[1]), wandb="ddt-test", settings=settings, first_step=first_step) as log:
            for step in range(first_step + 10, 40, 10):
                log.write(step, {"loss": step / 8, "grad_norm": float("nan")})
            log.image(30, "samples", Image.new("RGB", (8, 6)))
            if first_step == 0:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    except ValueError as error:
        print("ValueError:", error)
"""


def wandb_runs(folder: Path, *first_steps: int, **variables: str):
    """Runs in a process of their own: W&B reads its variables once, and keeps a service beside."""
    pytest.importorskip("wandb")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(folder.parent), "NETRC": str(folder.parent / "netrc"), **variables}
    result = subprocess.run(
        [sys.executable, "-c", WANDB_RUNS, str(folder), *map(str, first_steps)],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return result


def wandb_records(file: Path):
    """The records of a W&B run file: protobufs framed as LevelDB's log, after seven bytes of header."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def wandb_content(folder: Path) -> list[dict]:
    """The offline runs in a folder, oldest first: id, project, config, rows by step, exit code."""
    runs = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        run: dict = {"rows": {}}
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run" and "id" not in run:
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                run |= {"id": record.run.run_id, "project": record.run.project, "config": config}
            elif kind == "history":
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                run["rows"][record.history.step.num] = items
            elif kind == "exit":
                run["exit_code"] = record.exit.exit_code
        runs.append(run)
    return runs


@pytest.mark.slow
def test_wandb_offline_holds_the_run_continues_it_under_its_id_and_begins_another_under_a_new_one(tmp_path):
    folder = tmp_path / "run"
    wandb_runs(folder, 0, 20, 0, WANDB_MODE="offline")
    first, second, third = wandb_content(folder)
    assert first["id"] == second["id"] != third["id"]
    assert (folder / "wandb_run.txt").read_text() == third["id"] + "\n"
    assert first["project"] == "ddt-test"
    assert first["config"]["model"] == {"hidden_size": 64}
    assert [(step, row["loss"]) for step, row in first["rows"].items()] == [(10, "1.25"), (20, "2.5"), (30, "3.75")]
    assert list(second["rows"]) == [30]
    assert "samples" in " ".join(first["rows"][30])
    assert list(folder.glob("wandb/offline-run-*/files/media/images/samples_30_*.png"))
    # The first one ended by an exception.
    assert (first["exit_code"], second["exit_code"]) == (1, 0)
    assert {path.name for path in folder.iterdir()} <= set(LOG_NAMES)


@pytest.mark.slow
def test_wandb_without_a_login_says_so_in_one_line(tmp_path):
    result = wandb_runs(tmp_path / "run", 0)
    assert result.stdout.startswith("ValueError: Weights & Biases is not logged in here; run `wandb login`")
    assert "WANDB_MODE=offline" in result.stdout
    assert result.stdout.count("\n") == 1


@pytest.fixture
def refusing_server():
    """The address of a server that refuses everything, at once (501: it has no method): W&B waits a quarter of a minute
    for one that is not there."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_wandb_that_does_not_answer_stops_a_new_run_and_lets_a_resumed_one_continue(tmp_path, refusing_server):
    (tmp_path / "wandb_run.txt").write_text("abcd1234\n")
    (tmp_path / "log.jsonl").write_text('{"step": 10}\n{"step": 20}\n')
    result = wandb_runs(tmp_path, 20, 0, WANDB_BASE_URL=refusing_server, WANDB_API_KEY="0" * 40)
    assert "warning: Weights & Biases cannot be reached" in result.stderr
    (run,) = wandb_content(tmp_path)
    assert (run["id"], list(run["rows"]), run["exit_code"]) == ("abcd1234", [30], 0)
    assert steps_of(tmp_path) == [10, 20, 30]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("ValueError")]
    assert "ValueError: Weights & Biases cannot be reached" in line
    assert "set WANDB_MODE=offline" in line
