"""eval/compare.py: which posts are compared, what is claimed of them, and what is not.

pytest tests/test_compare.py
"""

from __future__ import annotations

import csv
import json
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hub import Hub
from scipy.stats import binomtest, ttest_ind
from tiny import ROOT, load_script, write_csv, write_jsonl

pytestmark = pytest.mark.usefixtures("clean_environment")
GROUPS = ("lgbtq", "mexican", "middle_east")


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    return load_script("eval/compare.py")


def posts(n: int = 300) -> list[dict[str, Any]]:
    """Labels, groups and how hard each post is; every tenth has no group, every ninth has two."""
    draw = random.Random(0)
    rows = []
    for number in range(n):
        groups = [] if number % 10 == 0 else [GROUPS[number % 3]]
        groups += [GROUPS[(number + 1) % 3]] if groups and number % 9 == 0 else []
        label = "hate" if draw.random() < 0.45 else "normal"
        rows.append({"id": f"p{number}", "label": label, "groups": groups, "ease": draw.random()})
    return rows


def answers(seed: int, skill: float = 0.75, missed: dict[str, float] | None = None, n: int = 300):
    """Rows of predictions: right on easy posts, and on others by chance.

    `missed` lowers the skill on a group's hateful posts.
    """
    draw = random.Random(seed)
    rows = []
    for post in posts(n):
        able, luck = skill, draw.random()
        if post["label"] == "hate":
            able -= sum((missed or {}).get(group, 0) for group in post["groups"])
        right = 0.8 * post["ease"] + 0.2 * luck < able
        p = draw.uniform(0.5, 1) if right == (post["label"] == "hate") else draw.uniform(0, 0.49)
        rows.append(
            {
                "id": post["id"],
                "label": post["label"],
                "prediction": "hate" if p >= 0.5 else "normal",
                "p_hate": round(p, 4),
                "target_groups": "|".join(post["groups"]),
            }
        )
    return rows


def run(compare: ModuleType, folder: Path, *argv: Any) -> dict[str, Any]:
    """Run main and return compare.json, read as strict JSON."""
    compare.main([*map(str, argv), "--output_dir", str(folder / "out")])
    return result_in(folder / "out")


