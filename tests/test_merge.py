"""merge/merge.py: what it refuses, and merged models that score as their adapters do.

pytest tests/test_merge.py
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import tiny
from hub import Hub
from huggingface_hub import HfApi
from tiny import load_script


@pytest.fixture(scope="module")
def merge() -> ModuleType:
    return load_script("merge/merge.py")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained causal adapter and a classifier, with their bases, as folders."""
    folder = tmp_path_factory.mktemp("merge")
    tiny.write_jsonl(folder / "posts.jsonl", tiny.post_rows()[:32])
    train = load_script("train/train.py")
    for kind, task in (("llama", "causal"), ("bert", "classify")):
        tiny.save_model(folder / kind, kind)
        flags = ["--train_file", str(folder / "posts.jsonl"), "--output_dir", str(folder / task)]
        flags += ["--model_name_or_path", str(folder / kind), "--task", task, "--report_to", "none"]
        flags += ["--max_steps", "6", "--learning_rate", "1e-2", "--warmup_steps", "0"]
        train.main([*flags, "--lora_target_modules", "all-linear"])
    return folder


def refusal(merge: ModuleType, capsys: pytest.CaptureFixture, *argv: str, code: int = 2) -> str:
    """Run main and return the message it ends with; it must exit with `code`."""
    with pytest.raises(SystemExit) as end:
        merge.main(list(argv))
    message = capsys.readouterr().err
    assert end.value.code == code, message
    assert "error: " in message and "Traceback" not in message
    return message


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal"), ("bert", "classify")])
def test_the_merged_model_scores_as_the_adapter(
    merge: ModuleType, work: Path, tmp_path: Path, kind: str, task: str
) -> None:
    out = tmp_path / "merged"
    flags = ["--adapter", str(work / task), "--model_name_or_path", str(work / kind)]
    merge.main([*flags, "--output_dir", str(out)])
    contract = json.loads((out / "contract.json").read_text())
    difference = contract["largest_probability_difference"]
    assert difference["merged_against_adapter"] < 1e-5 < difference["adapter_against_base"]
    assert contract["stage"] == "merged" and contract["labels"] == ["normal", "hate"]
    assert (out / "model.safetensors").is_file() and (out / "tokenizer.json").is_file()
    assert not (out / "adapter_config.json").exists()
    for file in out.glob("*.json"):
        assert str(work) not in file.read_text(), file
    merge.main([*flags, "--output_dir", str(out)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_a_model_that_scores_otherwise_is_not_published(
    merge: ModuleType,
    alice: Hub,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The base changes between the adapter's scores and the merged model's."""
    load_base = merge.load_base

    def changed(repo: object, *rest: object) -> object:
        model = load_base(repo, *rest)
        if repo.folder.name == "model":
            for weight in model.parameters():
                weight.data *= 1.1
        return model

    monkeypatch.setattr(merge, "load_base", changed)
    flags = ["--adapter", str(work / "causal"), "--model_name_or_path", str(work / "llama")]
    flags += ["--output_dir", str(tmp_path / "out"), "--hub_model_id", "alice/unequal"]
    message = refusal(merge, capsys, *flags, code=1)
    assert "differ from the adapter's" in message and "nothing is published" in message
    assert not (tmp_path / "out").exists()
    assert [commit["message"] for commit in alice.commits("alice/unequal")] == ["initial commit"]


def test_what_it_refuses(
    merge: ModuleType,
    alice: Hub,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(merge, "load_base", lambda *_: pytest.fail("the model was loaded"))
    out = ["--output_dir", str(tmp_path / "out")]
    base = ["--model_name_or_path", str(work / "llama")]
    adapter = ["--adapter", str(work / "causal")]
    assert "no such repo" in refusal(merge, capsys, "--adapter", "alice/none", *out)
    assert "does not exist" in refusal(merge, capsys, "--adapter", "./nowhere", *out)
    assert "--model_name_or_path" in refusal(merge, capsys, *adapter, *out)
    message = refusal(merge, capsys, "--adapter", "alice/a", "--hub_model_id", "alice/a")
    assert "own repo" in message
    for name in ("contract.json", "adapter_config.json", "adapter_model.safetensors"):
        broken = tmp_path / name
        shutil.copytree(work / "causal", broken, ignore=shutil.ignore_patterns("checkpoint-*"))
        (broken / name).unlink()
        message = refusal(merge, capsys, "--adapter", str(broken), *base, *out)
        assert f"holds no {name}" in message
    HfApi(token=alice.token).create_repo("alice/merge-open", private=False)
    message = refusal(merge, capsys, *adapter, *base, "--hub_model_id", "alice/merge-open")
    assert "is public" in message
    monkeypatch.setenv("HF_TOKEN", "hf_alice_read")
    message = refusal(merge, capsys, *adapter, *base, "--hub_model_id", "alice/merge-read")
    assert "write access" in message
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    message = refusal(merge, capsys, *adapter, *base, "--output_dir", str(tmp_path / "mine"))
    assert "files of something else" in message
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_named_by_the_first_differing_token(
    merge: ModuleType, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = shutil.copytree(work / "causal", tmp_path / "copy")
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|start|>", "<|start|>the "))
    flags = ["--adapter", str(copy), "--model_name_or_path", str(work / "llama")]
    message = refusal(merge, capsys, *flags, "--output_dir", str(tmp_path / "out"))
    assert "another prompt" in message and "token 1 was" in message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("adapter_model.safetensors", "does not fit the base"),
        ("adapter_config.json", "does not fit the base"),
        ("tokenizer.json", "a file is damaged"),
        ("contract.json", "is damaged"),
    ],
)
def test_a_cut_off_file_is_named(
    merge: ModuleType,
    work: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    name: str,
    says: str,
) -> None:
    ignored = shutil.ignore_patterns("checkpoint-*")
    copy = shutil.copytree(work / "causal", tmp_path / "copy", ignore=ignored)
    (copy / name).write_bytes((copy / name).read_bytes()[:50])
    flags = ["--adapter", str(copy), "--model_name_or_path", str(work / "llama")]
    message = refusal(merge, capsys, *flags, "--output_dir", str(tmp_path / "out"))
    assert says in message and not (tmp_path / "out").exists()


def test_a_folder_of_another_stage_is_never_replaced(
    merge: ModuleType, work: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--adapter", str(work / "causal"), "--model_name_or_path", str(work / "llama")]
    message = refusal(merge, capsys, *flags, "--output_dir", str(work / "causal"))
    assert "stage 'adapter'" in message
    assert (work / "causal" / "adapter_model.safetensors").is_file()


def test_a_missing_adapter_leaves_no_repo_behind(
    merge: ModuleType, alice: Hub, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--adapter", "alice/none", "--hub_model_id", "alice/merged-none"]
    assert "no such repo" in refusal(merge, capsys, *flags)
    assert not HfApi(token=alice.token).repo_exists("alice/merged-none")


def test_the_merge_of_another_adapter_is_not_replaced(
    merge: ModuleType, alice: Hub, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--model_name_or_path", str(work / "llama"), "--hub_model_id", "alice/merged-one"]
    merge.main(["--adapter", str(work / "causal"), *flags])
    merge.main(["--adapter", str(work / "causal"), *flags])
    other = shutil.copytree(work / "causal", tmp_path / "other")
    message = refusal(merge, capsys, "--adapter", str(other), *flags)
    assert "alice/merged-one holds causal merged" in message


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "completions",
    [
        [[70], [90]],
        [[70, 2], [90, 2]],
        [[70, 71, 72, 2], [90, 2]],
        [[80, 81, 70], [80, 81, 90, 91, 92], [80, 99]],
    ],
    ids=["one token", "same end", "mixed lengths", "shared beginning"],
)
def test_label_scores_equal_one_forward_per_label(
    merge: ModuleType, tmp_path: Path, kind: str, completions: list[list[int]]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path / kind, kind)).eval()
    chance = random.Random(3)
    prompts = [[chance.randrange(3, 250) for _ in range(chance.randrange(1, 40))] for _ in range(9)]
    naive = []
    for prompt in prompts:
        row = []
        for completion in completions:
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + completion])).logits[0]
            likelihood = torch.log_softmax(logits.float(), dim=-1)
            row.append(
                sum(
                    likelihood[len(prompt) - 1 + place, token].item()
                    for place, token in enumerate(completion)
                )
            )
        naive.append(row)
    common = len(merge.common_prefix(completions))
    for budget in (1, 90, 8192):
        scores = merge.score_completions(model, prompts, completions, 0, budget)
        for found, expected in zip(scores, naive, strict=True):
            if common:  # what all labels begin with is left out of every score
                found = [value - found[0] for value in found]
                expected = [value - expected[0] for value in expected]
            assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_class_scores_equal_one_post_at_a_time(
    merge: ModuleType, tmp_path: Path, kind: str
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = tiny.save_model(tmp_path / kind, kind)
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    chance = random.Random(4)
    posts = [[chance.randrange(3, 250) for _ in range(chance.randrange(1, 50))] for _ in range(11)]
    with torch.inference_mode():
        naive = [model(torch.tensor([post])).logits[0].tolist() for post in posts]
    for budget in (1, 100, 8192):
        scores = merge.score_classes(model, posts, model.config.pad_token_id, budget)
        for found, expected in zip(scores, naive, strict=True):
            assert found == pytest.approx(expected, abs=1e-5)
