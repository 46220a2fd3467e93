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
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "transformers==5.23.0",
#     "trl==1.16.0",
#     "wandb==0.31.0",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-20T00:00:00Z"
#
# [tool.hf-jobs]
# flavor = "a100-large"
# timeout = "4h"
# name = "hsd-train"
# secrets = ["HF_TOKEN"]
# env = { HSD_STOP_AFTER = "3h50m" }
# ///
"""Fine-tune a LoRA adapter that labels hate speech; resubmit the same command to resume.

Reads:  DATASET_REPO (of datasets/build_unified.py, default {you}/hsd-data, or any of messages, of
        prompt and completion, or of text and label) or a local --train_file of such rows, and the
        base model at a pinned revision.
Writes: HUB_MODEL_ID (private, default {you}/hsd-lora): checkpoint-N/ at every save, and at the end
        the adapter, tokenizer, contract.json and model card at its root.

    hf jobs uv run --flavor a100-large train/train.py
    hf jobs uv run --flavor l4x1 train/train.py --model_name_or_path HuggingFaceTB/SmolLM2-360M

The same command again continues from the newest complete checkpoint of the repo, on any machine,
as if nothing had happened; after the end it says so and does nothing. SIGTERM, a hang-up, Ctrl-C
and the deadline (--stop_after) save, push and end with exit code 75. --output_dir without
--hub_model_id is a local run that needs no network and no token. Every further field of
trl.SFTConfig (with --task classify: of transformers.TrainingArguments) is accepted as a flag, for
example --optim paged_adamw_8bit.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import difflib
import errno
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

SCRIPT = "train/train.py"
SCHEMA = 1
CONTRACT = "contract.json"
# Variables with these names are read as they stand; every other flag is HSD_<FLAG>, because an
# unprefixed SEED or TASK in somebody's shell must not change an audited run.
PLAIN_VARIABLES = ("DATASET_REPO", "HUB_MODEL_ID", "MAX_STEPS")
MANIFEST = "manifest.json"
RUN_LOG = "training.log"
LOGGERS = "loggers.json"
PAUSED = 75  # EX_TEMPFAIL: the same command again continues
# Seconds since the epoch; of processes that `start_processes` has made, that one's.
PROCESS_START = float(os.environ.get("TRAIN_STARTED") or time.time())
# What torchrun sets; a plain start is one process.
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
RESUMED = ".resumed"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CARD_TITLE = "# Hate-speech detector: LoRA adapter for"
FINISH = "Finish at step"  # the commits at which an adapter stands at the root
# Log-likelihood: kernels may round otherwise from call to call, lost weights show at once.
PROBE_TOLERANCE = 1e-3
# What a run writes into its folder, beside files that may be the user's.
RUN_FILES = (
    *("checkpoint-*", "adapter_*", "tokenizer*", "special_tokens_map.json", "chat_template.jinja"),
    *("README.md", CONTRACT, RUN_LOG, RESUMED, "runs", "*_results.json"),
)
# What a run shows its tokenizer and template to prove that they are those of another run.
PROBE_POST = "My neighbours moved in last week, said <|endoftext|> nobody. 42 % é \u4f60\u597d"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
LABELS, POSITIVE_LABEL = ["normal", "hate"], "hate"
LORA_TARGETS, LORA_DROPOUT = ["q_proj", "v_proj"], 0.05
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "high_capacity": {"lora_r": 64, "num_train_epochs": 5},
    "memory_efficient": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "max_length": 256,
    },
    "quick_test": {"num_train_epochs": 1, "lora_r": 16, "early_stopping_patience": 0},
    # 100 steps of a small model, for the smallest GPU: hf jobs uv run --flavor t4-small ...
    "first_run": {
        "model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "run_name": "first-run",
        "max_steps": 100,
        "max_length": 256,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 0.1,
        "learning_rate": 1e-3,
        "lora_r": 16,
        "save_steps": 50,
        "early_stopping_patience": 0,
    },
    # FP8 on the Hub; --load_in_4bit makes NF4 of it through a copy in bfloat16.
    "ministral_qlora": {
        "model_name_or_path": "mistralai/Ministral-3-3B-Instruct-2512",
        "run_name": "ministral",
        "load_in_4bit": True,
        "lora_target_modules": ["all-linear"],
        "learning_rate": 1e-4,
        "warmup_steps": 0.05,
        "lr_scheduler_type": "cosine",
        "sample_steps": 100,
    },
    # The recipe of the source: LoRA on GPT-2, one epoch, the last weights.
    "gpt2_twitter": {
        "model_name_or_path": "openai-community/gpt2",
        "dataset_repo": "{you}/hsd-twitter",
        "run_name": "gpt2-twitter",
        "task": "classify",
        "learning_rate": 2.5e-5,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "early_stopping_patience": 0,
    },
}
# Names that the libraries dropped and that users' commands and config files still hold.
ALIASES = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "gradient_checkpointing": "activation_checkpointing",
    "save_total_limit": "keep_checkpoints",
}
# Fields that this script decides itself: accepted in a config file, printed and left out.
DECIDED_HERE = {
    "push_to_hub": "checkpoints are pushed to --hub_model_id",
    "hub_strategy": "checkpoints are pushed to --hub_model_id",
    "hub_private_repo": "repos are created private",
    "hub_always_push": "every checkpoint is pushed",
    "resume_from_checkpoint": "the newest complete checkpoint is found by itself",
    "overwrite_output_dir": "a finished or half-finished run is never overwritten",
    "logging_dir": "logs lie below --output_dir",
    "remove_unused_columns": "the data is already tokenised",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
}
# What a resumed run does with arguments that differ from those it began with, by their names in
# contract.json. A trainer field that is not named here must be equal too: otherwise the result
# would not be the one of a run that was never interrupted.
EQUAL, FREE, NEW = "must be equal", "may change", "takes the new value"
RESUME_RULES = {
    **dict.fromkeys(
        (
            *("dataset_repo", "dataset_config", "train_file", "validation_file", "max_length"),
            *("model_name_or_path", "model_revision", "task", "dtype", "reasoning_effort"),
            *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit"),
            *("bnb_4bit_quant_type", "learning_rate", "per_device_train_batch_size"),
            *("gradient_accumulation_steps", "warmup_steps", "weight_decay"),
            *("max_grad_norm", "lr_scheduler_type", "seed", "early_stopping_patience"),
            *("early_stopping_threshold", "calibration_fraction", "save_steps"),
            *("metric_for_best_model", "reweight", "sampler"),
            *("attn_implementation", "share_prompt", "fsdp"),
            *("lora_target_parameters", "class_weights", "labels", "positive_label"),
        ),
        EQUAL,
    ),
    # The user's wish, and printed: a longer run has another schedule from here on, another
    # evaluation batch another mean of batch means.
    **dict.fromkeys(
        (
            *("num_train_epochs", "max_steps", "per_device_eval_batch_size", "logging_steps"),
            "world_size",  # the same rows in each step, shared otherwise
            "activation_checkpointing",  # the same numbers in less memory
            "auto_batch",  # the same rows in each step; halved, their sums round otherwise
        ),
        FREE,
    ),
    # Of this start alone.
    **dict.fromkeys(
        (
            *("hub_model_id", "run_name", "output_dir", "save_minutes", "keep_checkpoints"),
            *("report_to", "stop_after", "hub_patience", "fresh", "relay", "budget"),
            *("reclaim_storage", "squash_history", "config_file", "preset", "allow_public"),
            *("allow_cpu", "dataloader_num_workers", "dataloader_pin_memory"),
            *("dataloader_prefetch_factor", "dataloader_persistent_workers", "log_level"),
            *("disable_tqdm", "logging_first_step", "sample_steps", "log_text"),
            *("num_processes", "nnodes", "node_rank", "master_addr", "master_port"),
            "ddp_timeout",
        ),
        NEW,
    ),
}
# Documented flags that are fields of the trainer's config by the same name.
TRAINER_FLAGS = (
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("per_device_eval_batch_size", "gradient_accumulation_steps", "warmup_steps"),
    *("weight_decay", "max_grad_norm", "lr_scheduler_type", "seed", "save_steps"),
    *("logging_steps", "report_to", "run_name"),
)
# Not pushed: training_args.bin is a pickle that nothing reads, README.md is PEFT's empty card.
UNPUSHED = {"training_args.bin", "README.md"}
MOST_LABELS = 20  # more different answers are no labels
DATA_FORMS = (
    "A row is one of: `messages` that end with the user's and the assistant's; `prompt` and "
    "`completion`, each text or a list of messages; `text` and `label`. Other columns: "
    "datasets/build_custom.py makes a dataset of them."
)
# What a base in four bits keeps whole: heads, of which a new one is trained, and the parts of a
# vision-language model that no post passes through. The library wants beginnings or ends of names.
WHOLE_MODULES = ["classifier", "score", "lm_head", "model.vision_tower"]
WHOLE_MODULES += ["model.multi_modal_projector"]
# Also the strategy of a local training file of posts, which brings no prompt of its own.
INSTRUCTION = {
    "description": "instruction, post and classification under headings; needs no chat template",
    "system": "",
    "user": (
        "### Instruction:\nDecide whether the post is hate speech: an attack on people, or a call "
        "for one, because of a group they belong to. Reporting, quoting in order to object, and "
        "plain mentions of a group are no hate speech. Answer {labels}.\n\n"
        "### Post:\n{text}\n\n### Classification:"
    ),
    "answer": "{label}",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The documented flags, plus every field of the trainer's config read from its source."""
    parser = Parser(prog=SCRIPT, description=__doc__)
    add_training_flags(parser)
    add_run_flags(parser)
    fields = add_trainer_fields(parser)
    args = resolve_arguments(parser, argv, PRESETS, ALIASES)
    args.trainer_fields = {name: vars(args).pop(name) for name in fields & vars(args).keys()}
    if args.report_to is None:
        args.report_to = ["wandb", "tensorboard"] if args.output_dir else ["wandb"]
    for name in args.trainer_fields.keys() & DECIDED_HERE.keys():
        print(f"--{name} has no effect: {DECIDED_HERE[name]}", flush=True)
        del args.trainer_fields[name]
    if vars(args).pop("group_by_length"):
        print("--group_by_length is now --train_sampling_strategy group_by_length", flush=True)
        args.trainer_fields["train_sampling_strategy"] = "group_by_length"
    return args


def add_training_flags(parser: Parser) -> None:
    """The flags that say what is trained, on what, and how."""
    switch = {"type": boolean, "nargs": "?", "const": True, "default": False}
    flag = parser.add_argument_group("data").add_argument
    flag("--dataset_repo", help="Hub id[@revision] or folder ({you}/hsd-data)")
    flag("--dataset_config", help="prompt strategy (simple); with --task classify: unified")
    flag("--train_file", help="JSONL of posts or prompts (README) instead of a dataset repo")
    flag("--validation_file", help="the same for evaluation during training")
    flag(
        *("--labels",),
        nargs="+",
        help="of data without contract.json (normal hate, else its own), whose numbers are places "
        "in this list, from 0, unless a label is a number",
    )
    flag("--positive_label", help="the one that bias is measured for (hate)")
    flag("--max_length", type=int, default=512, help="tokens; a longer post is cut, no prompt")
    flag = parser.add_argument_group("model").add_argument
    flag("--model_name_or_path", default="openai/gpt-oss-20b", help="Hub id or folder")
    flag("--model_revision", help="branch, tag or commit of the base model (main)")
    flag("--task", choices=["causal", "classify"], default="causal")
    flag("--lora_r", type=int, default=32)
    flag("--lora_alpha", type=int, default=32)
    flag("--lora_dropout", type=float, default=LORA_DROPOUT)
    flag("--lora_target_modules", nargs="+", default=LORA_TARGETS)
    flag(
        *("--lora_target_parameters",),
        nargs="+",
        help="experts too, as mlp.experts.gate_up_proj mlp.experts.down_proj (gpt-oss)",
    )
    flag("--load_in_4bit", **switch, help="QLoRA: the base quantised to four bits, twice")
    flag("--bnb_4bit_quant_type", choices=["nf4", "fp4"], default="nf4")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    flag("--reasoning_effort", default="low", help="written into prompts that have one (gpt-oss)")
    flag = parser.add_argument_group("training").add_argument
    flag("--learning_rate", type=float, default=2e-4)
    flag("--num_train_epochs", type=float, default=3.0)
    flag("--max_steps", type=int, default=-1, help="-1: --num_train_epochs decides")
    flag("--per_device_train_batch_size", type=int, default=4)
    flag("--per_device_eval_batch_size", type=int, default=8)
    flag("--gradient_accumulation_steps", type=int, default=4)
    flag("--warmup_steps", type=float, default=100.0, help="below 1: the share of all steps")
    flag("--weight_decay", type=float, default=0.01)
    flag("--max_grad_norm", type=float, default=1.0)
    flag("--lr_scheduler_type", default="cosine")
    flag("--early_stopping_patience", type=int, default=2, help="0: off, the last weights stay")
    flag("--early_stopping_threshold", type=float, default=0.01)
    flag(
        *("--metric_for_best_model",),
        default="eval_loss",
        help=f"chooses the weights and stops early: {', '.join(SELECTABLE)}",
    )
    flag(
        *("--reweight",),
        choices=["none", "group_label"],
        default="none",
        help="loss weight of a post: inverse to the number of those of its groups and label",
    )
    flag(
        *("--sampler",),
        choices=["shuffle", "group_balanced"],
        default="shuffle",
        help="group_balanced: each epoch draws all combinations of groups and label equally often",
    )
    flag(
        *("--calibration_fraction",),
        type=float,
        default=0.5,
        help="of the validation posts, kept from early stopping for eval/calibrate.py",
    )
    flag(
        *("--class_weights",),
        default="none",
        help="of --task classify: balanced, none, or LABEL=W,LABEL=W",
    )
    flag("--seed", type=int, default=42)
    flag = parser.add_argument_group("speed").add_argument
    flag(
        *("--auto_batch",),
        **switch,
        help="the largest micro-batch that fits, halved when memory ends; same rows per step",
    )
    flag("--attn_implementation", default="auto", help="sdpa, eager, flash_attention_2, ...")
    flag(
        *("--share_prompt",),
        choices=["auto", "always", "never"],
        default="auto",
        help="compute what all rows begin with once a step; auto: where no dropout is drawn",
    )


def add_run_flags(parser: Parser) -> None:
    """The flags of a start: where its state lies, what it tells, and on how many machines."""
    switch = {"type": boolean, "nargs": "?", "const": True, "default": False}
    flag = parser.add_argument_group("state and logs").add_argument
    flag("--hub_model_id", help="adapter repo ({you}/hsd-lora)")
    flag("--run_name", help="name of the W&B run and of the adapter repo ({you}/hsd-RUN_NAME)")
    flag("--output_dir", help="folder; without --hub_model_id a local run, with no network")
    flag("--save_steps", type=int, default=100, help="between checkpoints and evaluations")
    flag("--save_minutes", type=float, default=10.0, help="a checkpoint at the latest after this")
    flag("--keep_checkpoints", type=int, default=2, help="on the Hub, beside the best one")
    flag("--stop_after", type=duration, help="save, push and pause in time for this (3h50m, 90s)")
    flag("--hub_patience", type=duration, default=600.0, help="wait at the end for an absent Hub")
    flag("--fresh", **switch, help="start over in the same repo; the old state gets a git tag")
    flag("--relay", type=int, default=0, help="at the deadline rerun this Job, at most N times")
    flag("--budget", type=float, help="dollars that all Jobs of a relay may cost together")
    flag("--reclaim_storage", **switch, help="at the end delete removed checkpoints for good")
    flag("--squash_history", **switch, help="make the checkpoints' history one commit at the end")
    flag("--logging_steps", type=int, default=10)
    flag("--sample_steps", type=int, default=100, help="between sample answers; 0: none")
    flag("--log_text", **switch, help="samples are validation posts; the log is then pushed too")
    flag(
        *("--report_to",),
        nargs="+",
        help="wandb (offline without its key), with --output_dir tensorboard too (its runs/); none",
    )
    flag("--config_file", help="JSON or YAML file of these flags")
    flag("--preset", default="default", help=", ".join(PRESETS))
    flag("--allow_public", **switch, help="push to a repo that is public")
    flag("--allow_cpu", **switch, help="train a model of more than 2B parameters without a GPU")
    flag = parser.add_argument_group("several GPUs and machines").add_argument
    flag("--num_processes", type=int, help="on this machine (one for each GPU)")
    flag("--nnodes", type=int, default=1, help="machines, of which each is told:")
    flag("--node_rank", type=int, help="which of them it is, from 0")
    flag("--master_addr", help="host name or address of machine 0")
    flag("--master_port", type=int, default=29500, help="a free port of machine 0")
    flag(
        *("--fsdp",),
        type=sharding,
        nargs="?",
        const="always",
        default="auto",
        help="always, never; auto: shard a base over the GPUs that no single one can hold",
    )
    flag("--group_by_length", **switch | {"help": argparse.SUPPRESS})


def add_trainer_fields(parser: Parser) -> set[str]:
    """Add the remaining fields of SFTConfig and TrainingArguments as flags; return their names.

    Names and types are read from the classes' source: importing them takes ten seconds.
    """
    documented = {action.dest for action in parser._actions}
    taken = set(documented)
    for package, file in (
        ("trl", "trainer/sft_config.py"),
        ("trl", "trainer/base_config.py"),
        ("transformers", "training_args.py"),
    ):
        folder = PathFinder.find_spec(package).submodule_search_locations[0]
        tree = ast.parse((Path(folder) / file).read_text(encoding="utf-8"))
        settings = [
            setting
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Arguments"))
            for setting in node.body
            if isinstance(setting, ast.AnnAssign) and isinstance(setting.target, ast.Name)
        ]
        for setting in settings:
            # A token never comes from a flag: it would stand in job pages and in the contract.
            secret = setting.target.id.startswith("_") or setting.target.id.endswith("_token")
            if setting.target.id not in taken and not secret:
                taken.add(setting.target.id)
                parser.add_argument(
                    f"--{setting.target.id}",
                    help=argparse.SUPPRESS,
                    default=argparse.SUPPRESS,
                    **field_type(ast.unparse(setting.annotation)),
                )
    for name in sorted(DECIDED_HERE.keys() - taken):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    return (taken | DECIDED_HERE.keys()) - documented


def field_type(annotation: str) -> dict[str, Any]:
    """argparse options for a field of the trainer's config, from its annotation's text."""
    if annotation.startswith("bool"):
        return {"type": boolean, "nargs": "?", "const": True}
    if "dict" in annotation:
        return {"type": json_or_text}
    if "list" in annotation:
        return {"nargs": "+"}
    for name, kind in (("float", float), ("int", int)):
        if annotation.startswith(name):
            return {"type": kind}
    return {}


def json_or_text(text: str) -> Any:
    """A JSON object as such; anything else is the path of one, which the trainer reads."""
    return json.loads(text) if text.lstrip().startswith("{") else text


def main(argv: list[str] | None = None) -> None:
    quiet_libraries()
    stop = Stop()
    with stop.listening(), steady_output(), as_one_of_several(stop):
        train(argv, stop)


def train(argv: list[str] | None, stop: Stop) -> None:
    """One start of a run: everything that can be refused is, before a weight is downloaded."""
    phases = Phases()
    # What is to say of the arguments, the process that starts the others has said.
    with contextlib.ExitStack() as stack:
        if LAUNCH in os.environ:
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        args = parse_args(argv)
        say_processes()
        check_training_arguments(args)
        check_loggers(args)
    start_processes(args, argv)
    join_processes(args)
    store = open_store(args)
    job = read_job(store)
    check_money(args, job)
    earlier, finished = None, False
    if RANK == 0 and (earlier := read_earlier(args, store, job)):
        finished = is_finished(args, store, earlier)
    earlier, finished = broadcast((earlier, finished))
    if finished:
        return
    data = read_data(args, earlier)
    calibration = hold_back(args, data, earlier)
    check_validation(args, data)
    warn_of_one_label(data)
    base = open_base(args, earlier)
    config = read_base_config(base)
    check_encoder(args, base, config)
    device = check_device(count_parameters(config), args.allow_cpu, training_job(argv))
    check_positions(args, base, config)
    precision = choose_precision(args, device, earlier)
    tokenizer = load_tokenizer(base)
    contract = build_contract(args, data, base, tokenizer, precision, earlier)
    contract["training"] |= calibration | {
        "optimizer": choose_optimizer(args, device, earlier),
        "class_weights": class_weights(args, data),
        "cells": record_cells(args, data),
    }
    contract = broadcast(contract)
    rows = encode_rows(args, data, tokenizer, contract)
    shared = share_batch(args, contract, earlier)
    sharded = choose_sharding(args, config, device, contract, earlier)
    settings = build_settings(
        shared, config, device, precision, bool(data.validation), store.folder
    )
    check_devices(settings)
    if optimizer := contract["training"]["optimizer"]:
        settings.optim = optimizer
    if sharded:
        shard(args, settings)
    quantization = build_quantization(args, base, config, precision)
    phases.enter("download")
    checkpoint = None
    if RANK == 0:
        store.claim(contract, job, args)
        checkpoint = store.fetch_checkpoint(contract)
    checkpoint = broadcast(checkpoint)
    share_checkpoint(checkpoint)
    fetch_base(base)
    phases.enter("load")
    place = "cpu" if sharded else device  # No single GPU may hold it.
    model = build_model(args, base, config, data.labels, place, precision, quantization)
    if sharded:
        name_layers(model)
    weights = contract["training"]["class_weights"]
    trainer = build_trainer(args, settings, model, base, tokenizer, rows, weights)
    warn_of_warmup(settings, len(rows[0]))
    if args.task == "causal":
        check_kept_labels(trainer, rows[0])
        check_causality(trainer, base)
    phases.enter("measure")
    choose_speed(args, trainer, contract, checkpoint is not None)
    balance_rows(args, trainer, data.train)
    run = Run(args, store, contract, stop, phases, job, checkpoint)
    run.watch = build_watch(args, trainer, tokenizer, data, contract, run.announce)
    run.meter = Meter(trainer, config, precision, job, contract["training"]["relay"]["spent_usd"])
    run.follow(trainer)
    run.watch.reached = open_loggers(args, trainer, contract, checkpoint)
    phases.enter("train")
    run.train(trainer)
    if RANK == 0:
        phases.enter("push")
        finish(run, trainer, tokenizer)
        shutil.rmtree(store.folder / RESUMED, ignore_errors=True)
        if not args.output_dir:
            shutil.rmtree(store.folder, ignore_errors=True)
    elif trainer.is_fsdp_enabled:
        assist_finish(run, trainer, tokenizer)


# --- arguments and state ---------------------------------------------------------------------


def say_processes() -> None:
    """Say how many processes accelerate has started: where it made one of several, nothing fails.

    `accelerate launch --num_processes 2` starts a single one with --cpu, and where there is no GPU
    and no --multi_gpu (accelerate 1.15).
    """
    # accelerate launch sets it in each process that it starts.
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return
    if WORLD_SIZE > 1:
        print(f"accelerate launch: {WORLD_SIZE} processes", flush=True)
    else:
        print(
            "accelerate launch: 1 process. With --cpu, or without GPUs, it starts one whatever "
            "--num_processes says, unless --multi_gpu is said too; torchrun --nproc-per-node N "
            "train/train.py starts N.",
            flush=True,
        )


def duration(text: str) -> float:
    """Read 3h50m, 90s, 1.5h or plain seconds; return seconds."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms]?)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 3h50m or 90s")
    return sum(float(n) * {"d": 86400, "h": 3600, "m": 60}.get(u, 1) for n, u in parts)


def check_training_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is opened."""
    if args.train_file and args.dataset_repo == PRESETS[args.preset].get("dataset_repo"):
        args.dataset_repo = None
    if args.train_file and args.dataset_repo in environment_values("DATASET_REPO"):
        print(f"--train_file beats DATASET_REPO={args.dataset_repo} of the environment", flush=True)
        args.dataset_repo = None
    if args.train_file and args.dataset_repo:
        fail("--train_file and --dataset_repo are both given; name one source of training data.")
    if args.validation_file and not args.train_file:
        fail("--validation_file goes with --train_file; a dataset repo brings its own split.")
    if args.keep_checkpoints < 1 or args.save_steps < 1 or args.save_minutes <= 0:
        fail("--keep_checkpoints and --save_steps must be at least 1, --save_minutes above 0.")
    if args.max_steps == 0 or args.num_train_epochs <= 0:
        fail("there is nothing to train: --max_steps is 0 or --num_train_epochs is not positive.")
    check_model_arguments(args)
    check_processes(args)
    check_selection(args)
    check_balance(args)
    if args.sample_steps < 0:
        fail(f"--sample_steps {args.sample_steps} is negative; 0 shows no samples.")
    local = args.output_dir and not args.hub_model_id
    if not 0 <= args.calibration_fraction < 1:
        fail(f"--calibration_fraction {args.calibration_fraction} is not from 0 to below 1.")
    if local and not (args.dataset_repo or args.train_file):
        fail("a local run needs --dataset_repo (an id or a folder) or --train_file.")
    if local and (args.relay or args.reclaim_storage or args.squash_history):
        fail("--relay, --reclaim_storage and --squash_history need a repo: give --hub_model_id.")
    if args.hub_model_id and is_folder(args.hub_model_id):
        fail(f"--hub_model_id {args.hub_model_id} is a folder; say --output_dir for a local run.")


def check_model_arguments(args: argparse.Namespace) -> None:
    """Refuse flags of the model that contradict each other."""
    if args.class_weights != "none" and args.task != "classify":
        fail("--class_weights is of --task classify: a language model is trained on answers.")
    if args.class_weights != "none" and args.trainer_fields.get("label_smoothing_factor"):
        fail("--class_weights weighs the plain cross-entropy: leave --label_smoothing_factor out.")
    if not args.lora_target_parameters or not args.lora_dropout:
        return
    if args.lora_dropout != LORA_DROPOUT:
        fail(
            "--lora_target_parameters needs --lora_dropout 0: PEFT adapts the weight itself, where "
            f"no dropout of its input can be. It is {args.lora_dropout}."
        )
    print("--lora_target_parameters: lora_dropout is 0, since PEFT allows no other", flush=True)
    args.lora_dropout = 0.0


def environment_values(name: str) -> list[str]:
    """What the environment says for a flag, by either of its names."""
    found = (os.environ.get(variable) for variable in (name, f"HSD_{name}"))
    return [value for value in found if value]


