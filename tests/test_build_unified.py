"""datasets/build_unified.py on made posts in the official formats.

python -m pytest tests/test_build_unified.py
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from huggingface_hub import CommitOperationAdd, HfApi
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import load_script, read_config, write_csv

SCRIPT = Path(__file__).parents[1] / "datasets" / "build_unified.py"
TARGETS = {"lgbtq": "Homosexual", "mexican": "Hispanic", "middle_east": "Arab"}
# Posts of each target and class in HateXplain's splits, statements of each group and class.
POSTS = {"train": 5, "val": 2, "test": 3}
STATEMENTS = 20


script = load_script("datasets/build_unified.py")


@pytest.fixture(autouse=True)
def no_settings(clean_environment: None) -> None:
    """What somebody's shell sets must not change a test."""


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


def words(key: str) -> str:
    """Ten made words that depend on the key: no two texts are near each other."""
    draw = random.Random(key)
    return " ".join("".join(draw.choices("abcdefghijklmnoprstuvw", k=6)) for _ in range(10))


def make_posts() -> tuple[dict[str, dict], dict[str, list[str]]]:
    """Posts of every split, target and class, and those that the rules leave out."""
    posts, splits = {}, {split: [] for split in POSTS}
    for split, number in POSTS.items():
        for target in [*TARGETS.values(), "Women"]:
            for label in ("hatespeech", "offensive", "normal"):
                for index in range(number):
                    key = f"{split}_{target}_{label}_{index}"
                    text = f"post {key} says {words(key)}"
                    posts[key] = make_post(text, label, [[target], ["None"], [target, "Women"]])
                    splits[split].append(key)
    three = ["hatespeech", "offensive", "normal"]
    posts["undecided"] = make_post("three opinions", three, [["Arab"]] * 3)
    posts["untargeted"] = make_post("nobody meant", "normal", [["None"]] * 3)
    splits["train"].append("untargeted")
    return posts, splits


def statement_text(label: str, index: int, group: str) -> str:
    start = f"a {label} sentence\nnumber {index} on {group} 🙂"
    return f"{start} {words(start)}"


def make_statements() -> list[dict[str, Any]]:
    """Rows of ToxiGen's annotated_train.csv: in each group four hate prompts gave harmless text."""
    rows = []
    for group in [*TARGETS, "women"]:
        for label in ("hate", "neutral"):
            for index in range(STATEMENTS):
                toxic = label == "hate" and index >= 4
                rows.append(
                    {
                        "text": repr(statement_text(label, index, group).encode()),
                        "target_group": group,
                        "toxicity_ai": 3 if toxic else 2.5,
                        "toxicity_human": 3,
                        "label": label,
                    }
                )
    return rows


