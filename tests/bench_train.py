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
"""Measure train/train.py against `trl sft` defaults, a stock Trainer, the hardware, its own resume.

    uv run tests/bench_train.py --dataset_repo ./hsd-data --encoder ./minilm
    uv run tests/bench_train.py --only llama20 --steps 12
    uv run tests/bench_train.py --only llama20 llama100 --float32    # losses without rounding

--dataset_repo is a folder of datasets/build_unified.py; without it the posts are made ones.
--encoder is a folder with a pretrained encoder; without it one of the same size is drawn.

Both sides are real runs in one process, in threads that take turns step by step: train.py's own
main(), and a trainer with the library's defaults on the same posts, order, LoRA start and learning
rate. A step is everything from the end of the last one: data, forward, backward, optimizer. Times
are CPU time of one thread, which other processes on the machine disturb less than wall time; each
step of ours is divided into the rival's same step, and tables hold medians of these ratios. No
dropout is drawn: losses could not be compared otherwise, and with LoRA dropout the prompt is not
shared (the rows `--share_prompt never`).

Share of peak: 4 x parameters of the body x tokens that are computed (padding is not counted, a
shared prompt once, of the last layer keys and values only) + 4 x head x supervised tokens, over the
rate of a bfloat16 matmul of 1024 x 1024 x 1024 that is measured after each step. Attention is left
out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny import ROOT, load_script, made_posts

ROWS = ("llama20", "llama100", "classify", "resume")
SEED = 42
VOCABULARY = 8192
SIZES = {
    "llama20": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8},
    "llama100": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12},
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# The same for both sides; both see 32 rows a step.
TRAINING: dict[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "logging_steps": 1,
    "seed": SEED,
    "report_to": "none",
}


class Turns:
    """Lets two trainers take turns, step by step, and keeps each step's CPU seconds and loss."""

    def __init__(self, sides: int) -> None:
        self.turn, self.changed = 0, threading.Condition()
        self.waiting = [True] * sides
        self.seconds: list[list[float]] = [[] for _ in range(sides)]
        self.losses: list[list[float]] = [[] for _ in range(sides)]
        self.peaks: list[float] = []

    def wait(self, side: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == side)

    def pass_on(self, side: int, ended: bool = False) -> None:
        with self.changed:
            self.waiting[side] = not ended
            others = [(side + step) % len(self.waiting) for step in range(1, len(self.waiting) + 1)]
            self.turn = next((other for other in others if self.waiting[other]), -1)
            self.changed.notify_all()

    def callback(self, side: int) -> Any:
        from transformers import TrainerCallback

        turns = self

        class Timer(TrainerCallback):
            began = 0.0

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.began = time.process_time()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                turns.seconds[side].append(time.process_time() - self.began)
                turns.peaks.append(matmul_rate())
                turns.pass_on(side)
                turns.wait(side)
                self.began = time.process_time()

            def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
                if "loss" in logs:
                    turns.losses[side].append(logs["loss"])

        return Timer()

    def run(self, sides: list[Callable[[], None]]) -> None:
        """Run all sides to their ends; the first error of one is raised."""
        errors: list[BaseException] = []

        def work(side: int) -> None:
            self.wait(side)
            try:
                sides[side]()
            except BaseException as error:
                errors.append(error)
            finally:
                self.pass_on(side, ended=True)

        threads = [threading.Thread(target=work, args=[side]) for side in range(len(sides))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def matmul_rate(size: int = 1024) -> float:
    """GFLOP/s of a bfloat16 matmul, in CPU time: the best of three."""
    import torch

    left, right = (torch.ones(size, size, dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(3):
        began = time.process_time()
        left @ right
        rates.append(2 * size**3 / (time.process_time() - began) / 1e9)
    return max(rates)


def write_posts(folder: Path, source: Path | None, count: int) -> tuple[list[dict[str, Any]], Any]:
    """Posts with the `simple` prompt as rows of messages, and where classification reads them."""
    build = load_script("datasets/build_unified.py")
    if source:
        train = load_script("train/train.py")
        rows = train.read_rows(train.open_repo(str(source.resolve()), "dataset"), "simple", "train")
        rows = [{"text": row["text"], "label": row["label"], "id": row["id"]} for row in rows]
    else:
        rows = made_posts()
    strategy = build.PROMPTS["simple"]
    user = strategy["user"].replace("{labels}", "normal or hate")
    kept, posts = [], []
    for row in rows[:count]:
        posts.append({"text": row["text"], "label": row["label"]})
        kept.append(
            {
                "messages": [
                    {"role": "system", "content": strategy["system"]},
                    {"role": "user", "content": user.replace("{text}", row["text"])},
                    {"role": "assistant", "content": row["label"]},
                ]
            }
        )
    for name, lines in (("messages.jsonl", kept), ("posts.jsonl", posts)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
    return kept, posts


def save_chat_tokenizer(folder: Path, rows: list[dict[str, Any]]) -> Any:
    """A tokenizer trained on the posts, with a chat template."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [message["content"] for row in rows for message in row["messages"]]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_llama(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """A random Llama whose weights are bfloat16, with a tokenizer trained on the posts."""
    import torch
    import transformers

    save_chat_tokenizer(folder, rows)
    torch.manual_seed(0)
    heads = SIZES[name]["hidden_size"] // 64
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
        **SIZES[name],
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def our_run(turns: Turns, side: int, folder: Path, flags: list[str], seen: dict) -> None:
    """train.py's own main, with a clock; its lines are kept."""
    script = load_script("train/train.py")
    build, choose = script.build_trainer, script.choose_speed

    def build_with_clock(*values: Any, **options: Any) -> Any:
        trainer = build(*values, **options)
        trainer.add_callback(turns.callback(side))
        seen["trainer"] = trainer
        return trainer

    def choose_and_keep(*values: Any, **options: Any) -> None:
        choose(*values, **options)
        seen["speed"] = script.describe_speed(seen["trainer"])
        seen["tokens"] = count_computed(seen["trainer"])

    script.build_trainer, script.choose_speed = build_with_clock, choose_and_keep
    options = [part for name, value in TRAINING.items() for part in (f"--{name}", str(value))]
    try:
        script.main(["--output_dir", str(folder), *options, *flags])
    finally:
        script.build_trainer, script.choose_speed = build, choose


def count_computed(trainer: Any) -> dict[str, float]:
    """Mean tokens and supervised tokens that a step computes, without padding."""
    rows = trainer.train_dataset
    size = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    shared = trainer.speed.prompt_tokens
    lengths = [len(ids) for ids in rows["input_ids"]]
    mean = sum(lengths) / len(lengths)
    labels = rows[0]["labels"]
    answers = sum(label != -100 for label in labels) if isinstance(labels, list) else 0
    return {
        "rows": size * mean,
        "computed": size * (mean - shared) + shared,
        "supervised": size * answers,
    }


def trl_run(
    turns: Turns, side: int, base: Path, rows: list[dict[str, Any]], options: argparse.Namespace
) -> None:
    """What `trl sft` does with its defaults: float32 weights under bfloat16 autocast, padded
    batches, activation checkpointing. With --float32 without autocast.
    """
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    data = Dataset.from_list(
        [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    )
    transformers.set_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as out:
        settings = trl.SFTConfig(
            out,
            **TRAINING,
            max_steps=options.steps,
            bf16=not options.float32,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        lora = LoraConfig(
            r=32,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        trainer = trl.SFTTrainer(
            model,
            args=settings,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[turns.callback(side)],
        )
        trainer.train()


def bench_llama(name: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """Rows (a) and (b) of the table for one model: ours with and without a shared prompt."""
    rows, _ = write_posts(folder, options.dataset_repo, options.posts)
    base = folder / name
    save_llama(base, name, rows)
    sizes = SIZES[name]
    layer = 4 * sizes["hidden_size"] ** 2 + 3 * sizes["hidden_size"] * sizes["intermediate_size"]
    # Keys and values of the last layer's tokens are computed, and next to nothing else of it.
    body = (sizes["num_hidden_layers"] - 1) * layer + 2 * sizes["hidden_size"] ** 2
    lines = []
    for label, flags in (("", []), (" --share_prompt never", ["--share_prompt", "never"])):
        turns, seen = Turns(2), {}
        out = folder / f"{name}{len(lines)}"
        ours = [
            *("--train_file", str(folder / "messages.jsonl"), "--model_name_or_path", str(base)),
            *("--dtype", "float32", "--bf16", str(not options.float32), "--lora_dropout", "0"),
            *("--max_steps", str(options.steps)),
            *("--save_steps", "1000", "--save_minutes", "1000", "--early_stopping_patience", "0"),
            *flags,
        ]
        turns.run(
            [
                lambda ours=ours, out=out, turns=turns, seen=seen: our_run(
                    turns, 0, out, ours, seen
                ),
                lambda turns=turns: trl_run(turns, 1, base, rows, options),
            ]
        )
        mine, theirs = (seconds[options.skip :] for seconds in turns.seconds)
        ratios = [rival / own for own, rival in zip(mine, theirs, strict=True)]
        gap = max(abs(a - b) for a, b in zip(*turns.losses, strict=True))
        tokens = seen["tokens"]
        flop = 4 * body * tokens["computed"]
        flop += 4 * VOCABULARY * sizes["hidden_size"] * tokens["supervised"]
        shares = [
            flop / own / 1e9 / rate
            for own, rate in zip(mine, turns.peaks[2 * options.skip :: 2], strict=False)
        ]
        median = statistics.median
        lines.append(
            f"| {name}{label} | `trl sft` defaults | {median(ratios):.2f}x "
            f"({min(ratios):.2f}-{max(ratios):.2f}) | {100 * median(shares):.0f} % | "
            f"{median(mine):.2f} / {median(theirs):.2f} s | {tokens['rows'] / median(mine):.0f} | "
            f"{gap:.1e} |"
        )
        print(f"{lines[-1]}\n  {seen['speed']}", file=sys.stderr, flush=True)
    return lines


def trainer_run(
    turns: Turns, side: int, base: Path, posts: list[dict[str, Any]], steps: int, padding: Any
) -> None:
    """A stock Trainer with the same LoRA; `padding` is what the tokenizer or the collator does."""
    import peft
    import transformers
    from datasets import Dataset

    labels = ["normal", "hate"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    encoded = tokenizer(
        [post["text"] for post in posts], truncation=True, max_length=512, padding=padding
    )
    data = Dataset.from_dict(
        {**encoded, "labels": [labels.index(post["label"]) for post in posts]}
    ).remove_columns("token_type_ids")
    transformers.set_seed(SEED)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    lora = peft.LoraConfig(
        r=32, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="SEQ_CLS"
    )
    with tempfile.TemporaryDirectory() as out:
        settings = transformers.TrainingArguments(
            out, **TRAINING, max_steps=steps, use_cpu=True, save_strategy="no", disable_tqdm=True
        )
        trainer = transformers.Trainer(
            peft.get_peft_model(model, lora),
            settings,
            train_dataset=data,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            callbacks=[turns.callback(side)],
        )
        trainer.model_accepts_loss_kwargs = False
        trainer.train()


def save_encoder(folder: Path, source: Path | None, posts: list[dict[str, Any]]) -> None:
    """The encoder without dropout: losses could not be compared otherwise."""
    import transformers

    if source:
        shutil.copytree(source, folder, dirs_exist_ok=True)
    else:
        rows = [{"messages": [{"content": post["text"]}]} for post in posts]
        save_llama(folder, "llama20", rows)
        (folder / "model.safetensors").unlink()
        config = transformers.BertConfig(
            vocab_size=30522,
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=6,
            num_attention_heads=12,
        )
        transformers.BertModel(config).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))


def bench_classify(options: argparse.Namespace, folder: Path) -> list[str]:
    """Row (c): a classifier on an encoder, against both ways of padding."""
    _, posts = write_posts(folder, options.dataset_repo, options.posts)
    base = folder / "encoder"
    save_encoder(base, options.encoder, posts)
    ours = [
        *("--task", "classify", "--train_file", str(folder / "posts.jsonl")),
        *("--model_name_or_path", str(base), "--lora_target_modules", "all-linear"),
        *("--lora_dropout", "0", "--max_steps", str(options.steps), "--save_steps", "1000"),
        *("--save_minutes", "1000", "--early_stopping_patience", "0"),
    ]
    turns, seen = Turns(3), {}
    paddings = ["max_length", False]
    turns.run(
        [
            lambda: our_run(turns, 0, folder / "classifier", ours, seen),
            *(
                lambda side=side, padding=padding: trainer_run(
                    turns, side, base, posts, options.steps, padding
                )
                for side, padding in enumerate(paddings, start=1)
            ),
        ]
    )
    lines = []
    mine = turns.seconds[0][options.skip :]
    for side, name in ((1, "Trainer, padding max_length 512"), (2, "Trainer, dynamic padding")):
        theirs = turns.seconds[side][options.skip :]
        ratios = [rival / own for own, rival in zip(mine, theirs, strict=True)]
        gap = max(abs(a - b) for a, b in zip(turns.losses[0], turns.losses[side], strict=True))
        lines.append(
            f"| encoder, classify | {name} | {statistics.median(ratios):.2f}x "
            f"({min(ratios):.2f}-{max(ratios):.2f}) | | {statistics.median(mine):.2f} / "
            f"{statistics.median(theirs):.2f} s | "
            f"{seen['tokens']['rows'] / statistics.median(mine):.0f} | {gap:.1e} |"
        )
    print("\n".join(lines), seen["speed"], sep="\n  ", file=sys.stderr, flush=True)
    return lines


FIRST_STEP = """
import sys, time
sys.path.insert(0, sys.argv[1])
from tiny import load_script
from transformers import TrainerCallback
script = load_script("train/train.py")
build, choose = script.build_trainer, script.choose_speed
class First(TrainerCallback):
    def on_step_end(self, *_, **__):
        if self.left is not None:
            print("FIRST", time.process_time(), self.left, flush=True)
            self.left = None
first = First()
def build_with_clock(*values, **options):
    trainer = build(*values, **options)
    trainer.add_callback(first)
    return trainer
def choose_with_clock(*values, **options):
    began = time.process_time()
    choose(*values, **options)
    first.left = time.process_time() - began
script.build_trainer, script.choose_speed = build_with_clock, choose_with_clock
script.main(sys.argv[2:])
"""


def bench_resume(options: argparse.Namespace, folder: Path) -> list[str]:
    """Row (d): CPU seconds from the start of a process to the end of its first step."""
    rows, _ = write_posts(folder, options.dataset_repo, options.posts)
    base = folder / "llama20"
    save_llama(base, "llama20", rows)

    def first_step(out: Path, steps: int) -> tuple[float, float]:
        flags = [
            *("--train_file", str(folder / "messages.jsonl"), "--model_name_or_path", str(base)),
            *("--output_dir", str(out), "--max_steps", str(steps), "--save_steps", "1000"),
            *("--early_stopping_patience", "0", "--report_to", "none"),
        ]
        done = subprocess.run(
            [sys.executable, "-c", FIRST_STEP, str(ROOT / "tests"), *flags],
            capture_output=True,
            text=True,
            check=True,
        )
        line = next(line for line in done.stdout.splitlines() if line.startswith("FIRST "))
        _, total, measuring = line.split()
        return float(total), float(measuring)

    plain, measured, resumed = [], [], []
    for pair in range(options.pairs):
        out = folder / f"resume{pair}"
        total, measuring = first_step(out, 2)
        plain.append(total)
        measured.append(measuring)
        # The run is extended: its newest checkpoint is that of step 2.
        resumed.append(first_step(out, 3)[0])
    ratios = [100 * (again / once - 1) for again, once in zip(resumed, plain, strict=True)]
    bare = [
        100 * (again / (once - spent) - 1)
        for again, once, spent in zip(resumed, plain, measured, strict=True)
    ]
    median = statistics.median
    line = (
        f"| resume, llama20 | plain run's first step | {median(ratios):+.0f} % "
        f"({min(ratios):+.0f} to {max(ratios):+.0f}); without the {median(measured):.1f} s that "
        f"only the plain run measures {median(bare):+.0f} % | | {median(resumed):.1f} / "
        f"{median(plain):.1f} s | | |"
    )
    print(line, file=sys.stderr, flush=True)
    return [line]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--dataset_repo", type=Path)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--posts", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skip", type=int, default=2, help="first steps that count for nothing")
    parser.add_argument("--float32", action="store_true", help="both sides, of the Llamas")
    parser.add_argument("--pairs", type=int, default=3, help="of the row resume")
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.only:
            folder = Path(scratch) / name
            folder.mkdir()
            with contextlib.redirect_stdout(io.StringIO()):
                if name in SIZES:
                    lines += bench_llama(name, options, folder)
                elif name == "classify":
                    lines += bench_classify(options, folder)
                else:
                    lines += bench_resume(options, folder)
    head = "ours | against | median (range) | share of bf16 peak | step, ours / theirs"
    print(f"| {head} | tokens/s of the rows | largest difference of a loss |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