class SteadyStream:
    """A terminal or pipe that may go away: what can no longer be shown does not end the run."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """Write to nowhere from now on; else the interpreter's last flush changes the exit code."""
        if error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):
            raise error
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Outlive the terminal, and let only the first process of a torchrun start print."""
    with contextlib.ExitStack() as stack:
        stdout = sys.stdout
        if RANK:
            stdout = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(SteadyStream(stdout)))
        stack.enter_context(contextlib.redirect_stderr(SteadyStream(sys.stderr)))
        yield


def broadcast(value: Any) -> Any:
    """What the first process knows, in every process of a torchrun start."""
    if WORLD_SIZE == 1:
        return value
    import torch
    from torch import distributed

    box = [value]
    distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


class TakenOver(Exception):
    """Another start has claimed the repo since ours."""


@dataclass
class Store:
    """Where a run's state lives: a private Hub repo, or only `folder` (`repo` is then None).

    With a repo the Hub is the truth and `folder` is this machine's working copy. `head` is the
    commit that ours must follow, `tree` the size and, of an LFS file, the SHA-256 of everything
    there, and `holder` the claim's token that the contract at the head must still carry.
    """

    repo: str | None
    folder: Path
    head: str | None = None
    tree: dict[str, tuple[int, str | None]] = field(default_factory=dict)
    holder: str | None = None

    @property
    def name(self) -> str:
        return self.repo or str(self.folder)

    def say(self, message: str) -> None:
        """Print a line and keep it in training.log, which goes to the repo with each checkpoint."""
        print(message, flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / RUN_LOG).open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {message}\n")

    def look(self) -> dict[str, Any] | None:
        """List everything at the head, once, and return its contract; None where there is none."""
        if self.repo is None:
            files = [path for path in self.folder.rglob("*") if path.is_file()]
            self.tree = {
                path.relative_to(self.folder).as_posix(): (path.stat().st_size, None)
                for path in files
            }
        else:
            from huggingface_hub import HfApi
            from huggingface_hub.errors import RepositoryNotFoundError
            from huggingface_hub.hf_api import RepoFile

            api = HfApi()
            try:
                self.head = api.repo_info(self.repo).sha
            except RepositoryNotFoundError:
                return None
            self.tree = {
                item.path: (item.size, item.lfs.sha256 if item.lfs else None)
                for item in api.list_repo_tree(self.repo, recursive=True, revision=self.head)
                if isinstance(item, RepoFile)
            }
        if CONTRACT not in self.tree:
            return None
        self.download([CONTRACT])
        return read_contract(Repo(self.name, "model", self.head, self.folder), "adapter")

    def download(self, names: list[str]) -> None:
        """Bring files of the head into `folder`; a request that fails is made three times."""
        if self.repo is None:
            return
        from huggingface_hub import hf_hub_download

        self.folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.folder) as scratch, ThreadPoolExecutor(8) as pool:

            def fetch(name: str) -> None:
                hf_hub_download(self.repo, name, revision=self.head, local_dir=scratch)
                (self.folder / name).parent.mkdir(exist_ok=True)
                (Path(scratch) / name).replace(self.folder / name)

            def attempt(name: str) -> None:
                retried(f"download {name} of {self.repo}", lambda _: fetch(name), tries=3)

            for _ in pool.map(attempt, names):
                pass

    def claim(self, contract: dict[str, Any], job: Job, args: argparse.Namespace) -> None:
        """Take the repo for this start, in one commit that no other start can make as well.

        --fresh removes the state there in the same commit; a git tag keeps it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = args.fresh and not contract["training"]["step"]
        if self.repo is None:
            if fresh:
                self.put_aside()
            write_json(self.folder / CONTRACT, contract)
            return
        prepare_repo(self.repo, "model", "adapter", args.allow_public)
        with hub_errors(f"claim {self.repo}"):
            # Made just now; whatever stands in it is the claim of another start that was faster.
            if self.head is None and self.look():
                fail(f"another start has just begun a run in {self.repo}; this one ends.", code=1)
            keep = None
            if fresh and CONTRACT in self.tree:
                from huggingface_hub import HfApi

                tag = f"before-fresh-{datetime.now(UTC):%Y%m%d-%H%M%S}"
                HfApi().create_tag(self.repo, tag=tag, revision=self.head)
                print(f"--fresh: the old state stays at {self.repo}@{tag}", flush=True)
                keep = {".gitattributes"}.__contains__
            token = os.urandom(8).hex()
            owner = job.namespace or self.repo.partition("/")[0]
            claim = {"job_id": job.id, "namespace": owner, "token": token}
            contract["training"]["claim"] = claim
            try:
                self.push({CONTRACT: as_json(contract)}, f"Start {SCRIPT}", keep)
            except TakenOver as error:
                fail(f"{self.repo}: {error}; this start ends and has changed nothing.", code=1)
            self.holder = token
            if fresh:
                self.put_aside()

    def put_aside(self) -> None:
        """Move an old run's files on this machine into a folder beside the new one's."""
        there = [path for pattern in RUN_FILES for path in self.folder.glob(pattern)]
        if not there:
            return
        old = self.folder / f"before-fresh-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        old.mkdir()
        for path in there:
            path.replace(old / path.name)
        print(f"--fresh: the old state of this machine is in {old}", flush=True)
        if self.repo is None:
            self.tree = {}

    def steps(self) -> list[int]:
        """Steps of all checkpoints at the head and in the folder, newest first."""
        found = {checkpoint_step(path) for path in self.tree} | self.local_steps()
        return sorted(found - {None}, reverse=True)

    def local_steps(self) -> set[int]:
        """Steps of the checkpoints in the folder, complete or not."""
        found = {checkpoint_step(f"{path.name}/") for path in self.folder.glob("checkpoint-*")}
        return found - {None}

    def bring(self, step: int, run_sha256: str) -> str:
        """Have checkpoint-N in `folder`, byte for byte; return what is wrong with it, or "".

        What the head lists is compared with the manifest before a weight is downloaded.
        """
        name = f"checkpoint-{step}"
        remote = self.repo is not None and any(path.startswith(f"{name}/") for path in self.tree)
        if not (f"{name}/{MANIFEST}" in self.tree if remote else self.is_local(name)):
            return f"lacks {MANIFEST}"
        if remote and (problem := self.download_problem([f"{name}/{MANIFEST}"])):
            return problem
        try:
            manifest = json.loads((self.folder / name / MANIFEST).read_text(encoding="utf-8"))
            files = {
                file: (entry["size"], entry["sha256"]) for file, entry in manifest["files"].items()
            }
            if any(Path(file).name != file for file in files):
                return f"has a {MANIFEST} that names other folders"
            if (manifest["schema"], manifest["step"]) != (SCHEMA, step):
                return f"has the {MANIFEST} of another checkpoint or schema"
            if manifest["run_sha256"] != run_sha256:
                return "belongs to a run with other arguments or data"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"has a damaged {MANIFEST} ({error})"
        for file, (size, sha256) in files.items() if remote else ():
            found = self.tree.get(f"{name}/{file}")
            if found is None:
                return f"lacks {file}"
            if found[0] != size or found[1] not in (None, sha256):
                return f"has another {file} than its manifest says ({found[0]} bytes)"
        damaged = self.damaged(name, files)
        # A download can be damaged on its way, so what is wrong is fetched once more.
        for _ in range(2 if remote and damaged else 0):
            if problem := self.download_problem([f"{name}/{file}" for file in damaged]):
                return problem
            damaged = self.damaged(name, files)
        return f"has a damaged {', '.join(damaged)}" if damaged else ""

    def download_problem(self, names: list[str]) -> str:
        """Download; return what is wrong with the files themselves. A failing Hub is raised."""
        from httpx2 import HTTPError
        from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

        try:
            self.download(names)
        except RemoteEntryNotFoundError:
            return "has lost the content of a file"
        except RuntimeError as error:
            # What hf_xet raises for every answer of the content store.
            if "404" not in str(error):
                raise
            return "has lost the content of a file"
        except (HTTPError, LocalEntryNotFoundError):
            raise
        except OSError as error:
            # The client's word for a file of another size has no errno; a full disk has.
            if error.errno is not None:
                raise
            return f"cannot be downloaded whole ({str(error).splitlines()[0]})"
        return ""

    def is_local(self, name: str) -> bool:
        return (self.folder / name / MANIFEST).is_file()

    def damaged(self, name: str, files: dict[str, tuple[int, str]]) -> list[str]:
        """Files of a local checkpoint that are missing or not those of its manifest."""
        return [
            file
            for file, (size, sha256) in files.items()
            if not (path := self.folder / name / file).is_file()
            or path.stat().st_size != size
            or file_sha256(path) != sha256
        ]

    def fetch_checkpoint(self, contract: dict[str, Any]) -> Path | None:
        """Bring the newest complete checkpoint and the best one here; return what to resume from.

        That is a folder of links to the newest one's files in which the best one's path is this
        machine's: Trainer otherwise forgets it and ends with other weights than the uninterrupted
        run.
        """
        run_sha256 = contract["training"]["run_sha256"]
        with hub_errors(f"read the state of {self.name}"):
            if self.repo and RUN_LOG in self.tree and contract["training"]["step"]:
                self.download([RUN_LOG])
            for step in self.steps():
                if problem := self.bring(step, run_sha256):
                    self.say(f"checkpoint-{step} {problem}: skipped")
                    continue
                newest = self.folder / f"checkpoint-{step}"
                state = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))
                if best := state["best_model_checkpoint"]:
                    problem = self.bring(int(best.rpartition("-")[2]), run_sha256)
                    if problem:
                        self.say(f"the best one, {best}, {problem}: a new best one is looked for")
                        shutil.rmtree(self.folder / best, ignore_errors=True)
                        state |= {"best_metric": None, "best_global_step": None}
                    state["best_model_checkpoint"] = None if problem else str(self.folder / best)
                contract["training"] |= {"step": step, "epoch": round(state["epoch"], 4)}
                samples = step * contract["training"]["effective_batch"]
                at = f"@{self.head[:8]}" if self.head else ""
                self.say(
                    f"resuming from checkpoint-{step} of {self.name}{at}: step {step} of "
                    f"{state['max_steps']}, epoch {state['epoch']:.2f}, {samples} samples consumed"
                )
                linked = link_checkpoint(newest, self.folder / RESUMED, state)
                if changed := fit_checkpoint(linked, contract):
                    self.say(changed)
                return linked
        contract["training"] |= {"step": 0, "epoch": 0.0}
        self.say(f"no checkpoint in {self.name}: training starts at step 0")
        return None

    def push(
        self,
        files: dict[str, Path | bytes],
        message: str,
        keep: Callable[[str], bool] | None = None,
        pause: Callable[[float], Any] = time.sleep,
        tries: int | None = 5,
    ) -> str:
        """Commit files, and the removal of all others that `keep` refuses; return the hash.

        The commit follows the head that we know. Where another came first, ours follows that one
        if its contract still carries our claim; otherwise raises `TakenOver`.
        """
        if self.repo is None:
            return ""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError

        adds = [CommitOperationAdd(name, path_or_fileobj=source) for name, source in files.items()]
        for attempt in range(5):
            stale = [path for path in self.tree if keep and path not in files and not keep(path)]
            operations = [*map(CommitOperationDelete, stale), *adds]
            try:
                self.head = commit(self.repo, "model", operations, message, self.head, pause, tries)
                break
            except HfHubHTTPError as error:
                # 404: somebody else removed what we want to remove.
                if error.response.status_code not in (404, 412) or attempt == 4:
                    raise
                self.follow_head()
        self.tree = {path: entry for path, entry in self.tree.items() if path not in stale}
        for add in adds:
            self.tree[add.path_in_repo] = (add.upload_info.size, None)
        return self.head

    def follow_head(self) -> None:
        """Take the newest commit for ours to follow, unless another start has claimed the repo."""
        before = self.head, self.tree
        try:
            contract = self.look()
        except BaseException:
            self.head, self.tree = before
            raise
        claim = contract and contract["training"].get("claim")
        if (claim and claim["token"]) != self.holder:
            self.head, self.tree = before
            job = f"job {claim['job_id']}" if claim and claim["job_id"] else "another start"
            raise TakenOver(f"{job} has taken the run over")

    def check_pushed(self, name: str) -> None:
        """Compare what the Hub lists of a pushed checkpoint with its manifest."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        manifest = json.loads((self.folder / name / MANIFEST).read_text(encoding="utf-8"))
        there = {
            Path(item.path).name: item
            for item in HfApi().list_repo_tree(self.repo, name, revision=self.head)
            if isinstance(item, RepoFile)
        }
        for file, entry in manifest["files"].items():
            item = there.get(file)
            same = item and item.size == entry["size"]
            if not same or (item.lfs and item.lfs.sha256 != entry["sha256"]):
                raise OSError(f"the Hub lists another {name}/{file} than was pushed")


def open_store(args: argparse.Namespace) -> Store:
    """Fill in the repos that no flag names; nothing is created yet."""
    local = bool(args.output_dir) and not args.hub_model_id
    if not args.dataset_repo and not args.train_file:
        args.dataset_repo = "{you}/hsd-data"
    if not local and not args.hub_model_id:
        args.hub_model_id = f"{{you}}/hsd-{args.run_name or 'lora'}"
    repos = {name: getattr(args, name) or "" for name in ("dataset_repo", "hub_model_id")}
    mine = {name: repo[5:] for name, repo in repos.items() if repo.startswith("{you}")}
    if mine:
        # One process asks: many at once could be told to wait.
        you = broadcast(own_namespace() if RANK == 0 else None)
        vars(args).update({name: f"{you}{rest}" for name, rest in mine.items()})
    scratch = Path(tempfile.gettempdir()) / f"hsd-train-{broadcast(os.urandom(4).hex())}"
    folder = Path(args.output_dir or scratch).expanduser()
    if not local:
        limit_silence()
    return Store(None if local else args.hub_model_id, folder)


def limit_silence(seconds: float = 120.0) -> None:
    """Let no request wait longer for a Hub that says nothing; by default it waits for ever."""
    from huggingface_hub.utils import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def limited() -> Any:
        client = default_client_factory()
        client.timeout = seconds
        return client

    set_client_factory(limited)


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def as_json(content: Any) -> bytes:
    """The bytes of a strict JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_state(file: Path, state: dict[str, Any]) -> None:
    """Write trainer_state.json as Trainer does: a run that diverged has NaN in its history."""
    file.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_manifest(folder: Path, run_sha256: str) -> None:
    """Record every file's size and SHA-256; with this file, the last, a checkpoint is complete."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name not in UNPUSHED | {MANIFEST}
    }
    step = int(folder.name.rpartition("-")[2])
    manifest = {"schema": SCHEMA, "step": step, "run_sha256": run_sha256, "files": files}
    unfinished = folder.with_name(f".{folder.name}-{MANIFEST}")
    write_json(unfinished, manifest)
    unfinished.replace(folder / MANIFEST)


def link_checkpoint(newest: Path, folder: Path, state: dict[str, Any]) -> Path:
    """Make a folder of links to a checkpoint's files with a trainer_state.json of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in newest.iterdir():
        if path.name != "trainer_state.json":
            try:
                (folder / path.name).hardlink_to(path)
            except OSError:  # A mounted bucket, for example, has no links.
                shutil.copyfile(path, folder / path.name)
    write_state(folder / "trainer_state.json", state)
    return folder


def read_earlier(args: argparse.Namespace, store: Store, job: Job) -> dict[str, Any] | None:
    """The contract of the run that this start continues; None where a new run begins."""
    with hub_errors(f"read the state of {store.name}"):
        found = store.look()
    if found is None:
        return None
    if "run_sha256" not in found["training"]:
        fail(f"{store.name} was begun by an older version of this script; give another --run_name.")
    check_holder(found, job, store)
    relayed = bool(args.relay) and found["training"]["relay"]["pending"]
    restarted = is_own_claim(found)
    # A Job that is started again with its own flags goes on with what it began.
    if args.fresh and not (found["arguments"].get("fresh") and (relayed or restarted)):
        return None
    saved = any(re.fullmatch(rf"checkpoint-\d+/{MANIFEST}", path) for path in store.tree)
    if not saved and found["training"]["state"] != "complete":
        return None
    check_same_run(args, found, store)
    relay = found["training"]["relay"]
    if args.budget and relay["pending"] and relay["spent_usd"] >= args.budget:
        fail(f"{relay['spent_usd']:.2f} $ are spent; a --budget above that goes on.")
    return found


def is_own_claim(found: dict[str, Any]) -> bool:
    """Whether this very Job made the claim, in a start before a restart of it."""
    claim = found["training"]["claim"]
    return claim is not None and claim["job_id"] == os.environ.get("JOB_ID", "")


def check_holder(found: dict[str, Any], job: Job, store: Store) -> None:
    """End where the Job that holds the repo is still running; a dead one's claim is void."""
    claim = found["training"]["claim"]
    store.holder = claim and claim["token"]
    if not claim or not claim["job_id"] or claim["job_id"] == job.id:
        return
    # An outage says nothing about the other Job, so it ends this start instead of that one.
    with hub_errors(f"ask whether job {claim['job_id']}, which claims {store.repo}, is running"):
        record = ask_job(claim["job_id"], [claim["namespace"]])
    running = record is not None and record["status"]["stage"] == "RUNNING"
    if running and found["training"]["state"] == "running":
        fail(
            f"{store.name} is being trained by job {claim['job_id']}, which is running (hf jobs "
            f"inspect {claim['job_id']}). Wait for it, cancel it, or give this start another "
            "--run_name.",
            code=1,
        )


def flat_arguments(contract: dict[str, Any]) -> dict[str, Any]:
    """A run's arguments by name, those of the trainer's config and the process count included."""
    arguments = dict(contract["arguments"])
    fields = arguments.pop("trainer_fields", {})
    return {**fields, **arguments, "world_size": contract["training"]["world_size"]}


def check_same_run(args: argparse.Namespace, earlier: dict[str, Any], store: Store) -> None:
    """End with a table where arguments that must be equal differ from those the run began with."""
    was = flat_arguments(earlier)
    record = stage_record("adapter", SCRIPT, args, [])
    now = flat_arguments(record | {"training": {"world_size": WORLD_SIZE}})
    documented = vars(args).keys()
    rows = []
    for key in (key for key in {**was, **now} if was.get(key) != now.get(key)):
        rule = RESUME_RULES.get(key, EQUAL)
        # A flag that an older version of this script did not have is no change.
        if rule == NEW or (key in documented and key not in was):
            continue
        if rule == FREE:
            print(f"{key} changes from {was.get(key)} to {now.get(key)}", flush=True)
        else:
            rows.append(f"  {key:<28} {was.get(key)!s:<24} {now.get(key)}")
    if rows:
        other = "--run_name NAME (a repo of its own)" if store.repo else "another --output_dir"
        fail(
            f"{store.name} holds a run with other arguments:\n"
            f"  {'argument':<28} {'it began with':<24} now\n" + "\n".join(rows) + "\n"
            f"Give {other} to start another run, the old values to resume this one, or --fresh to "
            "start over here after the old state is archived."
        )


def is_finished(args: argparse.Namespace, store: Store, earlier: dict[str, Any]) -> bool:
    """Say whether the repo already holds the end of this very run, and print it."""
    was, now = earlier["arguments"], vars(args)
    if was["max_steps"] > 0 and now["max_steps"] > 0:
        longer = now["max_steps"] > was["max_steps"]
    else:
        longer = now["max_steps"] != was["max_steps"]
        longer = longer or now["num_train_epochs"] > was["num_train_epochs"]
    there = {"adapter_config.json", ADAPTER_WEIGHTS} <= store.tree.keys()
    same_data = not args.train_file or earlier["dataset"] == record_of_files(args)
    if earlier["training"]["state"] != "complete" or longer or not there or not same_data:
        return False
    print(f"{store.name} is complete at step {earlier['training']['step']}: nothing to do")
    if args.reclaim_storage:
        with hub_errors(f"reclaim the storage of {store.repo}"):
            reclaim_storage(store.repo)
    return True


def record_of_files(args: argparse.Namespace) -> dict[str, str]:
    """What the contract says of local training data: the file's name and the hashes."""
    record = {}
    for name, path in (("", args.train_file), ("validation_", args.validation_file)):
        if path:
            file = Path(path).expanduser()
            if not file.is_file():
                fail(f"the file {path} does not exist.")
            record |= {f"{name}file": file.name, f"{name}sha256": file_sha256(file)}
    return record


# --- data ------------------------------------------------------------------------------------


@dataclass
class Data:
    """What is trained on: rows, the labels and groups they speak of, and the prompt around them."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    labels: list[str]
    positive_label: str
    groups: list[str]
    prompt: dict[str, str] | None
    source: Repo | None
    record: dict[str, Any]


def read_data(args: argparse.Namespace, earlier: dict[str, Any] | None) -> Data:
    """Rows from the dataset repo, at the commit the run began with, or from local files."""
    if args.train_file:
        return read_local_data(args)
    source = open_repo(args.dataset_repo, "dataset")
    if earlier and source.revision and earlier["dataset"]["repo"] == source.name:
        source = open_repo(f"{source.name}@{earlier['dataset']['revision']}", "dataset")
    if not has_contract(source):
        return read_plain_data(args, source)
    if args.labels or args.positive_label:
        fail(f"--labels and --positive_label: those of {source.name} stand in its {CONTRACT}.")
    contract = read_contract(source, "dataset")
    name = args.dataset_config or ("unified" if args.task == "classify" else "simple")
    train = read_rows(source, name, "train")
    validation = read_rows(source, name, "validation")
    for split, rows in (("train", train), ("validation", validation)):
        check_labels(rows, contract["labels"], f"{source.name} ({name}/{split})")
    prompt = None
    if args.task == "causal":
        strategies = contract.get("prompts", {})
        if name not in strategies:
            fail(
                f"{name!r} is no prompt strategy of {source.name}. "
                f"There are: {', '.join(strategies) or 'none'}."
            )
        if missing := {"prompt", "completion"} - (train[0].keys() & validation[0].keys()):
            fail(f"{source.name} ({name}) lacks the columns {', '.join(sorted(missing))}.")
        prompt = {"name": name, **strategies[name]}
    print(f"labels {contract['labels']}, groups {contract['groups']} (from {source.name})")
    return Data(
        train,
        validation,
        contract["labels"],
        contract["positive_label"],
        contract["groups"],
        prompt,
        source,
        record_of_folder(source, CONTRACT, "**/*.parquet"),
    )


def read_local_data(args: argparse.Namespace) -> Data:
    """Rows of local JSONL files. Posts get the `instruction` strategy; prompts bring their own."""
    train = read_jsonl(args.train_file, args.labels or LABELS)
    validation = []
    if args.validation_file:
        validation = read_jsonl(args.validation_file, args.labels or LABELS)
    record = record_of_files(args)
    return build_plain_data(args, train, validation, args.train_file, None, record)


def read_plain_data(args: argparse.Namespace, source: Repo) -> Data:
    """Rows of a dataset repo that no script of this project wrote: no contract.json says more."""
    from datasets import get_dataset_split_names

    labels = args.labels or LABELS
    train, config = read_plain_rows(source, args.dataset_config, "train", labels)
    place = str(source.folder) if source.folder else source.name
    with hub_errors(f"list the splits of {source.name}"):
        splits = get_dataset_split_names(place, config, revision=source.revision)
    found = [name for name in ("validation", "valid", "val", "dev") if name in splits]
    validation = []
    if found:
        validation, _ = read_plain_rows(source, config, found[0], labels)
    else:
        print(f"{source.name} ({config}) has no validation split: there is no early stopping")
    record = record_of_folder(source, "**/*.parquet", "**/*.jsonl", "**/*.json", "**/*.csv")
    record |= {"config": config, "form": "rows without a contract"}
    return build_plain_data(args, train, validation, f"{source.name} ({config})", source, record)


def build_plain_data(
    args: argparse.Namespace,
    train: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    origin: str,
    source: Repo | None,
    record: dict[str, Any],
) -> Data:
    """What rows without a contract.json say of themselves: their form, labels and prompt."""
    rows = train + validation
    asked = "prompt" in train[0]
    if other := [row["id"] for row in rows if ("prompt" in row) != asked]:
        fail(f"{origin} mixes rows of two forms: see {other[0]}. {DATA_FORMS}")
    if args.task == "classify":
        if asked and not all("text" in row and "label" in row for row in rows):
            fail(f"--task classify needs `text` and `label` in every row of {origin}.")
        asked = False
    strategy: dict[str, str] | None = None
    if asked:
        known = args.labels or LABELS
        answer, named = learn_answer([row["completion"][0]["content"] for row in train], known)
        labels = labels_of_rows(args, named)
        strategy = {
            "name": "messages",
            "description": "the training rows' own prompt",
            **learn_prompt(train),
            "answer": answer,
        }
        fill_from_prompts(rows, strategy, labels, origin)
        shape = "a system message and a user's" if strategy["system"] else "one message"
        print(
            f"{origin}: {len(train)} rows of a prompt ({shape}) and an answer in the form "
            f"{answer!r}; what stands around each post is {len(strategy['user']) - 6} characters",
            flush=True,
        )
    else:
        labels = labels_of_rows(args, {str(row["label"]) for row in train})
        if args.task == "causal":
            strategy = {"name": "instruction"} | {
                key: text.replace("{labels}", " or ".join(labels))
                for key, text in INSTRUCTION.items()
            }
        form = "a text and a label" + ("" if args.task == "classify" else ", as instructions")
        print(f"{origin}: {len(train)} rows of {form}", flush=True)
        for row in rows:
            row["label"] = str(row["label"])
            if strategy:
                row["prompt"] = prompt_messages(strategy, row["text"], row)
                row["completion"] = [{"role": "assistant", "content": row["label"]}]
    if unknown := sorted({row["label"] for row in rows} - {*labels}):
        fail(
            f"{origin} has unknown labels {unknown[:5]}. The labels are: {', '.join(labels)}; "
            "--labels NAMES with --positive_label NAME says others, and gives the numbers 0, 1, "
            "2 ... names in their order."
        )
    positive = args.positive_label or POSITIVE_LABEL
    if positive not in labels:
        fail(
            f"the labels of {origin} are {', '.join(labels)}, and {positive!r} is none of them. "
            "Say which of them bias is to be measured for, for example --positive_label "
            f"{shlex.quote(labels[-1])}."
        )
    counts = ", ".join(f"{sum(row['label'] == name for row in train)} {name}" for name in labels)
    print(f"labels: {counts} (positive: {positive})", flush=True)
    groups = sorted({group for row in train for group in row["target_groups"]})
    return Data(train, validation, labels, positive, groups, strategy, source, record)


def labels_of_rows(args: argparse.Namespace, found: set[str]) -> list[str]:
    """The labels of rows without a contract: as told, the usual ones, or those of the rows.

    A name beside the usual ones may be a slip of the pen, so it never makes a label by itself.
    """
    if args.labels:
        if len(set(args.labels)) < max(2, len(args.labels)):
            fail(f"--labels {' '.join(args.labels)}: give two labels or more, each once.")
        return args.labels
    if found & {*LABELS} or not 2 <= len(found) <= MOST_LABELS:
        return LABELS
    return sorted(found)


def common_ends(texts: list[str]) -> tuple[str, str]:
    """What all texts begin and what they end with, cut where a word may be shared by chance."""
    # Not $, which also matches before a line break at the end.
    head = re.sub(r"\w+\Z", "", "".join(common_prefix(texts)))
    rests = [text[len(head) :][::-1] for text in texts]
    return head, re.sub(r"\w+\Z", "", "".join(common_prefix(rests)))[::-1]


def learn_answer(answers: list[str], known: list[str]) -> tuple[str, set[str]]:
    """The template that answers have in common, with {label}, and the labels that they name.

    Either few different ones, a label each with perhaps the same words around it, or one of the
    known labels and behind it, after the same mark, a rationale. Words become part of a template
    only where ten rows or more have them: a template is published, and no post may get into it.
    """
    different, few = sorted(set(answers)), len(answers) < 10

    def ends(texts: list[str]) -> tuple[str, str]:
        head, tail = common_ends(texts)
        return ("", "") if few and re.search(r"\w", head + tail) else (head, tail)

    if len(different) <= MOST_LABELS:
        head, tail = ends(different)
        named = {answer[len(head) : len(answer) - len(tail)] for answer in different}
        if named <= {*known}:
            return f"{head}{{label}}{tail}", named
    names = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    for head in dict.fromkeys((ends(different)[0], "")):
        found = [
            re.fullmatch(rf"{re.escape(head)}({names})(\W.*)", one, re.DOTALL) for one in different
        ]
        if all(found):
            rests = [match[2] for match in found]
            mark, end = (re.match(r"\W*", rests[0])[0], "") if few else common_ends(rests)
            if mark and all(rest.startswith(mark) for rest in rests):
                return f"{head}{{label}}{mark}{{rationale}}{end}", {match[1] for match in found}
    if len(different) > MOST_LABELS:
        fail(
            f"the answers are {len(different)} different ones, and not all begin with one of the "
            f"labels {', '.join(known)} and a mark behind it. --labels names others. {DATA_FORMS}"
        )
    head, tail = ends(different)
    named = {answer[len(head) : len(answer) - len(tail)] for answer in different}
    return (f"{head}{{label}}{tail}", named) if all(named) else ("{label}", set(different))


def learn_prompt(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The system message and the user's template that rows have in common.

    What stands around each post is known where a row has its `text`, or where ten different
    messages or more begin or end alike. Else the post is the whole message: no post may get into
    a template, which is published with the adapter.
    """
    systems = {row["prompt"][0]["content"] for row in rows if len(row["prompt"]) > 1}
    if len(systems) > 1 or (systems and any(len(row["prompt"]) == 1 for row in rows)):
        fail(
            f"the rows have {len(systems)} different system messages, so no evaluation could ask "
            "as the training did. Give all rows the same one, or write it into the user's message."
        )
    said = [row["prompt"][-1]["content"] for row in rows]
    ends = ("", "")
    if all(
        isinstance(row.get("text"), str) and row["text"] in one
        for row, one in zip(rows, said, strict=True)
    ):
        around = set()
        for row, one in zip(rows, said, strict=True):
            head, _, tail = one.rpartition(row["text"])
            around.add((head, tail))
        ends = around.pop() if len(around) == 1 else ends
    elif len(set(said)) >= 10:
        ends = common_ends(said)
    if any("{" in end for end in ends):
        ends = ("", "")
    return {"system": "".join(systems), "user": f"{ends[0]}{{text}}{ends[1]}"}