class Files:
    """Source files in a folder, and the script run on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.posts, self.splits = make_posts()
        self.statements = make_statements()

    def write(self) -> list[str]:
        """Write the sources; return the flags that name them."""
        paths = {
            "hatexplain": self.folder / "dataset.json",
            "hatexplain_splits": self.folder / "post_id_divisions.json",
            "toxigen": self.folder / "annotated_train.csv",
        }
        paths["hatexplain"].write_text(json.dumps(self.posts), encoding="utf-8")
        paths["hatexplain_splits"].write_text(json.dumps(self.splits), encoding="utf-8")
        write_csv(paths["toxigen"], self.statements)
        flags = [part for flag, path in paths.items() for part in (f"--{flag}", str(path))]
        return ["--dataset_repo", str(self.out), *flags]

    def build(self, *flags: str) -> dict[str, Any]:
        """Run the script in this process; return the contract it wrote."""
        script.main([*self.write(), *flags])
        return json.loads((self.out / "contract.json").read_text(encoding="utf-8"))

    def rows(self, config: str = "unified", canned: bool = False) -> list[dict[str, Any]]:
        """Every row of a config's splits, or of its canned sets, with split and label's name."""
        return read_config(self.out, config, canned)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def parquet_bytes(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.parquet")}


# --- rules -----------------------------------------------------------------------------------


def test_counts_and_funnel(files: Files) -> None:
    contract = files.build()
    hatexplain, toxigen = contract["sources"]
    rest = ["text not empty", "one label per text", "the first of each text", "no near-duplicate"]
    assert [(step["step"], step["rows"]) for step in hatexplain["steps"]] == [
        ("read", 4 * 3 * 10 + 2),
        ("with a majority label", 4 * 3 * 10 + 1),
        ("in an official split", 4 * 3 * 10 + 1),
        *((step, 3 * 3 * 10) for step in ("about a group", *rest)),
    ]
    assert hatexplain["steps"][0]["counts"]["no split"] == {"middle_east": {"undecided": 1}}
    assert hatexplain["steps"][0]["counts"]["train"]["no_target"] == {
        "hatespeech": 5,
        "offensive": 5,
        "normal": 6,
    }
    assert hatexplain["steps"][3]["counts"]["test"] == {
        group: {"hatespeech": 3, "offensive": 3, "normal": 3} for group in TARGETS
    }
    assert [step["rows"] for step in toxigen["steps"]] == [160, *[120] * 6]
    assert toxigen["steps"][0]["counts"]["no split"]["no_target"] == {"hate": 20, "normal": 20}
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
    assert script.top_target([["None"], ["Arab"], ["Women", "Women"]]) == "Women"
    assert script.top_target([["Women", "Arab"], ["Arab"], ["Women"]]) == "Women"
    assert script.top_target([["Arab"], ["Women"]]) == "Arab"
    assert script.top_target([["None"], ["None"], ["None", "Arab"]]) == "Arab"
    assert script.top_target([["None"]]) is None


@pytest.mark.parametrize(
    ("rule", "names"),
    [("top", ["Arab"]), ("majority", ["Arab", "Women"]), ("any", ["Arab", "Women", "Islam"])],
)
def test_target_rule(files: Files, rule: str, names: list[str]) -> None:
    votes = [["Arab", "Women"], ["Arab", "None"], ["Women", "Islam", "Islam"]]
    assert script.named_targets(votes, rule) == names
    assert script.named_targets([["None"]] * 3, rule) == []
    mapping = {
        "women": {"hatexplain": ["Women"], "toxigen": ["women"]},
        "muslims": {"hatexplain": ["Islam", "Arab"], "toxigen": ["lgbtq"]},
    }
    (files.folder / "groups.json").write_text(json.dumps(mapping))
    files.posts["both"] = make_post(f"about both {words('both')}", "normal", votes)
    files.posts["islam"] = make_post(f"islam {words('islam')}", "normal", [["Islam"]] * 3)
    files.splits["test"] += ["both", "islam"]
    files.build("--target_rule", rule, "--groups", str(files.folder / "groups.json"))
    [row] = [row for row in files.rows() if row["id"] == "both"]
    assert row["target_groups"] == (["muslims"] if rule == "top" else ["women", "muslims"])
    assert row["annotator_targets"] == votes and row["persona"] == "Arab"


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


@pytest.mark.parametrize("rule", ["normal", "hate", "drop", "keep"])
def test_offensive_as(files: Files, rule: str) -> None:
    contract = files.build("--offensive_as", rule)
    rows = [row for row in files.rows() if row["label_multiclass"] == "offensive"]
    label = {"keep": "offensive"}.get(rule, rule)
    assert {row["label"] for row in rows} == ({label} if rule != "drop" else set())
    assert contract["rules"]["offensive_as"] == rule
    assert contract["labels"] == (
        ["normal", "offensive", "hate"] if rule == "keep" else ["normal", "hate"]
    )
    said = contract["label_descriptions"]
    assert [*said] == contract["labels"] and ("offensive" in said["normal"]) == (rule == "normal")
    for row in files.rows():
        expected = {"hatespeech": "hate", "offensive": label}
        assert row["label"] == expected.get(row["label_multiclass"], row["label_multiclass"])
    for name, strategy in contract["prompts"].items():
        assert ("offensive (rude" in strategy["system"] + strategy["user"]) == (rule == "keep")
        for row in files.rows(name):
            content = row["completion"][0]["content"]
            assert (
                script.parse_answer(strategy["answer"], content, contract["labels"])
                == (row["label"])
            )


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
        ("b'a', b'c'", "b'a', b'c'"),
    ],
)
def test_decode_text(stored: str, text: str) -> None:
    assert script.decode_text(stored, "row 0") == text


def test_toxigen_texts_are_decoded(files: Files) -> None:
    files.build()
    rows = {row["id"]: row for row in files.rows()}
    assert rows["toxigen_0"]["text"] == statement_text("hate", 0, "lgbtq")
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
            "generation": f"a sentence {number} {words(str(number))}",
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
    files.posts["first"] = make_post("The  Same words!", "hatespeech", [["Arab"]] * 3)
    files.posts["second"] = make_post("the same WORDS", "hatespeech", [["Arab"]] * 3)
    files.posts["empty"] = make_post("", "normal", [["Arab"]] * 3)
    files.splits["train"] += ["first", "empty"]
    files.splits["test"].append("second")
    twin, repeat = dict(files.statements[0]), dict(files.statements[1])
    twin["text"] = repr(b"the same\nwords")
    files.statements += [twin, repeat]
    contract = files.build()
    hatexplain, toxigen = contract["sources"]
    assert dropped(hatexplain)["text not empty"] == 1
    assert dropped(hatexplain)["the first of each text"] == 1
    assert dropped(toxigen)["the first of each text"] == 2
    repeats = contract["audit"]["repeats"]
    assert repeats["same_text"] == 3 and repeats["same_text_in_another_split"] == 1
    rows = files.rows()
    places = {script.normalise(row["text"]): row["split"] for row in rows}
    assert len(places) == len(rows) and "" not in places
    assert [row["id"] for row in rows if script.normalise(row["text"]) == "the same words"] == [
        "second"
    ]


def dropped(source: dict[str, Any]) -> dict[str, int]:
    """How many rows each step of a source's funnel left out."""
    rows = [step["rows"] for step in source["steps"]]
    names = [step["step"] for step in source["steps"][1:]]
    return {name: rows[n] - rows[n + 1] for n, name in enumerate(names)}


def test_a_text_with_two_labels_is_left_out_with_all_its_copies(files: Files) -> None:
    text = f"disputed {words('disputed')}"
    files.posts["one"] = make_post(text, "normal", [["Arab"]] * 3)
    files.posts["two"] = make_post(text.upper(), "hatespeech", [["Arab"]] * 3)
    files.splits["train"].append("one")
    files.splits["test"].append("two")
    contract = files.build()
    assert dropped(contract["sources"][0])["one label per text"] == 2
    assert contract["audit"]["repeats"]["texts_with_two_labels"] == 1
    assert not {"one", "two"} & {row["id"] for row in files.rows()}


