"""eval/eval.py's report: predictions alone, gates, slices, the model card, where it goes.

pytest tests/test_report.py
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
from hub import Hub
from test_eval import LABELS, PROMPT, adapter_contract, messages, read_csv, refusal, write
from tiny import load_script

CANARY = "xylocarpzebra"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    return load_script("eval/eval.py")


@pytest.fixture(autouse=True)
def plain(clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.fixture
def quick(evaluate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few resamples and no plots, where neither is looked at."""
    monkeypatch.setattr(evaluate, "RESAMPLES", 200)
    monkeypatch.setattr(evaluate, "build_plots", lambda metrics, sample: [])


def source_rows(n: int = 90, seed: int = 1) -> Rows:
    """Rows as the source project's strategy_unified_results_*.csv has them: three strategies one
    after the other, no ids, answers that could not be read, texts that come twice."""
    rows = []
    for strategy in ("policy", "persona", "combined"):
        made, own = random.Random(seed), random.Random(strategy)
        for number in range(n):
            label = "hate" if made.random() < 0.45 else "normal"
            group = made.choice(["lgbtq", "mexican", "middle_east"])
            answer = label if own.random() < 0.75 else "hate"
            answer = "unknown" if own.random() < 0.08 else answer
            rows.append(
                {
                    "strategy": strategy,
                    "input_text": f"post {number - number % 2}",
                    "true_label": label,
                    "predicted_label": answer,
                    "persona_tag": f"tag {group}",
                    "target_group_norm": group,
                    "rationale": "because, so",
                }
            )
    return rows


def scored_rows(n: int = 120, seed: int = 2) -> Rows:
    """Rows with ids, scores and several groups."""
    made, rows = random.Random(seed), []
    for number in range(n):
        label = made.choice(LABELS)
        p = min(1.0, max(0.0, made.gauss(0.65 if label == "hate" else 0.35, 0.25)))
        groups = made.sample(["lgbtq", "mexican", "middle_east"], made.choice([0, 1, 1, 2]))
        rows.append(
            {"id": f"p{number}", "text": f"text {number}", "label": label, "p_hate": round(p, 4)}
            | {"target_groups": groups, "dialect": made.choice("ab")}
        )
    return rows


def save(folder: Path, rows: Rows, kind: str = "csv", name: str = "rows") -> Path:
    """Rows as a CSV, JSONL or parquet file; lists are parted by `|` in CSV."""
    file = folder / f"{name}.{kind}"
    if kind == "jsonl":
        return tiny.write_jsonl(file, rows)
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), file)
        return file
    flat = [
        {key: "|".join(v) if isinstance(v, list) else v for key, v in row.items()} for row in rows
    ]
    return tiny.write_csv(file, flat)


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} in JSON")


def report(evaluate: ModuleType, folder: Path, file: Path, *argv: Any) -> dict[str, Any]:
    """Run --predictions and return metrics.json, read strictly."""
    words = ["--predictions", file, "--output_dir", folder, *argv]
    evaluate.main([str(word) for word in words])
    return read_metrics(folder)