def hold_back(
    args: argparse.Namespace, data: Data, earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """Take the posts kept for calibration out of the validation; return the contract's account.

    Only where the loss on validation posts chooses the weights: else all of them are free.
    """
    if not (chooses_weights(args) and data.validation):
        return {"early_stopping": False, "calibration_fraction": 0.0}
    if earlier and "calibration_fraction" not in earlier["arguments"]:
        # It began without the flag and has seen all posts. It goes on so, and without the flag,
        # so that the next start finds the same arguments.
        del args.calibration_fraction
        print("all validation posts were used by early stopping from the start", flush=True)
        return {"early_stopping": True}
    fraction = args.calibration_fraction
    held = held_back_ids([row["id"] for row in data.validation], fraction)
    kept = [row for row in data.validation if str(row["id"]) not in held]
    if held:
        print(
            f"{len(data.validation) - len(kept)} of {len(data.validation)} validation posts are "
            f"kept from early stopping, for calibration (--calibration_fraction {fraction})",
            flush=True,
        )
    data.validation = kept
    return {"early_stopping": True, "calibration_fraction": fraction}


def chooses_weights(args: argparse.Namespace) -> bool:
    """Whether the evaluations choose the weights that a run ends with."""
    return args.trainer_fields.get("load_best_model_at_end", args.early_stopping_patience > 0)


def is_held_back(post_id: Any, fraction: float) -> bool:
    """Whether a validation post is kept from early stopping, by the SHA-256 of its id."""
    digest = hashlib.sha256(str(post_id).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def held_back_ids(post_ids: list[Any], fraction: float) -> set[str]:
    """The ids of a split that are kept from early stopping.

    Where the rule gives all posts or none, the one nearest to its border changes sides.
    """
    held = {str(post_id) for post_id in post_ids if is_held_back(post_id, fraction)}
    by_hash = {hashlib.sha256(name.encode()).hexdigest(): name for name in map(str, post_ids)}
    if fraction <= 0 or len(by_hash) < 2:
        return set()
    if not held:
        return {by_hash[min(by_hash)]}
    return held - {by_hash[max(by_hash)]} if len(held) == len(by_hash) else held


def encode_rows(
    args: argparse.Namespace, data: Data, tokenizer: Any, contract: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Token ids and training labels of both splits; only answers are trained on."""
    splits = []
    for name, rows in (("train", data.train), ("validation", data.validation)):
        if args.task == "classify":
            encoded = [encode_post(tokenizer, row["text"], args.max_length) for row in rows]
            examples = [
                {"input_ids": ids, "labels": data.labels.index(row["label"])}
                for (ids, _), row in zip(encoded, rows, strict=True)
            ]
            num_cut = sum(cut for _, cut in encoded)
        else:
            examples, num_cut = encode_conversations(rows, tokenizer, contract)
            check_supervision(tokenizer, rows, examples)
        lengths = [len(example["input_ids"]) for example in examples]
        if examples:
            print(
                f"{name}: {len(examples)} rows, {sum(lengths)} tokens, longest {max(lengths)}, "
                f"{num_cut} posts cut to --max_length {args.max_length}",
                flush=True,
            )
        splits.append(examples)
    if args.task == "causal":
        trained = [token for token in splits[0][0]["labels"] if token != -100]
        shown = tokenizer.decode(trained)
        if "{rationale}" in data.prompt["answer"] and not args.log_text:
            # It may quote the post.
            shown = f"{data.train[0]['label']} ... {tokenizer.decode(trained[-1:])}"
        print(f"trained on, in the first row: {shown!r}", flush=True)
    return splits[0], splits[1]


def check_supervision(
    tokenizer: Any, rows: list[dict[str, Any]], examples: list[dict[str, Any]]
) -> None:
    """End on a row that trains no word of an answer, and show what it would train."""
    for row, example in zip(rows, examples, strict=True):
        trained = [token for token in example["labels"] if token != -100]
        if not tokenizer.decode(trained, skip_special_tokens=True).strip():
            fail(
                f"row {row['id']} trains on no answer: its supervised tokens are "
                f"{tokenizer.decode(trained)!r} ({len(trained)}). Give the row an answer, or "
                "leave it out."
            )


def check_kept_labels(trainer: Any, rows: list[dict[str, Any]]) -> None:
    """End where the trainer's own preparation of the rows has cut supervised tokens away."""
    kept = trainer.train_dataset["labels"]
    before, after = (
        sum(label != -100 for row in labels for label in row)
        for labels in ((row["labels"] for row in rows), kept)
    )
    if before != after:
        fail(
            f"the training rows have {before} supervised tokens, of which packing or cutting left "
            f"{after}. Raise --max_length, or leave --packing and --truncation_mode out."
        )


def read_scaffold(rendering: dict[str, Any]) -> Scaffold:
    """The scaffold as the contract keeps it."""
    return Scaffold(
        tuple(rendering["roles"]), tuple(rendering["pieces"]), rendering["answer_prefix"]
    )


def encode_conversations(
    rows: list[dict[str, Any]], tokenizer: Any, contract: dict[str, Any]
) -> tuple[list[dict[str, Any]], int]:
    """Token ids of prompts with their answers, and how many posts were cut."""
    rendering = contract["rendering"]
    scaffold = read_scaffold(rendering)
    examples, num_cut = [], 0
    for row in rows:
        roles = [message["role"] for message in row["prompt"] + row["completion"]]
        if roles != list(scaffold.roles):
            fail(f"row {row['id']} has the roles {roles}; this run's are {list(scaffold.roles)}.")
        answer = encode_answer(tokenizer, scaffold, row["completion"][0]["content"])
        room = rendering["max_length"] - len(answer)
        prompt, cut = encode_prompt(tokenizer, scaffold, row["prompt"], row["text"], room)
        num_cut += cut
        labels = [-100] * len(prompt) + answer
        examples.append({"input_ids": prompt + answer, "labels": labels})
    return examples, num_cut


def class_weights(args: argparse.Namespace, data: Data) -> dict[str, float] | None:
    """What --class_weights makes a post of each label count in the loss; None: all count 1.

    `balanced`: n / (labels x n of the label) over the training posts, so that each label weighs
    the same altogether and the mean weight is 1. A label that a list leaves out counts 1.
    """
    if args.class_weights == "none":
        return None
    counts = {label: sum(row["label"] == label for row in data.train) for label in data.labels}
    if args.class_weights == "balanced":
        if absent := [label for label, count in counts.items() if not count]:
            fail(f"--class_weights balanced: no training post is labelled {absent[0]}.")
        total = len(data.train)
        weights = {label: total / (len(counts) * count) for label, count in counts.items()}
    else:
        weights = dict.fromkeys(data.labels, 1.0)
        for part in args.class_weights.split(","):
            label, equals, value = part.strip().rpartition("=")
            number = float(value) if re.fullmatch(r"\d+(\.\d*)?|\.\d+", value) else 0.0
            if not equals or label not in weights or number <= 0:
                fail(
                    f"--class_weights {args.class_weights}: {part.strip()!r} is no LABEL=W with a "
                    f"positive W. The labels are: {', '.join(data.labels)}."
                )
            weights[label] = number
    shown = ", ".join(
        f"{label} {weight:.4g} ({counts[label]} posts)" for label, weight in weights.items()
    )
    print(f"class weights: {shown}", flush=True)
    return weights


def weigh_labels(model: Any, weights: list[float]) -> None:
    """Have a classifier's loss be the cross-entropy weighted by label, over the number of posts.

    Not over the sum of their weights: a post would then count by its neighbours in the batch.
    """
    import torch

    forward = model.forward

    @functools.wraps(forward)
    def weighted(*values: Any, labels: Any = None, **options: Any) -> Any:
        outputs = forward(*values, **options)
        if labels is not None:
            logits = outputs["logits"].float()
            weight = torch.tensor(weights, device=logits.device)
            total = torch.nn.functional.cross_entropy(logits, labels, weight, reduction="sum")
            outputs["loss"] = total / len(labels)
        return outputs

    model.forward = weighted


# --- model -----------------------------------------------------------------------------------


def open_base(args: argparse.Namespace, earlier: dict[str, Any] | None) -> Repo:
    """The base model at one commit: for a resumed run the one it began with."""
    if is_folder(args.model_name_or_path):
        if args.hub_model_id:
            print(f"warning: other machines do not have the base {args.model_name_or_path}")
        return open_repo(args.model_name_or_path, "model")
    name, _, revision = args.model_name_or_path.partition("@")
    revision = args.model_revision or revision
    if earlier:
        revision = earlier["base_model"]["revision"]
    return open_repo(f"{name}@{revision}" if revision else name, "model")


def check_encoder(args: argparse.Namespace, base: Repo, config: Any) -> None:
    """End where a base is to learn answers that its tokens see: a BERT has a causal class as well.

    Its attention is that of an encoder all the same, unless its config says is_decoder.
    """
    import transformers

    if args.task != "causal":
        return
    decoders = ("is_decoder", "is_encoder_decoder", "causal")
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    masked = masked and not any(getattr(config, name, False) for name in decoders)
    text = config.get_text_config()
    # EmbeddingGemma says so.
    if masked or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        fail_as_encoder(base)


def check_causality(trainer: Any, base: Repo) -> None:
    """The same by a forward, where a config does not tell, such as XLNet's.

    What follows a first token must not change its scores by more than experts do that rounding
    picks.
    """
    import torch

    # No process holds the whole model.
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return
    model = trainer.model.eval()
    rows = torch.ones(2, 8, dtype=torch.long, device=model.device)
    rows[1, 1:] = 2
    with torch.no_grad(), trainer.accelerator.autocast():
        scores = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[:, 0].float()
    if (scores[0] - scores[1]).norm() > 0.1 * scores[0].norm():
        fail_as_encoder(base)


def fail_as_encoder(base: Repo) -> NoReturn:
    fail(
        f"{base.name} is an encoder, whose tokens see those behind them: as a language model it "
        "would learn answers that it sees. Say --task classify."
    )


def check_positions(args: argparse.Namespace, base: Repo, config: Any) -> None:
    """End where --max_length is more than a base with learned positions has of them."""
    import torch
    from transformers import AutoModel

    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not limit or getattr(text, "rope_parameters", None) or args.max_length <= limit - 2:
        return
    with torch.device("meta"):
        tables = [
            module
            for module in AutoModel.from_config(config).modules()
            if isinstance(module, torch.nn.Embedding) and module.num_embeddings == limit
        ]
    # RoBERTa counts from behind the id of its pad token.
    pads = [module.padding_idx for module in tables if module.padding_idx is not None]
    used = max(pads, default=-1) + 1
    if tables and args.max_length > limit - used:
        fail(
            f"--max_length {args.max_length}: {base.name} has positions for {limit - used} tokens. "
            f"Say --max_length {limit - used} or less."
        )


def training_job(argv: list[str] | None) -> str:
    """This very command as a Job on a GPU."""
    flags = shlex.join(sys.argv[1:] if argv is None else argv)
    return f"hf jobs uv run --flavor a100-large {SCRIPT} {flags}"


def record_of_folder(repo: Repo, *patterns: str) -> dict[str, str | None]:
    """The contract's record of a repo; of a folder also a hash of files, in place of a commit."""
    record = repo.as_input()
    if repo.folder:
        digest = hashlib.sha256()
        for file in sorted({file for pattern in patterns for file in repo.folder.glob(pattern)}):
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
        record["sha256"] = digest.hexdigest()
    return record


def build_contract(
    args: argparse.Namespace,
    data: Data,
    base: Repo,
    tokenizer: Any,
    precision: str,
    earlier: dict[str, Any] | None,
) -> dict[str, Any]:
    """contract.json of the adapter repo: what evaluation and merge must know."""
    rendering: dict[str, Any] = {"max_length": args.max_length}
    scaffold = None
    if data.prompt:
        date = earlier["rendering"]["date"] if earlier else datetime.now(UTC).date().isoformat()
        roles = [message["role"] for message in data.train[0]["prompt"]]
        scaffold = build_scaffold(tokenizer, roles, date, args.reasoning_effort)
        template = tokenizer.chat_template
        rendering |= {
            "date": date,
            "reasoning_effort": args.reasoning_effort,
            "chat_template_sha256": template and hashlib.sha256(template.encode()).hexdigest(),
            **asdict(scaffold),
            "label_completions": label_completions(
                tokenizer, scaffold, data.prompt["answer"], data.labels
            ),
        }
    ids = probe_ids(tokenizer, scaffold, data.prompt)
    base_model = record_of_folder(base, "config.json", "*.safetensors")
    if earlier:
        check_probe(tokenizer, ids, earlier["rendering"]["probe_ids"], "this run")
        for what, was, now in (
            ("training data", earlier["dataset"], data.record),
            ("base model", earlier["base_model"], base_model),
        ):
            if was != now:
                fail(
                    f"the {what} has changed: it was {was} and is {now}. Give the old one to "
                    "resume, or name another repo or folder for a new run."
                )
    inputs = [base] if data.source is None else [base, data.source]
    contract = stage_record("adapter", SCRIPT, args, inputs) | {
        "task": args.task,
        "labels": data.labels,
        "positive_label": data.positive_label,
        "groups": data.groups,
        "base_model": base_model,
        "dataset": data.record,
        "prompt": data.prompt,
        "rendering": rendering
        | {"probe_ids": ids, "probe_sha256": hashlib.sha256(as_json(ids)).hexdigest()},
        "training": new_training(precision),
    }
    if earlier:
        kept = {"step", "epoch", "run_sha256", "wandb_run_id"}
        # What an older version of this script began has none.
        kept |= {"speed"} & earlier["training"].keys()
        # A run that was handed over or restarted counts on; a start by hand begins a new relay.
        if earlier["training"]["relay"]["pending"] or is_own_claim(earlier):
            kept |= {"relay"}
        contract["training"] |= {key: earlier["training"][key] for key in kept}
        contract["training"]["relay"]["pending"] = False
    else:
        contract["training"]["run_sha256"] = run_sha256(contract)
    return contract


def new_training(precision: str) -> dict[str, Any]:
    """The contract's account of a run that has not begun."""
    return {
        "state": "running",
        "step": 0,
        "epoch": 0.0,
        "precision": precision,
        "world_size": WORLD_SIZE,
        "wandb_run_id": os.urandom(4).hex(),
        "claim": None,
        "relay": {"hops": 0, "spent_usd": 0.0, "pending": False},
    }


def run_sha256(contract: dict[str, Any]) -> str:
    """A hash of everything that makes this run's result: what its checkpoints have in common."""
    arguments = {
        key: value
        for key, value in flat_arguments(contract).items()
        if RESUME_RULES.get(key, EQUAL) == EQUAL
    }
    identity = {key: contract[key] for key in ("base_model", "dataset", "prompt", "rendering")}
    identity |= {"arguments": arguments, "precision": contract["training"]["precision"]}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def build_quantization(args: argparse.Namespace, base: Repo, config: Any, precision: str) -> Any:
    """How --load_in_4bit stores the base: NF4 with double quantisation; None without it."""
    import torch
    from transformers import BitsAndBytesConfig

    if not args.load_in_4bit:
        return None
    stored = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if stored == "mxfp4":
        fail(
            f"--load_in_4bit cannot quantise {base.name}: it is stored as mxfp4, and its experts, "
            "which are nearly all of it, are no linear layers, so bitsandbytes would leave them in "
            f"{precision}. Leave the flag out: the base is then dequantised."
        )
    if stored not in (None, "fp8"):
        fail(
            f"--load_in_4bit cannot quantise {base.name}: it is stored as {stored}. Leave the "
            "flag out, or give a copy of the model in bfloat16."
        )
    share = share_of_experts(config)
    if share:
        print(
            f"--load_in_4bit does not touch the experts of {base.name}, {100 * share:.0f} % of its "
            f"weights: they are no linear layers, and stay in {precision}",
            flush=True,
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, precision),
        llm_int8_skip_modules=WHOLE_MODULES,
    )


def share_of_experts(config: Any) -> float:
    """The share of a model's weights that experts hold as one tensor, not as linear layers."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        sizes = [
            (weight.dim() == 3 and ".experts." in name, weight.numel())
            for name, weight in AutoModel.from_config(config).named_parameters()
        ]
    return sum(size for stacked, size in sizes if stacked) / sum(size for _, size in sizes)


def build_model(
    args: argparse.Namespace,
    base: Repo,
    config: Any,
    labels: list[str],
    device: str,
    precision: str,
    quantization: Any,
) -> Any:
    """The base model; a classifier's new head and the LoRA weights are drawn from the seed."""
    import torch
    from transformers import set_seed

    set_seed(args.seed)
    dtype = getattr(torch, precision)
    return load_base(base, config, args.task, labels, dtype, device, quantization)


def choose_precision(args: argparse.Namespace, device: str, earlier: dict[str, Any] | None) -> str:
    """What base and autocast compute in: as asked, bfloat16 where a GPU does so natively.

    A resumed run keeps the precision that it began with, on any machine.
    """
    import torch

    if earlier:
        return earlier["training"]["precision"]
    if args.dtype != "auto":
        return args.dtype
    native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def choose_optimizer(
    args: argparse.Namespace, device: str, earlier: dict[str, Any] | None
) -> str | None:
    """The optimizer of a run that names none: paged 8-bit AdamW for four bits on a GPU.

    None leaves it to the library. A resumed run keeps what it began with, on any machine.
    """
    if "optim" in args.trainer_fields:
        return None
    if earlier:
        return earlier["training"].get("optimizer")
    return "paged_adamw_8bit" if args.load_in_4bit and device == "cuda" else None


def fetch_base(base: Repo) -> None:
    """Bring the base's weights here, as safetensors only; loading finds them in the cache."""
    if base.folder is None:
        base.fetch("model*.safetensors", "model.safetensors.index.json")


def lora_config(args: argparse.Namespace, model: Any, base: Repo) -> Any:
    """LoRA on the named modules; a model without any of them gets every linear layer.

    Of a vision-language model only the language model's: no post passes through the rest.
    """
    import peft

    tower = language_tower(model)
    names = [name for name, _ in model.named_modules() if name.startswith(tower)]
    leaves = {name.rpartition(".")[2] for name in names}
    targets: Any = args.lora_target_modules
    if targets != ["all-linear"] and not set(targets) & leaves:
        if targets != LORA_TARGETS:
            fail(
                f"--lora_target_modules {' '.join(targets)}: the model has no such modules. Its "
                f"modules are: {', '.join(sorted(leaves - {''}))}; or say all-linear."
            )
        print(f"the model has no modules {', '.join(targets)}: LoRA on all-linear", flush=True)
        targets = ["all-linear"]
    if tower:
        targets = tower_pattern(model, tower, targets)
        print(f"LoRA on the language model only: {targets}", flush=True)
    elif targets == ["all-linear"]:
        targets = "all-linear"
    return peft.LoraConfig(
        task_type="SEQ_CLS" if args.task == "classify" else "CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        target_parameters=find_parameters(args, model),
        modules_to_save=whole_modules(model, base) if args.task == "classify" else None,
        revision=base.revision,
    )


def whole_modules(model: Any, base: Repo) -> list[str]:
    """What a classifier's adapter brings whole besides `classifier` and `score`: all that is drawn.

    PEFT takes a module whose name ends like theirs, such as pre_classifier, for one of them, but
    puts LoRA into it, and fails, unless it is named.
    """
    heads = [name for name, _ in model.named_modules() if name.endswith(("classifier", "score"))]
    inside = tuple(f"{head}." for head in heads)
    names = [name for name in model.drawn if not name.startswith(inside)]
    drawn = sorted({name.rpartition(".")[0] for name in names} - {""})
    if quantised := [name for name in drawn if hasattr(model.get_submodule(name), "quant_state")]:
        fail(
            f"--load_in_4bit: {base.name} lacks {quantised[0]}, which is trained from the start, "
            "and in four bits cannot be. Leave the flag out."
        )
    return [name for name in [*heads, *drawn] if name not in ("classifier", "score")]


def language_tower(model: Any) -> str:
    """The prefix of the language model's modules in a model of several parts; "" in any other."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next(f"{name}." for name, module in model.named_modules() if module is decoder)


def tower_pattern(model: Any, tower: str, targets: list[str]) -> str:
    """The pattern by which PEFT finds the targets below `tower`, and nowhere else."""
    import torch

    if targets == ["all-linear"]:
        targets = sorted(
            {
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if name.startswith(tower) and isinstance(module, torch.nn.Linear)
            }
        )
    return rf"{re.escape(tower)}(.*\.)?({'|'.join(map(re.escape, targets))})"


def find_parameters(args: argparse.Namespace, model: Any) -> list[str] | None:
    """The parameters that --lora_target_parameters names, each of which the model must have."""
    if not args.lora_target_parameters:
        return None
    there = [name for name, weight in model.named_parameters() if weight.dim() == 3]
    for target in args.lora_target_parameters:
        if not any(name == target or name.endswith(f".{target}") for name in there):
            ends = sorted({".".join(name.split(".")[-3:]) for name in there})
            fail(
                f"--lora_target_parameters {target}: the model has no such tensor of experts. It "
                f"has: {', '.join(ends) or 'none; its layers are --lora_target_modules'}."
            )
    return args.lora_target_parameters


# --- stops, time and money -------------------------------------------------------------------


class Stop:
    """The wish to stop: `reason` is set by a signal or the deadline and obeyed at a step's end."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.training = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear SIGTERM, SIGHUP and Ctrl-C; what nohup ignores stays ignored."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, self.hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def hear(self, number: int, _: Any) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if not self.training:
            if not is_spokesman():
                raise SystemExit(ENDED if LAUNCH in os.environ else PAUSED)
            fail(f"{name} before the first step: nothing is lost. Submit the same command.", PAUSED)
        if self.reason and number == signal.SIGINT:
            # What was committed stands; without this the exit waits for an upload under way.
            self.tell("error: stopped at once; the newest pushed checkpoint stands.")
            os._exit(1)
        self.reason = self.reason or name
        if is_spokesman():
            self.tell(f"{name}: this step is finished, saved and pushed")

    def tell(self, line: str) -> None:
        """Write past Python's buffers, which no handler may enter; a dead terminal is no error."""
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())


class Phases:
    """Seconds that this start has spent, by phase; `enter` ends the phase before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.name, self.began = "start", PROCESS_START

    def enter(self, name: str) -> None:
        now = time.time()
        self.add(self.name, now - self.began)
        self.name, self.began = name, now

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def move(self, name: str, seconds: float) -> None:
        """Count seconds of the present phase, such as a save within training, as another."""
        self.add(name, seconds)
        self.add(self.name, -seconds)


@dataclass(frozen=True)
class Job:
    """The Job that this process runs in, as far as the Jobs API says; else the process itself."""

    id: str | None = None
    namespace: str | None = None
    started: float = PROCESS_START  # seconds since the epoch
    timeout_s: float | None = None
    retries: int = 0
    dollars_per_hour: float | None = None  # of the Jobs of all nodes together

    def dollars(self) -> float:
        """What this run's Jobs have cost so far; billing is by the started minute."""
        minutes = math.ceil((time.time() - self.started) / 60)
        return minutes * (self.dollars_per_hour or 0.0) / 60


def ask_job(job_id: str, namespaces: list[str]) -> dict[str, Any] | None:
    """The Jobs API's raw record of a Job, which may name its timeout; None where it has none."""
    from huggingface_hub import HfApi, get_session
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    def attempt(namespace: str) -> dict[str, Any]:
        url = f"{HfApi().endpoint}/api/jobs/{namespace}/{job_id}"
        response = get_session().get(url, headers=build_hf_headers(), timeout=10)
        hf_raise_for_status(response)
        return response.json()

    for namespace in namespaces:
        try:
            what = f"ask about the job {job_id}"
            return retried(what, lambda _, owner=namespace: attempt(owner), tries=3)
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403, 404):
                raise
    return None


def read_job(store: Store) -> Job:
    """What the Jobs API says about this Job: its start, its price and, if it tells, its end.

    A local run asks nobody. A Job may run in a namespace of an organisation.
    """
    job_id = os.environ.get("JOB_ID")
    if not job_id or store.repo is None or RANK:
        return Job(job_id)
    from httpx2 import HTTPError
    from huggingface_hub import HfApi

    with hub_errors("ask the Hub who you are"):
        user = HfApi().whoami()
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    price, record = None, None
    with contextlib.suppress(HTTPError, OSError, ValueError):
        record = ask_job(job_id, owners)
        hardware = {item.name: item for item in HfApi().list_jobs_hardware()}
        item = hardware.get((record or {}).get("flavor") or "")
        per_hour = {"minute": 60, "hour": 1}
        if item and item.unit_label in per_hour:
            price = NODES * item.unit_cost_usd * per_hour[item.unit_label]
    if record is None:
        print(f"the Jobs API says nothing about this job, {job_id}", flush=True)
        return Job(job_id)
    started = record.get("startedAt")
    return Job(
        job_id,
        record["owner"]["name"],
        datetime.fromisoformat(started).timestamp() if started else PROCESS_START,
        record.get("timeoutSeconds"),
        record.get("retry") or 0,
        price,
    )


def check_money(args: argparse.Namespace, job: Job) -> None:
    """Refuse a relay that could not start its next Job, or a budget that nothing can measure."""
    if args.budget is not None and not args.relay:
        fail("--budget is for --relay: a single Job is bounded by its timeout and --stop_after.")
    if not args.relay or RANK:
        return
    if args.relay < 0 or (args.budget is not None and args.budget <= 0):
        fail("--relay and --budget must be positive.")
    if job.namespace is None:
        fail("--relay reruns the Job that it runs in, and the Jobs API knows of none here.")
    if job.retries:
        fail("--relay and the Job's own retries (--attempts) would each start it; use one of them.")
    if args.budget is not None and job.dollars_per_hour is None:
        fail("--budget needs the flavor's price, which the Jobs API does not tell here.")
    if args.stop_after is None and job.timeout_s is None:
        fail("--relay hands over at a deadline: give --stop_after a little under --timeout.")
    from huggingface_hub import HfApi

    with hub_errors("ask the Hub what this token may do"):
        token = HfApi().whoami().get("auth", {}).get("accessToken", {})
    scopes = token.get("fineGrained", {}).get("scoped", [])
    rights = {right for scope in scopes for right in scope.get("permissions", [])}
    # A login by OAuth names no role.
    if token.get("role", "write") != "write" and "job.write" not in rights:
        fail("--relay starts Jobs, and this token may not. Give HF_TOKEN of role `write`.")


# --- training --------------------------------------------------------------------------------


class Uploader:
    """Pushes one checkpoint at a time beside training; each save first settles the one before."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.name = self.status = self.verified = ""
        self.failing = False
        self.error: BaseException | None = None
        self.began = self.seconds = 0.0  # start and duration of the last try
        self.cut = threading.Event()

    def start(self, name: str, push: Callable[[], str]) -> None:
        """Push in a thread; `push` returns where the checkpoint is then."""
        self.name, self.status, self.error, self.failing = name, f"{name} under way", None, False
        self.cut.clear()
        self.thread = threading.Thread(target=self.work, args=[push], daemon=True)
        self.thread.start()

    def work(self, push: Callable[[], str]) -> None:
        self.began = time.monotonic()
        try:
            where = push()
            self.seconds = time.monotonic() - self.began
            self.verified, self.status = self.name, f"{self.name} on the Hub"
            print(f"{self.name} is on the Hub: {where}, {self.seconds:.1f} s", flush=True)
        except (TakenOver, SystemExit) as error:  # The main thread ends: `settle`.
            self.error = error
        except Exception as error:  # Whatever a Hub answers, training goes on.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.status = f"{self.name} NOT on the Hub"
            print(f"{self.name} is NOT on the Hub: {reason}", flush=True)

    def pause(self, seconds: float) -> bool:
        """Wait between two tries; False once nobody waits for this push any more."""
        self.failing, self.status = True, f"{self.name} NOT on the Hub yet"
        waited = not self.cut.wait(seconds)
        self.began = time.monotonic()
        return waited

    def settle(self, patience_s: float, failing_s: float) -> bool:
        """Wait for the push under way: `patience_s`, but while its tries fail only `failing_s`.

        Returns whether it has ended, well or not.
        """
        began = time.monotonic()
        while self.thread and self.thread.is_alive():
            self.thread.join(0.02)
            waited = time.monotonic() - began
            if self.failing and waited >= failing_s:
                self.cut.set()
            if waited >= patience_s:
                self.cut.set()
                return False
        self.thread = None
        if isinstance(self.error, TakenOver):
            fail(f"{self.error}; this one ends. The newest pushed checkpoint stands.", code=1)
        if self.error:
            raise self.error
        return True


@dataclass
class Run:
    """One start of a training run: its state, its clock, and the way its checkpoints leave."""

    args: argparse.Namespace
    store: Store
    contract: dict[str, Any]
    stop: Stop
    phases: Phases
    job: Job
    checkpoint: Path | None
    uploader: Uploader = field(default_factory=Uploader)
    paused: bool = False
    save_s: float = 0.0
    evaluation_s: float = 0.0
    epoch_ends_with_work: bool = False  # an evaluation or a save is due at each epoch's end
    step_s: float = 0.0
    mark: float = 0.0  # when the step, its log or its evaluation ended
    saved: float = field(default_factory=time.monotonic)
    began: tuple[int, float] = (0, 0.0)  # step and time of the first step of this start
    watch: Watch | None = None
    meter: Meter | None = None
    trainer: Any = None
    grad_norm: Any = None  # of the newest step, before clipping
    sample_s: float = 0.0

    def follow(self, trainer: Any) -> None:
        """Have the trainer call this run: at each step's end, log, evaluation and save."""
        import transformers
        from transformers import TrainerCallback

        run = self
        settings = trainer.args
        strategies = (settings.eval_strategy, settings.save_strategy, settings.logging_strategy)
        self.epoch_ends_with_work = "epoch" in strategies
        self.trainer = trainer
        self.watch.follow_evaluation(self.diverge)
        norm = trainer._get_grad_norm

        def kept_norm(*values: Any, **options: Any) -> Any:
            run.grad_norm = norm(*values, **options)
            return run.grad_norm

        trainer._get_grad_norm = kept_norm

        class Keeper(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                if run.checkpoint:
                    restore_log_window(trainer, run.checkpoint)
                    # Trainer takes --logging_steps from the checkpoint's state.
                    state.compute_steps(args, state.max_steps)
                    restart_random_numbers(trainer, run.checkpoint, state.global_step)
                run.began = state.global_step, time.monotonic()
                run.saved = run.mark = time.monotonic()
                run.meter.began(state.global_step)

            def on_epoch_begin(
                self, args: Any, state: Any, control: Any, train_dataloader: Any, **_: Any
            ) -> None:
                set_order_of_epoch(train_dataloader, args, int(state.epoch or 0))

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                run.end_step(state, control)
                run.sample(state)

            def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                # Trainer ends the epoch of a paused run too, in its middle.
                if run.paused:
                    control.should_log = control.should_evaluate = control.should_save = False

            def on_evaluate(self, *_: Any, **__: Any) -> None:
                run.evaluation_s = time.monotonic() - run.mark
                run.meter.aside += run.evaluation_s
                run.mark = time.monotonic()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
                if RANK == 0:
                    run.report(state, logs)
                # The log of an evaluation comes before on_evaluate, which takes the time.
                if not any(name.startswith("eval_") for name in logs):
                    run.mark = time.monotonic()

            def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                run.save(trainer, state)

        class Bar(transformers.ProgressCallback):
            def on_log(self, *_: Any, **__: Any) -> None:
                """Leave the lines to `report`."""

        trainer.remove_callback(transformers.PrinterCallback)
        if trainer.pop_callback(transformers.ProgressCallback):
            trainer.add_callback(Bar())
        trainer.add_callback(Keeper())

    def train(self, trainer: Any) -> None:
        """Train from the checkpoint to the end, or to a pause, which ends the process."""
        if self.checkpoint and is_at_end(trainer, self.checkpoint):
            load_end(trainer, self.checkpoint)
            return
        self.stop.training = True
        try:
            trainer.train(resume_from_checkpoint=self.checkpoint and str(self.checkpoint))
        except Exception as error:
            self.uploader.settle(self.args.hub_patience, 5.0)
            step = trainer.state.global_step
            if type(error).__name__ == "OutOfMemoryError":
                size = trainer.speed.micro_batch or trainer.args.per_device_train_batch_size
                halves = " or with --auto_batch" if trainer.speed.sort and WORLD_SIZE == 1 else ""
                fail(
                    f"out of memory in step {step + 1}, with micro-batches of {size} rows: "
                    f"{str(error).splitlines()[0]} The same command with "
                    f"--activation_checkpointing true{halves} needs less, and goes on from the "
                    "newest checkpoint, where there is one. So does a new run with a smaller "
                    "--per_device_train_batch_size and more --gradient_accumulation_steps.",
                    code=1,
                )
            # torch's writer names no reason when the disk ends in the middle of a file.
            full = shutil.disk_usage(self.store.folder).free < 2**20
            if full or "No space left" in str(error):
                partial = self.store.folder / f"checkpoint-{step}"
                if not (partial / MANIFEST).is_file():
                    shutil.rmtree(partial, ignore_errors=True)
                fail(
                    f"the disk of {self.store.folder} is full: checkpoint-{step} could not be "
                    "saved. Make room or give another --output_dir; the same command goes on from "
                    f"the newest checkpoint. ({error})",
                    code=1,
                )
            raise
        if self.paused:
            self.pause(trainer.state)

    def end_step(self, state: Any, control: Any) -> None:
        """Ask for a save or the stop where one is due, on every process at the same step."""
        self.step_s, self.mark = time.monotonic() - self.mark, time.monotonic()
        if self.uploader.error:  # Another start has taken over: no further step is paid for.
            self.uploader.settle(0.0, 0.0)
        self.check_finite()
        unlogged = not any("loss" in entry for entry in state.log_history)
        if unlogged and state.global_step >= state.max_steps:
            # A run of fewer steps than --logging_steps shows its loss at the end.
            control.should_log = self.trainer.args.logging_strategy != "no"
        if state.epoch == int(state.epoch) and self.epoch_ends_with_work:
            # Trainer has yet to evaluate and save this step; the next one can be stopped after.
            return
        due = self.mark - self.saved >= 60 * self.args.save_minutes
        if RANK == 0 and not self.stop.reason and time.time() >= self.latest_stop():
            self.stop.reason = "deadline"
        due, stop = any_rank(due and RANK == 0, self.stop.reason is not None)
        control.should_save = control.should_save or due
        if stop and not control.should_training_stop:
            self.stop.reason = self.stop.reason or "another process"
            self.paused = control.should_save = control.should_training_stop = True

    def check_finite(self) -> None:
        """End before a save where the loss or its gradient is no number; weights would be next."""
        import torch

        loss, norm = self.trainer._tr_loss, self.grad_norm
        finite = torch.isfinite(loss)
        # Half precision finds its scale by steps whose gradient overflows, and skips them.
        if norm is not None and self.trainer.accelerator.scaler is None:
            finite = finite & torch.isfinite(torch.as_tensor(norm, device=loss.device)).all()
        (bad,) = any_rank(not finite.item())
        if bad:
            value = norm.item() if hasattr(norm, "item") else norm
            self.diverge(f"the loss or its gradient (norm {value})")

    def diverge(self, what: str) -> NoReturn:
        """End where training has broken; what was saved before stays, here and on the Hub."""
        step = self.trainer.state.global_step
        if RANK:
            # torchrun ends all processes at the first one's exit, so this one waits for the push.
            broadcast(None)
            raise SystemExit(1)
        self.uploader.settle(self.args.hub_patience, 5.0)
        if self.store.repo is None:
            saved = {n for n in self.store.local_steps() if self.store.is_local(f"checkpoint-{n}")}
        else:
            saved = {checkpoint_step(path) for path in self.store.tree} - {None}
        goes_on = f"goes on from checkpoint-{max(saved)} of" if saved else "begins again in"
        self.announce(f"step {step}: {what} is {NOT_FINITE}; nothing of this step is saved")
        broadcast(None)
        fail(
            f"{what} is {NOT_FINITE} at step {step} of {self.trainer.state.max_steps}. Nothing of "
            f"this step is saved; the same command {goes_on} {self.store.name}. If it stops "
            "here again, start another run (--run_name or --output_dir) with a lower "
            "--learning_rate, a longer --warmup_steps or --dtype float32.",
            code=1,
        )

    def sample(self, state: Any) -> None:
        """Show sample answers where they are due; the time counts as none of training."""
        every = self.args.sample_steps
        if not every or state.global_step % every or self.paused:
            return
        self.watch.sample(state.global_step)
        self.sample_s = time.monotonic() - self.mark
        self.meter.aside += self.sample_s
        self.phases.move("samples", self.sample_s)
        self.mark = time.monotonic()

    def announce(self, line: str) -> None:
        """A line of the run, said once and kept in its log."""
        if RANK == 0:
            self.store.say(line)

    def deadline(self) -> float:
        """The moment (seconds since the epoch) at which this process must have ended."""
        ends = [math.inf]
        if self.args.stop_after:
            ends.append(PROCESS_START + self.args.stop_after)
        # Whether a retried Job's clock starts anew is not public: then --stop_after alone decides.
        if self.job.timeout_s and not self.job.retries:
            ends.append(self.job.started + self.job.timeout_s)
        if self.args.budget and self.job.dollars_per_hour:
            left = self.args.budget - self.contract["training"]["relay"]["spent_usd"]
            ends.append(self.job.started + 3600 * left / self.job.dollars_per_hour - 60)
        return min(ends)

    def latest_stop(self) -> float:
        """The deadline less what a stop takes: twice a measured save and push, an evaluation that
        may be due, another step, and some seconds for the process to end.
        """
        deadline = self.deadline()
        if deadline == math.inf:
            return deadline
        window = deadline - PROCESS_START
        measured = self.save_s and (self.uploader.seconds or self.store.repo is None)
        if not measured:
            return deadline - min(60.0, 0.1 * window)
        needed = 2 * (self.save_s + self.uploader.seconds) + self.evaluation_s + self.step_s
        needed += self.sample_s
        return deadline - needed - min(15.0, 0.1 * window)

    def report(self, state: Any, logs: dict[str, Any]) -> None:
        """One line of progress, which also says where the newest checkpoint is."""
        if "train_runtime" in logs:  # The trainer's own summary of this start.
            return
        figures = set(logged_figures(self.watch.newest)) if "eval_loss" in logs else set()
        shown = [
            f"{name} {value:.4g}"
            for name, value in logs.items()
            if isinstance(value, (int, float))
            and not name.endswith(("_runtime", "_per_second"))
            and name not in figures
        ]
        line = f"step {state.global_step}/{state.max_steps} {', '.join(shown)}"
        if figures:
            line += f"; {describe_figures(self.watch.newest)}"
        first, since = self.began
        if "loss" in logs and state.global_step > first:
            pace = (time.monotonic() - since) / (state.global_step - first)
            left = pace * (state.max_steps - state.global_step) / 60
            line += f", {pace:.2f} s/step, {left:.0f} min left"
            line = ", ".join([line, *self.meter.read(state.global_step)])
        if self.uploader.status:
            line += f"; {self.uploader.status}"
        self.store.say(line)

    def save(self, trainer: Any, state: Any) -> None:
        """Complete a checkpoint that Trainer has just written, and push it beside training."""
        name = f"checkpoint-{state.global_step}"
        folder = self.store.folder / name
        write_log_window(trainer, folder)
        gather_rank_files(folder)
        if RANK:
            return
        self.save_s = time.monotonic() - self.mark
        self.phases.move("save", self.save_s)
        best = Path(state.best_model_checkpoint or "").name
        file = folder / "trainer_state.json"
        saved = json.loads(file.read_text(encoding="utf-8"))
        write_state(file, saved | {"best_model_checkpoint": best or None})
        record_base(folder, self.contract)
        write_json(folder / LOGGERS, logger_state())
        training = self.contract["training"]
        training |= {"step": state.global_step, "epoch": round(state.epoch, 4)}
        if "speed" in training:  # --auto_batch may have made micro-batches smaller.
            training["speed"] = asdict(trainer.speed)
        training["state"] = "paused" if self.paused else "running"
        training["relay"] |= {"pending": self.may_relay()}
        if self.paused:
            training["relay"]["spent_usd"] += round(self.job.dollars(), 4)
            training["relay"]["hops"] += training["relay"]["pending"]
        began = time.monotonic()
        ended = self.uploader.settle(self.args.hub_patience if self.paused else 10.0, 0.0)
        self.rotate({name, best, *([] if ended else [self.uploader.name])})
        self.saved = time.monotonic()
        if self.store.repo is None:
            write_manifest(folder, training["run_sha256"])
            write_json(self.store.folder / CONTRACT, self.contract)
        elif ended:
            contract = as_json(self.contract)
            self.uploader.start(name, lambda: self.push(name, best, contract))
        else:
            write_manifest(folder, training["run_sha256"])
            print(f"{name} is NOT on the Hub: the push of {self.uploader.name} is not through yet")
        self.phases.move("push", time.monotonic() - began)
        self.meter.aside += self.save_s + time.monotonic() - began
        self.mark = time.monotonic()

    def rotate(self, kept: set[str]) -> None:
        """Remove local checkpoints beyond the newest --keep_checkpoints and those of `kept`.

        What this run did not write, or skipped when it resumed, is left to its owner.
        """
        training = self.contract["training"]
        earlier = (step for step in self.store.local_steps() if step < training["step"])
        for step in sorted(earlier, reverse=True)[self.args.keep_checkpoints - 1 :]:
            path = self.store.folder / f"checkpoint-{step}"
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
                if path.name not in kept and manifest["run_sha256"] == training["run_sha256"]:
                    shutil.rmtree(path)

    def push(self, name: str, best: str, contract: bytes) -> str:
        """One commit: checkpoint-N with its manifest, contract and log, less older checkpoints."""
        store, saved_step = self.store, int(name.rpartition("-")[2])
        write_manifest(store.folder / name, self.contract["training"]["run_sha256"])
        # The best one is missing there when its own push failed.
        wanted = {name} | ({best} if best and f"{best}/{MANIFEST}" not in store.tree else set())
        files: dict[str, Path | bytes] = {CONTRACT: contract}
        for checkpoint in sorted(wanted):
            manifest = store.folder / checkpoint / MANIFEST
            names = json.loads(manifest.read_text(encoding="utf-8"))["files"]
            for file in (*names, MANIFEST):
                files[f"{checkpoint}/{file}"] = store.folder / checkpoint / file
        files[RUN_LOG] = (store.folder / RUN_LOG).read_bytes()
        found = {checkpoint_step(path) for path in (*store.tree, *files)} - {None}
        # A later one was skipped by the resume: it counts for nothing, and is removed only when
        # this run has passed it, because a bad line may be what was wrong with it.
        newest = sorted((step for step in found if step <= saved_step), reverse=True)
        kept = {*newest[: self.args.keep_checkpoints], checkpoint_step(f"{best}/"), None}
        kept |= {step for step in found if step > saved_step}
        commit_hash = store.push(
            files,
            f"Save {name}",
            lambda path: checkpoint_step(path) in kept,
            self.uploader.pause,
            tries=None,
        )
        for checkpoint in wanted:
            store.check_pushed(checkpoint)
        return f"{store.repo}@{commit_hash[:8]}"

    def push_newest(self, state: Any) -> bool:
        """At a stop or the end: have the newest checkpoint on the Hub, even if its push was left
        out because an earlier one was still under way. Returns whether no push is under way.
        """
        patience_s = self.args.hub_patience
        ended = self.uploader.settle(patience_s + 5, patience_s)
        name = f"checkpoint-{state.global_step}"
        tried = self.uploader.name == name or f"{name}/{MANIFEST}" in self.store.tree
        if not ended or tried or self.store.repo is None or not self.store.is_local(name):
            return ended
        best, contract = Path(state.best_model_checkpoint or "").name, as_json(self.contract)
        self.uploader.start(name, lambda: self.push(name, best, contract))
        return self.uploader.settle(patience_s + 5, patience_s)

    def is_saved(self, step: int) -> bool:
        """Whether the repo, or for a local run the folder, holds this step's checkpoint."""
        name = f"checkpoint-{step}"
        if self.store.repo is None:
            return self.store.is_local(name)
        return self.uploader.verified == name

    def pause(self, state: Any) -> None:
        """Wait until the last checkpoint is where it belongs, say what is left, and end."""
        if RANK:
            # torchrun ends all processes at the first one's exit, so this one waits for the push.
            broadcast(None)
            raise SystemExit(PAUSED)
        self.phases.enter("push")
        self.push_newest(state)
        if not self.is_saved(state.global_step):
            fail(
                f"stopped at step {state.global_step}, and the Hub did not take it. On this "
                f"machine, the same command with --output_dir {self.store.folder} goes on from "
                "there; elsewhere from the newest checkpoint on the Hub.",
                code=1,
            )
        first, since = self.began
        pace = (self.mark - since) / max(1, state.global_step - first)
        left_s = pace * (state.max_steps - state.global_step)
        price = self.job.dollars_per_hour
        machines = "this machine" if NODES == 1 else f"these {NODES} machines"
        left = f"about {left_s / 60:.0f} min" + (
            f" and {left_s / 3600 * price:.2f} $ of {machines}" if price else ""
        )
        # Printed only: after its last commit a paused run writes nothing.
        print(
            f"paused at step {state.global_step} of {state.max_steps}: {self.stop.reason}. "
            f"{left} are left; the same command goes on from here.",
            flush=True,
        )
        self.print_phases()
        if self.contract["training"]["relay"]["pending"]:
            self.hand_over()
        elif self.args.relay:
            print("relay: not run again (a signal, or no hops or budget left)", flush=True)
        if not self.args.output_dir:
            shutil.rmtree(self.store.folder, ignore_errors=True)
        broadcast(None)
        raise SystemExit(PAUSED)

    def may_relay(self) -> bool:
        """Whether this pause is to rerun the Job: a signal, such as a cancellation, never is."""
        relay = self.contract["training"]["relay"]
        if not (self.paused and self.args.relay and self.stop.reason == "deadline"):
            return False
        spent = relay["spent_usd"] + self.job.dollars()
        within = self.args.budget is None or spent < self.args.budget
        return relay["hops"] < self.args.relay and within

    def hand_over(self) -> None:
        """Start this very Job again, its secrets and arguments as they were."""
        from httpx2 import HTTPError
        from huggingface_hub import HfApi

        relay = self.contract["training"]["relay"]
        try:
            following = HfApi().rerun_job(job_id=self.job.id, namespace=self.job.namespace)
        except (HTTPError, OSError) as error:
            fail(f"cannot rerun the Job ({error}). Submit the same command.", PAUSED)
        print(
            f"relay {relay['hops']} of {self.args.relay}: job {following.id} goes on; "
            f"{relay['spent_usd']:.2f} $ spent so far",
            flush=True,
        )

    def print_phases(self) -> None:
        """Seconds per phase and dollars of this start."""
        self.phases.enter("end")
        seconds = dict(self.phases.seconds)
        if self.job.started < PROCESS_START:
            seconds = {"install": PROCESS_START - self.job.started, **seconds}
        shown = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        price = self.job.dollars_per_hour
        money = f"; {self.job.dollars():.2f} $ at {price:.2f} $/h" if price else ""
        print(f"phases: {shown}{money}", flush=True)


def checkpoint_step(path: str) -> int | None:
    """The step of the checkpoint that a repo's path belongs to."""
    match = re.match(r"checkpoint-(\d+)/", path)
    return int(match[1]) if match else None


def any_rank(*flags: bool) -> list[bool]:
    """Each flag, or-ed over all processes of a torchrun start, so that all do the same."""
    if WORLD_SIZE == 1:
        return list(flags)
    import torch
    from torch import distributed

    said = torch.tensor([int(flag) for flag in flags])
    distributed.all_reduce(said, distributed.ReduceOp.MAX)
    return [bool(flag) for flag in said]


def set_order_of_epoch(train_dataloader: Any, args: Any, epoch: int) -> None:
    """Let the order of the rows depend on seed and epoch alone, on every rank.

    Trainer draws a length-sorted order from the global generator, which a resumed run has not
    reached yet, and which dropout has moved differently on each rank. Other samplers know their
    epoch, but not all of them hear of it through the wrappers of ranks and of skipped batches.
    """
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    sampler = train_dataloader.batch_sampler
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    sampler = getattr(sampler, "sampler", sampler)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    elif isinstance(sampler, LengthGroupedSampler):
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler.generator = torch.Generator().manual_seed(seed + epoch)


def write_log_window(trainer: Any, folder: Path) -> None:
    """Save what this rank has summed up since the last logged step, and the count of tokens.

    Returns when every rank has written its files of this checkpoint.
    """
    window = {
        "loss_sum": trainer._tr_loss.item(),
        "last_logged_step": trainer._globalstep_last_logged,
    }
    # Only SFTTrainer has these.
    if hasattr(trainer, "_total_train_tokens"):
        window["metrics"] = trainer._metrics["train"]
        window["num_tokens"] = trainer._total_train_tokens
    file = folder / f"log_window_{trainer.args.process_index}.json"
    file.write_text(json.dumps(window, indent=2) + "\n", encoding="utf-8")
    trainer.accelerator.wait_for_everyone()


def restore_log_window(trainer: Any, folder: Path) -> None:
    """Take up the sums of write_log_window, which Trainer sets to zero before on_train_begin."""
    file = folder / f"log_window_{trainer.args.process_index}.json"
    window = json.loads(file.read_text(encoding="utf-8"))
    trainer._tr_loss.fill_(window["loss_sum"])
    trainer._globalstep_last_logged = window["last_logged_step"]
    if "metrics" in window:
        trainer._metrics["train"].update(window["metrics"])
        trainer._total_train_tokens = window["num_tokens"]


def is_at_end(trainer: Any, folder: Path) -> bool:
    """Whether a checkpoint is the last of its run: no step is left, or the patience is used up.

    Trainer looks at both only after a step, so it would train one more.
    """
    from transformers import EarlyStoppingCallback

    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    dataloader = trainer.get_train_dataloader()
    *_, max_steps = trainer.set_initial_training_values(trainer.args, dataloader)
    if state["global_step"] >= max_steps:
        return True
    saved = state["stateful_callbacks"].get("EarlyStoppingCallback")
    return saved is not None and any(
        saved["attributes"]["early_stopping_patience_counter"] >= callback.early_stopping_patience
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, EarlyStoppingCallback)
    )