def test_near_duplicates_yield_to_the_official_test_split(files: Files) -> None:
    text = f"{words('near')} {words('by')}"
    for name, split, end in (("a", "train", "one"), ("b", "test", "two"), ("c", "val", "six")):
        files.posts[name] = make_post(f"{text} {end}", "normal", [["Arab"]] * 3)
        files.splits[split].append(name)
    twin = dict(files.statements[81])
    twin["text"] = repr(f"{text} ten".encode())
    files.statements.append(twin)
    contract = files.build()
    assert dropped(contract["sources"][0])["no near-duplicate"] == 2
    assert dropped(contract["sources"][1])["no near-duplicate"] == 1
    assert contract["audit"]["repeats"]["near_in_another_split"] == 2
    assert [row["id"] for row in files.rows() if row["text"].startswith(text)] == ["b"]
    contract = files.build("--near_duplicates", "none")
    assert "no near-duplicate" not in dropped(contract["sources"][0])
    assert len([row for row in files.rows() if row["text"].startswith(text)]) == 4


def jaccard(one: str, other: str) -> float:
    """Computed apart from the script: five-character pieces of the normalised texts."""
    sets = []
    for text in (one, other):
        key = script.normalise(text)
        sets.append({key[n : n + 5] for n in range(len(key) - 4)} or {key})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_find_repeats_finds_every_near_pair() -> None:
    """Against all pairs, on texts that differ in up to four words."""
    draw, rows = random.Random(1), []
    for number in range(300):
        text = words(str(number % 60)).split()
        for _ in range(draw.randint(0, 4)):
            text[draw.randrange(10)] = draw.choice(["so", "the", "gardens", "no"])
        rows.append({"text": " ".join(text), "key": script.normalise(" ".join(text))})
    kept: list[dict[str, str]] = []
    repeats = 0
    for row, earlier, _ in script.find_repeats(rows, 0.7):
        near = [one for one in kept if jaccard(one["text"], row["text"]) >= 0.7]
        assert (earlier is None) == (not near)
        if earlier is None:
            kept.append(row)
        else:
            repeats += 1
            assert any(one is earlier for one in near)
    assert repeats > 50 and len(kept) > 60


ALPHABET = "ab B.!\u200bé"


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.tuples(
            st.text(ALPHABET, max_size=14),
            st.sampled_from(["train", "validation", "test", "no split"]),
            st.sampled_from(["normal", "hate"]),
            st.lists(st.sampled_from(["g1", "g2"]), max_size=2, unique=True),
        ),
        max_size=60,
    ),
    seed=st.integers(0, 3),
    threshold=st.sampled_from([None, 0.7, 1.0]),
)
def test_no_text_is_ever_in_two_splits(texts: list, seed: int, threshold: float | None) -> None:
    """Whatever comes in: no normalised text in two splits, no near pair anywhere, no new row."""
    source = script.Source("made", "Made", "mit", "", ["normal", "hate"])
    for number, (text, split, label, groups) in enumerate(texts):
        row = {"id": str(number), "text": script.clean(text), "label": label, "split": split}
        row |= {"label_multiclass": label, "target_groups": groups, "source": "made"}
        source.rows.append(script.EMPTY_ROW | row)
    build = script.Build("Made", ["normal", "hate"], "hate", {}, [source], {}, {}, [])
    script.drop_repeats(build, threshold)
    free = [row for row in source.rows if row["split"] == "no split"]
    script.assign_splits(free, seed, {"test": 20, "validation": 10})
    build.arrange(seed)
    places = defaultdict(set)
    for row in build.rows:
        places[" ".join(row["text"].casefold().split())].add(row["split"])
        assert row["split"] in script.SPLITS and row["text"].strip()
        _, split, label, _ = texts[int(row["id"])]
        assert row["label"] == label and split in ("no split", row["split"])
    assert all(len(found) == 1 for found in places.values())
    labels = defaultdict(set)
    for text, _, label, _ in texts:
        labels[script.normalise(script.clean(text))].add(label)
    assert all(len(labels[row["key"]]) == 1 for row in build.rows)
    if threshold:
        for one, other in itertools.combinations(build.rows, 2):
            assert jaccard(one["text"], other["text"]) < threshold
    canned = {row["id"] for name in script.CANNED for row in build.members.get(name, [])}
    assert canned <= {row["id"] for row in build.rows if row["split"] == "validation"}


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("plain <user> text &amp; more", "plain <user> text & more"),
        ("itâ€\u2019s mojibake".replace("\u2019", "\u2122"), "it\u2019s mojibake"),
        ("“curly” quotes stay", "“curly” quotes stay"),
        ("\uff57\uff49de and \ufb01ne stay", "\uff57\uff49de and \ufb01ne stay"),
        ("a\r\nb #tag @name http://x.y", "a\nb #tag @name http://x.y"),
    ],
)
def test_clean_mends_encoding_and_entities_only(raw: str, text: str) -> None:
    assert script.clean(raw) == text


def test_many_small_cells_together_give_their_shares() -> None:
    rows = [
        {"key": f"{n}", "target_groups": [f"g{n // 2}"], "label": "x", "split": "no split"}
        for n in range(200)
    ]
    script.assign_splits(rows, 1, {"test": 20, "validation": 10})
    assert Counter(row["split"] for row in rows) == {"train": 140, "test": 40, "validation": 20}


def test_a_forgotten_post_moves_no_other_post(files: Files) -> None:
    """It goes through the splits and leaves after them."""
    files.build()
    before = {row["id"]: row["split"] for row in files.rows()}
    ids = files.folder / "ids.txt"
    for number in range(0, 60, 7):
        ids.write_text(f"toxigen_{number}\n")
        files.build("--forget", str(ids))
        after = {row["id"]: row["split"] for row in files.rows()}
        assert after.items() <= before.items() and f"toxigen_{number}" not in after
    assert len(before) - len(after) == 9


