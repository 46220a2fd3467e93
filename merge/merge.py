# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate==1.15.0",
#     "huggingface-hub==2.4.0",
#     "jinja2==3.1.6",
#     "peft==0.21.2",
#     "pyyaml==6.0.3",
#     "torch==2.13.0",
#     "transformers==5.23.0",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-20T00:00:00Z"
#
# [tool.hf-jobs]
# flavor = "cpu-upgrade"
# timeout = "2h"
# name = "hsd-merge"
# secrets = ["HF_TOKEN"]
# ///
"""Merge a LoRA adapter into its base model and prove that the merged model scores the same.

Reads:  the adapter repo (contract.json, adapter) and its base model at the recorded commit.
Writes: HUB_MODEL_ID (private, default {you}/hsd-merged) or --output_dir: model, tokenizer,
        contract.json with the measured difference, model card.

    hf jobs uv run merge/merge.py --adapter user/hsd-lora

The merged model is saved, loaded again and compared with base plus adapter on probe posts; where
the scores differ nothing is pushed. Running it again merges again and replaces the files.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

SCRIPT = "merge/merge.py"
SCHEMA = 1
CONTRACT = "contract.json"
# Variables with these names are read as they stand; every other flag is HSD_<FLAG>, because an
# unprefixed SEED or TASK in somebody's shell must not change an audited run.
PLAIN_VARIABLES = ("DATASET_REPO", "HUB_MODEL_ID", "MAX_STEPS")
# What a run shows its tokenizer and template to prove that they are those of another run.
PROBE_POST = "My neighbours moved in last week, said <|endoftext|> nobody. 42 % é \u4f60\u597d"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# Mild sentences in the shapes the detector meets; {group} runs through the contract's groups.
PROBE_POSTS = [
    "I met some {group} people at the market today.",
    "People keep saying that {group} neighbours ruin this town, and I am tired of hearing it.",
    "Nobody should have to share a street with {group} people!!!",
    "@user #news what do {group} families think about the new law? 🤔",
]
# Largest difference of a label's probability that rounding explains. In float32 a merge moves
# logits by 1e-6; in bfloat16 the sum of base and update is rounded to eight bits, which moved
# logits by 0.02 on tiny models.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; every default is what a contract or the token can say."""
    parser = Parser(prog=SCRIPT, description=__doc__)
    switch = {"type": boolean, "nargs": "?", "const": True, "default": False}
    flag = parser.add_argument
    flag("--adapter", help="adapter repo, Hub id[@revision] or folder ({you}/hsd-lora)")
    flag("--model_name_or_path", help="the base, where the contract names only a local folder")
    flag("--hub_model_id", help="repo of the merged model ({you}/hsd-merged)")
    flag("--output_dir", help="folder; without --hub_model_id nothing is pushed")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    flag("--config_file", help="JSON or YAML file of these flags")
    flag("--allow_public", **switch, help="push to a repo that is public")
    flag("--allow_cpu", **switch, help="merge a model of more than 2B parameters without a GPU")
    return resolve_arguments(parser, argv)


def main(argv: list[str] | None = None) -> None:
    quiet_libraries()
    args = parse_args(argv)
    target = fill_defaults(args)
    adapter, trained = open_adapter(args.adapter)
    base = open_trained_base(args, trained)
    config = read_base_config(base)
    command = f"hf jobs uv run --flavor a100-large merge/merge.py --adapter {args.adapter}"
    device = check_device(count_parameters(config), args.allow_cpu, command)
    tokenizer = load_tokenizer(adapter)
    posts = encode_probes(tokenizer, trained)
    if args.hub_model_id:
        prepare_repo(args.hub_model_id, "model", "merged", args.allow_public)
        check_target(args.hub_model_id, adapter)
    dtype = pick_dtype(args.dtype, config)
    with TemporaryDirectory(dir=target and target.parent, prefix="merged-") as scratch:
        folder = Path(scratch) / "model"
        difference = merge(adapter, base, config, trained, tokenizer, posts, dtype, device, folder)
        write_record(args, adapter, base, trained, difference, dtype, folder)
        publish_model(args, folder, target)


