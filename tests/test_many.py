"""One process per GPU on one machine or several: who starts them, what they share, how they end.

pytest tests/test_many.py

The machines are loopback addresses with a folder each as their disk, and CPUs are their GPUs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny

PATIENCE_SECONDS = 240
ROUNDING = 1e-5
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__)
RUN = [
    *("--max_steps", "24", "--save_steps", "12", "--logging_steps", "1", "--sample_steps", "0"),
    *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"),
    *("--lr_scheduler_type", "constant", "--warmup_steps", "0", "--learning_rate", "1e-3"),
    *("--lora_r", "4", "--lora_dropout", "0", "--early_stopping_patience", "0"),
    *("--report_to", "none", "--allow_cpu"),
]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, clean_environment: None) -> ModuleType:
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    return tiny.load_script("train/train.py")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    rows = tiny.post_rows()
    tiny.write_jsonl(folder / "train.jsonl", rows[:16])
    tiny.save_model(folder / "llama")
    return folder


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk of one machine whose two processes made a whole run."""
    disk = tmp_path_factory.mktemp("whole")
    code, printed = end(start(files, disk, "--num_processes", "2"), disk)
    assert code == 0, printed
    assert "effective batch: 4 rows a step = 2 rows x 1 accumulated x 2 processes" in printed
    assert printed.count("step 24/24 ") == 1 and printed.count("next: ") == 1
    assert printed.count("output_dir = ") == 1
    return disk


# --- runs ------------------------------------------------------------------------------------


def start(
    files: Path, disk: Path, *flags: str, script: tuple[str, ...] = (), gpus: bool = False
) -> subprocess.Popen[bytes]:
    """The plain command on a machine whose disk is a folder; it prints into log."""
    disk.mkdir(exist_ok=True)
    words = ["--train_file", files / "train.jsonl", "--model_name_or_path", files / "llama"]
    script = script or (str(tiny.ROOT / "train/train.py"),)
    words = [sys.executable, *script, *words, "--output_dir", "out", *RUN, *flags]
    kept = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if not gpus:
        kept["CUDA_VISIBLE_DEVICES"] = ""
    with (disk / "log").open("wb") as log:
        return subprocess.Popen(words, cwd=disk, stdout=log, stderr=log, env=os.environ | kept)


def start_nodes(files: Path, folder: Path, *flags: str) -> list[subprocess.Popen[bytes]]:
    """Two machines with a process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = ("--nnodes", "2", "--num_processes", "1", "--master_port", port, *flags)
    zero = start(files, folder / "0", *common, "--node_rank", "0")
    address = ("--node_rank", "1", "--master_addr", "${MASTER}.1")
    os.environ["MASTER"] = "127.0.0"
    return [zero, start(files, folder / "1", *common, *address)]


def end(process: subprocess.Popen[bytes], disk: Path) -> tuple[int, str]:
    try:
        code = process.wait(PATIENCE_SECONDS)
    finally:
        process.kill()
    return code, (disk / "log").read_text()


def wait_for(disk: Path, words: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while words not in (disk / "log").read_text():
        assert time.monotonic() < end, (disk / "log").read_text()
        time.sleep(0.05)


def curve(out: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each step."""
    state = json.loads((out / "checkpoint-24/trainer_state.json").read_text())
    return [
        (entry["step"], entry["loss"], entry["grad_norm"])
        for entry in state["log_history"]
        if "loss" in entry
    ]


def assert_close(disk: Path, other: Path) -> None:
    """The same losses and gradients at each step, but for the order of sums."""
    for one, another in zip(curve(disk / "out"), curve(other / "out"), strict=True):
        assert one == pytest.approx(another, rel=ROUNDING)


def contract(out: Path) -> dict[str, Any]:
    return json.loads((out / "contract.json").read_text())


