"""The fault table: training is killed, refused and lied to, resubmitted, and must end as if not.

    python tests/bench_faults.py                       # every row, about half an hour
    python tests/bench_faults.py sigterm disk_full     # these rows
    python tests/bench_faults.py --stall               # what a checkpoint and a resume cost

Every row runs train/train.py as its users do, against tests/hub.py, in a repo of its own. It raises
unless the run resumed or was refused cleanly, the final weights and the logged curve equal (==)
those of one uninterrupted run, and every checkpoint at the repo's head is what its manifest says.
Printed is a Markdown table; the exit code is 1 if a row failed. Needs requirements.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote
from urllib.request import Request, urlopen

import tiny
from hub import Fault, Hub

TESTS = Path(__file__).parent
TRAIN = TESTS.parent / "train" / "train.py"
STEPS, EVERY = 24, 4  # steps of a run, steps between two checkpoints
PATIENCE_S = 300  # for any one event; the start alone takes 20 s of CPU time
# A clock that is one day ahead, for a process that finds this file on its PYTHONPATH. The method of
# the class itself is replaced, because compiled modules crash on a subclass in its place. Only the
# date is shifted: with another time.time() every token that the Hub hands out looks expired.
TOMORROW = """
import ctypes
import datetime
import gc

real = datetime.datetime.now


def now(cls, tz=None):
    return real(tz) + datetime.timedelta(days=1)


gc.get_referents(datetime.datetime.__dict__)[0]["now"] = classmethod(now)
ctypes.pythonapi.PyType_Modified(ctypes.py_object(datetime.datetime))
"""
DATED_TEMPLATE = (
    '<|start|>system\nCurrent date: {{ strftime_now("%Y-%m-%d") }}<|end|>\n' + tiny.CHAT_TEMPLATE
)


class Failure(Exception):
    """A row's claim does not hold."""


class Skipped(Exception):
    """A row cannot run here; the message says what it needs."""


class Outcome(NamedTuple):
    """One line of the table; `lost` counts steps that were trained twice."""

    died_at: str
    lost: int
    resumed_from: str


UNHURT = Outcome("did not die", 0, "-")
ROWS: dict[str, Callable[[Bench, str], Outcome]] = {}


def row(function: Callable[[Bench, str], Outcome]) -> Callable[[Bench, str], Outcome]:
    """Register a row; its docstring is its name in the table."""
    ROWS[function.__name__] = function
    return function


def expect(claim: bool, message: str) -> None:
    """Raise a Failure unless the claim holds."""
    if not claim:
        raise Failure(message)


def wait_until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    """Poll every millisecond, so that a kill hits the moment it is meant for."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(f"waited {PATIENCE_S} s for {what()}")
        time.sleep(0.001)


# --- processes -------------------------------------------------------------------------------


class Trainer:
    """train/train.py as a session of its own; `lines` are its output with the time of each."""

    def __init__(self, hub: Hub | HubProcess, repo: str, flags: list[str], env: dict) -> None:
        self.hub, self.repo, self.flags = hub, repo, flags
        self.lines: list[tuple[float, str]] = []
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(TRAIN), *flags],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    def found(self, pattern: str) -> re.Match[str] | None:
        """Return the last line's match of a pattern that begins at the line's start."""
        matches = (re.match(pattern, line) for _, line in reversed(self.lines))
        return next((match for match in matches if match), None)

    def wait_for(self, pattern: str) -> None:
        """Wait for a line that begins with the pattern."""

        def arrived() -> bool:
            # Asked in this order, the last lines of an ended process are not missed.
            ended = not self.reader.is_alive()
            if self.found(pattern):
                return True
            expect(not ended, f"the trainer ended before {pattern!r}:\n{self.tail()}")
            return False

        wait_until(arrived, lambda: f"{pattern!r} after\n{self.tail()}")

    def tail(self) -> str:
        return "\n".join(f"    {line}" for _, line in self.lines[-15:])

    @property
    def step(self) -> int:
        """The last step that it reported."""
        match = self.found(r"(?:step|paused at step) (\d+)\b")
        return int(match[1]) if match else 0

    @property
    def resumed(self) -> int:
        """The step that it began with."""
        match = self.found(r"resuming from checkpoint-(\d+) of ")
        expect(bool(match or self.found("no checkpoint in ")), f"no banner:\n{self.tail()}")
        return int(match[1]) if match else 0

    def signal(self, number: int) -> None:
        """Signal the whole group, as a terminal and the kernel do."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """kill -9 of the trainer and its workers; return when they are gone."""
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait()
        self.reader.join()

    def end(self, *codes: int) -> int:
        """Wait for the end and return the exit code, which must be one of these."""
        try:
            code = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise Failure(f"no end within {PATIENCE_S} s:\n{self.tail()}") from None
        self.reader.join()
        expect(code in codes, f"exit code {code}, not {codes}:\n{self.tail()}")
        expect(not self.found("Traceback"), f"a traceback:\n{self.tail()}")
        return code


class HubProcess:
    """tests/hub.py as a process that can be killed and started again at its port and root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.token = ""

    def __enter__(self) -> HubProcess:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def start(self) -> None:
        """Serve; returns when requests are taken."""
        command = [sys.executable, str(TESTS / "hub.py"), "--root", str(self.root)]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)], stdout=subprocess.PIPE, text=True
        )
        values = [self.process.stdout.readline().strip().partition("=")[2] for _ in range(2)]
        expect(values[0] == self.endpoint, f"the Hub did not start: {values}")
        self.token = values[1]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def add_fault(self, **fields: Any) -> None:
        body = json.dumps(fields).encode()
        urlopen(Request(f"{self.endpoint}/_hub/faults", body, method="POST")).close()

    def env(self, home: Path) -> dict[str, str]:
        env = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token, "HF_HOME": str(home)}
        return {**env, "HF_HUB_DISABLE_TELEMETRY": "1"}


