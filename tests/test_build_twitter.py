"""datasets/build_twitter.py on made tweets in the form of Hate Speech Twitter.

pytest tests/test_build_twitter.py
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from huggingface_hub import HfApi
from tiny import load_script, read_config, write_csv

script = load_script("datasets/build_twitter.py")
CATEGORIES = [group["twitter"][0] for group in script.CATEGORIES.values()]
WORDS = ["gate", "river", "lamp", "stone", "cloud", "bread", "horse", "table", "music", "window"]


@pytest.fixture(autouse=True)
def no_settings(clean_environment: None) -> None:
    """What somebody's shell sets must not change a test."""


def tweets(split: str, hate: int, normal: int) -> list[dict[str, Any]]:
    """Train texts are lower-cased and stripped; test texts are raw, and differ by label."""
    draw, rows = random.Random(split), []
    for number in range(hate + normal):
        label = int(number < hate)
        text = f"{split} {100 + number * 37 % 800} " + " ".join(draw.choices(WORDS, k=12))
        if split == "test" and not label:
            text = f"@user {text.title()} #tag http://t.co/{number} itâ€™s &amp; more"
        category = CATEGORIES[number % 9] if label else ""
        rows.append({"tweet": text, "label": label, "categories": category})
    return rows


@pytest.fixture
def files(tmp_path: Path) -> dict[str, list[dict[str, Any]]]:
    return {"train": tweets("train", 180, 360), "test": tweets("test", 90, 90)}