def test_the_order_of_a_file_decides_nothing(files: Files) -> None:
    text = words("near")
    for number in range(4):
        twin = dict(files.statements[81])
        twin["text"] = repr(f"{text} {text} {number}".encode())
        files.statements.append(twin)
    files.build()
    first = {row["text"]: row["split"] for row in files.rows()}
    files.statements.reverse()
    files.posts = dict(reversed(files.posts.items()))
    files.build()
    assert {row["text"]: row["split"] for row in files.rows()} == first


def test_the_same_bytes_whatever_the_hash_seed(files: Files) -> None:
    flags, cards = files.write(), []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, str(SCRIPT), *flags], env=env, capture_output=True)
        assert done.returncode == 0, done.stderr
        content = parquet_bytes(files.out), (files.out / "README.md").read_bytes()
        cards.append(content)
        shutil.rmtree(files.out)
    assert cards[0] == cards[1]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Don't STOP!", "don t stop", True),
        ("a \u200bb\ufeff", "a b", True),
        ("\uff21\uff22 c", "ab c", True),
        ("\u0932\u0921\u093c\u0915\u093e", "\u0932\u0921\u093c\u0915\u0940", False),
        ("\U0001f642", "\U0001f641", False),
        ("na\u00efve", "nai\u0308ve", True),
        ("snake_case", "snake case", True),
        ("h\u200bate", "hate", True),
    ],
)
def test_normalise(one: str, other: str, same: bool) -> None:
    assert (script.normalise(one) == script.normalise(other)) is same


def test_max_per_cell(files: Files) -> None:
    files.build("--max_per_cell", "3")
    cells = Counter(
        (row["source"], row["split"], row["label"], *row["target_groups"]) for row in files.rows()
    )
    assert max(cells.values()) == 3 and len(cells) == 2 * 3 * 2 * 3


def test_balance(files: Files) -> None:
    contract = files.build("--balance", "label,source")
    cells = Counter((row["split"], row["source"], row["label"]) for row in files.rows())
    # The smallest of each split: HateXplain's hate, ToxiGen's validation rows are as many.
    assert {split: 3 * number for split, number in POSTS.items()} == {
        "train": cells["train", "hatexplain", "hate"],
        "val": cells["validation", "hatexplain", "hate"],
        "test": cells["test", "hatexplain", "hate"],
    }
    for split in script.SPLITS:
        assert len({n for (place, *_), n in cells.items() if place == split}) == 1
    assert len(cells) == 12 and contract["rules"]["balance"] == "source,label"


def test_balance_by_group_counts_a_post_of_several_groups_for_the_rarest(files: Files) -> None:
    for key in [key for key in files.posts if "Arab" in key and "train" in key][2:]:
        del files.posts[key]
    votes = [["Arab", "Homosexual"]] * 3
    for number in range(4):
        name = f"both{number}"
        files.posts[name] = make_post(f"{name} {words(name)}", "normal", votes)
        files.splits["train"].append(name)
    files.splits["train"] = [key for key in files.splits["train"] if key in files.posts]
    files.build("--balance", "group", "--target_rule", "any", "--toxigen", "none")
    rows = [row for row in files.rows() if row["split"] == "train"]
    groups = Counter(
        "middle_east" if len(r["target_groups"]) > 1 else r["target_groups"][0] for r in rows
    )
    assert groups == {"lgbtq": 6, "mexican": 6, "middle_east": 6}


def test_the_whole_official_hatexplain(files: Files) -> None:
    """Three classes, all posts, no ToxiGen: what the published figures are measured on."""
    contract = files.build(
        *("--toxigen", "none", "--offensive_as", "keep", "--other_posts", "keep")
    )
    rows = files.rows()
    assert {split: len(ids) for split, ids in files.splits.items()} == {
        "train": contract["rows"]["train"],
        "val": contract["rows"]["validation"],
        "test": contract["rows"]["test"],
    }
    assert {row["source"] for row in rows} == {"hatexplain"}
    assert [row["id"] for row in rows if not row["target_groups"]]
    assert contract["splits"]["test"]["offensive"]["no_target"] == 3
    flags = files.write()
    del flags[flags.index("--hatexplain") : flags.index("--toxigen")]
    script.main([*flags, "--hatexplain", "none"])
    contract = json.loads((files.out / "contract.json").read_text(encoding="utf-8"))
    assert {row["source"] for row in files.rows()} == {"toxigen"}
    assert [source["name"] for source in contract["sources"]] == ["toxigen"]


def test_canned_sets_are_validation_posts_by_group_and_label(files: Files) -> None:
    for split, number in (("val", 60), ("train", 5)):
        for target in TARGETS.values():
            for label in ("hatespeech", "normal"):
                for index in range(number):
                    key = f"more_{split}_{target}_{label}_{index}"
                    size = (20, 80, 200)[index % 3]
                    text = (f"{index} {target} {label[0]} " + words(key) * 3)[:size]
                    files.posts[key] = make_post(text, label, [[target]] * 3)
                    files.splits[split].append(key)
    contract = files.build()
    rows = files.rows("unified", canned=True)
    sizes = Counter(row["split"] for row in rows)
    assert sizes == {name: size for name, (size, _) in script.CANNED.items()}
    assert {name: contract["rows"][name] for name in script.CANNED} == sizes
    validation = {row["id"] for row in files.rows() if row["split"] == "validation"}
    assert {row["id"] for row in rows} <= validation
    varied = [len(row["text"]) for row in rows if row["split"] == "canned_100_size_varied"]
    lengths = (sum(n < 50 for n in varied), sum(n > 150 for n in varied))
    assert lengths == (30, 20)
    for name in ("canned_50_quick", "canned_100_stratified"):
        cells = Counter(
            (row["label"], *row["target_groups"]) for row in rows if row["split"] == name
        )
        whole = Counter(
            (row["label"], *row["target_groups"])
            for row in files.rows()
            if row["split"] == "validation"
        )
        for cell, number in whole.items():
            share = sizes[name] * number / sum(whole.values())
            assert abs(cells[cell] - share) <= 1, cell
    for config in ("simple", "optimized", "instruction"):
        assert Counter(row["split"] for row in files.rows(config, canned=True)) == sizes


