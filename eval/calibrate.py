# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "huggingface-hub==2.4.0",
#     "pyarrow==26.0.1",
#     "pyyaml==6.0.3",
#     "scipy==1.17.1",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-20T00:00:00Z"
#
# [tool.hf-jobs]
# flavor = "cpu-upgrade"
# timeout = "30m"
# name = "hsd-calibrate"
# secrets = ["HF_TOKEN"]
# ///
"""Fit temperature and cut-offs of an adapter, and store them as a named profile.

Reads:  two finished evaluations of the adapter (default {you}/hsd-lora): eval/validation, whose
        posts that early stopping did not use are fitted on, and eval/test, which is reported.
Writes: decisions.json of the adapter repo, and nothing else there; --output_dir: calibration.json,
        calibration.md, reliability.csv and thresholds.csv.

    uv run eval/eval.py --adapter user/hsd-lora --split validation
    uv run eval/calibrate.py --adapter user/hsd-lora --profile strict --objective 'fpr<=0.1'
    uv run eval/calibrate.py --adapter user/hsd-lora --list

A profile has three cut-offs of the calibrated probability, review <= threshold <= act. `threshold`
is the objective's and parts positive from negative where there are only two outcomes. Where people
can look, posts below `review` are allowed, those from `act` on acted on, the rest goes to a person.
No model is loaded: profiles change in seconds, and contract and weights stay as they were audited.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import difflib
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

SCRIPT = "eval/calibrate.py"
SCHEMA = 1
CONTRACT = "contract.json"
# Variables with these names are read as they stand; every other flag is HSD_<FLAG>, because an
# unprefixed SEED or TASK in somebody's shell must not change an audited run.
PLAIN_VARIABLES = ("DATASET_REPO", "HUB_MODEL_ID", "MAX_STEPS")
# The row of the posts that are aimed at no group.
NO_TARGET = "no_target"
# The last four are the wide forms, which some spreadsheets also read.
FORMULA_SIGNS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
FPR_TARGET = re.compile(r"fpr<=(0?\.\d+)")
# Outside of these a temperature says that the scores part the posts wholly, or not at all.
TEMPERATURES = (0.05, 20.0)
# What least FPR gap may cost in balanced accuracy.
GAP_PRICE = 0.01
PHASES = ("before", "after")
MEASURED = ("balanced_accuracy", "precision", "false_positive_rate", "false_negative_rate", "ece")
USED_POSTS = (
    "Fitted on posts that early stopping had used (--allow_used_posts): cut-offs and figures of "
    "the fit are too good by an unknown amount."
)
GROUP_CUTS_REASON = (
    "Shown for what equal false-positive rates would cost; never used. Which group a live post is "
    "aimed at is not known to the model when it decides; treating people by their group is often "
    "unlawful; and a group's own cut-off rests on few posts, so much of it is noise."
)
GROUP_CUTS_METHOD = (
    "Each group with enough posts of both labels gets the cut-off whose false-positive rate on its "
    "fit posts is nearest to the one that the profile's threshold has on the posts of all these "
    "groups. A post of several gets the highest of their cut-offs, one of none the threshold."
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    switch: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True, "default": False}
    parser = Parser(prog=SCRIPT, description=__doc__)
    flag = parser.add_argument_group("profile").add_argument
    flag("--adapter", help="Hub id or folder ({you}/hsd-lora)")
    flag("--profile", default="default", help="name to store it under")
    flag("--objective", default="f1", help="of the threshold: f1, 'fpr<=0.1' or fpr_gap")
    flag("--review_fnr", type=float, default=0.05, help="most positive posts allowed unseen, share")
    flag("--act_precision", type=float, default=0.9, help="least precision of acting by itself")
    flag("--strict", **switch, help="bounds hold at the bad end of their 95%% interval")
    flag("--list", **switch, help="show the profiles there are")
    flag("--remove", metavar="NAME", help="remove a profile")
    flag = parser.add_argument_group("posts").add_argument
    flag("--fit_eval", default="validation", help="evaluation below eval/ to fit on")
    flag("--apply_eval", default="test", help="evaluation below eval/ to report on")
    flag("--fit_file", help="predictions to fit on: .csv, .jsonl, .parquet, or REPO/EVALUATION")
    flag("--apply_file", help="predictions to report on")
    flag("--allow_used_posts", **switch, help="fit on posts that early stopping used; is recorded")
    flag("--label_map", type=json_mapping, help='JSON, of files: {"theirs": "hate"}')
    flag("--strategy", help="of files with several: the one to take")
    for key in COLUMNS:
        flag(f"--{key}_column", help=argparse.SUPPRESS if key == "text" else f"{key}, of files")
    flag = parser.add_argument_group("output").add_argument
    flag("--output_dir", default="./hsd-calibrate")
    flag("--dry_run", **switch, help="fit and show, store no profile")
    flag("--allow_public", **switch, help="push to a public repo")
    flag("--seed", type=int, default=42, help="of the intervals")
    flag("--config_file", help="JSON or YAML file of these flags")
    args = resolve_arguments(parser, argv)
    target = FPR_TARGET.fullmatch(args.objective.replace(" ", ""))
    args.objective = args.objective.replace(" ", "")
    if args.objective not in ("f1", "fpr_gap") and not (target and float(target[1]) > 0):
        fail(f"--objective {args.objective!r} is none of f1, fpr_gap and 'fpr<=0.1' (0 to 1).")
    for name in ("review_fnr", "act_precision"):
        if not 0 <= vars(args)[name] <= 1:
            fail(f"--{name} {vars(args)[name]} is no share from 0 to 1.")
    for name in (args.profile, args.remove):
        if name is not None and not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
            fail(f"profile {name!r}: use letters, digits, dots, dashes, underscores.")
    return args


def main(argv: list[str] | None = None) -> None:
    quiet_libraries()
    args = parse_args(argv)
    adapter = open_repo(args.adapter or f"{own_namespace()}/hsd-lora", "model")
    contract = read_contract(adapter, "adapter")
    if args.list:
        list_profiles(adapter, read_decisions(adapter)["profiles"])
        return
    check_storing(args, adapter)
    if args.remove:
        remove_profile(args, adapter)
        return
    check_adapter(adapter, contract)
    fit = read_scored(args, adapter, contract, "fit")
    reported = read_scored(args, adapter, contract, "apply")
    weights = check_same_model(adapter, contract, fit, reported)
    fit, account = choose_fit_posts(args, contract, fit)
    check_fit_posts(fit, reported)
    fitted = fit_profile(args, fit)
    profile = build_profile(args, adapter, contract, fit, reported, fitted, account, weights)
    tables = build_tables(profile)
    for title, rows in tables:
        print("\n".join(["", title, *text_table(rows)]), flush=True)
    for remark in remarks(profile):
        print(f"\n{remark}")
    write_results(args, profile, tables, fit, reported)
    if args.dry_run:
        print("--dry_run: no profile is stored", flush=True)
    else:
        store_profile(args, adapter, profile)


# --- posts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Labelled posts with p of the positive label.

    `truth` (n,) says which are positive, `scores` (n,) is p as the evaluation gave it, `members`
    are masks (n,) of each group's posts. `record` is the evaluation's contract or empty.
    """

    name: str
    positive: str
    negative: str
    ids: list[str]
    truth: Any
    scores: Any
    members: dict[str, Any]
    record: dict[str, Any]

    def part(self, chosen: Any) -> Scored:
        """Some of the posts, by a mask (n,)."""
        return Scored(
            self.name,
            self.positive,
            self.negative,
            [name for name, keep in zip(self.ids, chosen, strict=True) if keep],
            self.truth[chosen],
            self.scores[chosen],
            {group: posts[chosen] for group, posts in self.members.items()},
            self.record,
        )

    @property
    def places(self) -> dict[str, Any]:
        """Masks (n,) of all posts and of each group's."""
        return {"overall": self.truth | True, **self.members}


def check_adapter(adapter: Repo, contract: dict[str, Any]) -> None:
    """End where the adapter's labels or state allow no profile."""
    missing = [
        key for key in ("labels", "positive_label", "groups", "training") if key not in contract
    ]
    if missing:
        fail(f"{CONTRACT} of {adapter.name} lacks {', '.join(missing)}. Run its stage again.")
    labels = contract["labels"]
    if len(labels) != 2:
        fail(
            f"{adapter.name} has {len(labels)} labels ({', '.join(map(visible, labels))}). One "
            "temperature and cut-offs of one probability are for two; there is no profile for more."
        )


def read_scored(
    args: argparse.Namespace, adapter: Repo, contract: dict[str, Any], use: str
) -> Scored:
    """The posts of an evaluation or file, `use` being fit or apply, with their scores."""
    import numpy as np

    file, name = vars(args)[f"{use}_file"], vars(args)[f"{use}_eval"]
    place = file or (str(adapter.folder or f"{adapter.name}@{adapter.revision}"))
    if not file:
        check_evaluation(adapter, name, use)
    options = {key: vars(args)[f"{key}_column"] for key in COLUMNS}
    options |= {"labels": contract["labels"], "positive": contract["positive_label"]}
    options |= {"label_map": args.label_map, "threshold": 0.5}
    runs = read_runs(place, name, options)
    runs = [run for run in runs if args.strategy in (None, run.name)] or fail(
        f"{place} has no strategy {args.strategy!r}. There are: "
        f"{', '.join(visible(run.name) for run in runs)}."
    )
    if len(runs) > 1:
        found = ", ".join(visible(run.name) for run in runs)
        fail(f"{place} holds several strategies ({found}): take one with --strategy.")
    [run] = runs
    shown_name = Path(file).name if file else name
    if run.scores is None:
        fail(f"{shown_name} has posts without a probability; a profile is fitted to probabilities.")
    if run.ids == [str(number_) for number_ in range(1, len(run.ids) + 1)]:
        fail(
            f"{shown_name} has no ids but row numbers, so nothing can prove that no post is both "
            "fitted and reported. Name the column of ids with --id_column."
        )
    if run.record.get("split") == "train":
        fail(f"{shown_name} is an evaluation of the training posts: give one of other posts.")
    members = group_members(
        [{"target_groups": groups} for groups in run.groups], contract["groups"]
    )
    masks = {group: np.zeros(len(run.ids), dtype=bool) for group in members}
    for group, posts in members.items():
        masks[group][posts] = True
    return Scored(
        shown_name,
        run.positive,
        next(label for label in run.labels if label != run.positive),
        run.ids,
        np.array([label == run.positive for label in run.truth]),
        np.array(run.scores, dtype=np.float64),
        masks,
        run.record,
    )