def read_metrics(folder: Path) -> dict[str, Any]:
    text = (folder / "metrics.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=no_constant)


def rates(rows: Rows, truth: str, answer: str) -> dict[str, float | None]:
    """Counted by hand over the rows whose answer is a label."""
    kinds = Counter((row[truth], row[answer]) for row in rows if row[answer] in LABELS)
    tp, fp = kinds["hate", "hate"], kinds["normal", "hate"]
    fn, tn = kinds["hate", "normal"], kinds["normal", "normal"]

    def part(some: int, whole: int) -> float | None:
        return some / whole if whole else None

    return {
        "accuracy": part(tp + tn, tp + tn + fp + fn),
        "precision": part(tp, tp + fp),
        "recall": part(tp, tp + fn),
        "f1_score": part(2 * tp, 2 * tp + fp + fn),
        "false_positive_rate": part(fp, fp + tn),
        "false_negative_rate": part(fn, fn + tp),
        "true_positive": tp,
        "true_negative": tn,
        "false_positive": fp,
        "false_negative": fn,
    }


def check_row(row: dict[str, str], expected: dict[str, float | None]) -> None:
    for key, value in expected.items():
        if key in row:
            assert (float(row[key]) if row[key] else None) == pytest.approx(value, abs=1e-12)


# --- predictions alone -----------------------------------------------------------------------


def test_the_source_projects_file_is_read_as_it_is(
    evaluate: ModuleType, quick: None, tmp_path: Path
) -> None:
    rows = source_rows()
    metrics = report(evaluate, tmp_path / "out", save(tmp_path, rows))
    names = ["policy", "persona", "combined"]
    performance = read_csv(tmp_path / "out" / "performance_metrics.csv")
    always = ["always_hate", "always_normal", "tfidf_lr"]
    assert [row["strategy"] for row in performance] == names + always
    bias = read_csv(tmp_path / "out" / "bias_metrics.csv")
    for name, row in zip(names, performance, strict=False):
        own = [one for one in rows if one["strategy"] == name]
        lost = sum(one["predicted_label"] == "unknown" for one in own)
        assert 0 < lost < 30
        check_row(row, rates(own, "true_label", "predicted_label"))
        assert int(row["n_total"]) == 90 and int(row["n_unparsed"]) == lost
        assert float(row["coverage"]) == pytest.approx(1 - lost / 90)
        for group in ("lgbtq", "mexican", "middle_east"):
            some = [one for one in own if one["target_group_norm"] == group]
            (found,) = [
                one for one in bias if (one["strategy"], one["persona_tag"]) == (name, group)
            ]
            check_row(found, rates(some, "true_label", "predicted_label"))
            lost = sum(one["predicted_label"] == "unknown" for one in some)
            assert int(found["n_total"]) == len(some) == int(found["sample_count"]) + lost
            assert float(found["coverage"]) == pytest.approx(1 - lost / len(some))
    # Nobody is aimed at none: empty cells and no zeros.
    (empty,) = [one for one in bias if (one["strategy"], one["persona_tag"])
                == ("policy", "no_target")]  # fmt: skip
    assert empty["sample_count"] == "0" and empty["false_positive_rate"] == empty["coverage"] == ""
    posts = read_csv(tmp_path / "out" / "predictions.csv")
    assert [post["id"] for post in posts] == [str(number) for number in range(1, 91)]
    model = metrics["strategies"][0]
    own = rows[:90]
    for way, change in (
        ("as_errors", lambda row: "normal" if row["true_label"] == "hate" else "hate"),
        ("as_hate", lambda row: "hate"),
        ("as_normal", lambda row: "normal"),
    ):
        filled = [
            row | {"predicted_label": change(row)} if row["predicted_label"] == "unknown" else row
            for row in own
        ]
        expected = rates(filled, "true_label", "predicted_label")
        found = model["unparsed"][way]["overall"]
        for key in ("accuracy", "false_positive_rate", "false_negative_rate"):
            assert found[key]["value"] == pytest.approx(expected[key], abs=1e-12), way
    written = b"".join(file.read_bytes() for file in (tmp_path / "out").iterdir())
    assert b"post 2" not in written and b"because, so" not in written


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("target_groups", "target_group_norm", "persona_tag"), "first"),
        (("target_group_norm", "persona_tag"), "second"),
        (("persona_tag",), "third"),
    ],
)
def test_the_group_is_the_first_known_column(
    evaluate: ModuleType, columns: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    values = dict(zip(("persona_tag", "target_group_norm", "target_groups"),
                      ("third", "second", "first"), strict=True))  # fmt: skip
    rows = [{"label": "hate", "prediction": "hate"} | {name: values[name] for name in columns}]
    options = evaluate.reading_options(evaluate.parse_args(["--predictions", "x.csv"]))
    (run,) = evaluate.read_runs(str(save(tmp_path, rows)), "test", options)
    assert run.groups == [[expected]] and run.ids == ["1"]


def test_the_same_rows_give_the_same_metrics_in_every_format(
    evaluate: ModuleType, quick: None, tmp_path: Path
) -> None:
    rows = scored_rows()
    for number, row in enumerate(rows):
        row["text"] *= 1 + number % 20
        row |= {"level": number % 3, "share": number % 2 / 2, "label_multiclass": row["label"]}
        row["annotator_labels"] = [row["label"], LABELS[number % 2], row["label"]]
    found = []
    for kind in ("csv", "parquet", "jsonl"):
        file = save(tmp_path, rows, kind)
        report(evaluate, tmp_path / kind, file, "--slice_by", "level", "share", "dialect")
        found.append((tmp_path / kind / "metrics.json").read_bytes())
    assert found[0] == found[1] == found[2]
    metrics = read_metrics(tmp_path / "csv")
    assert {"level", "share", "dialect", "agreement", "length"} <= metrics["slices"].keys()
    assert set(metrics["slices"]["agreement"]) == {"unanimous", "2 of 3"}
    report(evaluate, tmp_path / "again", tmp_path / "rows.csv", "--slice_by", "level", "share",
           "dialect")  # fmt: skip
    assert (tmp_path / "again" / "metrics.json").read_bytes() == found[0]
    # An evaluation's own files are predictions like any other.
    for name in ("predictions.csv", "predictions.parquet"):
        again = report(evaluate, tmp_path / "own", tmp_path / "csv" / name)
        assert again["strategies"][0]["overall"] == metrics["strategies"][0]["overall"]
        assert again["slices"]["length"] == metrics["slices"]["length"]


def test_columns_and_labels_by_other_names(
    evaluate: ModuleType, quick: None, tmp_path: Path
) -> None:
    rows = scored_rows(40)
    names = {"id": "key", "text": "body", "p_hate": "points", "target_groups": "who"}
    gold = {"hate": "toxic", "normal": "0"}
    other = [{names[key]: row[key] for key in names} | {"gold": gold[row["label"]]} for row in rows]
    expected = report(evaluate, tmp_path / "a", save(tmp_path, rows))
    found = report(
        *(evaluate, tmp_path / "b", save(tmp_path, other, name="other")),
        *("--id_column", "key", "--text_column", "body", "--label_column", "gold"),
        *("--score_column", "points", "--group_column", "who"),
        *("--label_map", '{"toxic": "hate"}'),
    )
    first, second = (one["strategies"][0] for one in (expected, found))
    assert first["overall"] == second["overall"] and first["groups"] == second["groups"]
    found = report(
        *(evaluate, tmp_path / "c", save(tmp_path, rows)),
        *("--label_map", '{"hate": "bad", "normal": "fine"}', "--labels", "fine", "bad"),
        *("--score_column", "p_hate"),
    )
    assert found["positive_label"] == "bad" and found["strategies"][0]["overall"]["n"] == 40


def spoil(key: str, value: Any, row: int = 3) -> Callable[[Rows], Rows]:
    """Change one cell."""

    def change(rows: Rows) -> Rows:
        rows[row] = rows[row] | {key: value}
        return rows

    return change


@pytest.mark.parametrize(
    ("change", "argv", "words"),
    [
        (spoil("label", "hatred"), [], ["row 4", "hatred", "normal, hate", "--label_map"]),
        (spoil("label", ""), [], ["row 4", "true label"]),
        (spoil("p_hate", "1.5"), [], ["row 4", "1.5", "0 to 1"]),
        (spoil("p_hate", "nan"), [], ["row 4", "nan", "0 to 1"]),
        (spoil("p_hate", "high"), [], ["row 4", "high", "0 to 1"]),
        (lambda rows: [{"label": "hate"}], [], ["predicted label or score", "It has: label"]),
        (lambda rows: [{"id": "1", "p_hate": 1}], [], ["true label", "--label_column"]),
        (lambda rows: rows, ["--label_column", "gold"], ["no column 'gold'", "p_hate"]),
        (lambda rows: rows, ["--labels", "a", "b"], ["predicted label or score"]),
        (
            lambda rows: rows,
            ["--labels", "a", "b", "--score_column", "p_hate"],
            ["row 1", "a, b"],
        ),
        (lambda rows: rows, ["--labels", "a", "--positive_label", "b"], ["--labels a"]),
        (lambda rows: rows, ["--label_map", "{"], ["is not JSON"]),
        (lambda rows: rows, ["--label_map", "[1]"], ["no JSON object"]),
        (lambda rows: rows, ["--slice_by", "accent"], ["accent", "dialect"]),
        (lambda rows: rows, ["--adapter", "a/b"], ["--adapter needs a model"]),
        (lambda rows: rows, ["--evasion"], ["--evasion needs a model"]),
        (
            lambda rows: [row | {"prediction": "?"} for row in rows],
            [],
            ["no prediction is one of normal, hate"],
        ),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_gives_one_message(
    evaluate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture,
    change: Any, argv: list[str], words: list[str],
) -> None:  # fmt: skip
    file = save(tmp_path, change(scored_rows(20)))
    message = refusal(
        evaluate, capsys, "--predictions", file, "--output_dir", tmp_path / "o", *argv
    )
    assert all(word in message for word in words), message
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.csv", b"", "no rows"),
        ("header.csv", b"id,label,prediction\n", "no rows"),
        ("empty.jsonl", b"", "no rows"),
        ("broken.parquet", b"PAR1 and no more", "no parquet file"),
        ("empty.parquet", b"", "no parquet file"),
        ("latin.csv", "label,prediction\nhate,caf\xe9".encode("latin-1"), "not UTF-8"),
        ("broken.jsonl", b'{"label": "hate"\n', "line 1 is not JSON"),
        ("list.jsonl", b"[1, 2]\n", "every line is to be an object"),
        ("broken.csv", b'label,prediction\n"hate,hate\n', "no CSV file"),
        ("half.jsonl", b'{"label": "hate", "prediction": "hate", "text": "\\ud800"}\n', "Unicode"),
        ("half2.jsonl", b'{"label": "hate", "prediction": "hate", "id": "\\ud800"}\n', "Unicode"),
    ],
)
def test_a_damaged_file_gives_one_message(
    evaluate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture,
    name: str, content: bytes, words: str,
) -> None:  # fmt: skip
    (tmp_path / name).write_bytes(content)
    argv = ["--predictions", tmp_path / name, "--output_dir", tmp_path / "out"]
    assert words in refusal(evaluate, capsys, *argv)
    missing = ["--predictions", tmp_path / f"no-{name}", "--output_dir", tmp_path / "out"]
    refusal(evaluate, capsys, *missing)


@pytest.mark.parametrize("kind", ["one", "alike", "unlabelled"])
def test_the_smallest_files_give_a_report(evaluate: ModuleType, tmp_path: Path, kind: str) -> None:
    rows = scored_rows(1)
    if kind == "alike":
        rows = [row | {"label": "normal", "p_hate": 0.1} for row in scored_rows(3)]
    elif kind == "unlabelled":
        rows = [{"label": "hate", "prediction": word} for word in ("hate", "unknown", "unknown")]
    metrics = report(evaluate, tmp_path / "out", save(tmp_path, rows), "--prevalence", "0.1")
    figures = metrics["strategies"][0]["overall"]
    assert figures["roc_auc"]["value"] is None and figures["roc_auc"]["reason"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for text in (page, (tmp_path / "out" / "report.md").read_text(encoding="utf-8")):
        assert "undefined (" in text and "nan" not in re.sub(r"<svg.*?</svg>|\w+nan\w*|nan\w+", "",
                                                             text, flags=re.DOTALL)  # fmt: skip


def test_other_runs_stand_beside_the_model(
    evaluate: ModuleType, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = scored_rows()
    file = save(tmp_path, rows)
    better = save(tmp_path, [row | {"p_hate": float(row["label"] == "hate")} for row in rows[::-1]],
                  name="better")  # fmt: skip
    fewer = save(tmp_path, rows[:-2], name="fewer")
    metrics = report(evaluate, tmp_path / "out", file, "--against", better, fewer)
    names = [(one["name"], one["kind"]) for one in metrics["strategies"]]
    assert names[:3] == [("rows", "model"), ("better", "against"), ("fewer", "against")]
    assert metrics["strategies"][1]["overall"]["accuracy"]["value"] == 1
    assert metrics["strategies"][2]["overall"] is None
    assert metrics["strategies"][2]["reason"] == "it has no answer to 2 of the 120 posts"
    assert (
        "it has no answer to 2 of the 120 posts" in (tmp_path / "out" / "report.html").read_text()
    )
    other = save(tmp_path, spoil("label", "hate" if rows[3]["label"] == "normal" else "normal")(
        list(rows)), name="other")  # fmt: skip
    argv = ("--predictions", file, "--output_dir", tmp_path / "no", "--against", other)
    assert "made from different data" in refusal(evaluate, capsys, *argv)
    argv = ("--predictions", file, "--output_dir", tmp_path / "no", "--against", tmp_path / "x.csv")
    refusal(evaluate, capsys, *argv)
    assert not (tmp_path / "no").exists()


# --- gates -----------------------------------------------------------------------------------


def test_gates_end_with_code_3_after_all_files_are_written(
    evaluate: ModuleType, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = source_rows()
    file, out = save(tmp_path, rows), tmp_path / "out"
    argv = ("--predictions", file, "--output_dir", out, "--require")
    # A gate counts an answer without label as wrong.
    other = {"hate": "normal", "normal": "hate"}
    decided = [
        row
        if row["predicted_label"] in other
        else row | {"predicted_label": other[row["true_label"]]}
        for row in rows[:90]
    ]
    figures = rates(decided, "true_label", "predicted_label")
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(word) for word in (*argv, "published", "--require", "beats_baselines")])
    printed = capsys.readouterr()
    assert end.value.code == 3 and "requirements fail" in printed.err
    assert {path.name for path in out.iterdir()} == {*evaluate.FILES}
    gates = {one["requirement"]: one for one in read_metrics(out)["gates"]}
    assert {*evaluate.PUBLISHED_CRITERIA} < gates.keys() and len(gates) == 10
    assert gates["f1>=0.62"]["value"] == pytest.approx(figures["f1_score"])
    assert gates["f1>=0.62"]["holds"] is (figures["f1_score"] >= 0.62)
    for group, most in (("lgbtq", 0.4), ("mexican", 0.1), ("middle_east", 0.25)):
        own = [row for row in decided if row["target_group_norm"] == group]
        rate = rates(own, "true_label", "predicted_label")["false_positive_rate"]
        gate = gates[f"{group}.fpr<={most:.2f}"]
        enough = gate["n"] >= evaluate.MIN_DENOMINATOR
        assert gate["holds"] is (enough and rate <= most)
        assert gate["value"] == (pytest.approx(rate) if enough else None)
        assert enough or "insufficient" in gate["reason"]
    for name in ("report.html", "report.md", "evaluation_report.txt"):
        assert "FAILS" in (out / name).read_text(encoding="utf-8")
    assert "FAILS" in printed.out
    # A figure can hold where its interval's bad end does not.
    bound = f"f1>={figures['f1_score'] - 0.01:.4f}"
    evaluate.main([str(word) for word in (*argv, bound)])
    assert "strict" in refusal(evaluate, capsys, "--predictions", file, "--strict")
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(word) for word in (*argv, bound, "--strict")])
    assert end.value.code == 3
    gate = read_metrics(out)["gates"][0]
    assert gate["tested"] == gate["low"] < gate["value"]


