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
#
# [tool.hf-jobs]
# flavor = "a100-large"
# timeout = "4h"
# name = "hsd-train"
# secrets = ["HF_TOKEN"]
# ///
"""Fine-tune a LoRA adapter that labels hate speech; resubmit the same command to resume.

Reads:  DATASET_REPO (of datasets/build_unified.py, default {you}/hsd-data) or a local --train_file,
        and the base model at a pinned revision.
Writes: HUB_MODEL_ID (private, default {you}/hsd-lora): checkpoint-N/ at every save, and at the end
        the adapter, tokenizer, contract.json and model card at its root.

    hf jobs uv run --flavor a100-large train/train.py
    hf jobs uv run --flavor l4x1 train/train.py --model_name_or_path HuggingFaceTB/SmolLM2-360M

The same command again continues from the newest complete checkpoint of the repo, on any machine;
after the end it says so and does nothing. --output_dir without --hub_model_id is a local run that
needs no network and no token. Every further field of trl.SFTConfig (with --task classify: of
transformers.TrainingArguments) is accepted as a flag, for example --optim paged_adamw_8bit.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
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
# What a run shows its tokenizer and template to prove that they are those of another run.
PROBE_POST = "My neighbours moved in last week, said <|endoftext|> nobody. 42 % é \u4f60\u597d"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
LABELS, POSITIVE_LABEL = ["normal", "hate"], "hate"
LORA_TARGETS = ["q_proj", "v_proj"]
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "high_capacity": {"lora_r": 64, "num_train_epochs": 5},
    "memory_efficient": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "max_length": 256,
    },
    "quick_test": {"num_train_epochs": 1, "lora_r": 16, "early_stopping_patience": 0},
}
# Names that the libraries dropped and that users' commands and config files still hold.
ALIASES = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "gradient_checkpointing": "activation_checkpointing",
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
}
# A resumed run must be the run that began: these arguments may not change under it.
SAME_RUN = (
    *("task", "model_name_or_path", "model_revision", "dataset_repo", "dataset_config"),
    *("train_file", "max_length", "seed", "lora_r", "lora_alpha", "lora_dropout"),
    *("lora_target_modules", "load_in_4bit", "bnb_4bit_quant_type", "learning_rate"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "dtype", "trainer_fields"),
)
# Documented flags that are fields of the trainer's config by the same name.
TRAINER_FLAGS = (
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("per_device_eval_batch_size", "gradient_accumulation_steps", "warmup_steps"),
    *("weight_decay", "max_grad_norm", "lr_scheduler_type", "seed", "save_steps"),
    *("logging_steps", "report_to", "run_name"),
)
CHECKPOINT_FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
}
# Not pushed: training_args.bin is a pickle that nothing reads, README.md is PEFT's empty card.
UNPUSHED = {"training_args.bin", "README.md"}
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
    switch = {"type": boolean, "nargs": "?", "const": True, "default": False}
    flag = parser.add_argument_group("data").add_argument
    flag("--dataset_repo", help="Hub id[@revision] or folder ({you}/hsd-data)")
    flag("--dataset_config", help="prompt strategy (simple); with --task classify: unified")
    flag("--train_file", help="JSONL of messages, or of text and label, instead of a dataset repo")
    flag("--validation_file", help="the same for evaluation during training")
    flag("--max_length", type=int, default=512, help="tokens; a longer post is cut, no prompt")
    flag = parser.add_argument_group("model").add_argument
    flag("--model_name_or_path", default="openai/gpt-oss-20b", help="Hub id or folder")
    flag("--model_revision", help="branch, tag or commit of the base model (main)")
    flag("--task", choices=["causal", "classify"], default="causal")
    flag("--lora_r", type=int, default=32)
    flag("--lora_alpha", type=int, default=32)
    flag("--lora_dropout", type=float, default=0.05)
    flag("--lora_target_modules", nargs="+", default=LORA_TARGETS)
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
    flag("--seed", type=int, default=42)
    flag = parser.add_argument_group("state and logs").add_argument
    flag("--hub_model_id", help="adapter repo ({you}/hsd-lora)")
    flag("--run_name", help="name of the W&B run and of the adapter repo ({you}/hsd-RUN_NAME)")
    flag("--output_dir", help="folder; without --hub_model_id a local run, with no network")
    flag("--save_steps", type=int, default=100, help="between checkpoints and evaluations")
    flag("--keep_checkpoints", type=int, default=2, help="on the Hub, beside the best one")
    flag("--logging_steps", type=int, default=10)
    flag("--report_to", nargs="+", default=["wandb"], help="wandb (offline without its key), none")
    flag("--config_file", help="JSON or YAML file of these flags")
    flag("--preset", default="default", help=", ".join(PRESETS))
    flag("--allow_public", **switch, help="push to a repo that is public")
    flag("--allow_cpu", **switch, help="train a model of more than 2B parameters without a GPU")
    flag("--group_by_length", **switch | {"help": argparse.SUPPRESS})
    fields = add_trainer_fields(parser)
    args = resolve_arguments(parser, argv, PRESETS, ALIASES)
    args.trainer_fields = {name: vars(args).pop(name) for name in fields & vars(args).keys()}
    for name in args.trainer_fields.keys() & DECIDED_HERE.keys():
        print(f"--{name} has no effect: {DECIDED_HERE[name]}", flush=True)
        del args.trainer_fields[name]
    if vars(args).pop("group_by_length"):
        print("--group_by_length is now --train_sampling_strategy group_by_length", flush=True)
        args.trainer_fields["train_sampling_strategy"] = "group_by_length"
    return args


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
        fields = [
            field
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Arguments"))
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        ]
        for field in fields:
            # A token never comes from a flag: it would stand in job pages and in the contract.
            secret = field.target.id.startswith("_") or field.target.id.endswith("_token")
            if field.target.id not in taken and not secret:
                taken.add(field.target.id)
                parser.add_argument(
                    f"--{field.target.id}",
                    help=argparse.SUPPRESS,
                    default=argparse.SUPPRESS,
                    **field_type(ast.unparse(field.annotation)),
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
    args = parse_args(argv)
    check_training_arguments(args)
    store = open_store(args)
    earlier = store.read_contract()
    if earlier:
        check_same_run(args, earlier, store.name)
    data = read_data(args, earlier)
    base = open_base(args, earlier)
    config = read_base_config(base)
    device = check_device(count_parameters(config), args.allow_cpu, training_job(argv))
    tokenizer = load_tokenizer(base)
    contract = build_contract(args, data, base, tokenizer, earlier)
    if earlier and is_finished(store, earlier, contract):
        return
    rows = encode_rows(args, data, tokenizer, contract)
    settings = build_settings(args, config, device, bool(data.validation), store.folder)
    quantization = build_quantization(args, base, config, device)
    if store.repo:
        prepare_repo(store.repo, "model", "adapter", args.allow_public)
    model = build_model(args, base, config, data.labels, device, quantization)
    trainer = build_trainer(args, settings, model, base, tokenizer, rows)
    warn_of_warmup(settings, len(rows[0]))
    add_push_callback(trainer, store, contract, args.keep_checkpoints)
    store.begin(contract)
    start_wandb(args, contract)
    trainer.train(resume_from_checkpoint=store.fetch_checkpoint())
    finish(store, trainer, tokenizer, contract)
    if not args.output_dir:
        shutil.rmtree(store.folder)


# --- arguments and state ---------------------------------------------------------------------


def check_training_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is opened."""
    if args.train_file and args.dataset_repo in environment_values("DATASET_REPO"):
        print(f"--train_file beats DATASET_REPO={args.dataset_repo} of the environment", flush=True)
        args.dataset_repo = None
    if args.train_file and args.dataset_repo:
        fail("--train_file and --dataset_repo are both given; name one source of training data.")
    if args.validation_file and not args.train_file:
        fail("--validation_file goes with --train_file; a dataset repo brings its own split.")
    if args.keep_checkpoints < 1 or args.save_steps < 1:
        fail("--keep_checkpoints and --save_steps must be at least 1.")
    if args.max_steps == 0 or args.num_train_epochs <= 0:
        fail("there is nothing to train: --max_steps is 0 or --num_train_epochs is not positive.")
    local = args.output_dir and not args.hub_model_id
    if local and not (args.dataset_repo or args.train_file):
        fail("a local run needs --dataset_repo (an id or a folder) or --train_file.")
    if args.hub_model_id and is_folder(args.hub_model_id):
        fail(f"--hub_model_id {args.hub_model_id} is a folder; say --output_dir for a local run.")


