"""datasets/build_custom.py on made posts in the forms that people have.

pytest tests/test_build_custom.py
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from huggingface_hub import HfApi
from tiny import load_script, made_posts, read_config, write_csv, write_jsonl, write_sources

script = load_script("datasets/build_custom.py")
COLUMNS = ("--text_column", "post", "--label_column", "verdict", "--group_column", "about")
MAP = ("--label_map", '{"1": "hate", "0": "normal", "skip": null}')


@pytest.fixture(autouse=True)
def no_settings(clean_environment: None) -> None:
    """What somebody's shell sets must not change a test."""


def posts(first: int = 0, last: int | None = None) -> list[dict[str, Any]]:
    """Made posts with columns of their owner's."""
    return [
        {
            "post": post["text"],
            "verdict": int(post["label"] == "hate"),
            "about": post["group"],
            "dialect": ("north", "south")[number % 2],
        }
        for number, post in enumerate(made_posts()[first:last])
    ]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write the rows in the form that the file's ending says."""
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        write_jsonl(file, rows)
    else:
        write_csv(file, rows)
    return file


def build(file: Path, *flags: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the script into a folder beside the file; return the contract and `unified`."""
    out = file.parent / "out"
    script.main(["--input", str(file), *COLUMNS, *MAP, "--output_dir", str(out), *flags])
    contract = json.loads((out / "contract.json").read_text(encoding="utf-8"))
    return contract, read_config(out, "unified")


def test_every_form_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    found = []
    for ending in ("csv", "jsonl", "parquet"):
        contract, rows = build(write(tmp_path / f"posts.{ending}", posts()))
        found.append([(row["id"], row["text"], row["label"], row["split"]) for row in rows])
        assert contract["labels"] == ["normal", "hate"] and contract["positive_label"] == "hate"
        assert contract["groups"] == ["lgbtq", "mexican", "middle_east"]
    zipped = tmp_path / "posts.csv.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "posts.csv").read_bytes()))
    _, rows = build(zipped)
    found.append([(row["id"], row["text"], row["label"], row["split"]) for row in rows])
    assert found[0] == found[1] == found[2] == found[3]
    splits = Counter(row["split"] for row in rows)
    total = sum(splits.values())
    assert (
        abs(splits["test"] / total - 0.2) < 0.03 and abs(splits["validation"] / total - 0.1) < 0.03
    )


def test_labels_groups_and_kept_columns(tmp_path: Path) -> None:
    rows = posts()
    rows[0]["verdict"], rows[1]["about"], rows[2]["about"] = "skip", "lgbtq | mexican", ""
    text = {number: rows[number]["post"] for number in range(3)}
    file = write(tmp_path / "posts.csv", rows)
    contract, found = build(file, "--keep_columns", "dialect", "--near_duplicates", "none")
    by_text = {row["text"]: row for row in found}
    assert text[0] not in by_text and by_text[text[1]]["target_groups"] == ["lgbtq", "mexican"]
    assert by_text[text[2]]["target_groups"] == []
    assert {row["dialect"] for row in found} == {"north", "south"}
    steps = {step["step"]: step["rows"] for step in contract["sources"][0]["steps"]}
    assert steps["read"] - steps["with a label"] == 1

    groups = {
        "queer": {"input": ["lgbtq"], "description": "what our moderators call it"},
        "abroad": {"input": ["mexican", "middle_east"]},
    }
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    contract, found = build(file, "--groups", str(tmp_path / "groups.json"))
    assert contract["groups"] == ["queer", "abroad"]
    assert contract["group_descriptions"]["queer"] == "what our moderators call it"


def test_cells_keep_their_values(tmp_path: Path) -> None:
    rows = [{**row, "score": 0, "flag": False, "gone": None} for row in posts()]
    _, found = build(
        write(tmp_path / "posts.parquet", rows), "--keep_columns", "score", "flag", "gone"
    )
    assert {(row["score"], row["flag"], row["gone"]) for row in found} == {("0", "False", "")}


def test_lists_as_groups_and_true_and_false_as_labels(tmp_path: Path) -> None:
    rows = [
        {
            "text": row["post"],
            "label": bool(row["verdict"]),
            "who": [row["about"], "everyone", None],
        }
        for row in posts()
    ]
    file, out = write(tmp_path / "posts.parquet", rows), tmp_path / "out"
    script.main(["--input", str(file), "--group_column", "who", "--output_dir", str(out)])
    found = read_config(out, "unified")
    assert all(row["target_groups"][0] == "everyone" for row in found)
    assert {row["label"] for row in found} == {"normal", "hate"}


def test_three_labels_in_the_users_own_words(tmp_path: Path) -> None:
    rows = posts()
    for number, row in enumerate(rows):
        row["verdict"] = {0: "ok", 1: "attack"}[row["verdict"]] if number % 3 else "rude"
    file, out = write(tmp_path / "posts.jsonl", rows), tmp_path / "out"
    label_map = tmp_path / "map.json"
    label_map.write_text(json.dumps({"ok": "fine", "rude": "rude", "attack": "attack"}))
    flags = [*COLUMNS, "--label_map", str(label_map), "--positive_label", "attack"]
    script.main(["--input", str(file), *flags, "--output_dir", str(out)])
    contract = json.loads((out / "contract.json").read_text(encoding="utf-8"))
    assert contract["labels"] == ["fine", "rude", "attack"]
    assert "fine, rude or attack" in contract["prompts"]["simple"]["user"]
    for name, strategy in contract["prompts"].items():
        for row in read_config(out, name):
            answer = row["completion"][0]["content"]
            assert (
                script.parse_answer(strategy["answer"], answer, contract["labels"]) == row["label"]
            )


@pytest.mark.parametrize(
    ("label_map", "taught"),
    [
        ({"2": "hate", "1": "rude", "0": "normal"}, {"hate", "normal"}),
        ({"2": "hate", "1": "rude", "0": "fine"}, {"hate"}),
        ({"1": "hate", "0": "fine"}, {"hate", "fine"}),
    ],
)
def test_examples_teach_only_labels_whose_meaning_is_known(
    tmp_path: Path, label_map: dict[str, str], taught: set[str]
) -> None:
    rows = posts()
    for number, row in enumerate(rows if "2" in label_map else []):
        row["verdict"] = number % 3
    flags = ["--label_map", json.dumps(label_map)]
    contract, _ = build(write(tmp_path / "posts.csv", rows), *flags)
    system = contract["prompts"]["optimized"]["system"]
    assert {label for label in label_map.values() if f'"label": "{label}"' in system} == taught


def test_own_splits(tmp_path: Path) -> None:
    rows = posts()
    for number, row in enumerate(rows):
        row["part"] = ("train", "dev", "test")[number % 3]
    contract, found = build(write(tmp_path / "posts.csv", rows), "--split_column", "part")
    parts = {row["post"]: row["part"] for row in rows}
    for row in found:
        assert row["split"] == row["official_split"] == script.SPLIT_NAMES[parts[row["text"]]]
    for row in rows:
        row["part"] = "train" if row["part"] == "dev" else row["part"]
    contract, found = build(write(tmp_path / "posts.csv", rows), "--split_column", "part")
    moved = [row for row in found if row["split"] != row["official_split"]]
    assert {(row["official_split"], row["split"]) for row in moved} == {("train", "validation")}
    assert 0 < len(moved) < 0.15 * contract["rows"]["train"]


def test_append_keeps_every_row_and_doubles_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, before = build(write(tmp_path / "posts.csv", posts(0, 200)))
    _, both = build(write(tmp_path / "more.csv", posts(150, 300)), "--append", "true")
    assert [row for row in before if row not in both] == []
    texts = [row["text"] for row in both]
    assert len(texts) == len(set(texts)) > len(before) + 50
    contract = json.loads((tmp_path / "out" / "contract.json").read_text(encoding="utf-8"))
    assert [source["name"] for source in contract["sources"]] == ["posts", "more"]
    assert contract["rows"]["train"] == sum(row["split"] == "train" for row in both)
    assert len(contract["rules"]["appended"]) == 1
    stamp = (tmp_path / "out" / "contract.json").read_bytes()
    capsys.readouterr()
    _, again = build(tmp_path / "more.csv", "--append", "true")
    assert again == both and "no post of more.csv is new" in capsys.readouterr().out
    assert (tmp_path / "out" / "contract.json").read_bytes() == stamp
    other = [{**row, "verdict": 1 - row["verdict"]} for row in posts(0, 9)]
    build(write(tmp_path / "other.csv", other), "--append", "true")
    assert "posts are in the build, or nearly so, with another label" in capsys.readouterr().out
    assert (tmp_path / "out" / "contract.json").read_bytes() == stamp


def test_append_drops_no_row_of_the_build_whatever_its_flags(tmp_path: Path) -> None:
    """The build may have been made with another similarity, and with other columns to keep."""
    made = build(write(tmp_path / "posts.csv", posts(0, 300)), "--near_duplicates", "none")
    before = {row["id"]: row for row in made[1]}
    more = write(tmp_path / "more.csv", posts(250, 400))
    _, rows = build(more, "--append", "true", "--keep_columns", "dialect")
    after = {row["id"]: row for row in rows}
    assert {key: after[key] | {"dialect": ""} for key in before} == {
        key: row | {"dialect": ""} for key, row in before.items()
    }
    assert {row["dialect"] for key, row in after.items() if key not in before} == {"north", "south"}
    last = write(tmp_path / "last.csv", posts(400))
    contract, rows = build(last, "--append", "true")
    assert {row["id"]: row for row in rows}.items() >= after.items()
    steps = [[step["step"] for step in source["steps"]] for source in contract["sources"]]
    assert steps[0] == [step["step"] for step in made[0]["sources"][0]["steps"]]
    # The new posts have groups from the first step on.
    assert "no_target" not in contract["sources"][2]["steps"][0]["counts"]["no split"]


def test_append_to_hate_speech_twitter_that_has_no_negatives(tmp_path: Path) -> None:
    twitter = load_script("datasets/build_twitter.py")
    tweets = [
        {"tweet": f"{chr(97 + n % 26) * 9} {n * 7919}", "label": n % 2, "categories": ""}
        for n in range(80)
    ]
    for n, name in enumerate(twitter.CATEGORIES.values()):
        tweets[2 * n + 1]["categories"] = name["twitter"][0]
    for split, part in (("train", tweets), ("test", tweets[:40])):
        rows = [{**row, "tweet": f"{split} {row['tweet']}"} for row in part]
        write_csv(tmp_path / f"{split}.csv", rows)
    files = [f"--{split}_csv={tmp_path / split}.csv" for split in ("train", "test")]
    twitter.main([*files, "--near_duplicates", "none", "--output_dir", str(tmp_path / "out")])
    new = [
        {"post": f"ours {n} {'xyz'[n % 3] * 30}", "verdict": n % 2, "about": "race"}
        for n in range(8)
    ]
    _, rows = build(write(tmp_path / "ours.csv", new), "--append", "true")
    ours = [row for row in rows if row["source"] == "ours"]
    assert len(rows) > 80 and ours and {tuple(row["categories"]) for row in ours} == {()}


def test_a_forgotten_text_stays_away_under_any_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, before = build(write(tmp_path / "posts.csv", posts()))
    row, ids = before[0], tmp_path / "ids.txt"
    ids.write_text(f"{row['id']}\nno_such_post\n")
    file = write(tmp_path / "renamed.csv", posts())
    # From a build, with an input that has nothing new; then by a new build of a renamed file.
    contract, rows = build(tmp_path / "posts.csv", "--append", "true", "--forget", str(ids))
    assert row["text"] not in {one["text"] for one in rows} and len(rows) == len(before) - 1
    assert contract["sources"][0]["steps"][-1]["step"] == "not forgotten"
    assert "1 of the ids belong to no post: no_such_post" in capsys.readouterr().out
    for flags in (["--append", "true"], []):
        _, rows = build(file, *flags)
        assert row["text"] not in {one["text"] for one in rows}
        assert len(rows) == len(before) - 1
    # A group that the data alone names goes with its last post.
    alone = {"post": "far from all else, once", "verdict": 0, "about": "nobody"}
    made = build(write(tmp_path / "one.csv", [*posts(), alone]), "--allow_empty_cells")[0]
    [post] = [one for one in read_config(tmp_path / "out", "unified") if one["persona"] == "nobody"]
    ids.write_text(post["id"])
    contract, _ = build(tmp_path / "one.csv", "--forget", str(ids))
    assert [*made["groups"]] == [*contract["groups"], "nobody"]
    ids.write_text("nor_this_one\n")
    with pytest.raises(SystemExit):
        build(file, "--forget", str(ids))
    assert "no post has one of these 1 ids" in capsys.readouterr().err


def test_a_copy_goes_with_a_forgotten_post_that_the_rules_drop(tmp_path: Path) -> None:
    rows = [{**row, "key_of_row": f"p{n}"} for n, row in enumerate(posts())]
    rows.append({**rows[5], "verdict": "skip", "key_of_row": "unlabelled"})
    (tmp_path / "ids.txt").write_text("unlabelled")
    flags = ["--id_column", "key_of_row", "--near_duplicates", "none"]
    file = write(tmp_path / "posts.csv", rows)
    _, found = build(file, *flags, "--forget", str(tmp_path / "ids.txt"))
    assert "p5" not in {row["id"] for row in found} and len(found) == len(rows) - 2


def test_append_to_another_builders_dataset_on_the_hub(
    alice: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import load_dataset

    flags = [
        part
        for flag, file in write_sources(tmp_path / "s").items()
        for part in (f"--{flag}", str(file))
    ]
    unified = load_script("datasets/build_unified.py")
    unified.main([*flags, "--dataset_repo", "alice/appended"])
    folder = alice.repo_folder("alice/appended", "dataset")
    before = {row["id"]: row for row in read_config(folder, "unified")}
    new = [
        {"post": f"{word} " * 5, "verdict": number % 2, "about": "lgbtq"}
        for number, word in enumerate(["oak", "elm", "fir", "ash", "yew", "birch", "larch", "may"])
    ]
    file = write(tmp_path / "ours.csv", new)
    command = ["--input", str(file), *COLUMNS, *MAP, "--dataset_repo", "alice/appended"]
    for _ in range(2):
        script.main([*command, "--append", "true"])
    assert len(alice.commits("alice/appended", "dataset")) == 3
    after = {row["id"]: row for row in read_config(folder, "unified")}
    assert {key: after[key] for key in before} == before and len(after) == len(before) + 8
    contract = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
    assert contract["groups"] == ["lgbtq", "mexican", "middle_east"]
    assert contract["group_descriptions"]["mexican"] == unified.GROUPS["mexican"]["description"]
    data = load_dataset("alice/appended", "simple", token=alice.token)
    assert {split: len(data[split]) for split in data} == contract["rows"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        script.main([*command, "--append", "true", "--positive_label", "normal"])
    assert "the build has the labels normal, hate" in capsys.readouterr().err


def test_hub_dataset_with_its_splits_and_label_names(alice: Hub, tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"post": Value("string"), "verdict": ClassLabel(names=["0", "1"])})
    features["about"] = Value("string")
    splits = {}
    for number, split in enumerate(("train", "validation", "test")):
        rows = [{k: row[k] for k in features} for row in posts()[number::3]]
        splits[split] = Dataset.from_list(rows, features=features)
    DatasetDict(splits).push_to_hub("alice/their-posts", private=True, token=alice.token)
    script.main(["--input", "alice/their-posts", *COLUMNS, *MAP, "--run_name", "theirs"])
    folder = alice.repo_folder("alice/hsd-theirs", "dataset")
    rows = read_config(folder, "unified")
    assert all(row["split"] == row["official_split"] for row in rows)
    contract = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
    assert contract["inputs"][0]["repo"] == "alice/their-posts"


def test_hub_dataset_with_group_classes_and_several_configs(
    alice: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    names = ["lgbtq", "mexican", "middle_east"]
    features = Features({"post": Value("string"), "verdict": Value("int64")})
    features["about"] = ClassLabel(names=names)
    rows = [{k: row[k] for k in features} for row in posts()]
    for config in ("first", "second"):
        Dataset.from_list(rows, features=features).push_to_hub(
            "alice/configs", config, private=True, token=alice.token
        )
    command = ["--input", "alice/configs", *COLUMNS, *MAP, "--run_name", "configs"]
    script.main([*command, "--input_config", "second"])
    contract = json.loads(
        (alice.repo_folder("alice/hsd-configs", "dataset") / "contract.json").read_text()
    )
    assert contract["groups"] == names
    for flags, message in (
        ([], "--input_config is one of first, second"),
        (["--input_config", "third"], "has no config third, but: first, second"),
    ):
        with pytest.raises(SystemExit) as stop:
            script.main([*command, *flags])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_hub_files_of_several_forms(alice: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    api = HfApi(endpoint=alice.endpoint, token=alice.token)
    api.create_repo("alice/ragged", repo_type="dataset")
    for name, content in (("a.csv", b"post,verdict,about\nx,1,y\n"), ("b.csv", b"other\n1\n")):
        api.upload_file(
            repo_id="alice/ragged",
            repo_type="dataset",
            path_in_repo=f"data/train-{name}",
            path_or_fileobj=content,
        )
    with pytest.raises(SystemExit) as stop:
        script.main(["--input", "alice/ragged", *COLUMNS, *MAP])
    errors = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "its files are damaged or of several forms" in errors[-1]


def test_a_repo_of_a_loading_script_alone(alice: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    api = HfApi(endpoint=alice.endpoint, token=alice.token)
    for name, builder, flag in (
        ("scripted", script, "--input"),
        ("hatexplain-script", load_script("datasets/build_unified.py"), "--hatexplain"),
    ):
        api.create_repo(f"alice/{name}", repo_type="dataset")
        api.upload_file(
            repo_id=f"alice/{name}",
            repo_type="dataset",
            path_in_repo=f"{name}.py",
            path_or_fileobj=b"raise SystemExit('this must never run')",
        )
        with pytest.raises(SystemExit) as stop:
            builder.main([flag, f"alice/{name}@main", "--dataset_repo", "alice/none"])
        message = capsys.readouterr().err
        assert stop.value.code == 2 and "loading script" in message
        assert f"alice/{name}@refs/convert/parquet" in message
    assert not api.repo_exists("alice/none", repo_type="dataset")


def test_a_long_cell_and_a_folder_with_an_at_sign(tmp_path: Path) -> None:
    rows = posts()
    rows[0]["post"] = "long " * 40_000
    folder = tmp_path / "me@home"
    folder.mkdir()
    contract, found = build(write(folder / "posts.csv", rows))
    assert max(len(row["text"]) for row in found) == 200_000
    assert contract["sources"][0]["name"] == "posts"


def test_a_label_of_signs_and_names_that_are_markup(tmp_path: Path) -> None:
    rows = posts()
    rows[0]["about"] = "<img src=http://x.y/z.png> `a` [b](http://c.d) \\ \u202e"
    rows[0]["post"] = "far from all else, once"
    flags = ["--label_map", '{"1": "hate!", "0": "fine"}', "--positive_label", "hate!"]
    contract, _ = build(write(tmp_path / "posts.jsonl", rows), *flags, "--allow_empty_cells")
    assert contract["labels"] == ["fine", "hate!"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "<img" not in card and "](http:" not in card and "\u202e" not in card
    assert "x.y/z.png" in card


def first(**changes: Any) -> Any:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[0] |= changes

    return change


BAD_INPUT: dict[str, tuple[Any, list[str], str]] = {
    "no such column": (first(), ["--text_column", "body"], "lacks the columns body. It has: post"),
    "unknown label": (
        lambda rows: [row.update(verdict="maybe") for row in rows[:3]],
        [],
        "3 values of label outside the mapping: 'maybe' (3). The mapping has: 1, 0, skip",
    ),
    "no label": (first(verdict=""), [], "values of label outside the mapping: '' (1)"),
    "one label": (
        lambda rows: [row.update(verdict=1) for row in rows],
        ["--label_map", '{"1": "hate"}'],
        "a second label",
    ),
    "unknown split": (first(), ["--split_column", "dialect"], "values of split outside"),
    "positive label": (first(), ["--positive_label", "toxic"], "--positive_label toxic is no"),
    "map is no map": (first(), ["--label_map", '{"1": 1}'], "--label_map must be a mapping"),
    "map is cut": (first(), ["--label_map", '{"1": "ha'], "is no JSON"),
    "taken column": (first(), ["--keep_columns", "text"], "the name is taken"),
    "internal column": (first(), ["--keep_columns", "targets"], "the name is taken"),
    "reserved group": (first(about="no_target"), [], "a group cannot be called 'no_target'"),
    "label of two lines": (first(), ["--label_map", '{"1": "ha\\nte"}'], "must be a mapping"),
    "append to nothing": (first(), ["--append", "true"], "holds no build yet"),
    "empty cell": (
        first(about="nobody", post="far from all else, once"),
        [],
        "post about nobody is left by the rules",
    ),
    "wrong ending": (first(), ["--input", "./posts.xlsx"], "does not exist"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, flags, message = BAD_INPUT[case]
    rows = posts()
    change(rows)
    with pytest.raises(SystemExit) as stop:
        build(write(tmp_path / "posts.csv", rows), *flags)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors.count("\n") == 1 and message in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"post": "a", "verdict": 0, "about": "x"}\n{"post": "b", "ver', "line 2 is"),
        ("p.jsonl", b'["a"]\n', "line 1 is no object but list"),
        ("p.jsonl", '{"post": "é"}'.encode("latin-1"), "must be UTF-8"),
        ("p.parquet", b"PAR1 this is none", "damaged, or no parquet file"),
        ("p.csv", b'post,verdict,about\n"a,0', "cut off"),
        ("p.csv", b"", "lacks the columns"),
        ("p.jsonl", b'{"post": ["a"], "verdict": 0, "about": "x"}', "values of text outside"),
        ("p.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("p.csv", b"post,verdict,about\n", "holds no post"),
    ],
)
def test_damaged_files(
    tmp_path: Path, name: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        build(tmp_path / name)
    assert stop.value.code == 2 and message in capsys.readouterr().err