@pytest.mark.parametrize("text", ["f1", "f1=0.6", "f1>=high", ">=0.5", "f1>=1.2.3", "f1=>0.5"])
def test_a_requirement_that_cannot_be_read_is_refused_first(
    evaluate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, text: str
) -> None:
    # The file does not exist: that it is not looked for shows what is checked first.
    message = refusal(evaluate, capsys, "--predictions", tmp_path / "x.csv", "--require", text)
    assert "is no requirement" in message or "--require" in message


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "x", "nan", "1%"])
def test_a_prevalence_that_is_no_share_is_refused_first(
    evaluate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, share: str
) -> None:
    argv = ("--predictions", tmp_path / "x.csv", f"--prevalence={share}")
    assert "shares between 0 and 1" in refusal(evaluate, capsys, *argv)


# --- figures of the report -------------------------------------------------------------------


def test_prevalence_is_bayes_and_slices_are_counts(
    evaluate: ModuleType, quick: None, tmp_path: Path
) -> None:
    rows = scored_rows(240)
    for row in rows:
        row["answer"] = "hate" if row["p_hate"] >= 0.5 else "normal"
        row["label_multiclass"] = row["label"]
    for row in rows[::5]:
        row["label_multiclass"] = "offensive" if row["label"] == "normal" else "hate"
    flags = ("--prevalence", "0.01", "0.2", "--slice_by", "dialect")
    metrics = report(evaluate, tmp_path / "out", save(tmp_path, rows, "jsonl"), *flags)
    for one in metrics["prevalence"]:
        share = one["prevalence"]
        for place, found in one["places"].items():
            some = [row for row in rows if place == "overall" or place in row["target_groups"]]
            counted = rates(some, "label", "answer")
            hit, false = counted["recall"], counted["false_positive_rate"]
            precision = share * hit / (share * hit + (1 - share) * false)
            assert found["precision"]["value"] == pytest.approx(precision, abs=1e-12)
            assert found["precision"]["low"] < precision < found["precision"]["high"]
            expected = 10_000 * (share * hit + (1 - share) * false)
            assert found["flags"]["value"] == pytest.approx(expected)
            assert found["wrong_flags"]["value"] == pytest.approx(10_000 * (1 - share) * false)
    for value, found in metrics["slices"]["dialect"].items():
        counted = rates([row for row in rows if row["dialect"] == value], "label", "answer")
        for key in ("accuracy", "precision", "recall", "false_positive_rate"):
            assert found[key]["value"] == pytest.approx(counted[key], abs=1e-12)
    # Groups together, only where there are enough posts of both.
    together = Counter(
        " and ".join(pair)
        for row in rows
        for pair in [sorted(row["target_groups"])]
        if len(pair) == 2
    )
    expected = {name: n for name, n in together.items() if n >= evaluate.MIN_DENOMINATOR}
    found = metrics["slices"].get("groups together", {})
    assert {name: one["n"] for name, one in found.items()} == expected
    assert expected
    rules = metrics["offensive_rules"]
    for rule in ("normal", "hate", "dropped"):
        for place in ("overall", "lgbtq", "mexican", "middle_east"):
            some = [
                row | ({"label": rule} if row["label_multiclass"] == "offensive" else {})
                for row in rows
                if (place == "overall" or place in row["target_groups"])
                and not (rule == "dropped" and row["label_multiclass"] == "offensive")
            ]
            counted = rates(some, "label", "answer")
            for key in ("accuracy", "false_positive_rate", "false_negative_rate"):
                assert rules[rule][place][key]["value"] == pytest.approx(counted[key], abs=1e-12)


