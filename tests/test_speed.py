"""train/train.py computes a step faster, and it is the same step.

pytest tests/test_speed.py

Runs of tiny models; "stock" is the same run with the trainer's own batches, logits and attention.
What a resume makes of each way of computing is in tests/test_exact.py.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
from tiny import load_script

RUN = [
    *("--max_steps", "5", "--save_steps", "5", "--logging_steps", "1", "--warmup_steps", "0"),
    *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3"),
    *("--lr_scheduler_type", "constant", "--learning_rate", "5e-3", "--lora_r", "4"),
    *("--early_stopping_patience", "0", "--report_to", "none", "--lora_dropout", "0"),
]
FIGURES = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "eval_loss")
CLASSIFIER = ["--task", "classify", "--lora_target_modules", "all-linear"]


@pytest.fixture(scope="module")
def train() -> ModuleType:
    return load_script("train/train.py")


@pytest.fixture(autouse=True)
def clean(clean_environment: None) -> None:
    """No flag comes from the environment."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 posts: the last of three steps of 6 rows is incomplete."""
    folder = tmp_path_factory.mktemp("speed")
    rows = tiny.post_rows()
    # Posts of very different lengths, or sorting them would change nothing.
    for number, row in enumerate(rows[:16]):
        row["text"] = " ".join([row["text"]] * (1 + number % 5))
    tiny.write_jsonl(folder / "train.jsonl", rows[:16])
    tiny.write_jsonl(folder / "validation.jsonl", rows[16:20])
    tiny.save_model(folder / "llama")
    tiny.save_model(folder / "bert", "bert")
    config = json.loads((folder / "bert/config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "bert/config.json").write_text(json.dumps(config))
    return folder


def run(train: ModuleType, files: Path, out: Path, *flags: str, model: str = "llama") -> list[dict]:
    """A run in a folder; return its logged figures."""
    train.main(
        [
            *("--train_file", str(files / "train.jsonl"), "--output_dir", str(out)),
            *("--validation_file", str(files / "validation.jsonl")),
            *("--model_name_or_path", str(files / model), *RUN, *flags),
        ]
    )
    newest = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    entries = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [{key: entry[key] for key in FIGURES if key in entry} for entry in entries]


def chosen(out: Path) -> dict[str, Any]:
    return json.loads((out / "contract.json").read_text())["training"]["speed"]


def stock(monkeypatch: pytest.MonkeyPatch, train: ModuleType) -> None:
    """From here on runs are computed as the library's trainer does by itself."""

    def measure(args: Any, trainer: Any) -> None:
        trainer.speed = train.Speed()

    monkeypatch.setattr(train, "measure_speed", measure)


def assert_same(found: list[dict], expected: list[dict], tolerance: float = 1e-4) -> None:
    assert len(found) == len(expected) >= 5
    for step, other in zip(found, expected, strict=True):
        assert step == pytest.approx(other, rel=tolerance, abs=tolerance)


# --- micro-batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 40])
def test_micro_batches_hold_each_row_once_and_no_more_than_they_may(
    train: ModuleType, shared: int
) -> None:
    chance = random.Random(0)
    for _ in range(50):
        lengths = [chance.randrange(1, 200) for _ in range(chance.randrange(1, 60))]
        most = chance.randrange(100, 2000)
        parts = train.split_by_length(lengths, most, shared)
        assert sorted(index for part in parts for index in part) == [*range(len(lengths))]
        for part in parts:
            longest = max(lengths[index] for index in part)
            assert len(part) == 1 or len(part) * (longest + shared) <= most


@pytest.mark.parametrize("one", [0, 64, 1000])
def test_micro_batches_cost_no_more_than_any_other_cut(train: ModuleType, one: int) -> None:
    lengths, most = [9, 150, 80, 10, 81, 12, 160, 11], 400

    def cost(parts: list[list[int]]) -> int:
        return sum(len(part) * max(lengths[index] for index in part) + one for part in parts)

    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    every = []
    for cuts in range(2 ** (len(order) - 1)):
        parts, part = [], [order[0]]
        for place, index in enumerate(order[1:]):
            if cuts >> place & 1:
                parts.append(part)
                part = []
            part.append(index)
        parts.append(part)
        if all(len(part) * lengths[part[0]] <= most for part in parts):
            every.append(cost(parts))
    assert cost(train.split_by_length(lengths, most, cost_of_one=one)) == min(every)


@pytest.mark.parametrize(("cost", "expected"), [(0, [1, 1]), (1000, [2])])
def test_a_step_is_split_by_the_cost_on_record(
    train: ModuleType, cost: int, expected: list[int]
) -> None:
    trainer = train.FastSteps()
    trainer.args, trainer.longest = SimpleNamespace(world_size=1), 100
    trainer.data_collator = lambda rows: {"rows": len(rows)}
    trainer.speed = train.Speed(sort=True, micro_batch=4, micro_batch_cost=cost)
    step = trainer.build_step([{"input_ids": [1] * length} for length in (10, 100)])
    assert [batch["rows"] for batch in step.batches] == expected


def test_supervised_places_are_found_before_a_batch_is_on_the_device(train: ModuleType) -> None:
    import torch

    trainer = train.FastSteps()
    trainer.data_collator = lambda rows: {"labels": torch.tensor([row["labels"] for row in rows])}
    rows = [{"labels": [-100, -100, 5, 6]}, {"labels": [-100, 7, -100, -100]}]
    assert "places" not in trainer.collate(rows)
    trainer.speed = train.Speed(labelled_only=True)
    places = trainer.collate(rows)["places"]
    assert [found.tolist() for found in places] == [[0, 0, 1], [1, 2, 0]]


@pytest.mark.parametrize(
    ("launch", "per_token", "expected"),
    [(0.5, 0.001, 512), (0.0, 0.001, 1), (0.5, 1e-9, 800), (0.5, 0.0, 800)],
)
def test_a_micro_batch_costs_what_its_launch_takes_in_tokens(
    train: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    launch: float,
    per_token: float,
    expected: int,
) -> None:
    import torch

    trainer = SimpleNamespace(speed=train.Speed(micro_batch=4))
    tried = [{"input_ids": [1] * length} for length in (100, 20, 10)]
    warm = set()

    def try_step(_: Any, parts: list[list[dict[str, Any]]]) -> float:
        rows = parts[0]
        if len(rows) > 5:
            raise torch.OutOfMemoryError("simulated")
        cold = 9.0 * (len(rows) not in warm)
        warm.add(len(rows))
        return cold + launch + per_token * sum(len(row["input_ids"]) for row in rows)

    monkeypatch.setattr(train, "try_step", try_step)
    monkeypatch.setattr(train, "release_memory", lambda _: None)
    assert train.measure_cost(trainer, tried, 8) == expected
    # A step of one row tells nothing.
    assert train.measure_cost(trainer, [tried[1]] * 3, 1) == train.MICRO_BATCH_COST


def test_all_processes_get_as_many_micro_batches(train: ModuleType) -> None:
    sizes = [
        [len(part) for part in train.split_evenly(lengths, 4)]
        for lengths in ([5] * 10, [*range(1, 11)])
    ]
    assert sizes == [[4, 4, 2], [4, 4, 2]]


# --- the same step ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="prompt-once"),
        pytest.param(["--share_prompt", "never"], id="sorted"),
        pytest.param(["--packing", "true", "--per_device_train_batch_size", "1"], id="packing"),
        pytest.param(["--dataloader_num_workers", "1"], id="workers"),
        pytest.param(["--auto_batch"], id="auto-batch"),
        pytest.param(["--activation_checkpointing", "true"], id="checkpointing"),
        pytest.param(["--train_sampling_strategy", "group_by_length"], id="group-by-length"),
    ],
)
def test_a_causal_step_is_the_stock_trainers(
    train: ModuleType,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
) -> None:
    found = run(train, files, tmp_path / "fast", *flags)
    speed = chosen(tmp_path / "fast")
    assert speed["sort"] and speed["labelled_only"]
    shares = not {"never", "--packing", "--activation_checkpointing"} & {*flags}
    assert (speed["prompt_tokens"] > 20) == shares
    checkpointing = "--activation_checkpointing" in flags
    assert speed["last_layer"] == (None if checkpointing else "labelled")
    stock(monkeypatch, train)
    expected = run(train, files, tmp_path / "stock", *flags)
    # TRL averages entropy and accuracy over micro-batches, however few tokens they hold.
    for entry in (*found, *expected):
        entry.pop("entropy", None)
        entry.pop("mean_token_accuracy", None)
    assert_same(found, expected)


