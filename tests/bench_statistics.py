"""Measure the statistics of eval/eval.py: coverage, false alarms, power and speed.

    python tests/bench_statistics.py [--only coverage|alarms|power|speed] [--repeats N]

coverage: how often the 95 % intervals hold the true figure, over simulated evaluations whose true
figures are known from two million posts of the same kind. alarms: the share of evaluations without
any bias that report a significant gap, or a group that stands out. power: how often a true gap of
20 points is found. speed: process CPU and wall time of all figures with 10,000 resamples, imports
excluded. Prints Markdown tables. Needs the packages of requirements.txt, no network.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import sys
import time
from collections import defaultdict
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tiny import load_script

LABELS = ["normal", "hate"]
# Posts per evaluation: a small test split, and the one of the source project.
SIZES = (170, 514)
RATES = ("false_positive_rate", "false_negative_rate")
# The model's margin on a normal post, by group: group 0 is taken for hate more often.
LEANINGS = (0.6, 0.0, -0.3, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", choices=("coverage", "alarms", "power", "speed"))
    parser.add_argument("--repeats", type=int, default=2000, help="simulated evaluations (2000)")
    parser.add_argument("--resamples", type=int, default=1000, help="of each, not of speed (1000)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="posts, of coverage")
    args = parser.parse_args()
    evaluate = load_script("eval/eval.py")
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread; {' '.join(sys.argv)}\n")
    for name, measure in (
        ("coverage", measure_coverage),
        ("alarms", measure_alarms),
        ("power", measure_power),
        ("speed", measure_speed),
    ):
        if args.only in (None, name):
            resamples = evaluate.RESAMPLES if name == "speed" else args.resamples
            evaluate.intervals.__defaults__ = (resamples,)
            evaluate.permute_groups.__defaults__ = (resamples,)
            measure(evaluate, args)


def print_table(rows: list[list[Any]]) -> None:
    for index, row in enumerate(rows):
        print(f"| {' | '.join(map(str, row))} |", flush=True)
        if index == 0:
            print("|" + "---|" * len(row))
    print(flush=True)


def percent(part: float, whole: int) -> str:
    """A share with its standard error, in percent."""
    share = part / whole
    return f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / whole):.1f}"


def draw_posts(chance: Any, n: int, strategies: int) -> dict[str, Any]:
    """Posts of three groups and of none; one in ten of a group is aimed at a second one too.

    45 % are hate. A model's margin is normal around +1 or -1, shifted for normal posts of a group;
    the models' margins on a post correlate by 0.6.
    """
    import numpy as np

    truth = (chance.random(n) < 0.45).astype(np.int64)
    group = chance.integers(0, 4, n)
    second = np.where((chance.random(n) < 0.1) & (group < 3), chance.integers(0, 3, n), group)
    shared = chance.standard_normal(n)
    margins = []
    for index in range(strategies):
        own = math.sqrt(0.6) * shared + math.sqrt(0.4) * chance.standard_normal(n)
        lean = np.where(truth == 0, np.array(LEANINGS)[group], 0) * (1 - index)
        margins.append((1.1 - 0.2 * index) * (2 * truth - 1) + lean + own)
    scores = [1 / (1 + np.exp(-1.5 * margin)) for margin in margins]
    members = {f"g{number}": (group == number) | (second == number) for number in range(3)}
    members["no_target"] = ~np.logical_or.reduce([*members.values()])
    return {"truth": truth, "members": members, "scores": scores}


def build_sample(evaluate: ModuleType, posts: dict[str, Any]) -> Any:
    names = [f"model_{index}" for index in range(len(posts["scores"]))]
    predicted = {
        name: (p >= 0.5).astype(int) for name, p in zip(names, posts["scores"], strict=True)
    }
    scores = dict(zip(names, posts["scores"], strict=True))
    return evaluate.Sample(LABELS, 1, posts["truth"], posts["members"], predicted, scores)


def evaluate_sample(
    evaluate: ModuleType, sample: Any, seed: int, with_intervals: bool = True
) -> dict[str, Any]:
    """The report's figures by name: those of the first strategy, and its differences."""
    names = [*sample.predicted]
    pairs = [(names[0], other) for other in names[1:]]
    counted, ranked = {}, {}
    if with_intervals:
        counted = evaluate.count_intervals(sample, pairs, seed)
        ranked = evaluate.rank_intervals(sample, pairs, seed)
    answers = evaluate.Answers(names[0], "model", [], None)
    entry = evaluate.build_strategy(sample, answers, ranked, counted, seed)
    found = {f"{name}, overall": one for name, one in entry["overall"].items()}
    group, bias = entry["groups"]["g0"], entry["bias"]
    found |= {f"{name}, group": one for name, one in group.items()}
    for rate, gap in bias["gaps"].items():
        found[f"{rate}, largest gap"] = gap["max_min"]
        found[f"{rate}, smallest ratio"] = gap["min_max_ratio"]
        if "g0" in gap["groups"]:
            found[f"{rate}, group - rest"] = gap["groups"]["g0"]["vs_rest"]
            found[f"{rate}, group - all"] = gap["groups"]["g0"]["vs_overall"]
    for name in ("equalized_odds_difference", "demographic_parity_difference"):
        found[name] = bias[name]
    found |= {f"{name}, power mean": one for name, one in bias["power_means"].items()}
    for pair in pairs[:1] if with_intervals else []:
        compared = evaluate.build_comparison(sample, *pair, counted, ranked)
        found |= {f"{name}, A - B": one for name, one in compared["overall"].items()}
        found |= {f"{name}, group, A - B": one for name, one in compared["groups"]["g0"].items()}
    return {name: one for name, one in found.items() if isinstance(one, dict) and "low" in one}