def environment_values(name: str) -> list[str]:
    """What the environment says for a flag, by either of its names."""
    found = (os.environ.get(variable) for variable in (name, f"HSD_{name}"))
    return [value for value in found if value]


@dataclass
class Store:
    """Where a run's state lives: a private Hub repo, or only `folder` (`repo` is then None).

    With a repo the Hub is the truth and `folder` is this machine's working copy.
    """

    repo: str | None
    folder: Path

    @property
    def name(self) -> str:
        return self.repo or str(self.folder)

    def files(self) -> list[str]:
        """Every file of the repo's head, or of the folder."""
        if self.repo is None:
            return [str(file.relative_to(self.folder)) for file in self.folder.rglob("*")]
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return HfApi().list_repo_files(self.repo)
        except RepositoryNotFoundError:
            return []

    def read_contract(self) -> dict[str, Any] | None:
        """The contract of the run that this one continues; None where nothing was saved yet."""
        with hub_errors(f"list the files of {self.name}"):
            if CONTRACT not in self.files():
                return None
            saved = self.checkpoints()
        repo = Repo(self.name, "model", None, self.folder)
        contract = read_contract(open_repo(self.repo, "model") if self.repo else repo, "adapter")
        return contract if saved or contract["training"]["state"] == "complete" else None

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints, newest first; an incomplete one is named."""
        found: dict[int, set[str]] = {}
        for file in self.files():
            if match := re.fullmatch(r"checkpoint-(\d+)/([^/]+)", file):
                found.setdefault(int(match[1]), set()).add(match[2])
        steps = []
        for step in sorted(found, reverse=True):
            missing = CHECKPOINT_FILES - found[step]
            if missing:
                print(f"checkpoint-{step} lacks {', '.join(sorted(missing))}: skipped", flush=True)
            else:
                steps.append(step)
        return steps

    def fetch_checkpoint(self) -> str | None:
        """Bring the newest complete checkpoint and the best one here; return the newest's folder.

        The best one's path in trainer_state.json becomes this machine's: Trainer otherwise
        forgets it and ends with other weights than the uninterrupted run.
        """
        with hub_errors(f"list the files of {self.name}"):
            steps = self.checkpoints()
        if not steps:
            print(f"no checkpoint in {self.name}: training starts at step 0", flush=True)
            return None
        newest = self.fetch(f"checkpoint-{steps[0]}")
        state = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))
        if state["best_model_checkpoint"]:
            best = Path(state["best_model_checkpoint"]).name
            there = best in [f"checkpoint-{step}" for step in steps]
            if not there:
                print(
                    f"the best one, {best}, is not in {self.name}: a new one is found", flush=True
                )
            state["best_model_checkpoint"] = str(self.fetch(best)) if there else None
            write_state(newest / "trainer_state.json", state)
        print(
            f"resuming from checkpoint-{steps[0]} of {self.name}: step {state['global_step']} of "
            f"{state['max_steps']}, epoch {state['epoch']:.2f}",
            flush=True,
        )
        return str(newest)

    def fetch(self, checkpoint: str) -> Path:
        """A local folder of a checkpoint, downloaded where the Hub is the truth."""
        folder = self.folder / checkpoint
        if self.repo is not None:
            shutil.rmtree(folder, ignore_errors=True)
            source = open_repo(self.repo, "model").fetch(f"{checkpoint}/*") / checkpoint
            shutil.copytree(source, folder)
        return folder

    def begin(self, contract: dict[str, Any]) -> None:
        """Write the contract of a run whose model and trainer stand."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / CONTRACT, contract)
        with hub_errors(f"write the contract to {self.name}"):
            self.push([CONTRACT], f"Start {SCRIPT}")

    def push(self, names: list[str], message: str, delete: list[str] | None = None) -> str:
        """Commit files of `folder` under their own names, and the removal of folders, at once.

        Returns the commit's hash. A local run has nothing to push.
        """
        if self.repo is None:
            return ""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [
            CommitOperationDelete(path_in_repo=f"{name}/", is_folder=True) for name in delete or []
        ]
        for name in names:
            operations.append(CommitOperationAdd(name, path_or_fileobj=self.folder / name))
        return commit(self.repo, "model", operations, message)