def fill_defaults(args: argparse.Namespace) -> Path | None:
    """Fill in the repos that no flag names; return the local target folder."""
    if not args.adapter:
        args.adapter = f"{own_namespace()}/hsd-lora"
    if args.hub_model_id and is_folder(args.hub_model_id):
        fail(f"--hub_model_id {args.hub_model_id} is a folder; say --output_dir instead.")
    if not args.output_dir and not args.hub_model_id:
        args.hub_model_id = f"{own_namespace()}/hsd-merged"
    if args.hub_model_id and args.hub_model_id == args.adapter.partition("@")[0]:
        fail("--hub_model_id is the adapter's own repo; name another one for the merged model.")
    if not args.output_dir:
        return None
    target = Path(args.output_dir).expanduser().resolve()
    earlier = target / CONTRACT
    if earlier.is_file():
        # The folder is replaced as a whole, so it must be an earlier merge and nothing else.
        read_contract(Repo(args.output_dir, "model", None, target), "merged")
    elif target.exists() and any(target.iterdir()):
        fail(f"--output_dir {args.output_dir} holds files of something else; give an empty folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def check_target(name: str, adapter: Repo) -> None:
    """End where the target holds the merge of another adapter: it would be replaced."""
    from huggingface_hub import HfApi

    with hub_errors(f"list the files of {name}"):
        if CONTRACT not in HfApi().list_repo_files(name):
            return
    [merged, *_] = read_contract(open_repo(name, "model"), "merged")["inputs"]
    if merged["repo"] != adapter.as_input()["repo"]:
        fail(f"{name} holds {merged['repo']} merged; name another --hub_model_id for this adapter.")


def encode_probes(tokenizer: Any, trained: dict[str, Any]) -> list[list[int]]:
    """Token ids of the probe posts, after proof that prompts are rendered as in training."""
    rendering, prompt = trained["rendering"], trained["prompt"]
    scaffold = trained_scaffold(tokenizer, trained)
    found = probe_ids(tokenizer, scaffold, prompt)
    check_probe(tokenizer, found, rendering["probe_ids"], "the adapter")
    groups = trained["groups"] or ["new"]
    texts = [post.format(group=group) for group in groups for post in PROBE_POSTS]
    if scaffold is None:
        return [encode_post(tokenizer, text, rendering["max_length"])[0] for text in texts]
    return [
        encode_contents(
            tokenizer, scaffold, [message["content"] for message in prompt_messages(prompt, text)]
        )
        for text in texts
    ]


def pick_dtype(name: str, config: Any) -> str:
    """The dtype to merge and save in: the base's own, so that its weights stay what they are."""
    if name != "auto":
        return name
    stored = str(config.dtype or "float32").removeprefix("torch.")
    return "float32" if stored == "float32" else "bfloat16"


def merge(
    adapter: Repo,
    base: Repo,
    config: Any,
    trained: dict[str, Any],
    tokenizer: Any,
    posts: list[list[int]],
    dtype: str,
    device: str,
    folder: Path,
) -> dict[str, float]:
    """Save the merged model to `folder`; return how far its scores are from the adapter's."""
    import torch

    kind = getattr(torch, dtype)
    model = load_base(base, config, trained["task"], trained["labels"], kind, device)
    # A decoder with a classification head finds a row's last token by this id.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model = load_adapter(model, adapter, base)
    expected = label_probabilities(model, trained, posts, tokenizer.pad_token_id)
    with model.disable_adapter():
        plain = label_probabilities(model, trained, posts, tokenizer.pad_token_id)
    merged = model.merge_and_unload()
    # A dequantised model must be saved as what it now is: in its original format the weights
    # would carry names that load as freshly drawn ones.
    dequantised = bool(getattr(config, "quantization_config", None))
    merged.save_pretrained(folder, **({"save_original_format": False} if dequantised else {}))
    tokenizer.save_pretrained(folder)
    del model, merged
    saved = Repo(folder.name, "model", None, folder)
    reloaded = load_base(
        saved, read_base_config(saved), trained["task"], trained["labels"], kind, device
    ).eval()
    found = label_probabilities(reloaded, trained, posts, tokenizer.pad_token_id)
    return compare_scores(expected, found, plain, dtype)


def label_probabilities(
    model: Any, trained: dict[str, Any], posts: list[list[int]], pad: int
) -> list[list[float]]:
    """Probability of each label for each probe post, shape posts x labels."""
    if trained["task"] == "classify":
        scores = score_classes(model, posts, pad, 4096)
    else:
        completions = trained["rendering"]["label_completions"]
        branches = [completions[label] for label in trained["labels"]]
        scores = score_completions(model, posts, branches, pad, 4096)
    rows = []
    for row in scores:
        weights = [math.exp(score - max(row)) for score in row]
        rows.append([weight / sum(weights) for weight in weights])
    return rows


def compare_scores(
    expected: list[list[float]], found: list[list[float]], plain: list[list[float]], dtype: str
) -> dict[str, float]:
    """End where the merged model scores otherwise than the adapter; else return the differences."""

    def largest(one: list[list[float]], other: list[list[float]]) -> float:
        pairs = zip(one, other, strict=True)
        return max(abs(a - b) for row, line in pairs for a, b in zip(row, line, strict=True))

    difference, effect = largest(expected, found), largest(expected, plain)
    print(
        f"largest difference of a label's probability on {len(expected)} probe posts: merged "
        f"against adapter {difference:.2e}, adapter against base {effect:.2e}",
        flush=True,
    )
    # A merge that lost the adapter differs by the adapter's whole effect.
    if not difference <= min(TOLERANCE[dtype], effect / 2):
        fail(
            f"the merged model's scores differ from the adapter's by {difference:.2e}: more than "
            f"{TOLERANCE[dtype]:.0e} ({dtype}), or than half of what the adapter changes; nothing "
            "is published. Try --dtype float32.",
            code=1,
        )
    return {"merged_against_adapter": difference, "adapter_against_base": effect}


def write_record(
    args: argparse.Namespace,
    adapter: Repo,
    base: Repo,
    trained: dict[str, Any],
    difference: dict[str, float],
    dtype: str,
    folder: Path,
) -> None:
    """Write contract.json and the model card beside the merged weights."""
    inherited = ("task", "labels", "positive_label", "groups", "prompt", "rendering")
    record = stage_record("merged", SCRIPT, args, [adapter, base])
    record |= {key: trained[key] for key in inherited}
    record |= {"dtype": dtype, "largest_probability_difference": difference}
    write_json(folder / CONTRACT, record)
    source = adapter.as_input()
    (folder / "README.md").write_text(
        f"""---
library_name: transformers
tags: ["hate-speech-detection"]
---
# Hate-speech detector: {source["repo"]} merged into {trained["base_model"]["repo"]}

One standalone model in {dtype}. Labels: {", ".join(trained["labels"])}. On probe posts its label
probabilities are within {difference["merged_against_adapter"]:.1e} of the adapter's. A research
detector, not for unattended removal of posts; the adapter's repo holds its evaluation.

* Adapter: {source["repo"]} at {source["revision"] or "a local folder"}
* `contract.json` holds the rendered prompt, the label completions and every commit.
""",
        encoding="utf-8",
    )


def publish_model(args: argparse.Namespace, folder: Path, target: Path | None) -> None:
    """Push the folder in one commit, or move it to where --output_dir says."""
    if args.hub_model_id:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path)
            for path in sorted(folder.iterdir())
        ]
        with hub_errors(f"push the merged model to {args.hub_model_id}"):
            # Weights of an earlier merge in other shards would be loaded beside these.
            stale = set(HfApi().list_repo_files(args.hub_model_id)) - {".gitattributes"}
            stale -= {path.name for path in folder.iterdir()}
            operations += [CommitOperationDelete(path_in_repo=name) for name in sorted(stale)]
            commit_hash = commit(
                args.hub_model_id, "model", operations, f"Merge {args.adapter} into its base"
            )
        print(f"merged model: {args.hub_model_id}@{commit_hash[:8]}", flush=True)
    if target:
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
        print(f"merged model: {target}", flush=True)


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