def load_end(trainer: Any, folder: Path) -> None:
    """Bring the trainer where its last step had left it: state, and the best or newest weights.

    Returns when every rank has read them.
    """
    from peft import load_peft_weights, set_peft_model_state_dict
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    # Not to trainer.args.device: under torchrun that is cpu:0, which safetensors does not know.
    weights = load_peft_weights(str(best or folder), device="cpu")
    set_peft_model_state_dict(trainer.model, weights)
    trainer.accelerator.wait_for_everyone()


def keep_four_bit_layout(model: Any) -> None:
    """Keep a base in four bits as it was loaded; called before the trainer is built.

    On a CPU with AVX512-BF16 bitsandbytes repacks each layer at the first evaluation, in place and
    with loss. From then on no gradient flows through the layer, and a resumed run, which starts
    from the loaded layout, differs.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def build_settings(
    args: argparse.Namespace,
    config: Any,
    device: str,
    precision: str,
    evaluates: bool,
    folder: Path,
) -> Any:
    """SFTConfig or TrainingArguments: ours, then the user's further fields, as they allow."""
    import transformers

    best = evaluates and chooses_weights(args)
    options = {name: getattr(args, name) for name in TRAINER_FLAGS} | {
        "output_dir": str(folder),
        "save_strategy": "steps",
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": args.save_steps,
        "load_best_model_at_end": evaluates and args.early_stopping_patience > 0,
        "metric_for_best_model": args.metric_for_best_model if best else None,
        # The run stops there; the filter would hide it.
        "logging_nan_inf_filter": False,
        # Without this the patience counts from zero after each resume.
        "restore_callback_states_from_checkpoint": True,
        "use_cpu": device == "cpu",
        "bf16": precision == "bfloat16",
        # Where it is needed, choose_speed finds out.
        "activation_checkpointing": False,
        # A Job's log has no terminal to redraw a bar on.
        "disable_tqdm": not sys.stderr.isatty(),
        # Only an expert can be without a gradient, because no token was sent to it.
        "ddp_find_unused_parameters": has_experts(config),
        # Of the Space that trackio makes; nothing else here reads it.
        "hub_private_repo": True,
    }
    further = dict(args.trainer_fields)
    if not evaluates:
        for name in further.keys() & {"eval_strategy", "load_best_model_at_end"}:
            print(f"--{name} has no effect: there is no validation data", flush=True)
            del further[name]
    kind = transformers.TrainingArguments
    if args.task == "causal":
        import trl

        kind, options["max_length"] = trl.SFTConfig, args.max_length
        if hasattr(config, "router_aux_loss_coef"):
            # The experts' balance is no part of the task, and its loss would choose the weights.
            options["router_aux_loss_coef"] = 0.0
    try:
        return kind(**options | further)
    except (TypeError, ValueError) as error:
        fail(f"{kind.__name__} refuses these arguments: {error}")


def build_trainer(
    args: argparse.Namespace,
    settings: Any,
    model: Any,
    base: Repo,
    tokenizer: Any,
    rows: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    weights: dict[str, float] | None = None,
) -> Any:
    """TRL's SFTTrainer on token ids, or transformers' Trainer for a classifier, both with LoRA."""
    import transformers
    from datasets import Dataset

    train, validation = (Dataset.from_list(split) if split else None for split in rows)
    config = lora_config(args, model, base)
    common = {"train_dataset": train, "eval_dataset": validation, "processing_class": tokenizer}
    if args.task == "classify":
        import peft

        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if weights:
            weigh_labels(model, [*weights.values()])
        if args.load_in_4bit:
            # Activation checkpointing comes later, where it is needed.
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        collator = transformers.DataCollatorWithPadding(tokenizer)
        model = peft.get_peft_model(model, config)
        kind = type("FastTrainer", (FastSteps, transformers.Trainer), {})
        trainer = kind(model, settings, data_collator=collator, **common)
        # A classifier's loss is the mean of its own batch. Trainer takes its **kwargs for a sign
        # that it divides by the accumulated batch itself, and would sum the means.
        trainer.model_accepts_loss_kwargs = False
    else:
        import trl

        kind = type("FastTrainer", (FastSteps, trl.SFTTrainer), {})
        try:
            trainer = kind(model, args=settings, peft_config=config, **common)
        except ValueError as error:  # For example LoRA on lm_head.
            fail(f"trl.SFTTrainer refuses these arguments: {error}")
        # It would write its own card over a README.md of the user's, at every save.
        trainer.create_model_card = lambda *_, **__: None
    keep_four_bit_layout(trainer.model)
    # TRL makes the LoRA weights of a quantised model bfloat16, but a resume loads them as
    # float32: only float32 from the start continues as the same run.
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if settings.load_best_model_at_end and args.early_stopping_patience > 0:
        trainer.add_callback(
            transformers.EarlyStoppingCallback(
                args.early_stopping_patience, args.early_stopping_threshold
            )
        )
    return trainer


def warn_of_warmup(settings: Any, num_rows: int) -> None:
    """Say when a run ends before its learning rate is reached, as short ones do."""
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    steps = math.ceil(num_rows / (batch * WORLD_SIZE)) * settings.num_train_epochs
    steps = settings.max_steps if settings.max_steps > 0 else math.ceil(steps)
    if settings.warmup_steps >= steps:
        print(
            f"warning: --warmup_steps {settings.warmup_steps:.0f} of {steps} steps: the learning "
            "rate is never reached. --warmup_steps 0.1 is a tenth of the steps.",
            flush=True,
        )


def record_base(folder: Path, contract: dict[str, Any]) -> None:
    """Name the base in a saved adapter as the contract does: of a local one only the last part.

    It is done after saving, because PEFT looks the base up by this name while it saves.
    """
    file = folder / "adapter_config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, saved | {"base_model_name_or_path": contract["base_model"]["repo"]})


def finish(run: Run, trainer: Any, tokenizer: Any) -> None:
    """Push adapter, tokenizer, contract and card to the root in one commit; check and list them."""
    store, contract, state = run.store, run.contract, trainer.state
    if not run.push_newest(state):
        fail(
            f"the push of {run.uploader.name} is not through, so the end cannot be pushed. On this "
            f"machine, the same command with --output_dir {store.folder} goes on from here.",
            code=1,
        )
    final = store.folder / ".final"
    shutil.rmtree(final, ignore_errors=True)
    trainer.save_model(str(final))
    tokenizer.save_pretrained(final)
    record_base(final, contract)
    finite = state.best_metric is not None and math.isfinite(state.best_metric)
    kept = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    contract["training"] |= {
        "state": "complete",
        "step": state.global_step,
        "epoch": round(state.epoch, 4),
        "weights_of_step": int(kept.rpartition("-")[2]) if kept else state.global_step,
        "best_metric": state.best_metric if finite else None,
    }
    write_json(final / CONTRACT, contract)
    (final / "README.md").write_text(model_card(store, contract), encoding="utf-8")
    (final / "training_args.bin").unlink()
    # Only what was written just now is pushed: --output_dir may hold files of the user's.
    names = sorted(path.name for path in final.iterdir())
    files: dict[str, Path | bytes] = {name: (final / name).read_bytes() for name in names}
    card = store.folder / "README.md"
    if card.is_file() and CARD_TITLE not in card.read_text(encoding="utf-8", errors="replace"):
        (final / card.name).unlink()
    for path in list(final.iterdir()):
        path.replace(store.folder / path.name)
    final.rmdir()
    before = probe_scores(trainer, tokenizer, contract)
    if store.repo:
        store.say(f"finished at step {state.global_step}; pushing the adapter")
        push_final(run, files)
    reload_adapter(store, trainer)
    after = probe_scores(trainer, tokenizer, contract)
    difference = max(abs(x - y) for x, y in zip(before, after, strict=True))
    if not difference <= PROBE_TOLERANCE:
        contract["training"]["state"] = "running"
        write_json(store.folder / CONTRACT, contract)
        with hub_errors(f"push to {store.name}"), contextlib.suppress(TakenOver):
            store.push({CONTRACT: as_json(contract)}, "Take the end back")
        fail(f"the adapter in {store.name} scores otherwise than the trained one.", code=1)
    names += write_run_results(run, trainer)
    print_receipt(run, [*names, RUN_LOG], difference)
    print(f"next: uv run eval/eval.py --adapter {store.repo or store.folder.resolve()}", end="")
    print("" if "repo" in contract["dataset"] else " --test_file POSTS.jsonl", flush=True)


def push_final(run: Run, files: dict[str, Path | bytes]) -> None:
    """Commit the root's files, after the history is squashed where that is asked for."""
    store, failing_since = run.store, []

    def pause(seconds: float) -> bool:
        failing_since.append(time.monotonic())
        left = failing_since[0] + run.args.hub_patience - time.monotonic()
        time.sleep(max(0.0, min(seconds, left)))
        return left > 0

    files[RUN_LOG] = (store.folder / RUN_LOG).read_bytes()
    with hub_errors(f"push the adapter to {store.repo}; it is still in {store.folder}"):
        try:
            if run.args.squash_history:
                squash_history(store)
            title = f"{FINISH} {run.contract['training']['step']}"
            store.push(files, title, pause=pause, tries=None)
        except TakenOver as error:
            fail(f"{error}; this one ends, and its adapter is in {store.folder}.", code=1)
    if run.args.reclaim_storage:
        with hub_errors(f"reclaim the storage of {store.repo}"):
            reclaim_storage(store.repo)


def probe_scores(trainer: Any, tokenizer: Any, contract: dict[str, Any]) -> list[float]:
    """Log-likelihood of each label for two fixed posts, from the model as it stands."""
    import torch

    model, scores = trainer.model.eval(), []
    rendering, strategy = contract["rendering"], contract["prompt"]
    with torch.no_grad(), trainer.autocast_smart_context_manager():
        for post in (PROBE_POST, "The council met on Monday."):
            if strategy is None:
                ids, _ = encode_post(tokenizer, post, rendering["max_length"])
                answers = {}
            else:
                scaffold = read_scaffold(rendering)
                messages = prompt_messages(strategy, post)
                contents = [message["content"] for message in messages]
                ids = encode_contents(tokenizer, scaffold, contents)
                answers = rendering["label_completions"]
            for answer in answers.values() or [[]]:
                batch = torch.tensor([ids + answer], device=model.device)
                logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits
                if not answer:
                    scores += logits[0].float().log_softmax(-1).tolist()
                    continue
                steps = logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
                chosen = steps.gather(1, torch.tensor(answer, device=steps.device)[:, None])
                scores.append(chosen.sum().item())
    return scores


def reload_adapter(store: Store, trainer: Any) -> None:
    """Replace every trained weight by what the repo or folder holds: what others will load.

    The weights are set to zero first, so that one which the file lacks cannot stay unnoticed.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    with hub_errors(f"read the adapter back from {store.name}"):
        if store.repo:
            (store.folder / ADAPTER_WEIGHTS).unlink()
        store.download([ADAPTER_WEIGHTS, "adapter_config.json"])
    zero_trained(trainer.model)
    weights = load_peft_weights(str(store.folder), device="cpu", use_safetensors=True)
    if trainer.is_fsdp_enabled:
        set_sharded(trainer.model, weights)
    else:
        set_peft_model_state_dict(trainer.model, weights)


def zero_trained(model: Any) -> None:
    """Set to zero what the adapter has to bring, the base's randomly drawn weights included."""
    drawn = model.get_base_model().drawn
    for name, weight in model.named_parameters():
        plain = re.sub(r"^base_model\.model\.|\.(original_module|base_layer)\b", "", name)
        if weight.requires_grad or plain in drawn:
            weight.data.zero_()


def print_receipt(run: Run, names: list[str], difference: float) -> None:
    """What there is now and where: repo, path, commit and size."""
    store, state = run.store, run.contract["training"]
    with hub_errors(f"list {store.name}"):
        store.look()
    sizes: dict[str, int] = {}
    for path, (size, _) in sorted(store.tree.items()):
        if path in names:
            sizes[path] = size
        elif checkpoint_step(path) is not None:
            folder = path.partition("/")[0] + "/"
            sizes[folder] = sizes.get(folder, 0) + size
    place = f"{store.repo}@{store.head[:8]}" if store.repo else str(store.folder)
    print(f"artefacts in {place}:")
    for path, size in sizes.items():
        print(f"  {path:<32} {size / 1e6:10.3f} MB")
    print(
        f"adapter: {place} (step {state['step']}, epoch {state['epoch']}); read back, its scores "
        f"of two probe posts differ by {difference:.1e}"
    )
    run.print_phases()


def squash_history(store: Store) -> None:
    """Make main one commit, unless an adapter ever stood there that others may have pinned."""
    from huggingface_hub import HfApi

    api = HfApi()
    if any(entry.title.startswith(FINISH) for entry in api.list_repo_commits(store.repo)):
        print("--squash_history is left out: an evaluation or a merge may have pinned a commit")
        return
    store.follow_head()
    api.super_squash_history(store.repo, commit_message="Squash the checkpoints' history")
    store.look()


def reclaim_storage(repo: str) -> None:
    """Delete for good the LFS objects that no branch, tag or finished root uses.

    No history is rewritten, so every commit that an evaluation or a merge has pinned stays, and
    with it the adapter at its root.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    named = (*refs.branches, *refs.tags, *refs.converts, *(refs.pull_requests or []))
    heads = {ref.target_commit for ref in named}
    finished = {
        entry.commit_id for entry in api.list_repo_commits(repo) if entry.title.startswith(FINISH)
    }
    used = {
        item.lfs.sha256
        for revision in heads | finished
        for item in api.list_repo_tree(repo, recursive=True, revision=revision)
        if isinstance(item, RepoFile) and item.lfs
        if revision in heads or "/" not in item.path
    }
    gone = [file for file in api.list_lfs_files(repo) if file.file_oid not in used]
    api.permanently_delete_lfs_files(repo, gone, rewrite_history=False)
    size = sum(file.size for file in gone)
    print(f"--reclaim_storage: {len(gone)} objects deleted, {size / 1e6:.1f} MB", flush=True)


def model_card(store: Store, contract: dict[str, Any]) -> str:
    """README.md of the adapter repo."""
    base, data = contract["base_model"]["repo"], contract["dataset"]
    metadata = {"library_name": "peft", "tags": ["hate-speech-detection", "lora"]}
    if contract["base_model"]["revision"]:
        metadata["base_model"] = base
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    source = data.get("file") or f"{data['repo']} at {data['revision'] or 'a local folder'}"
    training = contract["training"]
    return f"""---
{front}
---
{CARD_TITLE} {base}

A research detector for English posts with the labels {", ".join(contract["labels"])}. It makes
errors, and not the same ones for every group; it is not for unattended removal of posts.

* Task: {contract["task"]}; prompt: {(contract["prompt"] or {}).get("name", "none")}
* Data: {source}
* Groups the evaluation reports on: {", ".join(contract["groups"]) or "none"}
* Trained for {training["step"]} steps ({training["epoch"]} epochs); these are the weights of step
  {training["weights_of_step"]}

`contract.json` holds every argument, the commits of base model and data, and the rendered prompt.

    uv run eval/eval.py --adapter {store.repo or "./" + store.folder.name}
"""


# --- speed -----------------------------------------------------------------------------------

# What a micro-batch costs beside its tokens, in tokens (Llamas of 20M and 100M on two cores). A GPU
# launches its kernels in the time of many more: there it is measured.
MICRO_BATCH_COST = 64
# Below this many parameters a step is mostly overhead, and measuring would choose by noise.
MEASURED_FROM = 5_000_000
# By how much of itself a loss may differ when it is computed in another way: in float32 on a CPU,
# and where products are rounded to bfloat16 or TF32.
SAME_LOSS, SAME_ROUNDED_LOSS = 1e-5, 3e-3
# Bytes of float32 scores, their softmax and their gradients at the supervised tokens of a
# micro-batch; TRL's own loss computes more of them in pieces.
MOST_SCORES = 2**31
# Parts of a layer that act on each token by itself and make no key and no value of attention, by
# the names they have in Llama and its kin, GPT-2, BERT and its kin, ModernBERT, Mixtral.
TOKENWISE = frozenset(
    (
        *("q_proj", "o_proj", "mlp", "block_sparse_moe", "feed_forward", "c_proj"),
        *("query", "dense", "intermediate", "Wo"),
    )
)


@dataclass
class Speed:
    """How a run computes its steps: chosen at its first start, kept in the contract.

    The rows of each step and its loss are the same whatever is chosen, but for rounding; a resumed
    run takes what the first start chose, so that the rounding is the same too. The values here are
    those of a stock trainer, and where an older version of this script recorded less, its own.
    """

    sort: bool = False  # each step's rows by length, in micro-batches with little padding
    micro_batch: int = 0  # rows of the longest length that one micro-batch may hold
    micro_batch_cost: int = MICRO_BATCH_COST  # beside its tokens, in tokens
    labelled_only: bool = False  # logits at supervised positions only
    last_layer: str | None = None  # its tokens that are read: labelled, or a row's first or last
    prompt_tokens: int = 0  # the common beginning of all rows, computed once a step
    packed: bool = False  # a micro-batch is one row without padding
    attention: str | None = None
    activation_checkpointing: bool = False


@dataclass
class Rows:
    """Rows as the data loader hands them over: a step puts them together."""

    rows: list[dict[str, Any]]


@dataclass
class Step:
    """All rows of one process's optimizer step, and the micro-batches they are computed in."""

    rows: list[dict[str, Any]]
    batches: list[dict[str, Any]]


def split_by_length(
    lengths: list[int], most_tokens: int, shared: int = 0, cost_of_one: int = MICRO_BATCH_COST
) -> list[list[int]]:
    """Indices of rows, the longest first, in micro-batches that together cost least.

    A micro-batch costs its rows times its longest length, and `cost_of_one`. With `shared` tokens
    before each row it holds at most `most_tokens`, or one row.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    costs, starts = [0.0], [0]
    for end in range(1, len(order) + 1):
        least, begin = math.inf, end - 1
        for start in range(end - 1, -1, -1):
            count, longest = end - start, lengths[order[start]]
            if count > 1 and count * (longest + shared) > most_tokens:
                break
            cost = costs[start] + count * longest + cost_of_one
            if cost < least:
                least, begin = cost, start
        costs.append(least)
        starts.append(begin)
    batches, end = [], len(order)
    while end:
        batches.append(order[starts[end] : end])
        end = starts[end]
    return batches[::-1]


def split_evenly(lengths: list[int], most_rows: int) -> list[list[int]]:
    """Indices of rows, the longest first, in equal micro-batches: as many on every process."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + most_rows] for start in range(0, len(order), most_rows)]