# --- what lies on the Hub --------------------------------------------------------------------


def head_files(root: Path, repo: str) -> dict[str, Path]:
    """The files of main's head with the bytes that the Hub sends for each; {} without a repo."""
    folder = root / "models" / repo / ".hub"
    if not (folder / "repo.json").exists():
        return {}
    oid = json.loads((folder / "repo.json").read_text())["branches"]["main"]
    files = json.loads((folder / "commits" / f"{oid}.json").read_text())["files"]
    return {path: root / "blobs" / entry["sha256"] for path, entry in files.items()}


def check_head(root: Path, repo: str) -> list[int]:
    """Return the head's checkpoints, newest first, after checking each against its manifest."""
    files = head_files(root, repo)
    steps = {int(step) for path in files for step in re.findall(r"^checkpoint-(\d+)/", path)}
    for step in steps:
        folder = f"checkpoint-{step}/"
        inside = {p.removeprefix(folder): b for p, b in files.items() if p.startswith(folder)}
        expect("manifest.json" in inside, f"{folder} at the head of {repo} has no manifest.json")
        manifest = json.loads(inside.pop("manifest.json").read_text())
        expect(manifest["step"] == step, f"{folder}manifest.json is of step {manifest['step']}")
        expect(inside.keys() == manifest["files"].keys(), f"{folder} holds {sorted(inside)}")
        for name, said in manifest["files"].items():
            content = inside[name].read_bytes()
            whole = said["size"] == len(content)
            whole = whole and said["sha256"] == hashlib.sha256(content).hexdigest()
            expect(whole, f"{folder}{name} at the head of {repo} is damaged")
    if "contract.json" in files:
        named = json.loads(files["contract.json"].read_text())["training"]["step"]
        expect(named in {0, *steps}, f"the contract names step {named}, there are {sorted(steps)}")
    return sorted(steps, reverse=True)


def outcome_of(root: Path, repo: str) -> tuple[bytes, list[dict[str, Any]]]:
    """The final adapter's bytes and the logged curve without clock times."""
    newest = check_head(root, repo)[0]
    files = head_files(root, repo)
    contract = json.loads(files["contract.json"].read_text())
    expect(contract["training"]["state"] == "complete", f"{repo} is not complete")
    history = json.loads(files[f"checkpoint-{newest}/trainer_state.json"].read_text())
    kept = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")
    curve = [{key: entry[key] for key in kept if key in entry} for entry in history["log_history"]]
    return files["adapter_model.safetensors"].read_bytes(), curve


# --- the bench -------------------------------------------------------------------------------


