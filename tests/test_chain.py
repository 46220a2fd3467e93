"""The four stages after one another on the loopback Hub, each reading only what the last one wrote.

pytest tests/test_chain.py
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from hub import Hub
from huggingface_hub import HfApi
from tiny import load_script

DATA, BASE, ADAPTER, MERGED = (f"alice/chain-{name}" for name in ("data", "base", "lora", "merged"))


@pytest.fixture(scope="module")
def chain(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all four stages; return the folder of the local report."""
    work = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", hub.token)
        patch.chdir(work)
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo(BASE, private=True)
        api.upload_folder(repo_id=BASE, folder_path=tiny.save_model(work / "base"))
        sources = tiny.write_sources(work / "sources")
        flags = [part for flag, file in sources.items() for part in (f"--{flag}", str(file))]
        load_script("datasets/build_unified.py").main([*flags, "--dataset_repo", DATA])
        load_script("train/train.py").main(
            [
                *("--dataset_repo", DATA, "--model_name_or_path", BASE, "--hub_model_id", ADAPTER),
                *("--lora_target_modules", "all-linear", "--learning_rate", "4e-3"),
                *("--max_steps", "60", "--warmup_steps", "5", "--save_steps", "30"),
                *("--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1"),
                *("--report_to", "none"),
            ]
        )
        load_script("eval/eval.py").main(["--adapter", ADAPTER])
        load_script("merge/merge.py").main(["--adapter", ADAPTER, "--hub_model_id", MERGED])
    return work / "hsd-eval" / "chain-lora" / "test"


def contract(hub: Hub, repo: str, kind: str = "model", folder: str = ".") -> dict[str, Any]:
    file = hub.repo_folder(repo, kind) / folder / "contract.json"
    return json.loads(file.read_text(encoding="utf-8"))


def test_every_contract_names_the_commits_it_was_made_from(hub: Hub, chain: Path) -> None:
    def commits(repo: str, kind: str = "model") -> set[str]:
        return {commit["oid"] for commit in hub.commits(repo, kind)}

    adapter = contract(hub, ADAPTER)
    assert adapter["dataset"]["revision"] in commits(DATA, "dataset")
    assert adapter["base_model"]["revision"] in commits(BASE)
    evaluation = contract(hub, ADAPTER, folder="eval/test")
    assert evaluation["adapter"]["revision"] in commits(ADAPTER)
    assert evaluation["dataset"] == adapter["dataset"]
    merged = contract(hub, MERGED)
    assert {entry["repo"] for entry in merged["inputs"]} == {ADAPTER, BASE}
    stages = [contract(hub, DATA, "dataset")["stage"], adapter["stage"], merged["stage"]]
    assert stages == ["dataset", "adapter", "merged"]
    assert {entry["schema"] for entry in (adapter, evaluation, merged)} == {1}


def test_all_repos_are_private_and_hold_no_secret(hub: Hub, chain: Path) -> None:
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    for repo, kind in ((DATA, "dataset"), (ADAPTER, "model"), (MERGED, "model")):
        assert api.repo_info(repo, repo_type=kind).private
        for file in hub.repo_folder(repo, kind).rglob("*"):
            if file.is_file():
                content = file.read_bytes()
                assert hub.token.encode() not in content, file
                assert str(chain.parents[2]).encode() not in content, file


def test_no_post_leaves_the_dataset_repo(hub: Hub, chain: Path) -> None:
    posts = [post["text"].encode() for post in tiny.made_posts()]
    for repo in (ADAPTER, MERGED):
        for file in hub.repo_folder(repo).rglob("*"):
            if file.is_file() and file.name != "tokenizer.json":
                content = file.read_bytes().lower()
                assert not [post for post in posts if post in content], file


def test_the_adapter_has_learned_something(chain: Path) -> None:
    with (chain / "performance_metrics.csv").open() as file:
        rows = {row["strategy"]: row for row in csv.DictReader(file)}
    adapter = rows["simple"]
    assert float(adapter["f1_score"]) > float(rows["always_hate"]["f1_score"])
    assert float(adapter["accuracy"]) > float(rows["always_normal"]["accuracy"])


def test_the_report_stands_beside_the_adapter(hub: Hub, chain: Path) -> None:
    pushed = hub.repo_folder(ADAPTER) / "eval" / "test"
    for file in chain.iterdir():
        assert (pushed / file.name).read_bytes() == file.read_bytes()
    with (chain / "predictions.csv").open() as file:
        predictions = list(csv.DictReader(file))
    sizes = contract(hub, DATA, "dataset")["splits"]["test"]
    assert len(predictions) == sum(sum(groups.values()) for groups in sizes.values())


def test_canned_posts_and_hatecheck_are_scored_too(
    hub: Hub, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.chdir(chain.parents[2])
    evaluate, checks = load_script("eval/eval.py").main, "alice/chain-hatecheck"
    evaluate(["--adapter", ADAPTER, "--split", "canned_50_quick"])
    report = json.loads((chain.parent / "canned_50_quick/metrics.json").read_text(encoding="utf-8"))
    rows = contract(hub, DATA, "dataset")["rows"]
    assert report["strategies"][0]["overall"]["n"] == rows["canned_50_quick"] > 0
    cases = tiny.write_csv(Path("cases.csv"), tiny.made_cases())
    load_script("datasets/build_hatecheck.py").main(
        ["--hatecheck", str(cases), "--dataset_repo", checks]
    )
    evaluate(["--adapter", ADAPTER, "--dataset_repo", checks, "--output_dir", "hatecheck"])
    report = json.loads(next(Path("hatecheck").rglob("metrics.json")).read_text(encoding="utf-8"))
    groups = report["strategies"][0]["groups"]
    assert groups["women"]["n"] == 4 and groups["lgbtq"]["n"] == 8


def test_the_merged_model_stands_alone(hub: Hub, chain: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = hub.repo_folder(MERGED)
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(folder).chat_template
    difference = contract(hub, MERGED)["largest_probability_difference"]
    assert difference["merged_against_adapter"] < 1e-4 < difference["adapter_against_base"]