def check_evaluation(adapter: Repo, name: str, use: str) -> None:
    """End where the adapter lacks the evaluation, with the command that makes it."""
    if adapter.folder:
        there = {file.parent.name for file in adapter.folder.glob(f"eval/*/{CONTRACT}")}
    else:
        from huggingface_hub import HfApi

        with hub_errors(f"list the evaluations of {adapter.name}"):
            files = HfApi().list_repo_files(adapter.name, revision=adapter.revision)
        there = {file.split("/")[1] for file in files if re.fullmatch(r"eval/[^/]+/.+", file)}
    if name not in there:
        flags = f"--split {name}" if name in ("validation", "test") else f"--eval_name {name} ..."
        fail(
            f"{adapter.name} holds no evaluation {name!r} to {use}. There are: "
            f"{', '.join(map(visible, sorted(there))) or 'none'}. Make it: uv run {EVALUATE} "
            f"--adapter {adapter.name} {flags}"
        )


def check_same_model(
    adapter: Repo, contract: dict[str, Any], fit: Scored, reported: Scored
) -> dict[str, Any]:
    """End where the two evaluations are not of one model, the adapter's present one; return it.

    Every report is a commit of the adapter's repo, so the repo's commits differ; training run,
    step and the weights' hash say which weights were scored.
    """
    now = contract["training"]
    keys = ("step", "weights_of_step", "run_sha256")
    current = weights_sha256(adapter)
    known = []
    for side in (fit, reported):
        record = side.record
        if not record:
            print(
                f"{side.name}: a file without contract; nothing proves which weights it is of",
                flush=True,
            )
            continue
        if record.get("stage") != "evaluation" or not record.get("adapter"):
            fail(f"{side.name} is no evaluation of an adapter (stage {record.get('stage')!r}).")
        if record.get("base_only"):
            fail(f"{side.name} is an evaluation of the base model alone (--base_only).")
        if record.get("profile"):
            fail(
                f"{side.name} was decided by a profile, so its probabilities are calibrated "
                "already. Give the evaluation without --profile."
            )
        trained = record.get("training") or {}
        differing = [key for key in keys if trained.get(key) != now.get(key)]
        evaluated = evaluated_weights(adapter, record)
        if differing or evaluated not in (None, current):
            was = ", ".join(f"{key} {trained.get(key)} (now {now.get(key)})" for key in differing)
            fail(
                f"{side.name} is of other weights than {adapter.name} holds now: "
                f"{was or 'another file of weights'}. Evaluate the adapter as it is: uv run "
                f"{EVALUATE} --adapter {adapter.name}"
            )
        known.append(side)
    if len(known) == 2:
        for what, read in (
            ("adapters", lambda record: record["adapter"]["repo"]),
            ("prompts", lambda record: record.get("prompt")),
            ("base models", lambda record: record.get("base_model")),
            ("renderings", lambda record: record.get("rendering")),
            ("modes", lambda record: (record.get("arguments") or {}).get("mode")),
        ):
            one, other = (read(side.record) for side in known)
            if one != other:
                fail(
                    f"{fit.name} and {reported.name} are of different {what}: "
                    f"{visible(str(one), 120)} and {visible(str(other), 120)}. Evaluate both alike."
                )
    return {
        "repo": adapter.as_input()["repo"],
        **{key: now.get(key) for key in keys},
        "sha256": current,
        "proved_for_both_evaluations": len(known) == 2,
    }


def evaluated_weights(adapter: Repo, record: dict[str, Any]) -> str | None:
    """The hash of the weights that an evaluation scored; None where nothing says it any more."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    made = record["adapter"]
    if record.get("weights_sha256"):
        return record["weights_sha256"]
    if adapter.folder or made["repo"] != adapter.name or not made["revision"]:
        return None
    # A squashed history no longer has the commit.
    with (
        hub_errors(f"look at {adapter.name}@{made['revision']}"),
        contextlib.suppress(RevisionNotFoundError),
    ):
        HfApi().repo_info(adapter.name, revision=made["revision"])
        return weights_sha256(Repo(adapter.name, "model", made["revision"]))
    return None


def choose_fit_posts(
    args: argparse.Namespace, contract: dict[str, Any], posts: Scored
) -> tuple[Scored, dict[str, Any]]:
    """The posts that early stopping did not use, and the profile's account of them."""
    import numpy as np

    training, total = contract["training"], len(posts.ids)
    fraction = training.get("calibration_fraction")
    account = {"posts_of_evaluation": total, "calibration_fraction": fraction}
    account["used_by_early_stopping"] = False
    dataset, trained_on = posts.record.get("dataset") or {}, contract.get("dataset") or {}
    account["another_build_than_training"] = (
        dataset.get("repo") is not None
        and dataset.get("repo") == trained_on.get("repo")
        and dataset.get("revision") != trained_on.get("revision")
    )
    if training.get("early_stopping") is False:
        print(f"{posts.name}: early stopping was off, so all {total} posts are free", flush=True)
        return posts, account
    if not fraction:
        if not args.allow_used_posts:
            fail(
                "early stopping of this adapter has used all validation posts, or its contract "
                "does not say which: what is fitted on them looks better than it is. Train again "
                "with train/train.py --calibration_fraction 0.5, which keeps half of them, or say "
                "--allow_used_posts true, which is recorded."
            )
        print(f"warning: {USED_POSTS}", flush=True)
        return posts, account | {"used_by_early_stopping": True}
    # Which post of a tiny split changed sides can be told only from the whole split.
    whole = posts.record and not (posts.record.get("arguments") or {}).get("max_samples")
    held = {name for name in posts.ids if is_held_back(name, fraction)}
    if whole:
        held = held_back_ids(posts.ids, fraction)
    chosen = np.array([name in held for name in posts.ids])
    print(
        f"{posts.name}: {chosen.sum()} of {total} posts were kept from early stopping "
        f"(--calibration_fraction {fraction} of the training); only these are fitted on",
        flush=True,
    )
    if not chosen.any():
        fail(f"{posts.name} has no post that was kept from early stopping: evaluate more posts.")
    return posts.part(chosen), account


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


def check_fit_posts(fit: Scored, reported: Scored) -> None:
    """End where nothing can be fitted, or where what is fitted would also be reported."""
    import numpy as np

    shared = len({*fit.ids} & {*reported.ids})
    if shared:
        fail(
            f"{shared} of {len({*fit.ids})} posts to fit on are also among the {len(reported.ids)} "
            f"posts to report ({fit.name}, {reported.name}). Figures of fitted posts are too good: "
            "give evaluations of different posts."
        )
    positives = int(fit.truth.sum())
    if positives in (0, len(fit.ids)):
        there = fit.positive if positives else fit.negative
        fail(
            f"all {len(fit.ids)} posts of {fit.name} to fit on are {visible(there)}: a cut-off "
            "needs posts of both labels. Evaluate more validation posts."
        )
    if len(np.unique(fit.scores)) == 1:
        fail(
            f"the model gives all {len(fit.ids)} posts of {fit.name} the same probability "
            f"({fit.scores[0]}): no cut-off parts them. Look at the training."
        )
    fewest = min(positives, len(fit.ids) - positives)
    if fewest < MIN_DENOMINATOR:
        print(
            f"warning: only {positives} {visible(fit.positive)} and {len(fit.ids) - positives} "
            f"{visible(fit.negative)} posts to fit on; cut-offs from fewer than {MIN_DENOMINATOR} "
            "of a label are mostly chance",
            flush=True,
        )


# --- fit -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """What is fitted. Cut-offs are on the scale of calibrated p; `reasons` say what is odd."""

    temperature: float
    threshold: float
    review: float
    act: float | None
    reasons: dict[str, str]
    group_cuts: dict[str, float]


def fit_profile(args: argparse.Namespace, fit: Scored) -> Fitted:
    """Temperature first, then cut-offs of calibrated p, all on the same posts."""
    reasons: dict[str, str] = {}
    temperature, reason = fit_temperature(fit.scores, fit.truth)
    if reason:
        reasons["temperature"] = reason
    p = apply_temperature(fit.scores, temperature)
    threshold = choose_threshold(args.objective, args.strict, p, fit.truth, fit.members)
    flagged = p >= threshold
    if flagged.all() or not flagged.any():
        reasons["threshold"] = (
            f"flags {'every' if flagged.all() else 'no'} fit post: best for the objective, and no "
            "use as a detector"
        )
    review, reason = choose_review(args.review_fnr, args.strict, p, fit.truth, threshold)
    if reason:
        reasons["review"] = reason
    act, reason = choose_act(args.act_precision, args.strict, p, fit.truth, threshold)
    if reason:
        reasons["act"] = reason
    enough = groups_with_both(fit)
    cuts = fit_group_cuts(p, fit.truth, fit.members, enough, threshold) if len(enough) > 1 else {}
    if not cuts:
        reasons["per_group_shown"] = (
            f"fewer than two groups have {MIN_DENOMINATOR} posts of each label"
        )
    return Fitted(temperature, threshold, review, act, reasons, cuts)


def fit_temperature(scores: Any, truth: Any) -> tuple[float, str]:
    """The temperature of least log loss, and why it stays 1 where there is none.

    The loss is convex in 1 / temperature, so the bounded search finds the only minimum.
    """
    import numpy as np
    from scipy.optimize import minimize_scalar
    from scipy.special import logit

    edge = np.finfo(np.float64).eps
    logits = np.where(truth, 1, -1) * logit(np.clip(scores, edge, 1 - edge))
    low, high = (math.log(bound) for bound in TEMPERATURES)
    found = minimize_scalar(
        lambda log_t: float(np.logaddexp(0, -logits * math.exp(-log_t)).mean()),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-7},
    )
    if found.x - low < 0.01:
        return 1.0, "stays 1: the scores part the fit posts almost without error"
    if high - found.x < 0.01:
        return 1.0, "stays 1: the scores say nothing of the labels of the fit posts"
    return math.exp(found.x), ""