class Bench:
    """Tiny base models and posts in `folder`, one Hub, and the uninterrupted runs made so far."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder, self.hub = folder, hub
        self.trainers: list[Trainer] = []
        self.references: dict[tuple[str, ...], Trainer] = {}
        folder.mkdir(parents=True, exist_ok=True)
        rows = tiny.post_rows()
        tiny.write_jsonl(folder / "train.jsonl", rows[:96])
        tiny.write_jsonl(folder / "validation.jsonl", rows[96:112])
        tiny.save_model(folder / "base")
        tiny.save_model(folder / "dated", chat_template=DATED_TEMPLATE)
        self.flags = [
            *("--model_name_or_path", str(folder / "base")),
            *("--train_file", str(folder / "train.jsonl")),
            *("--validation_file", str(folder / "validation.jsonl")),
            *("--max_steps", str(STEPS), "--save_steps", str(EVERY), "--logging_steps", "1"),
            *("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2"),
            *("--warmup_steps", "2", "--learning_rate", "5e-3", "--report_to", "none"),
            *("--early_stopping_patience", "9"),
        ]

    def start(self, repo: str, *flags: str, hub: HubProcess | None = None, **env: str) -> Trainer:
        """Start the training of a repo on a machine of its own, which has nothing cached."""
        machine = self.folder / "machines" / str(len(self.trainers))
        (machine / "tmp").mkdir(parents=True)
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HSD_", "WANDB_")) and name != "JOB_ID"
        }
        host = hub or self.hub
        environment = {**inherited, **host.env(home=machine / "home")}
        environment |= {"TMPDIR": str(machine / "tmp"), "OMP_NUM_THREADS": "1", **env}
        trainer = Trainer(host, repo, [*self.flags, "--hub_model_id", repo, *flags], environment)
        self.trainers.append(trainer)
        return trainer

    def again(self, trainer: Trainer, **env: str) -> Trainer:
        """Start the same command on another machine."""
        hub = trainer.hub if isinstance(trainer.hub, HubProcess) else None
        more = trainer.flags[len(self.flags) + 2 :]
        return self.start(trainer.repo, *more, hub=hub, **env)

    def reference(self, *run: str) -> Trainer:
        """The uninterrupted run with these further flags, made at the first call."""
        if run not in self.references:
            trainer = self.start(f"alice/reference-{len(self.references)}", *run)
            trainer.end(0)
            self.references[run] = trainer
        return self.references[run]

    def check_end(self, trainer: Trainer, *run: str) -> None:
        """Hold what a finished training left against the uninterrupted run of the flags `run`."""
        weights, curve = outcome_of(trainer.hub.root, trainer.repo)
        expected = outcome_of(self.hub.root, self.reference(*run).repo)
        expect(curve == expected[1], "the logged curve differs from the uninterrupted run's")
        expect(weights == expected[0], "the final weights differ from the uninterrupted run's")

    def resubmit(self, dead: Trainer, *run: str, newest: int | None = None, **env: str) -> Outcome:
        """Start a dead trainer's command again; it must resume from the newest checkpoint.

        `newest` is its step where the head was damaged on purpose, otherwise the head says it.
        """
        if newest is None:
            newest = max(check_head(dead.hub.root, dead.repo), default=0)
        second = self.again(dead, **env)
        second.end(0)
        expect(second.resumed == newest, f"resumed from {second.resumed}, not {newest}")
        self.check_end(second, *run)
        start = f"checkpoint-{newest}" if newest else "the start"
        return Outcome(f"step {dead.step}", dead.step - newest, start)

    def fault(self, path: str, method: str = "POST", **fields: Any) -> Fault:
        """Add a fault to the Hub and return it; its `times` counts down as it strikes."""
        fault = Fault(path=path, method=method, **fields)
        with self.hub.lock:
            self.hub.faults.append(fault)
        return fault

    def run(self, name: str) -> Outcome:
        """Run one row; what it left running or broken is ended and mended."""
        try:
            return ROWS[name](self, f"alice/{name.replace('_', '-')}")
        finally:
            self.hub.clear_faults()
            for trainer in self.trainers:
                trainer.kill()

    def api(self) -> Any:
        """The Hub's client, for what somebody else does to a repo."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.hub.endpoint, token=self.hub.token)

    @contextlib.contextmanager
    def job(self) -> Iterator[str]:
        """The id of a job that the Jobs API shows as RUNNING meanwhile."""
        api = self.api()
        job = api.run_job(image="python:3.12", command=["sleep", "900"], flavor="cpu-basic")
        wait_until(
            lambda: api.inspect_job(job_id=job.id).status.stage == "RUNNING", lambda: "the job"
        )
        try:
            yield job.id
        finally:
            api.cancel_job(job_id=job.id)


# --- rows: the trainer dies ------------------------------------------------------------------


@row
def kill_step(bench: Bench, repo: str) -> Outcome:
    """kill -9 during a step"""
    first = bench.start(repo)
    first.wait_for("checkpoint-8 is on the Hub")
    first.wait_for("step 10/")
    first.kill()
    return bench.resubmit(first)


@row
def kill_save(bench: Bench, repo: str) -> Outcome:
    """kill -9 during the local save"""
    for attempt in range(5):
        out = bench.folder / f"kill-save-{attempt}"
        first = bench.start(f"{repo}-{attempt}", "--output_dir", str(out))
        wait_until(lambda out=out: (out / "checkpoint-8").exists(), lambda: "a folder checkpoint-8")
        first.kill()
        saved = [{p.name for p in (out / f"checkpoint-{n}").iterdir()} for n in (4, 8)]
        if saved[0] - saved[1]:
            return bench.resubmit(first)
    raise Failure("five kills all came after the save")


@row
def kill_again(bench: Bench, repo: str) -> Outcome:
    """kill -9 of the first and of the second start"""
    first = bench.start(repo)
    first.wait_for("checkpoint-4 is on the Hub")
    first.wait_for("step 7/")
    first.kill()
    check_head(bench.hub.root, repo)
    second = bench.again(first)
    second.wait_for("checkpoint-12 is on the Hub")
    second.wait_for("step 15/")
    second.kill()
    return bench.resubmit(second)


def kill_at(bench: Bench, repo: str, request: str) -> Outcome:
    """Kill the trainer while the Hub holds back its first such request after checkpoint-4."""
    first = bench.start(repo)
    first.wait_for("checkpoint-4 is on the Hub")
    held = bench.fault(request, delay_s=30, status=503)
    wait_until(lambda: held.times == 0, lambda: f"a request to {request}")
    first.kill()
    return bench.resubmit(first)


@row
def kill_upload(bench: Bench, repo: str) -> Outcome:
    """kill -9 during the upload"""
    return kill_at(bench, repo, "/v1/xorbs/")