def open_store(args: argparse.Namespace) -> Store:
    """Fill in the repos that no flag names; nothing is created yet."""
    local = bool(args.output_dir) and not args.hub_model_id
    if not args.dataset_repo and not args.train_file:
        args.dataset_repo = f"{own_namespace()}/hsd-data"
    if not local and not args.hub_model_id:
        args.hub_model_id = f"{own_namespace()}/hsd-{args.run_name or 'lora'}"
    scratch = Path(tempfile.gettempdir()) / f"hsd-train-{os.getpid()}"
    folder = Path(args.output_dir or scratch).expanduser()
    return Store(None if local else args.hub_model_id, folder)


def write_state(file: Path, state: dict[str, Any]) -> None:
    """Write trainer_state.json as Trainer does: a run that diverged has NaN in its history."""
    file.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_same_run(args: argparse.Namespace, earlier: dict[str, Any], name: str) -> None:
    """End where arguments that a resumed run must keep differ from those it began with."""
    now = stage_record("adapter", SCRIPT, args, [])["arguments"]
    changed = [
        f"{key}: {earlier['arguments'].get(key)} -> {now[key]}"
        for key in SAME_RUN
        if earlier["arguments"].get(key) != now[key]
    ]
    if changed:
        fail(
            f"{name} holds a run with other arguments ({'; '.join(changed)}). Give the old values "
            "to resume it, or another --hub_model_id or --output_dir to start a new run."
        )


