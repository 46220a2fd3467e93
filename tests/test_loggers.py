"""The loggers of train/train.py: one W&B run over all starts, and failures that stop nothing.

W&B's own client talks to a loopback server that keeps a run as W&B does: rows of history at
offsets, cut by a rewind. W&B's own servers are not tried here.

pytest tests/test_loggers.py
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny import ROOT, load_script

KEY = "k" * 40
POST = "a post that nobody outside may read"
CONTRACT = {
    "arguments": {"learning_rate": 5e-3, "train_file": "train.jsonl"},
    "base_model": {"repo": "alice/base", "revision": "0" * 40},
    "dataset": {"file": "train.jsonl"},
    "training": {"wandb_run_id": "run4tests"},
}
# One start of a training in a process of its own: one logged point per step, a checkpoint's
# memory at step 5, and the post on the terminal and the command line. With `full` the points go
# through the Trainer's own callbacks, which takes the import of torch.
START = """
import argparse, json, sys, time
sys.path.insert(0, sys.argv[1])
from tiny import load_script
contract, remembered, first, last, full, stay = json.loads(sys.argv[2])
train = load_script("train/train.py")
args = argparse.Namespace(run_name=None, hub_model_id="alice/hsd-lora", output_dir=None)
if full:
    import torch, transformers
    from transformers.integrations import WandbCallback
    settings = transformers.TrainingArguments(sys.argv[3], report_to="none", use_cpu=True)
    layer = torch.nn.Linear(1, 1)
    trainer = transformers.Trainer(layer, settings, callbacks=[WandbCallback])
reached = train.start_wandb(args, contract, remembered)
print(sys.argv[4], flush=True)
if full:
    train.guard_loggers(trainer, first, reached)
    state, handler = trainer.state, trainer.callback_handler
    handler.on_train_begin(settings, state, trainer.control)
for step in range(first + 1, last + 1):
    if full:
        state.global_step = step
        handler.on_log(settings, state, trainer.control, {"loss": step / 10})
    else:
        sys.modules["wandb"].log({"train/loss": step / 10, "train/global_step": step})
    if step == 5:
        print("memory", json.dumps(train.logger_state()), flush=True)
while stay:
    time.sleep(1)