class FastSteps:
    """What turns a trainer class into one that computes a step as its `speed` says.

    Trainer counts gradient_accumulation_steps micro-batches in each step. Here the last of them
    holds all rows of the step and the others none, so that the rows can be put together anew.
    """

    speed = Speed()
    auto_batch = False
    longest = 0  # tokens of the longest training row
    prompt: tuple[int, ...] = ()
    cache: list[tuple[Any, Any]] | None = None
    counts: list[Any] | None = None

    def get_train_dataloader(self) -> Any:
        if not self.speed.sort:
            return super().get_train_dataloader()
        collator, self.data_collator = self.data_collator, Rows
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        import torch

        if not self.speed.sort:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        taken = list(itertools.islice(epoch_iterator, num_batches))
        if not taken:
            return [], None
        step = self.build_step([row for batch in taken for row in batch.rows])
        count = torch.tensor(sum(map(self.count_targets, step.batches)), device=device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count).sum()
        return [Step([], []) for _ in taken[1:]] + [step], count

    def build_step(self, rows: list[dict[str, Any]]) -> Step:
        """Put rows together in micro-batches of similar length."""
        shared, most = self.speed.prompt_tokens, self.speed.micro_batch
        lengths = [len(row["input_ids"]) - shared for row in rows]
        if self.args.world_size > 1:
            parts = split_evenly(lengths, most)
        else:
            cost = self.speed.micro_batch_cost
            parts = split_by_length(lengths, most * self.longest, shared, cost)
        return self.put_together([[rows[index] for index in part] for part in parts])

    def put_together(self, parts: list[list[dict[str, Any]]]) -> Step:
        """A step in these micro-batches."""
        return Step([row for part in parts for row in part], [self.collate(part) for part in parts])

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if self.speed.prompt_tokens:
            batch = add_row_weights(collate_after_prompt(rows, self.speed.prompt_tokens), rows)
        elif self.speed.packed:
            batch = add_row_weights(collate_packed(rows), rows)
        else:
            batch = dict(self.data_collator(rows))
        if self.speed.labelled_only:
            # A GPU would have to end its work before it could tell how many there are.
            batch["places"] = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
        return batch

    def count_targets(self, batch: dict[str, Any]) -> int:
        """What the loss is a mean over: supervised tokens, or a classifier's rows."""
        labels = batch["labels"]
        return labels.shape[0] if labels.dim() == 1 else int((labels[..., 1:] != -100).sum())

    def floating_point_ops(self, inputs: Any) -> int:
        import torch

        if not isinstance(inputs, Step):
            return super().floating_point_ops(inputs)
        size = sum(batch["input_ids"].numel() for batch in inputs.batches)
        if not size:
            return 0
        size += self.speed.prompt_tokens
        return super().floating_point_ops({"input_ids": torch.empty(size, device="meta")})

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        import torch

        if not isinstance(inputs, Step):
            return super().training_step(model, inputs, num_items_in_batch)
        if not inputs.rows:
            return torch.zeros((), device=self.args.device)
        kept = self.kept_state()
        while True:
            try:
                loss = self.run_step(model, inputs, num_items_in_batch)
                break
            except torch.OutOfMemoryError:
                # Other processes wait for this one within the step.
                if not self.auto_batch or self.speed.micro_batch == 1 or self.args.world_size > 1:
                    raise
            self.halve()
            self.restore_state(kept)
            inputs = self.build_step(inputs.rows)
        self.write_counts("train", sum(len(row["input_ids"]) for row in inputs.rows))
        return loss

    def run_step(self, model: Any, step: Step, num_items_in_batch: Any) -> Any:
        """Forward and backward of all micro-batches; gradients are shared in the last one."""
        import torch

        model.train()
        # Copied to the device before its work begins: a copy waits for what is being computed.
        batches = [self._prepare_inputs(batch) for batch in step.batches]
        states = self.read_prompt(model) if self.speed.prompt_tokens else []
        loss = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(batches, start=1):
            waits = number < len(batches)
            with self.accelerator.no_sync(model) if waits else contextlib.nullcontext():
                loss += super().training_step(model, batch, num_items_in_batch)
        self.end_prompt(states)
        return loss

    def read_prompt(self, model: Any) -> list[Any]:
        """Compute the prompt's keys and values; `cache` gets copies that collect gradients."""
        import torch
        from transformers import DynamicCache

        with self.compute_loss_context_manager():
            found = model(
                input_ids=torch.tensor([self.prompt], device=self.args.device),
                # The model's own cache keeps only the window of a layer that slides.
                past_key_values=DynamicCache(),
                use_cache=True,
                logits_to_keep=1,
            ).past_key_values
        pairs = [(layer.keys, layer.values) for layer in found.layers]
        self.cache = [
            tuple(state.detach().requires_grad_(state.requires_grad) for state in pair)
            for pair in pairs
        ]
        return [state for pair in pairs for state in pair]

    def end_prompt(self, states: list[Any]) -> None:
        """Carry the gradients that the rows left at the prompt's keys and values through it."""
        import torch

        copies = [state for pair in self.cache or () for state in pair]
        reached = [
            (state, copy.grad)
            for state, copy in zip(states, copies, strict=True)
            if copy.grad is not None
        ]
        self.cache = None
        if reached:
            torch.autograd.backward(*zip(*reached, strict=True))

    def kept_state(self) -> Any:
        """What a step that runs out of memory has to be begun again from."""
        import torch

        if not self.auto_batch:
            return None
        device = self.args.device
        numbers = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        metrics = getattr(self, "_metrics", {"train": {}})["train"]
        tokens = getattr(self, "_total_train_tokens", 0)
        kept = {name: list(values) for name, values in metrics.items()}
        return torch.get_rng_state(), numbers, kept, tokens

    def restore_state(self, kept: Any) -> None:
        import torch

        numbers, on_device, metrics, tokens = kept
        torch.set_rng_state(numbers)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, self.args.device)
        if hasattr(self, "_metrics"):
            self._metrics["train"].clear()
            self._metrics["train"].update({name: [*values] for name, values in metrics.items()})
            self._total_train_tokens = tokens

    def halve(self) -> None:
        """Make micro-batches smaller after a step ran out of memory."""
        size = self.speed.micro_batch
        self.speed.micro_batch = size // 2
        release_memory(self)
        print(
            f"--auto_batch: out of memory in step {self.state.global_step + 1}; it is computed "
            f"again with micro-batches of {size // 2} rows instead of {size}",
            flush=True,
        )

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        training = self.model.training
        if "labels" in inputs and inputs["labels"].dim() == 1:
            num_rows = len(inputs["labels"])  # Smoothing takes the labels out of the inputs.
            with self.reading(inputs, self.places_of_rows(inputs) if training else None):
                if "loss_weights" in inputs:
                    found = weighted_loss(model, inputs) / num_rows
                else:
                    found = super().compute_loss(model, inputs, return_outputs)
            if not (training and self.speed.sort):
                return found
            share = num_rows * self.num_averaged() / num_items_in_batch
            return found * share
        if return_outputs or not self.speed.labelled_only:
            if "loss_weights" in inputs:
                total = weighted_loss(model, inputs) * self.num_averaged()
                return total / num_items_in_batch
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        tokens = inputs.get("attention_mask", inputs["input_ids"].new_ones(())).sum()
        loss, counts = self.labelled_loss(model, inputs)
        if training and self.counts is not None:
            counts += self.counts
        self.counts = counts
        if not training:
            self.write_counts("eval", int(tokens))
        if num_items_in_batch is None:
            return loss / counts[2].clamp(min=1)
        return loss / num_items_in_batch * self.num_averaged()

    def num_averaged(self) -> int:
        """The processes whose gradients are averaged although the count is that of all."""
        return self.args.world_size if self.args.average_tokens_across_devices else 1

    def labelled_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """Summed cross entropy (float32), and summed entropy, hits and count of the targets.

        The model's own head, with whatever scaling follows it, sees the positions before a
        supervised token and no others.
        """
        import torch
        from torch.nn import functional

        inputs = dict(inputs)
        targets, weights = inputs.pop("labels")[:, 1:], inputs.pop("loss_weights", None)
        places = inputs.pop("places", None) or (targets != -100).nonzero(as_tuple=True)
        options: dict[str, Any] = {"use_cache": False}
        if inputs.pop("after_prompt", False):
            options = {"use_cache": True, "past_key_values": self.past(len(targets))}

        def keep(_: Any, states: tuple[Any, ...]) -> tuple[Any, ...]:
            return (states[0][places], *states[1:])

        head = self.model.get_base_model().get_output_embeddings()
        hook = head.register_forward_pre_hook(keep)
        try:
            with self.reading(inputs, places if self.speed.last_layer else None):
                logits = model(**inputs, **options).logits.float()
        finally:
            hook.remove()
        wanted = targets[places]
        if weights is None:
            loss = functional.cross_entropy(logits, wanted, reduction="sum")
        else:
            losses = functional.cross_entropy(logits, wanted, reduction="none")
            loss = (losses * weights[:, 1:][places]).sum()
        with torch.no_grad():
            scores = logits.log_softmax(-1)
            entropy = -(scores.exp() * scores).sum()
            hits = (logits.argmax(-1) == wanted).sum()
            counts = torch.stack([entropy, hits.float(), torch.ones_like(wanted).sum().float()])
        return loss, counts

    def places_of_rows(self, inputs: dict[str, Any]) -> Any:
        """Row and place of the token that a classifier's head reads of each row, or None."""
        import torch

        if self.speed.last_layer is None:
            return None
        mask = inputs["attention_mask"]
        rows = torch.arange(len(mask), device=mask.device)
        if self.speed.last_layer == "first":
            return rows, torch.zeros_like(rows)
        return rows, (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)

    @functools.cached_property
    def last_parts(self) -> list[Any]:
        return tokenwise_modules(self.model.get_base_model())

    @contextlib.contextmanager
    def reading(self, inputs: dict[str, Any], places: Any) -> Iterator[None]:
        """Compute of the last layer only the tokens at `places` (rows, positions); None: all.

        Keys and values are made of all tokens. What the other tokens would get is left at 0, and
        nothing reads it.
        """

        def narrow(_: Any, states: tuple[Any, ...]) -> tuple[Any, ...]:
            return (states[0][places][None], *states[1:])

        def widen(_: Any, __: Any, output: Any) -> Any:
            found = output[0] if isinstance(output, tuple) else output
            found = found.flatten(0, -2)
            whole = found.new_zeros(*inputs["input_ids"].shape, found.shape[-1])
            whole = whole.index_put(places, found)
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        modules = self.last_parts if places is not None else []
        hooks = [module.register_forward_pre_hook(narrow) for module in modules]
        hooks += [module.register_forward_hook(widen) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def past(self, num_rows: int) -> Any:
        """The prompt's keys and values for each of some rows, as a cache of their own."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, pair in enumerate(self.cache):
            keys, values = (state.expand(num_rows, -1, -1, -1) for state in pair)
            cache.update(keys, values, layer)
        return cache

    def write_counts(self, mode: str, num_tokens: int) -> None:
        """Add what labelled_loss counted to the metrics that TRL logs under the same names."""
        import torch

        if self.counts is None:
            return
        counts = torch.cat([self.counts, self.counts.new_tensor([num_tokens])])
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        entropy, hits, total, tokens = counts.tolist()
        metrics = self._metrics[mode]
        metrics["entropy"].append(entropy / max(1.0, total))
        metrics["mean_token_accuracy"].append(hits / max(1.0, total))
        if mode == "train":
            self._total_train_tokens += round(tokens)
        metrics["num_tokens"] = [self._total_train_tokens]
        self.counts = None


def tokenwise_modules(base: Any) -> list[Any]:
    """The parts of a model's last layer that act on each token by itself: those of TOKENWISE.

    [] for a model without a list of layers.
    """
    import torch

    tower = base.get_submodule(language_tower(base).removesuffix("."))
    num_layers = base.config.get_text_config().num_hidden_layers
    stacks = [module for module in tower.modules() if isinstance(module, torch.nn.ModuleList)]
    last = next((stack[-1] for stack in stacks if len(stack) == num_layers), None)

    def parts(module: Any) -> Iterator[Any]:
        for name, child in module.named_children():
            if name in TOKENWISE:
                yield child
            else:
                yield from parts(child)

    return [] if last is None else [*parts(last)]


def collate_after_prompt(rows: list[dict[str, Any]], shared: int) -> dict[str, Any]:
    """A padded micro-batch of what follows the first `shared` tokens of each row."""
    import torch

    size = max(len(row["input_ids"]) for row in rows) - shared
    ids = torch.zeros(len(rows), size, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros(len(rows), shared + size, dtype=torch.long)
    for number, row in enumerate(rows):
        length = len(row["input_ids"]) - shared
        ids[number, :length] = torch.tensor(row["input_ids"][shared:])
        labels[number, :length] = torch.tensor(row["labels"][shared:])
        mask[number, : shared + length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "after_prompt": True}


def collate_packed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A micro-batch as one row without padding; positions and lengths say where each row begins.

    Flash attention reads cu_seq_lens_*, other implementations find the rows by their positions.
    """
    import torch

    lengths = [len(row["input_ids"]) for row in rows]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    labels = [label for row in rows for label in (-100, *row["labels"][1:])]
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def choose_speed(
    args: argparse.Namespace, trainer: Any, contract: dict[str, Any], resumed: bool
) -> None:
    """Decide how this run computes its steps, and record it; a resumed run takes what stands."""
    training, device = contract["training"], trainer.args.device.type
    explicit = args.trainer_fields.get("activation_checkpointing")
    if "speed" in training:
        trainer.speed = Speed(**training["speed"])
        # Another machine may have less memory.
        if explicit is not None:
            trainer.speed.activation_checkpointing = explicit
            trainer.speed.prompt_tokens *= not explicit
            trainer.speed.last_layer = None if explicit else trainer.speed.last_layer
        # What began as one process may have shared the prompt; several cannot.
        trainer.speed.prompt_tokens *= WORLD_SIZE == 1
    elif resumed:
        # What an older version of this script began has no record: it goes on as it was.
        on = device == "cuda" if explicit is None else explicit
        trainer.speed = Speed(activation_checkpointing=on)
    else:
        chosen = None
        if RANK == 0:
            measure_speed(args, trainer)
            chosen = asdict(trainer.speed)
        trainer.speed = Speed(**broadcast(chosen))
        training["speed"] = asdict(trainer.speed)
    apply_speed(args, trainer)
    if "speed" in training:
        print(f"speed: {describe_speed(trainer)}", flush=True)


def describe_speed(trainer: Any) -> str:
    """What was chosen, in words."""
    speed, settings = trainer.speed, trainer.args
    num_rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    said = []
    if speed.sort:
        form = "without padding" if speed.packed else "by length"
        said.append(
            f"the {num_rows} rows of a step {form} in micro-batches of up to "
            f"{speed.micro_batch * trainer.longest} tokens"
        )
    if speed.prompt_tokens:
        said.append(f"{speed.prompt_tokens} prompt tokens once a step")
    if speed.labelled_only:
        said.append("logits at supervised tokens only")
    if speed.last_layer:
        read = {"labelled": "supervised tokens", "first": "first token", "last": "last token"}
        said.append(f"of the last layer the {read[speed.last_layer]} only")
    said.append(f"attention {trainer.model.config._attn_implementation}")
    said.append(f"activation checkpointing {'on' if speed.activation_checkpointing else 'off'}")
    return ", ".join(said)


def apply_speed(args: argparse.Namespace, trainer: Any) -> None:
    """Set up model and trainer as `trainer.speed` says."""
    speed, settings = trainer.speed, trainer.args
    trainer.auto_batch = args.auto_batch
    # The loss of such a step is already that of all its rows.
    trainer.loss_is_scaled_for_ga = True if speed.sort else None
    trainer.longest = max(map(len, trainer.train_dataset["input_ids"]))
    trainer.prompt = tuple(trainer.train_dataset[0]["input_ids"][: speed.prompt_tokens])
    if speed.attention:
        set_attention(trainer, speed.attention)
    set_checkpointing(trainer, speed.activation_checkpointing)
    if settings.bf16:
        round_frozen(trainer.model)
    if settings.torch_compile:
        print("--torch_compile: pays after many steps only, and is not combined with the above")


def set_attention(trainer: Any, name: str) -> None:
    """Switch the attention implementation, or end where the model or the machine has none such."""
    base = trainer.model.get_base_model()
    try:
        base.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        fail(f"--attn_implementation {name}: {' '.join(str(error).split())}")
    if (found := base.config._attn_implementation) != name:
        fail(f"--attn_implementation {name}: this model stays with {found}.")


def round_frozen(model: Any) -> None:
    """Store frozen linear layers in bfloat16, to the very bits that autocast rounds them to.

    Not one that shares its weight with an embedding, which autocast leaves as it is.
    """
    import torch

    users: dict[int, list[type]] = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            users.setdefault(id(weight), []).append(type(module))
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.dtype == torch.float32:
            weights = list(module.parameters())
            kinds = {kind for weight in weights for kind in users[id(weight)]}
            if kinds == {torch.nn.Linear} and not any(weight.requires_grad for weight in weights):
                for weight in weights:
                    weight.data = weight.data.bfloat16()


def set_checkpointing(trainer: Any, on: bool) -> None:
    """Switch activation checkpointing; the trainer was built with it where it was asked for."""
    model, settings = trainer.model, trainer.args
    if settings.activation_checkpointing == on:
        return
    settings.activation_checkpointing = on
    if on:
        # Without it no gradient reaches LoRA weights behind frozen ones that are checkpointed.
        model.enable_input_require_grads()
        options = dict(settings.activation_checkpointing_kwargs or {})
        options.pop("selective", None)
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None)
    else:
        model.activation_checkpointing_disable()