@row
def kill_before_commit(bench: Bench, repo: str) -> Outcome:
    """kill -9 between upload and commit"""
    return kill_at(bench, repo, f"{repo}/commit/main$")


@row
def kill_after_commit(bench: Bench, repo: str) -> Outcome:
    """kill -9 right after the commit"""
    first = bench.start(repo)
    first.wait_for("checkpoint-4 is on the Hub")
    wait_until(
        lambda: "checkpoint-8/manifest.json" in head_files(bench.hub.root, repo),
        lambda: "checkpoint-8",
    )
    first.kill()
    return bench.resubmit(first)


def stop_by(bench: Bench, repo: str, stop: Callable[[Trainer], None], *flags: str) -> Outcome:
    """Ask the trainer to stop in mid-run: it must lose nothing and exit 75."""
    first = bench.start(repo, *flags)
    first.wait_for("step 10/")
    stop(first)
    first.end(75)
    bench.hub.clear_faults()
    outcome = bench.resubmit(first)
    expect(outcome.lost == 0, f"{outcome.lost} steps lost")
    return outcome


@row
def sigterm(bench: Bench, repo: str) -> Outcome:
    """SIGTERM"""
    return stop_by(bench, repo, lambda trainer: trainer.process.terminate())


@row
def sigterm_twice(bench: Bench, repo: str) -> Outcome:
    """SIGTERM, and again 1 s later during the push"""

    def stop(trainer: Trainer) -> None:
        bench.fault(f"{repo}/commit/main$", delay_s=3, times=None)
        trainer.process.terminate()
        time.sleep(1)
        trainer.process.terminate()

    return stop_by(bench, repo, stop)


@row
def sighup(bench: Bench, repo: str) -> Outcome:
    """SIGHUP (the terminal or the SSH line is gone)"""
    return stop_by(bench, repo, lambda trainer: trainer.signal(signal.SIGHUP))


@row
def ctrl_c(bench: Bench, repo: str) -> Outcome:
    """Ctrl-C"""
    return stop_by(bench, repo, lambda trainer: trainer.signal(signal.SIGINT))


@row
def deadline(bench: Bench, repo: str) -> Outcome:
    """deadline (--stop_after)"""
    lines = bench.reference().lines
    stop_after = round(1.5 * (lines[-1][0] - bench.reference().began)) + 10

    # Suspended until the deadline has passed: the tiny model would be done long before.
    def stop(trainer: Trainer) -> None:
        trainer.signal(signal.SIGSTOP)
        time.sleep(max(trainer.began + stop_after - time.monotonic(), 0))
        trainer.signal(signal.SIGCONT)

    return stop_by(bench, repo, stop, "--stop_after", f"{stop_after}s")