def test_people_are_judged_by_the_other_votes(
    evaluate: ModuleType, quick: None, tmp_path: Path
) -> None:
    made, rows = random.Random(5), scored_rows(80)
    kinds = ["normal", "offensive", "hate"]
    for row in rows:
        row["label_multiclass"] = "hate" if row["label"] == "hate" else made.choice(kinds[:2])
        row["annotator_labels"] = made.choices(kinds, k=made.choice([0, 1, 2, 3, 3, 3, 4]))
        row["prediction"] = "hate" if row["p_hate"] >= 0.5 else "normal"
    people = report(evaluate, tmp_path / "out", save(tmp_path, rows, "jsonl"))["people"]
    votes, right, model, posts = 0, 0, 0, 0
    for row in rows:
        hateful = [vote == "hate" for vote in row["annotator_labels"]]
        posts += len(hateful) > 1
        for place, vote in enumerate(hateful):
            others = [other for number, other in enumerate(hateful) if number != place]
            if sum(others) * 2 != len(others):
                votes += 1
                majority = sum(others) * 2 > len(others)
                right += vote == majority
                model += (row["prediction"] == "hate") == majority
    assert (people["votes"], people["posts"]) == (votes, posts)
    assert people["annotator"]["accuracy"]["value"] == pytest.approx(right / votes, abs=1e-12)
    assert people["model"]["accuracy"]["value"] == pytest.approx(model / votes, abs=1e-12)
    away = (model - right) / votes
    assert people["away"]["accuracy"]["value"] == pytest.approx(away, abs=1e-12)
    rows[0]["annotator_labels"] = [1, 2, None]
    people = report(evaluate, tmp_path / "odd", save(tmp_path, rows, "jsonl"))["people"]
    assert "is not known" in people["reason"]