@pytest.mark.parametrize(
    "kind",
    ["gpt2", "gemma3_text"]
    + [pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen3", "gpt_oss", "mistral3")],
)
def test_models_with_other_heads_and_attention_keep_their_loss(
    train: ModuleType, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tiny.save_model(tmp_path / kind, kind)
    if kind == "gpt2":
        config = json.loads((tmp_path / kind / "config.json").read_text())
        config |= {name: 0.0 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")}
        (tmp_path / kind / "config.json").write_text(json.dumps(config))
    found = run(train, files, tmp_path / "fast", model=str(tmp_path / kind))
    assert chosen(tmp_path / "fast")["labelled_only"]
    assert chosen(tmp_path / "fast")["prompt_tokens"] > 20
    assert chosen(tmp_path / "fast")["last_layer"] == "labelled"
    stock(monkeypatch, train)
    expected = run(train, files, tmp_path / "stock", model=str(tmp_path / kind))
    for entry in (*found, *expected):
        entry.pop("entropy", None)
        entry.pop("mean_token_accuracy", None)
    assert_same(found, expected, 1e-3)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 20.0}),
        ("Granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0}),
        ("Cohere", {"logit_scale": 0.5}),
    ],
)
def test_scaled_and_capped_logits_are_the_models_own(
    train: ModuleType,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    kind: str,
    changes: dict[str, float],
) -> None:
    import torch
    import transformers

    tokenizer = tiny.save_tokenizer(tmp_path / kind)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.3,
        **changes,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(tmp_path / kind)
    run(train, files, tmp_path / "fast", "--max_steps", "1", model=str(tmp_path / kind))
    assert "speed: not" not in capsys.readouterr().out
    assert chosen(tmp_path / "fast")["labelled_only"]