def token_batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Yield lists of row indices, longest rows first, of at most `budget` padded tokens each."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def score_completions(
    model: Any, prompts: list[list[int]], completions: list[list[int]], pad: int, budget: int
) -> list[list[float]]:
    """Log-likelihood (nats) of each label's completion after each prompt, shape posts x labels.

    What all completions begin with is part of the prompt: it is the same for every label and
    cancels in the softmax over labels. Where they then differ in one token each, a post costs one
    row, else one row per label. Rows are padded on the left, so the logits that count stand last.
    """
    import torch

    shared = common_prefix(completions)
    tails = [completion[len(shared) :] for completion in completions]
    branches = [[]] if all(len(tail) == 1 for tail in tails) else [tail[:-1] for tail in tails]
    rows = [prompt + shared + branch for prompt in prompts for branch in branches]
    keep = max(len(branch) for branch in branches) + 1
    scores = [[0.0] * len(tails) for _ in prompts]
    for batch in token_batches([len(row) for row in rows], budget):
        width = len(rows[batch[0]])
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for line, index in enumerate(batch):
            ids[line, width - len(rows[index]) :] = torch.tensor(rows[index])
            mask[line, width - len(rows[index]) :] = 1
        with torch.inference_mode():
            logits = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(model.device),
                use_cache=False,
                logits_to_keep=keep,
            ).logits
        likelihood = torch.log_softmax(logits[:, -keep:].float(), dim=-1).cpu()
        for line, index in enumerate(batch):
            post, branch = divmod(index, len(branches))
            for label in range(len(tails)) if len(branches) == 1 else [branch]:
                tail = tails[label]
                last = likelihood[line, -len(tail) :]
                scores[post][label] = sum(last[n, token].item() for n, token in enumerate(tail))
    return scores


