"""datasets/build_hatecheck.py on made cases in the form of HateCheck.

pytest tests/test_build_hatecheck.py
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hub import Hub
from huggingface_hub import HfApi
from tiny import IDENTITIES, load_script, made_cases, read_config, write_csv

script = load_script("datasets/build_hatecheck.py")


@pytest.fixture(autouse=True)
def no_settings(clean_environment: None) -> None:
    """What somebody's shell sets must not change a test."""


def test_cases_keep_what_makes_them_tests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write_csv(tmp_path / "test.csv", made_cases()), tmp_path / "out"
    script.main(["--hatecheck", str(file), "--output_dir", str(out)])
    contract = json.loads((out / "contract.json").read_text(encoding="utf-8"))
    rows = read_config(out, "unified")
    assert contract["rows"] == {"test": 31} and {row["split"] for row in rows} == {"test"}
    assert sorted(path.name for path in out.rglob("*.parquet")) == (
        ["test-00000-of-00001.parquet"] * 4
    )
    by_id = {row["case_id"]: row for row in rows}
    for row in rows:
        assert row["id"] == f"hatecheck_{row['case_id']}" and row["functionality"]
        assert row["case_templ"] == "" and not row["ref_templ_id"].endswith(".0")
        if row["ref_case_id"]:
            twin = by_id[row["ref_case_id"]]
            assert (twin["label"], row["label"]) == ("hate", "normal")
            assert twin["target_ident"] == row["target_ident"]
    assert "14 cases name their twin in ref_case_id, 14 of them" in contract["rules"]["contrasts"]
    groups = Counter(group for row in rows for group in row["target_groups"])
    assert groups.pop("lgbtq") == 8
    assert groups == {name.lower().replace(" ", "_"): 4 for name in IDENTITIES}
    assert [row["id"] for row in rows if not row["target_groups"]]
    # Templates are near each other by design: none is left out.
    assert "repeats" not in contract["rules"]
    printed = capsys.readouterr().out
    assert "not the published HateCheck: 31 cases (published: 3728)" in printed
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "cc-by-4.0" in card and "test only, never train" in card


def test_the_published_counts_raise_no_warning() -> None:
    source = script.Source("hatecheck", **script.HATECHECK)
    for number in range(3728):
        label = "hate" if number < 2563 else "normal"
        source.rows.append({"label": label, "functionality": str(number % 29)})
    build = script.Build("HateCheck", ["normal", "hate"], "hate", {}, [source], {}, {}, [])
    script.compare_with_published(build)
    assert build.warnings == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_gold": "hate"}, "1 values of label_gold outside the mapping: 'hate' (1)"),
        ({"target_ident": "robots"}, "values of target_ident outside the mapping: 'robots'"),
        ({"ref_case_id": "999"}, "does not have, for example hatecheck_1"),
    ],
)
def test_bad_cases(
    tmp_path: Path, change: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = made_cases()
    rows[0] |= change
    file = write_csv(tmp_path / "test.csv", rows)
    with pytest.raises(SystemExit) as stop:
        script.main(["--hatecheck", str(file), "--output_dir", str(tmp_path / "o")])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_hub_source_and_a_repo_that_has_no_train_split(alice: Hub, tmp_path: Path) -> None:
    from datasets import load_dataset

    api = HfApi(endpoint=alice.endpoint, token=alice.token)
    api.create_repo("alice/hatecheck", repo_type="dataset")
    file = write_csv(tmp_path / "test.csv", made_cases())
    api.upload_file(
        repo_id="alice/hatecheck",
        repo_type="dataset",
        path_in_repo="test.csv",
        path_or_fileobj=file.read_bytes(),
    )
    for _ in range(2):
        script.main(["--hatecheck", "alice/hatecheck"])
    assert len(alice.commits("alice/hsd-hatecheck", "dataset")) == 2
    for config in ("unified", "simple", "optimized", "instruction"):
        data = load_dataset("alice/hsd-hatecheck", config, token=alice.token)
        assert {split: len(data[split]) for split in data} == {"test": 31}
