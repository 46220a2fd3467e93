"""train/train.py: what a start makes of the state that an earlier one left, and how runs stop.

pytest tests/test_resume.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
from hub import Hub
from huggingface_hub import CommitOperationAdd, HfApi
from tiny import ROOT, load_script


@pytest.fixture(scope="module")
def train() -> ModuleType:
    return load_script("train/train.py")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local training file of made posts and a tiny base model."""
    folder = tmp_path_factory.mktemp("resume")
    tiny.write_jsonl(folder / "train.jsonl", tiny.post_rows()[:64])
    tiny.save_model(folder / "llama")
    return folder


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("HSD_") or name in ("DATASET_REPO", "HUB_MODEL_ID", "MAX_STEPS"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("JOB_ID", raising=False)


@pytest.fixture(scope="module")
def argv(files: Path) -> list[str]:
    """Flags of a run of 12 steps with a checkpoint after every fourth."""
    return [
        *("--train_file", str(files / "train.jsonl")),
        *("--model_name_or_path", str(files / "llama"), "--report_to", "none"),
        *("--max_steps", "12", "--save_steps", "4", "--logging_steps", "3"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
        *("--warmup_steps", "2", "--learning_rate", "5e-3", "--hub_patience", "20s"),
    ]


@pytest.fixture(scope="module")
def straight(train: ModuleType, hub: Hub, argv: list[str]) -> str:
    """A run that nothing interrupted; its repo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", hub.token)
        train.main([*argv, "--hub_model_id", "alice/straight-on"])
    return "alice/straight-on"


def weights(hub: Hub, repo: str) -> bytes:
    return (hub.repo_folder(repo) / "adapter_model.safetensors").read_bytes()


def contract(hub: Hub, repo: str) -> dict[str, Any]:
    return json.loads((hub.repo_folder(repo) / "contract.json").read_text())


def end(train: ModuleType, argv: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(argv)
    assert ended.value.code == code


def at_step(
    monkeypatch: pytest.MonkeyPatch, train: ModuleType, step: int, action: Callable[[], Any]
) -> None:
    """Do something once, at the end of a step, before the run looks at its stops."""
    original, done = train.Run.end_step, []

    def end_step(run: Any, state: Any, control: Any) -> None:
        if state.global_step == step and not done:
            done.append(step)
            action()
        original(run, state, control)

    monkeypatch.setattr(train.Run, "end_step", end_step)


def running_job(hub: Hub, seconds: int = 60) -> str:
    """A job of alice's that the Jobs API shows as RUNNING."""
    api = HfApi(token=hub.token)
    job = api.run_job(image="python:3.12", command=["sleep", str(seconds)], flavor="a100-large")
    while api.inspect_job(job_id=job.id).status.stage != "RUNNING":
        time.sleep(0.05)
    return job.id


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h50m", 13800), ("90s", 90), ("1.5h", 5400), ("45", 45), ("1d2h", 93600)],
)
def test_durations(train: ModuleType, text: str, seconds: float) -> None:
    assert train.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "3x", "h", "-5m", "3h 50m"])
def test_what_is_no_duration_is_refused(train: ModuleType, text: str) -> None:
    with pytest.raises(train.argparse.ArgumentTypeError):
        train.duration(text)


def test_the_header_stops_a_job_before_its_timeout(train: ModuleType) -> None:
    source = (ROOT / "train/train.py").read_text(encoding="utf-8")
    timeout = re.search(r'(?m)^# timeout = "(.+)"', source)[1]
    stop_after = re.search(r'HSD_STOP_AFTER = "(.+)"', source)[1]
    assert 300 <= train.duration(timeout) - train.duration(stop_after) <= 1200


def recorded(train: ModuleType, args: Any, **changes: Any) -> dict[str, Any]:
    record = train.stage_record("adapter", "train/train.py", args, [])
    record["arguments"] |= changes
    return json.loads(json.dumps(record | {"training": {"world_size": train.WORLD_SIZE}}))


def test_every_documented_flag_has_its_rule(train: ModuleType) -> None:
    flags = vars(train.parse_args([])).keys() - {"trainer_fields"}
    ruled = {key for key in train.RESUME_RULES if key in flags}
    assert ruled == flags
    assert set(train.RESUME_RULES.values()) == {train.EQUAL, train.FREE, train.NEW}


def keys(rule: str) -> list[str]:
    """The documented flags of one rule."""
    module = load_script("train/train.py")
    flags = vars(module.parse_args([])).keys()
    return sorted(k for k, v in module.RESUME_RULES.items() if v == rule and k in flags)


