# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "huggingface-hub==2.4.0",
#     "lz4==4.4.5",
#     "torch==2.13.0",
#     "transformers==5.23.0",
#     "uv==0.13.8",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-20T00:00:00Z"
# ///
"""The README's whole story on a loopback Hub: no account, no GPU, no network beyond the packages.

    uv run tests/demo.py

Builds a small dataset of made posts and a tiny random base model, trains it as a Job that pauses
just before its timeout, submits the same command again, evaluates, merges, and ends with the
report's path.
Every command is printed before it runs; with a real account the same commands run on the Hub.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiny
from hub import Hub

ROOT = Path(__file__).parents[1]
UV = [sys.executable, "-m", "uv"]
HF = str(Path(sys.executable).with_name("hf"))
MODEL = "alice/tiny-base"
# A tiny random model needs what a pretrained one does not: every layer, and a high learning rate.
TRAINING = [
    *("--model_name_or_path", MODEL, "--lora_target_modules", "all-linear", "--lora_r", "16"),
    *("--learning_rate", "4e-3", "--max_steps", "300", "--warmup_steps", "10"),
    *("--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1"),
    *("--save_steps", "20", "--logging_steps", "20", "--early_stopping_patience", "0"),
    *("--report_to", "none"),
]


def run(command: list[str], env: dict[str, str], cwd: Path, check: bool = True) -> str:
    """Print a command as a user would type it, run it, pass its output on and return it."""
    shown = shlex.join(command)
    for program, name in ((shlex.join(UV), "uv"), (HF, "hf"), (f"{ROOT}/", "")):
        shown = shown.replace(program, name)
    print(f"\n$ {shown}", flush=True)
    lines = []
    with subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            print(f"  {line}", end="", flush=True)
            lines.append(line)
    if check and process.returncode:
        raise SystemExit(f"the command above ended with exit code {process.returncode}")
    return "".join(lines)


def prepare(hub: Hub, work: Path, env: dict[str, str]) -> float:
    """Make posts and base model; return the seconds that a one-step training takes."""
    print("Making a tiny random base model, and fetching the scripts' packages once.", flush=True)
    from huggingface_hub import HfApi

    tiny.save_model(work / "base")
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(MODEL, private=True)
    api.upload_folder(repo_id=MODEL, folder_path=work / "base")
    tiny.write_jsonl(work / "warm.jsonl", tiny.post_rows()[:16])
    quiet = {"env": env, "cwd": work, "check": True, "stdout": subprocess.DEVNULL}
    for script in ("datasets/build_unified.py", "train/train.py", "eval/eval.py", "merge/merge.py"):
        subprocess.run([*UV, "run", "-q", str(ROOT / script), "--help"], **quiet)
    warm = [*UV, "run", "-q", str(ROOT / "train/train.py"), "--model_name_or_path", "./base"]
    warm += ["--train_file", "warm.jsonl", "--output_dir", "./warm", "--max_steps", "1"]
    began = time.monotonic()
    subprocess.run([*warm, "--report_to", "none"], stderr=subprocess.DEVNULL, **quiet)
    return time.monotonic() - began


def train_in_two_jobs(env: dict[str, str], work: Path, start_s: float) -> None:
    """Submit the training with too short a timeout, and the same command again with a longer."""
    submit = [HF, "jobs", "uv", "run", "--flavor", "a100-large"]
    training = [str(ROOT / "train/train.py"), *TRAINING]
    # A Job unpacks and compiles its packages first; what is left is time for a part of the steps.
    timeout_s = int(1.5 * start_s) + 22
    for _ in range(4):
        output = run([*submit, "--timeout", f"{timeout_s}s", *training], env, work, check=False)
        if "paused at step" in output:
            break
        print(f"\nThis machine is slow: no pause in {timeout_s} s. Again, with more time:")
        timeout_s = int(1.4 * timeout_s)
    if "paused at step" not in output:
        raise SystemExit("the training did not pause before its timeout: the demo shows no resume")
    print("\nThe job is over. The same command again, with time enough:", flush=True)
    output = run([*submit, *training], env, work)
    if "resuming from checkpoint-" not in output:
        raise SystemExit("the second job did not resume")


def print_figures(metrics: Path) -> None:
    """Print F1 and accuracy of all strategies; the adapter must beat both constant answers."""
    found = json.loads(metrics.read_text(encoding="utf-8"))
    f1 = {one["name"]: one["overall"]["f1_hate"]["value"] for one in found["strategies"]}
    accuracy = {one["name"]: one["overall"]["accuracy"]["value"] for one in found["strategies"]}
    print("\nstrategy        F1 of hate  accuracy")
    for name in f1:
        shown = "undefined" if f1[name] is None else f"{f1[name]:.3f}"
        print(f"{name:<14}  {shown:>10}  {accuracy[name]:>8.3f}")
    model = found["strategies"][0]["name"]
    better = f1[model] > f1["always_hate"] and accuracy[model] > accuracy["always_normal"]
    if not better:
        raise SystemExit("the adapter is no better than a constant answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", help="folder for the Hub's repos and the report (a new one)")
    args = parser.parse_args()
    work = Path(args.dir or tempfile.mkdtemp(prefix="hsd-demo-")).resolve()
    began = time.monotonic()
    with Hub(work / "hub", grace=5) as hub:
        env = {**os.environ, **hub.env(home=work / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        # The client's warnings about its own experimental commands say nothing of the story.
        env |= {"NO_COLOR": "1", "PYTHONWARNINGS": "ignore"}
        start_s = prepare(hub, work, env)
        sources = tiny.write_sources(work / "sources")
        build = [*UV, "run", str(ROOT / "datasets/build_unified.py")]
        for flag, file in sources.items():
            build += [f"--{flag}", str(file.relative_to(work))]
        run(build, env, work)
        train_in_two_jobs(env, work, start_s)
        run([*UV, "run", str(ROOT / "eval/eval.py"), "--adapter", "alice/hsd-lora"], env, work)
        run([*UV, "run", str(ROOT / "merge/merge.py"), "--adapter", "alice/hsd-lora"], env, work)
        report = work / "hsd-eval" / "hsd-lora" / "test"
        print_figures(report / "metrics.json")
    print(f"\nreport: {report / 'report.html'}")
    print(f"repos:  {work / 'hub'}")
    print(f"The demo took {(time.monotonic() - began) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