def true_figures(evaluate: ModuleType) -> dict[str, float]:
    """The figures of two million posts; their error is below a fiftieth of an interval's width."""
    import numpy as np

    chance = np.random.default_rng(1)
    sums: dict[str, list[float]] = defaultdict(list)
    for _ in range(10):
        sample = build_sample(evaluate, draw_posts(chance, 200_000, 2))
        swapped = evaluate.Sample(
            *(LABELS, 1, sample.truth, sample.members),
            {name: sample.predicted[name] for name in reversed(sample.predicted)},
            sample.scores,
        )
        evaluate.permute_groups.__defaults__ = (1,)
        first, second = (
            evaluate_sample(evaluate, one, 0, with_intervals=False) for one in (sample, swapped)
        )
        for name, figure in first.items():
            sums[name].append(figure["value"])
            place = name.removesuffix(", overall")
            place = f"{place}, A - B" if place != name else f"{name}, A - B"
            sums[place].append(figure["value"] - second[name]["value"])
    return {name: float(np.mean(values)) for name, values in sums.items()}


def measure_coverage(evaluate: ModuleType, args: argparse.Namespace) -> None:
    """How often the interval holds the true figure, and how often there is none."""
    import numpy as np

    print("Exact coverage of Wilson's interval, by summing the binomial:\n")
    rows: list[list[Any]] = [["n", "p", "coverage, %"]]
    for n, p in itertools.product((20, 40, 86, 170), (0.05, 0.15, 0.4)):
        held = sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k)
            for k in range(n + 1)
            if evaluate.wilson(k, n)[0] <= p <= evaluate.wilson(k, n)[1]
        )
        rows.append([n, p, f"{100 * held:.1f}"])
    print_table(rows)
    resamples = evaluate.permute_groups.__defaults__
    truth = true_figures(evaluate)
    truth |= {
        f"{name}, A - B": truth[f"{name}, A - B"]
        for name in ("f1_hate", *RATES)
        if f"{name}, A - B" in truth
    }
    truth["f1, A - B"] = truth["f1_hate, A - B"]
    truth["f1, group, A - B"] = truth["f1_hate, group, A - B"]
    evaluate.permute_groups.__defaults__ = resamples
    columns = []
    for n in args.sizes:
        chance = np.random.default_rng(n)
        held: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        for repeat in range(args.repeats):
            sample = build_sample(evaluate, draw_posts(chance, n, 2))
            for name, figure in evaluate_sample(evaluate, sample, repeat).items():
                if name not in truth or math.isnan(truth[name]):
                    continue
                if figure["low"] is None:
                    held[name][1] += 1
                    continue
                held[name][0] += figure["low"] <= truth[name] <= figure["high"]
                held[name][2] += truth[name] < figure["low"]
                held[name][3] += truth[name] > figure["high"]
        columns.append(held)
    header = ["figure", "true value"]
    for n in args.sizes:
        header += [f"coverage at {n}, %", "true below / above", "no interval, %"]
    rows = [header]
    for name in columns[0]:
        row = [name, f"{truth[name]:.3f}"]
        for held in columns:
            inside, none, below, above = held[name]
            whole = inside + below + above
            if not whole:
                row += ["-", "-", "100"]
                continue
            row += [
                percent(inside, whole),
                f"{100 * below / whole:.1f} / {100 * above / whole:.1f}",
            ]
            row.append(f"{100 * none / args.repeats:.1f}")
        rows.append(row)
    print(f"{args.repeats} evaluations of each size, {args.resamples} resamples, two models:\n")
    print_table(rows)


