"""Count HateXplain's official validation and test posts under five target rules, by the builder.

    python tests/real_counts.py --hatexplain dataset.json.gz \
        --hatexplain_splits post_id_divisions.json

Needs the packages of requirements.txt and local copies of the official files. Each row is one
build; the counts are those of its funnel at the step `about a group`, before duplicates go.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

from tiny import load_script

ISLAM, REFUGEE = "Islam", "Refugee"
# Rule, flags, and further targets that count as middle_east.
RULES = (
    ("M1 the target named most often", "top", []),
    ("M2 every target that an annotator names", "any", []),
    ("M3 every target that two of three name", "majority", []),
    ("M4 as M3, with Islam and Refugee in middle_east", "majority", [ISLAM, REFUGEE]),
    ("M5 as M1, with Islam in middle_east", "top", [ISLAM]),
)


def count(sources: list[str], rule: str, further: list[str]) -> dict[str, int]:
    """Validation and test posts of each group."""
    script = load_script("datasets/build_unified.py")
    groups = {name: {"hatexplain": [*group["hatexplain"]]} for name, group in script.GROUPS.items()}
    groups["middle_east"]["hatexplain"] += further
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
        file = Path(work, "groups.json")
        file.write_text(json.dumps(groups), encoding="utf-8")
        flags = ["--toxigen", "none", "--target_rule", rule, "--groups", str(file)]
        script.main([*sources, *flags, "--output_dir", f"{work}/out"])
        contract = json.loads(Path(work, "out", "contract.json").read_text(encoding="utf-8"))
    [source] = contract["sources"]
    [step] = [step for step in source["steps"] if step["step"] == "about a group"]
    return {
        group: sum(
            sum(step["counts"][split].get(group, {}).values()) for split in ("validation", "test")
        )
        for group in groups
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("hatexplain", "hatexplain_splits"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    sources = [part for name, file in vars(args).items() for part in (f"--{name}", file)]
    print("| rule | lgbtq | mexican | middle_east | total |\n|---|---|---|---|---|")
    for title, rule, further in RULES:
        found = count(sources, rule, further)
        print(f"| {title} | {' | '.join(map(str, found.values()))} | {sum(found.values())} |")


if __name__ == "__main__":
    main()
