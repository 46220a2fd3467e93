"""datasets/build_unified.py on made posts in the official formats.

python -m pytest tests/test_build_unified.py
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from huggingface_hub import CommitOperationAdd, HfApi
from tiny import load_script

SCRIPT = Path(__file__).parents[1] / "datasets" / "build_unified.py"
TARGETS = {"lgbtq": "Homosexual", "mexican": "Hispanic", "middle_east": "Arab"}
# Posts of each target and class in HateXplain's splits, statements of each group and class.
POSTS = {"train": 5, "val": 2, "test": 3}
STATEMENTS = 20


script = load_script("datasets/build_unified.py")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody's shell sets must not change a test."""
    for name in [*os.environ]:
        if name.startswith("HSD_") or name == "DATASET_REPO":
            monkeypatch.delenv(name)


# --- made sources ----------------------------------------------------------------------------


def make_post(text: str, labels: str | list[str], targets: list[list[str]], **other: Any) -> dict:
    """One post in the form of HateXplain's dataset.json; one label stands for three equal votes."""
    labels = [labels] * 3 if isinstance(labels, str) else labels
    votes = [
        {"label": label, "annotator_id": number, "target": target}
        for number, (label, target) in enumerate(zip(labels, targets, strict=True))
    ]
    tokens = text.split()
    masks = [] if labels.count("normal") > 1 else [[0] * (len(tokens) - 1) + [1]] * 2
    return {
        "post_id": text,
        "annotators": votes,
        "rationales": masks,
        "post_tokens": tokens,
    } | other


def make_posts() -> tuple[dict[str, dict], dict[str, list[str]]]:
    """Posts of every split, target and class, and those that the rules leave out."""
    posts, splits = {}, {split: [] for split in POSTS}
    for split, number in POSTS.items():
        for target in [*TARGETS.values(), "Women"]:
            for label in ("hatespeech", "offensive", "normal"):
                for index in range(number):
                    key = f"{split}_{target}_{label}_{index}"
                    text = f"post {key} says so"
                    posts[key] = make_post(text, label, [[target], ["None"], [target, "Women"]])
                    splits[split].append(key)
    three = ["hatespeech", "offensive", "normal"]
    posts["undecided"] = make_post("three opinions", three, [["Arab"]] * 3)
    posts["untargeted"] = make_post("nobody meant", "normal", [["None"]] * 3)
    splits["train"].append("untargeted")
    return posts, splits


def make_statements() -> list[dict[str, Any]]:
    """Rows of ToxiGen's annotated_train.csv: in each group four hate prompts gave harmless text."""
    rows = []
    for group in [*TARGETS, "women"]:
        for label in ("hate", "neutral"):
            for index in range(STATEMENTS):
                toxic = label == "hate" and index >= 4
                rows.append(
                    {
                        "text": repr(f"a {label} sentence\nnumber {index} on {group} 🙂".encode()),
                        "target_group": group,
                        "toxicity_ai": 3 if toxic else 2.5,
                        "toxicity_human": 3,
                        "label": label,
                    }
                )
    return rows


