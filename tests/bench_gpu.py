# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate==1.15.0",
#     "bitsandbytes==0.50.2",
#     "datasets==5.2.0",
#     "huggingface-hub==2.4.0",
#     "jinja2==3.1.6",
#     "peft==0.21.2",
#     "pyyaml==6.0.3",
#     "torch==2.13.0",
#     "transformers==5.23.0",
#     "trl==1.16.0",
#     "wandb==0.31.0",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-20T00:00:00Z"
# ///
"""Measure train/train.py against `trl sft` defaults on a GPU, with random weights of real shapes.

    uv run tests/bench_gpu.py --dollars_per_hour 2.5 > gpu.md
    uv run tests/bench_gpu.py --only lora3b --steps 20 --dataset_repo ./hsd-data
    uv run tests/bench_gpu.py --tiny            # any machine: that the command works, no figures

Each side is a process of its own, because the GPU holds no two of the large models; they alternate
(ours, trl, ours, trl), and the ratio is that of the medians of a round. A step is wall time between
two synchronised ends of steps. Both sides have the same posts, order, LoRA start, optimizer,
learning rate and 32 rows a step; no dropout is drawn. Share of peak: 4 x the weights that a token
meets x the rows' tokens, over the rate of a bfloat16 matmul of 8192 x 8192 x 8192 measured in the
same process; what ours leaves out is counted too, so that both are measured by the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_train import TRAINING, save_chat_tokenizer, write_posts
from tiny import load_script

LLAMA_3B = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
# Row: the class, its shape where it is not the configuration's default, and the flags of ours.
ROWS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "lora3b": ("Llama", LLAMA_3B, []),
    "qlora3b": ("Llama", LLAMA_3B, ["--load_in_4bit"]),
    "gptoss20b": ("GptOss", {"num_hidden_layers": 24, "num_local_experts": 32}, []),
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 8192,
}
TINY_EXPERTS = {"num_local_experts": 4, "layer_types": ["full_attention"] * 2}
SIDES = ("ours", "trl")


def save_base(folder: Path, row: str, rows: list[dict[str, Any]], tiny: bool) -> None:
    """Random bfloat16 weights, drawn where training will run, and a tokenizer of the posts."""
    import torch
    import transformers

    kind, shape, _ = ROWS[row]
    if tiny:
        shape = TINY | (TINY_EXPERTS if kind == "GptOss" else {})
    tokenizer = save_chat_tokenizer(folder, rows)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = getattr(transformers, f"{kind}Config")(**shape, **ids, bos_token_id=None)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def matmul_peak(size: int) -> float:
    """TFLOP/s of a bfloat16 matmul of three times `size`, the best of ten."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.ones(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    rates = []
    for _ in range(10):
        began = moment()
        left @ right
        rates.append(2 * size**3 / (moment() - began) / 1e12)
    return max(rates)


def moment() -> float:
    """Seconds, after the GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def clock(steps: list[float], losses: list[float]) -> Any:
    """A callback that writes down each step's seconds and loss."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        began = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = moment()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = moment()
            steps.append(now - self.began)
            self.began = now

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    return Clock()


def run_ours(options: argparse.Namespace, folder: Path, callback: Any) -> Any:
    """train.py's own main with a clock; returns its trainer."""
    script, seen = load_script("train/train.py"), {}
    build = script.build_trainer

    def build_with_clock(*values: Any, **more: Any) -> Any:
        seen["trainer"] = build(*values, **more)
        seen["trainer"].add_callback(callback)
        return seen["trainer"]

    script.build_trainer = build_with_clock
    with tempfile.TemporaryDirectory() as out:
        script.main(
            [
                *("--train_file", str(folder / "messages.jsonl"), "--output_dir", out),
                *("--model_name_or_path", str(folder / "base"), "--lora_dropout", "0"),
                *("--max_steps", str(options.steps), "--allow_cpu", "--sample_steps", "0"),
                *("--save_steps", "100000", "--save_minutes", "100000"),
                *("--early_stopping_patience", "0", *ROWS[options.row][2]),
                *(part for name, value in TRAINING.items() for part in (f"--{name}", str(value))),
            ]
        )
    return seen["trainer"]