@row
def disk_full(bench: Bench, repo: str) -> Outcome:
    """full disk, met while writing adapter, tokenizer or optimizer"""
    if os.geteuid() != 0:
        raise Skipped("needs root, to mount a small tmpfs")
    files = head_files(bench.hub.root, bench.reference().repo)
    sizes = {Path(p).name: b.stat().st_size for p, b in files.items() if f"-{STEPS}/" in p}
    room = sum(sizes.values())
    for name in ("adapter_model.safetensors", "tokenizer.json", "optimizer.pt"):
        # Room for one checkpoint, and for the second up to the middle of this file.
        limit = room + sizes[name] // 2
        room += sizes[name]
        out = bench.folder / f"disk-of-{limit}"
        out.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={limit // 1024}k", "tmpfs", str(out)]
        if subprocess.run(mount).returncode:
            raise Skipped("this root may not mount a tmpfs")
        try:
            first = bench.start(f"{repo}-{limit}", "--output_dir", str(out / "run"))
            first.end(1)
            expect(bool(first.found("error: ")), f"no error message:\n{first.tail()}")
        finally:
            subprocess.run(["umount", str(out)], check=True)
        outcome = bench.resubmit(first)
    return outcome


# --- rows: the Hub fails ---------------------------------------------------------------------


@row
def hub_killed(bench: Bench, repo: str) -> Outcome:
    """Hub killed mid-upload and restarted"""
    with HubProcess(bench.folder / "killed-hub") as hub:
        first = bench.start(repo, hub=hub)
        first.wait_for("checkpoint-4 is on the Hub")
        hub.add_fault(path="/v1/xorbs/", method="POST", kill=True)
        hub.process.wait(PATIENCE_S)
        time.sleep(2)
        hub.start()
        first.end(0)
        bench.check_end(first)
    return UNHURT


@row
def hub_away(bench: Bench, repo: str) -> Outcome:
    """Hub away for 60 s"""
    with HubProcess(bench.folder / "away-hub") as hub:
        first = bench.start(repo, hub=hub)
        first.wait_for("checkpoint-4 is on the Hub")
        hub.kill()
        time.sleep(60)
        hub.start()
        first.end(0)
        bench.check_end(first)
    return UNHURT


@row
def hub_gone(bench: Bench, repo: str) -> Outcome:
    """Hub away for the whole run after the start"""
    with HubProcess(bench.folder / "gone-hub") as hub:
        first = bench.start(repo, "--hub_patience", "10s", hub=hub)
        first.wait_for("step 2/")
        hub.kill()
        first.end(1)
        expect(first.step == STEPS, f"the training ended at step {first.step}")
        expect(bool(first.found(r"checkpoint-\d+ is NOT on the Hub")), first.tail())
        hub.start()
        return bench.resubmit(first)


@row
def sigterm_alone(bench: Bench, repo: str) -> Outcome:
    """SIGTERM while the Hub is away"""
    with HubProcess(bench.folder / "absent-hub") as hub:
        first = bench.start(repo, "--hub_patience", "10s", hub=hub)
        first.wait_for("checkpoint-4 is on the Hub")
        hub.kill()
        first.process.terminate()
        first.end(1)
        expect(bool(first.found("error: stopped at step")), f"no message:\n{first.tail()}")
        hub.start()
        return bench.resubmit(first)


def commit_fault(bench: Bench, repo: str, **fault: Any) -> Outcome:
    """Let the commit of checkpoint-8 meet a fault: the run goes on, and nothing is made twice."""
    first = bench.start(repo)
    first.wait_for("checkpoint-4 is on the Hub")
    struck = bench.fault(f"{repo}/commit/main$", **fault)
    first.end(0)
    expect(struck.times == 0, "the fault did not strike")
    trees = [commit["files"] for commit in bench.hub.commits(repo)]
    expect(all(a != b for a, b in itertools.pairwise(trees)), "a commit was made twice")
    bench.check_end(first)
    return UNHURT


@row
def commit_500(bench: Bench, repo: str) -> Outcome:
    """500 on the commit, twice"""
    return commit_fault(bench, repo, status=500, times=2)


@row
def commit_429(bench: Bench, repo: str) -> Outcome:
    """429 with Retry-After on the commit"""
    return commit_fault(bench, repo, status=429, headers={"Retry-After": "3"})


@row
def commit_412(bench: Bench, repo: str) -> Outcome:
    """412 on the commit"""
    return commit_fault(bench, repo, status=412)


@row
def commit_dropped(bench: Bench, repo: str) -> Outcome:
    """connection dropped before the commit"""
    return commit_fault(bench, repo, drop="before")


@row
def commit_lost(bench: Bench, repo: str) -> Outcome:
    """lost answer: committed, then dropped"""
    return commit_fault(bench, repo, drop="after")


@row
def commit_403(bench: Bench, repo: str) -> Outcome:
    """403 on every commit after the first checkpoint's"""
    first = bench.start(repo, "--hub_patience", "10s")
    first.wait_for("checkpoint-4 is on the Hub")
    bench.fault(f"{repo}/commit/main$", status=403, times=None)
    first.end(2)
    expect(first.step == STEPS, f"the training ended at step {first.step}")
    expect(bool(first.found("error: .*write access")), f"no clear message:\n{first.tail()}")
    bench.hub.clear_faults()
    return bench.resubmit(first)


@row
def foreign_commit(bench: Bench, repo: str) -> Outcome:
    """somebody else commits a file to the repo during the run"""
    first = bench.start(repo)
    first.wait_for("checkpoint-4 is on the Hub")
    bench.api().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=repo)
    first.end(0)
    bench.check_end(first)
    expect("notes.txt" in head_files(bench.hub.root, repo), "the file of somebody else is gone")
    return UNHURT


# --- rows: damage on the Hub -----------------------------------------------------------------


def damaged(bench: Bench, repo: str, damage: Callable[[int], None], named: bool) -> Outcome:
    """Kill a run, damage its newest checkpoint, and resubmit: the one before must be taken."""
    first = bench.start(repo)
    first.wait_for("checkpoint-12 is on the Hub")
    first.kill()
    newest, before = check_head(bench.hub.root, repo)[:2]
    damage(newest)
    outcome = bench.resubmit(first, newest=before)
    second = [trainer for trainer in bench.trainers if trainer.repo == repo][-1]
    line = second.found(rf"checkpoint-{newest} .*: skipped")
    expect(bool(line) or not named, f"checkpoint-{newest} was skipped in silence")
    return outcome


@row
def truncated(bench: Bench, repo: str) -> Outcome:
    """truncated file in the newest checkpoint"""

    def damage(step: int) -> None:
        path = f"checkpoint-{step}/optimizer.pt"
        content = head_files(bench.hub.root, repo)[path].read_bytes()
        bench.api().upload_file(
            path_or_fileobj=content[: len(content) // 2], path_in_repo=path, repo_id=repo
        )

    return damaged(bench, repo, damage, named=True)


@row
def bit_flipped(bench: Bench, repo: str) -> Outcome:
    """one bit flipped in the newest checkpoint, its listed hash unchanged"""
    spoiled: list[tuple[Path, bytes]] = []

    def damage(step: int) -> None:
        blob = head_files(bench.hub.root, repo)[f"checkpoint-{step}/optimizer.pt"]
        content = blob.read_bytes()
        spoiled.append((blob, content))
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 1])
        blob.write_bytes(content[:middle] + flipped + content[middle + 1 :])

    try:
        return damaged(bench, repo, damage, named=True)
    finally:
        # The Hub keeps equal files once: other repos of the bench share these bytes.
        for blob, content in spoiled:
            blob.write_bytes(content)