def undefined(value: Any) -> Iterator[dict[str, Any]]:
    """Every figure of metrics.json without a value."""
    if isinstance(value, dict):
        if "value" in value and "reason" in value and value["value"] is None:
            yield value
        for one in value.values():
            yield from undefined(one)
    elif isinstance(value, list):
        for one in value:
            yield from undefined(one)


def test_what_is_undefined_is_null_with_a_reason(
    evaluate: ModuleType, quick: None, tmp_path: Path
) -> None:
    rows = [row for row in scored_rows(200) if row["target_groups"]]
    rows = [row for row in rows if row["target_groups"] != ["mexican"] or row["label"] == "hate"]
    for row in rows:
        row["target_groups"] = row["target_groups"][:1]
    few = [row for row in rows if row["target_groups"] == ["middle_east"]][:7]
    rows = [row for row in rows if row["target_groups"] != ["middle_east"]] + few
    rows = [row for row in rows if row["target_groups"] != ["mexican"] or row["label"] == "hate"]
    out = tmp_path / "out"
    metrics = report(evaluate, out, save(tmp_path, rows), "--prevalence", "0.01")
    figure = metrics["strategies"][0]["groups"]["mexican"]["false_positive_rate"]
    assert figure["value"] is None and figure["reason"] == "no normal posts"
    found = [*undefined(metrics)]
    assert found and all(one["reason"] and one.get("low") is None for one in found)
    (row,) = [
        one for one in read_csv(out / "bias_metrics.csv")
        if (one["strategy"], one["persona_tag"]) == ("rows", "mexican")
    ]  # fmt: skip
    assert row["false_positive_rate"] == "" and row["false_negative_rate"] != ""
    for name in ("report.html", "report.md"):
        text = (out / name).read_text(encoding="utf-8")
        assert "undefined (no normal posts)" in text and "insufficient (" in text
    summary = (out / "evaluation_report.txt").read_text(encoding="utf-8")
    assert "undefined" in summary and "insufficient" in summary


def test_errors_are_all_there_the_most_confident_first(
    evaluate: ModuleType, quick: None, tmp_path: Path
) -> None:
    rows = scored_rows()
    report(evaluate, tmp_path / "out", save(tmp_path, rows))
    errors = read_csv(tmp_path / "out" / "errors.csv")
    wrong = {row["id"] for row in rows if (row["p_hate"] >= 0.5) != (row["label"] == "hate")}
    assert {row["id"] for row in errors} == wrong and len(errors) == len(wrong)
    confidence = [float(row["confidence"]) for row in errors]
    assert confidence == sorted(confidence, reverse=True) and "text" not in errors[0]
    report(evaluate, tmp_path / "out", save(tmp_path, rows), "--log_text")
    assert read_csv(tmp_path / "out" / "errors.csv")[0]["text"].startswith("text ")


# --- size ------------------------------------------------------------------------------------


