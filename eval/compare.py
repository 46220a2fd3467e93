# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "huggingface-hub==2.4.0",
#     "pyarrow==26.0.1",
#     "pyyaml==6.0.3",
#     "scikit-learn==1.9.1",
#     "scipy==1.17.1",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-20T00:00:00Z"
#
# [tool.hf-jobs]
# flavor = "cpu-upgrade"
# timeout = "30m"
# name = "hsd-compare"
# secrets = ["HF_TOKEN"]
# ///
"""Compare runs on the same posts."""

from __future__ import annotations

import math
import operator
import re
import sys
from typing import Any, NoReturn

SCRIPT = "eval/compare.py"
# With fewer posts than this below the line a rate is counted, but nothing is concluded from it.
MIN_DENOMINATOR = 20


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


def visible(text: str, most: int = 60) -> str:
    """Text as shown to people: control and direction characters as escapes, long text cut."""
    text = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    return text if len(text) <= most else f"{text[: most - 1]}…"


# --- requirements ----------------------------------------------------------------------------

# What may be written in a requirement instead of a figure's name.
SHORT_NAMES = {
    "fpr": "false_positive_rate",
    "fnr": "false_negative_rate",
    "auc": "roc_auc",
    "ap": "average_precision",
}


def parse_requirement(text: str) -> tuple[str, str, float]:
    """`PATH(>=|<=|>|<)NUMBER` as its three parts; a rate is a number from 0 to 1.

    PATH: `f1`, `lgbtq.fpr`, `gap.fpr`, `ratio.fnr`, `vs_base.f1`, `vs_base.lgbtq.fpr`.
    """
    found = re.fullmatch(r"\s*([^<>=]*[^<>=\s])\s*(>=|<=|>|<)\s*([-+]?[\d.]+(?:e-?\d+)?)\s*", text)
    try:
        return found[1], found[2], float(found[3])
    except (TypeError, ValueError):
        fail(
            f"--require {visible(repr(text))} is no requirement. Write a figure, one of >=, <=, >, "
            "<, and a number, such as 'f1>=0.62', 'lgbtq.fpr<=0.4' or 'gap.fpr<=0.1'."
        )


def find_comparison(metrics: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The comparison that a path `vs_NAME.…` names, and the rest of the path."""
    others: dict[str, dict[str, Any]] = {}
    for number_, one in enumerate(metrics["comparisons"], start=1):
        others |= {str(number_): one, one["second"]: one}
    if "base_model" in others:
        others.setdefault("base", others["base_model"])
    # A name may hold dots, and one may begin like another.
    name = max((one for one in others if path.startswith(f"vs_{one}.")), key=len, default=None)
    if name is None:
        fail(
            f"--require {visible(path)}: there is no such comparison. There are: "
            f"{', '.join(visible(f'vs_{one}') for one in others) or 'none'}."
        )
    return others[name], path.removeprefix(f"vs_{name}.")


def find_figure(metrics: dict[str, Any], path: str) -> dict[str, Any]:
    """The figure of a requirement's path: of the first strategy, or of its difference from another.

    `metrics` is of the form of metrics.json. A path with `vs_` names the other strategy, `vs_1`
    the first that it is compared with, `vs_base` the base model. A figure that counts fewer than
    `MIN_DENOMINATOR` posts is returned as undefined: too few to conclude anything from.
    """
    one, rest, bias = metrics["strategies"][0], path, metrics["strategies"][0]["bias"]
    if path.startswith("vs_"):
        one, rest = find_comparison(metrics, path)
        bias = {}
    place, _, key = rest.rpartition(".")
    key = SHORT_NAMES.get(key, key)
    form = {"gap": "max_min", "ratio": "min_max_ratio"}.get(place)
    if (form or key.endswith("_difference")) and bias is None:
        return number(None, 0, "all posts have the same answer")
    if form and bias:
        figures = {rate: gap[form] for rate, gap in bias["gaps"].items()}
    elif place in ("", "overall"):
        figures = one["overall"] | (bias or {})
    elif place in one["groups"]:
        figures = one["groups"][place]
    else:
        fail(
            f"--require {visible(path)}: there is no group {visible(place)!r}. There are: "
            f"{', '.join(map(visible, one['groups']))}; gap and ratio are of a rate between groups."
        )
    if key == "f1" and "f1" not in figures:
        key = f"f1_{metrics['positive_label']}"
    there = [name for name, item in figures.items() if isinstance(item, dict) and "value" in item]
    if key not in there:
        fail(
            f"--require {visible(path)}: there is no figure {visible(key)!r}. There are: "
            f"{', '.join(there)}."
        )
    figure, counts_posts = figures[key], not form and not key.endswith("_difference")
    if counts_posts and figure["value"] is not None and figure["n"] < MIN_DENOMINATOR:
        reason = f"insufficient: {figure['n']} posts, and {MIN_DENOMINATOR} are needed"
        return figure | {"value": None, "low": None, "high": None, "reason": reason}
    return figure


def judge(metrics: dict[str, Any], requirements: list[str], strict: bool) -> list[dict[str, Any]]:
    """Whether each requirement holds, for the figure or, if `strict`, for its interval's bad end.

    What is undefined does not hold, nor, if `strict`, what has no interval.
    """
    tests = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
    verdicts = []
    for text in requirements:
        path, sign, bound = parse_requirement(text)
        figure = find_figure(metrics, path)
        end = ("low" if sign.startswith(">") else "high") if strict else "value"
        tested, reason = figure[end], figure["reason"]
        if tested is None and reason is None:
            reason = "no interval"
        # The last bits of a difference are rounding.
        holds = tested is not None and tests[sign](round(tested, 12), bound)
        verdicts.append(
            {
                "requirement": text,
                **{key: figure[key] for key in ("value", "low", "high", "n")},
                "tested": tested,
                "holds": bool(holds),
                "reason": reason,
            }
        )
    return verdicts


def requirement_table(verdicts: list[dict[str, Any]]) -> list[list[str]]:
    """A row per requirement, header first."""
    rows = [["requirement", "value", "95 % interval", "n", "verdict"]]
    for one in verdicts:
        value = "undefined" if one["value"] is None else f"{one['value']:.4f}"
        interval = "none" if one["low"] is None else f"[{one['low']:.4f}, {one['high']:.4f}]"
        verdict = "holds" if one["holds"] else "FAILS"
        verdict += f" ({visible(one['reason'], 100)})" if one["reason"] else ""
        rows.append([visible(one["requirement"]), value, interval, str(one["n"]), verdict])
    return rows


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one message that says what is wrong, what there is and what to do.

    Exit codes: 1 the Hub or the run failed, 2 arguments, config or data that the user must change.
    """
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)