def candidate_cuts(p: Any) -> Any:
    """Every cut-off that parts these scores otherwise, rising: from all flagged to none.

    Cut-offs lie between neighbouring scores, so that rounding moves no post across.
    """
    import numpy as np

    values = np.unique(p)
    between = (values[:-1] + values[1:]) / 2
    between = np.where(between > values[:-1], between, values[1:])
    last = [(values[-1] + 1) / 2] if (values[-1] + 1) / 2 > values[-1] else []
    return np.concatenate([[0.0], between, last])


def cut_tables(cuts: Any, p: Any, truth: Any) -> Any:
    """Confusion tables (cuts, 2, 2) of flagging p >= cut; true label first, positive second."""
    import numpy as np

    positive, negative = np.sort(p[truth]), np.sort(p[~truth])
    missed = np.searchsorted(positive, cuts, side="left")
    passed = np.searchsorted(negative, cuts, side="left")
    rows = [[passed, len(negative) - passed], [missed, len(positive) - missed]]
    return np.moveaxis(np.array(rows), -1, 0)


def worst_rate(parts: Any, whole: Any, strict: bool, high: bool = True) -> Any:
    """Rates (k,), with `strict` the upper or lower end of their intervals; nan for 0 of 0."""
    import numpy as np

    parts, whole = np.broadcast_arrays(parts, whole)
    if not strict:
        with np.errstate(divide="ignore", invalid="ignore"):
            return parts / whole
    ends = [
        wilson(int(part), int(n))[high] if n else math.nan
        for part, n in zip(parts, whole, strict=True)
    ]
    return np.array(ends)


def choose_threshold(
    objective: str, strict: bool, p: Any, truth: Any, members: dict[str, Any]
) -> float:
    """The cut-off of an objective on these posts; of equally good ones the highest.

    f1: the best F1. fpr<=X: the most recall with a false-positive rate of at most X. fpr_gap: the
    least difference between the groups' false-positive rates, at a balanced accuracy of at most
    `GAP_PRICE` below the best.
    """
    import numpy as np

    cuts = candidate_cuts(p)
    tables = cut_tables(cuts, p, truth)
    figures = count_figures(tables, 1)
    if objective == "f1":
        # Where nothing is flagged and nothing positive there would be no F1; here both labels are.
        return best_cut(cuts, figures["f1"])
    if objective != "fpr_gap":
        most = float(objective.partition("<=")[2])
        rate = worst_rate(tables[:, 0, 1], tables[:, 0].sum(-1), strict)
        allowed = rate <= most + 1e-12
        if not allowed.any():
            fail(
                f"--objective {objective} cannot be met: with {int((~truth).sum())} negative posts "
                f"to fit on the rate is at best {100 * rate.min():.1f} %"
                f"{' at the upper end of its interval' if strict else ''}. Allow more, or fit on "
                "more posts."
            )
        return best_cut(cuts, np.where(allowed, figures["recall"], -1))
    groups = [
        group
        for group, posts in members.items()
        if group != NO_TARGET and (posts & ~truth).sum() >= MIN_DENOMINATOR
    ]
    if len(groups) < 2:
        fail(
            f"--objective fpr_gap compares groups, and {len(groups)} of them have "
            f"{MIN_DENOMINATOR} negative posts to fit on. Take f1, or fit on more posts."
        )
    rates = np.stack(
        [
            count_figures(cut_tables(cuts, p[members[group]], truth[members[group]]), 1)[
                "false_positive_rate"
            ]
            for group in groups
        ]
    )
    gap = rates.max(0) - rates.min(0)
    balanced = figures["balanced_accuracy"]
    near = balanced >= balanced.max() - GAP_PRICE - 1e-12
    least = np.where(near, gap, np.inf)
    return best_cut(cuts, np.where(least <= least.min() + 1e-12, balanced, -1))


def best_cut(cuts: Any, values: Any) -> float:
    """The highest of the cut-offs with the largest value."""
    import numpy as np

    return float(cuts[np.flatnonzero(values >= values.max() - 1e-12)[-1]])


def choose_review(
    most: float, strict: bool, p: Any, truth: Any, threshold: float
) -> tuple[float, str]:
    """The highest cut-off, up to the threshold, that lets at most this share of positives pass.

    A lower one lets fewer pass, so the bound also holds where the threshold is taken.
    """
    cuts = candidate_cuts(p)
    tables = cut_tables(cuts, p, truth)
    rate = worst_rate(tables[:, 1, 0], tables[:, 1].sum(-1), strict)
    allowed = cuts[rate <= most + 1e-12]
    if not len(allowed):
        return 0.0, (
            f"is 0: even without a miss the interval of {int(truth.sum())} positive posts ends at "
            f"{100 * rate.min():.1f} %, so no post is allowed unseen"
        )
    return min(float(allowed[-1]), threshold), ""


def choose_act(
    least: float, strict: bool, p: Any, truth: Any, threshold: float
) -> tuple[float | None, str]:
    """The lowest cut-off from the threshold on with at least this precision; None with a reason.

    Precision over fewer than `MIN_DENOMINATOR` flagged posts is chance.
    """
    cuts = candidate_cuts(p)
    cuts = cuts[cuts >= threshold]
    tables = cut_tables(cuts, p, truth)
    flagged = tables[:, :, 1].sum(-1)
    rate = worst_rate(tables[:, 1, 1], flagged, strict, high=False)
    enough = flagged >= MIN_DENOMINATOR
    if not enough.any():
        return None, f"fewer than {MIN_DENOMINATOR} fit posts lie above the threshold"
    allowed = cuts[enough & (rate >= least - 1e-12)]
    if not len(allowed):
        return None, (
            f"precision {least:g} is not reached on the fit posts: at best "
            f"{rate[enough].max():.3f}{' at the lower end of its interval' if strict else ''}"
        )
    return float(allowed[0]), ""


def groups_with_both(posts: Scored) -> list[str]:
    """The groups with enough posts of each label for cut-offs of their own."""
    return [
        group
        for group, inside in posts.members.items()
        if group != NO_TARGET
        and min((inside & posts.truth).sum(), (inside & ~posts.truth).sum()) >= MIN_DENOMINATOR
    ]


def fit_group_cuts(
    p: Any, truth: Any, members: dict[str, Any], groups: list[str], threshold: float
) -> dict[str, float]:
    """A cut-off for each of these groups, all of about one false-positive rate.

    It is that of the threshold on the posts of all of them: they become equal, and about as many
    of their posts are flagged wrongly as before. Posts of no group would pull it to their own.
    """
    import numpy as np

    counted = np.any([members[group] for group in groups], axis=0) & ~truth
    common = float((p[counted] >= threshold).mean())
    found = {}
    for group in groups:
        inside = members[group]
        cuts = candidate_cuts(p[inside])
        tables = cut_tables(cuts, p[inside], truth[inside])
        rates = count_figures(tables, 1)["false_positive_rate"]
        found[group] = best_cut(cuts, -np.abs(rates - common))
    return found


def cut_of_posts(members: dict[str, Any], cuts: dict[str, float], threshold: float, n: int) -> Any:
    """(n,): the highest cut-off of each post's groups; of a post of none of them the threshold."""
    import numpy as np

    chosen = np.full(n, -1.0)
    for group, cut in cuts.items():
        chosen = np.where(members[group], np.maximum(chosen, cut), chosen)
    return np.where(chosen < 0, threshold, chosen)


# --- figures ---------------------------------------------------------------------------------


def measure(posts: Scored, answers: dict[str, tuple[Any, Any]], seed: int) -> dict[str, Any]:
    """Figures of ways to decide, over all posts and per group, each with n and interval.

    `answers` has for each way p (n,) and what is flagged (n,). `change` is the second way less
    the first, of the same resamples. A gap is between the groups with enough posts.
    """
    found = resampled(posts, answers, seed)
    measured: dict[str, Any] = {}
    for way, (p, flagged) in answers.items():
        places = {
            place: place_figures(posts, p, flagged, inside)
            for place, inside in posts.places.items()
        }
        for place, figures in places.items():
            for key in ("balanced_accuracy", "ece"):
                add_interval(figures[key], found.get((way, place, key), {"low": None}))
        groups = {place: figures for place, figures in places.items() if place != "overall"}
        gaps = {
            rate: gap_between_groups(posts, groups, flagged, rate, seed)
            for rate in ("false_positive_rate", "false_negative_rate")
        }
        measured[way] = {"overall": places["overall"], "groups": groups, "gap": gaps}
    measured["change"] = {
        key: found["change", key, "overall"]
        for key in (f"f1_{posts.positive}", *MEASURED)
        if ("change", key, "overall") in found
    }
    return measured


def gap_between_groups(
    posts: Scored, groups: dict[str, Any], flagged: Any, rate: str, seed: int
) -> dict[str, Any]:
    """`widest_gap` of an error rate with its permutation p-value; its n counts groups.

    `low` is 0 unless p says that there is a difference.
    """
    import numpy as np

    enough, left_out = comparable(groups, rate)
    gap = widest_gap([[groups[group][rate] for group in enough]])
    gap |= {"p": None, "groups": enough, "left_out": left_out}
    if gap["value"] is None:
        return gap
    counted = ~posts.truth if rate == "false_positive_rate" else posts.truth
    wrong = (flagged != posts.truth)[counted]
    members = np.stack([posts.members[group][counted] for group in enough], axis=1)
    gap["p"] = permute_groups(wrong, members, [*range(len(enough))], seed)[0]
    if gap["p"] >= 0.05:
        gap["low"] = 0.0
    return gap