def test_a_report_with_everything_stays_small(
    evaluate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "RESAMPLES", 200)
    made, rows = random.Random(0), []
    words = [
        "people",
        "town",
        "say",
        "that",
        "they",
        "never",
        "opened",
        "a",
        "shop",
        "near",
        "school",
    ]
    for number in range(514):
        label = LABELS[number % 29 % 3 > 0]
        p = min(1.0, max(0.0, made.gauss(0.65 if label == "hate" else 0.35, 0.25)))
        rows.append(
            {
                "id": f"case {number}",
                "text": " ".join(made.choices(words, k=made.randint(8, 40))),
                "label": label,
                "prediction": "unknown" if made.random() < 0.03 else LABELS[p >= 0.5],
                "p_hate": p,
                "target_groups": [tiny.IDENTITIES[number % 7]],
                "functionality": f"functionality_{number % 29}_of_the_suite",
                "target_ident": tiny.IDENTITIES[number % 7],
                "case_id": number,
                "ref_case_id": number - 1 if number % 2 else "",
                "templ_id": number % 40,
                "ref_templ_id": "",
                "direction": "general",
                "focus_words": "",
                "focus_lemma": "",
                "label_multiclass": label if number % 6 else "offensive",
                "source": ["one", "two"][number % 2],
                "annotator_labels": made.choices(["hate", "normal", "offensive"], k=3),
            }
        )
    for row in rows:
        if row["label_multiclass"] == "offensive":
            row["label"] = "normal"
    plain = evaluate.report_probes

    def probed(args: Any, task: Any, posts: Rows, members: Any, probes: None) -> dict[str, Any]:
        args.evasion = args.identity_swap = True
        task = replace(task, groups=[*evaluate.IDENTITY_TERMS][3:10])
        probes = evaluate.build_probes(args, task, posts)
        probes.scores = [made.random() for _ in probes.texts]
        return plain(args, task, posts, members, probes)

    monkeypatch.setattr(evaluate, "report_probes", probed)
    metrics = report(
        *(evaluate, tmp_path / "out", save(tmp_path, rows, "jsonl")),
        *("--log_text", "--prevalence", "0.01", "0.1", "--slice_by", "direction", "functionality"),
        *("--against", save(tmp_path, rows, "jsonl", "again"), "--require", "f1>=0"),
    )
    assert metrics["functional"] and metrics["identity_swap"] and metrics["evasion"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<details>") == evaluate.MOST_ERRORS
    for title in (
        *("Gates", "By target group", "Plots", "ROC", "Reliability", "Thresholds", "Evasion"),
        *("Functional tests: hate cases", "Identity swaps", "Errors", "How they were made"),
        *("At the prevalence of real life", "Offensive posts", "Against people"),
    ):
        assert title in page, title
    assert len(page.encode()) <= 300_000


# --- model card ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(evaluate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """metrics.json and contract.json of an evaluation."""
    folder = tmp_path_factory.mktemp("card")
    metrics = report(evaluate, folder / "out", save(folder, scored_rows()))
    record = json.loads((folder / "out" / "contract.json").read_text(encoding="utf-8"))
    record |= {"name": "test", "split": "test", "adapter": {"repo": "alice/lora"}}
    record["dataset"] = {"repo": "alice/data", "revision": "0" * 40}
    return metrics, record


def section_of(evaluate: ModuleType, finished: tuple[Any, Any], fields: dict[str, str]) -> str:
    return evaluate.build_card_section(*finished, fields)


OTHERS = {
    "model-index": [
        {
            "name": "their name",
            "results": [
                {
                    "task": {"type": "text-classification", "name": "theirs"},
                    "dataset": {"type": "x/y", "name": "x", "config": "z", "extra": "kept"},
                    "metrics": [{"type": "f1", "value": 0.5, "note": "kept", "verified": True}],
                }
            ],
        },
        {"name": "second", "results": []},
    ]
}


def test_a_card_keeps_everything_that_is_not_the_evaluations(
    evaluate: ModuleType, finished: tuple[Any, Any]
) -> None:
    import yaml
    from huggingface_hub import ModelCard

    front = {"license": "mit", "base_model": "a/b", "tags": ["x"], "own_key": {"a": [1]}} | OTHERS
    card = f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# Title\n\nBy hand, above.\n"
    section = section_of(evaluate, finished, {})
    first = evaluate.update_card(card, section, *finished)
    assert "By hand, above." in first and first.count("## Evaluation") == 1
    between = first.replace("By hand, above.", "Changed.") + "\nBy hand, below.\n"
    second = evaluate.update_card(between, section, *finished)
    assert second == between and "By hand, below." in second
    assert second.count(evaluate.CARD_BEGIN) == second.count(evaluate.CARD_END) == 1
    data = yaml.safe_load(second.split("---\n")[1])
    theirs = OTHERS["model-index"][0]["results"][0]
    assert data["model-index"][0]["results"][0] == theirs
    assert data["model-index"][1] == OTHERS["model-index"][1]
    assert {key: data[key] for key in front if key != "model-index"} == {
        key: value for key, value in front.items() if key != "model-index"
    }
    results = ModelCard(second).data.eval_results
    own = {one.metric_name: one for one in results if one.dataset_name == "alice/data (test)"}
    figures = finished[0]["strategies"][0]["overall"]
    assert own["F1 hate"].metric_value == round(figures["f1_hate"]["value"], 4)
    assert own["false positive rate"].dataset_revision == "0" * 40 and len(own) == 6


@pytest.mark.parametrize(
    "front",
    ["---\na: [1\n---\n", "---\n- a\n---\n", "---\nmodel-index: 3\n---\n", "---\na: b\n",
     "---\nmodel-index:\n- name: x\n---\n", "---\n1: 2\n---\n", ""],
)  # fmt: skip
def test_a_damaged_card_loses_nothing(
    evaluate: ModuleType, finished: tuple[Any, Any], front: str
) -> None:
    card = f"{front}# Title\n\nBy hand.\n"
    section = section_of(evaluate, finished, {})
    first = evaluate.update_card(card, section, *finished)
    second = evaluate.update_card(first, section, *finished)
    for text in (first, second):
        assert "By hand." in text and text.count("## Evaluation") == 1
        assert all(line in text for line in front.splitlines())


@pytest.mark.parametrize("marker", ["begin", "end", "swapped", "twice"])
def test_a_marker_without_its_half_takes_no_text_along(
    evaluate: ModuleType, finished: tuple[Any, Any], marker: str
) -> None:
    begin, end = evaluate.CARD_BEGIN, evaluate.CARD_END
    middle = {"begin": begin, "end": end, "swapped": f"{end}\nB\n{begin}"}
    card = f"# Title\n\nA\n\n{middle.get(marker, begin + chr(10) + begin)}\n\nBy hand.\n"
    section = section_of(evaluate, finished, {})
    for _ in range(3):
        card = evaluate.update_card(card, section, *finished)
        assert "By hand." in card and "A\n" in card and card.count("## Evaluation") == 1


def test_a_card_in_another_encoding_keeps_its_bytes(
    evaluate: ModuleType, finished: tuple[Any, Any], tmp_path: Path
) -> None:
    for name, content in zip(("metrics.json", "contract.json"), finished, strict=True):
        write(tmp_path / name, content)
    args = evaluate.parse_args(["--predictions", "x.csv"])
    hand = b"# Title\r\n\r\ncaf\xe9 by hand\r\n"
    card = evaluate.new_card(args, b"---\r\nlicense: mit\r\n---\r\n" + hand, tmp_path)
    assert hand.rstrip() in card and b"license: mit" in card and b"model-index" in card
    assert evaluate.new_card(args, card, tmp_path) == card


def test_open_fields_are_not_stated_until_a_file_states_them(
    evaluate: ModuleType, finished: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    section = section_of(evaluate, finished, {})
    for title in evaluate.CARD_FIELDS.values():
        assert f"| {title} | not stated |" in section
    assert "text 1" not in section
    file = tmp_path / "card.yaml"
    file.write_text("languages: [en, de]\nintended_use: |\n  a | b\n  <b>c</b>\ncontact:\n")
    fields = evaluate.read_card_fields(str(file))
    section = section_of(evaluate, finished, fields)
    assert "| Languages | en, de |" in section and "| Contact | not stated |" in section
    assert "| Intended use | a \\| b &lt;b&gt;c&lt;/b&gt; |" in section
    write(file.with_suffix(".json"), {"languages": "en", "licence": "x"})
    argv = ("--predictions", "x.csv", "--card_fields", file.with_suffix(".json"))
    assert "unknown field 'licence'" in refusal(evaluate, capsys, *argv)
    refusal(evaluate, capsys, "--predictions", "x.csv", "--card_fields", tmp_path / "no.json")


def test_an_evaluation_without_figures_leaves_the_cards_data_alone(
    evaluate: ModuleType, finished: tuple[Any, Any]
) -> None:
    metrics = json.loads(json.dumps(finished[0]))
    for figure in metrics["strategies"][0]["overall"].values():
        if isinstance(figure, dict) and "value" in figure:
            figure |= {"value": None, "low": None, "high": None, "reason": "no posts"}
    card = evaluate.update_card("# Title\n", "section", metrics, finished[1])
    assert card == "# Title\n\nsection\n"


# --- where it goes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(hub: Hub, tmp_path_factory: pytest.TempPathFactory, evaluate: ModuleType) -> str:
    """A tiny adapter, its base and a dataset with the canary in one post, as repos of alice."""
    import peft
    import torch
    import transformers
    from datasets import ClassLabel, Dataset
    from huggingface_hub import HfApi

    folder, rows = tmp_path_factory.mktemp("published"), []
    for number, post in enumerate(tiny.made_posts()[:60]):
        rows.append({"id": f"p{number}", "target_groups": [post.pop("group")], **post})
    rows[45]["text"] += f" {CANARY}"
    assert rows[45]["label"] in LABELS
    lines = ["---", "configs:"]
    for config in ("unified", "simple"):
        lines += [f"- config_name: {config}", "  data_files:"]
        (folder / "data" / config).mkdir(parents=True)
        for split, chosen in {"train": rows[:40], "test": rows[40:]}.items():
            made = [dict(row) for row in chosen]
            for row in made if config == "simple" else []:
                row["prompt"] = messages(PROMPT, row["text"])
                row["completion"] = [{"role": "assistant", "content": row["label"]}]
            data = Dataset.from_list(made).cast_column("label", ClassLabel(names=LABELS))
            data.to_parquet(folder / "data" / config / f"{split}.parquet")
            lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    (folder / "data" / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
    write(
        folder / "data" / "contract.json",
        {"schema": 1, "stage": "dataset", "labels": LABELS, "positive_label": "hate",
         "groups": list(tiny.GROUPS), "prompts": {"simple": PROMPT}},
    )  # fmt: skip
    base = tiny.save_model(folder / "llama")
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    peft.get_peft_model(model, config).save_pretrained(folder / "lora")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder / "lora")
    contract = adapter_contract(evaluate, tokenizer, PROMPT, "data")
    contract["training"]["wandb_run_id"] = "trained1"
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    for key, name, kind, place in (
        ("base_model", "alice/report-base", "model", base),
        ("dataset", "alice/report-data", "dataset", folder / "data"),
    ):
        api.create_repo(name, repo_type=kind, private=True)
        made = api.upload_folder(repo_id=name, repo_type=kind, folder_path=place)
        contract[key] |= {"repo": name, "revision": made.oid}
    write(folder / "lora" / "contract.json", contract)
    (folder / "lora" / "README.md").write_text("---\nlicense: mit\n---\nBy hand.\n")
    api.create_repo("alice/report-lora", private=True)
    api.upload_folder(repo_id="alice/report-lora", folder_path=folder / "lora")
    return "alice/report-lora"


class Run:
    """A W&B run that keeps what is logged."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.logged, self.id = options, {}, options.get("id", "new")

    def log(self, values: dict[str, Any]) -> None:
        self.logged |= values

    def finish(self) -> None:
        pass


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs of a stand-in for wandb."""
    runs: list[Run] = []

    def init(**options: Any) -> Run:
        runs.append(Run(options))
        return runs[-1]

    def table(columns: list[str], data: list[list[Any]]) -> dict[str, Any]:
        assert all(len(row) == len(columns) for row in data)
        return {"columns": columns, "data": data}

    stand_in = SimpleNamespace(
        setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode="offline")),
        init=init,
        Table=table,
        Html=lambda text, inject: text,
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return runs


def files_of(hub: Hub, folder: Path, name: str, kind: str) -> dict[str, bytes]:
    """Every file of a repo."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    place = Path(api.snapshot_download(name, repo_type=kind, local_dir=folder / kind))
    paths = [path for path in place.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in paths}


def test_a_post_goes_nowhere_unless_it_is_asked_for(
    evaluate: ModuleType,
    quick: None,
    alice: Hub,
    published: str,
    wandb_runs: list[Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pyarrow.parquet as parquet
    from huggingface_hub import ModelCard

    monkeypatch.chdir(tmp_path)
    argv = ["--adapter", published, "--evasion", "--identity_swap", "--rationales", "2"]
    argv += ["--prevalence", "0.01", "--max_new_tokens", "8", "--card", "--report_to", "wandb"]
    usual = "test-rationales2-evasion-identity_swap"
    for asked, space in (([], "alice/report-page"), (["--log_text"], "alice/report-text")):
        evaluate.main([*argv, "--space", space, *asked])
        files = files_of(alice, tmp_path / space, published, "model")
        pages = files_of(alice, tmp_path / space, space, "space")
        name = f"eval/{usual}" + ("-with_text" if asked else "")
        written = {path for path in files if path.startswith("eval/")}
        assert {f"{name}/{file}" for file in evaluate.FILES} < written
        assert any(path.startswith("eval/scores-") for path in written)
        assert pages.keys() - {".gitattributes"} == {"index.html", "README.md"}
        holders = {path for path, content in files.items() if CANARY.encode() in content}
        logged = json.dumps(wandb_runs[-1].logged)
        text = [*parquet.read_table(tmp_path / space / "model" / name / "predictions.parquet")
                .to_pydict().values()]  # fmt: skip
        told = any(CANARY in str(value) for column in text for value in column)
        if asked:
            assert f"{name}/predictions.csv" in holders and told and CANARY in logged
            assert f"{name}/answers.jsonl" in files
        else:
            assert not holders and not told and CANARY not in logged
            assert not any(CANARY.encode() in content for content in pages.values())
        card = ModelCard(files["README.md"].decode())
        assert card.data.license == "mit" and "By hand." in card.text
        assert CANARY not in str(card) and card.text.count("## Evaluation") == 1
        assert card.data.eval_results
        assert b"sdk: static" in pages["README.md"]
        assert pages["index.html"] == files[f"{name}/report.html"]
    run = wandb_runs[0]
    assert run.options["id"] == "trained1" and run.options["resume"] == "allow"
    figures = read_metrics(tmp_path / "hsd-eval" / "report-lora" / usual)
    prefix, overall = f"eval/{usual}", figures["strategies"][0]["overall"]
    assert run.logged[f"{prefix}/f1_hate"] == overall["f1_hate"]["value"]
    assert run.logged[f"{prefix}/groups"]["data"] and "<h1>" in run.logged[f"{prefix}/report"]
    assert f"{prefix}/predictions" not in run.logged
    assert len(wandb_runs[1].logged[f"{prefix}-with_text/predictions"]["data"]) == 20


def test_wandb_gets_every_plot_of_the_report(
    evaluate: ModuleType, wandb_runs: list[Run], tmp_path: Path
) -> None:
    file = save(tmp_path, scored_rows(120))
    argv = ["--predictions", file, "--output_dir", tmp_path / "out", "--report_to", "wandb"]
    evaluate.main([str(word) for word in argv])
    logged = wandb_runs[0].logged
    plots = {name.split("/")[-1]: page for name, page in logged.items() if "/plots/" in name}
    assert {"False positive rate", "ROC", "Reliability"} <= plots.keys()
    assert all(page.count("<svg") == 1 and "--ink" in page for page in plots.values())


def test_no_post_stands_in_what_wandb_writes(evaluate: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    rows = [row | {"text": f"{CANARY} {row['text']}"} for row in scored_rows(30)]
    file = save(tmp_path, rows)
    hidden = ("PATH", "HOME", "OMP_NUM_THREADS", "HF_HOME")
    environment = {name: os.environ[name] for name in hidden if name in os.environ}
    for folder, asked in (("without", []), ("with", ["--log_text"])):
        place = tmp_path / folder
        place.mkdir()
        words = ["--predictions", file, "--output_dir", tmp_path / f"out-{folder}", *asked]
        made = subprocess.run(
            [sys.executable, evaluate.__file__, *map(str, words), "--report_to", "wandb"],
            cwd=place,
            env=environment | {"WANDB_MODE": "offline", "WANDB_DATA_DIR": str(place / "staging")},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert made.returncode == 0 and "W&B: logged to run" in made.stdout, made.stderr
        files = [path for path in (place / "wandb").rglob("*") if path.is_file()]
        assert any(path.suffix == ".wandb" for path in files)
        holders = [path for path in files if CANARY.encode() in path.read_bytes()]
        assert bool(holders) is bool(asked)


@pytest.mark.parametrize("broken", ["import", "init", "log"])
def test_a_failure_of_wandb_ends_no_evaluation(
    evaluate: ModuleType, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch, wandb_runs: list[Run], broken: str,
) -> None:  # fmt: skip
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("no network\nat all")

    if broken == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    elif broken == "init":
        monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    else:
        monkeypatch.setattr(Run, "log", fail)
    report(evaluate, tmp_path / "out", save(tmp_path, scored_rows(30)), "--report_to", "wandb")
    assert "W&B has no log of this evaluation" in capsys.readouterr().out
    assert (tmp_path / "out" / "contract.json").is_file()


def test_only_a_private_space_of_its_own_takes_the_report(
    evaluate: ModuleType, quick: None, alice: Hub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=alice.endpoint, token=alice.token)
    file = save(tmp_path, scored_rows(30))
    argv = ("--predictions", file, "--output_dir", tmp_path / "out", "--space")
    for _ in range(2):
        evaluate.main([str(word) for word in (*argv, "alice/space-own")])
    info = api.repo_info("alice/space-own", repo_type="space")
    assert info.private
    files = files_of(alice, tmp_path, "alice/space-own", "space")
    assert files["index.html"] == (tmp_path / "out" / "report.html").read_bytes()
    assert b"sdk: static" in files["README.md"] and b"Bias report" in files["README.md"]
    for name, private, held in (
        ("alice/space-public", False, {}),
        ("alice/space-app", True, {"app.py": b"x"}),
        ("alice/space-page", True, {"index.html": b"a page", "README.md": b"---\ntitle: x\n---\n"}),
    ):
        api.create_repo(name, repo_type="space", space_sdk="static", private=private)
        for path, content in held.items():
            api.upload_file(
                path_in_repo=path, path_or_fileobj=content, repo_id=name, repo_type="space"
            )
        message = refusal(evaluate, capsys, *argv, name)
        assert ("is public" if not private else "holds other things") in message
        after = files_of(alice, tmp_path / name, name, "space")
        assert {path: after[path] for path in held} == held
    for name in ("report", "a/b/c", "alice/ü"):
        assert "USER/NAME" in refusal(evaluate, capsys, *argv, name)