@pytest.mark.parametrize("key", keys("must be equal"))
def test_a_changed_argument_that_must_be_equal_ends_the_start(
    train: ModuleType, capsys: pytest.CaptureFixture, key: str
) -> None:
    args = train.parse_args([])
    store = train.Store("alice/run", Path("none"))
    train.check_same_run(args, recorded(train, args), store)
    with pytest.raises(SystemExit) as ended:
        train.check_same_run(args, recorded(train, args, **{key: "other"}), store)
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.search(rf"(?m)^  {key} +other +\S", message)
    assert "--run_name" in message and "--fresh" in message


@pytest.mark.parametrize("key", keys("may change"))
def test_a_change_that_is_the_users_wish_is_printed(
    train: ModuleType, capsys: pytest.CaptureFixture, key: str
) -> None:
    args = train.parse_args([])
    train.check_same_run(args, recorded(train, args, **{key: 7777}), train.Store("a/b", Path("x")))
    assert f"{key} changes from 7777 to {vars(args)[key]}" in capsys.readouterr().out


@pytest.mark.parametrize("key", keys("takes the new value"))
def test_what_belongs_to_one_start_is_no_change(
    train: ModuleType, capsys: pytest.CaptureFixture, key: str
) -> None:
    args = train.parse_args([])
    train.check_same_run(args, recorded(train, args, **{key: "old"}), train.Store("a/b", Path("x")))
    assert capsys.readouterr().out == ""


def test_a_trainer_field_must_be_equal_unless_the_table_frees_it(
    train: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    earlier = recorded(train, train.parse_args([]))
    store = train.Store("alice/run", Path("none"))
    train.check_same_run(train.parse_args(["--dataloader_num_workers", "2"]), earlier, store)
    with pytest.raises(SystemExit):
        train.check_same_run(train.parse_args(["--optim", "sgd"]), earlier, store)
    assert re.search(r"(?m)^  optim +None +sgd", capsys.readouterr().err)


# --- stops -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_pauses_at_the_steps_end_and_loses_nothing(
    train: ModuleType,
    alice: Hub,
    argv: list[str],
    straight: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    name: str,
) -> None:
    repo = f"alice/paused-{name.lower()}"
    run = [*argv, "--hub_model_id", repo]
    # Under nohup, or in a shell's background, these tests begin with the signal ignored.
    number = getattr(signal, name)
    usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    inherited = signal.signal(number, usual)
    at_step(monkeypatch, train, 6, lambda: os.kill(os.getpid(), number))
    end(train, run, 75)
    assert signal.signal(number, inherited) == usual
    said = "Ctrl-C" if name == "SIGINT" else name
    printed = capfd.readouterr().out
    assert f"paused at step 6 of 12: {said}" in printed and "phases: " in printed
    assert contract(alice, repo)["training"]["state"] == "paused"
    assert (alice.repo_folder(repo) / "checkpoint-6" / "manifest.json").is_file()
    train.main(run)
    assert "step 6 of 12, epoch 0.38, 24 samples consumed" in capfd.readouterr().out
    assert weights(alice, repo) == weights(alice, straight)


def test_what_nohup_ignores_stays_ignored(train: ModuleType) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.Stop().listening():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_that_nobody_reads_any_more_does_not_end_the_run(train: ModuleType) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        steady = train.SteadyStream(stream)
        with pytest.raises(BrokenPipeError):
            print("x" * 100_000, file=stream, flush=True)
        print("x" * 100_000, file=steady, flush=True)
        assert not steady.isatty()


def test_a_hang_up_is_heard_although_its_terminal_is_gone() -> None:
    """The standard streams are pipes that nobody reads, as after a dropped SSH line."""
    code = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); import tiny; "
        "train = tiny.load_script('train/train.py'); stop = train.Stop(); stop.training = True\n"
        "with stop.listening(): os.kill(os.getpid(), signal.SIGHUP)\n"
        "os._exit(7 if stop.reason == 'SIGHUP' else 1)"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT / "tests", stdout=gone, stderr=gone, check=False
        )
    assert done.returncode == 7