def score_classes(model: Any, encoded: list[list[int]], pad: int, budget: int) -> list[list[float]]:
    """Logits of a sequence classifier, shape posts x labels, in the order of `encoded`."""
    import torch

    scores: list[list[float]] = [[] for _ in encoded]
    for batch in token_batches([len(row) for row in encoded], budget):
        width = len(encoded[batch[0]])
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for line, index in enumerate(batch):
            ids[line, : len(encoded[index])] = torch.tensor(encoded[index])
            mask[line, : len(encoded[index])] = 1
        with torch.inference_mode():
            logits = model(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device)
            ).logits
        for line, index in enumerate(batch):
            scores[index] = logits[line].float().tolist()
    return scores


def open_adapter(argument: str) -> tuple[Repo, dict[str, Any]]:
    """Open an adapter repo and read its contract, after a look that its files are there."""
    adapter = open_repo(argument, "model")
    contract = read_contract(adapter, "adapter")
    files = adapter.fetch("adapter_config.json", "adapter_model.safetensors")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (files / name).is_file():
            fail(
                f"{adapter.name} holds no {name}: its training is {contract['training']['state']} "
                f"at step {contract['training']['step']}. Finish it first."
            )
    return adapter, contract


def open_trained_base(args: argparse.Namespace, contract: dict[str, Any]) -> Repo:
    """The base model at the commit the adapter was trained on."""
    base = contract["base_model"]
    if args.model_name_or_path:
        print(f"base model {args.model_name_or_path} overrides {base['repo']} of the contract")
        return open_repo(args.model_name_or_path, "model")
    if base["revision"] is None:
        fail(
            f"the adapter was trained on the local folder {base['repo']!r}: say where that base "
            "model is with --model_name_or_path."
        )
    print(f"base model {base['repo']} at {base['revision']} (from the contract)", flush=True)
    return open_repo(f"{base['repo']}@{base['revision']}", "model")


def load_adapter(model: Any, adapter: Repo, base: Repo) -> Any:
    """Put the adapter on its base; end where its files are damaged or do not fit."""
    import peft
    from safetensors import SafetensorError

    folder = adapter.fetch("adapter_config.json", "adapter_model.safetensors")
    with hub_errors(f"load the adapter {adapter.name}"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            loaded = peft.PeftModel.from_pretrained(model, folder).eval()
        except (SafetensorError, UserWarning, RuntimeError, ValueError) as error:
            fail(f"the adapter {adapter.name} does not fit the base {base.name}: {error}")
    whole = (name for name in loaded.state_dict() if ".modules_to_save." in name)
    brought = {name.replace(".modules_to_save.default", "") for name in whole}
    lacking = [name for name in model.drawn if f"base_model.model.{name}" not in brought]
    if lacking:
        fail(
            f"neither the base {base.name} nor the adapter {adapter.name} holds {lacking[0]}: it "
            "would be drawn at random, and the scores with it. Train the adapter anew."
        )
    return loaded


def trained_scaffold(tokenizer: Any, contract: dict[str, Any]) -> Scaffold | None:
    """The scaffold of the adapter's prompt, rendered anew with its date; None for a classifier."""
    rendering = contract["rendering"]
    if contract["prompt"] is None:
        return None
    roles = rendering["roles"][:-1]
    return build_scaffold(tokenizer, roles, rendering["date"], rendering["reasoning_effort"])


if __name__ == "__main__":
    main()