def is_finished(store: Store, earlier: dict[str, Any], contract: dict[str, Any]) -> bool:
    """Say whether the repo already holds the end of this very run, and print it."""
    lengths = [
        (run["arguments"]["num_train_epochs"], run["arguments"]["max_steps"])
        for run in (earlier, contract)
    ]
    if lengths[0] != lengths[1]:
        # The schedule depends on the length, so this is no longer the run that began.
        print(f"(epochs, steps) change from {lengths[0]} to {lengths[1]}", flush=True)
    if earlier["training"]["state"] != "complete" or lengths[0] != lengths[1]:
        return False
    print(f"{store.name} is complete at step {earlier['training']['step']}: nothing to do")
    return True


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
        source.as_input(),
    )


def read_local_data(args: argparse.Namespace) -> Data:
    """Rows of local JSONL files. Posts get the `instruction` strategy; messages bring their own."""
    train = read_jsonl(args.train_file, LABELS)
    validation = read_jsonl(args.validation_file, LABELS) if args.validation_file else []
    posts = [row for row in train + validation if "messages" not in row]
    check_labels(posts, LABELS, args.train_file)
    if args.task == "classify" and len(posts) < len(train) + len(validation):
        fail(f"--task classify needs `text` and `label` in every row of {args.train_file}.")
    prompt = local_prompt(train[0]) if args.task == "causal" else None
    for row in train + validation:
        if "messages" in row:
            *row["prompt"], answer = row["messages"]
            row["completion"] = [answer]
            row["text"] = row["prompt"][-1]["content"] if row["prompt"] else ""
        elif prompt:
            row["prompt"] = prompt_messages(prompt, row["text"])
            row["completion"] = [{"role": "assistant", "content": row["label"]}]
    file = Path(args.train_file).expanduser()
    record = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    groups = sorted({group for row in train for group in row["target_groups"]})
    return Data(train, validation, LABELS, POSITIVE_LABEL, groups, prompt, None, record)


def local_prompt(row: dict[str, Any]) -> dict[str, str]:
    """The strategy of a local training file: `instruction`, or what its messages have in common."""
    if "messages" not in row:
        return {"name": "instruction"} | {
            key: text.replace("{labels}", " or ".join(LABELS)) for key, text in INSTRUCTION.items()
        }
    print("the rows bring their own prompts; an evaluation asks with each post alone", flush=True)
    system = [message["content"] for message in row["messages"] if message["role"] == "system"]
    return {
        "name": "messages",
        "description": "the training file's own messages",
        "system": "".join(system),
        "user": "{text}",
        "answer": "{label}",
    }


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
        print(f"trained on, in the first row: {tokenizer.decode(trained)!r}", flush=True)
    return splits[0], splits[1]