def test_a_signal_before_the_first_step_ends_at_once(
    train: ModuleType, alice: Hub, argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "read_data", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    end(train, [*argv, "--hub_model_id", "alice/unborn"], 75)
    assert not HfApi(token=alice.token).repo_exists("alice/unborn")


def test_the_deadline_pauses_in_time(
    train: ModuleType,
    alice: Hub,
    argv: list[str],
    straight: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    run = [*argv, "--hub_model_id", "alice/deadline"]
    # The deadline is a moment, and the steps are too short to meet it: it is set at the step.
    passed: list[int] = []
    monkeypatch.setattr(
        train.Run, "deadline", lambda run: time.time() - 1 if passed else time.time() + 1e6
    )
    at_step(monkeypatch, train, 5, lambda: passed.append(5))
    end(train, run, 75)
    assert "paused at step 5 of 12: deadline" in capsys.readouterr().out
    passed.clear()
    train.main(run)
    assert weights(alice, "alice/deadline") == weights(alice, straight)


def test_the_stop_keeps_clear_of_the_deadline_by_twice_a_save_and_push(train: ModuleType) -> None:
    args = train.parse_args(["--stop_after", "1h"])
    run = train.Run(args, None, {}, train.Stop(), None, train.Job(), None)
    assert run.deadline() == train.PROCESS_START + 3600
    assert run.latest_stop() == run.deadline() - 60
    run.save_s, run.uploader.seconds, run.evaluation_s = 5.0, 70.0, 11.0
    run.step_s = 3.0
    assert run.latest_stop() == run.deadline() - 2 * 75 - 11 - 3 - 15
    job = train.Job("id", "alice", train.PROCESS_START - 100, 1800)
    run = train.Run(args, None, {}, train.Stop(), None, job, None)
    assert run.deadline() == train.PROCESS_START + 1700


def test_a_checkpoint_is_due_after_so_many_minutes(
    train: ModuleType, alice: Hub, argv: list[str], straight: str, capsys: pytest.CaptureFixture
) -> None:
    run = [*argv, "--hub_model_id", "alice/minutes", "--save_minutes", "0.0001"]
    train.main([*run, "--keep_checkpoints", "9"])
    saves = [c["message"] for c in alice.commits("alice/minutes") if "Save" in c["message"]]
    assert len(saves) == 12
    assert weights(alice, "alice/minutes") == weights(alice, straight)


def test_a_pause_within_an_epoch_that_ends_with_an_evaluation(
    train: ModuleType,
    files: Path,
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trainer would evaluate and save the paused step as if it ended its epoch."""
    validation = tiny.write_jsonl(files / "validation.jsonl", tiny.post_rows()[64:80])
    run = [*argv, "--validation_file", str(validation), "--max_steps", "-1"]
    run += ["--num_train_epochs", "3", "--save_strategy", "epoch", "--eval_strategy", "epoch"]
    train.main([*run, "--output_dir", str(tmp_path / "whole")])
    for step in (19, 32):  # within the second epoch of 16 steps, and at its very end
        at_step(monkeypatch, train, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        end(train, [*run, "--output_dir", str(tmp_path / "halves")], 75)
        monkeypatch.undo()
    train.main([*run, "--output_dir", str(tmp_path / "halves")])

    def curve(name: str) -> list[tuple[int, float]]:
        state = json.loads((tmp_path / name / "checkpoint-48/trainer_state.json").read_text())
        return [(x["step"], x["eval_loss"]) for x in state["log_history"] if "eval_loss" in x]

    assert curve("halves") == curve("whole")
    both = [tmp_path / name / "adapter_model.safetensors" for name in ("halves", "whole")]
    assert both[0].read_bytes() == both[1].read_bytes()


# --- who may write ---------------------------------------------------------------------------


def test_a_repo_whose_job_is_running_is_left_alone(
    train: ModuleType,
    alice: Hub,
    argv: list[str],
    straight: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    job = running_job(alice)
    run = [*argv, "--hub_model_id", "alice/held"]
    monkeypatch.setenv("JOB_ID", job)
    # The job dies by an exception that nothing in the run can tidy up after.
    at_step(monkeypatch, train, 6, lambda: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        train.main(run)
    monkeypatch.setenv("JOB_ID", "another")
    end(train, run, 1)
    message = capsys.readouterr().err
    assert f"being trained by job {job}" in message and "--run_name" in message
    HfApi(token=alice.token).cancel_job(job_id=job)
    while HfApi(token=alice.token).inspect_job(job_id=job).status.stage == "RUNNING":
        time.sleep(0.05)
    train.main(run)
    assert "resuming from checkpoint-4" in capsys.readouterr().out
    assert weights(alice, "alice/held") == weights(alice, straight)


def test_a_predecessor_ends_at_its_next_commit(
    train: ModuleType,
    alice: Hub,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    api = HfApi(token=alice.token)
    repo = "alice/taken-over"

    def claim() -> None:
        found = contract(alice, repo)
        found["training"]["claim"] = {"job_id": "j9", "namespace": "alice", "token": "theirs"}
        content = json.dumps(found).encode()
        operation = CommitOperationAdd("contract.json", content)
        api.create_commit(repo, [operation], commit_message="Start elsewhere")

    at_step(monkeypatch, train, 2, claim)
    end(train, [*argv, "--hub_model_id", repo], 1)
    assert "job j9 has taken the run over" in capsys.readouterr().err
    assert [c["message"] for c in alice.commits(repo)][:2] == [
        "Start elsewhere",
        "Start train/train.py",
    ]


def test_a_commit_of_somebody_else_is_followed(
    train: ModuleType,
    alice: Hub,
    argv: list[str],
    straight: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An edited card, or a checkpoint deleted by hand, is no other start."""
    api = HfApi(token=alice.token)

    def edit() -> None:
        # Wait for the push of checkpoint-4, or nothing could be deleted.
        checkpoint = alice.repo_folder("alice/edited") / "checkpoint-4/manifest.json"
        until = time.monotonic() + 60
        while not checkpoint.is_file() and time.monotonic() < until:
            time.sleep(0.05)
        api.upload_file(path_or_fileobj=b"x", path_in_repo="notes.md", repo_id="alice/edited")
        api.delete_folder("checkpoint-4", "alice/edited")

    at_step(monkeypatch, train, 6, edit)
    train.main([*argv, "--hub_model_id", "alice/edited", "--keep_checkpoints", "1"])
    folder = alice.repo_folder("alice/edited")
    assert (folder / "notes.md").is_file() and not (folder / "checkpoint-4").exists()
    assert weights(alice, "alice/edited") == weights(alice, straight)


def test_a_jobs_api_that_is_away_does_not_make_a_job_dead(
    train: ModuleType, alice: Hub, capsys: pytest.CaptureFixture
) -> None:
    claim = {"job_id": "j1", "namespace": "alice", "token": "t"}
    found = {"training": {"claim": claim, "state": "running"}}
    store = train.Store("alice/any", Path("none"))
    alice.add_fault(method="GET", path="/api/jobs/alice/j1", status=503, times=3)
    with pytest.raises(SystemExit) as ended:
        train.check_holder(found, train.Job("j2"), store)
    assert ended.value.code == 1 and "whether job j1" in capsys.readouterr().err
    train.check_holder(found, train.Job("j2"), store)
    assert store.holder == "t"


def test_of_two_first_starts_one_ends(
    train: ModuleType,
    alice: Hub,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The other one creates and claims the repo while this one reads its data."""
    original = train.read_data

    def read_data(*args: Any) -> Any:
        monkeypatch.setattr(train, "read_data", original)
        train.main([*argv, "--hub_model_id", "alice/first"])
        return original(*args)

    monkeypatch.setattr(train, "read_data", read_data)
    end(train, [*argv, "--hub_model_id", "alice/first"], 1)
    assert "another start has just begun" in capsys.readouterr().err
    assert contract(alice, "alice/first")["training"]["state"] == "complete"


def test_a_claim_lost_while_the_hub_stumbles_stays_lost(
    train: ModuleType, alice: Hub, tmp_path: Path
) -> None:
    """The listing that follows a 412 fails once: its head must not become ours to follow."""
    api = HfApi(token=alice.token)
    api.create_repo("alice/stumbled", private=True)
    store = train.Store("alice/stumbled", tmp_path, api.repo_info("alice/stumbled").sha)
    theirs = {"schema": 1, "stage": "adapter", "training": {"claim": {"job_id": None}}}
    theirs["training"]["claim"]["token"] = "theirs"
    operation = CommitOperationAdd("contract.json", json.dumps(theirs).encode())
    api.create_commit("alice/stumbled", [operation], commit_message="Start of another")
    store.holder = "ours"
    alice.add_fault(method="GET", path="alice/stumbled/tree", status=400)
    with pytest.raises(OSError):
        store.push({"file": b"1"}, "Save one")
    with pytest.raises(train.TakenOver):
        store.push({"file": b"2"}, "Save two")
    assert alice.commits("alice/stumbled")[0]["message"] == "Start of another"


# --- state -----------------------------------------------------------------------------------


def test_a_finished_run_says_so_without_torch(alice: Hub, argv: list[str], straight: str) -> None:
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    run = [str(ROOT / "train/train.py"), *argv, "--hub_model_id", straight]
    head = alice.commits(straight)[0]["oid"]
    done = subprocess.run(
        [sys.executable, "-c", code, *run],
        env={**os.environ, **alice.env()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "alice/straight-on is complete at step 12: nothing to do" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    assert alice.commits(straight)[0]["oid"] == head


def test_the_end_lists_what_there_is(
    train: ModuleType, alice: Hub, argv: list[str], capsys: pytest.CaptureFixture
) -> None:
    train.main([*argv, "--hub_model_id", "alice/receipt"])
    printed = capsys.readouterr().out
    head = alice.commits("alice/receipt")[0]["oid"][:8]
    assert f"artefacts in alice/receipt@{head}:" in printed
    for name in ("adapter_model.safetensors", "contract.json", "training.log", "checkpoint-12/"):
        assert re.search(rf"(?m)^  {re.escape(name)} +\d+\.\d+ MB$", printed), name
    assert "its scores of two probe posts differ by 0.0e+00" in printed
    assert re.search(r"phases: start .* download .* load .* train .* push \d", printed)
    log = (alice.repo_folder("alice/receipt") / "training.log").read_text()
    assert "step 3/12 loss" in log and "training starts at step 0" in log


def test_an_adapter_that_reads_back_otherwise_is_no_end(
    train: ModuleType,
    alice: Hub,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The Hub's copy lacks one trained matrix: it stays zero, and the scores show it."""
    from safetensors.torch import load, save

    original = train.push_final

    def push_less(run: Any, files: dict[str, Any]) -> None:
        tensors = load(files["adapter_model.safetensors"])
        tensors.pop(next(name for name in tensors if "lora_B" in name))
        original(run, files | {"adapter_model.safetensors": save(tensors)})

    monkeypatch.setattr(train, "push_final", push_less)
    end(train, [*argv, "--hub_model_id", "alice/lossy"], 1)
    assert "scores otherwise than the trained one" in capsys.readouterr().err
    assert contract(alice, "alice/lossy")["training"]["state"] == "running"
    monkeypatch.setattr(train, "push_final", original)
    train.main([*argv, "--hub_model_id", "alice/lossy"])
    assert contract(alice, "alice/lossy")["training"]["state"] == "complete"


def test_the_root_keeps_no_more_than_asked(train: ModuleType, alice: Hub, argv: list[str]) -> None:
    run = [*argv, "--hub_model_id", "alice/rotated", "--save_steps", "1", "--max_steps", "9"]
    train.main([*run, "--keep_checkpoints", "2"])
    for commit in alice.commits("alice/rotated"):
        assert len({name.split("/")[0] for name in commit["files"] if "/" in name}) <= 2
    folder = alice.repo_folder("alice/rotated")
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-9"}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda old: old[:-1] + bytes([old[-1] ^ 1]), "has a damaged optimizer.pt"),
        (lambda old: old[:-7], "cannot be downloaded whole"),
    ],
    ids=["bit flipped", "cut off"],
)
def test_a_damaged_checkpoint_is_named_and_skipped(
    train: ModuleType,
    alice: Hub,
    argv: list[str],
    straight: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    damage: Callable[[bytes], bytes],
    says: str,
) -> None:
    repo = "alice/" + says.split()[-1].replace(".", "-")
    run = [*argv, "--hub_model_id", repo]
    at_step(monkeypatch, train, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    end(train, run, 75)
    blob = alice.store.blob(alice.commits(repo)[0]["files"]["checkpoint-9/optimizer.pt"]["sha256"])
    content = damage(blob.read_bytes())
    blob.unlink()
    blob.write_bytes(content)
    train.main(run)
    printed = capsys.readouterr().out
    assert f"checkpoint-9 {says}" in printed and "skipped" in printed
    assert "resuming from checkpoint-8" in printed
    assert weights(alice, repo) == weights(alice, straight)


def test_the_start_lists_the_repo_once(
    train: ModuleType,
    alice: Hub,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = [*argv, "--hub_model_id", "alice/listed"]
    at_step(monkeypatch, train, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    end(train, run, 75)
    seen = len(alice.requests)
    listed: list[tuple[str, str]] = []
    original = train.build_model

    def build_model(*args: Any) -> Any:
        listed.extend((method, path) for method, path, _ in alice.requests[seen:])
        return original(*args)

    monkeypatch.setattr(train, "build_model", build_model)
    train.main(run)
    assert len([path for _, path in listed if "/tree/" in path]) == 1
    fetched = [path for method, path in listed if method == "GET" and "/resolve/" in path]
    assert fetched and all(
        re.search(r"checkpoint-6/|contract.json|training.log", path) for path in fetched
    )


def test_checkpoints_that_never_reached_the_hub_are_used(
    train: ModuleType,
    alice: Hub,
    argv: list[str],
    straight: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """The Hub is away from the first checkpoint on; the machine's disk outlives the run."""
    run = [*argv, "--hub_model_id", "alice/away", "--output_dir", str(tmp_path / "out")]
    alice.add_fault(method="POST", path="alice/away/commit/", status=500, skip=1, times=None)
    end(train, [*run, "--hub_patience", "1s"], 1)
    ended = capsys.readouterr()
    assert re.search(r"step \d+/12 .*; checkpoint-\d+ NOT on the Hub", ended.out)
    assert "push the adapter to alice/away; it is still in" in ended.err
    alice.clear_faults()
    train.main(run)
    assert "resuming from checkpoint-12" in capsys.readouterr().out
    assert weights(alice, "alice/away") == weights(alice, straight)
    assert (alice.repo_folder("alice/away") / "checkpoint-12" / "manifest.json").is_file()


def test_the_last_checkpoint_is_pushed_although_an_earlier_push_was_in_its_way(
    train: ModuleType, alice: Hub, argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No save waits for the push before it, and the first takes longer than the training."""
    original = train.Uploader.settle

    def settle(uploader: Any, patience_s: float, failing_s: float) -> bool:
        return original(uploader, 0.0 if patience_s == 10.0 else patience_s, failing_s)

    monkeypatch.setattr(train.Uploader, "settle", settle)
    alice.add_fault(method="POST", path="alice/slow-line/commit/", delay_s=4, skip=1)
    train.main([*argv, "--hub_model_id", "alice/slow-line"])
    folder = alice.repo_folder("alice/slow-line")
    assert (folder / "checkpoint-12" / "manifest.json").is_file()
    assert contract(alice, "alice/slow-line")["training"]["state"] == "complete"


def test_fresh_starts_over_and_archives(
    train: ModuleType,
    alice: Hub,
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    repo = "alice/again"
    run = [*argv, "--hub_model_id", repo, "--output_dir", str(tmp_path / "out")]
    train.main(run)
    old = weights(alice, repo)
    train.main([*run, "--fresh", "--learning_rate", "1e-3"])
    assert "training starts at step 0" in capsys.readouterr().out
    api = HfApi(token=alice.token)
    (tag,) = api.list_repo_refs(repo).tags
    archived = api.hf_hub_download(repo, "adapter_model.safetensors", revision=tag.name)
    assert Path(archived).read_bytes() == old != weights(alice, repo)
    assert "checkpoint-8/optimizer.pt" in api.list_repo_files(repo, revision=tag.name)
    # A Job that is started again goes on with what it began, although its flags say --fresh.
    monkeypatch.setenv("JOB_ID", "job-1")
    at_step(monkeypatch, train, 6, lambda: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        train.main([*run, "--fresh"])
    train.main([*run, "--fresh"])
    assert "resuming from checkpoint-4" in capsys.readouterr().out
    assert len(api.list_repo_refs(repo).tags) == 2


def test_fresh_in_a_folder_leaves_the_users_files(
    train: ModuleType, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = [*argv, "--output_dir", str(tmp_path)]
    (tmp_path / "mine.txt").write_text("mine")
    train.main(run)
    train.main([*run, "--fresh", "--seed", "7"])
    (old,) = tmp_path.glob("before-fresh-*")
    assert (old / "checkpoint-12" / "manifest.json").is_file()
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert capsys.readouterr().out.count("training starts at step 0") == 2


def test_a_local_run_inside_a_job_resumes(
    train: ModuleType, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_ID", "job-7")
    run = [*argv, "--output_dir", str(tmp_path / "out")]
    at_step(monkeypatch, train, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    end(train, run, 75)
    train.main(run)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_users_own_files_stay(train: ModuleType, argv: list[str], tmp_path: Path) -> None:
    for name in ("checkpoint-1/mine.txt", "checkpoint-3/mine.txt", "final/thesis.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("mine")
    (tmp_path / "README.md").write_text("# My project")
    train.main([*argv, "--output_dir", str(tmp_path), "--save_steps", "2"])
    assert (tmp_path / "README.md").read_text() == "# My project"
    assert (tmp_path / "final/thesis.txt").is_file()
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {"checkpoint-1", "checkpoint-3", "checkpoint-10", "checkpoint-12"}


def test_another_base_in_the_same_folder_is_refused(
    train: ModuleType,
    files: Path,
    argv: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(files / "llama", tmp_path / "llama"))
    run = [*argv, "--model_name_or_path", str(base), "--output_dir", str(tmp_path / "out")]
    at_step(monkeypatch, train, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    end(train, run, 75)
    tensors = {name: 1.1 * value for name, value in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    end(train, run, 2)
    assert "the base model has changed" in capsys.readouterr().err


def test_a_damaged_best_checkpoint_does_not_come_back(
    train: ModuleType,
    files: Path,
    argv: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the highest loss as the best, that of the first evaluation would be the result."""
    validation = tiny.write_jsonl(files / "validation.jsonl", tiny.post_rows()[64:80])
    run = [*argv, "--validation_file", str(validation), "--greater_is_better", "true"]
    run += ["--early_stopping_patience", "9", "--output_dir", str(tmp_path)]
    at_step(monkeypatch, train, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    end(train, run, 75)
    weights = tmp_path / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    train.main(run)
    assert "the best one, checkpoint-4, has a damaged adapter" in capsys.readouterr().out
    training = json.loads((tmp_path / "contract.json").read_text())["training"]
    assert training["weights_of_step"] == 12


def test_a_checkpoint_that_the_hub_lists_otherwise_is_not_saved(
    train: ModuleType,
    alice: Hub,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    at_step(monkeypatch, train, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    alice.add_fault(method="GET", path="alice/unlisted/tree/.*/checkpoint-2", status=403)
    end(train, [*argv, "--hub_model_id", "alice/unlisted"], 1)
    ended = capsys.readouterr()
    assert "checkpoint-2 is NOT on the Hub" in ended.out
    assert "stopped at step 2, and the Hub did not take it" in ended.err


def test_a_finished_run_is_not_shortened(
    train: ModuleType, alice: Hub, argv: list[str], straight: str, capsys: pytest.CaptureFixture
) -> None:
    head = alice.commits(straight)[0]["oid"]
    train.main([*argv, "--hub_model_id", straight, "--max_steps", "8"])
    assert "is complete at step 12: nothing to do" in capsys.readouterr().out
    assert alice.commits(straight)[0]["oid"] == head


# --- storage ---------------------------------------------------------------------------------


def test_reclaimed_storage_is_what_nothing_refers_to(
    train: ModuleType, alice: Hub, argv: list[str], capsys: pytest.CaptureFixture
) -> None:
    repo, api = "alice/reclaimed", HfApi(token=alice.token)
    run = [*argv, "--hub_model_id", repo, "--keep_checkpoints", "1", "--save_steps", "2"]
    train.main(run)
    pinned = api.repo_info(repo).sha
    train.main([*run, "--max_steps", "16"])
    stored = {file.file_oid for file in api.list_lfs_files(repo)}
    train.main([*run, "--max_steps", "16", "--reclaim_storage"])
    assert "nothing to do" in (printed := capsys.readouterr().out)
    left = {file.file_oid for file in api.list_lfs_files(repo)}
    assert left < stored and f"{len(stored - left)} objects deleted" in printed
    head = {entry["sha256"] for entry in alice.commits(repo)[0]["files"].values()}
    assert {entry for entry in head if entry in stored} <= left
    # The commit that an evaluation may have pinned still gives its adapter.
    old = api.hf_hub_download(repo, "adapter_model.safetensors", revision=pinned)
    assert Path(old).read_bytes() != weights(alice, repo)


def test_history_is_squashed_once_and_never_under_an_adapter(
    train: ModuleType, alice: Hub, argv: list[str], capsys: pytest.CaptureFixture
) -> None:
    repo = "alice/squashed"
    train.main([*argv, "--hub_model_id", repo, "--squash_history"])
    assert [c["message"] for c in alice.commits(repo)] == [
        "Finish at step 12",
        "Squash the checkpoints' history",
    ]
    train.main([*argv, "--hub_model_id", repo, "--squash_history", "--max_steps", "16"])
    assert "may have pinned a commit" in capsys.readouterr().out
    assert len(alice.commits(repo)) > 3


# --- relay -----------------------------------------------------------------------------------


def test_a_relay_hands_over_at_the_deadline_only(
    train: ModuleType,
    alice: Hub,
    argv: list[str],
    straight: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    job = running_job(alice)
    monkeypatch.setenv("JOB_ID", job)
    repo = "alice/relayed"
    run = [*argv, "--hub_model_id", repo, "--relay", "1", "--stop_after", "1h", "--budget", "5"]
    passed: list[int] = []
    monkeypatch.setattr(
        train.Run, "deadline", lambda run: time.time() - 1 if passed else time.time() + 1e6
    )
    at_step(monkeypatch, train, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    end(train, run, 75)
    printed = capsys.readouterr().out
    assert "relay: not run again" in printed
    assert re.search(r"about \d+ min and \d+\.\d\d \$ of this machine are left", printed)
    monkeypatch.undo()
    for name, value in (("JOB_ID", job), ("HF_TOKEN", alice.token)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        train.Run, "deadline", lambda run: time.time() - 1 if passed else time.time() + 1e6
    )
    at_step(monkeypatch, train, 6, lambda: passed.append(6))
    commits: list[int] = []
    rerun = HfApi.rerun_job

    def rerun_job(self: HfApi, **options: Any) -> Any:
        commits.append(len(alice.commits(repo)))
        return rerun(self, **options)

    monkeypatch.setattr(HfApi, "rerun_job", rerun_job)
    end(train, run, 75)
    (following,) = (j for j in alice.jobs.values() if j.info["initiator"]["type"] != "user")
    assert f"relay 1 of 1: job {following.info['id']} goes on" in capsys.readouterr().out
    relay = contract(alice, repo)["training"]["relay"]
    assert relay["hops"] == 1 and relay["pending"] and 0 < relay["spent_usd"] < 1
    # What followed the rerun is the other job's to write.
    assert commits == [len(alice.commits(repo))]
    passed.clear()
    monkeypatch.setenv("JOB_ID", following.info["id"])
    # The platform restarts this second job: its count of hops is not forgotten.
    at_step(monkeypatch, train, 7, lambda: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        train.main(run)
    at_step(monkeypatch, train, 8, lambda: passed.append(8))
    end(train, run, 75)
    assert "relay: not run again" in capsys.readouterr().out
    passed.clear()
    train.main(run)
    assert weights(alice, repo) == weights(alice, straight)
    HfApi(token=alice.token).cancel_job(job_id=job)
    HfApi(token=alice.token).cancel_job(job_id=following.info["id"])


def test_the_jobs_of_all_nodes_are_counted_in_dollars(
    train: ModuleType, alice: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = running_job(alice)
    monkeypatch.setenv("JOB_ID", job)
    store = train.Store("alice/nodes", Path("out"))
    one = train.read_job(store)
    monkeypatch.setattr(train, "NODES", 3)
    assert train.read_job(store).dollars_per_hour == 3 * one.dollars_per_hour > 0
    HfApi(token=alice.token).cancel_job(job_id=job)


@pytest.mark.parametrize(
    ("change", "flags", "says"),
    [
        ({}, ["--relay", "2", "--stop_after", "1h"], "knows of none here"),
        ({"attempts": 3}, ["--relay", "2", "--stop_after", "1h"], "--attempts"),
        ({"token": "hf_alice_read"}, ["--relay", "2", "--stop_after", "1h"], "this token may not"),
        ({}, ["--budget", "3"], "--budget is for --relay"),
        ({"attempts": 1}, ["--relay", "-1"], "must be positive"),
    ],
)
def test_a_relay_that_cannot_work_is_refused_at_the_start(
    train: ModuleType,
    alice: Hub,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    change: dict[str, Any],
    flags: list[str],
    says: str,
) -> None:
    job = None
    if change:
        api = HfApi(token=alice.token)
        options = {"attempts": change["attempts"]} if "attempts" in change else {}
        job = api.run_job(
            image="python:3.12", command=["sleep", "60"], flavor="a100-large", **options
        ).id
        monkeypatch.setenv("JOB_ID", job)
        monkeypatch.setenv("HF_TOKEN", change.get("token", alice.token))
    end(train, [*argv, "--hub_model_id", "alice/no-relay", *flags], 2)
    assert says in capsys.readouterr().err
    if job:
        HfApi(token=alice.token).cancel_job(job_id=job)