def measure_speed(args: argparse.Namespace, trainer: Any) -> None:
    """Choose what makes a step cheap and leaves its loss as it is, by trying it on a first batch.

    No random number is consumed, and no weight or gradient is left changed. Of several processes
    the first one does it alone, before the model is wrapped to share gradients.
    """
    import torch

    settings, rows = trainer.args, trainer.train_dataset
    speed = trainer.speed = Speed(activation_checkpointing=settings.activation_checkpointing)
    if args.attn_implementation != "auto":
        speed.attention = args.attn_implementation
        set_attention(trainer, speed.attention)
    # Trainer's count of tokens and parallelism within a batch need its own batches.
    if settings.torch_compile or settings.include_num_input_tokens_seen != "no":
        return
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return
    lengths = [len(ids) for ids in rows["input_ids"]]
    trainer.longest = max(lengths)
    speed.sort, speed.micro_batch = True, settings.per_device_train_batch_size
    trainer.loss_is_scaled_for_ga = True
    num_rows = speed.micro_batch * settings.gradient_accumulation_steps
    by_length = sorted(range(len(rows)), key=lambda index: (-lengths[index], index))
    cuda = [settings.device] if settings.device.type == "cuda" else []
    with torch.random.fork_rng(cuda), counting_alone(trainer):
        batch = [rows[index] for index in range(min(num_rows, len(rows)))]
        tried = [rows[by_length[place]] for place in (0, len(rows) // 2, -1)]
        if args.task == "causal":
            choose_logits(trainer, batch)
        elif not settings.activation_checkpointing:
            choose_read_token(trainer, batch)
        if cuda and WORLD_SIZE == 1:
            speed.micro_batch_cost = measure_cost(trainer, tried, len(batch))
        if speed.labelled_only:
            choose_rows(args, trainer, batch)
        if args.attn_implementation == "auto" and not cuda:
            choose_attention(trainer, batch)
        if cuda or args.auto_batch:
            unasked = bool(cuda) and "activation_checkpointing" not in args.trainer_fields
            choose_memory(trainer, tried, len(batch), args.auto_batch, unasked)
    release_memory(trainer)
    if cuda:  # The line of progress tells the peak of training.
        torch.cuda.reset_peak_memory_stats()


def release_memory(trainer: Any) -> None:
    """Give back what a step has left, so that the next one finds the memory as it was.

    After an error, once it is handled: its traceback holds the step's tensors.
    """
    import gc

    import torch

    forget_step(trainer)
    gc.collect()
    if trainer.args.device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def counting_alone(trainer: Any) -> Iterator[None]:
    """Have TRL's loss count alone: the other processes wait elsewhere for what is chosen."""
    trainer.accelerator.gather_for_metrics = lambda values, *_, **__: values
    try:
        yield
    finally:
        del trainer.accelerator.gather_for_metrics


def choose_logits(trainer: Any, batch: list[dict[str, Any]]) -> None:
    """Logits at supervised tokens, and of the last layer these tokens only: where it is exact."""
    speed, settings = trainer.speed, trainer.args
    if settings.label_smoothing_factor or settings.loss_type != "nll" or trainer.aux_loss_enabled:
        return
    scores = (
        most_supervised(trainer)
        * speed.micro_batch
        * trainer.model.config.get_text_config().vocab_size
    )
    if 12 * scores > MOST_SCORES:
        print("speed: the answers are long, so TRL's loss computes their logits", flush=True)
        return
    speed.labelled_only = True
    if not is_exact(trainer, batch, "logits at supervised tokens only"):
        speed.labelled_only = False
        return
    if trainer.last_parts and not settings.activation_checkpointing:
        speed.last_layer = "labelled"
        if not is_exact(trainer, batch, "of the last layer the supervised tokens only"):
            speed.last_layer = None


def choose_rows(args: argparse.Namespace, trainer: Any, batch: list[dict[str, Any]]) -> None:
    """A prompt computed once, or rows without padding: where it pays and is exact."""
    speed, settings = trainer.speed, trainer.args
    shared = shared_prompt(trainer) if args.share_prompt != "never" else 0
    # The prompt is a pass of its own, forward and back.
    pays = shared * (len(batch) - 1) > 2 * speed.micro_batch_cost
    if pays and not settings.activation_checkpointing and WORLD_SIZE == 1:
        if args.share_prompt == "auto" and has_dropout(trainer.model):
            print(
                f"speed: {shared} tokens are the same in every row. --lora_dropout 0 or "
                "--share_prompt always (one dropout draw a step for all rows) computes them once.",
                flush=True,
            )
        else:
            speed.prompt_tokens, trainer.prompt = shared, tuple(batch[0]["input_ids"][:shared])
            what = f"the {shared} common tokens of the prompt once a step"
            if not is_exact(trainer, batch, what):
                speed.prompt_tokens = 0
    attention = trainer.model.config._attn_implementation
    if not speed.prompt_tokens and "seq_lengths" not in batch[0] and is_varlen(attention):
        speed.packed = True
        if not is_exact(trainer, batch, "rows without padding"):
            speed.packed = False


def is_exact(trainer: Any, batch: list[dict[str, Any]], what: str) -> bool:
    """Whether four rows have the loss that the model gives them with padding and all logits.

    Where they have not, say that `what` is left out, and why.
    """
    batch = sorted(batch, key=lambda row: len(row["input_ids"]))[:: max(1, len(batch) // 4)][:4]
    expected = own_loss(trainer, batch)
    try:
        found = first_loss(trainer, batch)
    except Exception as error:  # Whatever a model's code does not expect.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        if is_same_loss(trainer, found, expected):
            return True
        reason = f"the loss of a first batch is {found:.6f} and the model's {expected:.6f}"
    print(f"speed: not {what}: {reason}", flush=True)
    return False


def measure_cost(trainer: Any, tried: list[dict[str, Any]], most: int) -> int:
    """What a micro-batch costs beside its tokens, in tokens: by the time of a short and a full one.

    A power of two, so that another run most often finds the same, and no more than the longest
    rows of a step have together, for which no step is split to save padding. MICRO_BATCH_COST
    where memory ends, or where the full one is hardly longer than the short one.
    """
    import torch

    size = min(trainer.speed.micro_batch, most)
    seconds: list[list[float]] = []
    while size and not seconds:
        parts = [tried[-1:]], full_micro_batches(tried, size, most)[-1:]
        try:
            seconds = [[try_step(trainer, part) for _ in range(4)] for part in parts]
        except torch.OutOfMemoryError:
            size //= 2
        release_memory(trainer)
    short, full = (sum(len(row["input_ids"]) for row in part[0]) for part in parts)
    if not seconds or full < 2 * short:
        return MICRO_BATCH_COST
    # The first pass of each warms up; of the others the median.
    of_short, of_full = (sorted(found[1:])[1] for found in seconds)
    most_tokens = most * len(tried[0]["input_ids"])
    if of_full <= of_short:
        return most_tokens
    cost = of_short * (full - short) / (of_full - of_short) - short
    return min(2 ** round(math.log2(max(cost, 1.0))), most_tokens)


def full_micro_batches(
    tried: list[dict[str, Any]], size: int, most: int
) -> list[list[dict[str, Any]]]:
    """`size` times the longest row, and as many tokens of a usual one where rows are split so.

    Of a usual one at most the `most` rows of a step. `tried`: the longest row, one of the median
    length, the shortest.
    """
    longest, usual = tried[:2]
    parts = [[longest] * size]
    more = min(most, size * len(longest["input_ids"]) // len(usual["input_ids"]))
    return [*parts, [usual] * more] if WORLD_SIZE == 1 and more > size else parts


def choose_read_token(trainer: Any, batch: list[dict[str, Any]]) -> None:
    """Of a classifier's last layer only the token that its head reads: its logits tell which.

    An encoder's head reads the first token, a causal model's the last one; a mean over all tokens
    leaves nothing out.
    """
    import torch

    model, speed = trainer.model.eval(), trainer.speed
    if not trainer.last_parts:
        return
    inputs = trainer._prepare_inputs(dict(trainer.data_collator(batch[:4])))
    inputs.pop("labels")

    def logits() -> Any:
        with torch.no_grad(), trainer.accelerator.autocast():
            return model(**inputs).logits.float()

    expected = logits()
    for token in ("first", "last"):
        speed.last_layer = token
        try:
            with trainer.reading(inputs, trainer.places_of_rows(inputs)):
                found = logits()
        except Exception:  # Whatever a model's code does not expect.
            continue
        pairs = zip(found.flatten().tolist(), expected.flatten().tolist(), strict=True)
        if all(is_same_loss(trainer, one, other) for one, other in pairs):
            return
    speed.last_layer = None


def is_same_loss(trainer: Any, found: float, expected: float) -> bool:
    """Whether two losses of the same rows differ by no more than rounding."""
    weight = next(trainer.model.get_base_model().parameters())
    rounded = trainer.args.bf16 or trainer.args.fp16 or weight.is_cuda
    rounded = rounded or weight.dtype.itemsize < 4
    most = SAME_ROUNDED_LOSS if rounded else SAME_LOSS
    return abs(found - expected) <= most * max(1.0, abs(expected))


def most_supervised(trainer: Any) -> int:
    """The most supervised tokens of a training row."""
    return max(sum(label != -100 for label in row) for row in trainer.train_dataset["labels"])


def is_varlen(attention: str) -> bool:
    """Whether an attention implementation computes rows that lie one after the other apart."""
    return "flash" in attention


def shared_prompt(trainer: Any) -> int:
    """How many tokens all rows begin with, at least two before the first supervised one.

    0 where rows are packed: only their first row would begin with the prompt.
    """
    rows = trainer.train_dataset
    if trainer.padding_free or "seq_lengths" in rows.column_names:
        return 0
    labels = rows["labels"]
    unsupervised = min(
        next((place for place, label in enumerate(row) if label != -100), 0) for row in labels
    )
    return max(0, min(len(common_prefix(rows["input_ids"])), unsupervised - 1))


def has_dropout(model: Any) -> bool:
    """Whether training draws random numbers for each token."""
    import torch

    modules = (module for module in model.modules() if isinstance(module, torch.nn.Dropout))
    config = model.config.get_text_config()
    drawn = [getattr(config, name, 0) or 0 for name in ("attention_dropout", "attn_pdrop")]
    return any(drawn) or any(module.p > 0 for module in modules)


def own_loss(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """The loss that the model itself computes for a padded batch of rows, without dropout."""
    import torch

    batch = trainer._prepare_inputs(dict(trainer.data_collator(rows)))
    options = {} if batch["labels"].dim() == 1 else {"use_cache": False}
    with torch.no_grad(), trainer.accelerator.autocast():
        return trainer.model.eval()(**batch, **options).loss.item()


def first_loss(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """The loss of rows by `trainer.speed`, without dropout."""
    import torch

    trainer.model.eval()
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            if trainer.speed.prompt_tokens:
                trainer.read_prompt(trainer.model)
            batch = trainer._prepare_inputs(trainer.collate(rows))
            loss, counts = trainer.labelled_loss(trainer.model, batch)
    finally:
        trainer.cache = None
    return (loss / counts[2]).item()


def try_step(trainer: Any, parts: list[list[dict[str, Any]]]) -> float:
    """Compute the gradients of micro-batches without using them; return the seconds it took.

    On a CPU the CPU's own: other processes disturb them less.
    """
    import torch

    on_gpu = trainer.args.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    step = trainer.put_together(parts)
    count = torch.tensor(max(1, sum(map(trainer.count_targets, step.batches))))
    began = clock()
    with trainer.accelerator.autocast():
        trainer.run_step(trainer.model, step, count.to(trainer.args.device))
    if on_gpu:
        torch.cuda.synchronize()
    seconds = clock() - began
    forget_step(trainer)
    return seconds


def forget_step(trainer: Any) -> None:
    """Drop the gradients and counts of a step that is no part of training."""
    trainer.cache = trainer.counts = None
    trainer.model.zero_grad()
    metrics = getattr(trainer, "_metrics", None)
    if metrics:  # TRL's own loss counts whatever it computes.
        metrics["train"].clear()
        trainer._total_train_tokens = 0


def choose_attention(trainer: Any, batch: list[dict[str, Any]]) -> None:
    """Eager attention where it is faster than sdpa on this machine and gives the same loss.

    On a CPU with short rows it is: sdpa's kernel has no fast path for a padding mask there.
    """
    base, speed = trainer.model.get_base_model(), trainer.speed
    if base.config._attn_implementation != "sdpa" or base.num_parameters() < MEASURED_FROM:
        return
    batch = sorted(batch, key=lambda row: len(row["input_ids"]))
    middle = len(batch) // 2
    size = min(len(batch), speed.micro_batch)
    batch = batch[max(0, middle - size // 2) :][:size]
    seconds: dict[str, list[float]] = {"sdpa": [], "eager": []}
    losses = {}
    for turn in range(4):
        for name in seconds:
            base.set_attn_implementation(name)
            if turn == 0:
                loss = first_loss if speed.labelled_only else own_loss
                losses[name] = loss(trainer, batch)
            seconds[name].append(try_step(trainer, [batch]))
    # The first turn warms up; the least of the others is the one that others disturbed least.
    ratio = min(seconds["sdpa"][1:]) / min(seconds["eager"][1:])
    same = is_same_loss(trainer, losses["eager"], losses["sdpa"])
    speed.attention = "eager" if same and ratio > 1.1 else "sdpa"
    base.set_attn_implementation(speed.attention)
    verdict = f"eager takes 1/{ratio:.2f} of sdpa's time" + ("" if same else ", with another loss")
    print(f"speed: attention {speed.attention} ({verdict} in 3 passes)", flush=True)


def choose_memory(
    trainer: Any, tried: list[dict[str, Any]], most: int, auto_batch: bool, checkpointing: bool
) -> None:
    """No activation checkpointing where a micro-batch fits in memory without it, and with
    --auto_batch the largest micro-batch that fits, by trying rows as `fits` does.
    """
    speed = trainer.speed
    size = min(speed.micro_batch, most)
    if checkpointing and not fits(trainer, tried, size, most):
        # The prompt's keys and values are not kept where activations are not, and what the last
        # layer leaves out would be computed the second time.
        speed.activation_checkpointing, speed.prompt_tokens, speed.last_layer = True, 0, None
        set_checkpointing(trainer, True)
        print(f"speed: {size} of the longest rows need activation checkpointing", flush=True)
    if not auto_batch:
        return
    while size > 1 and not fits(trainer, tried, size, most):
        size //= 2
    while size < most and fits(trainer, tried, min(2 * size, most), most):
        size = min(2 * size, most)
    speed.micro_batch = size
    print(f"--auto_batch: micro-batches of up to {size} of the longest rows", flush=True)


def fits(trainer: Any, tried: list[dict[str, Any]], size: int, most: int) -> bool:
    """Whether `size` rows of the longest length fit in one micro-batch, with a tenth to spare.

    One process splits rows by their tokens: a micro-batch of more rows of the median length, which
    has more logits, is tried too. One of still shorter rows may need more.
    """
    import resource

    import torch

    device = trainer.args.device
    release_memory(trainer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # The most memory so far never falls: less than there has been before shows no growth.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    free, ended = available_memory(), False
    try:
        try_step(trainer, full_micro_batches(tried, size, most))
    except torch.OutOfMemoryError:
        ended = True
    reserved = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
    release_memory(trainer)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return not ended and reserved <= 0.9 * total
    # A CPU has no such error, only a process that is killed: the next doubling must fit too.
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    return not ended and 2 * grown <= 0.9 * free


# --- what is watched -------------------------------------------------------------------------

# What an evaluation can choose the weights by. A gap between groups cannot: see check_selection.
SELECTABLE = ("eval_loss", "f1", "roc_auc", "accuracy", "balanced_accuracy")
SELECTABLE += ("f1_macro", "f1_weighted")
NOT_FINITE = "not finite (NaN or infinite)"
# What the samples ask about: mild, of nobody in particular, and no post of any data set.
SAMPLE_POSTS = (
    "The new neighbours brought us soup when we moved in.",
    "People like them do not belong in this country.",
    "My uncle says that people like them do not belong here, and I told him to stop.",
    "Keep those families out of our school.",
    "The council met the families to talk about the school.",
    "I hate this phone, its battery is rubbish.",
    "Nobody should believe the lie that newcomers ruin every town they come to.",
    "We must get rid of them before they take over the street.",
)
MOST_ANSWER_TOKENS = 12
# Dense peak of bfloat16 and float16 in TFLOP/s by torch's name of the device (the makers' data
# sheets).
GPU_PEAKS = {
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), 312),
    **dict.fromkeys(("NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), 312),
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), 989),
    "NVIDIA H100 PCIe": 756,
    "NVIDIA L40S": 362,
    "NVIDIA L4": 121,
    "NVIDIA A10G": 70,
}


def check_selection(args: argparse.Namespace) -> None:
    """Refuse a --metric_for_best_model that no evaluation has, or that chance would decide."""
    name = args.metric_for_best_model
    plain = name.removeprefix("eval_")
    plain = {"loss": "eval_loss", "auroc": "roc_auc"}.get(plain, plain)
    greater = args.trainer_fields.get("greater_is_better")
    if plain in SELECTABLE:
        args.metric_for_best_model = plain
        if plain != "eval_loss" and greater is False:
            fail(f"--greater_is_better false would choose the lowest {plain}; leave it out.")
        if plain == "eval_loss" and greater:
            print("WARNING: --greater_is_better true keeps the weights of the highest loss")
        return
    if plain in ("false_positive_rate", "false_negative_rate", "fpr", "fnr"):
        fail(
            f"--metric_for_best_model {name}: one kind of error alone is no ground to choose "
            "weights by, since a model that gives every post the same label makes none of it. "
            f"Choose by one of {', '.join(SELECTABLE)}."
        )
    if re.search(r"gap|difference|false_(positive|negative)_rate|parity|odds", plain):
        fail(
            f"--metric_for_best_model {name}: a difference between groups is no ground to choose "
            "weights by. Without any bias three groups of the usual size differ by 6 points on "
            "average, so that the choice would be by chance. Gaps are shown at each evaluation "
            f"with their interval; choose by one of {', '.join(SELECTABLE)}."
        )
    fail(f"--metric_for_best_model {name} is none of {', '.join(SELECTABLE)}.")


def check_validation(args: argparse.Namespace, data: Data) -> None:
    """Refuse to choose weights by a figure that the validation posts leave undefined."""
    name = args.metric_for_best_model
    if name == "eval_loss":
        return
    if not (data.validation and chooses_weights(args)):
        print(f"--metric_for_best_model {name} has no effect: no evaluation chooses the weights")
        return
    found = {row["label"] for row in data.validation}
    needed = {
        "f1": {data.positive_label},
        "balanced_accuracy": {*data.labels},
        "f1_macro": {*data.labels},
    }.get(name, set())
    if (name == "roc_auc" and len(found) < 2) or not needed <= found:
        wanted = ", ".join(sorted(needed)) or f"{data.positive_label} and of another label"
        fail(
            f"--metric_for_best_model {name} needs validation posts of {wanted}; the "
            f"{len(data.validation)} that an evaluation uses are {', '.join(sorted(found))}."
        )


def warn_of_one_label(data: Data) -> None:
    """Say of posts that all have the same label what cannot come of them."""
    if len({row["label"] for row in data.train}) == 1:
        print(
            f"WARNING: all {len(data.train)} training posts are labelled "
            f"{data.train[0]['label']!r}: the model learns to give that answer to every post. Add "
            f"posts of another label; the labels are: {', '.join(data.labels)}.",
            flush=True,
        )
    if len({row["label"] for row in data.validation}) == 1:
        only = data.validation[0]["label"]
        unknown = ["AUROC", "balanced accuracy", "macro F1"]
        unknown += ["FPR"] if only == data.positive_label else ["F1", "FNR"]
        print(
            f"WARNING: all {len(data.validation)} validation posts that an evaluation uses are "
            f"labelled {only!r}, so {', '.join(unknown)} cannot be measured. Add posts of another "
            "label.",
            flush=True,
        )


@contextlib.contextmanager
def kept_random_numbers() -> Iterator[None]:
    """Leave every generator as it was: what is looked at must not change what is trained."""
    import numpy as np
    import torch

    kept = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


@dataclass
class Watch:
    """Looks at a run from outside: label scores of the validation posts, and sample answers.

    Nothing that it does changes the run: no random number is consumed, and the model is left in
    the mode it was in. Under torchrun every process takes part and gets the same figures.
    """

    trainer: Any
    tokenizer: Any
    labels: list[str]
    positive: int
    completions: list[list[int]]  # token ids of each label's answer; of a classifier []
    prompts: list[list[int]]
    truth: list[int]
    members: dict[str, list[int]]
    samples: list[tuple[str, list[int]]]  # what is shown, and the token ids asked
    seed: int
    say: Callable[[str], None]
    reached: int = -1  # the training step that W&B already has
    newest: dict[str, Any] = field(default_factory=dict)
    tables: bool = False  # W&B is reported to, and has taken every table so far

    def follow_evaluation(self, diverge: Callable[[str], NoReturn]) -> None:
        """Add the figures of the label scores to those of the trainer's evaluation loop."""
        loop = self.trainer.evaluation_loop

        def watched(*values: Any, **options: Any) -> Any:
            with kept_random_numbers():
                output = loop(*values, **options)
                if options.get("metric_key_prefix", "eval") == "eval":
                    if not math.isfinite(output.metrics.get("eval_loss", 0.0)):
                        diverge("the loss of the validation posts")
                    output.metrics.update(self.evaluate(diverge))
            return output

        self.trainer.evaluation_loop = watched

    def evaluate(self, diverge: Callable[[str], NoReturn]) -> dict[str, float]:
        """Score the validation posts; return what is logged and keep the figures in `newest`."""
        scores = self.score(self.prompts)
        if not all(math.isfinite(score) for row in scores for score in row):
            diverge("a score of the validation posts")
        self.newest = validation_figures(
            scores, self.truth, self.members, self.labels, self.positive, self.seed
        )
        answered = self.newest["predicted"]
        # Posts of one label tell nothing of a model that gives one answer: warn_of_one_label.
        if sum(count > 0 for count in answered.values()) == 1 and len(set(self.truth)) > 1:
            only = max(answered, key=answered.__getitem__)
            share_of = self.truth.count(self.labels.index(only)) / len(self.truth)
            self.say(
                f"WARNING: all {len(self.truth)} validation posts are predicted {only!r}, and "
                f"{share_of:.0%} are. The model tells nothing apart yet. If that stays so: a lower "
                "--learning_rate, more steps, --reweight group_label or more posts of the other "
                "label."
            )
        return logged_figures(self.newest)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """The model in evaluation mode, in the precision it is trained in."""
        import torch

        model = self.trainer.model
        mode = model.training
        model.eval()
        try:
            with torch.no_grad(), self.trainer.autocast_smart_context_manager():
                yield
        finally:
            model.train(mode)

    def score(self, prompts: list[list[int]]) -> list[list[float]]:
        """Each label's score for each prompt: its summed log-likelihood (nats), or its logit.

        The completions' common beginning counts for none. Labels whose completions differ in
        their last token only share a forward.
        """
        start = len(common_prefix(self.completions))
        heads = sorted({tuple(completion[:-1]) for completion in self.completions}) or [()]
        rows = [
            (number, head, [*prompt, *head])
            for number, prompt in enumerate(prompts)
            for head in heads
        ]
        rows.sort(key=lambda row: -len(row[2]))
        size = self.trainer.args.per_device_eval_batch_size
        batches = [rows[first : first + size] for first in range(0, len(rows), size)]
        found: dict[tuple[int, int], float] = {}
        with self.looking():
            # Every process makes as many forwards: with a sharded model all take part in each.
            for turn in range(math.ceil(len(batches) / WORLD_SIZE)):
                mine = batches[min(turn * WORLD_SIZE + RANK, len(batches) - 1)]
                found |= self.score_batch(mine, start)
        if WORLD_SIZE > 1:
            from accelerate.utils import gather_object

            found = dict(gather_object(list(found.items())))
        return [
            [found[number, label] for label in range(len(self.labels))]
            for number in range(len(prompts))
        ]

    def score_batch(
        self, rows: list[tuple[int, tuple[int, ...], list[int]]], start: int
    ) -> dict[tuple[int, int], float]:
        """Scores by prompt and label; half the rows at a time where the memory of a GPU ends."""
        import torch

        try:
            logits, first = self.forward([ids for _, _, ids in rows], start)
        except torch.OutOfMemoryError:
            if len(rows) == 1 or WORLD_SIZE > 1:
                raise
            torch.cuda.empty_cache()
            half = len(rows) // 2
            return self.score_batch(rows[:half], start) | self.score_batch(rows[half:], start)
        found: dict[tuple[int, int], float] = {}
        for line, (number, head, ids) in enumerate(rows):
            if not self.completions:
                found |= {(number, label): x for label, x in enumerate(logits[line].tolist())}
                continue
            begin = len(ids) - len(head) - 1 + start - first
            steps = logits[line, begin : len(ids) - first].log_softmax(-1)
            for label, completion in enumerate(self.completions):
                if tuple(completion[:-1]) == head:
                    wanted = torch.tensor(completion[start:], device=steps.device)
                    found[number, label] = steps.gather(1, wanted[:, None]).sum().item()
        return found

    def forward(self, rows: list[list[int]], start: int = 0, last: bool = False) -> tuple[Any, int]:
        """Float32 logits of rows padded on the right, and the first position they are given for.

        A classifier's are of shape rows x labels. Only the positions where some row's label is
        predicted are projected; with `last` those at the end of the longest row.
        """
        import torch

        model, pad = self.trainer.model, self.tokenizer.pad_token_id or 0
        # A tokenizer that adds nothing leaves nothing of an empty post.
        rows = [row or [pad] for row in rows]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(ids)
        for line, row in enumerate(rows):
            ids[line, : len(row)] = torch.tensor(row)
            mask[line, : len(row)] = 1
        options: dict[str, Any] = {}
        if self.completions:
            longest = max(map(len, self.completions)) - start
            kept = 1 if last else width - min(map(len, rows)) + longest
            options = {"use_cache": False, "logits_to_keep": min(kept, width)}
        device = self.trainer.args.device
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), **options).logits
        return logits.float(), width - logits.shape[1] if self.completions else 0

    def answer(self, prompt: list[int]) -> list[int]:
        """The likeliest token after token, up to an end token: a few, each by its own forward."""
        ends = {self.tokenizer.eos_token_id}
        ends |= {completion[-1] for completion in self.completions if len(completion) > 1}
        answer: list[int] = []
        while len(answer) < MOST_ANSWER_TOKENS and not (answer and answer[-1] in ends):
            logits, _ = self.forward([[*prompt, *answer]], last=True)
            answer.append(broadcast(int(logits[0, -1].argmax())))
        return answer

    def sample(self, step: int) -> None:
        """Ask the samples and show the answers: one line each, and a table of W&B."""
        rows = []
        with kept_random_numbers(), self.looking():
            for text, ids in self.samples:
                began = time.perf_counter()
                tokens = self.answer(ids) if self.completions else []
                scores = softmax(self.score([ids])[0])
                latency = 1000 * (time.perf_counter() - began)
                p = scores[self.positive]
                label = self.labels[choose_label(scores, self.positive)]
                answer = self.tokenizer.decode(tokens, skip_special_tokens=True)
                prompt = self.tokenizer.decode(ids) if self.completions else text
                rows.append([step, prompt, answer, round(p, 4), label, len(tokens), latency])
                said = ""
                if self.completions:
                    said = (
                        f"answer {json.dumps(answer, ensure_ascii=False)}, {len(tokens)} tokens, "
                    )
                self.say(
                    f"sample at step {step}: p({self.labels[self.positive]}) {p:.3f}, {label}; "
                    f"{said}{latency:.0f} ms; {json.dumps(text, ensure_ascii=False)}"
                )
        wandb = sys.modules.get("wandb")
        if RANK or step <= self.reached or not self.tables:
            return
        if wandb is None or wandb.run is None or wandb.run.disabled:
            return
        try:
            score = f"p_{self.labels[self.positive]}"
            columns = ["step", "prompt", "answer", score, "label", "tokens", "latency_ms"]
            table = wandb.Table(columns=columns, data=rows)
            wandb.run.log({"samples": table, "train/global_step": step})
        except Exception as error:
            self.tables = False
            print(f"W&B takes no table of samples, the log has them: {error!r}", flush=True)


def build_watch(
    args: argparse.Namespace,
    trainer: Any,
    tokenizer: Any,
    data: Data,
    contract: dict[str, Any],
    say: Callable[[str], None],
) -> Watch:
    """Encode the validation posts and the samples as an evaluation by eval/eval.py does."""
    rendering = contract["rendering"]
    completions: list[list[int]] = []
    scaffold = None
    if data.prompt:
        scaffold = read_scaffold(rendering)
        completions = [rendering["label_completions"][label] for label in data.labels]

    def encode(row: dict[str, Any]) -> list[int]:
        if scaffold is None or data.prompt is None:
            return encode_post(tokenizer, row["text"], rendering["max_length"])[0]
        messages = row.get("prompt") or prompt_messages(data.prompt, row["text"], row)
        room = rendering["max_length"] - max(map(len, completions))
        return encode_prompt(tokenizer, scaffold, messages, row["text"], room)[0]

    shown = [{"text": text} for text in SAMPLE_POSTS]
    if args.log_text and data.validation:
        shown = data.validation[: len(SAMPLE_POSTS)]
    return Watch(
        trainer,
        tokenizer,
        data.labels,
        data.labels.index(data.positive_label),
        completions,
        [encode(row) for row in data.validation],
        [data.labels.index(row["label"]) for row in data.validation],
        group_members(data.validation, data.groups),
        [(row["text"], encode(row)) for row in shown] if args.sample_steps else [],
        args.seed,
        say,
        tables="wandb" in args.report_to,
    )


def choose_label(probabilities: list[float], positive: int) -> int:
    """The predicted label as eval/eval.py decides: of two by 1/2, of more the likeliest."""
    if len(probabilities) > 2:
        return max(range(len(probabilities)), key=probabilities.__getitem__)
    return positive if probabilities[positive] >= 0.5 else 1 - positive


def validation_figures(
    scores: list[list[float]],
    truth: list[int],
    members: dict[str, list[int]],
    labels: list[str],
    positive: int,
    seed: int,
) -> dict[str, Any]:
    """Figures of an evaluation during training, as eval/eval.py counts them; nan is left out.

    `groups` has each group's error rates with n and interval. `gaps` has of each rate the largest
    difference between groups of MIN_DENOMINATOR posts or more, with its interval, whose lower end
    is 0 where a permutation test finds no difference at 5 %.
    """
    import numpy as np

    chances = np.array([softmax(row) for row in scores])
    size, n = len(labels), len(truth)
    answers = np.array([choose_label(row.tolist(), positive) for row in chances])
    known = np.array(truth)
    table = np.bincount(known * size + answers, minlength=size * size).reshape(size, size)
    figures = {name: float(value) for name, value in count_figures(table, positive).items()}
    figures["roc_auc"], figures["average_precision"] = rank_posts(
        known == positive, chances[:, positive]
    )
    of_labels = [float(count_figures(table, place)["f1"]) for place in range(size)]
    flagged = answers == positive
    kinds = {
        "false_positive_rate": (flagged, known != positive),
        "false_negative_rate": (~flagged, known == positive),
    }
    names = [name for name, posts in members.items() if posts and name != NO_TARGET]
    masks = np.zeros((n, len(names)), dtype=bool)
    for column, name in enumerate(names):
        masks[members[name], column] = True
    groups: dict[str, Any] = {name: {} for name in names}
    gaps = {}
    for rate, (error, posts) in kinds.items():
        for column, name in enumerate(names):
            inside = posts & masks[:, column]
            groups[name][rate] = share(int((error & inside).sum()), int(inside.sum()), "no posts")
        enough = [name for name in names if groups[name][rate]["n"] >= MIN_DENOMINATOR]
        gaps[rate] = widest_gap([[groups[name][rate] for name in enough]])
        if len(enough) > 1:
            compared = [names.index(name) for name in enough]
            p, _ = permute_groups(error[posts], masks[posts], compared, seed)
            if p >= 0.05:
                gaps[rate]["low"] = 0.0
    return {
        "n": n,
        "labels": {label: truth.count(number_) for number_, label in enumerate(labels)},
        "predicted": {label: int((answers == place).sum()) for place, label in enumerate(labels)},
        "figures": {name: value for name, value in figures.items() if math.isfinite(value)},
        "f1": {
            label: value
            for label, value in zip(labels, of_labels, strict=True)
            if math.isfinite(value)
        },
        "groups": groups,
        "gaps": gaps,
    }


def logged_figures(found: dict[str, Any]) -> dict[str, float]:
    """The figures of an evaluation by the names under which they are logged."""
    names = (*SELECTABLE, "false_positive_rate", "false_negative_rate")
    logged = {}
    if len(found["labels"]) > 2:
        logged = {f"eval_f1_{label}": value for label, value in found["f1"].items()}
    logged |= {f"eval_{name}": found["figures"][name] for name in names if name in found["figures"]}
    for group, rates in found["groups"].items():
        for rate, figure in rates.items():
            logged[f"eval_{group}_{rate}_n"] = figure["n"]
            if figure["value"] is not None:
                logged[f"eval_{group}_{rate}"] = figure["value"]
    for rate, gap in found["gaps"].items():
        if gap["value"] is not None:
            logged[f"eval_{rate}_gap"] = gap["value"]
            logged |= {f"eval_{rate}_gap_{end}": gap[end] for end in ("low", "high")}
    return logged


def describe_figures(found: dict[str, Any]) -> str:
    """An evaluation's figures in one line."""
    named = (("f1", "F1"), ("roc_auc", "AUROC"), ("balanced_accuracy", "balanced accuracy"))
    if len(found["labels"]) > 2:
        named += (("f1_macro", "macro F1"), ("f1_weighted", "weighted F1"))
    said = [
        f"{words} {found['figures'][name]:.4f}" for name, words in named if name in found["figures"]
    ]
    if len(found["labels"]) > 2:
        said.append(f"F1 of {', '.join(f'{name} {one:.4f}' for name, one in found['f1'].items())}")
    for rate, words in (("false_positive_rate", "FPR"), ("false_negative_rate", "FNR")):
        some = [
            f"{group} {100 * rates[rate]['value']:.0f} % of {rates[rate]['n']}"
            for group, rates in found["groups"].items()
            if rates[rate]["value"] is not None
        ]
        gap = found["gaps"][rate]
        if gap["value"] is not None:
            ends = f"{100 * gap['low']:.0f} to {100 * gap['high']:.0f}"
            some.append(f"gap {100 * gap['value']:.0f} points ({ends})")
        if some:
            said.append(f"{words} {', '.join(some)}")
    return f"{found['n']} posts: {'; '.join(said)}"


class Meter:
    """Tokens per second, share of the peak, memory and money of the lines of progress."""

    def __init__(self, trainer: Any, config: Any, precision: str, job: Job, spent: float) -> None:
        self.trainer, self.job, self.spent = trainer, job, spent
        self.precision = "bfloat16" if trainer.args.bf16 else precision
        if trainer.args.fp16:
            self.precision = "float16"
        self.flops = 4 * (body_parameters(config) - unread_parameters(trainer, config))
        rows = trainer.train_dataset["input_ids"]
        self.tokens_per_row = sum(map(len, rows)) / len(rows)
        settings = trainer.args
        self.rows_per_step = settings.per_device_train_batch_size * WORLD_SIZE
        self.rows_per_step *= settings.gradient_accumulation_steps
        self.peak: tuple[float, str] | None = None
        self.began(0)

    def began(self, step: int) -> None:
        """Count from this step and moment on."""
        self.step, self.since, self.aside = step, time.monotonic(), 0.0
        self.tokens = getattr(self.trainer, "_total_train_tokens", 0)

    def read(self, step: int) -> list[str]:
        """What to say of the time since the last line, less what was spent beside training."""
        import torch

        seconds = time.monotonic() - self.since - self.aside
        tokens = getattr(self.trainer, "_total_train_tokens", 0) - self.tokens
        # A classifier's are not counted by its trainer: as many as its rows have on average.
        tokens = tokens or (step - self.step) * self.rows_per_step * self.tokens_per_row
        said = []
        if seconds > 0 and step > self.step:
            self.peak = self.peak or machine_peak(self.trainer.args.device, self.precision)
            peak, origin = self.peak
            # The prompt that rows have in common is computed once a step.
            shared = self.trainer.speed.prompt_tokens * (self.rows_per_step - 1)
            computed = tokens - (step - self.step) * shared
            used = self.flops * computed / seconds / (peak * WORLD_SIZE)
            said += [f"{tokens / seconds:.0f} tokens/s", f"{100 * used:.1f} % of {origin}"]
        if self.trainer.args.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.trainer.args.device).total_memory
            most = torch.cuda.max_memory_allocated(self.trainer.args.device)
            said.append(f"GPU {most / 2**30:.1f} of {total / 2**30:.1f} GiB")
        if self.job.dollars_per_hour:
            said.append(f"{self.spent + self.job.dollars():.2f} $ so far")
        self.began(step)
        return said


def body_parameters(config: Any) -> int:
    """Weights that each token of a post is multiplied with: no embedding, no head, no vision part.

    Of experts only the share that a token is sent to counts.
    """
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(config)
    looked_up = {
        id(weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for weight in module.parameters()
    }
    return sum(
        met_by_a_token(name, weight.numel(), config)
        for name, weight in model.named_parameters()
        if id(weight) not in looked_up and "vision" not in name
    )


def unread_parameters(trainer: Any, config: Any) -> int:
    """Those of the weights of body_parameters that only the few tokens meet which are read."""
    import torch

    if not trainer.speed.last_layer:
        return 0
    # Two weights in four bits are stored as one number.
    return sum(
        met_by_a_token(name, weight.numel() * (1 + (weight.dtype == torch.uint8)), config)
        for part in trainer.last_parts
        for name, weight in part.named_parameters()
        if "lora_" not in name
    )


def met_by_a_token(name: str, count: int, config: Any) -> int:
    """How many of a matrix's `count` weights a token meets: of experts those it is sent to."""
    text = config.get_text_config()
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    taken = getattr(text, "num_experts_per_tok", None)
    # Every token meets shared_experts.
    routed = bool(experts and taken) and re.search(r"(^|\.)experts\.", name) is not None
    return round(count * taken / experts) if routed else count


def machine_peak(device: Any, precision: str) -> tuple[float, str]:
    """FLOP/s of one device's matrix products, and what to call them: listed, else measured."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if name in GPU_PEAKS and precision in ("bfloat16", "float16"):
        return GPU_PEAKS[name] * 1e12, f"the {GPU_PEAKS[name]} TFLOP/s of {name}"
    size = 8192 if name else 1024
    one = torch.full((size, size), 0.5, device=device, dtype=getattr(torch, precision))
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        one @ one
        if name:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    rate = 2 * size**3 / best
    return rate, f"the {rate / 1e12:.3g} TFLOP/s measured in {precision}"


def write_run_results(run: Run, trainer: Any) -> list[str]:
    """train_results.json, eval_results.json and all_results.json in the run's folder.

    `train_loss` is the mean over the whole run's logged steps, `train_runtime` the seconds of this
    start alone. The evaluation is that of the weights kept, or the last one before them, by `step`.
    """
    training, history = run.contract["training"], trainer.state.log_history
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    total, before = 0.0, 0
    for step, loss in losses:
        total, before = total + loss * (step - before), step
    seconds = run.phases.seconds.get("train", 0.0)
    steps = training["step"] - run.began[0] if run.began[1] else 0
    results = {
        "train": {
            "epoch": training["epoch"],
            "step": training["step"],
            "train_loss": total / before if before else None,
            "train_samples": len(trainer.train_dataset),
            "train_runtime": round(seconds, 3),
            "train_steps_per_second": round(steps / seconds, 3) if seconds and steps else None,
        }
    }
    evaluations = [entry for entry in history if "eval_loss" in entry]
    kept = [entry for entry in evaluations if entry["step"] <= training["weights_of_step"]]
    if kept:
        results["eval"] = dict(kept[-1]) | {"eval_samples": len(run.watch.prompts)}
    written = {f"{name}_results.json": found for name, found in results.items()}
    everything: dict[str, Any] = {}
    for found in results.values():
        everything |= found
    written["all_results.json"] = everything | results["train"]
    for name, found in written.items():
        write_json(run.store.folder / name, found)
    return [*written]


# --- groups ----------------------------------------------------------------------------------

# No post counts more than so many average ones, however rare its cell is.
MOST_WEIGHT = 10.0


@dataclass(frozen=True)
class Cell:
    """The training posts that are aimed at the same groups and have the same label."""

    groups: tuple[str, ...]
    label: str
    rows: list[int]

    @property
    def name(self) -> str:
        return f"{'+'.join(self.groups) or NO_TARGET}/{self.label}"


def group_cells(rows: list[dict[str, Any]]) -> list[Cell]:
    """The cells of some posts, by name."""
    found: dict[tuple[tuple[str, ...], str], list[int]] = {}
    for number_, row in enumerate(rows):
        groups = tuple(sorted(set(row.get("target_groups") or []) - {NO_TARGET}))
        found.setdefault((groups, row["label"]), []).append(number_)
    return [Cell(*key, found[key]) for key in sorted(found)]


def cell_weights(counts: list[int]) -> list[float]:
    """The loss weight of each cell's posts: inverse to their number, at most MOST_WEIGHT.

    The mean over all posts is 1, so that the learning rate keeps its meaning. What a capped cell
    may not have goes to the others.
    """
    capped: set[int] = set()
    while True:
        free = [place for place in range(len(counts)) if place not in capped]
        left = sum(counts) - MOST_WEIGHT * sum(counts[place] for place in capped)
        weights = [
            MOST_WEIGHT if place in capped else left / len(free) / count
            for place, count in enumerate(counts)
        ]
        above = {place for place in free if weights[place] > MOST_WEIGHT}
        if not above:
            return weights
        capped |= above


def cell_quotas(counts: list[int], total: int, order: Any) -> list[int]:
    """How many posts of each cell an epoch of `total` draws; `order` deals out what is left."""
    quotas = [total // len(counts)] * len(counts)
    for place in order.sample(range(len(counts)), total % len(counts)):
        quotas[place] += 1
    return quotas


class GroupBalanced:
    """A sampler whose epochs draw every cell equally often, and as many posts as there are.

    The order depends on seed and epoch alone, so that a resumed run finds its place in it. Of a
    cell every post is drawn before any is drawn again.
    """

    def __init__(self, cells: list[Cell], seed: int) -> None:
        self.cells, self.seed, self.epoch = cells, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(cell.rows) for cell in self.cells)

    def __iter__(self) -> Iterator[int]:
        order = random.Random(f"{self.seed} {self.epoch}")
        drawn: list[int] = []
        quotas = cell_quotas([len(cell.rows) for cell in self.cells], len(self), order)
        for cell, quota in zip(self.cells, quotas, strict=True):
            whole, part = divmod(quota, len(cell.rows))
            drawn += cell.rows * whole + order.sample(cell.rows, part)
        order.shuffle(drawn)
        return iter(drawn)


def check_balance(args: argparse.Namespace) -> None:
    """Refuse what cannot go together with --reweight and --sampler."""
    fields = args.trainer_fields
    for flag, asked in (("reweight", args.reweight), ("sampler", args.sampler)):
        if asked not in ("none", "shuffle") and fields.get("packing"):
            fail(f"--{flag} {asked} and --packing: a packed row holds posts of several cells.")
    if args.sampler != "shuffle" and fields.get("train_sampling_strategy", "random") != "random":
        fail(
            f"--sampler {args.sampler} and --train_sampling_strategy both decide the order of the "
            "rows; leave one out. Rows of one step are put together by length anyway."
        )
    if args.sampler == "group_balanced" and (
        args.reweight != "none" or args.class_weights == "balanced"
    ):
        name = "reweight" if args.reweight != "none" else "class_weights"
        fail(
            f"--sampler group_balanced draws every cell equally often, so --{name} "
            f"{vars(args)[name]} would count rare posts up twice; leave one out."
        )
    if args.reweight == "none":
        return
    if args.class_weights != "none":
        fail("--reweight and --class_weights both weigh the posts; leave one out.")
    for name, plain in (("loss_type", "nll"), ("label_smoothing_factor", 0.0)):
        if fields.get(name, plain) not in (plain, None):
            fail(f"--reweight weighs the plain cross-entropy: leave --{name} out.")
    if fields.get("router_aux_loss_coef"):
        fail("--reweight weighs the cross-entropy alone: leave --router_aux_loss_coef out.")


def record_cells(args: argparse.Namespace, data: Data) -> list[dict[str, Any]] | None:
    """The contract's account of --reweight and --sampler, printed; None without them."""
    if args.reweight == "none" and args.sampler == "shuffle":
        return None
    cells = group_cells(data.train)
    counts = [len(cell.rows) for cell in cells]
    weights = cell_weights(counts) if args.reweight != "none" else [1.0] * len(cells)
    drawn = [float(count) for count in counts]
    if args.sampler != "shuffle":
        drawn = [sum(counts) / len(counts)] * len(counts)
    asked = (("reweight", args.reweight, "none"), ("sampler", args.sampler, "shuffle"))
    used = [f"--{name} {value}" for name, value, default in asked if value != default]
    print(f"{', '.join(used)}: {len(cells)} cells of groups and label", flush=True)
    if not any(cell.groups for cell in cells):
        print("No training post has target_groups, so the labels alone are balanced.", flush=True)
    record = []
    for cell, weight, draws in zip(cells, weights, drawn, strict=True):
        capped = " (the most)" if weight == MOST_WEIGHT else ""
        print(
            f"  {cell.name:<40} {len(cell.rows):>7} posts, weight {weight:.4g}{capped}, "
            f"{draws:.1f} drawn an epoch",
            flush=True,
        )
        record.append(
            {
                "groups": list(cell.groups),
                "label": cell.label,
                "posts": len(cell.rows),
                "weight": weight,
                "draws_per_epoch": draws,
            }
        )
    return record


def balance_rows(args: argparse.Namespace, trainer: Any, rows: list[dict[str, Any]]) -> None:
    """Have the trainer draw and weigh its rows as --sampler and --reweight say."""
    cells = group_cells(rows) if args.reweight != "none" or args.sampler != "shuffle" else []
    if cells and len(trainer.train_dataset) != len(rows):
        fail("the trainer left rows out, so --reweight and --sampler cannot tell whose they are.")
    if args.sampler == "group_balanced":
        seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
        sampler = GroupBalanced(cells, seed)
        trainer._get_train_sampler = lambda *_: sampler
    if args.reweight == "group_label":
        weights = [0.0] * len(rows)
        for cell, weight in zip(cells, cell_weights([len(c.rows) for c in cells]), strict=True):
            for row in cell.rows:
                weights[row] = weight
        trainer.train_dataset = trainer.train_dataset.add_column("loss_weight", weights)
        # Trainer otherwise drops a column that the model does not know.
        trainer._set_signature_columns_if_needed()
        trainer._signature_columns = [*trainer._signature_columns, "loss_weight"]
        trainer.data_collator = WeightedCollator(trainer.data_collator)


@dataclass
class WeightedCollator:
    """A collator that hands on what each row counts in the loss; rows without it stay plain."""

    collator: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        plain = [{key: row[key] for key in row if key != "loss_weight"} for row in rows]
        return add_row_weights(dict(self.collator(plain)), rows)


def add_row_weights(batch: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the rows' weights beside the labels, in their shape, if the rows have any."""
    if "loss_weight" not in rows[0]:
        return batch
    import torch

    labels = batch["labels"]
    weights = torch.tensor([row["loss_weight"] for row in rows])
    if labels.dim() == 2:
        if labels.shape[0] == len(rows):
            weights = weights[:, None].expand(labels.shape)
        else:  # All rows in one, without padding.
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            weights = weights.repeat_interleave(lengths)[None]
    return batch | {"loss_weights": weights}


def weighted_loss(model: Any, inputs: dict[str, Any]) -> Any:
    """Summed cross-entropy of a batch with all its logits, each row by its weight."""
    from torch.nn import functional

    inputs = dict(inputs)
    weights, labels = inputs.pop("loss_weights"), inputs.pop("labels")
    if labels.dim() == 1:
        losses = functional.cross_entropy(model(**inputs).logits.float(), labels, reduction="none")
        return (losses * weights).sum()
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights[:, 1:].flatten()).sum()


# --- loggers ---------------------------------------------------------------------------------


def check_loggers(args: argparse.Namespace) -> None:
    """Refuse a --report_to that cannot work, and write out what `all` stands for.

    W&B and TensorBoard are pinned dependencies; only further names make this import transformers.
    """
    names = set(args.report_to)
    if names <= {"wandb", "tensorboard"} or names == {"none"}:
        return
    if len(names) > 1 and names & {"all", "none"}:
        fail(f"--report_to {' '.join(args.report_to)}: all and none stand alone.")
    from transformers.integrations import integration_utils

    ready = integration_utils.get_available_reporting_integrations()
    if names == {"all"}:
        args.report_to = ready
        return
    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in args.report_to:
        if name not in known:
            fail(f"--report_to {name} is none of {', '.join(known)}, all, none.")
        if name not in ready:
            package = name.replace("_", "-")
            fail(
                f"--report_to {name}: its package is not installed or not set up. Add it: "
                f"hf jobs uv run --with {package} {SCRIPT}, or uv run --with {package} {SCRIPT}"
            )


def start_wandb(
    args: argparse.Namespace, contract: dict[str, Any], remembered: dict[str, Any]
) -> int:
    """Open this start's part of the one W&B run; return the training step that it already reaches.

    `remembered` is the logger_state() of the checkpoint that training resumes from: the run is
    rewound to it. That holds offline as well, where `wandb sync` of the parts in their order does
    it later. A server that refuses keeps its points, which are then not logged again (-1: there
    are none). No failure here ends the training. Tried against a loopback server only: W&B's own
    may refuse for other reasons.
    """
    import wandb

    # The user's own WANDB_ variables win. The terminal's text and the working copy's diff can
    # hold posts, the command line and the machine's description paths: none of it is sent.
    # Without limits an outage of W&B keeps a finished Job waiting, as does its telemetry.
    for name, value in {
        "WANDB_PROJECT": "hate-speech-detector",
        "WANDB_RUN_ID": contract["training"]["wandb_run_id"],
        "WANDB_NAME": args.run_name or Path(args.hub_model_id or args.output_dir).name,
        "WANDB_CONSOLE": "off",
        "WANDB_DISABLE_GIT": "true",
        "WANDB__DISABLE_META": "true",
        "WANDB_PROGRAM": SCRIPT,
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_INIT_TIMEOUT": "30",
        "WANDB_FINISH_TIMEOUT": "60",
        "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1",
    }.items():
        os.environ.setdefault(name, value)
    config = contract["arguments"] | {key: contract[key] for key in ("base_model", "dataset")}
    try:
        attempts = wandb_attempts(remembered)
    except Exception as error:
        print(f"W&B cannot be set up: {error}", flush=True)
        return -1
    for options in attempts:
        try:
            return open_wandb(wandb.init(config=config, **options))
        except Exception as error:
            action = "rewind its run" if "resume_from" in options else "start"
            print(f"W&B cannot {action}: {error}".splitlines()[0], flush=True)
            # Its service otherwise goes on holding the run id of the failed start.
            with contextlib.suppress(Exception):
                wandb.teardown()
    print("this start has no W&B log", flush=True)
    return -1


def wandb_attempts(remembered: dict[str, Any]) -> list[dict[str, Any]]:
    """Arguments of wandb.init to try in turn: rewind, append, and without a server offline."""
    import wandb

    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return [{"mode": "disabled"}]
    run_id = os.environ["WANDB_RUN_ID"]
    starts: list[dict[str, Any]] = [{"resume": "allow"}]
    if remembered.get("wandb_run_id") == run_id:
        starts.insert(0, {"resume_from": f"{run_id}?_step={remembered['wandb_step']}"})
    # These exclude each other: a user who sets one decides alone.
    if os.environ.keys() & {"WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM"}:
        starts = [{}]
    offline = starts[0] | {"mode": "offline"}
    mode = wandb.setup().settings.mode
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        print("no W&B key: WANDB_API_KEY is not set and nobody is logged in", flush=True)
        return [offline]
    return [*starts, offline] if mode == "online" else [starts[0]]


def open_wandb(run: Any) -> int:
    """Give a W&B run its axis and say how it is kept; return the training step it reaches, or -1.

    Only a run that was not rewound has points of the steps that now come again.
    """
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step", step_sync=True)
    reached = run.summary.get("train/global_step", -1) if run.resumed else -1
    if reached < 0 and not run.starting_step:
        # A checkpoint before the first logged loss has this point to rewind to.
        run.log({"train/global_step": 0})
    if run.offline:
        ends = "; it ends with this Job" if os.environ.get("JOB_ID") else ""
        print(f"W&B is offline{ends}: wandb sync {run.settings.sync_dir}", flush=True)
    if reached >= 0:
        print(
            f"W&B appends on the axis train/global_step; it has the points up to step {reached} "
            "and does not get them again",
            flush=True,
        )
    return reached


def open_loggers(
    args: argparse.Namespace, trainer: Any, contract: dict[str, Any], checkpoint: Path | None
) -> int:
    """Let the loggers go on where the checkpoint left them, and let none of them stop the run.

    Returns the training step that W&B already reaches, or -1.
    """
    remembered: dict[str, Any] = {}
    if checkpoint:
        remembered = json.loads((checkpoint / LOGGERS).read_text(encoding="utf-8"))
    reached = -1
    if RANK == 0 and "wandb" in args.report_to:
        reached = start_wandb(args, contract, remembered)
    guard_loggers(trainer, contract["training"]["step"], reached)
    return reached


def logger_state() -> dict[str, Any]:
    """What a checkpoint remembers of the loggers: W&B's run and its own last step; {} without.

    W&B counts the calls that logged something, not the steps of training.
    """
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None or wandb.run.disabled:
        return {}
    try:
        # Until its first point a rewound run names 0 as the next step.
        following = max(wandb.run.step, wandb.run.starting_step)
    except Exception as error:
        print(f"W&B does not tell its step: {error}", flush=True)
        return {}
    return {"wandb_run_id": wandb.run.id, "wandb_step": following - 1} if following else {}


def guard_loggers(trainer: Any, step: int = 0, reached: int = -1) -> None:
    """Keep a logger that raises from ending the training: it is named once and left out.

    `step` is where training resumes: TensorBoard drops the later points of earlier starts. W&B
    gets no point up to `reached`, and of the arguments only what start_wandb gave it.
    """
    from transformers.integrations import integration_utils as integrations

    reporters = tuple(integrations.INTEGRATION_TO_CALLBACK.values())
    for callback in trainer.callback_handler.callbacks:
        if not isinstance(callback, reporters):
            continue
        if isinstance(callback, integrations.WandbCallback):
            # Its own set-up would send the paths of this machine, and would ask for a key.
            callback.setup = lambda *_, **__: None
        elif isinstance(callback, integrations.TensorBoardCallback):
            callback.logging_dir = callback.logging_dir or f"{trainer.args.output_dir}/runs"
            writer = callback._SummaryWriter
            callback._SummaryWriter = functools.partial(writer, purge_step=step + 1)
        elif step:
            name = type(callback).__name__.removesuffix("Callback")
            print(f"{name} cannot rewind: it shows steps after {step} twice", flush=True)
        guard(callback, reached if isinstance(callback, integrations.WandbCallback) else -1)


def guard(callback: Any, reached: int) -> None:
    """Wrap the events of one logger in place: it stays the object that the Trainer knows."""
    failed = False

    def guarded(event: str, handle: Any) -> Any:
        def call(args: Any, state: Any, control: Any, **more: Any) -> None:
            nonlocal failed
            if failed or (event == "on_log" and state.global_step <= reached):
                return
            try:
                handle(args, state, control, **more)
            except Exception as error:
                failed = True
                name = type(callback).__name__.removesuffix("Callback")
                print(f"{name} failed and is left out: {error!r}", flush=True)

        return call

    for event in [name for name in dir(callback) if name.startswith("on_")]:
        setattr(callback, event, guarded(event, getattr(callback, event)))


# --- several processes -----------------------------------------------------------------------

# Names the folder that a start shares with the processes it has made; torchrun sets the others.
LAUNCH = "TRAIN_LAUNCH"
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
NODES = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
# What accelerate launch sets where its configuration shards.
LAUNCHED_SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
SHARDED_DEVICES = ("cuda",)  # on others accelerate leaves FSDP out without a word
ENDED = 128 + signal.SIGTERM  # the code of a process that its launcher has ended
JOIN_SECONDS = 1800  # how long a node waits for the others: Jobs do not start together
# What gloo, NCCL and the store say when a process at the other end has ended.
PEER_LOST = re.compile(r"(?i)connection (was )?(closed|reset|refused)|broken pipe|remote process")


def check_processes(args: argparse.Namespace) -> None:
    """Refuse numbers of processes and nodes that contradict each other, or a launcher's."""
    if args.nnodes < 1 or (args.num_processes is not None and args.num_processes < 1):
        fail("--nnodes and --num_processes must be at least 1.")
    if args.relay and args.nnodes > 1:
        fail("--relay reruns one Job, not the Jobs of all --nnodes: leave it out.")
    if args.nnodes == 1:
        if args.node_rank or args.master_addr:
            fail("--node_rank and --master_addr are for several nodes: say --nnodes N.")
    elif args.node_rank is None or not 0 <= args.node_rank < args.nnodes:
        fail(f"--nnodes {args.nnodes} needs --node_rank, from 0 to {args.nnodes - 1}, on each.")
    elif args.node_rank and not args.master_addr:
        fail("--master_addr: what is the host name or address of node 0?")
    for name, variable in LAUNCHED_SHARDING.items():
        if os.environ.get(variable, "").lower() in ("1", "true"):
            fail(
                f"accelerate's configuration turns on {name}, with which this script cannot end a "
                "run. Launch without it (accelerate launch --multi_gpu); --fsdp, behind the "
                "script's name, shards the base."
            )
    if LAUNCH not in os.environ and is_launched() and (args.num_processes or args.nnodes > 1):
        fail(
            "torchrun or accelerate has started this process already, so --num_processes and "
            "--nnodes come too late: give them to it, or start with `uv run`."
        )


def join_processes(args: argparse.Namespace) -> None:
    """Meet the other processes of a torchrun start, and agree how long one waits for another.

    At the end all of them wait for the first, which may wait for an absent Hub three times.
    """
    if WORLD_SIZE == 1:
        return
    import torch
    from torch import distributed

    both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    asked = args.trainer_fields.get("ddp_timeout", 1800)
    seconds = max(asked, 3 * args.hub_patience + 600)
    distributed.init_process_group(both, timeout=timedelta(seconds=seconds))


def is_launched() -> bool:
    """Whether torchrun, accelerate launch or `start_processes` has made this process."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def count_gpus() -> int:
    """How many GPUs this process sees."""
    if not NVIDIA_DRIVER.exists():
        return 0
    import torch  # Seconds, which a machine without a driver need not spend.

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def count_processes(args: argparse.Namespace, gpus: int) -> int:
    """How many processes this start makes on this machine: one for each GPU, or as asked for."""
    if args.num_processes is None:
        return max(1, gpus)
    if 0 < gpus < args.num_processes:
        fail(f"--num_processes {args.num_processes}: this machine has {gpus} GPUs, one for each.")
    return args.num_processes


def check_devices(settings: Any) -> None:
    """Refuse a process that Trainer would let compute on several GPUs: steps of other rows."""
    if settings.n_gpu > 1:
        fail(
            f"this one process sees {settings.n_gpu} GPUs. Show it a single one: "
            "CUDA_VISIBLE_DEVICES=0; or make a process for each: --num_processes "
            f"{settings.n_gpu} with `uv run`, or as many with torchrun or accelerate launch."
        )


def start_processes(args: argparse.Namespace, argv: list[str] | None) -> None:
    """Where there are several GPUs or nodes, be their launcher and end as they do.

    torch.distributed.run starts this script once for each GPU. Signals go to the first of this
    machine's processes, which tells the others at a step's end; torch's own launcher would end
    all of them 30 seconds later and hide their exit code.
    """
    if is_launched():
        return
    gpus = count_gpus()
    count = count_processes(args, gpus)
    # Trainer splits the rows of a process that no launcher has made over all GPUs it sees.
    if count == 1 and gpus < 2 and args.nnodes == 1:
        return
    from torch.distributed.run import config_from_args
    from torch.distributed.run import parse_args as parse_launch

    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    where += ["--rdzv-id", os.urandom(8).hex()]
    master = f"{os.path.expandvars(args.master_addr or '127.0.0.1')}:{args.master_port}"
    if args.nnodes > 1:
        if args.node_rank:
            wait_for_host(master)
        address, _, port = master.rpartition(":")
        where = ["--nnodes", str(args.nnodes), "--node-rank", str(args.node_rank)]
        where += ["--master-addr", address, "--master-port", port]
        where += ["--rdzv-conf", f"timeout={JOIN_SECONDS}"]
    nodes = f", node {args.node_rank} of {args.nnodes}" if args.nnodes > 1 else ""
    print(f"starting {count} process{'es' * (count > 1)} on this machine{nodes}", flush=True)
    # Else torch gives each a single thread.
    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # What the launcher says of a process that ends, `read_failures` says.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    words = sys.argv[1:] if argv is None else argv
    with TemporaryDirectory(prefix="hsd-launch-") as name:
        os.environ |= {LAUNCH: name, "TRAIN_STARTED": str(PROCESS_START)}
        quiet = ",".join(f"{rank}:3" for rank in range(1, count)) or "0"
        launch = [*where, "--nproc-per-node", str(count), "--signals-to-handle", "SIGQUIT"]
        launch += ["--log-dir", f"{name}/logs", "--redirects", quiet, "--monitor-interval", "0.1"]
        script = str(Path(__file__).resolve())
        try:
            launched = config_from_args(parse_launch([*launch, script, *words]))
            code = supervise(Path(name), master, *launched)
        finally:
            del os.environ[LAUNCH], os.environ["TRAIN_STARTED"]
    raise SystemExit(code)


def wait_for_host(master: str, seconds: float = JOIN_SECONDS) -> None:
    """Return when node 0 listens at `master` (host:port): its Job may start later than this one."""
    host, _, port = master.rpartition(":")
    end, said = time.monotonic() + seconds, False
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                fail(f"node 0 does not answer at {master} ({error}). Is its job running?", code=1)
        if not said:
            print(f"waiting for node 0 at {master}", flush=True)
        said = True
        time.sleep(1)


def supervise(folder: Path, master: str, config: Any, command: str, words: list[str]) -> int:
    """Run the processes of this machine and hand signals on; return how they ended, as a code."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    def forward(number: int, _: Any) -> None:
        (folder / "signal").touch()
        try:
            os.kill(int((folder / "pid").read_text(encoding="utf-8")), number)
        except FileNotFoundError:
            name = signal.Signals(number).name
            fail(f"{name} before the first step: nothing is lost. Submit the same command.", PAUSED)
        except ProcessLookupError:
            pass

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, forward)
    try:
        elastic_launch(config, command)(*words)
    except ChildFailedError as error:
        return read_failures(folder, error.failures)
    except DistError as error:
        reason = str(error).splitlines()[0]
        fail(f"the nodes did not meet at {master}: {reason}. Start all of them again.", code=1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def read_failures(folder: Path, failures: dict[int, Any]) -> int:
    """The exit code of a start of which processes have failed, after the one message it gives.

    The first process of a machine says by itself what is wrong; what another one said lies in a
    file, and is shown where the first one had nothing to say.
    """
    if (folder / "code").is_file():
        return int((folder / "code").read_text(encoding="utf-8"))
    ended = (-signal.SIGTERM, ENDED)
    first = min(failures.values(), key=lambda one: (one.exitcode in ended, one.timestamp))
    if first.exitcode in ended and (folder / "signal").exists():
        return PAUSED
    rank = next(rank for rank, failure in failures.items() if failure is first)
    for file in folder.glob(f"logs/*/attempt_0/{first.local_rank}/stderr.log"):
        said = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        print("\n".join([f"process {rank}:", *said[-60:]]), file=sys.stderr, flush=True)
    if first.exitcode > 0:
        return first.exitcode
    name = signal.Signals(-first.exitcode).name
    fail(
        f"process {rank} was ended by {name}, as where a machine's memory ends. The newest "
        "checkpoint stands; the same command goes on from it.",
        code=1,
    )


@contextlib.contextmanager
def as_one_of_several(stop: Stop) -> Iterator[None]:
    """In a process of `start_processes`: end with its launcher, and with one message for all."""
    if LAUNCH not in os.environ:
        yield
        return
    folder = Path(os.environ[LAUNCH])
    if sys.platform == "linux":
        # 1: PR_SET_PDEATHSIG. A launcher that is killed would leave a run that nobody can stop.
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if LOCAL_RANK == 0:
        (folder / "pid.new").write_text(str(os.getpid()), encoding="utf-8")
        (folder / "pid.new").replace(folder / "pid")
    try:
        yield
    except BaseException as error:
        if isinstance(error, RuntimeError) and PEER_LOST.search(str(error)):
            wait_for_the_end(stop)
        code = error.code if isinstance(error, SystemExit) else 1
        if LOCAL_RANK == 0 and folder.is_dir():
            (folder / "code").write_text(str(code or 0), encoding="utf-8")
        elif code and code != PAUSED:
            time.sleep(2)  # What all of them find wrong, the first one says.
        raise


def wait_for_the_end(stop: Stop, seconds: float = 15.0) -> NoReturn:
    """After a lost connection: another process has failed, says why, and the launcher ends all."""
    end = time.monotonic() + seconds
    while not stop.reason and time.monotonic() < end:
        time.sleep(0.1)
    if stop.reason and not is_spokesman():
        raise SystemExit(ENDED)
    fail(
        "the connection to another process is lost. If it is of another node, its log says why. "
        "The newest checkpoint stands; start the same commands again.",
        code=1,
    )


def is_spokesman() -> bool:
    """Whether this process answers a signal: the first one, where somebody has sent it from
    outside. Where one process fails, the launcher ends the others by the same signal.
    """
    folder = os.environ.get(LAUNCH)
    return LOCAL_RANK == 0 and (folder is None or (Path(folder) / "signal").exists())


def effective_batch(args: argparse.Namespace, earlier: dict[str, Any] | None) -> int:
    """Rows of one optimizer step, of all processes together: of a resumed run as it began.

    What `uv run` starts by itself on several GPUs has the rows of a single process; where torchrun
    or accelerate was told how many processes, the flags are of each of them, as everywhere else.
    """
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if earlier is None:
        return rows if LAUNCH in os.environ else rows * WORLD_SIZE
    training = earlier["training"]
    return training.get("effective_batch", rows * training["world_size"])


def share_batch(
    args: argparse.Namespace, contract: dict[str, Any], earlier: dict[str, Any] | None
) -> argparse.Namespace:
    """The arguments with this start's share of the effective batch in each process, recorded."""
    rows = contract["training"]["effective_batch"] = effective_batch(args, earlier)
    each, rest = divmod(rows, WORLD_SIZE)
    if rest:
        fitting = [str(count) for count in range(1, rows + 1) if rows % count == 0]
        fail(
            f"a step's {rows} rows cannot be shared by {WORLD_SIZE} processes alike. Start "
            f"{', '.join(fitting)} of them (--num_processes), or begin a run with another "
            "--per_device_train_batch_size or --gradient_accumulation_steps."
        )
    most = min(args.per_device_train_batch_size, each)
    size = next(size for size in range(most, 0, -1) if each % size == 0)
    if WORLD_SIZE > 1:
        print(
            f"effective batch: {rows} rows a step = {size} rows x {each // size} accumulated x "
            f"{WORLD_SIZE} processes",
            flush=True,
        )
    share = {"per_device_train_batch_size": size, "gradient_accumulation_steps": each // size}
    return argparse.Namespace(**vars(args) | share)


def fit_checkpoint(folder: Path, contract: dict[str, Any]) -> str:
    """Fit a folder of link_checkpoint to this number of processes; return what that changes.

    Each process has a file of random numbers and one of the sums since the last logged step. The
    loss is logged as the mean over the processes, so each gets the mean of the sums.
    """
    windows = sorted(folder.glob("log_window_*.json"), key=lambda path: int(path.stem[11:]))
    if len(windows) == WORLD_SIZE:
        return ""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in windows]
    mean = found[0] | {"loss_sum": sum(one["loss_sum"] for one in found) / len(found)}
    # Links: the checkpoint itself keeps its files.
    for path in (*windows, *folder.glob("rng_state*.pth")):
        path.unlink()
    for rank in range(WORLD_SIZE):
        write_json(folder / f"log_window_{rank}.json", mean)
    return (
        f"processes: {WORLD_SIZE} go on with what {len(windows)} saved. Each step has the same "
        f"{contract['training']['effective_batch']} rows. Not bit-identical are sums, taken in "
        "another order over other micro-batches; dropout, drawn anew; eval_loss, a mean over other "
        "batches; and the last step of an epoch that does not divide evenly."
    )


def restart_random_numbers(trainer: Any, folder: Path, step: int) -> None:
    """Where a checkpoint has no random numbers for this process: make them of seed, step, rank."""
    from transformers import set_seed

    if not any(folder.glob("rng_state*.pth")):
        set_seed(trainer.args.seed + 1_000_003 * step + RANK)


def sharding(text: str) -> str:
    """Read --fsdp: our own words, and what TrainingArguments takes."""
    known = {"auto": "auto", "always": "always", "never": "never", "true": "always"}
    known |= {"false": "never", "full_shard": "always", "full_shard auto_wrap": "always"}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, always, never")
    return known[text.lower()]


def choose_sharding(
    args: argparse.Namespace,
    config: Any,
    device: str,
    contract: dict[str, Any],
    earlier: dict[str, Any] | None,
) -> bool:
    """Whether the base is shared out over the processes (FSDP2); recorded, kept on resume.

    Needed where the body's weights and a fifth more, for head, adapter and activations, are more
    than one GPU has. Four bits are not sharded: bitsandbytes' blocks are not whole in each shard.
    """
    import torch

    training = contract["training"]
    needed, have = 0.0, math.inf
    size = 0.6 if args.load_in_4bit else {"float32": 4, "bfloat16": 2}[training["precision"]]
    if device == "cuda":
        needed = 1.2 * size * count_parameters(config) / 2**30
        have = torch.cuda.get_device_properties(0).total_memory / 2**30
    fitting = f"the base needs about {needed:.0f} GiB of a GPU's {have:.0f}"
    sharded = args.fsdp == "always"
    if earlier:
        sharded = earlier["training"].get("sharded", False)
    elif args.fsdp == "auto" and needed > have:
        sharded = WORLD_SIZE > 1 and not args.load_in_4bit
        if not sharded:
            way = "a flavor with more memory"
            way += "" if args.load_in_4bit else ", --load_in_4bit, or several GPUs (FSDP2)"
            print(f"warning: {fitting}: it may not fit. {way} would hold it.", flush=True)
    if sharded and device not in SHARDED_DEVICES:
        fail("FSDP (--fsdp, or a run that began with it) needs GPUs, and this start has none.")
    if sharded and WORLD_SIZE == 1:
        fail("FSDP shares a model out over several processes, and this start has one GPU.")
    if sharded and args.load_in_4bit:
        fail("--fsdp and --load_in_4bit exclude each other: leave one of them out.")
    if sharded:
        check_memory(size * count_parameters(config))
        why = f" ({fitting})" if needed > have else ""
        print(
            f"FSDP2: the base is shared out over {WORLD_SIZE} processes{why}. Each loads all of it "
            "into the machine's memory first.",
            flush=True,
        )
    training["sharded"] = sharded
    return sharded


def check_memory(size: float) -> None:
    """Refuse a base of `size` bytes that this machine's processes could not all load at once."""
    count, have = WORLD_SIZE // NODES, available_memory()
    if count * size > have:
        fail(
            f"FSDP: each of the {count} processes of this machine loads the whole base before its "
            f"share goes to a GPU, {count * size / 2**30:.0f} GiB of memory together, and "
            f"{have / 2**30:.0f} GiB are free. Take a machine with more, give fewer processes "
            "(--num_processes), or leave FSDP out and say --load_in_4bit."
        )


def available_memory() -> float:
    """Bytes that processes can still have on this machine or in its container, where it tells."""
    found = [math.inf]
    with contextlib.suppress(OSError):
        said = Path("/proc/meminfo").read_text(encoding="utf-8")
        found += [1024 * int(kib) for kib in re.findall(r"MemAvailable:\s+(\d+) kB", said)]
    with contextlib.suppress(OSError, ValueError):  # The word max: no limit.
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        said = (group / "memory.stat").read_text(encoding="utf-8")
        # Pages of files, which are the rest of what is used, make room.
        found.append(limit - sum(map(int, re.findall(r"^anon (\d+)", said, re.MULTILINE))))
    return min(found)


def shard(args: argparse.Namespace, settings: Any) -> None:
    """Have the trainer shard layer by layer, and save adapters whole: as without sharding.

    `name_layers` says which modules are layers.
    """
    settings.fsdp = True
    settings.fsdp_plugin_args = settings._process_fsdp_args()
    if "activation_checkpointing" not in args.trainer_fields:
        settings.activation_checkpointing = not settings.use_cpu


def name_layers(model: Any) -> None:
    """Tell PEFT, which asks the environment, which modules of the base are layers to shard.

    Not one that holds the input embedding, as BERT's does: accelerate shards that by itself, and
    fails where it is sharded already. Nor one that this model lacks, which PEFT refuses.
    """
    embedding = model.get_input_embeddings()
    kinds: dict[str, bool] = {}
    for module in model.modules():
        kind = type(module).__name__
        kinds[kind] = kinds.get(kind, True) and embedding not in [*module.modules()]
    layers = [name for name in model._no_split_modules or () if kinds.get(name)]
    os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(sorted(layers)))


def set_sharded(model: Any, weights: dict[str, Any] | None) -> None:
    """Give a sharded model the weights of an adapter file that process 0 has read."""
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    weights = broadcast(weights)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                key = name.replace(".modules_to_save.default", "").replace(".default", "")
                whole = weights[key].to(weight.device, weight.dtype)
                # A run that lacked only its finish has trained no step, and is not yet sharded.
                if isinstance(weight, DTensor):
                    whole = distribute_tensor(whole, weight.device_mesh, weight.placements)
                weight.copy_(whole)


def assist_finish(run: Run, trainer: Any, tokenizer: Any) -> None:
    """What a process beside the first has to do while that one runs `finish` with a sharded model:
    its share of each step in which all of them take part, in the same order.
    """
    trainer.save_model(str(run.store.folder / ".final"))
    probe_scores(trainer, tokenizer, run.contract)
    zero_trained(trainer.model)
    set_sharded(trainer.model, None)
    probe_scores(trainer, tokenizer, run.contract)


def gather_rank_files(folder: Path) -> None:
    """Bring to process 0 what processes of other machines have saved of a checkpoint, each its own:
    random numbers and sums. Everything else process 0 has saved.
    """
    if NODES == 1:
        return
    from torch import distributed

    names = (f"rng_state_{RANK}.pth", f"log_window_{RANK}.json")
    mine = {name: (folder / name).read_bytes() for name in names}
    parts = [None] * WORLD_SIZE if RANK == 0 else None
    distributed.gather_object(mine, parts)
    for part in parts or ():
        for name, content in part.items():
            if not (folder / name).is_file():
                (folder / name).write_bytes(content)


def share_checkpoint(checkpoint: Path | None) -> None:
    """Bring the checkpoint to resume from, and the best one, to machines that lack them.

    Machines that share a disk have them.
    """
    if NODES == 1 or checkpoint is None:
        return
    files, mark = [], checkpoint / ".shared"
    token = broadcast(os.urandom(8).hex())
    if RANK == 0:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        best = state["best_model_checkpoint"]
        for folder in [checkpoint, *([Path(best)] if best else [])]:
            files += folder.iterdir()
        mark.write_text(token, encoding="utf-8")
    files = broadcast(files)
    here = mark.is_file() and mark.read_text(encoding="utf-8") == token
    (lacking,) = any_rank(not here)
    if LOCAL_RANK == 0 and not here:
        shutil.rmtree(checkpoint, ignore_errors=True)  # Of an earlier start on this machine.
    for file in files if lacking else ():
        content = broadcast(file.read_bytes() if RANK == 0 else None)
        if LOCAL_RANK == 0 and not here:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    any_rank(False)  # All of them have looked and written.
    if RANK == 0:
        mark.unlink()


def has_experts(config: Any) -> bool:
    """Whether a model sends each token to some of several experts."""
    text = config.get_text_config(decoder=True)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((getattr(text, name, None) or 0) > 1 for name in names)


# --- shared: the same text in every script that has it ---------------------------------------


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one message that says what is wrong, what there is and what to do.

    Exit codes: 1 the Hub or the run failed, 2 arguments, config or data that the user must change.
    """
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def quiet_libraries() -> None:
    """Keep a Job's log to the lines that say something; called before any library is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # The pins make deprecations a matter of the next upgrade, not of this run.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations and usage dump: an error is one line and exit 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage="%(prog)s [flags]",
            **options,
        )

    def format_help(self) -> str:
        """Say each flag's default where its help does not."""
        for action in self._actions:
            if action.default not in (None, False, argparse.SUPPRESS):
                value = action.default
                shown = " ".join(value) if isinstance(value, list) else value
                action.help = (
                    f"{action.help}; default {shown}" if action.help else f"default {shown}"
                )
                action.default = argparse.SUPPRESS
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        fail(f"{message}. See --help.")


def boolean(text: str) -> bool:
    """Read 1/0/true/false, the form that flags, variables and config files share."""
    values = {"1": True, "true": True, "0": False, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1, 0, true or false")
    return values[text.lower()]


def flag_names(tokens: list[str], aliases: dict[str, str]) -> list[str]:
    """Write flags with underscores and by their present names; an empty value unsets its flag."""
    named: list[str] = []
    for token in tokens:
        if token.startswith("--") and len(token) > 2:
            flag, equals, value = token.partition("=")
            name = flag[2:].replace("-", "_")
            if name in aliases:
                print(f"--{name} is now --{aliases[name]}", flush=True)
            token = f"--{aliases.get(name, name)}{equals}{value}"
            if equals and not value:
                continue
        elif token == "" and named and named[-1].startswith("--"):
            named.pop()
            continue
        named.append(token)
    return named


def settings_as_flags(settings: dict[str, Any]) -> list[str]:
    """Turn a config file's or a preset's entries into flags, so that one parser checks them all."""
    flags: list[str] = []
    for key, value in settings.items():
        name = str(key)
        if value in (None, "", []) or name.startswith("_"):
            continue
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            flags.append(f"--{name}={json.dumps(value)}")
        else:
            flags.append(f"--{name}={value}")
    return flags


def parse_layer(
    parser: Parser, tokens: list[str], aliases: dict[str, str], origin: str
) -> dict[str, Any]:
    """Return only what these tokens set; an unknown flag ends the run and names the nearest one."""
    unset = object()
    actions = [action for action in parser._actions if action.dest != "help"]
    blank = argparse.Namespace(**{action.dest: unset for action in actions})
    known, unknown = parser.parse_known_args(flag_names(tokens, aliases), blank)
    if unknown:
        name = unknown[0].partition("=")[0]
        # The documented flags first: undocumented ones are many, and one is always near.
        shown = [action for action in actions if action.help != argparse.SUPPRESS]
        flags = [[flag for one in some for flag in one.option_strings] for some in (shown, actions)]
        near = difflib.get_close_matches(name, flags[0], n=1, cutoff=0.7)
        near = near or difflib.get_close_matches(name, flags[1], n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else "See --help for the flags there are."
        fail(f"unknown argument {name} ({origin}). {hint}")
    return {name: value for name, value in vars(known).items() if value is not unset}


def read_settings(path: str) -> dict[str, Any]:
    """Read a JSON or YAML file of flags."""
    file = Path(path).expanduser()
    if not file.is_file():
        fail(f"--config_file {path} is not a file. Give a JSON or YAML file of flags.")
    import yaml

    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(f"--config_file {path} is neither JSON nor YAML: {error}")
    if not isinstance(settings, dict):
        fail(f"--config_file {path} holds no mapping of flags to values.")
    return settings


def resolve_arguments(
    parser: Parser,
    argv: list[str] | None = None,
    presets: dict[str, dict[str, Any]] | None = None,
    aliases: dict[str, str] | None = None,
) -> argparse.Namespace:
    """Merge flag > environment > --config_file > --preset > default; print what is no default."""
    aliases = aliases or {}
    environment: dict[str, str] = {}
    for action in parser._actions:
        name = action.dest.upper()
        if action.help == argparse.SUPPRESS or name == "HELP":
            continue
        for variable in (f"HSD_{name}", *([name] if name in PLAIN_VARIABLES else [])):
            if os.environ.get(variable):
                environment.setdefault(action.dest, os.environ[variable])
    known = {f"HSD_{action.dest.upper()}" for action in parser._actions}
    for variable in sorted(name for name in os.environ if name.startswith("HSD_")):
        if variable not in known:
            print(f"warning: {variable} names no flag of this script", flush=True)
    layers = [
        (
            "environment",
            parse_layer(parser, settings_as_flags(environment), aliases, "environment"),
        ),
        (
            "command line",
            parse_layer(parser, sys.argv[1:] if argv is None else argv, aliases, "command line"),
        ),
    ]
    chosen = {name: value for _, layer in layers for name, value in layer.items()}
    if chosen.get("config_file"):
        settings = settings_as_flags(read_settings(chosen["config_file"]))
        layers.insert(0, ("config file", parse_layer(parser, settings, aliases, "config file")))
        chosen = layers[0][1] | chosen
    if chosen.get("preset"):
        if chosen["preset"] not in (presets or {}):
            fail(f"unknown preset {chosen['preset']!r}. There are: {', '.join(presets or {})}.")
        settings = settings_as_flags((presets or {})[chosen["preset"]])
        origin = f"preset {chosen['preset']}"
        layers.insert(0, (origin, parse_layer(parser, settings, aliases, origin)))
    return merge_layers(parser, layers)


def merge_layers(parser: Parser, layers: list[tuple[str, dict[str, Any]]]) -> argparse.Namespace:
    """Lay the later over the earlier and print every value that is not the default."""
    arguments = {
        action.dest: action.default
        for action in parser._actions
        if action.dest != "help" and action.default is not argparse.SUPPRESS
    }
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for name, value in layer.items():
            arguments[name] = list_of_words(name, value) if isinstance(value, list) else value
            origins[name] = origin
    for name, origin in origins.items():
        if arguments[name] != parser.get_default(name):
            print(f"{name} = {arguments[name]} ({origin})", flush=True)
    return argparse.Namespace(**arguments)


def list_of_words(name: str, values: list[Any]) -> list[Any]:
    """Split list values at commas and spaces: `q_proj,v_proj` is `q_proj v_proj`.

    Labels may hold both: several stand as they are, and a single text is parted at its commas.
    """
    separator = r"[,\s]+"
    if name == "labels":
        if len(values) > 1:
            return [value.strip(", ") for value in values]
        separator = r"\s*,\s*" if "," in values[0].strip(", ") else separator
    words: list[Any] = []
    for value in values:
        words += re.split(separator, value.strip(", ")) if isinstance(value, str) else [value]
    return words


@dataclass(frozen=True)
class Repo:
    """A Hub repo at one commit, or a local folder of the same layout (`revision` is then None)."""

    name: str
    kind: str
    revision: str | None
    folder: Path | None = None

    def fetch(self, *patterns: str) -> Path:
        """Return a folder that holds the files matching the patterns."""
        if self.folder:
            return self.folder
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        with hub_errors(f"download {', '.join(patterns)} of {self.name}"):
            if patterns == (CONTRACT,):
                # One file by its name needs no listing of the repo.
                with contextlib.suppress(RemoteEntryNotFoundError):
                    file = hf_hub_download(
                        self.name, CONTRACT, repo_type=self.kind, revision=self.revision
                    )
                    return Path(file).parent
            return Path(
                snapshot_download(
                    self.name,
                    repo_type=self.kind,
                    revision=self.revision,
                    allow_patterns=list(patterns),
                )
            )

    def as_input(self) -> dict[str, str | None]:
        """The contract's record of this repo; of a folder it names only the last part."""
        return {
            "repo": self.folder.name if self.folder else self.name,
            "kind": self.kind,
            "revision": self.revision,
        }


def is_folder(argument: str) -> bool:
    """Say whether a repo argument means a local folder: ids never begin with ./, ../, ~ or /."""
    return argument in (".", "..") or argument.startswith(("./", "../", "~", "/"))


def open_repo(argument: str, kind: str) -> Repo:
    """Resolve `user/name[@revision]` to its commit hash, or a folder to its path."""
    if is_folder(argument):
        folder = Path(argument).expanduser().resolve()
        if not folder.is_dir():
            fail(f"the folder {argument} does not exist. Give a folder or a Hub id (user/name).")
        return Repo(argument, kind, None, folder)
    name, _, revision = argument.partition("@")
    from huggingface_hub import HfApi

    with hub_errors(f"open the {kind} repo {argument}"):
        info = HfApi().repo_info(name, repo_type=kind, revision=revision or None)
    return Repo(name, kind, info.sha)


@contextlib.contextmanager
def hub_errors(action: str) -> Iterator[None]:
    """Turn the Hub client's errors into one message: exit 2 where the user can mend it, else 1."""
    from httpx2 import HTTPError
    from huggingface_hub import errors, get_token

    try:
        yield
    except errors.LocalTokenNotFoundError:
        fail(f"cannot {action}: there is no Hub token. Set HF_TOKEN or run `hf auth login`.")
    except errors.GatedRepoError as error:
        reason = str(error).splitlines()[0]
        fail(f"cannot {action}: it is gated. Accept its terms on its page. ({reason})")
    except errors.RepositoryNotFoundError:
        fail(
            f"cannot {action}: no such repo, or it is private and this token may not see it. "
            "Check the id (user/name) and HF_TOKEN."
        )
    except errors.RevisionNotFoundError:
        fail(f"cannot {action}: the repo has no such revision. Give a branch, tag or commit hash.")
    except errors.LocalEntryNotFoundError as error:
        fail(f"cannot {action}: the Hub does not answer. {error}", code=1)
    except (errors.EntryNotFoundError, errors.HFValidationError) as error:
        fail(f"cannot {action}: {error}")
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401 and get_token() is None:
            fail(f"cannot {action}: there is no Hub token. Set HF_TOKEN or run `hf auth login`.")
        if status == 401:
            fail(f"cannot {action}: the Hub does not accept this token. Run `hf auth login` again.")
        if status == 403:
            fail(
                f"cannot {action}: this token may not. It needs write access to the repo's "
                "namespace: name a repo of your own, or make a token of role `write` in the Hub's "
                "settings."
            )
        fail(f"cannot {action}: the Hub answered {status}. {str(error).splitlines()[0]}", code=1)
    except (HTTPError, OSError, RuntimeError) as error:
        # transformers and datasets wrap a gated repo's refusal into an error of their own.
        gated = re.search("gated (repo|dataset)", str(error))
        fail(f"cannot {action}: {type(error).__name__}: {error}", code=2 if gated else 1)
    except ValueError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fail(f"cannot {action}: a file is damaged or of another form. {reason}")


def own_namespace() -> str:
    """Return the user name of the token: the namespace of repos that no flag names."""
    from huggingface_hub import HfApi

    with hub_errors("ask the Hub who you are"):
        return HfApi().whoami()["name"]


def prepare_repo(name: str, kind: str, stage: str, allow_public: bool) -> None:
    """Create the repo, private, where it is missing, and prove that this token may write to it.

    The proof asks where an upload would go and leaves nothing behind. Refused are an existing
    public repo (unless `allow_public`) and one that holds anything but an earlier result of the
    same stage.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with hub_errors(f"write to the {kind} repo {name}"):
        api.create_repo(name, repo_type=kind, private=True, exist_ok=True)
        info = api.repo_info(name, repo_type=kind)
        if not info.private and not allow_public:
            fail(
                f"the {kind} repo {name} is public. Make it private, name another one, "
                "or say --allow_public true."
            )
        probe = CommitOperationAdd(path_in_repo=CONTRACT, path_or_fileobj=b"{}")
        api.preupload_lfs_files(name, [probe], repo_type=kind)
    files = {file.rfilename for file in info.siblings or []} - {".gitattributes", "README.md"}
    if CONTRACT in files:
        read_contract(Repo(name, kind, info.sha), stage)
    elif files:
        fail(f"the {kind} repo {name} holds files of something else, such as {min(files)}.")


def retried(
    action: str,
    attempt: Callable[[int], Any],
    pause: Callable[[float], Any] = time.sleep,
    tries: int | None = 5,
) -> Any:
    """Return `attempt(number)`, called again after a pause where the Hub or the line fails.

    The pauses grow from 1 to 60 s, or last as long as the Hub's rate-limit headers ask. The last
    error is raised after `tries` calls, where `pause` returns False, and at once where no waiting
    mends it.
    """
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import parse_ratelimit_headers

    for number in itertools.count():
        try:
            return attempt(number)
        except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: hf_xet's only kind.
            response = error.response if isinstance(error, HfHubHTTPError) else None
            final = response is not None and response.status_code not in (429, 500, 502, 503, 504)
            if final or number + 1 == tries:
                raise
            seconds = min(2**number, 60)
            if response is not None:
                limit = parse_ratelimit_headers(response.headers)
                asked = response.headers.get("Retry-After", "")
                seconds = max(seconds, limit.reset_in_seconds + 1 if limit else 0)
                seconds = max(seconds, int(asked) if asked.isdigit() else 0)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"cannot {action} ({reason}); next try in {seconds} s", flush=True)
            if pause(seconds) is False:
                raise
    raise AssertionError("the loop returns or raises")


def commit(
    name: str,
    kind: str,
    operations: list[Any],
    message: str,
    parent: str | None = None,
    pause: Callable[[float], Any] = time.sleep,
    tries: int | None = 5,
) -> str:
    """Commit all operations at once and return the commit's hash; see `retried` for the tries.

    Where `parent` is given and not the newest commit, the Hub answers 412. The token in the
    description recognises a commit that was made although its answer was lost.
    """
    from huggingface_hub import HfApi

    api, token = HfApi(), os.urandom(8).hex()

    def attempt(number: int) -> str:
        for earlier in api.list_repo_commits(name, repo_type=kind) if number else []:
            if token in earlier.message:
                return earlier.commit_id
        return api.create_commit(
            name,
            operations,
            repo_type=kind,
            commit_message=message,
            commit_description=token,
            parent_commit=parent,
        ).oid

    return retried(f"commit to {name}", attempt, pause, tries)


def without_paths(value: Any) -> Any:
    """Arguments with local paths cut to their last part: the rest speaks only of the machine."""
    if isinstance(value, dict):
        return {name: without_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and is_folder(value) else value


def stage_record(
    stage: str, script: str, arguments: argparse.Namespace, inputs: list[Repo]
) -> dict[str, Any]:
    """The part of contract.json that every stage writes: who made this, from what, with what."""
    source = Path(__file__).read_text(encoding="utf-8")
    packages = {}
    for package in re.findall(r'(?m)^#\s+"([\w.-]+)==', source):
        with contextlib.suppress(PackageNotFoundError):
            packages[package] = version(package)
    return {
        "schema": SCHEMA,
        "stage": stage,
        "script": script,
        "script_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "arguments": without_paths(vars(arguments)),
        "inputs": [repo.as_input() for repo in inputs],
        "packages": packages,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def read_contract(repo: Repo, stage: str) -> dict[str, Any]:
    """Read contract.json and refuse one of another schema or another stage."""
    file = repo.fetch(CONTRACT) / CONTRACT
    if not file.is_file():
        fail(
            f"{repo.name} holds no {CONTRACT}: it was not written by this project's {stage} stage."
        )
    try:
        contract = json.loads(file.read_text(encoding="utf-8"))
        schema, found = contract["schema"], contract["stage"]
    except (ValueError, KeyError, TypeError) as error:
        fail(
            f"{CONTRACT} of {repo.name} is damaged ({error}). Restore it from the repo's history, "
            "or run its stage again into a new repo or folder."
        )
    if schema != SCHEMA:
        fail(f"{repo.name} has a contract of schema {schema}; this script reads {SCHEMA}.")
    if found != stage:
        fail(f"{repo.name} was written by the stage {found!r}; give a repo of the stage {stage!r}.")
    return contract


def write_json(file: Path, content: Any) -> None:
    """Write strict JSON (no NaN) that a person can read: a list of numbers stands on one line."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    # Strings hold no raw line break, so only a list can begin with one.
    text = re.sub(r"\[\n[-\d,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    file.write_text(text + "\n", encoding="utf-8")


def read_rows(repo: Repo, config: str, split: str) -> list[dict[str, Any]]:
    """Load one split of a dataset repo as rows with `id`, `text`, `label` (name), `target_groups`.

    A row of an SFT config also has `prompt` and `completion`, both lists of messages.
    """
    rows, columns = load_split(repo, config, split)
    missing = {"id", "text", "label", "target_groups"} - set(columns)
    if missing:
        fail(
            f"{repo.name} ({config}/{split}) lacks the columns {', '.join(sorted(missing))}. "
            f"It has: {', '.join(columns)}."
        )
    return rows


def load_split(repo: Repo, config: str, split: str) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows of a dataset repo's split, a label by its name, and the names of the columns."""
    from datasets import ClassLabel, get_dataset_config_names, get_dataset_split_names, load_dataset
    from datasets.exceptions import DatasetGenerationError

    place = str(repo.folder) if repo.folder else repo.name
    with hub_errors(f"read {config}/{split} of {repo.name}"), TemporaryDirectory() as fresh:
        configs = get_dataset_config_names(place, revision=repo.revision)
        if config not in configs:
            fail(f"{repo.name} has no config {config!r}. There are: {', '.join(configs)}.")
        splits = get_dataset_split_names(place, config, revision=repo.revision)
        if split not in splits:
            fail(f"{repo.name} has no split {split!r} in {config}. There are: {', '.join(splits)}.")
        # The library's cache knows a folder by its name alone and would return an older build.
        cache = fresh if repo.folder else None
        try:
            data = load_dataset(
                place, config, split=split, revision=repo.revision, cache_dir=cache
            ).with_format("arrow")
        except DatasetGenerationError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            fail(f"{repo.name} ({config}/{split}) cannot be read: {reason}")
        except ValueError as error:
            # Where all files of a split are empty, the library does not know the split.
            if "corresponds to no data" in str(error):
                fail(f"{repo.name} ({config}/{split}) is empty.")
            raise
        table, features = data[:], data.features
    if not len(table):
        fail(f"{repo.name} ({config}/{split}) is empty.")
    rows = table.to_pylist()
    if isinstance(features.get("label"), ClassLabel):
        names = features["label"].names
        for row in rows:
            # A post without a label has none, or -1.
            known = row["label"] in range(len(names))
            row["label"] = names[row["label"]] if known else None
    return rows, table.column_names


def read_plain_rows(
    repo: Repo, config: str | None, split: str, labels: list[str]
) -> tuple[list[dict[str, Any]], str]:
    """Rows of a dataset repo that has no contract.json, as read_jsonl's, and their config."""
    from datasets import get_dataset_config_names

    place = str(repo.folder) if repo.folder else repo.name
    with hub_errors(f"list the configs of {repo.name}"):
        try:
            configs = get_dataset_config_names(place, revision=repo.revision)
        except FileNotFoundError:
            fail(f"{repo.name} holds no {CONTRACT} and no data that can be read. {DATA_FORMS}")
    if config is None and len(configs) > 1 and "default" not in configs:
        fail(f"{repo.name} has several configs: {', '.join(configs)}. Say --dataset_config.")
    config = config or ("default" if "default" in configs else configs[0])
    rows, _ = load_split(repo, config, split)
    for number, row in enumerate(rows, start=1):
        rows[number - 1] = unify_row(
            row, labels, f"{split}-{number}", f"{repo.name} ({config}/{split}) row {number}"
        )
    return rows, config


def has_contract(repo: Repo) -> bool:
    """Whether a repo was written by a stage of this project."""
    return (repo.fetch(CONTRACT) / CONTRACT).is_file()


def read_jsonl(path: str, labels: list[str]) -> list[dict[str, Any]]:
    """Read a local JSONL file of posts (`text`, `label`, optional `id`, `target_groups`).

    A label is a name of `labels` or its index. Rows of the other forms get `prompt` and
    `completion` as lists of messages, and text and label only where they have them.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        fail(f"the file {path} does not exist.")
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8: {error}")
    rows = []
    # Not splitlines: that also splits at signs such as U+2028, which stand in posts.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            fail(f"{path} line {number} is not JSON: {error}. {DATA_FORMS}")
        rows.append(unify_row(row, labels, f"{file.stem}-{number}", f"{path} line {number}"))
    if not rows:
        fail(f"{path} is empty.")
    return rows


def unify_row(row: Any, labels: list[str], name: str, origin: str) -> dict[str, Any]:
    """A row of any form: prompt and completion as messages, label by name, groups as a list.

    `name` is the id of a row without one. A completion that is text is the assistant's answer,
    a prompt that is text the user's message.
    """
    if isinstance(row, dict):
        # A column that is empty in a row is null in a table.
        row = {key: value for key, value in row.items() if value is not None}
    check_line(row, origin)
    if "messages" in row:
        *row["prompt"], answer = row.pop("messages")
        row["completion"] = [answer]
    if not {"prompt", "completion"} <= set(row):
        # A column of that name beside a text and its label means something else.
        row = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row.get(key), str):
            row[key] = [{"role": role, "content": row[key]}]
    if "completion" in row:
        row["completion"] = [
            message | {"content": message["content"].strip()} for message in row["completion"]
        ]
    if "label" in row:
        row["label"] = label_name(row["label"], labels)
    groups = row.get("target_groups") or []
    row["target_groups"] = [groups] if isinstance(groups, str) else groups
    row.setdefault("id", name)
    return row


def label_name(value: Any, labels: list[str]) -> str:
    """The label that a row's value means: the one of that name, else the one at that place.

    1.0 and true are 1 too. Labels that are numbers themselves have no places: beside 1 and 2 a 0
    is a third label, not the first one.
    """
    forms = [str(value)]
    if isinstance(value, bool):
        forms.append(str(value).lower())
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        forms.append(str(int(value)))
    for form in forms:
        if form in labels:
            return form
    numbered = any(re.fullmatch(r"-?\d+", label) for label in labels)
    places = {} if numbered else {str(place): label for place, label in enumerate(labels)}
    return places.get(forms[-1], forms[-1])


def check_line(row: Any, origin: str) -> None:
    """End on a row of no form: neither a post with its label nor a prompt with its answer."""
    columns = set(row) if isinstance(row, dict) else set()
    asked = "messages" in columns or {"prompt", "completion"} <= columns
    if not asked and not {"text", "label"} <= columns:
        found = f"it has {', '.join(sorted(columns))}" if columns else "it is no object"
        fail(
            f"{origin} needs `text` and `label`, or a prompt with its answer; {found}. {DATA_FORMS}"
        )
    turns = [row[key] for key in ("messages", "prompt", "completion") if key in row]
    if not asked:
        turns = [row["text"]]
    texts = [turn for turn in turns if not isinstance(turn, list)]
    for message in (message for turn in turns if isinstance(turn, list) for message in turn):
        known = message if isinstance(message, dict) else {}
        texts += [known.get("role"), known.get("content")]
    texts += [row["text"]] if "text" in row else []
    if not all(isinstance(text, str) for text in texts) or isinstance(row.get("messages"), str):
        fail(f"{origin}: a `text`, and each message's `role` and `content`, must be a string.")
    if asked:
        said = row.get("messages") or [*as_turns(row, "prompt"), *as_turns(row, "completion")]
        roles = [message["role"] for message in said]
        if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
            fail(
                f"{origin}: a conversation must end with one message of the user and the "
                "assistant's answer, with nothing before them but perhaps a system message; its "
                f"roles are {roles}. {DATA_FORMS}"
            )
    groups = row.get("target_groups") or []
    if not isinstance(groups, (str, list)) or not all(isinstance(group, str) for group in groups):
        fail(f"{origin}: `target_groups` must be a list of names.")
    try:
        "".join([str(row.get("id")), str(row.get("label")), *texts, *groups]).encode()
    except UnicodeEncodeError as error:
        fail(
            f"{origin} is no valid Unicode: {error.object[error.start]!a} is half a character. "
            "Leave it out, or put another in its place, as datasets/build_custom.py does."
        )


def as_turns(row: dict[str, Any], key: str) -> list[dict[str, str]]:
    """A row's prompt or completion as messages."""
    role = "user" if key == "prompt" else "assistant"
    value = row.get(key) or []
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def fill_from_prompts(
    rows: list[dict[str, Any]], strategy: dict[str, str] | None, labels: list[str], origin: str
) -> None:
    """Give rows with prompts of their own the `text` and `label` that their prompt speaks of.

    The text is what stands in the place of {text}, or the whole message where the user's does not
    read like the strategy; the label is the one that the answer names.
    """
    template = strategy["user"] if strategy else "{text}"
    head, _, tail = template.partition("{text}")
    unread = []
    for row in rows:
        if "prompt" not in row:
            continue
        said = row["prompt"][-1]["content"]
        framed = (
            len(said) >= len(head) + len(tail) and said.startswith(head) and said.endswith(tail)
        )
        if not isinstance(row.get("text"), str) or row["text"] not in said:
            row["text"] = said[len(head) : len(said) - len(tail)] if framed else said
        answer = strategy["answer"] if strategy else "{label}"
        named = parse_answer(answer, row["completion"][0]["content"], labels)
        label = row.setdefault("label", named)
        if label is None:
            unread.append(row)
        elif named is not None and named != label:
            fail(
                f"{origin}: the row {row['id']} is labelled {label}, and its answer says {named}. "
                "Correct one of the two."
            )
    if unread:
        fail(
            f"{origin}: the answers of {len(unread)} rows, such as the one with the id "
            f"{unread[0]['id']}, name no label. The labels are: {', '.join(labels)}. Correct these "
            "answers, or train with the labels that they name: train/train.py --labels NAME NAME "
            "--positive_label NAME."
        )


def check_labels(rows: list[dict[str, Any]], labels: list[str], origin: str) -> None:
    """End on a label that the contract does not name."""
    others = [row for row in rows if row.get("label") not in labels]
    if others:
        unknown = sorted({str(row.get("label")) for row in others})
        fail(
            f"{origin} has unknown labels {unknown[:5]}, first in the row {others[0]['id']}. The "
            f"labels are: {', '.join(labels)}."
        )


NO_TARGET = "no_target"
RESAMPLES = 10_000
# With fewer posts than this below the line a rate is counted, but nothing is concluded from it.
MIN_DENOMINATOR = 20
# The two-sided 95 % point of the normal distribution.
NORMAL_95 = 1.959963984540054
TOO_FEW_GROUPS = f"fewer than two groups have {MIN_DENOMINATOR} posts to count"


def wilson(part: int, whole: int) -> tuple[float, float]:
    """The 95 % score interval of a rate (Wilson 1927); `whole` is at least 1."""
    z = NORMAL_95
    middle = (part + z * z / 2) / (whole + z * z)
    half = z * math.sqrt(part * (whole - part) / whole + z * z / 4) / (whole + z * z)
    return (0.0 if part == 0 else middle - half, 1.0 if part == whole else middle + half)


def share(part: int, whole: int, empty: str) -> dict[str, Any]:
    """A rate with its count and 95 % Wilson interval; null with the reason `empty` for 0 of 0."""
    if whole == 0:
        return {"value": None, "n": 0, "low": None, "high": None, "reason": empty}
    low, high = wilson(int(part), int(whole))
    return {"value": part / whole, "n": int(whole), "low": low, "high": high, "reason": None}


def number(value: float | None, n: int, reason: str) -> dict[str, Any]:
    """A figure without interval as yet; null with a reason where undefined."""
    undefined = value is None or math.isnan(value)
    return {
        "value": None if undefined else float(value),
        "n": n,
        "low": None,
        "high": None,
        "reason": reason if undefined else None,
    }


def count_figures(tables: Any, positive: int) -> dict[str, Any]:
    """Figures of confusion tables, the positive label against the rest; nan where undefined.

    `tables` has the shape (..., labels, labels), true label first; a figure has the shape (...).
    A figure over labels is undefined where a label has no post. Matthews' coefficient is that of
    several labels (Gorodkin 2004).
    """
    import numpy as np

    tables = np.asarray(tables, dtype=np.float64)
    total = tables.sum((-2, -1))
    support, flagged = tables.sum(-1), tables.sum(-2)
    hits = np.diagonal(tables, axis1=-2, axis2=-1)
    tp = hits[..., positive]
    fn, fp = support[..., positive] - tp, flagged[..., positive] - tp
    tn = total - tp - fn - fp
    with np.errstate(divide="ignore", invalid="ignore"):
        recalls = hits / support
        # A label without posts and without answers has no F1, and no weight either.
        f1 = 2 * hits / (support + flagged)
        spread = np.sqrt(total**2 - (flagged**2).sum(-1)) * np.sqrt(total**2 - (support**2).sum(-1))
        return {
            "accuracy": hits.sum(-1) / total,
            "balanced_accuracy": recalls.mean(-1),
            "precision": tp / (tp + fp),
            "recall": tp / (tp + fn),
            "false_positive_rate": fp / (fp + tn),
            "false_negative_rate": fn / (fn + tp),
            "flag_rate": (tp + fp) / total,
            "f1": 2 * tp / (2 * tp + fp + fn),
            "f1_macro": np.where((support > 0).all(-1), f1.mean(-1), np.nan),
            "f1_weighted": np.where(support > 0, f1 * support, 0).sum(-1) / total,
            "mcc": (hits.sum(-1) * total - (support * flagged).sum(-1)) / spread,
        }


@dataclass(frozen=True)
class Cells:
    """Posts that are alike, counted: what is resampled.

    `of` (n,) is each post's cell, `first` (cells,) a post of each, `counts` (cells,) their posts.
    """

    of: Any
    first: Any
    counts: Any


def build_cells(*columns: Any) -> Cells:
    """Count posts that are equal in all columns, each of shape (n,) or (n, k)."""
    import numpy as np

    rows = np.column_stack([np.asarray(column, dtype=np.int64) for column in columns])
    # Sorting numbers is many times faster than sorting rows. A key is a cell so far and the next
    # column's value, so it stays below n times the number of values.
    of = np.zeros(len(rows), dtype=np.int64)
    for column in rows.T:
        values, kinds = np.unique(column, return_inverse=True)
        of = np.unique(of * max(1, len(values)) + kinds, return_inverse=True)[1]
    _, first, counts = np.unique(of, return_index=True, return_counts=True)
    return Cells(of, first, counts)


def difference_ends(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """The 95 % ends of a difference of independent rates from those of each.

    Newcombe (1998), method 10.
    """
    away = one["value"] - other["value"]
    low = away - math.hypot(one["value"] - one["low"], other["high"] - other["value"])
    return low, away + math.hypot(one["high"] - one["value"], other["value"] - other["low"])


def widest_gap(rates: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The largest difference between groups in any of some rates, each given for every group.

    One pair of groups truly differs most, so the largest upper end of the pairs' intervals bounds
    the true difference; the largest lower end does once a test says that there is a difference,
    and is 0 otherwise. A post of two groups counts in both, which widens the interval.
    """
    pairs = [pair for some in rates for pair in itertools.permutations(some, 2)]
    if not pairs:
        return number(None, len(rates[0]), TOO_FEW_GROUPS)
    figure = number(max(one["value"] - other["value"] for one, other in pairs), len(rates[0]), "")
    ends = [difference_ends(*pair) for pair in pairs]
    lows, highs = zip(*ends, strict=True)
    return figure | {"low": max(0.0, *lows), "high": min(1.0, max(highs))}


def permute_groups(
    wrong: Any, members: Any, compared: list[int], seed: int, resamples: int = RESAMPLES
) -> tuple[float, list[float]]:
    """Permutation p-values of one error rate: of its gap, and of each group against the rest.

    `wrong` (n,) says which posts of one true label are decided wrongly, `members` (n, groups) who
    is in which group. The errors are dealt anew among the posts, so that who is in which group,
    overlaps too, stays as it is. `compared` are the groups whose largest difference is the gap.
    The observed deal counts as one of the draws (Phipson and Smyth 2010).
    """
    import numpy as np

    cells = build_cells(members)
    kinds = members[cells.first].astype(np.float64)  # (cells, groups)
    sizes = cells.counts @ kinds
    rest = len(wrong) - sizes
    draws = np.random.default_rng(seed).multivariate_hypergeometric(
        cells.counts, int(wrong.sum()), size=resamples, method="marginals"
    )
    observed = np.bincount(cells.of, weights=wrong, minlength=len(cells.counts))
    errors = np.vstack([observed, draws]) @ kinds  # (1 + resamples, groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = errors / sizes
        away = np.abs(rates - (wrong.sum() - errors) / rest)

    def p_of(values: Any) -> float:
        # Equal rates can differ in their last bit.
        return float((values >= values[0] - 1e-9).mean())

    gap = 1.0
    if len(compared) > 1:
        gap = p_of(rates[:, compared].max(1) - rates[:, compared].min(1))
    return gap, [p_of(away[:, group]) for group in range(members.shape[1])]


def rank_posts(truth: Any, scores: Any) -> tuple[float, float]:
    """Area under the ROC curve and average precision of posts (n,); nan where undefined.

    What scikit-learn's functions return, with one sort for both.
    """
    import numpy as np

    order = np.argsort(-scores, kind="stable")
    # Equal scores are taken together.
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True)) if len(order) else order
    hits = np.cumsum(truth[order], dtype=np.float64)[last]
    wrong = last + 1 - hits
    gained = np.diff(hits, prepend=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        area = (np.diff(wrong, prepend=0) * (hits - gained / 2)).sum() / (
            truth.sum() * (len(truth) - truth.sum(dtype=np.float64))
        )
        return float(area), float((gained * hits / (last + 1)).sum() / np.float64(truth.sum()))


def group_members(posts: list[dict[str, Any]], groups: list[str]) -> dict[str, list[int]]:
    """Indices of each group's posts: the contract's groups, then others found, then no target.

    A post that is aimed at several groups stands in each.
    """
    found = {group for post in posts for group in post["target_groups"]}
    names = [*groups, *sorted(found - {*groups, NO_TARGET})]
    members: dict[str, list[int]] = {name: [] for name in [*names, NO_TARGET]}
    for index, post in enumerate(posts):
        for name in set(post["target_groups"]) or {NO_TARGET}:
            members[name].append(index)
    return members


def softmax(scores: list[float]) -> list[float]:
    """Probabilities from log-likelihoods or logits."""
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class Scaffold:
    """The text that a chat template puts around the messages, rendered once per run.

    `pieces` are the literal texts before, between and after the contents of `roles`; the last
    role is the assistant, whose content is the answer. Contents never pass through the template,
    so a post can neither change it nor be changed by it.
    """

    roles: tuple[str, ...]
    pieces: tuple[str, ...]
    answer_prefix: str = ""


def pinned_template(template: str, date: str) -> str:
    """Replace a template's clock by a date (YYYY-MM-DD): else prompts change at midnight."""
    day = datetime.fromisoformat(date)

    def literal(call: re.Match[str]) -> str:
        return json.dumps(day.strftime(call["format"]))

    return re.sub(r"strftime_now\(\s*(['\"])(?P<format>.*?)\1\s*\)", literal, template)


def build_scaffold(tokenizer: Any, roles: list[str], date: str, effort: str) -> Scaffold:
    """Render the chat template once with markers for the contents of `roles` plus the answer.

    A template that refuses a system role gets its text at the head of the user's. Without a
    template: contents joined by blank lines, the answer after a space, closed by the end token.
    """
    roles = [*roles, "assistant"]
    if not tokenizer.chat_template:
        between = ["\n\n"] * (len(roles) - 2)
        return Scaffold(tuple(roles), ("", *between, "", tokenizer.eos_token or ""), " ")
    marks = [f"[[content-{index}]]" for index in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    template = pinned_template(tokenizer.chat_template, date)
    from jinja2 import TemplateError

    def render(conversation: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, reasoning_effort=effort
        )

    try:
        text = render(messages)
    except TemplateError:
        joined = "\n\n".join(marks[:-1])
        try:
            text = render([{"role": "user", "content": joined}, messages[-1]])
        except TemplateError as error:
            fail(f"the chat template refuses the prompt (reasoning effort {effort}): {error}")
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found:
            fail("the chat template drops or reorders messages; give a model with a usable one.")
        pieces.append(piece)
    # Whatever follows the end-of-turn token is the template's spacing before a next turn.
    return Scaffold(tuple(roles), (*pieces, text.rstrip()))


def encode_prompt(
    tokenizer: Any, scaffold: Scaffold, messages: list[dict[str, str]], post: str, room: int
) -> tuple[list[int], bool]:
    """Token ids of the prompt up to where the answer begins, and whether the post was cut.

    At most `room` ids: an over-long post is cut at its end, the template never. Control tokens
    that stand in a message are encoded as plain text.
    """
    contents = [message["content"] for message in messages]
    ids = encode_contents(tokenizer, scaffold, contents)
    if len(ids) <= room:
        return ids, False
    place = max(range(len(contents)), key=lambda index: post in contents[index])
    start = contents[place].rfind(post)
    if start < 0:
        fail(f"a prompt of {len(ids)} tokens does not hold its post's text, so it cannot be cut.")
    head, tail = contents[place][:start], contents[place][start + len(post) :]
    # The longest beginning of the post that fits: an emoji can be four tokens, a word one.
    keep, most = 0, len(post)
    while keep < most:
        middle = (keep + most + 1) // 2
        contents[place] = head + post[:middle] + tail
        if len(encode_contents(tokenizer, scaffold, contents)) <= room:
            keep = middle
        else:
            most = middle - 1
    contents[place] = head + post[:keep] + tail
    ids = encode_contents(tokenizer, scaffold, contents)
    if len(ids) > room:
        fail(f"the prompt without its post has {len(ids)} tokens; raise --max_length.")
    return ids, True


def encode_contents(tokenizer: Any, scaffold: Scaffold, contents: list[str]) -> list[int]:
    """Token ids of the scaffold filled with the prompt's contents."""
    # A template writes its own start token; without one the tokenizer's own is due.
    ids = [] if tokenizer.chat_template else list(tokenizer("")["input_ids"])
    # Not all_special_tokens: that lacks most control tokens of Llama 3 and gpt-oss.
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    if any(token in content for content in contents for token in special):
        for piece, content in zip(scaffold.pieces, contents, strict=False):
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += tokenizer(content, add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
        return (
            ids + tokenizer(scaffold.pieces[len(contents)], add_special_tokens=False)["input_ids"]
        )
    filled = "".join(
        piece + content for piece, content in zip(scaffold.pieces, contents, strict=False)
    )
    filled += scaffold.pieces[len(contents)]
    return ids + tokenizer(filled, add_special_tokens=False)["input_ids"]


def encode_answer(tokenizer: Any, scaffold: Scaffold, answer: str) -> list[int]:
    """Token ids of an answer with its end-of-turn token: what is trained on."""
    text = scaffold.answer_prefix + answer
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids + tokenizer(scaffold.pieces[-1], add_special_tokens=False)["input_ids"]


def label_completions(
    tokenizer: Any, scaffold: Scaffold, answer: str, labels: list[str]
) -> dict[str, list[int]]:
    """Token ids that stand for each label: the answer up to the label's end.

    Where nothing follows the label in the answer template the end-of-turn token belongs to it,
    so that no label is the beginning of another.
    """
    head, _, tail = answer.partition("{label}")
    completions = {}
    for label in labels:
        if tail:
            text = scaffold.answer_prefix + head + label
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        else:
            ids = encode_answer(tokenizer, scaffold, head + label)
        completions[label] = ids
    for label, ids in completions.items():
        for other, longer in completions.items():
            if other != label and longer[: len(ids)] == ids:
                fail(f"the label {label!r} is the beginning of {other!r} for this tokenizer.")
    return completions


def prompt_messages(
    strategy: dict[str, str], text: str, post: dict[str, Any] | None = None
) -> list[dict[str, str]]:
    """The messages that ask about one post: the strategy's system and user templates, filled.

    A user template may also ask for the {target_group} and the {persona} of the post.
    """
    post = post or {}
    values = {
        "{text}": text,
        "{target_group}": ", ".join(post.get("target_groups") or []) or "unknown",
        "{persona}": post.get("persona") or "unknown",
    }
    # One pass: a post that reads {persona} stays as it is.
    pattern = "|".join(map(re.escape, values))
    user = re.sub(pattern, lambda match: values[match[0]], strategy["user"])
    messages = [{"role": "user", "content": user}]
    if strategy.get("system"):
        messages.insert(0, {"role": "system", "content": strategy["system"]})
    return messages


def encode_post(tokenizer: Any, text: str, max_length: int) -> tuple[list[int], bool]:
    """Token ids of a post for a sequence classifier, and whether it was cut to `max_length`."""
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    if len(ids) <= max_length:
        return ids, False
    cut = tokenizer(text, split_special_tokens=True, truncation=True, max_length=max_length)
    return cut["input_ids"], True


def common_prefix(rows: list[list[int]]) -> list[int]:
    """The longest list that every row begins with."""
    shared: list[int] = []
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return shared


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def parse_answer(template: str, answer: str, labels: list[str]) -> str | None:
    """The label of an answer in the form of its template, else None."""
    if is_json(template):
        try:
            parsed = json.loads(answer)
        except ValueError:
            return None
        keys = [key for key, value in json.loads(template).items() if value == "{label}"]
        label = parsed.get(keys[0]) if isinstance(parsed, dict) and keys else None
        return label if label in labels else None
    pattern = re.escape(template)
    names = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    pattern = pattern.replace(re.escape("{label}"), f"({names})")
    pattern = pattern.replace(re.escape("{rationale}"), ".*")
    match = re.fullmatch(pattern, answer, re.DOTALL)
    return match[1] if match else None


def probe_ids(
    tokenizer: Any, scaffold: Scaffold | None, prompt: dict[str, str] | None
) -> list[int]:
    """Token ids of a fixed post as a model of this run sees it (without prompt: a classifier)."""
    if scaffold is None or prompt is None:
        return encode_post(tokenizer, PROBE_POST, 512)[0]
    contents = [message["content"] for message in prompt_messages(prompt, PROBE_POST)]
    return encode_contents(tokenizer, scaffold, contents)


def check_probe(tokenizer: Any, found: list[int], expected: list[int], origin: str) -> None:
    """End where the prompt is not, token for token, the one the adapter was trained on."""
    if found == expected:
        return
    place = len(common_prefix([found, expected]))
    was, now = (tokenizer.decode(ids[place : place + 1]) for ids in (expected, found))
    fail(
        f"{origin} was trained on another prompt than this tokenizer and template give: token "
        f"{place} was {was!r} and is {now!r}. Use the base model and revision of its contract."
    )


def check_device(parameters: int, allow_cpu: bool, job_command: str) -> str:
    """Return the device to run on, "cuda" or "cpu", before any weight is downloaded.

    Ends on an NVIDIA device that torch cannot use, and on a model of more than 2B parameters
    without a GPU: on a CPU it would take hours where a Job takes minutes.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if NVIDIA_DRIVER.is_file() and not allow_cpu:
        driver = re.search(r"\d+\.\d[\d.]*", NVIDIA_DRIVER.read_text(encoding="utf-8"))
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        fail(
            f"this machine has an NVIDIA driver ({driver[0] if driver else 'unknown version'}) but "
            f"torch {torch.__version__}, built {built}, cannot use the device. Update the driver "
            "or install the torch build that fits it; --allow_cpu true runs on the CPU."
        )
    if parameters > 2e9 and not allow_cpu:
        fail(
            f"the model has {parameters / 1e9:.1f}B parameters and there is no GPU. Run it as a "
            f"Job: {job_command}  (--allow_cpu true runs it here all the same.)"
        )
    return "cpu"


def count_parameters(config: Any) -> int:
    """Number of parameters of the model's body, from its config alone: nothing is downloaded."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        return sum(weight.numel() for weight in AutoModel.from_config(config).parameters())


def read_base_config(base: Repo) -> Any:
    """Load a base model's config; no code of a repo is ever executed."""
    from transformers import AutoConfig

    place = str(base.folder) if base.folder else base.name
    with hub_errors(f"read the config of {base.name}"):
        try:
            return AutoConfig.from_pretrained(place, revision=base.revision)
        except ValueError as error:
            fail(f"{base.name} is no model that transformers can load: {error}")


def load_tokenizer(repo: Repo) -> Any:
    """Load a tokenizer; one without a pad token pads with its end token."""
    from transformers import AutoTokenizer

    place = str(repo.folder) if repo.folder else repo.name
    with hub_errors(f"read the tokenizer of {repo.name}"):
        tokenizer = AutoTokenizer.from_pretrained(place, revision=repo.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    base: Repo,
    config: Any,
    task: str,
    labels: list[str],
    dtype: Any,
    device: str,
    quantization: Any = None,
) -> Any:
    """Load the base model for `causal` or `classify` (a new head with one output per label).

    Its `drawn` names the weights that the checkpoint lacks: those of a classifier's head and
    pooler, drawn at random here, and otherwise in every process. The adapter must bring them. (Of
    a copy in bfloat16 it names none: the copy holds what was drawn.)
    MXFP4 (gpt-oss) and FP8 (Ministral) checkpoints are dequantised, because neither can be
    trained or merged as stored. Four bits of an FP8 checkpoint come from a copy in bfloat16.
    """
    import transformers

    stored = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if quantization is not None and stored == "fp8":
        with TemporaryDirectory(prefix="bfloat16-") as scratch:
            copy = write_whole_copy(base, config, task, labels, Path(scratch))
            whole = read_base_config(copy)
            return load_base(copy, whole, task, labels, dtype, device, quantization)
    dequantised = quantization is None and stored in ("mxfp4", "fp8")
    if quantization is None and stored == "mxfp4":
        quantization = transformers.Mxfp4Config(dequantize=True)
    if quantization is None and stored == "fp8":
        quantization = transformers.FineGrainedFP8Config(dequantize=True)
    # Safetensors only: a .bin file is a pickle, which can run a stranger's code.
    options: dict[str, Any] = {
        "revision": base.revision,
        "dtype": dtype,
        "use_safetensors": True,
    }
    if quantization is not None:
        options["quantization_config"] = quantization
    if device == "cuda":
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
    if task == "classify":
        kind = transformers.AutoModelForSequenceClassification
        options["num_labels"] = len(labels)
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: index for index, label in enumerate(labels)}
    elif config.model_type == "mistral3":
        kind = transformers.AutoModelForImageTextToText
    else:
        kind = transformers.AutoModelForCausalLM
    place = str(base.folder) if base.folder else base.name
    from safetensors import SafetensorError

    # The library only warns of weights it draws at random; here they are checked.
    transformers.logging.set_verbosity_error()
    with hub_errors(f"load the base model {base.name}"):
        try:
            model, report = kind.from_pretrained(place, output_loading_info=True, **options)
        except (SafetensorError, ValueError) as error:
            # The library's list of all classes that it could load instead has 10,000 characters.
            reason = str(error).partition("Model type should be one of")[0]
            fail(f"{base.name} cannot be loaded for the task {task}: {reason}")
    transformers.logging.set_verbosity_warning()
    body = f"{model.base_model_prefix}."
    lost = [
        name
        for name in report["missing_keys"]
        if task == "causal" or (name.startswith(body) and ".pooler." not in name)
    ]
    if lost:
        fail(f"{base.name} lacks {len(lost)} of its weights, for example {sorted(lost)[0]}.")
    model.drawn = sorted(report["missing_keys"])
    # What the checkpoint does not hold quantised keeps its own dtype otherwise.
    return model.to(dtype) if dequantised else model


def write_whole_copy(base: Repo, config: Any, task: str, labels: list[str], folder: Path) -> Repo:
    """Save a quantised base dequantised to bfloat16, two bytes a weight; four bits start there."""
    import torch

    print(f"{base.name} is stored quantised: four bits are made from a bfloat16 copy", flush=True)
    model = load_base(base, config, task, labels, torch.bfloat16, "cpu")
    model.save_pretrained(folder, save_original_format=False)
    return Repo(base.name, "model", None, folder)


if __name__ == "__main__":
    main()