@pytest.mark.slow
def test_two_machines_are_one_with_two_processes_and_one_process_goes_on(
    files: Path, whole: Path, tmp_path: Path
) -> None:
    # Any of the machines hears a signal, and all of them pause.
    nodes = start_nodes(files, tmp_path)
    wait_for(tmp_path / "0", "step 3/24 ")
    nodes[1].send_signal(signal.SIGTERM)
    said = [end(node, tmp_path / name) for node, name in zip(nodes, "01", strict=True)]
    assert [code for code, _ in said] == [75, 75], said
    assert "paused at step " in said[0][1] and "step 1/24" not in said[1][1]
    assert "SIGTERM: this step is finished" in said[1][1]
    paused = contract(tmp_path / "0/out")["training"]["step"]
    assert 3 <= paused < 24
    saved = {path.name for path in (tmp_path / f"0/out/checkpoint-{paused}").iterdir()}
    assert {"rng_state_1.pth", "log_window_1.json"} <= saved
    assert not (tmp_path / "1/out" / f"checkpoint-{paused}/optimizer.pt").exists()
    begun = tmp_path / "begun"
    subprocess.run(["cp", "-r", tmp_path / "0", begun], check=True)

    # Both begin anew on empty disks but for process 0's, and end as the one machine did.
    nodes = start_nodes(files, tmp_path)
    said = [end(node, tmp_path / name) for node, name in zip(nodes, "01", strict=True)]
    assert [code for code, _ in said] == [0, 0], said
    assert f"resuming from checkpoint-{paused} " in said[0][1]
    assert curve(tmp_path / "0/out") == curve(whole / "out")
    weights = [disk / "out/adapter_model.safetensors" for disk in (tmp_path / "0", whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    # What two processes began, one ends: the same rows in each step, other roundings.
    code, printed = end(start(files, begun), begun)
    assert code == 0, printed
    assert "world_size changes from 2 to 1" in printed
    assert "processes: 1 go on with what 2 saved. Each step has the same 4 rows." in printed
    assert_close(begun, whole)
    assert contract(begun / "out")["training"]["effective_batch"] == 4


@pytest.mark.slow
def test_one_process_tries_steps_while_the_others_wait(files: Path, tmp_path: Path) -> None:
    # TRL's own loss, which label smoothing needs, gathers its counts over all processes.
    flags = ("--label_smoothing_factor", "0.1", "--max_steps", "1", "--save_steps", "1")
    code, printed = end(
        start(files, tmp_path, "--num_processes", "2", "--auto_batch", *flags), tmp_path
    )
    assert code == 0, printed
    assert printed.count("--auto_batch: micro-batches of up to ") == 1


@pytest.mark.slow
def test_a_sharded_base_trains_resumes_and_ends_as_a_whole_one(
    files: Path, whole: Path, tmp_path: Path
) -> None:
    """FSDP2 over gloo; the halves of the run are two starts, of which the second resumes."""
    disk = tmp_path / "disk"
    for steps in ("12", "24"):
        flags = ("--fsdp", "--gradient_accumulation_steps", "1", "--max_steps", steps)
        code, printed = end(start(files, disk, *flags, script=TORCHRUN), disk)
        assert code == 0, printed
        assert "FSDP2: the base is shared out over 2 processes" in printed
    assert "resuming from checkpoint-12 " in printed
    assert "its scores of two probe posts differ by 0.0e+00" in printed
    assert_close(disk, whole)
    saved = {path.name for path in (disk / "out/checkpoint-24").iterdir()}
    assert {"adapter_model.safetensors", "pytorch_model_fsdp.bin", "optimizer.bin"} <= saved
    assert contract(disk / "out")["training"]["sharded"] is True


@pytest.mark.gpu
def test_two_gpus_get_a_process_each(files: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs a machine with two GPUs")
    for name, flags in (("plain", ()), ("sharded", ("--fsdp",))):
        disk = tmp_path / name
        code, printed = end(start(files, disk, *flags, gpus=True), disk)
        assert code == 0, printed
        assert f"starting {torch.cuda.device_count()} processes" in printed


def test_a_process_that_is_killed_ends_the_others_with_one_message(
    files: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    launcher = start(files, disk, "--num_processes", "2")
    deadline, victim = time.monotonic() + PATIENCE_SECONDS, None
    while victim is None and time.monotonic() < deadline:
        time.sleep(0.05)
        for children in Path(f"/proc/{launcher.pid}/task").glob("*/children"):
            for pid in children.read_text().split():
                if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
                    victim = int(pid)
    os.kill(victim, signal.SIGKILL)
    code, printed = end(launcher, disk)
    assert code == 1, printed
    assert printed.count("error: ") == 1 and "process 1 was ended by SIGKILL" in printed
    assert "Traceback" not in printed


def test_what_all_processes_refuse_is_said_once(files: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    flags = ("--num_processes", "2", "--train_file", str(bad))
    code, printed = end(start(files, disk, *flags), disk)
    assert code == 2, printed
    assert printed.count("error: ") == 1 and "Traceback" not in printed


# --- parts -----------------------------------------------------------------------------------


def test_each_gpu_gets_a_process(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    started: list[Any] = []
    monkeypatch.setattr(train, "supervise", lambda *given: started.append(given) or 75)
    argv = ["--train_file", "posts.jsonl", "--output_dir", "out"]
    args = train.parse_args(argv)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train, "NVIDIA_DRIVER", Path(__file__))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    train.start_processes(args, argv)
    assert not started
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(SystemExit) as ended:
        train.start_processes(args, argv)
    ((_, _, config, _, words),) = started
    assert ended.value.code == 75 and config.nproc_per_node == 4 and words[-4:] == argv
    assert train.LAUNCH not in os.environ
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        with monkeypatch.context() as there:
            there.setenv(name, "0")
            train.start_processes(args, argv)
    assert len(started) == 1
    # A single one has a launcher too: else Trainer would use all GPUs that it sees.
    with pytest.raises(SystemExit):
        train.start_processes(train.parse_args([*argv, "--num_processes", "1"]), argv)
    assert started[1][2].nproc_per_node == 1


def test_a_process_that_sees_several_gpus_is_refused(
    train: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    for gpus in (0, 1):
        train.check_devices(SimpleNamespace(n_gpu=gpus))
    with pytest.raises(SystemExit) as ended:
        train.check_devices(SimpleNamespace(n_gpu=4))
    assert ended.value.code == 2 and "sees 4 GPUs" in capsys.readouterr().err


def test_processes_wait_longer_than_the_first_for_the_hub(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import distributed

    waits: list[float] = []

    def begin(*_: Any, timeout: Any) -> None:
        waits.append(timeout.total_seconds())

    monkeypatch.setattr(distributed, "init_process_group", begin)
    for flags in ([], ["--ddp_timeout", "7200"], ["--hub_patience", "3h"]):
        args = train.parse_args(flags)
        monkeypatch.setattr(train, "WORLD_SIZE", 1)
        train.join_processes(args)
        monkeypatch.setattr(train, "WORLD_SIZE", 2)
        train.join_processes(args)
    assert waits == [2400, 7200, 3 * 10800 + 600]
    assert train.RESUME_RULES["ddp_timeout"] == train.NEW


def test_one_process_asks_the_hub_who_you_are(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "RANK", 1)
    monkeypatch.setattr(train, "broadcast", lambda value: value or "alice")
    monkeypatch.setattr(train, "limit_silence", lambda: None)
    monkeypatch.setattr(train, "own_namespace", lambda: pytest.fail("the Hub is asked"))
    args = train.parse_args(["--run_name", "x"])
    assert train.open_store(args).repo == "alice/hsd-x" and args.dataset_repo == "alice/hsd-data"
    args = train.parse_args(["--dataset_repo", "bob/d", "--hub_model_id", "bob/m"])
    assert train.open_store(args).repo == "bob/m" and args.dataset_repo == "bob/d"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nnodes", "2"], "needs --node_rank, from 0 to 1"),
        (["--nnodes", "2", "--node_rank", "2"], "needs --node_rank"),
        (["--nnodes", "2", "--node_rank", "1"], "--master_addr"),
        (["--node_rank", "1"], "say --nnodes"),
        (["--num_processes", "0"], "at least 1"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(
    train: ModuleType, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        train.check_processes(train.parse_args(flags))
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_torchrun_and_our_own_processes_exclude_each_other(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit):
        train.check_processes(train.parse_args(["--num_processes", "2"]))
    assert "too late" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_sharding_by_a_configuration_of_accelerate_is_refused(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str
) -> None:
    args = train.parse_args([])
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "false")
    train.check_processes(args)
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(SystemExit) as ended:
        train.check_processes(args)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"turns on {name}" in said and "--fsdp" in said


@pytest.mark.parametrize(
    ("size", "accumulated", "processes", "share"),
    [
        (4, 4, 1, (4, 4)),
        (4, 4, 4, (4, 1)),
        (4, 4, 8, (2, 1)),
        (16, 1, 4, (4, 1)),
        (4, 7, 2, (2, 7)),
        (3, 5, 5, (3, 1)),
        (1, 6, 2, (1, 3)),
        (4, 4, 3, None),
    ],
)
def test_the_rows_of_a_step_are_those_of_one_process(
    train: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    size: int,
    accumulated: int,
    processes: int,
    share: tuple[int, int] | None,
) -> None:
    monkeypatch.setenv(train.LAUNCH, "folder")
    monkeypatch.setattr(train, "WORLD_SIZE", processes)
    args = train.parse_args([])
    args.per_device_train_batch_size, args.gradient_accumulation_steps = size, accumulated
    contract: dict[str, Any] = {"training": {}}
    if share is None:
        with pytest.raises(SystemExit):
            train.share_batch(args, contract, None)
        assert "Start 1, 2, 4, 8, 16 of them" in capsys.readouterr().err
        return
    found = train.share_batch(args, contract, None)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == share
    assert contract["training"]["effective_batch"] == size * accumulated
    assert args.per_device_train_batch_size == size


def test_a_resumed_run_keeps_the_rows_it_began_with(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = train.parse_args([])
    for recorded, rows in (({"effective_batch": 8}, 8), ({}, 64)):
        earlier = {"training": {"world_size": 4, **recorded}}
        assert train.effective_batch(args, earlier) == rows
    # torchrun was told a number of processes: as in every other script, the flags are of each.
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    assert train.effective_batch(args, None) == 32


def test_a_checkpoint_is_fitted_to_more_and_fewer_processes(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    contract = {"training": {"effective_batch": 16}}

    def fit(processes: int) -> list[float]:
        monkeypatch.setattr(train, "WORLD_SIZE", processes)
        said = train.fit_checkpoint(tmp_path, contract)
        assert ("Not bit-identical" in said) == bool(said)
        files = [tmp_path / f"log_window_{rank}.json" for rank in range(processes)]
        return [json.loads(file.read_text())["loss_sum"] for file in files]

    for rank, loss in enumerate((1.0, 2.0)):
        window = {"loss_sum": loss, "last_logged_step": 3}
        (tmp_path / f"log_window_{rank}.json").write_text(json.dumps(window))
        (tmp_path / f"rng_state_{rank}.pth").write_bytes(b"")
    assert fit(2) == [1.0, 2.0] and len([*tmp_path.glob("rng_state*")]) == 2
    assert fit(3) == [1.5, 1.5, 1.5] and not [*tmp_path.glob("rng_state*")]
    assert fit(1) == [1.5] and len([*tmp_path.iterdir()]) == 1


def test_one_message_and_the_code_of_the_first_failure(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def failure(local_rank: int, code: int, at: int) -> SimpleNamespace:
        return SimpleNamespace(local_rank=local_rank, exitcode=code, timestamp=at)

    log = tmp_path / "logs/x/attempt_0/1/stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text("ValueError: of this one alone\n")
    both = {4: failure(0, 1, 9), 5: failure(1, 3, 8)}
    assert train.read_failures(tmp_path, both) == 3
    assert capsys.readouterr().err == "process 5:\nValueError: of this one alone\n"
    (tmp_path / "code").write_text("75")
    assert train.read_failures(tmp_path, both) == 75
    assert capsys.readouterr().err == ""


def test_what_no_single_gpu_holds_is_sharded(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import torch

    gpu = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: gpu)
    monkeypatch.setattr(train, "count_parameters", lambda parameters: parameters)
    assert 2**20 < train.available_memory() < 2**60
    monkeypatch.setattr(train, "available_memory", lambda: 170 * 2**30)

    def choose(
        billions: float, processes: int, *flags: str, earlier: Any = None, device: str = "cuda"
    ) -> bool:
        monkeypatch.setattr(train, "WORLD_SIZE", processes)
        contract = {"training": {"precision": "bfloat16"}}
        args = train.parse_args([*flags])
        sharded = train.choose_sharding(args, billions * 2**30, device, contract, earlier)
        assert contract["training"]["sharded"] is sharded
        return sharded

    assert not choose(8, 4) and choose(20, 4)
    assert "needs about 48 GiB of a GPU's 24" in capsys.readouterr().out
    assert not choose(20, 4, "--fsdp", "never") and choose(1, 4, "--fsdp", "full_shard")
    assert not choose(20, 1)
    assert "may not fit" in capsys.readouterr().out
    assert choose(1, 4, earlier={"training": {"sharded": True}})
    assert not choose(20, 4, earlier={"training": {}})
    for flags, processes in ((("--fsdp",), 1), (("--fsdp", "--load_in_4bit"), 2)):
        with pytest.raises(SystemExit):
            choose(1, processes, *flags)
    assert capsys.readouterr().err.count("error: ") == 2
    # Without GPUs accelerate would shard nothing, and each process loads all of the base.
    for billions, device, message in (
        (1, "cpu", "needs GPUs, and this start has none"),
        (22, "cuda", "each of the 4 processes of this machine loads the whole base"),
    ):
        with pytest.raises(SystemExit) as ended:
            choose(billions, 4, "--fsdp", device=device)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and message in said
    assert "176 GiB of memory together, and 170 GiB are free" in said
    monkeypatch.setattr(train, "NODES", 2)
    assert choose(22, 4, "--fsdp")


@pytest.mark.parametrize(
    ("kind", "layers"), [("bert", "BertLayer"), ("llama", "LlamaDecoderLayer")]
)
def test_no_layer_to_shard_holds_the_embedding(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, layers: str
) -> None:
    import torch
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, num_hidden_layers=1, vocab_size=9, **sizes)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP")
    with torch.device("meta"):
        train.name_layers(AutoModel.from_config(config))
    assert os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] == layers


def shard_on_cpus() -> None:
    """Have accelerate shard over CPUs, where it leaves the plugin out without a word."""
    from accelerate import state
    from accelerate.utils import DistributedType

    begin = state.AcceleratorState.__init__

    def begin_sharded(self: Any, *values: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        begin(self, *values, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = begin_sharded


if __name__ == "__main__":
    shard_on_cpus()
    script = tiny.load_script("train/train.py")
    script.SHARDED_DEVICES = ("cpu",)
    script.main()