def write(folder: Path, files: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Write both files; return the flags that name them."""
    flags = ["--output_dir", str(folder / "out")]
    for split, rows in files.items():
        write_csv(folder / f"{split}.csv", rows)
        flags += [f"--{split}_csv", str(folder / f"{split}.csv")]
    return flags


def build(folder: Path, files: dict[str, Any], *flags: str) -> tuple[dict, list[dict[str, Any]]]:
    """Run the script; return the contract and the rows of `unified`."""
    script.main([*write(folder, files), *flags])
    contract = json.loads((folder / "out" / "contract.json").read_text(encoding="utf-8"))
    return contract, read_config(folder / "out", "unified")


def test_official_partition(tmp_path: Path, files: dict[str, Any]) -> None:
    files["train"].append({"tweet": "", "label": 1, "categories": "Race"})
    files["train"].append({**files["train"][0]})
    contract, rows = build(tmp_path, files)
    assert contract["rows"]["test"] == 180 and contract["rows"]["train"] == 486
    assert contract["rows"]["validation"] == 54
    steps = {step["step"]: step["rows"] for step in contract["sources"][0]["steps"]}
    assert steps["read"] == 722 and steps["text not empty"] == 721
    assert steps["the first of each text"] == 720
    for row in rows:
        assert row["official_split"] == ("test" if row["split"] == "test" else "train")
        assert row["categories"] == ([row["persona"]] if row["label"] == "hate" else [])
        assert row["target_groups"] == [c.lower().replace(" ", "_") for c in row["categories"]]
    cells = Counter((row["split"], row["persona"]) for row in rows)
    assert {cells["validation", category] for category in CATEGORIES} == {2}
    assert contract["groups"] == [*script.CATEGORIES] and len(contract["groups"]) == 9


def test_train_and_test_are_cleaned_alike(tmp_path: Path, files: dict[str, Any]) -> None:
    for split in ("train", "test"):
        files[split].append({"tweet": f"{split} donâ€™t &lt;3", "label": 0, "categories": ""})
    _, rows = build(tmp_path, files)
    texts = {row["text"] for row in rows}
    assert {"train don’t <3", "test don’t <3"} <= texts  # noqa: RUF001
    assert not [text for text in texts if "â€" in text or "&amp;" in text]


def test_what_is_known_is_said_and_the_shortcut_found(
    tmp_path: Path, files: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    contract, _ = build(tmp_path, files)
    printed = capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for words in ("no licence", "come from different sources", "nobody checked", "no false positi"):
        assert words in printed and words in card
    assert any(
        warning.startswith("shortcut: depth-2 tree on surface (within test)")
        for warning in contract["warnings"]
    )
    [found] = [
        one
        for one in contract["audit"]["baselines"]
        if one["name"] == "depth-2 tree on surface" and one["data"] == "within test"
    ]
    assert found["balanced_accuracy"] > 0.95 and "--partition repartitioned" in printed
    # Only hateful posts have a category: there is no cell of negatives, and it is said so.
    assert {cell["negatives"] for cell in contract["audit"]["cells"].values()} == {0}
    assert "No negatives of" in card


def test_repartitioned_leaves_the_test_file_out_and_has_no_shortcut(
    tmp_path: Path, files: dict[str, Any]
) -> None:
    contract, rows = build(tmp_path, files, "--partition", "repartitioned")
    assert {row["official_split"] for row in rows} == {"train"}
    assert {split: contract["rows"][split] for split in script.SPLITS} == {
        "train": 378,
        "validation": 54,
        "test": 108,
    }
    assert not [w for w in contract["warnings"] if w.startswith("shortcut: depth-2 tree")]
    cells = Counter((row["split"], row["persona"]) for row in rows)
    assert {cells["test", category] for category in CATEGORIES} == {4}


def test_prompts_never_hold_the_category(tmp_path: Path, files: dict[str, Any]) -> None:
    contract, _ = build(tmp_path, files)
    for name in contract["prompts"]:
        for row in read_config(tmp_path / "out", name):
            strategy = contract["prompts"][name]
            assert row["prompt"] == script.prompt_messages(strategy, row["text"])


BAD_INPUT: dict[str, tuple[str, dict[str, Any] | None, list[str], str]] = {
    "unknown label": ("train", {"label": "2"}, [], "values of label outside the mapping: '2' (1)"),
    "unknown category": (
        "test",
        {"categories": "Weather"},
        [],
        "'Weather' (1). The mapping has:",
    ),
    "one file": ("", None, ["--test_csv", ""], "go together"),
    "no such file": ("", None, ["--test_csv", "./absent.csv"], "does not exist"),
    "target group in the prompt": (
        "",
        None,
        ["--prompt_template", "template.json"],
        "only hate has one",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(
    tmp_path: Path,
    files: dict[str, Any],
    case: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split, change, flags, message = BAD_INPUT[case]
    if change:
        files[split][0] |= change
    monkeypatch.chdir(tmp_path)
    template = {"user_template": "{text} about {target_group}: normal or hate?"}
    Path("template.json").write_text(json.dumps({"strategies": {"mine": template}}))
    arguments = write(tmp_path, files)
    if "" in flags:
        arguments, flags = arguments[:4], []
    with pytest.raises(SystemExit) as stop:
        script.main([*arguments, *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_column_and_cut_file(
    tmp_path: Path, files: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = write(tmp_path, files)
    content = (tmp_path / "test.csv").read_text(encoding="utf-8")
    for text, message in (
        (content.replace("categories", "kind", 1), "lacks the columns categories. It has: tweet"),
        (content[: len(content) // 2].rpartition(",")[0], "test.csv"),
    ):
        (tmp_path / "test.csv").write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit) as stop:
            script.main(flags)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_hub_files_with_spaces_in_their_names(
    alice: Hub, tmp_path: Path, files: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import load_dataset

    write(tmp_path, files)
    api = HfApi(endpoint=alice.endpoint, token=alice.token)
    api.create_repo("alice/tweets", repo_type="dataset")
    for split, name in (("train", "training data set.csv"), ("test", "testing data set.csv")):
        api.upload_file(
            repo_id="alice/tweets",
            repo_type="dataset",
            path_in_repo=name,
            path_or_fileobj=(tmp_path / f"{split}.csv").read_bytes(),
        )
    script.main(["--twitter", "alice/tweets"])
    printed = capsys.readouterr().out
    assert "not of the one read now" in printed and "alice/hsd-twitter@" in printed
    assert api.dataset_info("alice/hsd-twitter").private
    folder = alice.repo_folder("alice/hsd-twitter", "dataset")
    contract = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
    assert contract["inputs"][0]["repo"] == "alice/tweets"
    for config in ("unified", "simple", "optimized", "instruction"):
        data = load_dataset("alice/hsd-twitter", config, token=alice.token)
        assert {split: len(data[split]) for split in data} == contract["rows"]

    api.upload_file(
        repo_id="alice/tweets",
        repo_type="dataset",
        path_in_repo="another test.csv",
        path_or_fileobj=b"tweet,label,categories\n",
    )
    with pytest.raises(SystemExit):
        script.main(["--twitter", "alice/tweets"])
    assert "should hold one test file" in capsys.readouterr().err