def test_stratified_gives_small_cells_one_and_never_too_many() -> None:
    for big, size in ((1000, 50), (7, 50), (20, 3), (40, 10)):
        rows = [
            {"key": f"{cell} {n}", "target_groups": [cell], "label": "x"}
            for cell, number in (("big", big), ("a", 1), ("b", 2), ("c", 9))
            for n in range(number)
        ]
        drawn = script.stratified(rows, size, "s")
        assert len(drawn) == min(size, len(rows))
        assert len({row["key"] for row in drawn}) == len(drawn)
        if size >= 4:
            assert {row["target_groups"][0] for row in drawn} == {"big", "a", "b", "c"}


def test_groups_file(files: Files) -> None:
    mapping = {
        "women": {"hatexplain": ["Women"], "toxigen": ["women"], "note": "A note on women."},
        "people": {"hatexplain": ["Women", "Arab"], "toxigen": ["lgbtq"]},
    }
    (files.folder / "groups.json").write_text(json.dumps(mapping))
    contract = files.build("--groups", str(files.folder / "groups.json"))
    assert contract["groups"] == ["women", "people"]
    # The same as JSON on the command line, and as a mapping in a file of flags.
    (files.folder / "flags.yaml").write_text(json.dumps({"groups": mapping}))
    for flags in (
        ["--groups", json.dumps(mapping)],
        ["--config_file", str(files.folder / "flags.yaml")],
    ):
        assert files.build(*flags)["files"] == contract["files"]
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


def test_prompt_template(files: Files, tmp_path: Path) -> None:
    """The source project's form; its answers, targets and doubled braces."""
    strategies = {
        "theirs": {
            "name": "Theirs",
            "description": "a policy",
            "system_prompt": 'Answer "hate" or "normal" {as they are}.',
            "user_template": 'About {target_group}: {text}\nFill {{"classification": ...}}',
            "parameters": {"temperature": 0.1, "max_tokens": 512},
        },
        "fixed": {
            "user_template": "{text} Is it {labels}?",
            "answer_template": "Verdict: {label}.",
        },
    }
    file = files.folder / "template.json"
    file.write_text(json.dumps({"strategies": strategies}))
    contract = files.build("--prompt_template", str(file))
    assert [*contract["prompts"]] == ["simple", "optimized", "instruction", "theirs", "fixed"]
    theirs = contract["prompts"]["theirs"]
    assert theirs["parameters"] == {"temperature": 0.1, "max_tokens": 512}
    for row in files.rows("theirs"):
        system, user = row["prompt"]
        assert system["content"] == 'Answer "hate" or "normal" {as they are}.'
        [group] = row["target_groups"]
        assert user["content"] == f'About {group}: {row["text"]}\nFill {{"classification": ...}}'
        answer = json.loads(row["completion"][0]["content"])
        assert answer["classification"] == row["label"] and answer["rationale"]
    [row] = [row for row in files.rows("fixed") if row["id"] == "toxigen_0"]
    assert row["prompt"][0]["content"] == f"{row['text']} Is it normal or hate?"
    assert row["completion"][0]["content"] == "Verdict: hate."


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"user_template": "normal or hate?"}, "must hold {text} once"),
        (
            {"user_template": "{text} {post} normal hate"},
            "nothing else in braces but {labels} and",
        ),
        ({"user_template": '{text} {"a": normal or hate'}, "no format string"),
        (
            {"user_template": "{text}", "system_prompt": "hate or not"},
            "never names the label 'norm",
        ),
        ({"user_template": "{text} normal hate", "answer_template": "yes"}, "{label} once"),
        ({"user_template": "{text} normal hate", "answer_template": '["{label}"]'}, "{label} once"),
        (
            {"user_template": "{text} {{persona}} normal hate"},
            "{persona} stands in system_prompt or in doubled",
        ),
        ({"user_template": "{text} {labels}", "system": "x"}, "has the unknown key 'system'"),
        (
            {"user_template": "{text} {labels}", "system_prompt": "About {target_group}."},
            "{target_group} stands in system_prompt",
        ),
        ({"user_template": ["{text}"]}, "must be a mapping with the texts"),
        ("{text}", "must be a mapping"),
    ],
)
def test_bad_prompt_template(
    files: Files, strategy: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = files.folder / "template.json"
    file.write_text(json.dumps({"strategies": {"mine": strategy}}))
    with pytest.raises(SystemExit) as stop:
        files.build("--prompt_template", str(file))
    assert stop.value.code == 2 and message in capsys.readouterr().err
    for name in ("simple", "Unified", "a b", "x" * 61):
        good = {"user_template": "{text} normal or hate"}
        file.write_text(json.dumps({"strategies": {name: good}}))
        with pytest.raises(SystemExit):
            files.build("--prompt_template", str(file))
        assert "the name must be a word" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "answer", "label"),
    [
        ("{label}", "hate", "hate"),
        ("{label}", "not hate", None),
        ("{label}", "hateful", None),
        ("Label: {label}. {rationale}", "Label: not_hate. why\nnot", "not_hate"),
        ('{"label": "{label}", "rationale": "{rationale}"}', '{"label": "hate"}', "hate"),
        ('{"label": "{label}", "rationale": "{rationale}"}', '{"label": "Hate"}', None),
        ('{"label": "{label}"}', '{{"label": "hate"}}', None),
        ('{"label": "{label}"}', '["hate"]', None),
    ],
)
def test_parse_answer(template: str, answer: str, label: str | None) -> None:
    assert script.parse_answer(template, answer, ["hate", "not_hate"]) == label