def place_figures(posts: Scored, p: Any, flagged: Any, inside: Any) -> dict[str, Any]:
    """Counts and figures over the posts of a mask; undefined is null with a reason."""
    import numpy as np

    truth, flagged, p = posts.truth[inside], flagged[inside], p[inside]
    n, positives = len(truth), int(truth.sum())
    tp, fp = int((truth & flagged).sum()), int((~truth & flagged).sum())
    fn, tn = positives - tp, n - positives - fp
    no_positive, no_negative = f"no {posts.positive} posts", f"no {posts.negative} posts"
    both = positives and n - positives
    error = calibration_error(np.ones((1, n)), p, truth, equal_mass_bins(p))[0] if n else None
    return {
        "n": n,
        "positives": positives,
        f"f1_{posts.positive}": dice(tp, fp + fn, f"{no_positive} and none predicted", n),
        "balanced_accuracy": number(
            (tp / positives + tn / (n - positives)) / 2 if both else None,
            n,
            no_negative if positives else no_positive,
        ),
        "precision": share(tp, tp + fp, "none predicted"),
        "false_positive_rate": share(fp, fp + tn, no_negative),
        "false_negative_rate": share(fn, positives, no_positive),
        "ece": number(error, n, "no posts"),
    }


def resampled(posts: Scored, answers: dict[str, tuple[Any, Any]], seed: int) -> dict[Any, Any]:
    """Bootstrap intervals by (way, place, figure) and ("change", figure, "overall").

    Up to `MOST_CELLS` posts are drawn one by one; of more, scores are drawn as `SCORE_LEVELS`
    levels of equally many posts.
    """
    import numpy as np

    places, n = posts.places, len(posts.ids)
    cells = Cells(np.arange(n), np.arange(n), np.ones(n, dtype=np.int64))
    if n > MOST_CELLS:
        columns = [flagged for _, flagged in answers.values()]
        level = equal_mass_bins(posts.scores, SCORE_LEVELS)
        cells = build_cells(posts.truth, level, *posts.members.values(), *columns)
    truth = posts.truth[cells.first]
    inside = {place: mask[cells.first] for place, mask in places.items()}
    means, tables, bins = {}, {}, {}
    for way, (p, flagged) in answers.items():
        means[way] = np.bincount(cells.of, weights=p) / cells.counts
        design = np.zeros((len(truth), len(places), 2, 2), dtype=np.float32)
        for place, mask in enumerate(inside.values()):
            rows = np.flatnonzero(mask)
            design[rows, place, truth[rows].astype(int), flagged[cells.first][rows].astype(int)] = 1
        tables[way] = design.reshape(len(truth), -1)
        for place, mask in inside.items():
            bins[way, place] = equal_mass_bins(means[way][mask])

    def statistic(counts: Any) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for way in answers:
            shape = (len(counts), len(places), 2, 2)
            figures = count_figures((counts @ tables[way]).reshape(shape), 1)
            for index, (place, mask) in enumerate(inside.items()):
                found[way, place, "balanced_accuracy"] = figures["balanced_accuracy"][:, index]
                found[way, place, "ece"] = calibration_error(
                    counts[:, mask], means[way][mask], truth[mask], bins[way, place]
                )
            for key in ("f1", *MEASURED[1:4]):
                name = f"f1_{posts.positive}" if key == "f1" else key
                found[way, "overall", name] = figures[key][:, 0]
        first, second = answers
        for key in (f"f1_{posts.positive}", *MEASURED):
            away = found[second, "overall", key] - found[first, "overall", key]
            found["change", key, "overall"] = away
        return found

    return intervals(statistic, cells.counts, seed)


def build_profile(
    args: argparse.Namespace,
    adapter: Repo,
    contract: dict[str, Any],
    fit: Scored,
    reported: Scored,
    fitted: Fitted,
    account: dict[str, Any],
    weights: dict[str, Any],
) -> dict[str, Any]:
    """What decisions.json holds of a profile: cut-offs, where they come from, what they do."""
    measured, price = {}, None
    for use, posts in (("fit", fit), ("apply", reported)):
        p = apply_temperature(posts.scores, fitted.temperature)
        flagged = p >= fitted.threshold
        ways = dict(zip(PHASES, ((posts.scores, posts.scores >= 0.5), (p, flagged)), strict=True))
        measured[use] = measure(posts, ways, args.seed)
        if fitted.group_cuts and use == "apply":
            cut = cut_of_posts(posts.members, fitted.group_cuts, fitted.threshold, len(p))
            ways = {"one_threshold": (p, flagged), "own_cuts": (p, p >= cut)}
            price = price_of(measure(posts, ways, args.seed))
        measured[use]["decisions"] = {
            place: count_decisions(p[inside], posts.truth[inside], fitted)
            for place, inside in posts.places.items()
        }
    profile = {
        "name": args.profile,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "script": SCRIPT,
        "labels": contract["labels"],
        "positive_label": contract["positive_label"],
        "temperature": fitted.temperature,
        "threshold": fitted.threshold,
        "review": fitted.review,
        "act": fitted.act,
        "reasons": fitted.reasons,
        "objective": args.objective,
        "strict": args.strict,
        "review_fnr": args.review_fnr,
        "act_precision": args.act_precision,
        "fitted_on": describe_side(fit) | account,
        "applied_to": describe_side(reported),
        "weights": weights,
        "base_model": fit.record.get("base_model"),
        "prompt": (fit.record.get("prompt") or {}).get("name"),
        # The state of the repo that was read; the profile's own commit is a later one.
        "calibration_commit": adapter.revision,
        "min_denominator": MIN_DENOMINATOR,
        "resamples": RESAMPLES,
        "measured": measured,
        "per_group_shown": {
            "used": False,
            "reason": GROUP_CUTS_REASON,
            "method": GROUP_CUTS_METHOD,
            "cuts": fitted.group_cuts or None,
            "price_on_apply": price,
        },
    }
    return without_empty_reasons(profile)


def without_empty_reasons(value: Any) -> Any:
    """The same without `reason` where a figure is defined: it says nothing there."""
    if isinstance(value, dict):
        return {
            key: without_empty_reasons(item)
            for key, item in value.items()
            if not (key == "reason" and item is None)
        }
    return value


def price_of(measured: dict[str, Any]) -> dict[str, Any]:
    """Of what is measured, what says how much cut-offs per group cost whom."""
    rates = ("false_positive_rate", "false_negative_rate")
    change = measured.pop("change")
    return {
        way: {
            "balanced_accuracy": found["overall"]["balanced_accuracy"],
            "gap": found["gap"],
            "groups": {
                group: {rate: figures[rate] for rate in rates}
                for group, figures in found["groups"].items()
            },
        }
        for way, found in measured.items()
    } | {"change_of_balanced_accuracy": change.get("balanced_accuracy")}


def describe_side(posts: Scored) -> dict[str, Any]:
    """Which posts: the evaluation's name, their number, dataset and commits."""
    record = posts.record
    dataset = record.get("dataset") or {}
    return {
        "eval": posts.name,
        "split": record.get("split"),
        "posts": len(posts.ids),
        "positives": int(posts.truth.sum()),
        "dataset": {"repo": dataset.get("repo"), "revision": dataset.get("revision")},
        "commit": (record.get("adapter") or {}).get("revision"),
        "ids_sha256": hashlib.sha256("\n".join(sorted(posts.ids)).encode()).hexdigest(),
    }


def count_decisions(p: Any, truth: Any, fitted: Fitted) -> dict[str, Any]:
    """How many posts are allowed, reviewed and acted on, and how wrong that is."""
    acted = p >= fitted.act if fitted.act is not None else p > math.inf
    allowed = p < fitted.review
    n = len(p)
    return {
        "n": n,
        "allowed": share(int(allowed.sum()), n, "no posts"),
        "review_load": share(int((~allowed & ~acted).sum()), n, "no posts"),
        "acted": share(int(acted.sum()), n, "no posts"),
        "positives_allowed": share(
            int((allowed & truth).sum()), int(truth.sum()), "no positive posts"
        ),
        "act_precision": share(int((acted & truth).sum()), int(acted.sum()), "none acted on"),
    }


# --- profiles --------------------------------------------------------------------------------

DECISIONS = "decisions.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def read_profile(repo: Repo, name: str) -> dict[str, Any]:
    """A named profile of the adapter's decisions.json; ends where it is of other weights.

    `temperature` is for `apply_temperature`; `threshold`, `review` and `act` are on the scale
    that it gives. A post is positive from `threshold` on. Below `review` it is allowed, from
    there on a person decides, from `act` on (None: never) the detector does.
    """
    profiles = read_decisions(repo)["profiles"]
    if name not in profiles:
        fail(
            f"{repo.name} has no profile {visible(repr(name))}. There are: "
            f"{', '.join(map(visible, profiles)) or 'none'}. eval/calibrate.py makes one."
        )
    profile = profiles[name]
    if profile["weights"]["sha256"] != weights_sha256(repo):
        fail(
            f"the profile {name!r} of {repo.name} was fitted to other weights than are there now. "
            "Evaluate the adapter again and run eval/calibrate.py."
        )
    return profile


def apply_temperature(p: Any, temperature: float) -> Any:
    """sigmoid(logit(p) / temperature), of a number or an array (Guo et al. 2017).

    0 and 1 are moved by one rounding error, because their logits are infinite.
    """
    import numpy as np
    from scipy.special import expit, logit

    if temperature == 1:
        return p
    edge = np.finfo(np.float64).eps
    return expit(logit(np.clip(p, edge, 1 - edge)) / temperature)