def draw_errors(
    chance: Any, sizes: list[tuple[int, int]], rates: list[tuple[float, float]], others: int
) -> dict[str, Any]:
    """Posts of separate groups with (negatives, positives) and (FPR, FNR); `others` of no target.

    The others have the mean rates of the groups.
    """
    import numpy as np

    mean = tuple(sum(rate[side] for rate in rates) / len(rates) for side in (0, 1))
    sizes, rates = [*sizes, (others, others)], [*rates, mean]
    group = np.repeat(np.arange(len(sizes)), [sum(size) for size in sizes])
    truth = np.concatenate([np.repeat([0, 1], size) for size in sizes])
    wrong = chance.random(len(truth)) < np.array(rates)[group, truth]
    members = {f"g{index}": group == index for index in range(len(sizes) - 1)}
    members["no_target"] = group == len(sizes) - 1
    return {"truth": truth, "members": members, "predicted": np.where(wrong, 1 - truth, truth)}


def find_bias(evaluate: ModuleType, posts: dict[str, Any], seed: int) -> dict[str, Any]:
    """The gaps of the report, without intervals."""
    sample = evaluate.Sample(
        *(LABELS, 1, posts["truth"], posts["members"]),
        {"model": posts["predicted"]},
        {"model": None},
    )
    answers = evaluate.Answers("model", "model", [], None)
    return evaluate.build_strategy(sample, answers, {}, {}, seed)["bias"]


def measure_alarms(evaluate: ModuleType, args: argparse.Namespace) -> None:
    """How often an evaluation without bias reports one."""
    import numpy as np

    header = ["groups (negatives + positives)", "FPR, FNR", "significant gap, %"]
    header += ["group stands out, %", "either, %", "gap's low end above 0, not significant, %"]
    rows: list[list[Any]] = [header]
    three = [(86, 80)] * 3
    for sizes, rate, overlap in (
        (three, (0.15, 0.2), False),
        (three, (0.15, 0.2), True),
        (three, (0.03, 0.05), False),
        ([(30, 120), (86, 80), (200, 40)], (0.15, 0.2), False),
        ([(86, 80)] * 8, (0.15, 0.2), False),
        ([(86, 80), (86, 10), (15, 80)], (0.15, 0.2), False),
    ):
        chance = np.random.default_rng(len(rows))
        gaps = outs = either = loose = 0
        for repeat in range(args.repeats):
            posts = draw_errors(chance, sizes, [rate] * len(sizes), 40)
            if overlap:
                for mask in list(posts["members"].values())[:-1]:
                    mask |= (chance.random(len(mask)) < 0.15) & ~posts["members"]["no_target"]
            bias = find_bias(evaluate, posts, repeat)["gaps"].values()
            gap = any(one["significant"] for one in bias)
            out = any(one["significant"] for gap in bias for one in gap["groups"].values())
            gaps, outs, either = gaps + gap, outs + out, either + (gap or out)
            loose += any((one["max_min"]["p"] or 1) < 0.05 for one in bias) and not gap
        words = ", ".join(f"{negative} + {positive}" for negative, positive in dict.fromkeys(sizes))
        words = f"{len(sizes)} of ({words})" + (", 15 % of the others in each too" * overlap)
        shares = [percent(count, args.repeats) for count in (gaps, outs, either, loose)]
        rows.append([words, f"{rate[0]}, {rate[1]}", *shares])
    print(f"{args.repeats} evaluations without bias, {args.resamples} permutations:\n")
    print_table(rows)