def csv_text(rows: list[dict[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


class Files:
    """Source files in a folder, and the script run on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.posts, self.splits = make_posts()
        self.statements = make_statements()

    def write(self) -> list[str]:
        """Write the sources; return the flags that name them."""
        texts = {
            "hatexplain": ("dataset.json", json.dumps(self.posts)),
            "hatexplain_splits": ("post_id_divisions.json", json.dumps(self.splits)),
            "toxigen": ("annotated_train.csv", csv_text(self.statements)),
        }
        flags = ["--dataset_repo", str(self.out)]
        for flag, (name, text) in texts.items():
            (self.folder / name).write_text(text, encoding="utf-8", newline="")
            flags += [f"--{flag}", str(self.folder / name)]
        return flags

    def build(self, *flags: str) -> dict[str, Any]:
        """Run the script in this process; return the contract it wrote."""
        script.main([*self.write(), *flags])
        return json.loads((self.out / "contract.json").read_text(encoding="utf-8"))

    def rows(self, config: str = "unified") -> list[dict[str, Any]]:
        """Every row of a config with its split and the label's name, read from the parquet."""
        import pyarrow.parquet

        rows = []
        for file in sorted((self.out / config).glob("*.parquet")):
            for row in pyarrow.parquet.read_table(file).to_pylist():
                label = script.LABELS[row["label"]]
                rows.append(row | {"split": file.name.split("-")[0], "label": label})
        return rows


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def parquet_bytes(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.parquet")}


# --- rules -----------------------------------------------------------------------------------


def test_counts_and_funnel(files: Files) -> None:
    contract = files.build()
    hatexplain, toxigen = contract["sources"]
    assert [(step["step"], step["rows"]) for step in hatexplain["steps"]] == [
        ("read", 4 * 3 * 10 + 2),
        ("in an official split, with a majority label", 4 * 3 * 10 + 1),
        ("about a group", 3 * 3 * 10),
        ("text not empty and not seen before", 3 * 3 * 10),
    ]
    assert hatexplain["steps"][2]["counts"]["test"] == {
        group: {"hatespeech": 3, "offensive": 3, "normal": 3} for group in TARGETS
    }
    assert [step["rows"] for step in toxigen["steps"]] == [160, 120, 120, 120]
    # HateXplain: n hate, 2n normal; ToxiGen: 70, 10 and 20 % of twenty in each cell.
    for split, (posts, statements) in {
        "train": (5, 14),
        "validation": (2, 2),
        "test": (3, 4),
    }.items():
        assert contract["splits"][split] == {
            "normal": dict.fromkeys(TARGETS, 2 * posts + statements),
            "hate": dict.fromkeys(TARGETS, posts + statements),
        }
    found = Counter((row["split"], row["label"], *row["target_groups"]) for row in files.rows())
    for (split, label, group), number in found.items():
        assert contract["splits"][split][label][group] == number
    assert contract["stage"] == "dataset" and contract["groups"] == list(TARGETS)
    assert contract["inputs"] == [] and hatexplain["id_or_file"] == "dataset.json"
    assert str(files.folder) not in json.dumps(contract)


def test_official_splits_are_kept(files: Files) -> None:
    files.build()
    for row in files.rows():
        if row["source"] == "hatexplain":
            assert row["split"] == row["official_split"]
            assert row["id"].startswith(row["split"][:3])
        else:
            assert row["official_split"] is None


def test_top_target() -> None:
    assert script.top_target(["None", "Arab", "Women", "Women"]) == "Women"
    assert script.top_target(["Women", "Arab", "Arab", "Women"]) == "Women"
    assert script.top_target(["Arab", "Women"]) == "Arab"
    assert script.top_target(["None", "None", "None", "Arab"]) == "Arab"
    assert script.top_target(["None"]) is None


def test_a_tie_of_targets_decides_the_group(files: Files) -> None:
    files.posts["tie"] = make_post("a tie", "normal", [["Women"], ["Arab", "Women"], ["Arab"]])
    files.posts["eit"] = make_post("eit a", "normal", [["Arab"], ["Arab", "Women"], ["Women"]])
    files.splits["test"] += ["tie", "eit"]
    files.build()
    assert {"tie", "eit"} & {row["id"] for row in files.rows()} == {"eit"}


def test_majority() -> None:
    assert script.majority(["normal", "offensive", "normal"]) == "normal"
    assert script.majority(["normal", "offensive", "hatespeech"]) is None
    assert script.majority(["normal", "offensive"]) is None
    assert script.majority([]) is None


@pytest.mark.parametrize("rule", ["normal", "hate", "drop"])
def test_offensive_as(files: Files, rule: str) -> None:
    contract = files.build("--offensive_as", rule)
    rows = [row for row in files.rows() if row["label_multiclass"] == "offensive"]
    assert {row["label"] for row in rows} == ({rule} if rule != "drop" else set())
    assert contract["rules"]["offensive_as"] == rule
    for row in files.rows():
        expected = {"hatespeech": "hate", "offensive": rule}
        assert row["label"] == expected.get(row["label_multiclass"], row["label_multiclass"])


def test_marked_words_and_votes(files: Files) -> None:
    mixed = make_post("they are the worst", ["hatespeech", "normal", "hatespeech"], [["Arab"]] * 3)
    mixed["rationales"] = [[1, 0, 0, 0], [0, 0, 0, 1]]
    files.posts["mixed"] = mixed
    files.splits["test"].append("mixed")
    files.build()
    rows = {row["id"]: row for row in files.rows()}
    assert rows["mixed"]["rationale"] == "they worst"
    assert rows["mixed"]["annotator_labels"] == ["hatespeech", "normal", "hatespeech"]
    assert rows["mixed"]["persona"] == "Arab" and rows["mixed"]["toxicity_ai"] is None
    assert rows["test_Arab_normal_0"]["rationale"] == ""
    assert rows["toxigen_0"]["annotator_labels"] == [] and rows["toxigen_0"]["rationale"] == ""


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        ("b'plain'", "plain"),
        ('b"it\'s \\n two lines"', "it's \n two lines"),
        ("b'na\\xc3\\xafve \\\\n'", "naïve \\n"),
        ("no literal", "no literal"),
        ("b", "b"),
        ("b'day is near", "b'day is near"),
    ],
)
def test_decode_text(stored: str, text: str) -> None:
    assert script.decode_text(stored, "row 0") == text


def test_toxigen_texts_are_decoded(files: Files) -> None:
    files.build()
    rows = {row["id"]: row for row in files.rows()}
    assert rows["toxigen_0"]["text"] == "a hate sentence\nnumber 0 on lgbtq 🙂"
    assert rows["toxigen_0"]["persona"] == "lgbtq" and rows["toxigen_0"]["toxicity_human"] == 3


def test_toxigen_label(files: Files) -> None:
    def hate() -> int:
        rows = [row for row in files.rows() if row["source"] == "toxigen"]
        assert {(row["label"], row["label_multiclass"]) for row in rows} == {
            ("hate", "hate"),
            ("normal", "normal"),
        }
        return sum(row["label"] == "hate" for row in rows)

    files.build()
    assert hate() == 3 * STATEMENTS
    # A sum of exactly 5.5 is not toxic: four statements of each group are no longer hate.
    files.build("--toxigen_label", "human")
    assert hate() == 3 * (STATEMENTS - 4)


def test_toxigen_train_config(files: Files) -> None:
    files.statements = [
        {
            "generation": f"a sentence {number}",
            "group": [*TARGETS][number % 3],
            "prompt_label": number % 2,
        }
        for number in range(120)
    ]
    contract = files.build("--toxigen_config", "train")
    rows = {row["id"]: row for row in files.rows()}
    assert rows["toxigen_7"]["label"] == "hate" and rows["toxigen_8"]["label"] == "normal"
    assert rows["toxigen_7"]["toxicity_human"] is None
    assert contract["rules"]["toxigen_config"] == "train"


def test_no_text_in_two_splits(files: Files) -> None:
    files.posts["first"] = make_post("The  Same words", "normal", [["Arab"]] * 3)
    files.posts["second"] = make_post("the same WORDS", "hatespeech", [["Arab"]] * 3)
    files.posts["empty"] = make_post("", "normal", [["Arab"]] * 3)
    files.splits["train"] += ["first", "empty"]
    files.splits["test"].append("second")
    twin, repeat = dict(files.statements[0]), dict(files.statements[1])
    twin["text"] = repr(b"the same\nwords")
    files.statements += [twin, repeat]
    contract = files.build()
    steps = [[step["rows"] for step in source["steps"]] for source in contract["sources"]]
    assert steps[0][2] - steps[0][3] == 2 and steps[1][1] - steps[1][2] == 2
    rows = files.rows()
    places = {script.normalise(row["text"]): row["split"] for row in rows}
    assert len(places) == len(rows) and "" not in places
    assert [row["id"] for row in rows if script.normalise(row["text"]) == "the same words"] == [
        "second"
    ]


def test_balance(files: Files) -> None:
    files.build("--balance", "source_label")
    cells = Counter((row["split"], row["source"], row["label"]) for row in files.rows())
    # The smallest of each split: HateXplain's hate, ToxiGen's validation rows are as many.
    assert {split: 3 * number for split, number in POSTS.items()} == {
        "train": cells["train", "hatexplain", "hate"],
        "val": cells["validation", "hatexplain", "hate"],
        "test": cells["test", "hatexplain", "hate"],
    }
    for split in script.SPLITS:
        assert len({n for (place, *_), n in cells.items() if place == split}) == 1
    assert len(cells) == 12


def test_groups_file(files: Files) -> None:
    mapping = {
        "women": {"hatexplain": ["Women"], "toxigen": ["women"], "note": "A note on women."},
        "people": {"hatexplain": ["Women", "Arab"], "toxigen": ["lgbtq"]},
    }
    (files.folder / "groups.json").write_text(json.dumps(mapping))
    contract = files.build("--groups", str(files.folder / "groups.json"))
    assert contract["groups"] == ["women", "people"]
    groups = {(row["persona"], tuple(row["target_groups"])) for row in files.rows()}
    assert groups == {
        ("Women", ("women", "people")),
        ("Arab", ("people",)),
        ("women", ("women",)),
        ("lgbtq", ("people",)),
    }
    assert "A note on women." in contract["prompts"]["optimized"]["system"]
    assert script.GROUPS["lgbtq"]["note"] not in contract["prompts"]["optimized"]["system"]


# --- what is written -------------------------------------------------------------------------


def test_prompts_and_answers(files: Files) -> None:
    """Every answer parses back to its label; prompts hold the post and nothing else of the row."""
    text = 'she said "no" \\ to {label} and {rationale} {text}'
    post = make_post(text, "hatespeech", [["Arab"]] * 3)
    post["rationales"] = [[1] * len(post["post_tokens"])]
    files.posts["quotes"] = post
    files.splits["test"].append("quotes")
    contract = files.build()
    assert list(contract["prompts"]) == ["simple", "optimized", "instruction"]
    unified = {row["id"]: row for row in files.rows()}
    for name, strategy in contract["prompts"].items():
        rows = files.rows(name)
        assert len(rows) == len(unified)
        for row in rows:
            source = unified[row["id"]]
            assert row == row | {key: source[key] for key in ("split", "text", "label")}
            assert row["target_groups"] == source["target_groups"]
            assert row["prompt"] == script.prompt_messages(strategy, row["text"])
            [answer] = row["completion"]
            assert answer["role"] == "assistant"
            if name == "optimized":
                parsed = json.loads(answer["content"])
                assert list(parsed) == ["label", "rationale"] and parsed["label"] == row["label"]
                marked = source["rationale"] if row["label"] == "hate" else ""
                assert parsed["rationale"] == (marked or script.RATIONALES[row["label"]])
            else:
                assert answer["content"] == row["label"]
        for placeholder in ("{labels}", "{notes}", "{examples}"):
            assert placeholder not in strategy["system"] + strategy["user"]
        assert strategy["user"].count("{text}") == 1 and "normal or hate" in strategy["user"]
    [answer] = [row["completion"][0] for row in files.rows("optimized") if row["id"] == "quotes"]
    assert json.loads(answer["content"])["rationale"] == text


def test_second_build_is_byte_identical(files: Files) -> None:
    files.build()
    first = parquet_bytes(files.out)
    assert len(first) == 12
    files.build()
    assert parquet_bytes(files.out) == first
    files.build("--seed", "7")
    assert parquet_bytes(files.out).keys() == first.keys()
    assert parquet_bytes(files.out) != first


def test_gzipped_sources_are_the_same_sources(files: Files) -> None:
    plain, flags = files.build(), files.write()
    written = parquet_bytes(files.out)
    for place, flag in enumerate(flags):
        if flag.endswith((".json", ".csv")):
            Path(f"{flag}.gz").write_bytes(gzip.compress(Path(flag).read_bytes()))
            Path(flag).unlink()
            flags[place] = f"{flag}.gz"
    script.main(flags)
    assert parquet_bytes(files.out) == written
    zipped = json.loads((files.out / "contract.json").read_text(encoding="utf-8"))
    for one, other in zip(plain["sources"], zipped["sources"], strict=True):
        assert one["sha256"] == other["sha256"] and other["id_or_file"].endswith(".gz")


def test_load_dataset_from_the_folder(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import load_dataset

    contract = files.build()
    for config in ("unified", "simple", "optimized", "instruction"):
        data = load_dataset(str(files.out), config, cache_dir=str(tmp_path / "cache"))
        assert list(data) == ["train", "validation", "test"]
        for split, labels in contract["splits"].items():
            names = data[split].features["label"].int2str(data[split]["label"])
            groups = [group for groups in data[split]["target_groups"] for group in groups]
            found = Counter(zip(names, groups, strict=True))
            for label, counts in labels.items():
                assert {group: found[label, group] for group in counts} == counts
    assert data["train"].features["label"].names == ["normal", "hate"]
    card = (files.out / "README.md").read_text(encoding="utf-8")
    assert "offensive" in card and "CDLA-Permissive-2.0" in card
    # The terminal shows the funnel that the card holds.
    assert capsys.readouterr().out.split("\n\nIn brackets")[0][-200:] in card


def test_a_folder_is_replaced_whole(files: Files) -> None:
    files.build()
    stray = files.out / "unified" / "train-00000-of-00002.parquet"
    stray.write_bytes(b"of an earlier build")
    # As a run leaves it that is killed between its two renames.
    files.out.rename(files.folder / ".out.old")
    (files.folder / ".out.new").mkdir()
    files.build()
    assert not stray.exists() and len(parquet_bytes(files.out)) == 12
    assert not [file.name for file in files.folder.iterdir() if file.name.startswith(".")]


def test_a_folder_with_other_files_is_left_alone(files: Files) -> None:
    for build_first in (False, True):
        if build_first:
            (files.out / "thesis.tex").unlink()
            files.build()
        files.out.mkdir(exist_ok=True)
        (files.out / "thesis.tex").write_text("years of work")
        before = {file: file.read_bytes() for file in files.out.rglob("*") if file.is_file()}
        with pytest.raises(SystemExit) as stop:
            script.main(files.write())
        assert stop.value.code == 2
        assert {f: f.read_bytes() for f in files.out.rglob("*") if f.is_file()} == before


# --- bad input -------------------------------------------------------------------------------


def truncate(name: str) -> Callable[[Files], None]:
    """Cut a source file to two thirds, in the middle of a field."""

    def change(files: Files) -> None:
        content = (files.folder / name).read_bytes()
        cut = content[: len(content) * 2 // 3]
        (files.folder / name).write_bytes(cut[: cut.rindex(b"b'") + 10] if b"b'" in cut else cut)

    return change


def gzip_cut(files: Files) -> None:
    file = files.folder / "dataset.json"
    file.write_bytes(gzip.compress(file.read_bytes())[:-200])


def groups(mapping: Any) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        (files.folder / "groups.json").write_text(json.dumps(mapping))

    return change


def post(**changes: Any) -> Callable[[Files], None]:
    """Change the first post; None removes a key."""

    def change(files: Files) -> None:
        first = {**next(iter(files.posts.values())), **changes}
        files.posts["train_Homosexual_hatespeech_0"] = {
            key: value for key, value in first.items() if value is not None
        }
        files.write()

    return change


def statement(**changes: Any) -> Callable[[Files], None]:
    """Change every statement; None removes a column."""

    def change(files: Files) -> None:
        files.statements = [
            {key: value for key, value in {**row, **changes}.items() if value is not None}
            for row in files.statements
        ]
        files.write()

    return change


def split_lists(**changes: Any) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        files.splits |= changes
        files.write()

    return change


def few_statements(files: Files) -> None:
    """Leave too few statements for a test split, and no posts in it."""
    files.statements = [row for row in files.statements if "number 1 " in row["text"]]
    files.splits["test"] = []
    files.write()


def nothing(files: Files) -> None:
    pass


VOTE = {"label": "rude", "annotator_id": 1, "target": ["Arab"]}
BAD_INPUT: dict[str, tuple[Callable[[Files], None], list[str], str]] = {
    "missing file": (nothing, ["--toxigen", "./absent.csv"], "does not exist"),
    "no splits file": (
        lambda files: (files.folder / "post_id_divisions.json").unlink(),
        [],
        "--hatexplain_splits",
    ),
    "splits of the Hub": (nothing, ["--hatexplain", "user/name"], "goes with a local"),
    "no judgement": (
        nothing,
        ["--toxigen_label", "human", "--toxigen_config", "train"],
        "no human judgement",
    ),
    "unknown flag": (nothing, ["--offensive", "hate"], "--offensive_as"),
    "unknown choice": (nothing, ["--balance", "all"], "invalid choice"),
    "truncated JSON": (truncate("dataset.json"), [], "cut off"),
    "truncated CSV": (truncate("annotated_train.csv"), [], "annotated_train.csv"),
    "truncated gzip": (gzip_cut, [], "cannot read"),
    "wrong encoding": (
        lambda files: (files.folder / "dataset.json").write_bytes('{"é": 1}'.encode("latin-1")),
        [],
        "must be UTF-8",
    ),
    "splits without val": (
        lambda files: (files.folder / "post_id_divisions.json").write_text('{"train": []}'),
        [],
        "train, val and test",
    ),
    "post in two splits": (split_lists(val=["test_Arab_normal_0"]), [], "in two splits"),
    "empty split": (few_statements, [], "the split test"),
    "post without tokens": (post(post_tokens=None), [], "post_tokens; it has: post_id"),
    "targets are no list": (
        post(annotators=[{**VOTE, "label": "normal", "target": "Arab"}]),
        [],
        "HateXplain's format",
    ),
    "unknown class": (post(annotators=[VOTE]), [], "'rude'"),
    "missing columns": (statement(label=None), [], "lacks the columns label. It has: text,"),
    "wrong config": (nothing, ["--toxigen_config", "train"], "lacks the columns generation"),
    "unknown label": (statement(label="meh"), [], "'meh'"),
    "toxicity is no number": (statement(toxicity_ai="high"), [], "'high'"),
    "no toxicity": (statement(toxicity_ai=""), ["--toxigen_label", "human"], "judgement"),
    "broken literal": (statement(text="b'\\xff\\xfe'"), [], "cannot be decoded"),
    "no Unicode": (post(post_tokens=["a", "\ud800"]), [], "Unicode"),
    "unknown group": (
        groups({"gnomes": {"hatexplain": ["Gnome"]}}),
        ["--groups", "groups.json"],
        "Gnome",
    ),
    "groups in another form": (groups(["Arab"]), ["--groups", "groups.json"], "mapping"),
    "group without rows": (
        groups({"any": {"hatexplain": ["Arab"]}, "none": {"toxigen": ["lgbtq+ folks"]}}),
        ["--groups", "groups.json"],
        "none has no rows",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(
    files: Files, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change, flags, message = BAD_INPUT[case]
    source_flags = files.write()
    change(files)
    monkeypatch.chdir(files.folder)
    with pytest.raises(SystemExit) as stop:
        script.main([*source_flags, *flags])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors
    assert not files.out.exists() and not list(files.folder.glob(".out*"))


def test_a_local_file_needs_the_splits(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    flags = files.write()
    place = flags.index("--hatexplain_splits")
    with pytest.raises(SystemExit) as stop:
        script.main(flags[:place] + flags[place + 2 :])
    assert stop.value.code == 2 and "needs --hatexplain_splits" in capsys.readouterr().err


# --- Hub -------------------------------------------------------------------------------------


def run(hub: Hub, home: Path, *flags: str, token: str | None = None) -> subprocess.CompletedProcess:
    """Run the script as its users do, against the loopback Hub."""
    env = {**os.environ, **hub.env(token, home)}
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def upload_sources(hub: Hub, files: Files, namespace: str) -> tuple[str, str]:
    """Put the made sources on the Hub in the form that their real repos have."""
    import pyarrow
    import pyarrow.parquet

    def operation(path: str, rows: list[dict[str, Any]]) -> CommitOperationAdd:
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        return CommitOperationAdd(path_in_repo=path, path_or_fileobj=buffer.getvalue())

    names = ["hatespeech", "normal", "offensive"]
    parquet = []
    for split, name in {"train": "train", "val": "validation", "test": "test"}.items():
        rows = []
        for key in files.splits[split]:
            post = files.posts[key]
            votes = {
                "label": [names.index(vote["label"]) for vote in post["annotators"]],
                "annotator_id": [vote["annotator_id"] for vote in post["annotators"]],
                "target": [vote["target"] for vote in post["annotators"]],
            }
            rest = {name: post[name] for name in ("rationales", "post_tokens")}
            rows.append({"id": key, "annotators": votes, **rest})
        parquet.append(operation(f"plain_text/{name}/0000.parquet", rows))
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    hatexplain, toxigen = f"{namespace}-hatexplain", f"{namespace}-toxigen"
    api.create_repo(hatexplain, repo_type="dataset")
    branch = "refs/convert/parquet"
    api.create_branch(hatexplain, branch=branch, repo_type="dataset")
    api.create_commit(
        hatexplain, parquet, commit_message="Convert", repo_type="dataset", revision=branch
    )
    # The Hub's annotated rows have no `label`; its train rows have only the prompt's.
    annotated = [{k: v for k, v in row.items() if k != "label"} for row in files.statements]
    for row in annotated:
        row |= {"toxicity_ai": float(row["toxicity_ai"])}
        row |= {"toxicity_human": float(row["toxicity_human"])}
    train = [
        {
            "prompt": "- a prompt",
            "generation": row["text"],
            "group": row["target_group"],
            "prompt_label": int(row["label"] == "hate"),
        }
        for row in files.statements
    ]
    api.create_repo(toxigen, repo_type="dataset")
    api.create_commit(
        toxigen,
        [
            operation("annotated/train-00000-of-00001.parquet", annotated),
            operation("train/train-00000-of-00001.parquet", train),
        ],
        commit_message="Upload",
        repo_type="dataset",
    )
    return hatexplain, toxigen


def test_hub_sources_and_target(hub: Hub, files: Files, tmp_path: Path) -> None:
    hatexplain, toxigen = upload_sources(hub, files, "alice/unified")
    sources = ["--hatexplain", hatexplain, "--toxigen", toxigen]
    name = "alice/unified-data"
    done = run(hub, tmp_path / "home", *sources, "--dataset_repo", name)
    assert done.returncode == 0, done.stderr
    [built, start] = hub.commits(name, "dataset")
    folder = hub.repo_folder(name, "dataset")
    contract = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
    assert (
        done.stdout.endswith(f"{name}@{built['oid']}\n") and "contract.json" not in start["files"]
    )
    assert HfApi(endpoint=hub.endpoint, token=hub.token).dataset_info(name).private
    assert [entry["repo"] for entry in contract["inputs"]] == [hatexplain, toxigen]
    assert all(len(entry["revision"]) == 40 for entry in contract["inputs"])
    assert contract["rules"]["toxigen_config"] == "train"
    # The same rows as from the files, which hold the same posts.
    files.build()
    local = {row["id"]: (row["text"], row["label"], row["rationale"]) for row in files.rows()}
    remote = Files(tmp_path / "remote")
    remote.out = folder
    assert {r["id"]: (r["text"], r["label"], r["rationale"]) for r in remote.rows()} == local

    # A second build removes parquet files of an earlier one and is one commit as well.
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    stray = "unified/train-00000-of-00002.parquet"
    api.upload_file(path_or_fileobj=b"old", path_in_repo=stray, repo_id=name, repo_type="dataset")
    done = run(hub, tmp_path / "home", *sources, "--dataset_repo", name, "--toxigen_label", "human")
    assert done.returncode == 0, done.stderr
    history = hub.commits(name, "dataset")
    assert len(history) == 4 and stray in history[1]["files"] and stray not in history[0]["files"]
    contract = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
    assert contract["rules"]["toxigen_config"] == "annotated"

    code = (
        "from datasets import load_dataset\n"
        "for config in ('unified', 'simple', 'optimized', 'instruction'):\n"
        f"    data = load_dataset({name!r}, config)\n"
        "    print({split: len(data[split]) for split in data})\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **hub.env(home=tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    sizes = {
        split: sum(sum(counts.values()) for counts in labels.values())
        for split, labels in contract["splits"].items()
    }
    assert loaded.stdout.splitlines() == [str(sizes)] * 4, loaded.stderr


def test_hub_refusals(hub: Hub, files: Files, tmp_path: Path) -> None:
    hatexplain, toxigen = upload_sources(hub, files, "alice/refused")
    sources = ["--hatexplain", hatexplain, "--toxigen", toxigen]
    name, home = "alice/refused-data", tmp_path / "home"
    target = ["--dataset_repo", name]

    gate = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."}
    hub.add_fault(path="refused-toxigen/resolve", status=403, headers=gate, times=None)
    done = run(hub, home, *sources, *target)
    hub.clear_faults()
    assert done.returncode == 2 and "gated" in done.stderr and "--toxigen ./FILE" in done.stderr

    done = run(hub, home, *sources, *target, token="hf_alice_read")
    assert done.returncode == 2 and "write access" in done.stderr

    done = run(hub, home, "--hatexplain", toxigen, "--toxigen", toxigen, *target)
    assert done.returncode == 2 and "no such revision" in done.stderr
    assert "--hatexplain ./FILE" in done.stderr

    done = run(hub, home, "--hatexplain", hatexplain, "--toxigen", hatexplain, *target)
    assert done.returncode == 2 and "holds no train/*.parquet" in done.stderr

    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("alice/refused-public", repo_type="dataset", private=False)
    done = run(hub, home, *sources, "--dataset_repo", "alice/refused-public")
    assert done.returncode == 2 and "is public" in done.stderr
    assert len(hub.commits("alice/refused-public", "dataset")) == 1

    assert not api.repo_exists(name, repo_type="dataset")