def read_decisions(repo: Repo) -> dict[str, Any]:
    """decisions.json of an adapter; without profiles where there is none yet."""
    file = repo.fetch(DECISIONS) / DECISIONS
    if not file.is_file():
        return {"schema": SCHEMA, "script": "eval/calibrate.py", "profiles": {}}
    try:
        decisions = json.loads(file.read_text(encoding="utf-8"))
        schema, profiles = decisions["schema"], decisions["profiles"]
        whole = all(
            {"temperature", "threshold", "review", "act", "weights"} <= profile.keys()
            for profile in profiles.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{DECISIONS} of {repo.name} is damaged ({error}). Restore it, or remove the file.")
    if schema != SCHEMA or not whole:
        fail(f"{DECISIONS} of {repo.name} is of schema {schema} or not whole; this reads {SCHEMA}.")
    return decisions


def weights_sha256(repo: Repo) -> str:
    """The hash of an adapter's weights; the Hub says it without a download."""
    if repo.folder is None:
        from huggingface_hub import HfApi

        with hub_errors(f"look at the weights of {repo.name}"):
            found = HfApi().get_paths_info(repo.name, ADAPTER_WEIGHTS, revision=repo.revision)
        if found and found[0].lfs:
            return found[0].lfs.sha256
    file = repo.fetch(ADAPTER_WEIGHTS) / ADAPTER_WEIGHTS
    if not file.is_file():
        fail(f"{repo.name} holds no {ADAPTER_WEIGHTS}: finish its training first.")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def check_storing(args: argparse.Namespace, adapter: Repo) -> None:
    """Prove before any work that decisions.json can be written."""
    if args.dry_run or adapter.folder:
        return
    if args.adapter and "@" in args.adapter:
        fail("a profile is stored at the newest commit: leave @revision out, or say --dry_run.")
    prepare_repo(adapter.name, "model", "adapter", args.allow_public)


def list_profiles(adapter: Repo, profiles: dict[str, Any]) -> None:
    """Print the profiles with their cut-offs and whether they are of the present weights."""
    if not profiles:
        print(f"{adapter.name} has no profiles", flush=True)
        return
    current = weights_sha256(adapter)
    header = ["profile", "created", "objective", "temperature", "threshold", "review", "act"]
    rows = [[*header, "fitted on", "weights", "remark"]]
    for name, profile in profiles.items():
        fitted_on = profile.get("fitted_on") or {}
        rows.append(
            [
                visible(name),
                visible(str(profile.get("created"))),
                visible(str(profile.get("objective"))) + (" strict" * bool(profile.get("strict"))),
                *(cut_text(profile[key]) for key in ("temperature", "threshold", "review", "act")),
                visible(f"{fitted_on.get('posts')} posts of {fitted_on.get('eval')}"),
                "present" if profile["weights"].get("sha256") == current else "others",
                "used by early stopping" if fitted_on.get("used_by_early_stopping") else "",
            ]
        )
    print("\n".join(text_table(rows)), flush=True)


def cut_text(value: float | None) -> str:
    return "none" if value is None else f"{value:.5g}"


def store_profile(args: argparse.Namespace, adapter: Repo, profile: dict[str, Any]) -> None:
    """Add or replace the profile, print what changes, and read it back."""

    def change(profiles: dict[str, Any]) -> str:
        earlier = profiles.get(args.profile)
        profiles[args.profile] = profile
        return say_change(earlier, profile)

    current = weights_sha256(adapter)
    if current != profile["weights"]["sha256"]:
        fail(f"the weights of {adapter.name} changed meanwhile; run this again.", code=1)
    stored = change_decisions(adapter, change, f"Set the profile {args.profile}", current)
    if read_profile(stored, args.profile) != json.loads(json.dumps(profile)):
        fail(f"{DECISIONS} of {adapter.name} does not hold what was written.", code=1)
    place = stored.folder / DECISIONS if stored.folder else f"{stored.name}@{stored.revision}"
    print(f"profile {args.profile}: {place}", flush=True)


def say_change(earlier: dict[str, Any] | None, profile: dict[str, Any]) -> str:
    """Print a profile's old and new values; return a line for the commit."""
    name = profile["name"]
    if earlier is None:
        print(f"profile {name} is new", flush=True)
    lines = []
    for key in ("objective", "temperature", "threshold", "review", "act"):
        now = profile[key] if key == "objective" else cut_text(profile[key])
        was = None
        if earlier:
            was = earlier.get(key) if key == "objective" else cut_text(earlier[key])
        lines.append(f"{key} {visible(str(was))} -> {now}" if earlier else f"{key} {now}")
        print(f"  {lines[-1]}", flush=True)
    return "; ".join(lines)


def remove_profile(args: argparse.Namespace, adapter: Repo) -> None:
    """Take one profile out of decisions.json; the history keeps it."""
    there = read_decisions(adapter)["profiles"]
    if args.remove not in there:
        found = ", ".join(map(visible, there)) or "none"
        fail(f"{adapter.name} has no profile {args.remove!r}. There are: {found}.")
    if args.dry_run:
        print(f"--dry_run: profile {args.remove} stays", flush=True)
        return

    def change(profiles: dict[str, Any]) -> str:
        gone = profiles.pop(args.remove, None)
        return f"threshold was {cut_text(gone['threshold'])}" if gone else "was gone already"

    stored = change_decisions(adapter, change, f"Remove the profile {args.remove}", None)
    print(f"removed profile {args.remove} of {stored.name}", flush=True)


def change_decisions(
    adapter: Repo, change: Callable[[dict[str, Any]], str], title: str, weights: str | None
) -> Repo:
    """Write decisions.json alone, its profiles changed by `change`; return the repo after it.

    On the Hub the commit must follow the one that was read; where another one came between, such
    as a report, everything is read again. `weights` must then still be the hash of the weights.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

    if adapter.folder:
        decisions = read_decisions(adapter)
        change(decisions["profiles"])
        draft = adapter.folder / f".{DECISIONS}.draft"
        try:
            write_json(draft, decisions)
            draft.replace(adapter.folder / DECISIONS)
        except OSError as error:
            fail(f"cannot write to {adapter.name}: {error.strerror}.")
        return adapter
    for _ in range(5):
        newest = open_repo(adapter.name, "model")
        if weights and weights_sha256(newest) != weights:
            fail(f"the weights of {adapter.name} changed meanwhile; run this again.", code=1)
        decisions = read_decisions(newest)
        line = change(decisions["profiles"])
        text = json.dumps(decisions, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        operations = [CommitOperationAdd(path_in_repo=DECISIONS, path_or_fileobj=text.encode())]
        with hub_errors(f"push {DECISIONS} to {adapter.name}"):
            try:
                made = commit(
                    adapter.name, "model", operations, f"{title}: {line}", newest.revision
                )
            except HfHubHTTPError as error:
                if error.response.status_code != 412:
                    raise
                print(f"{adapter.name} has a newer commit; reading it again", flush=True)
                continue
        return open_repo(f"{adapter.name}@{made}", "model")
    fail(f"{adapter.name} changes faster than it can be written; run this again later.", code=1)


# --- output ----------------------------------------------------------------------------------


def build_tables(profile: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Titles and rows, header first, of everything that is shown."""
    fit, reported = profile["measured"]["fit"], profile["measured"]["apply"]
    return [
        ("Profile", profile_rows(profile)),
        ("All posts: at 0.5 before, at the threshold of calibrated p after", overall_rows(profile)),
        (
            f"Groups on {visible(profile['applied_to']['eval'])}: before -> after",
            group_rows(profile),
        ),
        ("Allowed, reviewed, acted on", decision_rows(fit, reported)),
        ("Cut-offs per group, shown only", own_cut_rows(profile)),
    ]


def profile_rows(profile: dict[str, Any]) -> list[list[str]]:
    bound = " at the interval's bad end" if profile["strict"] else ""
    reasons = profile["reasons"]
    meaning = {
        "temperature": "of least log loss on the fit posts",
        "threshold": f"objective {profile['objective']}"
        + (bound if profile["objective"].startswith("fpr<=") else ""),
        "review": f"at most {100 * profile['review_fnr']:g} % of positives pass below it{bound}",
        "act": f"precision of at least {100 * profile['act_precision']:g} % from it on{bound}",
    }
    rows = [["", "value", "why"]]
    for key, words in meaning.items():
        rows.append([key, cut_text(profile[key]), reasons.get(key, words)])
    return rows


def overall_rows(profile: dict[str, Any]) -> list[list[str]]:
    """Figures over all posts of both sides; the last column is how much the fit flatters."""
    positive = profile["positive_label"]
    fit, reported = profile["measured"]["fit"], profile["measured"]["apply"]
    n_fit, n_apply = (side["after"]["overall"]["n"] for side in (fit, reported))
    header = ["", f"fit before (n {n_fit})", "fit after"]
    rows = [[*header, f"apply before (n {n_apply})", "apply after", "apply less fit, after"]]
    titles = {f"f1_{positive}": f"F1 {visible(positive)}"}
    keys = [*titles, *MEASURED, "gap false_positive_rate", "gap false_negative_rate"]
    for key in keys:
        cells = []
        for side in (fit, reported):
            for phase in PHASES:
                figures = side[phase]["gap" if key.startswith("gap ") else "overall"]
                cells.append(figures[key.removeprefix("gap ")])
        moved = "undefined"
        if None not in (cells[1]["value"], cells[3]["value"]):
            moved = f"{100 * (cells[3]['value'] - cells[1]['value']):+.1f} points"
        rows.append([titles.get(key, key.replace("_", " ")), *map(figure_text, cells), moved])
    return rows


def figure_text(figure: dict[str, Any]) -> str:
    """A share in per cent with its interval; of too few posts only their number."""
    if figure["value"] is None:
        return f"undefined ({visible(figure['reason'])})"
    # The n of a gap counts its groups, of which each has enough posts.
    if "groups" not in figure and figure["n"] < MIN_DENOMINATOR:
        return f"insufficient (n {figure['n']})"
    text = f"{100 * figure['value']:.1f} %"
    if figure["low"] is not None:
        text += f" [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"
    return f"{text} p {figure['p']:.2g}" if figure.get("p") is not None else text


def group_rows(profile: dict[str, Any]) -> list[list[str]]:
    positive, side = profile["positive_label"], profile["measured"]["apply"]
    rates = ("false_positive_rate", "false_negative_rate", "ece")
    rows = [["group", "posts", visible(positive), *(key.replace("_", " ") for key in rates)]]
    for group, before in side["before"]["groups"].items():
        after = side["after"]["groups"][group]
        cells = []
        for key in rates:
            one, other = figure_text(before[key]), figure_text(after[key])
            # Without posts both say the same.
            same = before[key]["value"] is None or before[key]["n"] < MIN_DENOMINATOR
            cells.append(one if same else f"{one} -> {other}")
        rows.append([visible(group), str(before["n"]), str(before["positives"]), *cells])
    return rows


def decision_rows(fit: dict[str, Any], reported: dict[str, Any]) -> list[list[str]]:
    keys = ("allowed", "review_load", "acted", "positives_allowed", "act_precision")
    rows = [["", "posts", *(key.replace("_", " ") for key in keys)]]
    for title, side in (("fit", fit), ("apply", reported)):
        for place, figures in side["decisions"].items():
            if title == "fit" and place != "overall":
                continue
            name = f"{title}, all" if place == "overall" else f"{title}, {visible(place)}"
            cells = [figure_text(figures[key]) for key in keys]
            rows.append([name, str(figures["n"]), *cells])
    return rows


def own_cut_rows(profile: dict[str, Any]) -> list[list[str]]:
    shown_cuts = profile["per_group_shown"]
    if not shown_cuts["cuts"]:
        return [["none", profile["reasons"].get("per_group_shown", "")]]
    price = shown_cuts["price_on_apply"]
    ways = ("one_threshold", "own_cuts")
    rates = ("false_positive_rate", "false_negative_rate")
    rows = [["group (apply posts)", "cut-off", *(key.replace("_", " ") for key in rates)]]
    for group, cut in shown_cuts["cuts"].items():
        cells = [
            " -> ".join(figure_text(price[way]["groups"][group][key]) for way in ways)
            for key in rates
        ]
        rows.append([visible(group), cut_text(cut), *cells])
    gaps = [" -> ".join(figure_text(price[way]["gap"][key]) for way in ways) for key in rates]
    rows.append(["gap", "", *gaps])
    balanced = [figure_text(price[way]["balanced_accuracy"]) for way in ways]
    rows.append(["balanced accuracy, all", "", " -> ".join(balanced), ""])
    return rows


def remarks(profile: dict[str, Any]) -> list[str]:
    """What a reader must know of the figures."""
    lines = [
        "[low, high]: 95 % interval; rates Wilson, gaps Newcombe, the rest bootstrap (BCa). p of a "
        "gap: how often one as large comes about where groups make no difference (permutation)."
    ]
    gaps = profile["measured"]["apply"]["after"]["gap"]
    left_out = [
        f"{rate.replace('_', ' ')}: {', '.join(map(visible, gap['left_out']))}"
        for rate, gap in gaps.items()
        if gap["left_out"]
    ]
    if left_out:
        lines.append(
            f"Gaps leave out the groups with fewer than {MIN_DENOMINATOR} posts to count "
            f"({'; '.join(left_out)}): of them nothing is known."
        )
    lines.append(f"Per-group cut-offs. {GROUP_CUTS_REASON}")
    if profile["fitted_on"]["used_by_early_stopping"]:
        lines.append(f"Warning. {USED_POSTS}")
    if not profile["weights"]["proved_for_both_evaluations"]:
        lines.append("Warning. Predictions from files: nothing proves that both are of one model.")
    before, after = (
        profile["measured"]["apply"][phase]["overall"]["ece"]["value"] for phase in PHASES
    )
    if profile["temperature"] != 1 and after > before:
        lines.append(
            f"Warning. The temperature makes the calibration error of the reported posts larger "
            f"({100 * before:.1f} % to {100 * after:.1f} %): one number cannot mend these scores."
        )
    if profile["fitted_on"]["another_build_than_training"]:
        lines.append(
            "Warning. The posts fitted on are of another commit of the dataset than the training "
            "was on: some may have been trained on."
        )
    if profile["applied_to"]["split"] == "validation":
        lines.append(
            "Warning. The posts reported on are of the validation split, which training "
            "may have used to choose the weights."
        )
    return lines


def text_table(rows: list[list[str]]) -> list[str]:
    """Rows as lines whose columns stand below each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def write_results(
    args: argparse.Namespace,
    profile: dict[str, Any],
    tables: list[tuple[str, list[list[str]]]],
    fit: Scored,
    reported: Scored,
) -> None:
    """Write calibration.json, calibration.md, reliability.csv and thresholds.csv."""
    folder = Path(args.output_dir).expanduser().resolve()
    repos = [Repo(profile["weights"]["repo"], "model", profile["calibration_commit"])]
    record = stage_record("calibration", SCRIPT, args, repos) | {"profile": profile}
    sides = {"fit": fit, "apply": reported}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "calibration.json", record)
        text = write_up(profile, tables)
        (folder / "calibration.md").write_text(text, encoding="utf-8")
        write_csv(
            folder / "reliability.csv",
            ["posts", "phase", "bin", "n", "mean_p", "positives", "share", "low", "high"],
            reliability_rows(profile, sides),
        )
        header, rows = threshold_rows(profile, sides)
        write_csv(folder / "thresholds.csv", header, rows)
    except OSError as error:
        fail(f"cannot write to {folder}: {error.strerror}. Name another --output_dir.")
    print(f"\nfiles: {folder}", flush=True)


def write_up(profile: dict[str, Any], tables: list[tuple[str, list[list[str]]]]) -> str:
    """calibration.md: the tables and remarks of the terminal."""
    lines = [
        f"# Decision profile {markdown_cell(profile['name'])} of "
        f"{markdown_cell(profile['weights']['repo'])}",
        "",
        f"Fitted on {profile['fitted_on']['posts']} posts of "
        f"{markdown_cell(profile['fitted_on']['eval'])}, reported on "
        f"{profile['applied_to']['posts']} other posts of "
        f"{markdown_cell(profile['applied_to']['eval'])}. Created {profile['created']}.",
        "",
    ]
    for title, rows in tables:
        lines += [f"## {markdown_cell(title)}", ""]
        for number_, row in enumerate(rows):
            lines.append(f"| {' | '.join(map(markdown_cell, row))} |")
            if number_ == 0:
                lines.append("|" + " --- |" * len(row))
        lines.append("")
    for remark in remarks(profile):
        lines += [markdown_cell(remark), ""]
    return "\n".join(lines)


def reliability_rows(profile: dict[str, Any], sides: dict[str, Scored]) -> list[list[Any]]:
    """Mean p and share of positive posts in bins of equally many posts."""
    rows: list[list[Any]] = []
    for use, posts in sides.items():
        after = apply_temperature(posts.scores, profile["temperature"])
        for phase, p in zip(PHASES, (posts.scores, after), strict=True):
            bins = equal_mass_bins(p)
            for bin_ in sorted({*bins.tolist()}):
                inside = bins == bin_
                found = share(int(posts.truth[inside].sum()), int(inside.sum()), "no posts")
                ends = [found[key] for key in ("value", "low", "high")]
                hits = int(posts.truth[inside].sum())
                rows.append(
                    [use, phase, bin_, int(inside.sum()), float(p[inside].mean()), hits, *ends]
                )
    return rows


def threshold_rows(
    profile: dict[str, Any], sides: dict[str, Scored]
) -> tuple[list[str], list[list[Any]]]:
    """Counts and figures at up to 200 cut-offs of the fit posts and at the profile's own."""
    import numpy as np

    p = {
        use: apply_temperature(posts.scores, profile["temperature"]) for use, posts in sides.items()
    }
    cuts = candidate_cuts(p["fit"])
    if len(cuts) > 200:
        cuts = cuts[np.linspace(0, len(cuts) - 1, 200).astype(int)]
    names = {profile[key]: [] for key in ("review", "threshold", "act") if profile[key] is not None}
    for key in ("review", "threshold", "act"):
        if profile[key] is not None:
            names[profile[key]].append(key)
    cuts = np.unique(np.concatenate([cuts, [*names]]))
    keys = ("precision", "recall", "false_positive_rate", "f1", "balanced_accuracy")
    counts = ("true_negative", "false_positive", "false_negative", "true_positive")
    header, columns = ["cut_off", "is"], []
    for use, posts in sides.items():
        tables = cut_tables(cuts, p[use], posts.truth)
        figures = count_figures(tables, 1)
        header += [f"{use}_{key}" for key in (*counts, *keys)]
        columns += [*tables.reshape(len(cuts), 4).T.tolist()]
        columns += [
            [None if math.isnan(value) else value for value in figures[key].tolist()]
            for key in keys
        ]
    return header, [
        [cut, " ".join(names.get(cut, [])), *values]
        for cut, *values in zip(cuts.tolist(), *columns, strict=True)
    ]


# --- statistics ------------------------------------------------------------------------------

RESAMPLES = 10_000
# With fewer posts than this below the line a rate is counted, but nothing is concluded from it.
MIN_DENOMINATOR = 20
# Up to so many posts each is resampled by itself; of more, those alike are drawn together.
MOST_CELLS = 2000
SCORE_LEVELS = 64
# The two-sided 95 % point of the normal distribution.
NORMAL_95 = 1.959963984540054


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


def dice(hits: int, misses: int, empty: str, n: int) -> dict[str, Any]:
    """F1 = 2 TP / (2 TP + FP + FN) from TP and FP + FN, with a 95 % interval.

    TP / (TP + FP + FN) is a rate, and F1 a rising function of it: 2 r / (1 + r). So its Wilson
    interval gives that of F1, also where every post is decided rightly.
    """
    rate = share(hits, hits + misses, empty)
    for key in ("value", "low", "high"):
        if rate[key] is not None:
            rate[key] = 2 * rate[key] / (1 + rate[key])
    return rate | {"n": n}


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


def intervals(
    statistic: Callable[[Any], dict[Any, Any]], counts: Any, seed: int, resamples: int = RESAMPLES
) -> dict[Any, dict[str, Any]]:
    """BCa bootstrap intervals (Efron 1987) of everything that `statistic` computes.

    `statistic` takes cell counts of shape (r, cells) and returns figures of shape (r,) by name.
    Posts are drawn with replacement; of more than `MOST_CELLS` each is drawn a Poisson number of
    times, which differs only in how many there are (Chamandy et al. 2012). All figures come from
    the same draws, so a difference of two is a paired one. Returns `value`, `low` and `high` for
    each name that has a value; both ends are None where less than nine tenths of the draws have
    the figure, or where they all agree and say nothing of how far it could move. Names that end
    in "ece" get the interval of `bias_corrected`.
    """
    import numpy as np

    counts = np.asarray(counts)
    n, size = int(counts.sum()), len(counts)
    if n == 0:
        return {}
    figures = statistic(counts[None].astype(np.float64))
    point = {name: values[0] for name, values in figures.items() if np.isfinite(values[0])}
    if not point:
        return {}
    chance, cell_of = np.random.default_rng(seed), np.repeat(np.arange(size), counts)

    def draw(rows: Any) -> Any:
        if n > MOST_CELLS:
            return chance.poisson(counts, (len(rows), size))
        drawn = cell_of[chance.integers(0, n, (len(rows), n))]
        drawn += size * np.arange(len(rows))[:, None]
        return np.bincount(drawn.ravel(), minlength=len(rows) * size).reshape(-1, size)

    def leave_one_out(rows: Any) -> Any:
        return counts - (rows[:, None] == np.arange(size))

    def compute(make: Callable[[Any], Any], rows: int) -> Any:
        """(figures, rows); a thousand rows at a time, for the memory."""
        parts = []
        for some in np.split(np.arange(rows), range(1000, rows, 1000)):
            figures = statistic(make(some).astype(np.float32))
            parts.append(np.stack([figures[name] for name in point]))
        return np.concatenate(parts, axis=1)

    values = np.array([*point.values()])
    drawn, left = compute(draw, resamples), compute(leave_one_out, size)
    biased = np.array([name[-1] == "ece" for name in point])
    ends = zip(
        bca(values, drawn, left, counts), bias_corrected(values, drawn, left, counts), strict=True
    )
    ends = [np.where(biased, corrected, end) for end, corrected in ends]
    return {
        name: {"value": float(point[name])}
        | {
            key: None if math.isnan(end) else float(end)
            for key, end in zip(("low", "high"), both, strict=True)
        }
        for name, *both in zip(point, *ends, strict=True)
    }


def bca(point: Any, drawn: Any, without_one: Any, counts: Any) -> tuple[Any, Any]:
    """The ends of 95 % BCa intervals, with Student's t for the normal point; nan without any.

    Shapes: `point` (k,), `drawn` (k, resamples), `without_one` and `counts` as in `jackknife`. The
    wider point makes up for small samples, where the bootstrap's intervals are too short
    (Hesterberg 2015).
    """
    import numpy as np
    from scipy.special import ndtr, ndtri

    usable = moves(point, drawn)
    drawn, value = np.sort(drawn, axis=1), point[:, None]  # nan goes last
    valid = np.isfinite(drawn).sum(1)
    away, size, reach = jackknife(without_one, counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = ((drawn < value).sum(1) + (drawn == value).sum(1) / 2) / valid
        edge = 1 / (2 * drawn.shape[1])
        bias = ndtri(np.clip(below, edge, 1 - edge))
        cubes = (np.where(np.isfinite(without_one), counts, 0) * away**3).sum(1)
        skew = np.where(size > 0, cubes / (6 * size**1.5), 0)
        rows = np.arange(len(drawn))
        ends = []
        for z in (-reach, reach):
            place = ndtr(bias + (bias + z) / (1 - skew * (bias + z))) * (valid - 1)
            place = np.nan_to_num(np.clip(place, 0, valid - 1))
            under = np.floor(place).astype(np.int64)
            over = np.minimum(under + 1, np.maximum(valid - 1, 0))
            step = place - under
            ends.append((1 - step) * drawn[rows, under] + step * drawn[rows, over])
    return tuple(np.where(usable, end, np.nan) for end in ends)


def bias_corrected(point: Any, drawn: Any, without_one: Any, counts: Any) -> tuple[Any, Any]:
    """The ends of 95 % intervals of figures that noise makes larger, such as a calibration error.

    The draws have the noise twice and so show how much there is: the middle is the figure less
    that, and the width the jackknife's. Never below 0. Shapes are those of `bca`.
    """
    import numpy as np

    _, size, reach = jackknife(without_one, counts)
    known = np.isfinite(drawn)
    mean = np.where(known, drawn, 0).sum(1) / np.maximum(known.sum(1), 1)
    half, middle = reach * np.sqrt(size), 2 * point - mean
    usable = moves(point, drawn)
    return tuple(
        np.where(usable, np.maximum(end, 0), np.nan) for end in (middle - half, middle + half)
    )


def jackknife(without_one: Any, counts: Any) -> tuple[Any, Any, Any]:
    """How far each post moves a figure, (k, cells); their sum of squares and its z, each (k,).

    `without_one` (k, cells) is the figure without one post of that cell, of which there are
    `counts`. z is the two-sided 95 % point of Student's t, with the degrees of freedom that the
    posts' influences have: where few posts make a figure's variance, it is itself uncertain
    (Satterthwaite 1946). For normal influences they are the number of posts.
    """
    import numpy as np
    from scipy.special import stdtrit

    weights = np.where(np.isfinite(without_one), counts, 0)
    values = np.nan_to_num(without_one)
    with np.errstate(divide="ignore", invalid="ignore"):
        n = weights.sum(1)
        mean = (weights * values).sum(1) / n
        away = np.where(weights > 0, mean[:, None] - values, 0)
        size = (weights * away**2).sum(1)
        freedom = 2 / ((weights * away**4).sum(1) / size**2 - 1 / n)
        freedom = np.where(freedom > 0, np.maximum(freedom, 2), np.inf)
    return away, size, np.where(np.isinf(freedom), NORMAL_95, stdtrit(freedom, 0.975))


def moves(point: Any, drawn: Any) -> Any:
    """(k,): whether enough of the draws have a figure, and say how far it could move."""
    import numpy as np

    known = np.isfinite(drawn)
    differ = np.where(known, drawn, -np.inf).max(1) > np.where(known, drawn, np.inf).min(1)
    return (known.sum(1) >= 0.9 * drawn.shape[1]) & differ & np.isfinite(point)


def difference_ends(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """The 95 % ends of a difference of independent rates from those of each.

    Newcombe (1998), method 10.
    """
    away = one["value"] - other["value"]
    low = away - math.hypot(one["value"] - one["low"], other["high"] - other["value"])
    return low, away + math.hypot(one["high"] - one["value"], other["value"] - other["low"])


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


def equal_mass_bins(scores: Any, most: int = 10) -> Any:
    """The bin (n,) of each score: equally many posts in each, equal scores together.

    There are at most 10 bins, and on average at least 15 posts in one.
    """
    import numpy as np

    bins = max(1, min(most, len(scores) // 15))
    edges = np.quantile(scores, np.arange(1, bins) / bins) if len(scores) else []
    return np.searchsorted(edges, scores, side="left")


def calibration_error(counts: Any, scores: Any, positive: Any, bins: Any) -> Any:
    """Expected calibration error: |share of positive posts - mean score| over the bins. (r,)"""
    import numpy as np

    if not len(bins):
        return np.full(len(counts), np.nan)
    inside = np.eye(bins.max() + 1)[bins] * (positive - scores)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.abs(counts @ inside).sum(1) / counts.sum(1, dtype=np.float64)


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


TOO_FEW_GROUPS = f"fewer than two groups have {MIN_DENOMINATOR} posts to count"


def add_interval(figure: dict[str, Any], found: dict[str, Any]) -> None:
    """Put a resampled interval around a figure, moved by what its cells' value is off."""
    if figure["value"] is None or found["low"] is None:
        return
    moved = figure["value"] - found["value"]
    figure["low"], figure["high"] = found["low"] + moved, found["high"] + moved


def comparable(groups: dict[str, Any], rate: str) -> tuple[list[str], list[str]]:
    """The groups whose rate counts in a gap, and those left out for want of posts."""
    named = [group for group in groups if group != NO_TARGET]
    enough = [group for group in named if groups[group][rate]["n"] >= MIN_DENOMINATOR]
    return enough, [group for group in named if group not in enough]


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


# --- predictions -----------------------------------------------------------------------------

PREDICTIONS = ("predictions.parquet", "predictions.csv")
# The names under which files of predictions hold what is needed; the first that is there counts.
COLUMNS = {
    "id": ("id", "sample_id", "post_id"),
    "text": ("text", "input_text"),
    "label": ("label", "true_label"),
    "prediction": ("prediction", "predicted_label"),
    "score": ("p_{positive}", "score", "probability"),
    "group": ("target_groups", "target_group_norm", "persona_tag"),
    "strategy": ("strategy",),
}


@dataclass(frozen=True)
class Answered:
    """Answers to labelled posts, as a file holds them; every list has an entry per post.

    In `predicted` None is an answer without label. `scores` are p of the positive label, or None;
    `texts` are None where the file has none. `columns` are further ones, `record` the evaluation's
    contract.json or empty.
    """

    name: str
    origin: str
    labels: list[str]
    positive: str
    ids: list[str]
    truth: list[str]
    predicted: list[str | None]
    scores: list[float] | None
    groups: list[list[str]]
    texts: list[str] | None
    columns: dict[str, list[Any]]
    record: dict[str, Any]


def read_runs(argument: str, eval_name: str, options: dict[str, Any]) -> list[Answered]:
    """The runs of a file, of an evaluation's folder, or of an adapter repo; one per strategy.

    A repo is `user/name[@revision]`, its evaluation `eval_name` or `user/name/EVALUATION`.
    `options`: `labels`, `positive`, `label_map`, `threshold`, and by the keys of `COLUMNS` the
    name of a column.
    """
    place = Path(argument).expanduser()
    if place.suffix.lower() in (".csv", ".parquet", ".jsonl") and (
        is_folder(argument) or place.is_file()
    ):
        return runs_of_rows(read_table(place), argument, place.stem, {}, options)
    folder, name = find_evaluation(argument, eval_name)
    record = read_record(folder, name)
    file = next((folder / file for file in PREDICTIONS if (folder / file).is_file()), None)
    if file is None:
        fail(f"{name} holds no {PREDICTIONS[0]}. Evaluate it again with {EVALUATE}.")
    known = {"labels": record.get("labels"), "positive": record.get("positive_label")}
    options = options | {key: value for key, value in known.items() if value}
    return runs_of_rows(read_table(file), argument, name, record, options)


EVALUATE = "eval/eval.py"


def find_evaluation(argument: str, eval_name: str) -> tuple[Path, str]:
    """The local folder of an evaluation's files, fetched where it is on the Hub, and its name."""
    wanted = (*PREDICTIONS, "contract.json", "metrics.json")
    if is_folder(argument):
        place = Path(argument).expanduser()
        for folder in (place, place / "eval" / eval_name):
            if any((folder / file).is_file() for file in PREDICTIONS):
                return folder, argument
        there = sorted(path.parent.name for path in place.glob("eval/*/contract.json"))
        fail(
            f"{argument} holds no evaluation {eval_name!r}. There are: "
            f"{', '.join(there) or 'none'}."
        )
    repo_name, _, revision = argument.partition("@")
    parts = repo_name.split("/")
    if len(parts) == 3:
        repo_name, eval_name = "/".join(parts[:2]), parts[2]
    repo = open_repo(f"{repo_name}@{revision}" if revision else repo_name, "model")
    folder = repo.fetch(*(f"eval/{eval_name}/{file}" for file in wanted)) / "eval" / eval_name
    if not any((folder / file).is_file() for file in PREDICTIONS):
        from huggingface_hub import HfApi

        with hub_errors(f"list the evaluations of {repo_name}"):
            files = HfApi().list_repo_files(repo_name, revision=repo.revision)
        there = sorted({file.split("/")[1] for file in files if re.match("eval/[^/]+/", file)})
        fail(
            f"{repo_name} holds no evaluation {eval_name!r}. There are: "
            f"{', '.join(there) or 'none'}. Name it as {repo_name}/NAME, or run {EVALUATE}."
        )
    return folder, f"{repo_name}/{eval_name}"


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """contract.json of an evaluation; empty where there is none."""
    file = folder / "contract.json"
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(f"contract.json of {name} is not JSON: {error}")
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        fail(f"contract.json of {name} has an unknown schema; this script reads {SCHEMA}.")
    return record


def read_table(file: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, JSONL or parquet file."""
    if not file.is_file():
        fail(f"the file {file} does not exist.")
    kind = file.suffix.lower()
    if kind == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            rows = parquet.read_table(file).to_pylist()
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            fail(f"{file} is no parquet file that can be read: {str(error).splitlines()[0]}")
        return rows
    try:
        content = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{file} is not UTF-8: {error}")
    if kind == ".csv":
        csv.field_size_limit(2**31 - 1)
        try:
            return list(csv.DictReader(io.StringIO(content, newline=""), strict=True))
        except csv.Error as error:
            fail(f"{file} is no CSV file that can be read: {error}")
    rows = []
    for number_, line in enumerate(content.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            fail(f"{file} line {number_} is not JSON: {error}")
    if not all(isinstance(row, dict) for row in rows):
        fail(f"{file}: every line is to be an object.")
    # Half of a surrogate pair can be escaped in JSON, and written nowhere.
    if re.search(r"\\u[dD][89a-fA-F]", content):
        try:
            json.dumps(rows, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            fail(f"{file} is no valid Unicode: {error}")
    return rows


def runs_of_rows(
    rows: list[dict[str, Any]],
    origin: str,
    name: str,
    record: dict[str, Any],
    options: dict[str, Any],
) -> list[Answered]:
    """Rows as runs, one for each value of the strategy column, in the order of their first row."""
    if not rows:
        fail(f"{origin} holds no rows.")
    found = list(dict.fromkeys(column for row in rows for column in row))
    column = {key: pick_column(key, found, origin, options) for key in COLUMNS}
    if not column["label"] or not (column["prediction"] or column["score"]):
        lacking = "true label" if not column["label"] else "predicted label or score"
        fail(
            f"{origin} has no column for the {lacking}. It has: {', '.join(map(str, found))}. "
            "Name it with --label_column, --prediction_column or --score_column."
        )
    if not column["group"]:
        print(f"{origin}: no column of groups; every post is of no target group", flush=True)
    by_strategy: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        key = str(row.get(column["strategy"]) or "") if column["strategy"] else ""
        by_strategy.setdefault(key or name, []).append(row)
    return [
        run_of_rows(some, strategy, origin, column, record, options)
        for strategy, some in by_strategy.items()
    ]


def pick_column(key: str, found: list[str], origin: str, options: dict[str, Any]) -> str | None:
    """The column that holds a thing: the one that is named, or the first of the known names."""
    named = options.get(key)
    if named:
        if named not in found:
            fail(f"{origin} has no column {named!r}. It has: {', '.join(map(str, found))}.")
        return named
    names = (candidate.format(positive=options["positive"]) for candidate in COLUMNS[key])
    return next((candidate for candidate in names if candidate in found), None)


def run_of_rows(
    rows: list[dict[str, Any]],
    strategy: str,
    origin: str,
    column: dict[str, str | None],
    record: dict[str, Any],
    options: dict[str, Any],
) -> Answered:
    """One strategy's rows as a run. Without an id the row's number is it."""
    labels, positive = options["labels"], options["positive"]
    truth, predicted, scores = [], [], []
    for number_, row in enumerate(rows, start=1):
        label = label_of(row.get(column["label"]), labels, options)
        if label is None:
            fail(
                f"{origin}: row {number_} of {strategy} has the true label "
                f"{visible(repr(row.get(column['label'])))}. The labels are {', '.join(labels)}: "
                'name others with --label_map \'{"theirs": "hate"}\'.'
            )
        truth.append(label)
        score = score_of(row.get(column["score"]), origin, number_) if column["score"] else None
        scores.append(score)
        if column["prediction"]:
            predicted.append(label_of(row.get(column["prediction"]), labels, options))
        elif score is None:
            predicted.append(None)
        else:
            negative = next(one for one in labels if one != positive)
            predicted.append(positive if score >= options["threshold"] else negative)
    lacking = scores.count(None)
    if 0 < lacking < len(scores):
        print(
            f"{origin}: {lacking} of {len(scores)} rows of {strategy} have no score; figures of "
            "scores are left out",
            flush=True,
        )
    if column["prediction"] and not any(predicted):
        seen = sorted({visible(repr(row.get(column["prediction"]))) for row in rows})
        fail(f"{origin}: no prediction is one of {', '.join(labels)}; there are {seen[:5]}.")
    used = {name for name in column.values() if name}
    further = [name for name in dict.fromkeys(key for row in rows for key in row)]
    ids = [str(row.get(column["id"])) if column["id"] else str(n) for n, row in enumerate(rows, 1)]
    return Answered(
        name=strategy,
        origin=origin,
        labels=labels,
        positive=positive,
        ids=[plain_cell(name) for name in ids],
        truth=truth,
        predicted=predicted,
        scores=None if None in scores else scores,
        groups=[
            groups_in_cell(row.get(column["group"])) if column["group"] else [] for row in rows
        ],
        texts=[str(row.get(column["text"]) or "") for row in rows] if column["text"] else None,
        columns={
            name: [row.get(name) for row in rows]
            for name in further
            if name not in used and isinstance(name, str)
        },
        record=record,
    )


def label_of(value: Any, labels: list[str], options: dict[str, Any]) -> str | None:
    """A label's name from a name, a number, or what --label_map says; None for anything else."""
    text = str(int(value) if isinstance(value, (bool, float)) and value in (0, 1) else value)
    text = plain_cell(text).strip()
    text = (options.get("label_map") or {}).get(text, text)
    by_name = {label.casefold(): label for label in labels}
    by_number = {str(index): label for index, label in enumerate(labels)}
    return by_name.get(text.casefold()) or by_number.get(text)


def score_of(value: Any, origin: str, number_: int) -> float | None:
    """A probability, or None for an empty cell."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not 0 <= score <= 1:
        fail(f"{origin}: row {number_} has the score {visible(repr(value))}; it must be 0 to 1.")
    return score


def groups_in_cell(value: Any) -> list[str]:
    """The groups of a cell: a list, or names parted by `|`; a list as text is read as one."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = [value]
    words = value if isinstance(value, list) else str(value or "").split("|")
    names = [plain_cell(str(word)).strip() for word in words]
    absent = {"", "none", "nan", "null", NO_TARGET}
    return list(dict.fromkeys(name for name in names if name.casefold() not in absent))


def plain_cell(text: str) -> str:
    """A cell of ours without the apostrophe that keeps spreadsheets from computing it."""
    if text.startswith("'") and text[1:].lstrip(" ").startswith(FORMULA_SIGNS):
        return text[1:]
    return text


# --- files -----------------------------------------------------------------------------------


def csv_text(value: str) -> str:
    """Text that a spreadsheet does not take for a formula: an apostrophe goes before its sign."""
    return f"'{value}" if value.lstrip(" ").startswith(FORMULA_SIGNS) else value


def visible(text: str, most: int = 60) -> str:
    """Text as shown to people: control and direction characters as escapes, long text cut."""
    text = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    return text if len(text) <= most else f"{text[: most - 1]}…"


def markdown_cell(text: str) -> str:
    """Text as it stands in a Markdown table: no markup, no link, no image, no tag."""
    text = re.sub(r"([\\|`\[\]!*~$])", r"\\\1", visible(text, 5000))
    for sign, entity in (("<", "&lt;"), (">", "&gt;"), ("://", "&#58;//"), ("www.", "www&#46;")):
        text = text.replace(sign, entity)
    return text


def write_csv(file: Path, header: list[str], rows: list[list[Any]]) -> None:
    """Write a CSV file in UTF-8; None is an empty cell, text is made safe for spreadsheets."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        for row in [header, *rows]:
            writer.writerow([csv_text(cell) if isinstance(cell, str) else cell for cell in row])


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


def json_mapping(text: str) -> dict[str, str]:
    """A JSON object of texts, as a flag's value."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return {str(key): str(value) for key, value in found.items()}


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


if __name__ == "__main__":
    main()