def test_persona_in_prompt_on_request_only(files: Files) -> None:
    contract = files.build("--persona_in_prompt")
    for name in contract["prompts"]:
        for row, post in zip(files.rows(name), files.rows(), strict=True):
            assert row["prompt"][-1]["content"].startswith(f"Persona: {post['persona']}\n\n")
    assert contract["rules"]["persona_in_prompt"] is True
    # A post without one, as of another dataset, is asked about all the same.
    strategy = contract["prompts"]["simple"]
    assert "Persona: unknown" in script.prompt_messages(strategy, "a post")[-1]["content"]


# --- the audit -------------------------------------------------------------------------------


def test_audit_finds_a_shortcut_and_measures_agreement(files: Files) -> None:
    for statement in files.statements:
        if statement["label"] == "hate":
            text = script.decode_text(statement["text"], "")
            statement["text"] = repr(text.upper().encode())
    for key, post in files.posts.items():
        if "_hatespeech_" in key:
            post["annotators"][2]["label"] = "offensive"
    contract = files.build("--offensive_as", "drop")
    audit = contract["audit"]
    shortcut = {(one["name"], one["data"]): one for one in audit["baselines"]}
    found = shortcut["depth-2 tree on surface", "within test"]
    assert found["balanced_accuracy"] > 0.75 and "share of capitals" in found["rule"]
    warned = [w for w in contract["warnings"] if w.startswith("shortcut")]
    assert warned and all(w in (files.out / "README.md").read_text() for w in warned)
    assert shortcut["always hate", "test"]["f1_positive"] == round(2 * 21 / (21 + 42), 4)
    assert shortcut["always normal", "test"]["f1_positive"] == 0
    # Posts that no class won or that the rules drop are annotated posts too: 30 with the votes 2:1,
    # 30 offensive and 30 normal ones of which all agree, and one of three opinions.
    agreement = audit["agreement"]["all"]
    assert (agreement["posts"], agreement["unanimous"]) == (91, round(60 / 91, 4))
    # Krippendorff (2011): 1 - (n - 1) * disagreeing pairs / sum of products of the margins.
    votes = {"hatespeech": 61, "offensive": 30 + 90 + 1, "normal": 91}
    observed = (30 * 4 + 6) / 2
    n = sum(votes.values())
    expected = (n**2 - sum(count**2 for count in votes.values())) / (n - 1)
    assert agreement["krippendorff_alpha"] == pytest.approx(1 - observed / expected, abs=1e-4)


def test_half_width_is_wilsons() -> None:
    from scipy.stats import binomtest

    for part, n in ((3, 20), (15, 100), (150, 1000)):
        interval = binomtest(part, n).proportion_ci(method="wilson")
        assert script.half_width(n) == round(50 * (interval.high - interval.low), 1)
    assert round(script.half_width(57)) == 9 and script.half_width(0) is None
    cells = {"g": {"negatives": 57, "false_positive_rate_points": 9.2}}
    cells["g"] |= {"positives": 0, "false_negative_rate_points": None}
    assert script.cell_sentences(["g"], cells) == [
        "The smallest cell: with 57 negatives of g, a false positive rate that is truly 15% is "
        "known to ± 9 points.",
        "No positives of g: no false negative rate can be measured there.",
    ]


def test_tfidf_in_the_card_is_the_reports(files: Files) -> None:
    """The builder and the evaluation fit the same model: one name, one text."""
    evaluation = load_script("eval/eval.py")
    contract = files.build()
    rows = files.rows()
    train = [row for row in rows if row["split"] == "train"]
    test = [row for row in rows if row["split"] == "test"]
    task = evaluation.Task("x", ["normal", "hate"], "hate", [], None, 128, "", "")
    answers = evaluation.answer_by_words(task, test, train)
    hits = sum(a == row["label"] for a, row in zip(answers.predicted, test, strict=True))
    [shown] = [one for one in contract["audit"]["baselines"] if one["name"].startswith("TF-IDF")]
    assert shown["accuracy"] == round(hits / len(test), 4)


# --- what is written -------------------------------------------------------------------------


def test_second_build_is_byte_identical(files: Files) -> None:
    files.build()
    first = parquet_bytes(files.out)
    assert len(first) == 24
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
        assert list(data) == ["train", "validation", "test", *script.CANNED]
        for split, labels in contract["splits"].items():
            names = data[split].features["label"].int2str(data[split]["label"])
            groups = [group for groups in data[split]["target_groups"] for group in groups]
            found = Counter(zip(names, groups, strict=True))
            for label, counts in labels.items():
                assert {group: found[label, group] for group in counts} == counts
    assert data["train"].features["label"].names == ["normal", "hate"]
    card = (files.out / "README.md").read_text(encoding="utf-8")
    assert "offensive" in card and "Community Data License" in card
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
    assert not stray.exists() and len(parquet_bytes(files.out)) == 24
    assert not [file.name for file in files.folder.iterdir() if file.name.startswith(".")]


def test_a_card_that_was_deleted_comes_back(files: Files) -> None:
    files.build()
    (files.out / "README.md").unlink()
    files.build()
    assert (files.out / "README.md").is_file()