@row
def newest_deleted(bench: Bench, repo: str) -> Outcome:
    """newest checkpoint deleted"""

    def damage(step: int) -> None:
        bench.api().delete_folder(f"checkpoint-{step}", repo_id=repo)

    return damaged(bench, repo, damage, named=False)


# --- rows: a Job's own restarts --------------------------------------------------------------


def jobs_of_one_step(bench: Bench, repo: str, flags: list[str], **options: Any) -> list[Any]:
    """Run a training of three steps as a Job whose deadline passes at each; return all its jobs."""
    api, run = bench.api(), ["--max_steps", "3"]
    before = {job.id for job in api.list_jobs(namespace="alice")}
    command = [sys.executable, str(TRAIN), *bench.flags, "--hub_model_id", repo, *run]
    api.run_job(
        image="python:3.12",
        command=[*command, "--stop_after", "1s", *flags],
        flavor="cpu-basic",
        namespace="alice",
        secrets={"HF_TOKEN": bench.hub.token},
        env={"OMP_NUM_THREADS": "1"},
        timeout=900,
        **options,
    )

    def jobs() -> list[Any]:
        return [
            job for job in reversed(list(api.list_jobs(namespace="alice"))) if job.id not in before
        ]

    ended = lambda: jobs()[-1].status.stage == "COMPLETED"  # noqa: E731
    wait_until(ended, lambda: f"a completed job: {[job.status for job in jobs()]}")
    weights, curve = outcome_of(bench.hub.root, repo)
    expected = outcome_of(bench.hub.root, bench.reference(*run).repo)
    expect((weights, curve) == expected, "weights or curve differ from the uninterrupted run's")
    check_head(bench.hub.root, repo)
    return jobs()


@row
def attempts(bench: Bench, repo: str) -> Outcome:
    """Job with --attempts 4 pauses at its deadline and is started again by the platform"""
    jobs = jobs_of_one_step(bench, repo, [], attempts=4)
    log = "".join(bench.api().fetch_job_logs(job_id=jobs[0].id, namespace="alice"))
    pauses = re.findall(r"paused at step (\d)", log)
    expect(len(jobs) == 1 and pauses == ["1", "2"], f"{len(jobs)} jobs, paused at {pauses}")
    return Outcome("step 1, 2", 0, "checkpoint-1, -2")


@row
def relay(bench: Bench, repo: str) -> Outcome:
    """Job with --relay 5 --budget 1 hands over to the next at each deadline"""
    jobs = jobs_of_one_step(bench, repo, ["--relay", "5", "--budget", "1"])
    stages = [job.status.stage for job in jobs]
    expect(stages == ["ERROR", "ERROR", "COMPLETED"], f"the jobs ended as {stages}")
    codes = [job.status.message for job in jobs[:2]]
    expect(all("75" in code for code in codes), f"the first two ended with {codes}")
    return Outcome("step 1, 2", 0, "checkpoint-1, -2")


# --- rows: several trainers ------------------------------------------------------------------


def both_at_once(bench: Bench, repo: str, **env: str) -> Outcome:
    """Start two trainers at once: one reaches the end, the other says why it does not."""
    # Slow commits keep the two in each other's way for the whole run.
    bench.fault(f"{repo}/commit/main$", delay_s=1, times=None)
    pair = [bench.start(repo, **env), bench.start(repo, **env)]
    codes = [trainer.end(0, 1) for trainer in pair]
    expect(sorted(codes) == [0, 1], f"exit codes {codes}:\n{pair[0].tail()}\n\n{pair[1].tail()}")
    winner, loser = sorted(pair, key=lambda trainer: trainer.process.returncode)
    expect(bool(loser.found("error: .*(taken|just begun)")), f"no clear message:\n{loser.tail()}")
    bench.check_end(winner)
    start = f"checkpoint-{winner.resumed}" if winner.resumed else "the start"
    return Outcome(f"step {loser.step} (one of two)", 0, f"{start} (the other)")


@row
def two_trainers(bench: Bench, repo: str) -> Outcome:
    """two trainers started at once"""
    return both_at_once(bench, repo)


@row
def same_job_twice(bench: Bench, repo: str) -> Outcome:
    """one job started twice by the platform"""
    with bench.job() as job:
        return both_at_once(bench, repo, JOB_ID=job)


@row
def taken_over(bench: Bench, repo: str) -> Outcome:
    """started again by hand while the first start still trains"""
    first = bench.start(repo)
    first.wait_for("checkpoint-4 is on the Hub")
    first.signal(signal.SIGSTOP)
    second = bench.start(repo)
    second.wait_for("resuming from checkpoint-")
    first.signal(signal.SIGCONT)
    first.end(1)
    expect(bool(first.found("error: .*taken")), f"no clear message:\n{first.tail()}")
    second.end(0)
    bench.check_end(second)
    lost = first.step - second.resumed
    return Outcome(f"step {first.step}", lost, f"checkpoint-{second.resumed} (the second)")