def result_in(folder: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (folder / "compare.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse)


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def refusal(compare: ModuleType, capsys: pytest.CaptureFixture, *argv: Any, code: int = 2) -> str:
    with pytest.raises(SystemExit) as end:
        compare.main(list(map(str, argv)))
    message = capsys.readouterr().err
    assert end.value.code == code, message
    assert message.startswith("error: ") and "Traceback" not in message
    return message


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two files: the second misses far more hateful posts about Mexicans."""
    a = write_csv(tmp_path / "a.csv", answers(1))
    return a, write_csv(tmp_path / "b.csv", answers(1, missed={"mexican": 0.4}))


# --- which posts -----------------------------------------------------------------------------


def test_posts_are_matched_by_id_in_any_order(
    compare: ModuleType, tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    before = run(compare, tmp_path, *pair)
    rows = answers(1, missed={"mexican": 0.4})
    random.Random(5).shuffle(rows)
    write_csv(pair[1], rows)
    after = run(compare, tmp_path, *pair)
    assert before["metrics"] == after["metrics"] and before["verdicts"] == after["verdicts"]


def test_posts_of_some_runs_only_are_left_out_and_counted(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = [write_csv(tmp_path / "a.csv", answers(1)[:280])]
    files += [write_csv(tmp_path / "b.csv", answers(2)[20:])]
    files += [write_csv(tmp_path / "c.csv", answers(3))]
    found = run(compare, tmp_path, *files)
    assert found["posts"] == {
        "shared": 260,
        "left_out": {"a": 20, "b": 20, "c": 40},
        "repeated": 0,
    }
    assert "left out: 20 of a, 20 of b, 40 of c" in capsys.readouterr().out
    assert {one["n"] for one in found["metrics"]["comparisons"]} == {260}


def test_repeated_ids_are_matched_by_their_order(compare: ModuleType, tmp_path: Path) -> None:
    rows, other = answers(1), answers(2)
    for some in (rows, other):
        some[1]["id"] = some[2]["id"] = some[0]["id"]
    del other[2]
    files = [write_csv(tmp_path / "a.csv", rows), write_csv(tmp_path / "b.csv", other)]
    found = run(compare, tmp_path, *files)
    assert found["posts"] == {"shared": 299, "left_out": {"a": 1}, "repeated": 1}


def test_no_shared_post_is_an_error(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = [row | {"id": f"q{row['id']}"} for row in answers(2)]
    files = [write_csv(tmp_path / "a.csv", answers(1)), write_csv(tmp_path / "b.csv", other)]
    message = refusal(compare, capsys, *files)
    assert "share no post: a has 300, such as 'p0', b has 300, such as 'qp0'" in message


def test_other_true_labels_are_an_error_that_counts_them(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = answers(2)
    for row in other[:4]:
        row["label"] = "normal" if row["label"] == "hate" else "hate"
    files = [write_csv(tmp_path / "a.csv", answers(1)), write_csv(tmp_path / "b.csv", other)]
    message = refusal(compare, capsys, *files)
    assert "the true labels of 4 of 300 posts differ between a and b" in message
    assert "p0, p1, p2." in message


def test_row_numbers_that_name_other_posts_are_an_error(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Files without ids, as the source project's, are matched by row; the texts tell."""

    def rows(seed: int) -> list[dict[str, Any]]:
        return [
            {"input_text": f"post {row.pop('id')}", "true_label": "hate"} | row
            for row in answers(seed)
        ]

    a = write_csv(tmp_path / "a.csv", rows(1))
    b = write_csv(tmp_path / "b.csv", rows(2))
    assert run(compare, tmp_path, a, b, "--label_column", "true_label")["posts"]["shared"] == 300
    write_csv(b, rows(2)[::-1])
    message = refusal(compare, capsys, a, b, "--label_column", "true_label")
    assert "posts of the same id have another text" in message


def test_a_file_of_several_strategies_is_several_runs(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [row | {"strategy": name} for name in ("short", "long") for row in answers(len(name))]
    file = write_csv(tmp_path / "results.csv", rows)
    found = run(compare, tmp_path, file)
    assert [one["name"] for one in found["runs"]] == ["short", "long"]
    other = write_csv(tmp_path / "other.csv", rows)
    names = [one["name"] for one in run(compare, tmp_path, file, other)["runs"]]
    assert names == ["results.csv:short", "results.csv:long", "other.csv:short", "other.csv:long"]
    message = refusal(compare, capsys, other, "--pool", f"{file},{other}")
    assert "it holds 2 strategies (short, long)" in message


def test_groups_come_from_the_first_run_that_has_them(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bare = [{**row} for row in answers(1)]
    for row in bare:
        del row["target_groups"]
    other = answers(3)
    other[1]["target_groups"] = "women"
    files = [write_csv(tmp_path / "a.csv", bare), write_csv(tmp_path / "b.csv", answers(2))]
    files.append(write_csv(tmp_path / "c.csv", other))
    found = run(compare, tmp_path, *files)
    assert [*found["metrics"]["strategies"][0]["groups"]] == [*GROUPS, "no_target"]
    assert "The groups of 1 posts differ between b, whose groups are used, and c." in found["notes"]


# --- figures ---------------------------------------------------------------------------------


def test_tests_are_those_of_scipy_and_intervals_contain_the_difference(
    compare: ModuleType, tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    [one] = run(compare, tmp_path, *pair)["metrics"]["comparisons"]
    rows, other = (read_csv(file) for file in pair)
    right = [(a["prediction"] == a["label"], b["prediction"] == b["label"]) for a, b in
             zip(rows, other, strict=True)]  # fmt: skip
    only = right.count((True, False)), right.count((False, True))
    assert (one["only_first_right"], one["only_second_right"]) == only
    accuracy = one["overall"]["accuracy"]
    assert accuracy["p"] == pytest.approx(binomtest(only[0], sum(only)).pvalue)
    assert accuracy["value"] == pytest.approx((only[0] - only[1]) / 300)
    hateful = [
        both
        for both, row in zip(right, rows, strict=True)
        if row["label"] == "hate" and "mexican" in row["target_groups"].split("|")
    ]
    missed = one["groups"]["mexican"]["false_negative_rate"]
    only = hateful.count((True, False)), hateful.count((False, True))
    assert missed["n"] == len(hateful)
    assert missed["p"] == pytest.approx(binomtest(only[0], sum(only)).pvalue)
    assert missed["value"] == pytest.approx((only[1] - only[0]) / len(hateful))
    figures = [figure for place in (one["overall"], *one["groups"].values())
               for figure in place.values() if figure["low"] is not None]  # fmt: skip
    assert len(figures) > 20
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in figures)


def test_a_pair_is_told_the_same_whoever_else_is_compared(
    compare: ModuleType, tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    [alone] = run(compare, tmp_path, *pair)["metrics"]["comparisons"]
    third = write_csv(tmp_path / "c.csv", answers(3))
    both = run(compare, tmp_path, *pair, third)["metrics"]["comparisons"]
    assert alone["overall"]["f1"] == both[0]["overall"]["f1"]
    assert alone["overall"]["accuracy"]["p_holm_pairs"] == alone["overall"]["accuracy"]["p"]
    corrected = [one["overall"]["accuracy"]["p_holm_pairs"] for one in both]
    assert (
        corrected[0] == min(1, 2 * alone["overall"]["accuracy"]["p"])
        or corrected[0] >= (alone["overall"]["accuracy"]["p"])
    )
    for group, figures in alone["groups"].items():
        for rate in ("false_positive_rate", "false_negative_rate"):
            if "p" in figures[rate]:
                # Those of all posts are tested with them.
                assert figures[rate]["p_holm_pairs"] >= figures[rate]["p_holm"]
                again = both[0]["groups"][group][rate]
                assert again["p"] == figures[rate]["p"]
                assert again["p_holm_pairs"] >= figures[rate]["p_holm_pairs"]


def test_answers_without_label_count_as_wrong(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = answers(1)
    lost = [index for index, row in enumerate(rows) if row["prediction"] == row["label"]][:30]
    other = [{**row} for row in rows]
    # Wrong before and without label now: still wrong, so not decided otherwise.
    same = [index for index, row in enumerate(rows) if row["prediction"] != row["label"]][:5]
    for index in [*lost, *same]:
        other[index]["prediction"] = "unknown"
    files = [write_csv(tmp_path / "a.csv", rows), write_csv(tmp_path / "b.csv", other)]
    found = run(compare, tmp_path, *files)
    [one] = found["metrics"]["comparisons"]
    assert one["changed"] == one["only_first_right"] == 30 and one["only_second_right"] == 0
    assert one["overall"]["accuracy"]["value"] == pytest.approx(0.1)
    assert found["runs"][1]["unparsed"] == 35
    printed = capsys.readouterr().out
    assert "b gave 35 answers without label, which count as wrong" in printed
    changed = read_csv(tmp_path / "out" / "changed.csv")
    assert [row["id"] for row in changed] == [rows[index]["id"] for index in lost]
    assert {row["prediction_second"] for row in changed} == {""}
    assert {row["right"] for row in changed} == {"first"}
    # The accuracy in the table is over all posts, like the difference.
    right = sum(row["prediction"] == row["label"] for row in rows)
    accuracies = [100 * right / 300, 100 * (right - 30) / 300]
    for name, accuracy in zip("ab", accuracies, strict=True):
        assert re.search(rf"(?m)^  {name}   .* % \[[^]]+\]  {accuracy:.1f} % ", printed)


def test_changed_posts_hold_labels_and_scores_but_no_text(
    compare: ModuleType, tmp_path: Path
) -> None:
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [row | {"text": "canary"} for row in answers(seed)])
        for name, seed in (("a", 1), ("b", 2))
    ]
    found = run(compare, tmp_path, *files)
    changed = read_csv(tmp_path / "out" / "changed.csv")
    assert len(changed) == found["metrics"]["comparisons"][0]["changed"] > 0
    rows = {row["id"]: row for row in answers(1)}, {row["id"]: row for row in answers(2)}
    for row in changed:
        a, b = (some[row["id"]] for some in rows)
        assert (row["label"], row["target_groups"]) == (a["label"], a["target_groups"])
        assert (row["prediction_first"], row["prediction_second"]) == (
            a["prediction"],
            b["prediction"],
        )
        assert float(row["p_hate_first"]) == a["p_hate"]
        assert float(row["p_hate_second"]) == b["p_hate"]
        assert row["right"] == ("first" if a["prediction"] == a["label"] else "second")
    for file in (tmp_path / "out").iterdir():
        assert "canary" not in file.read_text(encoding="utf-8"), file


# --- words -----------------------------------------------------------------------------------


def test_a_planted_difference_is_named_and_nothing_else(
    compare: ModuleType, tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    found = run(compare, tmp_path, *pair[::-1])
    [verdict] = found["verdicts"]
    groups = {(one["place"], one["figure"]) for one in verdict["claims"]}
    assert ("mexican", "false_negative_rate") in groups
    assert not {place for place, _ in groups} - {"overall", "mexican"}
    assert {one["favours"] for one in verdict["claims"]} == {"a"}
    assert re.fullmatch(
        r"These two checkpoints differ: a makes (fewer .*)?fewer false negatives on mexican posts "
        r"\(rate lower by \d+\.\d points \[\d+\.\d, \d+\.\d\]\) than b; nothing else that was "
        r"tested passes Holm's correction\.",
        verdict["words"],
    )
    printed = capsys.readouterr().out
    page = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    for text in (printed, page):
        assert "is better" not in text and "decides better" not in text
        assert not re.search(r"\bbetter *(\||$)", text, re.MULTILINE)
        assert "All other differences have an interval and no test" in text
        assert "no evidence of change elsewhere" not in text
    assert verdict["words"] in printed
    assert "to call a recipe better, train each with several seeds" in printed
    assert "better recipe" not in printed


def test_error_rates_of_all_posts_are_tested_and_claimed(
    compare: ModuleType, tmp_path: Path
) -> None:
    """One run flags 40 normal posts more and misses 40 hateful ones fewer: accuracy is equal."""
    rows = [{**row, "prediction": row["label"], "p_hate": ""} for row in answers(1)]
    other = [{**row} for row in rows]
    for some, label, said in ((rows, "hate", "normal"), (other, "normal", "hate")):
        for row in [row for row in some if row["label"] == label][:40]:
            row["prediction"] = said
    files = [write_csv(tmp_path / f"{n}.csv", some) for n, some in (("a", rows), ("b", other))]
    found = run(compare, tmp_path, *files)
    [one], [verdict] = found["metrics"]["comparisons"], found["verdicts"]
    tested = [
        figure
        for figures in (one["overall"], *one["groups"].values())
        for key, figure in figures.items()
        if "p" in figure and key != "accuracy"
    ]
    for rate in ("false_positive_rate", "false_negative_rate"):
        figure = one["overall"][rate]
        assert figure["p"] == pytest.approx(binomtest(0, 40).pvalue)
        assert figure["p_holm_pairs"] == pytest.approx(len(tested) * figure["p"])
    assert one["overall"]["accuracy"]["p"] == 1
    claims = {(one["favours"], one["figure"]) for one in verdict["claims"]
              if one["place"] == "overall"}  # fmt: skip
    assert claims == {("a", "false_positive_rate"), ("b", "false_negative_rate")}
    assert "a makes fewer false positives on all posts (rate lower by " in verdict["words"]
    assert "b makes fewer false negatives on all posts (rate lower by " in verdict["words"]


def test_few_posts_of_a_label_are_not_tested_over_all_posts_either(
    compare: ModuleType, tmp_path: Path
) -> None:
    files = []
    for seed in (1, 2):
        rows = answers(seed)
        hateful = [row for row in rows if row["label"] == "hate"][:19]
        kept = [row for row in rows if row["label"] == "normal"] + hateful
        files.append(write_csv(tmp_path / f"{seed}.csv", kept))
    [one] = run(compare, tmp_path, *files)["metrics"]["comparisons"]
    assert "p" in one["overall"]["false_positive_rate"]
    assert "p" not in one["overall"]["false_negative_rate"]


def test_what_chance_explains_is_not_claimed(compare: ModuleType, tmp_path: Path) -> None:
    files = [write_csv(tmp_path / f"{seed}.csv", answers(seed)) for seed in (1, 2)]
    [verdict] = run(compare, tmp_path, *files)["verdicts"]
    assert verdict["claims"] == []
    assert re.match(
        r"No difference of 1 and 2 that was tested passes Holm's correction "
        r"\(accuracy of [12] higher by [\d.]+ points \[-?[\d.]+, "
        r"[\d.]+\], p = [\d.]+\)\.$",
        verdict["words"],
    )


def test_a_run_against_itself_does_not_differ(compare: ModuleType, tmp_path: Path) -> None:
    files = [write_csv(tmp_path / f"{name}.csv", answers(1)) for name in "ab"]
    found = run(compare, tmp_path, *files)
    assert found["verdicts"][0]["words"] == (
        "No difference of a and b that was tested passes Holm's correction."
    )
    assert read_csv(tmp_path / "out" / "changed.csv") == []


def figure(value: float, low: float | None, high: float | None, **more: Any) -> dict[str, Any]:
    return {"value": value, "n": 100, "low": low, "high": high, "reason": None, **more}


@pytest.mark.parametrize(
    ("key", "one", "claim"),
    [
        ("accuracy", figure(0.06, 0.01, 0.11, p=0.01), ("A", 6, 1, 11)),
        ("accuracy", figure(-0.06, -0.11, -0.01, p=0.01), ("B", 6, 1, 11)),
        ("false_negative_rate", figure(0.06, 0.01, 0.11, p=0.01), ("B", 6, 1, 11)),
        ("false_negative_rate", figure(-0.06, -0.11, -0.01, p=0.01), ("A", 6, 1, 11)),
        ("false_positive_rate", figure(0.06, 0.01, 0.11, p=0.01), ("B", 6, 1, 11)),
        ("brier", figure(-0.06, -0.11, -0.01, p=0.01), ("A", 6, 1, 11)),
        ("accuracy", figure(0.06, -0.01, 0.11, p=0.01), None),
        ("accuracy", figure(0.06, 0.01, 0.11, p=0.05), None),
        ("accuracy", figure(0.06, None, None, p=0.01), None),
        ("f1", figure(0.06, 0.01, 0.11), None),
    ],
)
def test_a_claim_needs_a_p_value_and_an_interval_without_zero(
    compare: ModuleType, key: str, one: dict[str, Any], claim: tuple | None
) -> None:
    found = compare.find_claims(
        {"first": "A", "second": "B", "overall": {key: one}, "groups": {}}, "p"
    )
    if claim is None:
        assert found == []
    else:
        [found] = found
        values = [found[name] for name in ("points", "low", "high")]
        assert found["favours"] == claim[0] and values == pytest.approx(claim[1:])


def test_a_verdict_is_corrected_for_all_pairs(compare: ModuleType) -> None:
    def comparison(p: float) -> dict[str, Any]:
        rates = {"false_positive_rate": figure(0, -0.1, 0.1, p=1.0)}
        rates["false_negative_rate"] = figure(-0.1, -0.2, -0.01, p=p)
        one = {"first": "A", "second": "B", "n": 300, "changed": 30, "groups": {"mexican": rates}}
        return one | {"overall": {"accuracy": figure(0.06, 0.01, 0.11, p=p)}}

    alone = [comparison(0.02)]
    compare.correct_over_pairs(alone)
    assert [one["place"] for one in compare.describe_pair(alone[0], {}, [])["claims"]] == [
        "overall",
        "mexican",
    ]
    three = [comparison(0.02), comparison(1.0), comparison(1.0)]
    compare.correct_over_pairs(three)
    words = compare.describe_pair(three[0], {}, [])["words"]
    assert words == (
        "No difference of A and B that was tested passes Holm's correction (accuracy of A higher "
        "by 6.0 points [1.0, 11.0], p = 0.060)."
    )


def test_rates_of_few_posts_are_called_insufficient(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = []
    for seed in (1, 2):
        rows = answers(seed)
        for row in rows[:12]:
            row["target_groups"] = "women"
        files.append(write_csv(tmp_path / f"{seed}.csv", rows))
    found = run(compare, tmp_path, *files)
    few = [(one["group"], one["figure"]) for one in found["verdicts"][0]["insufficient"]]
    assert few.count(("women", "false_positive_rate")) == 1
    hateful = sum(row["label"] == "hate" for row in answers(1)[:12])
    printed = capsys.readouterr().out
    assert f"women false negative rate (n = {hateful})" in printed
    assert f"insufficient (n = {hateful})" in printed
    assert re.search(r"(?m)^  1 .* few, few", printed)
    missed = found["metrics"]["comparisons"][0]["groups"]["women"]["false_negative_rate"]
    assert "p" not in missed


# --- where runs come from --------------------------------------------------------------------


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def adapter(
    folder: Path,
    rows: list[dict[str, Any]],
    seed: int = 42,
    lora_r: int = 32,
    evaluations: tuple[str, ...] = ("test",),
    data: str = "d" * 40,
    spent: float = 0.0,
    **settings: Any,
) -> Path:
    """A folder as train.py and eval.py leave it, without weights."""
    training = {
        "state": "finished",
        "step": 100 + seed,
        "precision": "bfloat16",
        "world_size": 1,
        "run_sha256": f"{folder.name}",
        "relay": {"hops": 0, "spent_usd": spent, "pending": False},
    }
    arguments = {"lora_r": lora_r, "seed": seed, "hub_model_id": f"alice/{folder.name}"}
    arguments |= {"run_name": folder.name, "dataset_repo": "alice/data", "trainer_fields": {}}
    dataset = {"repo": "alice/data", "kind": "dataset", "revision": data}
    shared = {"schema": 1, "labels": ["normal", "hate"], "positive_label": "hate"}
    shared |= {"groups": [*GROUPS], "dataset": dataset, "training": training}
    base = {"repo": "alice/base", "kind": "model", "revision": "b" * 40}
    write_json(
        folder / "contract.json",
        shared
        | {"stage": "adapter", "task": "causal", "base_model": base, "arguments": arguments}
        | {"prompt": {"name": "simple"}},
    )
    for name in evaluations:
        place = folder / "eval" / name
        record = {"stage": "evaluation", "name": name, "split": "test", "test_file": None}
        record |= {"adapter": {"repo": folder.name, "kind": "model", "revision": None}}
        record |= {"base_only": False, "arguments": {"mode": "score", "threshold": 0.5, **settings}}
        write_json(place / "contract.json", shared | record)
        write_csv(place / "predictions.csv", rows)
    return folder


def test_runs_come_from_the_hub_from_folders_and_from_files(
    compare: ModuleType, alice: Hub, tmp_path: Path
) -> None:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=alice.endpoint, token=alice.token)
    local = adapter(tmp_path / "local", answers(1), seed=1)
    pushed = adapter(tmp_path / "cmp-lora", answers(2), seed=2, evaluations=("test", "other"))
    api.create_repo("alice/cmp-lora", private=True)
    first = api.upload_folder(repo_id="alice/cmp-lora", folder_path=pushed).oid
    write_csv(pushed / "eval" / "test" / "predictions.csv", answers(3))
    api.upload_folder(repo_id="alice/cmp-lora", folder_path=pushed)
    file = write_jsonl(tmp_path / "file.jsonl", answers(4))
    runs = ["alice/cmp-lora", "alice/cmp-lora/other", f"alice/cmp-lora@{first}"]
    runs += [local, local / "eval" / "test", file]
    found = run(compare, tmp_path, *runs)
    assert [one["argument"] for one in found["runs"]] == [*map(str, runs)]
    assert len({one["name"] for one in found["runs"]}) == len(runs)
    by_argument = {one["argument"]: one for one in found["runs"]}
    assert by_argument["alice/cmp-lora"]["adapter"]["repo"] == "alice/cmp-lora"
    assert by_argument[f"alice/cmp-lora@{first}"]["adapter"]["revision"] == first
    assert by_argument[str(local)]["changed_arguments"] == {"seed": 1}
    assert by_argument[str(file)]["changed_arguments"] is None
    right = {name: sum(row["prediction"] == row["label"] for row in answers(name)) / 300
             for name in range(1, 5)}  # fmt: skip
    values = [one["overall"]["accuracy"]["value"] for one in found["metrics"]["strategies"]]
    assert values == pytest.approx([right[seed] for seed in (3, 2, 2, 1, 1, 4)])


def test_other_data_and_settings_are_said(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    a = adapter(tmp_path / "a", answers(1))
    b = adapter(tmp_path / "b", answers(2), data="e" * 40, threshold=0.4)
    notes = " ".join(run(compare, tmp_path, a, b)["notes"])
    assert "differ in dataset: alice/data@dddddddd (" in notes and "@eeeeeeee (" in notes
    assert "differ in threshold: 0.5 (" in notes
    file = write_csv(tmp_path / "c.csv", answers(3))
    notes = " ".join(run(compare, tmp_path, a, file)["notes"])
    assert "Without contract.json, so of unknown posts and settings: c." in notes


def test_the_table_says_arguments_dollars_and_how_often_posts_were_read(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    a = adapter(tmp_path / "a", answers(1), evaluations=("test", "test-threshold0.4"), spent=1.5)
    b = adapter(tmp_path / "b", answers(2), lora_r=64)
    other = json.loads((a / "eval" / "test" / "contract.json").read_text())
    write_json(a / "eval" / "val" / "contract.json", other | {"split": "validation"})
    found = run(compare, tmp_path, a, b)
    rows = found["runs"]
    assert [row["changed_arguments"] for row in rows] == [{"lora_r": 32}, {"lora_r": 64}]
    assert [row["test_reads"] for row in rows] == [2, 1]
    assert [row["dollars_at_least"] for row in rows] == [1.5, None]
    printed = capsys.readouterr().out
    assert "at least 1.50" in printed and "not recorded" in printed and "lora_r 64" in printed
    assert "Dollars are recorded where a training pauses; its last start is not in." in printed
    words = "were evaluated at least 3 times (2 by the adapter of a, 1 by the adapter of b)"
    assert words in printed
    notes = " ".join(run(compare, tmp_path, a, a / "eval" / "test-threshold0.4")["notes"])
    assert "These posts were evaluated at least 2 times (2 by the adapter of " in notes


def test_dollars_that_no_run_recorded_are_said_to_be_missing(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folders = [adapter(tmp_path / name, answers(n)) for n, name in enumerate("ab")]
    assert [row["dollars_at_least"] for row in run(compare, tmp_path, *folders)["runs"]] == [
        None
    ] * 2
    printed = capsys.readouterr().out
    assert "Not recorded of any run: dollars." in printed and "at least 0" not in printed
    files = [write_csv(tmp_path / f"{n}.csv", answers(n)) for n in (1, 2)]
    run(compare, tmp_path, *files)
    missing = "dollars, recorded evaluations of these posts, arguments that differ"
    assert f"Not recorded of any run: {missing}." in capsys.readouterr().out


def test_evaluations_of_the_same_name_are_counted_by_their_commits(
    compare: ModuleType, alice: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three evaluations overwrote each other, one of them of other data; another is gone."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=alice.endpoint, token=alice.token)
    repo = {"repo_id": "alice/read-lora"}
    api.create_repo(**repo, private=True)

    def push(seed: int, message: str, data: str = "d" * 40, name: str = "test") -> str:
        made = adapter(tmp_path / f"{seed}" / "lora", answers(seed), data=data, evaluations=(name,))
        file = made / "eval" / name / "contract.json"
        record = json.loads(file.read_text())
        record["training"]["run_sha256"] = "one"
        write_json(file, record | {"created": f"2026-11-25T10:00:{seed:02}"})
        contract = json.loads((made / "contract.json").read_text())
        contract["training"]["run_sha256"] = "one"
        write_json(made / "contract.json", contract)
        return api.upload_folder(**repo, folder_path=made, commit_message=message).oid

    first = push(1, "Evaluate: test")
    push(2, "Evaluate: test", data="e" * 40)
    push(3, "Evaluate: test-gone", name="test-gone")
    api.delete_folder("eval/test-gone", **repo, commit_message="Clean up")
    push(4, "Evaluate: test")
    push(5, "Evaluate: ../test")
    push(4, "Evaluate: test")
    asked: list[str] = []
    listing = HfApi.list_repo_commits

    def count(self: HfApi, name: str, **options: Any) -> Any:
        asked.append(name)
        return listing(self, name, **options)

    monkeypatch.setattr(HfApi, "list_repo_commits", count)
    file = write_csv(tmp_path / "c.csv", answers(7))
    argv = ("alice/read-lora", f"alice/read-lora@{first}", file)
    found = run(compare, tmp_path, *argv)
    assert [row["test_reads"] for row in found["runs"]] == [3, 3, None]
    assert asked == ["alice/read-lora"]
    assert "evaluated at least 3 times (3 by the adapter of " in " ".join(found["notes"])


def test_one_evaluation_each_is_no_warning(compare: ModuleType, tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"{n}", answers(n), lora_r=2**n) for n in (1, 2)]
    notes = " ".join(run(compare, tmp_path, *folders)["notes"])
    assert "evaluated" not in notes


def test_arguments_of_a_later_training_are_not_taken_for_these(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folders = [adapter(tmp_path / f"{n}", answers(n)) for n in (1, 2)]
    contract = json.loads((folders[0] / "contract.json").read_text())
    contract["training"]["run_sha256"] = "another"
    write_json(folders[0] / "contract.json", contract)
    rows = run(compare, tmp_path, *folders)["runs"]
    assert [row["changed_arguments"] is None for row in rows] == [True, False]
    assert "was trained anew after" in capsys.readouterr().out


# --- recipes ---------------------------------------------------------------------------------


def seeds_of(folder: Path, name: str, skill: float, lora_r: int, seeds: range) -> list[Path]:
    return [
        adapter(folder / f"{name}{seed}", answers(100 * lora_r + seed, skill), seed, lora_r)
        for seed in seeds
    ]


def test_runs_that_differ_in_their_seed_are_one_recipe(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good = seeds_of(tmp_path, "good", 0.85, 64, range(3))
    bad = seeds_of(tmp_path, "bad", 0.6, 32, range(3))
    found = run(compare, tmp_path, *good, *bad)
    assert [one["seeds"] for one in found["recipes"]] == [[0, 1, 2], [0, 1, 2]]
    assert [one["arguments"] for one in found["recipes"]] == [{"lora_r": 64}, {"lora_r": 32}]
    values = [
        [strategy["overall"]["f1_hate"]["value"] for strategy in some]
        for some in (found["metrics"]["strategies"][:3], found["metrics"]["strategies"][3:])
    ]
    for one, expected in zip(found["recipes"], values, strict=True):
        figure = one["figures"]["overall"]["f1"]
        assert figure["mean"] == pytest.approx(statistics.mean(expected))
        assert figure["sd"] == pytest.approx(statistics.stdev(expected))
    [between] = found["recipe_comparisons"]
    test = ttest_ind(*values, equal_var=False)
    f1 = between["overall"]["f1"]
    assert f1["p"] == pytest.approx(test.pvalue)
    assert (f1["low"], f1["high"]) == pytest.approx(tuple(test.confidence_interval()))
    assert between["words"].startswith("Recipe 1 is better than recipe 2 on overall F1 by ")
    printed = capsys.readouterr().out
    assert "(3 and 3 seeds)" in printed and "F1, mean (sd)" in printed
    words = [one["words"] for one in found["verdicts"]]
    assert all("Both are seeds of one recipe:" in one for one in words[:2])
    assert not any("seeds of one recipe" in one for one in words[2:])


def test_a_recipe_of_one_seed_is_never_called_better(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good = seeds_of(tmp_path, "good", 0.85, 64, range(3))
    bad = seeds_of(tmp_path, "bad", 0.6, 32, range(1))
    found = run(compare, tmp_path, *bad, *good)
    assert len(found["recipes"]) == 1 and found["recipe_comparisons"] == []
    printed = capsys.readouterr().out
    assert "These two checkpoints differ: " in printed
    assert not re.search(r"(?i)recipe \d is better", printed)


def test_the_same_seed_twice_is_one_seed(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folders = [adapter(tmp_path / f"{n}", answers(n), seed=7) for n in (1, 2)]
    assert run(compare, tmp_path, *folders)["recipes"] == []
    assert "has the seed of" in capsys.readouterr().out


def test_files_are_pooled_when_they_are_said_to_be_seeds(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = {
        name: [write_csv(tmp_path / f"{name}{n}.csv", answers(50 + n, skill)) for n in range(2)]
        for name, skill in (("x", 0.8), ("y", 0.8))
    }
    pools = [word for some in files.values() for word in ("--pool", ",".join(map(str, some)))]
    found = run(compare, tmp_path, *pools)
    assert [one["runs"] for one in found["recipes"]] == [["x0", "x1"], ["y0", "y1"]]
    [between] = found["recipe_comparisons"]
    assert between["words"] == (
        "No difference of recipe 1 and recipe 2 that was tested passes Holm's correction (2 and 2 "
        "seeds)."
    )
    assert between["overall"]["f1"]["value"] == 0


def test_recipes_without_any_spread_have_no_interval(compare: ModuleType) -> None:
    assert compare.welch([0.5, 0.5], [0.4, 0.4])["p"] is None
    one = compare.welch([0.5, 0.5], [0.4, 0.41])
    assert one["low"] < one["value"] < one["high"]


# --- requirements ----------------------------------------------------------------------------


def test_a_second_word_of_require_is_no_run(
    compare: ModuleType, tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    for word in ("lgbtq.fpr<=0.4", "f1>0.6", "f1=0.6", "x.csv=1"):
        message = refusal(compare, capsys, *pair, "--require", "f1>=0", word)
        assert f"{word!r} is no run" in message and "write --require before each" in message
        assert "is no run" in refusal(compare, capsys, "--pool", f"{pair[0]},{word}", *pair)
    (tmp_path / "lr=1").mkdir()
    odd = write_csv(tmp_path / "lr=1" / "a.csv", answers(1))
    assert compare.parse_args([str(pair[0]), str(odd)]).runs == [str(pair[0]), str(odd)]


def test_a_gap_without_a_group_is_no_strict_proof(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = []
    for seed in (1, 2):
        rows = answers(seed)
        for row in rows[:12]:
            row["target_groups"] = "women"
        files.append(write_csv(tmp_path / f"{seed}.csv", rows))
    argv = (*map(str, files), "--require", "gap.fpr<=1", "--output_dir", str(tmp_path / "out"))
    compare.main([*argv])
    assert "women" in result_in(tmp_path / "out")["requirements"][0]["reason"]
    assert re.search(r"gap\.fpr<=1 .*without women", capsys.readouterr().out)
    with pytest.raises(SystemExit) as end:
        compare.main([*argv, "--strict"])
    assert end.value.code == 3


def test_requirements_that_hold_change_nothing(
    compare: ModuleType, tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    wanted = ["f1>=0.5", "vs_1.mexican.fnr<0", "vs_b.accuracy > -0.5", "gap.fpr<=1"]
    argv = [word for text in wanted for word in ("--require", text)]
    found = run(compare, tmp_path, *argv, *pair, "--strict", "true")
    assert [one["holds"] for one in found["requirements"]] == [True] * 4
    assert "Requirements on a" in capsys.readouterr().out


def test_a_requirement_that_fails_ends_with_3_and_a_table(
    compare: ModuleType, tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    out = ("--output_dir", tmp_path / "out")
    with pytest.raises(SystemExit) as end:
        compare.main(
            [*map(str, pair), "--require", "f1>=0.99", "--require", "fpr<=1", *map(str, out)]
        )
    assert end.value.code == 3
    printed = capsys.readouterr()
    assert "1 of 2 requirements fail" in printed.err
    assert re.search(r"f1>=0.99 +0\.\d{4} +\[0\.\d{4}, 0\.\d{4}\] +300 +FAILS", printed.out)
    assert re.search(r"fpr<=1 +0\.\d{4} .* holds", printed.out)
    assert [one["holds"] for one in result_in(tmp_path / "out")["requirements"]] == [False, True]


def test_strict_tests_the_bad_end_of_the_interval(compare: ModuleType) -> None:
    metrics = made_metrics()
    for text, plain, strict in (
        ("f1>=0.6", True, False),
        ("f1>=0.5", True, True),
        ("f1<=0.6", True, False),
        ("f1<0.71", True, True),
        ("lgbtq.fpr<=0.4", True, False),
        ("gap.fpr<=0.3", True, False),
        ("vs_base.f1>=0", True, False),
        ("brier<=0.2", True, False),
        ("auc>=0", False, False),
        ("women.fpr<=1", False, False),
        ("overall.fpr<0.11", True, True),
        ("ratio.fpr>=0.5", True, False),
    ):
        for flag, expected in ((False, plain), (True, strict)):
            [verdict] = compare.judge(metrics, [text], flag)
            assert verdict["holds"] is expected, (text, flag, verdict)
    [verdict] = compare.judge(metrics, ["brier<=0.2"], True)
    assert verdict["reason"] == "no interval"
    [verdict] = compare.judge(metrics, ["women.fpr<=1"], False)
    assert verdict["reason"] == "insufficient: 5 posts, and 20 are needed"
    [verdict] = compare.judge(metrics, ["auc>=0"], False)
    assert verdict["reason"] == "no hate posts"


def made_metrics() -> dict[str, Any]:
    """The parts of metrics.json that requirements are about."""
    undefined = {"value": None, "n": 0, "low": None, "high": None, "reason": "no hate posts"}
    gap = {"max_min": figure(0.4 - 0.1, 0.1, 0.5), "min_max_ratio": figure(0.5, 0.2, 0.9)}
    gap["left_out"] = []
    overall = {"n": 300, "labels": {"hate": 1}, "f1_hate": figure(0.6, 0.5, 0.7)}
    overall |= {"false_positive_rate": figure(0.1, 0.09, 0.105), "roc_auc": undefined}
    overall |= {"brier": figure(0.2, None, None)}
    groups = {"lgbtq": {"false_positive_rate": figure(0.4, 0.3, 0.5)}}
    groups["women"] = {"false_positive_rate": figure(0, 0, 0.4) | {"n": 5}}
    bias = {"gaps": {"false_positive_rate": gap}, "power_means": {}}
    model = {"name": "m", "overall": overall, "groups": groups, "bias": bias}
    second = {"first": "m", "second": "base_model", "groups": {}}
    second |= {"overall": {"f1": figure(0.02, -0.01, 0.05)}}
    return {"positive_label": "hate", "strategies": [model], "comparisons": [second]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f1", "is no requirement"),
        ("f1=0.6", "is no requirement"),
        ("f1>=sixty", "is no requirement"),
        ("f1>=nan", "is no requirement"),
        (">=0.6", "is no requirement"),
        ("f2>=0.6", "there is no figure 'f2'. There are: f1_hate, "),
        ("nobody.fpr<=1", "there is no group 'nobody'. There are: lgbtq, women"),
        ("vs_tfidf.f1>=0", "no such comparison. There are: vs_1, vs_base_model, vs_base"),
        ("vs_1.gap.fpr<=1", "there is no group 'gap'"),
        ("labels.hate>=0", "there is no group 'labels'"),
    ],
)
def test_a_requirement_that_means_nothing_is_an_error(
    compare: ModuleType, capsys: pytest.CaptureFixture, text: str, message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        compare.judge(made_metrics(), [text], False)
    assert end.value.code == 2 and message in capsys.readouterr().err


# --- arguments and output --------------------------------------------------------------------


def test_runs_may_stand_before_between_and_after_flags(compare: ModuleType) -> None:
    for words in (
        "a.csv b.csv --strict --seed 1 --require f1>=0",
        "--strict a.csv --seed=1 b.csv --require f1>=0",
        "--require f1>=0 --strict true --seed 1 a.csv b.csv",
        "--require f1>=0 a.csv --strict b.csv --seed 1",
    ):
        args = compare.parse_args(words.split())
        assert args.runs == ["a.csv", "b.csv"] and args.strict is True
        assert args.seed == 1 and args.require == ["f1>=0"]


def test_settings_come_from_a_file_and_the_environment(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("require: ['f1>=0.1', 'lgbtq.fpr<=0.9']\nseed: 3\nlabel_map: {'1': hate}\n")
    monkeypatch.setenv("HSD_SEED", "4")
    args = compare.parse_args(["a.csv", "b.csv", "--config_file", str(file)])
    assert args.require == ["f1>=0.1", "lgbtq.fpr<=0.9"] and args.seed == 4
    assert args.label_map == {"1": "hate"}


def test_bad_inputs_end_with_one_clear_message(
    compare: ModuleType, tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    a, b = pair
    empty = tmp_path / "empty.csv"
    empty.write_text("id,label,prediction\n")
    odd = write_csv(tmp_path / "odd.csv", [{"id": 1, "gold": "hate", "prediction": "hate"}])
    folder = adapter(tmp_path / "lora", answers(1))
    for argv, message in (
        ([], "name the runs to compare"),
        ([a], "there is one run only, a."),
        ([a, a], "is named twice"),
        ([a, tmp_path / "none.csv"], "none.csv does not exist"),
        ([a, empty], "empty.csv holds no rows"),
        ([a, odd], "has no column for the true label"),
        ([a, folder, "--eval_name", "val"], "holds no evaluation 'val'. There are: test"),
        ([a, b, "--require", "f1"], "is no requirement"),
        ([a, b, "--require", "vs_2.f1>=0"], "There are: vs_1, vs_b"),
        ([a, b, "--pool", "x.csv"], "--pool takes two or more runs"),
        ([a, b, "--labels", "normal,spam"], "--positive_label hate and another label must be"),
        ([a, b, "--label_map", "{"], "is not JSON"),
        ([a, b, "--threshold", "2"], "is no probability"),
        ([a, b, "--strict"], "--strict makes --require stricter; there is none."),
        ([a, b, "--ouput_dir", "x"], "Did you mean --output_dir?"),
        ([a, b, "--id_column", "nr"], "has no column 'nr'"),
        ([a, b, "--output_dir", a / "x"], "cannot write to"),
    ):
        assert message in refusal(compare, capsys, *argv), argv


def test_a_repo_that_is_not_there_is_one_message(
    compare: ModuleType, alice: Hub, pair: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    assert "no such repo" in refusal(compare, capsys, pair[0], "alice/nothing-here")


def test_names_from_files_are_shown_but_never_obeyed(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    evil = "=HYPERLINK(1)|<script>![x](http://evil.example/)\u202e\x1b[31m"
    files = []
    for seed in (1, 2):
        rows = [row | {"id": f"=1+{row['id']}", "strategy": f"{evil}{seed}"}
                for row in answers(seed)]  # fmt: skip
        files.append(write_csv(tmp_path / f"{seed}.csv", rows))
    run(compare, tmp_path, *files)
    printed = capsys.readouterr().out
    page = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    for text in (printed, page):
        assert "\u202e" not in text and "\x1b" not in text
    assert "<script" not in page and "![" not in page and "http://" not in page
    for row in read_csv(tmp_path / "out" / "changed.csv"):
        assert not any(cell.startswith(("=", "+", "@")) for cell in row.values())


def test_the_written_page_says_what_is_printed(
    compare: ModuleType, tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    found = run(compare, tmp_path, *pair)
    page = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert page.startswith("# Comparison of runs\n\n## Verdict\n")
    assert compare.markdown_cell(found["verdicts"][0]["words"]) in page
    assert "## What these figures do not say" in page
    assert found["stage"] == "comparison" and found["script"] == "eval/compare.py"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "changed.csv",
        "compare.json",
        "compare.md",
    ]


def test_help_and_a_comparison_are_fast(
    compare: ModuleType, tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    script = str(ROOT / "eval" / "compare.py")
    start = time.monotonic()
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "uv run eval/compare.py user/hsd-lora" in done.stdout
    assert "RUN RUN" in done.stdout and time.monotonic() - start < 5