@pytest.mark.parametrize(
    ("kind", "read", "more"),
    [
        ("bert", "first", []),
        ("llama", "last", ["--label_smoothing_factor", "0.1"]),
        ("modernbert", None, []),
    ],
)
def test_a_classifiers_loss_is_the_mean_over_all_rows_of_a_step(
    train: ModuleType,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    read: str | None,
    more: list[str],
) -> None:
    """The stock trainer's mean of means differs in the last, incomplete step of an epoch.

    This ModernBERT's head reads the mean of all tokens: nothing of its last layer can be left out.
    """
    if kind == "modernbert":
        tiny.save_model(files / kind, kind)
        config = json.loads((files / kind / "config.json").read_text())
        names = ("mlp_dropout", "attention_dropout", "embedding_dropout", "classifier_dropout")
        config |= dict.fromkeys(names, 0.0) | {"classifier_pooling": "mean"}
        (files / kind / "config.json").write_text(json.dumps(config))
    whole = ["--per_device_train_batch_size", "6", "--gradient_accumulation_steps", "1"]
    flags = [*CLASSIFIER, "--learning_rate", "1e-3", *more]
    found = run(train, files, tmp_path / "fast", *flags, model=kind)
    assert chosen(tmp_path / "fast")["sort"]
    assert chosen(tmp_path / "fast")["last_layer"] == read
    stock(monkeypatch, train)
    expected = run(train, files, tmp_path / "stock", *flags, *whole, model=kind)
    assert_same(found, expected)