print("trained", flush=True)
"""


class Server(ThreadingHTTPServer):
    """One W&B run: `rows` of history, `config`, `summary` and the `bodies` of all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rows: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.bodies: list[str] = []
        self.project, self.name, self.refuses = None, None, False

    def steps(self) -> list[int]:
        return [row["train/global_step"] for row in self.rows]

    def run(self) -> dict[str, Any]:
        """The run as W&B's API describes it."""
        project = {"id": "p", "name": self.project, "entity": {"id": "e", "name": "alice"}}
        return {
            "id": "b",
            "name": self.name,
            "displayName": "shown",
            "project": project,
            "config": json.dumps(self.config),
            "historyLineCount": len(self.rows),
            "historyTail": json.dumps([json.dumps(row) for row in self.rows[-1:]]),
            "summaryMetrics": json.dumps(self.summary),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }

    def answer(self, operation: str, values: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL operation; KeyError for one that this server does not know."""
        if operation == "Viewer":
            return {"viewer": {"id": "u", "entity": "alice", "username": "alice", "flags": "{}"}}
        if operation == "RunResumeStatus":
            return {"model": {"id": "p", "bucket": self.run() if self.name else None}}
        if operation == "UpsertBucket":
            inserted, self.name = self.name is None, values["name"]
            self.project = values["project"]
            self.config = json.loads(values["config"] or "null") or self.config
            return {"upsertBucket": {"bucket": self.run(), "inserted": inserted}}
        if operation == "RewindRun" and not self.refuses:
            self.rows = [row for row in self.rows if row["_step"] <= values["metricValue"]]
            return {"rewindRun": {"rewoundRun": self.run()}}
        raise KeyError(operation)

    def stream(self, files: dict[str, Any]) -> None:
        """Take lines of a run's files at their offsets."""
        for name, chunk in files.items():
            lines = [json.loads(line) for line in chunk["content"]]
            if name == "wandb-history.jsonl":
                self.rows[chunk["offset"] :] = lines
            if name == "wandb-summary.json":
                self.summary = lines[-1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        content, reply = {}, {}
        if "json" in self.headers.get("Content-Type", ""):
            content = json.loads(body)
            self.server.bodies.append(body.decode())
        if self.path.endswith("/file_stream"):
            self.server.stream(content.get("files") or {})
        elif "query" in content:
            operation = re.search(r"(?:query|mutation)\s+(\w+)", content["query"])[1]
            try:
                reply = {"data": self.server.answer(operation, content.get("variables") or {})}
            except KeyError:
                reply = {"data": None, "errors": [{"message": f"{operation} is not enabled"}]}
        self.reply(200, json.dumps(reply).encode())

    def do_PUT(self) -> None:
        self.reply(404, b"")

    do_GET = do_PUT

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as started:
        threading.Thread(target=started.serve_forever, daemon=True).start()
        yield started
        started.shutdown()


@pytest.fixture(scope="module")
def train() -> ModuleType:
    return load_script("train/train.py")


def environment(folder: Path, url: str, **more: str) -> dict[str, str]:
    """An environment without this machine's W&B account: its variables, netrc and settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own = {"HOME": str(folder), "WANDB_DIR": str(folder), "WANDB_BASE_URL": url}
    # W&B's client otherwise sends only every 15 seconds.
    more["WANDB__FILE_STREAM_TRANSMIT_INTERVAL"] = "0.2"
    return kept | own | {"WANDB_CONFIG_DIR": str(folder / "config")} | more


def start(
    folder: Path,
    url: str,
    remembered: dict[str, Any] | None = None,
    steps: tuple[int, int] = (0, 8),
    full: bool = False,
    kill_when: Callable[[], bool] | None = None,
    **variables: str,
) -> tuple[str, dict[str, Any]]:
    """Run one start; return what it printed and the memory of its checkpoint at step 5.

    With `kill_when` it stays at its last step until that holds, and is killed there.
    """
    plan = json.dumps([CONTRACT, remembered or {}, *steps, full, kill_when is not None])
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(ROOT / "tests"), plan, str(folder / "out"), POST],
            env=environment(folder, url, **variables),
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            if kill_when:
                deadline = time.monotonic() + 120
                while not kill_when() and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.2)
            else:
                process.wait(300)
        finally:
            process.kill()
            process.wait()
    output = log.read_text(encoding="utf-8")
    assert kill_when or (process.returncode == 0 and "trained" in output), output
    memory = re.search(r"^memory (.*)$", output, re.M)
    return output, json.loads(memory[1]) if memory else {}


def url_of(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


# --- W&B -------------------------------------------------------------------------------------


def test_resumed_run_is_rewound_to_the_checkpoint(server: Server, tmp_path: Path) -> None:
    def sent() -> bool:
        return 8 in server.steps()

    _, memory = start(tmp_path, url_of(server), kill_when=sent, WANDB_API_KEY=KEY)
    assert server.steps() == list(range(9))
    assert memory == {"wandb_run_id": "run4tests", "wandb_step": 5}
    before = server.rows[:6]
    output, later = start(tmp_path, url_of(server), memory, (5, 10), WANDB_API_KEY=KEY)
    assert server.steps() == list(range(11))
    assert server.rows[:6] == before
    assert [row["_step"] for row in server.rows] == list(range(11))
    assert (server.name, server.project) == ("run4tests", "hate-speech-detector")
    assert "cannot" not in output and later == {}


def test_no_post_no_key_and_no_path_reach_wandb(server: Server, tmp_path: Path) -> None:
    def git(*command: str) -> None:
        subprocess.run(["git", "-C", tmp_path, *command], check=True)

    (tmp_path / "posts.txt").write_text("nothing yet\n", encoding="utf-8")
    git("init", "-q")
    git("remote", "add", "origin", f"https://alice:{KEY}@example.org/posts")
    git("add", "posts.txt")
    git("-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-q", "-m", "Posts")
    (tmp_path / "posts.txt").write_text(POST, encoding="utf-8")
    output, _ = start(tmp_path, url_of(server), full=True, WANDB_API_KEY=KEY)
    sent = "".join(server.bodies)
    assert POST in output and '"program":"train/train.py"' in sent
    assert POST not in sent and KEY not in sent and str(tmp_path) not in sent
    assert "example.org" not in sent and not list(tmp_path.rglob("*.patch"))
    config = {name: entry["value"] for name, entry in server.config.items() if name != "_wandb"}
    identity = {key: CONTRACT[key] for key in ("base_model", "dataset")}
    assert config == identity | CONTRACT["arguments"]


def test_refused_rewind_appends_only_new_points(server: Server, tmp_path: Path) -> None:
    _, memory = start(tmp_path, url_of(server), WANDB_API_KEY=KEY)
    server.refuses = True
    output, _ = start(tmp_path, url_of(server), memory, (5, 10), True, WANDB_API_KEY=KEY)
    assert server.steps() == list(range(11))
    assert "W&B cannot rewind its run: failed to rewind run" in output
    assert "has the points up to step 8" in output


def test_start_over_before_any_checkpoint_adds_only_new_points(
    server: Server, tmp_path: Path
) -> None:
    start(tmp_path, url_of(server), None, (0, 4), WANDB_API_KEY=KEY)
    start(tmp_path, url_of(server), None, (0, 6), True, WANDB_API_KEY=KEY)
    assert server.steps() == list(range(7))


def test_offline_parts_become_one_run_when_synced(server: Server, tmp_path: Path) -> None:
    def written() -> bool:
        return any(b"0.8" in file.read_bytes() for file in tmp_path.rglob("*.wandb"))

    output, memory = start(tmp_path, url_of(server), kill_when=written, WANDB_MODE="offline")
    assert "W&B is offline: wandb sync" in output
    start(tmp_path, url_of(server), memory, (5, 10), WANDB_MODE="offline")
    assert server.bodies == []
    parts = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    for part in parts:
        subprocess.run(
            [sys.executable, "-m", "wandb", "sync", part],
            env=environment(tmp_path, url_of(server), WANDB_API_KEY=KEY),
            check=True,
            capture_output=True,
            timeout=120,
        )
    assert server.steps() == list(range(11))


def test_without_a_key_the_log_is_offline(server: Server, tmp_path: Path) -> None:
    output, memory = start(tmp_path, url_of(server), JOB_ID="job")
    assert "no W&B key" in output and "it ends with this Job" in output
    assert server.bodies == [] and memory["wandb_step"] == 5


def test_a_logged_in_user_needs_no_variable(server: Server, tmp_path: Path) -> None:
    netrc = tmp_path / ".netrc"
    host = url_of(server).removeprefix("http://")
    netrc.write_text(f"machine {host}\n  login user\n  password {KEY}\n", encoding="utf-8")
    netrc.chmod(0o600)
    start(tmp_path, url_of(server))
    assert server.steps() == list(range(9))


def test_the_users_variables_win(server: Server, tmp_path: Path) -> None:
    mine = {"WANDB_PROJECT": "mine", "WANDB_RUN_ID": "myrun", "WANDB_API_KEY": KEY}
    start(tmp_path, url_of(server), {"wandb_run_id": "run4tests", "wandb_step": 3}, **mine)
    assert (server.name, server.project) == ("myrun", "mine")
    assert "RewindRun" not in "".join(server.bodies)


@pytest.mark.parametrize("variable", [{"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}])
def test_disabled_wandb_writes_nothing(
    server: Server, tmp_path: Path, variable: dict[str, str]
) -> None:
    output, memory = start(tmp_path, url_of(server), WANDB_API_KEY=KEY, **variable)
    assert server.bodies == [] and memory == {} and "W&B" not in output
    assert not list(tmp_path.rglob("*.wandb"))


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param(False, marks=pytest.mark.slow, id="closed port"),
        pytest.param(True, id="no answer"),
    ],
)
def test_a_server_that_is_away_means_offline(tmp_path: Path, answers: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if answers:
            listener.listen(100)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        fast = {"WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "3"}
        output, memory = start(tmp_path, url, **fast)
    assert "W&B cannot start" in output and "W&B is offline: wandb sync" in output
    assert memory["wandb_step"] == 5


def test_a_setting_that_wandb_refuses_stops_nothing(server: Server, tmp_path: Path) -> None:
    output, memory = start(tmp_path, url_of(server), full=True, WANDB_MODE="nonsense")
    assert "W&B cannot be set up" in output and memory == {}
    assert output.count("Wandb failed and is left out") == 1


# --- all loggers -----------------------------------------------------------------------------


def small_trainer(folder: Path, report_to: str, steps: int) -> Any:
    """A Trainer of a linear model that logs each step and saves every second one."""
    import torch
    import transformers

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": ((self.layer(x) - labels) ** 2).mean()}

    rows = [{"x": [float(number)], "labels": [0.0]} for number in range(8)]
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        report_to=report_to,
        max_steps=steps,
        logging_steps=1,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="loss",
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,
        disable_tqdm=True,
        use_cpu=True,
    )
    stopping = transformers.EarlyStoppingCallback(50)
    return transformers.Trainer(
        Model(), settings, train_dataset=rows, eval_dataset=rows, callbacks=[stopping]
    )


def test_a_raising_logger_is_named_once_and_left_out(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import wandb

    # No W&B run is open, so each of its calls raises; another file's test may have left one.
    wandb.finish()
    trainer = small_trainer(tmp_path, "wandb", 4)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    train.guard_loggers(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    assert [type(callback) for callback in trainer.callback_handler.callbacks] == kinds
    assert capsys.readouterr().out.count("Wandb failed and is left out") == 1
    resumed = small_trainer(tmp_path, "wandb", 6)
    train.guard_loggers(resumed, 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 6
    assert "EarlyStoppingCallback" in resumed.state.stateful_callbacks


def test_tensorboard_shows_each_step_once(train: ModuleType, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = small_trainer(tmp_path, "tensorboard", 7)
    train.guard_loggers(trainer)
    trainer.train()
    resumed = small_trainer(tmp_path, "tensorboard", 9)
    train.guard_loggers(resumed, 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 10))


def test_a_logger_that_cannot_work_is_refused(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from transformers.integrations import integration_utils

    ready = integration_utils.get_available_reporting_integrations()
    missing = sorted(integration_utils.INTEGRATION_TO_CALLBACK.keys() - set(ready))[0]
    for names, hint in (
        (["wandbb"], "--report_to wandbb is none of azure_ml"),
        (["wandb", "none"], "all and none stand alone"),
        ([missing], f"uv run --with {missing.replace('_', '-')} train/train.py"),
    ):
        with pytest.raises(SystemExit) as end:
            train.check_loggers(argparse.Namespace(report_to=names))
        assert end.value.code == 2 and hint in capsys.readouterr().err
    for flags, names in (
        ([], ["wandb"]),
        (["--output_dir", "out"], ["wandb", "tensorboard"]),
        (["--output_dir", "out", "--report_to", "none"], ["none"]),
    ):
        assert train.parse_args(flags).report_to == names
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "transformers.integrations", None)
            train.check_loggers(argparse.Namespace(report_to=names))
    args = argparse.Namespace(report_to=["all"])
    train.check_loggers(args)
    assert args.report_to == ready and "wandb" in ready
