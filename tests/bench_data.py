"""Measure datasets/build_unified.py on as many rows as ToxiGen's train config has: time and memory.

    python tests/bench_data.py

Makes 250,951 statements about 13 groups from random words, one in twenty a copy of an earlier one
with a word changed, and one in a hundred an exact copy; then runs the builder on them as its users
do, without HateXplain, with all 13 groups. Prints the wall time, the CPU time and the largest
resident memory of the builder's process, and how many copies it found. Needs the packages of
requirements.txt.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tiny import ROOT

ROWS = 250_951
# The names of ToxiGen's train config.
GROUPS = (
    *("asian", "black", "chinese", "jewish", "latino", "lgbtq", "mental_dis", "mexican"),
    *("middle_east", "muslim", "native_american", "physical_dis", "women"),
)
COLUMNS = ("prompt", "generation", "generation_method", "group", "prompt_label")


def make_statements(file: Path, rows: int, seed: int = 0) -> dict[str, int]:
    """Write the statements as CSV; return how many copies of which kind there are."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(8_000)]
    texts: list[str] = []
    copies = {"exact": 0, "one word changed": 0}
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for number in range(rows):
            kind = draw.random()
            if texts and kind < 0.01:
                text = draw.choice(texts)
                copies["exact"] += 1
            elif texts and kind < 0.06:
                changed = draw.choice(texts).split()
                changed[draw.randrange(len(changed))] = draw.choice(words)
                text = " ".join(changed)
                copies["one word changed"] += 1
            else:
                text = " ".join(draw.choices(words, k=draw.randint(6, 28)))
            texts.append(text)
            # A copy has its original's label, or it would be left out as a text with two labels.
            label = sum(map(ord, text[:5])) % 2
            writer.writerow(("- a prompt", text, "TopK", GROUPS[number % len(GROUPS)], label))
    return copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hsd-bench-") as work:
        folder = Path(work)
        copies = make_statements(folder / "toxigen.csv", args.rows)
        groups = {name: {"toxigen": [name]} for name in GROUPS}
        (folder / "groups.json").write_text(json.dumps(groups), encoding="utf-8")
        command = [sys.executable, str(ROOT / "datasets/build_unified.py"), "--hatexplain", "none"]
        command += ["--toxigen", "./toxigen.csv", "--toxigen_config", "train"]
        command += ["--groups", "groups.json", "--output_dir", "./out"]
        began = time.monotonic()
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - began
        if process.returncode:
            raise SystemExit(f"the builder ended with exit code {process.returncode}")
        contract = json.loads((folder / "out/contract.json").read_text(encoding="utf-8"))
        size = sum(file.stat().st_size for file in (folder / "out").rglob("*.parquet"))
    cpu = usage.ru_utime + usage.ru_stime
    kept = sum(contract["rows"][split] for split in ("train", "validation", "test"))
    print(f"{args.rows} rows, {copies}: {contract['audit']['repeats']}, {kept} kept")
    print(f"wall {wall:.0f} s, CPU {cpu:.0f} s, memory {usage.ru_maxrss / 1e6:.2f} GB")
    print(f"written {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