def test_a_damaged_contract_says_what_to_do(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    files.build()
    (files.out / "contract.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        files.build()
    assert stop.value.code == 2 and "into a new repo or folder" in capsys.readouterr().err


def test_canned_sets_that_cannot_be_filled_are_said_to_be_short(files: Files) -> None:
    contract = files.build()
    assert f"canned_50_quick holds {contract['rows']['canned_50_quick']}: " in str(
        contract["warnings"]
    )


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
    files.statements = [row for row in files.statements if "number 1 on lgbtq" in row["text"]]
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
    "unknown choice": (nothing, ["--balance", "all"], "no list of source, label, group"),
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
    "label is a list": (post(annotators=[{**VOTE, "label": ["normal"]}]), [], "format"),
    "posts are missing": (
        lambda files: (files.posts.popitem(), files.posts.popitem(), files.write()),
        [],
        "lacks 1 of the 121 posts",
    ),
    "toxicity out of range": (statement(toxicity_ai="7"), [], "from 1 to 5"),
    "deep JSON": (
        lambda files: (files.folder / "dataset.json").write_text("[" * 100_000),
        [],
        "no JSON",
    ),
    "unknown class": (post(annotators=[VOTE]), [], "'rude'"),
    "missing columns": (statement(label=None), [], "lacks the columns label. It has: text,"),
    "wrong config": (nothing, ["--toxigen_config", "train"], "lacks the columns generation"),
    "unknown label": (statement(label="meh"), [], "'meh'"),
    "toxicity is no number": (statement(toxicity_ai="high"), [], "'high'"),
    "no toxicity": (statement(toxicity_ai=""), ["--toxigen_label", "human"], "judgement"),
    "broken literal": (statement(text="b'\\xff\\xfe'"), [], "cannot be decoded"),
    "no Unicode": (
        post(annotators=[{**VOTE, "label": "normal", "target": ["\ud800", "Arab"]}]),
        ["--target_rule", "any"],
        "Unicode",
    ),
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


# --- posts to forget -------------------------------------------------------------------------


def test_forget_takes_the_copies_along_and_lasts(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    text = files.posts["test_Arab_normal_1"]["post_tokens"]
    copies = {"copy": " ".join(text).upper(), "near": " ".join([*text, "indeed"])}
    for name, copy in copies.items():
        files.posts[name] = make_post(copy, "normal", [["Arab"]] * 3)
        files.splits["train"].append(name)
    files.build()
    before = {row["id"]: row["split"] for row in files.rows()}
    ids = files.folder / "ids.txt"
    ids.write_text("test_Arab_normal_1\n\ntoxigen_0\n")
    contract = files.build("--forget", str(ids))
    after = {row["id"]: row["split"] for row in files.rows()}
    assert set(before) - set(after) == {"test_Arab_normal_1", "toxigen_0"}
    assert not {"copy", "near"} & set(after)
    assert contract["forgotten"]["ids"] == ["test_Arab_normal_1", "toxigen_0"]
    printed = capsys.readouterr().out
    assert "forgotten: 2 posts and 2 copies of them" in printed
    assert dropped(contract["sources"][1])["not forgotten"] == 1
    # A later build without the flag leaves them out as well.
    contract = files.build("--seed", "9")
    assert "were to be forgotten before, and still are" in capsys.readouterr().out
    assert not {"test_Arab_normal_1", "toxigen_0"} & {row["id"] for row in files.rows()}
    ids.write_text("\n")
    with pytest.raises(SystemExit):
        files.build("--forget", str(ids))
    assert "is empty. Write one post's id a line" in capsys.readouterr().err


def test_forget_knows_a_text_and_not_a_row_number(files: Files) -> None:
    files.build()
    ids = files.folder / "ids.txt"
    ids.write_text("toxigen_5")
    files.build("--forget", str(ids))
    text = statement_text("hate", 5, "lgbtq")
    files.statements.insert(0, {**files.statements[40], "text": repr(b"one that is new here")})
    files.build()
    rows = {row["id"]: row["text"] for row in files.rows()}
    assert text not in rows.values() and rows["toxigen_5"] == statement_text("hate", 4, "lgbtq")
    # An undecided post has a copy that is decided.
    files.posts["twin"] = make_post("three opinions", "hatespeech", [["Arab"]] * 3)
    files.splits["train"].append("twin")
    files.build()
    assert "twin" in {row["id"] for row in files.rows()}
    ids.write_text("undecided")
    files.build("--forget", str(ids))
    assert "twin" not in {row["id"] for row in files.rows()}


def test_forget_looks_at_a_repo_although_the_folder_knows_already(alice: Hub, files: Files) -> None:
    name, flags = "alice/forget-late", files.write()
    place = flags.index("--dataset_repo")
    del flags[place : place + 2]
    script.main([*flags, "--dataset_repo", name])
    ids = files.folder / "ids.txt"
    ids.write_text("toxigen_0")
    # A model whose contract is of any other form stops nothing.
    api = HfApi(endpoint=alice.endpoint, token=alice.token)
    for number, content in enumerate((b"[1]", b'{"inputs": ["x"]}', b"{")):
        api.create_repo(f"alice/odd-{number}", private=True)
        api.upload_file(
            path_or_fileobj=content, path_in_repo="contract.json", repo_id=f"alice/odd-{number}"
        )
    script.main([*flags, "--output_dir", str(files.out), "--forget", str(ids)])
    both = ["--output_dir", str(files.out), "--dataset_repo", name]
    script.main([*flags, *both, "--forget", str(ids)])
    contract = json.loads((files.out / "contract.json").read_text(encoding="utf-8"))
    assert contract["forgotten"]["revisions"] == [
        f"{name}@{alice.commits(name, 'dataset')[1]['oid']}"
    ]


def test_forget_lists_the_revisions_and_adapters_that_saw_them(
    alice: Hub, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    name, api = "alice/forget-data", HfApi(endpoint=alice.endpoint, token=alice.token)
    flags = files.write()
    flags[flags.index("--dataset_repo") + 1] = name
    script.main(flags)
    script.main([*flags, "--seed", "3"])
    second, first, _ = (commit["oid"] for commit in alice.commits(name, "dataset"))
    for model, contract in {
        "forget-lora": {"dataset": {"repo": name, "revision": first}},
        "forget-other": {"dataset": {"repo": "alice/other", "revision": first}},
        "forget-merged": {"inputs": [{"repo": "alice/forget-lora"}]},
        "forget-plain": None,
    }.items():
        api.create_repo(f"alice/{model}", private=True)
        if contract:
            content = json.dumps(contract).encode()
            api.upload_file(
                path_or_fileobj=content, path_in_repo="contract.json", repo_id=f"alice/{model}"
            )
    ids = files.folder / "ids.txt"
    ids.write_text("toxigen_0")
    capsys.readouterr()
    script.main([*flags, "--seed", "3", "--forget", str(ids)])
    printed = capsys.readouterr().out
    contract = json.loads(
        (alice.repo_folder(name, "dataset") / "contract.json").read_text(encoding="utf-8")
    )
    [row] = [row for row in make_statements() if "number 0 on lgbtq" in row["text"]][:1]
    key = script.normalise(script.decode_text(row["text"], ""))
    assert contract["forgotten"] == {
        "ids": ["toxigen_0"],
        "texts": {"toxigen_0": script.text_hash(key)},
        "revisions": [f"{name}@{second}", f"{name}@{first}"],
        "adapters": ["alice/forget-lora", "alice/forget-merged"],
    }
    for part in (f"dataset {name}@{first}", "model alice/forget-merged", "super_squash_history"):
        assert part in printed
    # The same again finds nothing new, and commits nothing.
    script.main([*flags, "--seed", "3", "--forget", str(ids)])
    assert "nothing is written" in capsys.readouterr().out
    assert len(alice.commits(name, "dataset")) == 4


# --- Hub -------------------------------------------------------------------------------------


def test_a_rebuild_commits_only_what_is_new(
    alice: Hub, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rules and inputs: no commit. Another rule, or a file changed in the repo: one."""
    name, flags = "alice/rebuilt", files.write()
    flags[flags.index("--dataset_repo") + 1] = name
    script.main([*flags, "--output_dir", str(files.out)])
    stamps = {file: file.stat().st_mtime_ns for file in files.out.rglob("*")}
    for _ in range(2):
        script.main([*flags, "--output_dir", str(files.out)])
        assert capsys.readouterr().out.count("nothing is written") == 2
    assert len(alice.commits(name, "dataset")) == 2
    assert {file: file.stat().st_mtime_ns for file in files.out.rglob("*")} == stamps
    folder = alice.repo_folder(name, "dataset")
    # The two cards differ in how to load the data from where they are.
    for file in sorted(set(files.out.rglob("*.*")) - {files.out / "README.md"}):
        assert file.read_bytes() == (folder / file.relative_to(files.out)).read_bytes()

    api = HfApi(endpoint=alice.endpoint, token=alice.token)
    for path in ("simple/test-00000-of-00001.parquet", "unified/extra.parquet"):
        api.upload_file(
            path_or_fileobj=b"x" * 100, path_in_repo=path, repo_id=name, repo_type="dataset"
        )
        script.main(flags)
    assert len(alice.commits(name, "dataset")) == 6
    capsys.readouterr()
    script.main([*flags, "--offensive_as", "drop"])
    printed = capsys.readouterr().out
    assert "replacing a build of 210 posts by datasets/build_unified.py" in printed
    assert len(alice.commits(name, "dataset")) == 7


@pytest.mark.parametrize("status", [500, 429, 412])
def test_a_failing_commit_is_tried_again_or_said(
    alice: Hub, files: Files, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    name, flags = f"alice/faulty-{status}", files.write()
    flags[flags.index("--dataset_repo") + 1] = name
    headers = {"Retry-After": "1"} if status == 429 else {}
    alice.add_fault(path=f"{name}/commit", method="POST", status=status, headers=headers, times=1)
    try:
        if status == 412:
            with pytest.raises(SystemExit) as stop:
                script.main(flags)
            assert stop.value.code == 1 and "412" in capsys.readouterr().err
        script.main(flags)
    finally:
        alice.clear_faults()
    assert len(alice.commits(name, "dataset")) == 2


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
        f"{name}@{built['oid']}\nnext: hf jobs uv run train/train.py" in done.stdout
        and "contract.json" not in start["files"]
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
    sizes = contract["rows"]
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
    assert done.returncode == 2 and "gated" in done.stderr
    assert "--toxigen ./annotated_train.csv" in done.stderr

    done = run(hub, home, *sources, *target, token="hf_alice_read")
    assert done.returncode == 2 and "write access" in done.stderr

    done = run(hub, home, "--hatexplain", toxigen, "--toxigen", toxigen, *target)
    assert done.returncode == 2 and "no such revision" in done.stderr
    assert "--hatexplain_splits ./post_id_divisions.json" in done.stderr

    done = run(hub, home, "--hatexplain", hatexplain, "--toxigen", hatexplain, *target)
    assert done.returncode == 2 and "holds no train/*.parquet" in done.stderr

    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("alice/refused-public", repo_type="dataset", private=False)
    done = run(hub, home, *sources, "--dataset_repo", "alice/refused-public")
    assert done.returncode == 2 and "is public" in done.stderr
    assert len(hub.commits("alice/refused-public", "dataset")) == 1

    assert not api.repo_exists(name, repo_type="dataset")