def run_trl(options: argparse.Namespace, folder: Path, callback: Any) -> Any:
    """What `trl sft --use_peft` does with its defaults; the base in bfloat16, or in four bits."""
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    lines = (folder / "messages.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    data = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
    quantization = None
    if "--load_in_4bit" in ROWS[options.row][2]:
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    on_gpu = torch.cuda.is_available()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base",
        dtype=torch.bfloat16,
        quantization_config=quantization,
        device_map={"": 0} if on_gpu else None,
    )
    with tempfile.TemporaryDirectory() as out:
        settings = trl.SFTConfig(
            out,
            **TRAINING,
            max_steps=options.steps,
            save_strategy="no",
            use_cpu=not on_gpu,
            disable_tqdm=True,
            # As ours has them: the losses are compared.
            router_aux_loss_coef=0.0,
            optim="paged_adamw_8bit" if quantization and on_gpu else "adamw_torch_fused",
        )
        lora = LoraConfig(
            r=32, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        trainer = trl.SFTTrainer(
            model,
            args=settings,
            train_dataset=data,
            processing_class=transformers.AutoTokenizer.from_pretrained(folder / "base"),
            peft_config=lora,
            callbacks=[callback],
        )
        trainer.train()
    return trainer


def one_side(options: argparse.Namespace) -> None:
    """One run in this process; its figures as JSON into --result."""
    import torch

    steps: list[float] = []
    losses: list[float] = []
    folder = options.folder / options.row
    peak = matmul_peak(512 if options.tiny else 8192)
    run = {"ours": run_ours, "trl": run_trl}[options.side]
    trainer = run(options, folder, clock(steps, losses))
    rows = trainer.train_dataset["input_ids"]
    script, config = load_script("train/train.py"), trainer.model.get_base_model().config
    found = {
        "seconds": steps[options.skip :],
        "losses": losses,
        "tokens_per_step": 32 * sum(map(len, rows)) / len(rows),
        "flop_per_token": 4 * script.body_parameters(config),
        "peak_tflops": peak,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0,
        "how": script.describe_speed(trainer) if options.side == "ours" else "",
    }
    options.result.write_text(json.dumps(found), encoding="utf-8")


def measure(options: argparse.Namespace, row: str, folder: Path) -> list[str]:
    """Rounds of both sides; a table row for each side."""
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(options.rounds):
        found = {}
        for side in SIDES:
            result = folder / f"{row}-{side}-{number}.json"
            words = [sys.executable, __file__, "--side", side, "--row", row]
            words += ["--folder", str(folder), "--result", str(result)]
            words += ["--steps", str(options.steps), "--skip", str(options.skip)]
            words += ["--tiny"] * options.tiny
            done = subprocess.run(words, stdout=sys.stderr)
            if done.returncode:
                return [f"| {row} | {side} | failed, exit {done.returncode} | | | | | | |"]
            found[side] = json.loads(result.read_text(encoding="utf-8"))
        rounds.append(found)
    middle = statistics.median
    ratios = [middle(one["trl"]["seconds"]) / middle(one["ours"]["seconds"]) for one in rounds]
    gap = max(
        abs(a - b)
        for one in rounds
        for a, b in zip(one["ours"]["losses"], one["trl"]["losses"], strict=True)
    )
    lines = []
    for side in SIDES:
        runs = [one[side] for one in rounds]
        seconds = middle([middle(run["seconds"]) for run in runs])
        rate = runs[0]["tokens_per_step"] / seconds
        share = rate * runs[0]["flop_per_token"] / middle([run["peak_tflops"] for run in runs])
        memory = max(run["memory_gib"] for run in runs)
        price = options.dollars_per_hour
        dollars = f"{1000 * seconds * price / 3600:.2f} $" if price else ""
        ratio = f"{middle(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
        lines.append(
            f"| {row} | {side} | {ratio if side == 'ours' else ''} | {seconds:.3f} s | {rate:.0f} "
            f"| {share / 1e10:.0f} % | {memory:.1f} | {dollars} "
            f"| {f'{gap:.1e}' if side == 'ours' else ''} |"
        )
    print(f"{row}: {rounds[0]['ours']['how']}", file=sys.stderr, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--dataset_repo", type=Path, help="folder of build_unified.py; made posts")
    parser.add_argument("--posts", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--skip", type=int, default=5, help="first steps that count for nothing")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dollars_per_hour", type=float, default=0.0)
    parser.add_argument("--tiny", action="store_true")
    for name in ("side", "row"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("folder", "result"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    import torch

    if options.side:
        one_side(options)
        return
    if not (options.tiny or torch.cuda.is_available()):
        parser.error("there is no GPU here; --tiny shows on any machine that the command works")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, tiny: no figures"
    print(f"{name}, torch {torch.__version__}, {options.rounds} rounds of {options.steps} steps\n")
    head = "model | side | ratio (range) | step | tokens/s | of peak | peak GiB | 1,000 steps"
    print(f"| {head} | largest difference of a loss |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for row in options.only:
        # The large checkpoints are never on the disk together.
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / row
            folder.mkdir()
            rows, _ = write_posts(folder, options.dataset_repo, options.posts)
            save_base(folder / "base", row, rows, options.tiny)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print("\n".join(measure(options, row, Path(scratch))), flush=True)


if __name__ == "__main__":
    main()