def measure_power(evaluate: ModuleType, args: argparse.Namespace) -> None:
    """How often a gap of 20 points in the FPR is found, and the group that has it."""
    import numpy as np

    header = ["FPR by group", "negatives, positives of each", "FPR gap significant, %"]
    rows: list[list[Any]] = [[*header, "first group stands out, %", "all differing ones do, %"]]
    for rates, negatives in (
        ((0.35, 0.15, 0.15), 86),
        ((0.15, 0.35, 0.35), 86),
        ((0.35, 0.25, 0.15), 86),
        ((0.25, 0.05, 0.05), 86),
        ((0.35, 0.15, 0.15), 43),
        ((0.35, 0.15, 0.15), 172),
    ):
        chance = np.random.default_rng(len(rows))
        # The groups whose rate is not that of the other two together.
        differing = {
            f"g{index}" for index, rate in enumerate(rates) if abs(3 * rate - sum(rates)) > 1e-9
        }
        found = first = every = 0
        for repeat in range(args.repeats):
            both = [(rate, 0.2) for rate in rates]
            posts = draw_errors(chance, [(negatives, 80)] * 3, both, 0)
            gap = find_bias(evaluate, posts, repeat)["gaps"]["false_positive_rate"]
            out = {name for name, one in gap["groups"].items() if one["significant"]}
            found += gap["significant"]
            first += "g0" in out
            every += differing <= out
        shares = [percent(count, args.repeats) for count in (found, first, every)]
        rows.append([", ".join(map(str, rates)), f"{negatives}, 80", *shares])
    print(f"{args.repeats} evaluations, FNR .2 everywhere, {args.resamples} permutations:\n")
    print_table(rows)


def measure_speed(evaluate: ModuleType, args: argparse.Namespace) -> None:
    """All figures of model, base, TF-IDF and the two constant baselines, without scoring."""
    import numpy as np
    import scipy.special
    import scipy.stats  # noqa: F401

    rows: list[list[Any]] = [["posts", "strategies with scores", "CPU, s", "wall, s"]]
    for n, scored in itertools.product((514, 2000, 29_108, 100_000), (3,)):
        posts = draw_posts(np.random.default_rng(n), n, scored)
        truth = [LABELS[label] for label in posts["truth"]]
        members = {name: np.flatnonzero(one).tolist() for name, one in posts["members"].items()}
        strategies = [
            evaluate.Answers(
                name, kind, [LABELS[int(value >= 0.5)] for value in p.tolist()], p.tolist()
            )
            for (name, kind), p in zip(
                (("model", "model"), ("base_model", "base"), ("tfidf_lr", "baseline")),
                posts["scores"],
                strict=True,
            )
        ]
        for label in LABELS:
            p = float(label == "hate")
            name = f"always_{label}"
            strategies.append(evaluate.Answers(name, "baseline", [label] * n, [p] * n))
        best: list[float] = []
        for _ in range(3 if n <= 2000 else 1):
            cpu, wall = time.process_time(), time.perf_counter()
            sample = evaluate.build_sample(LABELS, "hate", truth, members, strategies)
            answered = [*sample.predicted]
            pairs = [(answered[0], other) for other in answered[1:]]
            counted = evaluate.count_intervals(sample, pairs, 0)
            ranked = evaluate.rank_intervals(sample, pairs, 0)
            for one in strategies:
                evaluate.build_strategy(sample, one, ranked, counted, 0)
            for pair in pairs:
                evaluate.build_comparison(sample, *pair, counted, ranked)
            taken = [time.process_time() - cpu, time.perf_counter() - wall]
            best = min(best or taken, taken)
        rows.append([f"{n:,}", scored, *(f"{seconds:.2f}" for seconds in best)])
    print("Best of three (up to 2,000 posts) or one; 3 groups, 10,000 resamples:\n")
    print_table(rows)


if __name__ == "__main__":
    main()