def encode_conversations(
    rows: list[dict[str, Any]], tokenizer: Any, contract: dict[str, Any]
) -> tuple[list[dict[str, Any]], int]:
    """Token ids of prompts with their answers, and how many posts were cut."""
    rendering = contract["rendering"]
    scaffold = Scaffold(
        tuple(rendering["roles"]), tuple(rendering["pieces"]), rendering["answer_prefix"]
    )
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


def training_job(argv: list[str] | None) -> str:
    """This very command as a Job on a GPU."""
    flags = shlex.join(sys.argv[1:] if argv is None else argv)
    return f"hf jobs uv run --flavor a100-large {SCRIPT} {flags}"


def folder_sha256(folder: Path) -> str:
    """SHA-256 over a local model's config and weights, by file name: what stands for a commit."""
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()


def build_contract(
    args: argparse.Namespace,
    data: Data,
    base: Repo,
    tokenizer: Any,
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
    if earlier:
        check_probe(tokenizer, ids, earlier["rendering"]["probe_ids"], "this run")
        if earlier["dataset"] != data.record:
            fail(
                f"the training data has changed: it was {earlier['dataset']} and is {data.record}. "
                "Give the old data to resume, or name another repo or folder for a new run."
            )
    inputs = [base] if data.source is None else [base, data.source]
    return stage_record("adapter", SCRIPT, args, inputs) | {
        "task": args.task,
        "labels": data.labels,
        "positive_label": data.positive_label,
        "groups": data.groups,
        "base_model": base.as_input()
        | ({"sha256": folder_sha256(base.folder)} if base.folder else {}),
        "dataset": data.record,
        "prompt": data.prompt,
        "rendering": rendering
        | {"probe_ids": ids, "probe_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest()},
        "training": {
            "state": "running",
            "step": earlier["training"]["step"] if earlier else 0,
            "epoch": earlier["training"]["epoch"] if earlier else 0.0,
            "job_id": os.environ.get("JOB_ID"),
            "wandb_run_id": (
                earlier["training"]["wandb_run_id"] if earlier else os.urandom(4).hex()
            ),
        },
    }


def build_quantization(args: argparse.Namespace, base: Repo, config: Any, device: str) -> Any:
    """How --load_in_4bit stores the base: NF4 with double quantisation; None without it."""
    import torch
    from transformers import BitsAndBytesConfig

    if not args.load_in_4bit:
        return None
    if stored := (getattr(config, "quantization_config", None) or {}).get("quant_method"):
        fail(
            f"--load_in_4bit cannot quantise {base.name}: it is stored as {stored}. Leave the "
            "flag out, or give a copy of the model in bfloat16."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if uses_bf16(args, device) else torch.float32,
        # A new head is trained whole, so it cannot be quantised.
        llm_int8_skip_modules=["classifier", "score", "lm_head"],
    )


def build_model(
    args: argparse.Namespace,
    base: Repo,
    config: Any,
    labels: list[str],
    device: str,
    quantization: Any,
) -> Any:
    """The base model; a classifier's new head and the LoRA weights are drawn from the seed."""
    import torch
    from transformers import set_seed

    set_seed(args.seed)
    dtype = torch.bfloat16 if uses_bf16(args, device) else torch.float32
    return load_base(base, config, args.task, labels, dtype, device, quantization)


def uses_bf16(args: argparse.Namespace, device: str) -> bool:
    """Whether base and autocast are bfloat16: as asked, or where a GPU computes in it natively."""
    import torch

    if args.dtype != "auto":
        return args.dtype == "bfloat16"
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def lora_config(args: argparse.Namespace, model: Any, base: Repo) -> Any:
    """LoRA on the named modules; a model without any of them gets every linear layer."""
    import peft

    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets: Any = args.lora_target_modules
    if targets != ["all-linear"] and not set(targets) & leaves:
        if targets != LORA_TARGETS:
            fail(
                f"--lora_target_modules {' '.join(targets)}: the model has no such modules. Its "
                f"modules are: {', '.join(sorted(leaves - {''}))}; or say all-linear."
            )
        print(f"the model has no modules {', '.join(targets)}: LoRA on all-linear", flush=True)
        targets = ["all-linear"]
    return peft.LoraConfig(
        task_type="SEQ_CLS" if args.task == "classify" else "CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        revision=base.revision,
    )


# --- training --------------------------------------------------------------------------------


def build_settings(
    args: argparse.Namespace, config: Any, device: str, evaluates: bool, folder: Path
) -> Any:
    """SFTConfig or TrainingArguments: ours, then the user's further fields, as they allow."""
    import transformers

    best = evaluates and args.early_stopping_patience > 0
    options = {name: getattr(args, name) for name in TRAINER_FLAGS} | {
        "output_dir": str(folder),
        "save_strategy": "steps",
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": args.save_steps,
        "save_total_limit": args.keep_checkpoints,
        "load_best_model_at_end": best,
        "metric_for_best_model": "eval_loss" if best else None,
        # Without this the patience counts from zero after each resume.
        "restore_callback_states_from_checkpoint": True,
        "use_cpu": device == "cpu",
        "bf16": uses_bf16(args, device),
        "activation_checkpointing": device == "cuda",
        # A Job's log has no terminal to redraw a bar on.
        "disable_tqdm": not sys.stderr.isatty(),
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
) -> Any:
    """TRL's SFTTrainer on token ids, or transformers' Trainer for a classifier, both with LoRA."""
    import transformers
    from datasets import Dataset

    train, validation = (Dataset.from_list(split) if split else None for split in rows)
    config = lora_config(args, model, base)
    common = {"train_dataset": train, "eval_dataset": validation, "processing_class": tokenizer}
    if args.task == "classify":
        import peft

        model.config.pad_token_id = tokenizer.pad_token_id
        if args.load_in_4bit:
            model = peft.prepare_model_for_kbit_training(model)
        collator = transformers.DataCollatorWithPadding(tokenizer)
        model = peft.get_peft_model(model, config)
        trainer = transformers.Trainer(model, settings, data_collator=collator, **common)
        # A classifier's loss is the mean of its own batch. Trainer takes its **kwargs for a sign
        # that it divides by the accumulated batch itself, and would sum the means.
        trainer.model_accepts_loss_kwargs = False
    else:
        import trl

        trainer = trl.SFTTrainer(model, args=settings, peft_config=config, **common)
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
    steps = math.ceil(num_rows / batch) * settings.num_train_epochs
    steps = settings.max_steps if settings.max_steps > 0 else math.ceil(steps)
    if settings.warmup_steps >= steps:
        print(
            f"warning: --warmup_steps {settings.warmup_steps:.0f} of {steps} steps: the learning "
            "rate is never reached. --warmup_steps 0.1 is a tenth of the steps.",
            flush=True,
        )


def add_push_callback(trainer: Any, store: Store, contract: dict[str, Any], keep: int) -> None:
    """Push every checkpoint as soon as it is saved, before the next step."""
    from transformers import TrainerCallback

    class PushCheckpoint(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                push_checkpoint(store, contract, state, keep)

    trainer.add_callback(PushCheckpoint())


def record_base(folder: Path, contract: dict[str, Any]) -> None:
    """Name the base in a saved adapter as the contract does: of a local one only the last part.

    It is done after saving, because PEFT looks the base up by this name while it saves.
    """
    file = folder / "adapter_config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, saved | {"base_model_name_or_path": contract["base_model"]["repo"]})


def push_checkpoint(store: Store, contract: dict[str, Any], state: Any, keep: int) -> None:
    """One commit: checkpoint-N/, the contract at this step, and the removal of older checkpoints.

    A failed push is printed and the training goes on; the next checkpoint is pushed whole.
    """
    from httpx2 import HTTPError

    name = f"checkpoint-{state.global_step}"
    best = Path(state.best_model_checkpoint or "").name
    file = store.folder / name / "trainer_state.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    write_state(file, saved | {"best_model_checkpoint": best or None})
    record_base(store.folder / name, contract)
    contract["training"] |= {"step": state.global_step, "epoch": round(state.epoch, 4)}
    write_json(store.folder / CONTRACT, contract)
    if store.repo is None:
        return
    try:
        there = [f"checkpoint-{step}" for step in store.checkpoints() if step != state.global_step]
        # The best one is missing there when its own push failed.
        missing = {best} - {*there, name, ""}
        files = [
            f"{checkpoint}/{path.name}"
            for checkpoint in sorted({name} | missing)
            for path in sorted((store.folder / checkpoint).iterdir())
            if path.name not in UNPUSHED
        ]
        stale = [checkpoint for checkpoint in there[keep - 1 :] if checkpoint != best]
        commit_hash = store.push([CONTRACT, *files], f"Save {name}", delete=stale)
        print(f"{name} is on the Hub: {store.repo}@{commit_hash[:8]}", flush=True)
    except (HTTPError, OSError, RuntimeError) as error:
        print(f"{name} is NOT on the Hub: {error}", flush=True)


def start_wandb(args: argparse.Namespace, contract: dict[str, Any]) -> None:
    """Let a resumed run continue its W&B run; without a key W&B writes offline."""
    if "wandb" not in args.report_to:
        return
    os.environ.setdefault("WANDB_PROJECT", "hate-speech-detector")
    os.environ.setdefault("WANDB_RUN_ID", contract["training"]["wandb_run_id"])
    os.environ.setdefault("WANDB_RESUME", "allow")
    if not os.environ.get("WANDB_API_KEY"):
        os.environ.setdefault("WANDB_MODE", "offline")
        if os.environ.get("JOB_ID"):
            print("no WANDB_API_KEY: the W&B log is offline and ends with this Job", flush=True)


def finish(store: Store, trainer: Any, tokenizer: Any, contract: dict[str, Any]) -> None:
    """Push adapter, tokenizer, contract and card to the root in one commit; say where."""
    final = store.folder / "final"
    trainer.save_model(str(final))
    tokenizer.save_pretrained(final)
    record_base(final, contract)
    state = trainer.state
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
    for name in names:
        (final / name).replace(store.folder / name)
    final.rmdir()
    with hub_errors(f"push the adapter to {store.name}; it is still in {store.folder}"):
        commit_hash = store.push(names, f"Finish at step {state.global_step}")
    where = f"{store.repo}@{commit_hash[:8]}" if store.repo else str(store.folder)
    adapter = store.repo or store.folder.resolve()
    print(f"adapter: {where} (step {state.global_step}, epoch {state.epoch:.2f})", flush=True)
    data = "" if "repo" in contract["dataset"] else " --test_file POSTS.jsonl"
    print(f"next: uv run eval/eval.py --adapter {adapter}{data}", flush=True)


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
# Hate-speech detector: LoRA adapter for {base}

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
            arguments[name] = list_of_words(value) if isinstance(value, list) else value
            origins[name] = origin
    for name, origin in origins.items():
        if arguments[name] != parser.get_default(name):
            print(f"{name} = {arguments[name]} ({origin})", flush=True)
    return argparse.Namespace(**arguments)


def list_of_words(values: list[Any]) -> list[Any]:
    """Split list values at commas and spaces: `q_proj,v_proj` is `q_proj v_proj`."""
    words: list[Any] = []
    for value in values:
        words += re.split(r"[,\s]+", value.strip(", ")) if isinstance(value, str) else [value]
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
        from huggingface_hub import snapshot_download

        with hub_errors(f"download {', '.join(patterns)} of {self.name}"):
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
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalTokenNotFoundError:
        fail(f"cannot {action}: there is no Hub token. Set HF_TOKEN or run `hf auth login`.")
    except errors.GatedRepoError as error:
        fail(f"cannot {action}: it is gated. Accept its terms on its page. ({error})")
    except errors.RepositoryNotFoundError:
        fail(
            f"cannot {action}: no such repo, or it is private and this token may not see it. "
            "Check the id (user/name) and HF_TOKEN."
        )
    except errors.RevisionNotFoundError:
        fail(f"cannot {action}: the repo has no such revision. Give a branch, tag or commit hash.")
    except (errors.EntryNotFoundError, errors.HFValidationError) as error:
        fail(f"cannot {action}: {error}")
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            fail(f"cannot {action}: the Hub does not accept this token. Run `hf auth login` again.")
        if status == 403:
            fail(
                f"cannot {action}: this token may not. It needs write access to the repo's "
                "namespace: make one of role `write` in the Hub's settings."
            )
        fail(f"cannot {action}: the Hub answered {status}. {str(error).splitlines()[0]}", code=1)
    except (HTTPError, OSError) as error:
        # transformers wraps a gated repo's refusal into an OSError.
        gated = "gated repo" in str(error)
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
        except (HTTPError, OSError) as error:
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
        fail(f"{CONTRACT} of {repo.name} is damaged ({error}). Run its stage again.")
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
    missing = {"id", "text", "label", "target_groups"} - set(table.column_names)
    if missing:
        fail(
            f"{repo.name} ({config}/{split}) lacks the columns {', '.join(sorted(missing))}. "
            f"It has: {', '.join(table.column_names)}."
        )
    if not len(table):
        fail(f"{repo.name} ({config}/{split}) is empty.")
    rows = table.to_pylist()
    if isinstance(features["label"], ClassLabel):
        for row in rows:
            row["label"] = features["label"].int2str(row["label"])
    return rows


def read_jsonl(path: str, labels: list[str]) -> list[dict[str, Any]]:
    """Read a local JSONL file of posts (`text`, `label`, optional `id`, `target_groups`).

    A label is a name of `labels` or its index. Rows with `messages` are returned as they stand.
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
            fail(
                f"{path} line {number} is not JSON: {error}. Each line is to be an object with "
                "`text` and `label`, or with `messages`."
            )
        check_line(row, f"{path} line {number}")
        if "messages" not in row:
            names = {str(index): name for index, name in enumerate(labels)}
            row["label"] = names.get(str(row["label"]), row["label"])
        groups = row.get("target_groups") or []
        row["target_groups"] = [groups] if isinstance(groups, str) else groups
        row.setdefault("id", f"{file.stem}-{number}")
        rows.append(row)
    if not rows:
        fail(f"{path} is empty.")
    return rows


def check_line(row: Any, origin: str) -> None:
    """End on a row of a JSONL file that has neither a post with a label nor messages."""
    if not isinstance(row, dict) or not ("messages" in row or {"text", "label"} <= set(row)):
        fail(f"{origin} needs `text` and `label`, or `messages`.")
    messages = row.get("messages", [{"role": "user", "content": row.get("text")}])
    valid = isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not valid:
        fail(f"{origin}: a `text`, and each message's `role` and `content`, must be a string.")
    if "messages" in row and [message["role"] for message in messages][-2:] != [
        "user",
        "assistant",
    ]:
        fail(f"{origin}: `messages` must end with one of the user and the assistant's answer.")
    groups = row.get("target_groups") or []
    if not isinstance(groups, (str, list)) or not all(isinstance(group, str) for group in groups):
        fail(f"{origin}: `target_groups` must be a list of names.")


def check_labels(rows: list[dict[str, Any]], labels: list[str], origin: str) -> None:
    """End on a label that the contract does not name."""
    unknown = sorted({str(row["label"]) for row in rows if row.get("label") not in labels})
    if unknown:
        fail(f"{origin} has unknown labels {unknown[:5]}. The labels are: {', '.join(labels)}.")


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
        text = render([{"role": "user", "content": joined}, messages[-1]])
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


def prompt_messages(strategy: dict[str, str], text: str) -> list[dict[str, str]]:
    """The messages that ask about one post: the strategy's system and user templates, filled."""
    messages = [{"role": "user", "content": strategy["user"].replace("{text}", text)}]
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

    MXFP4 (gpt-oss) and FP8 (Ministral) checkpoints are dequantised, because neither can be
    trained or merged as stored.
    """
    import transformers

    stored = (getattr(config, "quantization_config", None) or {}).get("quant_method")
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
            fail(f"{base.name} cannot be loaded for the task {task}: {error}")
    transformers.logging.set_verbosity_warning()
    body = f"{model.base_model_prefix}."
    lost = [
        name
        for name in report["missing_keys"]
        if task == "causal" or (name.startswith(body) and ".pooler." not in name)
    ]
    if lost:
        fail(f"{base.name} lacks {len(lost)} of its weights, for example {sorted(lost)[0]}.")
    return model


if __name__ == "__main__":
    main()