@row
def claimed(bench: Bench, repo: str) -> Outcome:
    """started while another job that is RUNNING trains"""
    with bench.job() as job, bench.job() as other:
        first = bench.start(repo, JOB_ID=job)
        first.wait_for("step 6/")
        first.signal(signal.SIGSTOP)
        second = bench.start(repo, JOB_ID=other)
        second.end(1)
        expect(bool(second.found(f"error: .*{job}")), f"no clear message:\n{second.tail()}")
        first.signal(signal.SIGCONT)
        first.end(0)
        bench.check_end(first)
    return Outcome("refused, exit 1", 0, "-")


# --- rows: the same command, or nearly -------------------------------------------------------


@row
def midnight(bench: Bench, repo: str) -> Outcome:
    """clock past midnight, with gpt-oss's dated template"""
    run = ("--model_name_or_path", str(bench.folder / "dated"))
    first = bench.start(repo, *run)
    first.wait_for("checkpoint-8 is on the Hub")
    first.kill()
    shift = bench.folder / "tomorrow"
    shift.mkdir()
    (shift / "sitecustomize.py").write_text(TOMORROW)
    outcome = bench.resubmit(first, *run, PYTHONPATH=str(shift))
    contract = json.loads(head_files(bench.hub.root, repo)["contract.json"].read_text())
    today, created = contract["rendering"]["date"], contract["created"][:10]
    expect(created > datetime.now(UTC).date().isoformat(), f"created {created}: no shift")
    expect(any(today in piece for piece in contract["rendering"]["pieces"]), "no date in prompts")
    return outcome


@row
def other_shape(bench: Bench, repo: str) -> Outcome:
    """resumed on another batch shape (refused), then as it was"""
    first = bench.start(repo)
    first.wait_for("checkpoint-8 is on the Hub")
    first.kill()
    head = head_files(bench.hub.root, repo)
    shape = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4")
    refused = bench.start(repo, *shape)
    refused.end(2)
    said = "\n".join(line for _, line in refused.lines)
    for name, old, new in (
        ("per_device_train_batch_size", 8, 4),
        ("gradient_accumulation_steps", 2, 4),
    ):
        found = re.search(rf"{name}\W.*\b{old}\b.*\b{new}\b", said)
        expect(bool(found), f"{name} is not named with both values:\n{refused.tail()}")
    expect(head == head_files(bench.hub.root, repo), "the refused start changed the repo")
    return bench.resubmit(first)


@row
def more_steps(bench: Bench, repo: str) -> Outcome:
    """resumed with more steps (allowed)"""
    # With a constant learning rate a longer run begins as a shorter one does.
    run = ("--lr_scheduler_type", "constant", "--max_steps", str(STEPS + 8))
    first = bench.start(repo, *run, "--max_steps", str(STEPS))
    first.wait_for("checkpoint-8 is on the Hub")
    first.kill()
    newest = check_head(bench.hub.root, repo)[0]
    second = bench.start(repo, *run)
    second.end(0)
    expect(second.resumed == newest, f"resumed from {second.resumed}, not {newest}")
    changed = re.compile(rf"\b{STEPS}\b.*\b{STEPS + 8}\b")
    expect(any(changed.search(line) for _, line in second.lines), "the change is not printed")
    bench.check_end(second, *run)
    return Outcome(f"step {first.step}", first.step - newest, f"checkpoint-{newest}")


@row
def finished(bench: Bench, repo: str) -> Outcome:
    """resubmitted after the end"""
    repo = bench.reference().repo
    head = head_files(bench.hub.root, repo)
    second = bench.start(repo)
    second.end(0)
    expect(bool(second.found(f"{repo} is complete at step {STEPS}: nothing to do")), second.tail())
    expect(head == head_files(bench.hub.root, repo), "the finished repo was changed")
    return UNHURT


# --- what it costs ---------------------------------------------------------------------------


def stall(bench: Bench) -> None:
    """Print what a checkpoint of 100 MB and a resume from it cost, with a Hub of 20 MB/s.

    The upload's duration is the Hub's delay of one request of each upload. The stall of a save is
    the time by which the step after it and the steps beside its upload are longer than the median
    of the steps beside none.
    """
    repo, saves, every = "alice/stall", 4, 40
    steps = saves * every + 10
    flags = [
        *("--lora_r", "2048", "--lora_target_modules", "all-linear", "--learning_rate", "1e-4"),
        *("--max_steps", str(steps), "--save_steps", str(every), "--save_minutes", "1000"),
        *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"),
        *("--early_stopping_patience", "0", "--eval_strategy", "no"),
    ]
    bench.fault("/v1/shards", delay_s=5, times=None)
    trainer = bench.start(repo, *flags)
    trainer.wait_for(f"checkpoint-{every * saves} is on the Hub")
    trainer.kill()
    print_stall(trainer, saves, every)
    bench.hub.clear_faults()
    before = len(bench.hub.requests)
    again = bench.start(repo, *flags)
    again.wait_for("step ")
    requests = bench.hub.requests[before:]
    print_resume(bench, repo, again.resumed, requests)
    again.end(0)
    print(again.found("phases: ").string)