def test_linear_layers_are_stored_as_autocast_rounds_them(
    train: ModuleType, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--dtype", "float32", "--bf16", "true"]
    found = run(train, files, tmp_path / "stored", *flags)
    monkeypatch.setattr(train, "round_frozen", lambda _: None)
    assert run(train, files, tmp_path / "rounded", *flags) == found
    files = ("stored/adapter_model.safetensors", "rounded/adapter_model.safetensors")
    assert len({(tmp_path / file).read_bytes() for file in files}) == 1


def test_a_tied_head_is_not_rounded(train: ModuleType, tmp_path: Path) -> None:
    import torch
    import transformers

    tokenizer = tiny.save_tokenizer(tmp_path)
    model = tiny.build_model("gemma3_text", tokenizer).requires_grad_(False)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert isinstance(model, transformers.PreTrainedModel)
    train.round_frozen(model)
    assert model.lm_head.weight.dtype == torch.float32
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


# --- what does not fit -----------------------------------------------------------------------


def test_auto_batch_continues_a_step_that_ran_out_of_memory(
    train: ModuleType,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    import torch
    import transformers

    expected = run(train, files, tmp_path / "whole", "--auto_batch")
    size = chosen(tmp_path / "whole")["micro_batch"]
    assert size == 6
    step = transformers.Trainer.training_step
    raised = []

    def small(trainer: Any, model: Any, inputs: Any, *values: Any) -> Any:
        loss = step(trainer, model, inputs, *values)
        # After the backward pass of the third step: its gradients must not count.
        if trainer.state.global_step == 2 and len(inputs["labels"]) > 2:
            raised.append(len(inputs["labels"]))
            raise torch.OutOfMemoryError("simulated")
        return loss

    monkeypatch.setattr(transformers.Trainer, "training_step", small)
    found = run(train, files, tmp_path / "halved", "--auto_batch")
    assert raised
    assert "out of memory in step 3; it is computed again" in capsys.readouterr().out
    assert chosen(tmp_path / "halved")["micro_batch"] < size
    assert_same(found, expected)


def test_auto_batch_starts_with_the_largest_that_fits(
    train: ModuleType, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transformers

    step = transformers.Trainer.training_step

    def small(trainer: Any, model: Any, inputs: Any, *values: Any) -> Any:
        if len(inputs["labels"]) > 4:
            raise torch.OutOfMemoryError("simulated")
        return step(trainer, model, inputs, *values)

    monkeypatch.setattr(transformers.Trainer, "training_step", small)
    run(train, files, tmp_path / "out", "--auto_batch", "--share_prompt", "never")
    assert chosen(tmp_path / "out")["micro_batch"] == 4


def test_the_end_of_memory_is_said_in_words_and_auto_batch_goes_on(
    train: ModuleType,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    import torch
    import transformers

    step = transformers.Trainer.training_step

    def small(trainer: Any, *values: Any) -> Any:
        if trainer.state.global_step and trainer.speed.micro_batch > 1:
            raise torch.OutOfMemoryError("simulated")
        return step(trainer, *values)

    monkeypatch.setattr(transformers.Trainer, "training_step", small)
    with pytest.raises(SystemExit) as end:
        run(train, files, tmp_path / "out", "--save_steps", "1")
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert "error: out of memory in step 2" in message
    assert "The same command with --activation_checkpointing true or with --auto_batch" in message
    # As on a machine with less memory than the one that the run began on.
    run(train, files, tmp_path / "out", "--save_steps", "1", "--auto_batch")
    printed = capsys.readouterr().out
    assert "auto_batch changes from False to True" in printed and "step 5/5" in printed
    assert chosen(tmp_path / "out")["micro_batch"] == 1


def test_what_is_tried_is_what_training_builds_and_leaves_no_memory_taken(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    device = SimpleNamespace(type="cuda")
    trainer = SimpleNamespace(
        args=SimpleNamespace(device=device), model=SimpleNamespace(zero_grad=lambda: None)
    )
    tried = [{"input_ids": [1] * 100}, {"input_ids": [1] * 20}]
    gpu = SimpleNamespace(total_memory=100)
    step: dict[str, Any] = {"peak": 80, "error": None}
    sizes, events = [], []

    class Tensor:
        def __del__(self) -> None:
            events.append("freed")

    def try_step(_: Any, parts: list[list[dict[str, Any]]]) -> float:
        tensor = Tensor()
        sizes.append([(len(part), len(part[0]["input_ids"])) for part in parts])
        if step["error"]:
            raise step["error"](str(tensor))
        return 1.0

    monkeypatch.setattr(train, "try_step", try_step)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: events.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: step["peak"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    order = ["emptied", "reset", "freed", "emptied"]
    assert train.fits(trainer, tried, 2, 8) and events == order
    # The longest rows, and as many tokens of usual ones: no more than a step has rows.
    assert sizes == [[(2, 100), (8, 20)]]
    step["peak"] = 91
    assert not train.fits(trainer, tried, 2, 8) and events == 2 * order
    step["error"] = torch.OutOfMemoryError
    assert not train.fits(trainer, tried, 2, 8) and events == 3 * order
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    train.fits(trainer, tried, 2, 8)
    assert sizes[-1] == [(2, 100)]


@pytest.mark.parametrize("fits", [True, False])
def test_activation_checkpointing_only_where_the_longest_rows_do_not_fit(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    trainer = SimpleNamespace(speed=train.Speed(sort=True, micro_batch=2, prompt_tokens=30))
    switched = []
    monkeypatch.setattr(train, "fits", lambda *_: fits)
    monkeypatch.setattr(train, "set_checkpointing", lambda _, on: switched.append(on))
    train.choose_memory(trainer, [], 6, auto_batch=False, checkpointing=True)
    assert trainer.speed.activation_checkpointing == (not fits) == bool(switched)
    assert trainer.speed.prompt_tokens == (30 if fits else 0)


@pytest.mark.parametrize(
    ("model", "flags"), [("llama", []), ("bert", CLASSIFIER)], ids=["causal", "classifier"]
)
@pytest.mark.parametrize("faster", ["sdpa", "eager"])
def test_the_faster_attention_with_the_same_loss_is_taken(
    train: ModuleType,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    flags: list[str],
    faster: str,
) -> None:
    expected = run(train, files, tmp_path / "given", *flags, model=model)
    monkeypatch.setattr(train, "MEASURED_FROM", 0)
    trying = train.try_step

    def seconds(trainer: Any, parts: list[list[dict[str, Any]]]) -> float:
        trying(trainer, parts)
        return 1.0 if trainer.model.config._attn_implementation == faster else 2.0

    monkeypatch.setattr(train, "try_step", seconds)
    found = run(train, files, tmp_path / "measured", *flags, model=model)
    assert chosen(tmp_path / "measured")["attention"] == faster
    assert_same(found, expected)


def test_an_attention_that_there_is_not_is_refused_in_words(
    train: ModuleType, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        run(train, files, tmp_path / "out", "--attn_implementation", "flash_attention_2")
    assert end.value.code == 2
    assert "error: --attn_implementation flash_attention_2: " in capsys.readouterr().err


# --- fallbacks -------------------------------------------------------------------------------


def test_another_loss_than_the_models_own_falls_back(
    train: ModuleType,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    build = train.build_trainer

    def build_with_wrong_head(*values: Any, **options: Any) -> Any:
        trainer = build(*values, **options)
        head = trainer.model.get_base_model().get_output_embeddings()
        # A head that looks at the whole sequence, as no compact one can.
        head.register_forward_hook(lambda _, states, out: out + states[0].shape[0])
        forward = head.forward
        head.forward = lambda states: forward(states) * (1 + states.shape[0] / 10)
        return trainer

    monkeypatch.setattr(train, "build_trainer", build_with_wrong_head)
    run(train, files, tmp_path / "out", "--max_steps", "1")
    assert "speed: not logits at supervised tokens only: the loss" in capsys.readouterr().out
    assert not chosen(tmp_path / "out")["labelled_only"]
    assert chosen(tmp_path / "out")["sort"]


def test_one_process_measures_without_the_others(
    train: ModuleType, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's loss gathers over all processes, of which the others wait for what is chosen."""
    import accelerate

    measure, gather = train.measure_speed, accelerate.Accelerator.gather_for_metrics
    tried: list[int] = []

    def alone(args: Any, trainer: Any) -> None:
        def wait(*_: Any) -> None:
            raise AssertionError("a process that measures waits for the others")

        monkeypatch.setattr(accelerate.Accelerator, "gather_for_metrics", wait)
        measure(args, trainer)
        tried.append(trainer.speed.micro_batch)
        monkeypatch.setattr(accelerate.Accelerator, "gather_for_metrics", gather)

    monkeypatch.setattr(train, "measure_speed", alone)
    flags = ["--auto_batch", "--label_smoothing_factor", "0.1", "--max_steps", "1"]
    run(train, files, tmp_path / "out", *flags)
    assert tried == [6] and not chosen(tmp_path / "out")["labelled_only"]


def test_a_part_that_makes_keys_is_not_left_out(
    train: ModuleType,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(train, "TOKENWISE", train.TOKENWISE | {"k_proj"})
    run(train, files, tmp_path / "out", "--max_steps", "1")
    said = capsys.readouterr().out
    assert "speed: not of the last layer the supervised tokens only: the loss" in said
    assert chosen(tmp_path / "out")["last_layer"] is None
    assert chosen(tmp_path / "out")["labelled_only"]


def test_lora_on_the_head_is_refused_in_words(
    train: ModuleType, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        run(train, files, tmp_path / "out", "--lora_target_modules", "lm_head")
    assert "lm_head" in capsys.readouterr().err


def test_rows_without_padding_where_attention_keeps_them_apart(
    train: ModuleType,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """On a CPU sdpa finds the rows by their positions, as flash attention by their lengths."""
    never = ("--share_prompt", "never")
    expected = run(train, files, tmp_path / "padded", *never)
    monkeypatch.setattr(train, "is_varlen", lambda _: True)
    found = run(train, files, tmp_path / "packed", *never)
    assert chosen(tmp_path / "packed")["packed"]
    assert_same(found, expected)
    pack = train.collate_packed

    def leak(rows: list[dict[str, Any]]) -> dict[str, Any]:
        kept = ("input_ids", "labels")
        return {name: value for name, value in pack(rows).items() if name in kept}

    monkeypatch.setattr(train, "collate_packed", leak)
    capsys.readouterr()
    run(train, files, tmp_path / "leak", *never, "--max_steps", "1")
    assert "speed: not rows without padding: the loss" in capsys.readouterr().out
    assert not chosen(tmp_path / "leak")["packed"]


def test_with_dropout_the_prompt_is_shared_only_where_it_is_asked_for(
    train: ModuleType, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    dropout = ["--lora_dropout", "0.1", "--max_steps", "1"]
    run(train, files, tmp_path / "auto", *dropout)
    assert "--lora_dropout 0 or --share_prompt always" in capsys.readouterr().out
    assert not chosen(tmp_path / "auto")["prompt_tokens"]
    run(train, files, tmp_path / "always", *dropout, "--share_prompt", "always")
    assert chosen(tmp_path / "always")["prompt_tokens"] > 20


# --- resume ----------------------------------------------------------------------------------


def test_a_resumed_run_computes_as_its_first_start_chose(
    train: ModuleType, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(train, files, tmp_path / "out", "--max_steps", "3")
    first = chosen(tmp_path / "out")
    assert first["prompt_tokens"]

    def measure(*_: Any) -> None:
        raise AssertionError("a resumed run measures nothing")

    monkeypatch.setattr(train, "measure_speed", measure)
    run(train, files, tmp_path / "out", "--max_steps", "6")
    assert chosen(tmp_path / "out") == first


def test_a_run_of_an_older_version_goes_on_as_it_was(
    train: ModuleType, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stock(patch, train)
        expected = run(train, files, tmp_path / "whole", "--max_steps", "6")
        run(train, files, tmp_path / "out", "--max_steps", "3", "--save_steps", "3")
    contract = json.loads((tmp_path / "out/contract.json").read_text())
    del contract["training"]["speed"]
    for name in ("attn_implementation", "auto_batch", "share_prompt"):
        del contract["arguments"][name]
    (tmp_path / "out/contract.json").write_text(json.dumps(contract))
    found = run(train, files, tmp_path / "out", "--max_steps", "6", "--save_steps", "3")
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (found, expected)]
    assert losses[0] == losses[1]
    assert "speed" not in json.loads((tmp_path / "out/contract.json").read_text())["training"]


# --- supervision -----------------------------------------------------------------------------


def test_a_row_without_an_answer_ends_the_start(
    train: ModuleType, tmp_path: Path, files: Path, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = tiny.save_tokenizer(tmp_path)
    end = tokenizer.eos_token_id
    examples = [{"labels": [-100, *tokenizer(" hate")["input_ids"], end]}, {"labels": [-100, end]}]
    with pytest.raises(SystemExit) as stop:
        train.check_supervision(tokenizer, [{"id": "a"}, {"id": "b"}], examples)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "row b trains on no answer" in message and "'<|end|>' (1)" in message


def test_labels_that_the_trainer_cut_end_the_start(
    train: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"labels": [-100, 5, 6]}, {"labels": [-100, 7]}]
    kept = SimpleNamespace(train_dataset={"labels": [[-100, 5], [-100, 7]]})
    with pytest.raises(SystemExit):
        train.check_kept_labels(kept, rows)
    assert "3 supervised tokens, of which packing or cutting left 2." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("row", ["lora3b", "qlora3b", "gptoss20b"])
def test_the_gpu_benchmark_runs_with_tiny_shapes(tmp_path: Path, row: str) -> None:
    words = [sys.executable, "tests/bench_gpu.py", "--tiny", "--only", row, "--rounds", "1"]
    words += ["--steps", "3", "--skip", "1"]
    done = subprocess.run(words, cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    ours, theirs = done.stdout.splitlines()[-2:]
    assert ours.startswith(f"| {row} | ours | ") and theirs.startswith(f"| {row} | trl | ")
    assert float(ours.split("|")[-2]) < 1e-3


@pytest.mark.gpu
def test_on_a_gpu_the_choices_are_measured_there(
    train: ModuleType, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    measure, costs = train.measure_cost, []
    monkeypatch.setattr(
        train, "measure_cost", lambda *values: costs.append(measure(*values)) or costs[-1]
    )
    found = run(train, files, tmp_path / "fast", "--auto_batch")
    speed = chosen(tmp_path / "fast")
    assert not speed["activation_checkpointing"] and speed["last_layer"] == "labelled"
    assert speed["micro_batch"] == 6 and [speed["micro_batch_cost"]] == costs
    stock(monkeypatch, train)
    expected = run(train, files, tmp_path / "stock")
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-2)