def print_stall(trainer: Trainer, saves: int, every: int) -> None:
    """Print the seconds by which saves and uploads lengthen steps, from the lines' times."""
    times, uploaded = {}, {}
    for moment, line in trainer.lines:
        if match := re.match(r"step (\d+)/", line):
            times[int(match[1])] = moment
        elif match := re.match(r"checkpoint-(\d+) is on the Hub", line):
            uploaded[int(match[1])] = moment
    took = {step: times[step] - times[step - 1] for step in times if step - 1 in times}
    saved = [every * number for number in range(1, saves + 1)]
    beside = {
        save: [s for s in took if s > save + 1 and times[s - 1] < uploaded[save]] for save in saved
    }
    busy = {step for steps in beside.values() for step in steps} | {save + 1 for save in saved}
    # The first steps warm up.
    quiet = statistics.median(took[s] for s in took if s not in busy and s > 5)
    save_s = [took[save + 1] - quiet for save in saved]
    upload_s = [sum(took[s] - quiet for s in beside[save]) for save in saved]
    size = sum(
        blob.stat().st_size
        for path, blob in head_files(trainer.hub.root, trainer.repo).items()
        if path.startswith(f"checkpoint-{saved[-1]}/")
    )
    total = statistics.mean(save_s) + statistics.mean(upload_s)
    print(f"checkpoint: {size / 1e6:.1f} MB; a step beside no save or upload: {quiet:.3f} s")
    for save, local, beside_s in zip(saved, save_s, upload_s, strict=True):
        print(
            f"checkpoint-{save}: on the Hub {uploaded[save] - times[save]:.1f} s after its step; "
            f"the step after it {local:+.3f} s, the {len(beside[save])} beside it {beside_s:+.3f} s"
        )
    print(f"stall: {total:.3f} s a save = {total / 3:.2f} % of wall time at one save per 5 minutes")


def print_resume(bench: Bench, repo: str, step: int, requests: list[tuple[str, str, int]]) -> None:
    """Print the requests of a start up to its first step, and the bytes that it downloaded."""
    files = head_files(bench.hub.root, repo)
    own = sum(b.stat().st_size for p, b in files.items() if p.startswith(f"checkpoint-{step}/"))
    trees = sum("/tree/" in path for _, path, _ in requests)
    fetched = [
        unquote(path.split("?")[0]).split("/", 5)[5]
        for method, path, status in requests
        if method == "GET" and "/resolve/" in path and status in (200, 206)
    ]
    looked_up = sum(method == "HEAD" for method, _, _ in requests)
    others = len(requests) - trees - len(fetched) - looked_up
    size = sum(files[path].stat().st_size for path in fetched)
    print(
        f"resume: {trees} tree listings, {looked_up} HEAD and {len(fetched)} GET of files, "
        f"{others} other requests; {size} bytes downloaded, the checkpoint has {own}"
    )


# --- the command -----------------------------------------------------------------------------


def print_table(bench: Bench, names: list[str]) -> int:
    """Run the rows and print each as it ends; return how many failed."""
    print("| fault | died at | steps lost | resumed from | final weights equal |")
    print("|---|---|---|---|---|", flush=True)
    failures: dict[str, Exception] = {}
    began = time.monotonic()
    for name in names:
        label = ROWS[name].__doc__
        try:
            outcome = bench.run(name)
            cells = f"{outcome.died_at} | {outcome.lost} | {outcome.resumed_from} | yes"
        except Skipped as reason:
            cells = f"skipped: {reason} | | |"
        except Exception as error:  # Whatever a row meets must not keep the others from running.
            failures[name] = error
            cells = "FAILED, see below | | |"
        print(f"| {label} | {cells} |", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"\n{len(names) - len(failures)} of {len(names)} rows held, in {minutes:.0f} minutes")
    for name, error in failures.items():
        print(f"\n{name}: {type(error).__name__}: {error}")
    return len(failures)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of: {', '.join(ROWS)}")
    parser.add_argument("--dir", type=Path, help="folder that keeps the Hub's repos (a new one)")
    parser.add_argument("--stall", action="store_true", help="the cost of checkpoints and resume")
    args = parser.parse_args()
    if unknown := set(args.rows) - ROWS.keys():
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    if args.dir and args.dir.exists() and any(args.dir.iterdir()):
        parser.error(f"{args.dir} is not empty: earlier repos would be resumed")
    # Started in a shell's background, this process ignores signals that the trainers must see.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with contextlib.ExitStack() as stack:
        folder = args.dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = folder.resolve()
        # huggingface_hub reads it when it is imported: the user's own cache stays untouched.
        os.environ["HF_HOME"] = str(folder / "home")
        bench = Bench(folder, stack.enter_context(Hub(folder / "hub")))
        if args.stall:
            stall(bench)
        failed = print_table(bench, args.rows or list(ROWS)) if args.rows or not args.stall else 0
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
