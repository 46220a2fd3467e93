"""The statistics of eval/eval.py against scikit-learn, scipy, fairlearn and independent counts."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny import load_script

LABELS = ["normal", "hate"]
NINE = [f"label_{index}" for index in range(8)] + ["hate"]
GROUPS = ("lgbtq", "mexican", "middle_east")
CLOSE = {"rel": 0, "abs": 1e-12}


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    return load_script("eval/eval.py")


@pytest.fixture
def few_draws(evaluate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the ends of intervals do not matter."""
    monkeypatch.setattr(evaluate.intervals, "__defaults__", (200,))
    monkeypatch.setattr(evaluate.permute_groups, "__defaults__", (200,))


@pytest.fixture
def normal_point(evaluate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published BCa: the normal distribution's point, not Student's."""
    jackknife = evaluate.jackknife

    def with_normal_point(*args: Any) -> tuple[Any, ...]:
        return (*jackknife(*args)[:2], evaluate.NORMAL_95)

    monkeypatch.setattr(evaluate, "jackknife", with_normal_point)


Rows = list[dict[str, Any]]


def make_rows(chance: random.Random, n: int, labels: list[str], models: int = 1) -> Rows:
    """Posts with `label`, `groups` (overlapping, or none), and per model an answer and a score.

    The scores have ties; some answers have no label.
    """
    rows = []
    for _ in range(n):
        label = chance.choice(labels)
        groups = [group for group in GROUPS if chance.random() < 0.35]
        answers = []
        for _ in range(models):
            p = min(1.0, max(0.0, round(chance.gauss(0.35 + 0.3 * (label == "hate"), 0.3), 1)))
            other = chance.choice([one for one in labels if one != "hate"])
            answer = "hate" if p >= 0.5 else other
            answers.append((None if chance.random() < 0.1 else answer, p))
        rows.append({"label": label, "groups": groups, "answers": answers})
    return rows


def as_sample(evaluate: ModuleType, rows: Rows, labels: list[str], scored: bool = True) -> Any:
    posts = [{"target_groups": row["groups"]} for row in rows]
    members = evaluate.group_members(posts, list(GROUPS))
    models = len(rows[0]["answers"]) if rows else 1
    answers = [
        evaluate.Answers(
            f"model_{index}",
            "model",
            [row["answers"][index][0] for row in rows],
            [row["answers"][index][1] for row in rows] if scored else None,
        )
        for index in range(models)
    ]
    truth = [row["label"] for row in rows]
    return evaluate.build_sample(labels, "hate", truth, members, answers)


def places(rows: Rows) -> dict[str, Rows]:
    """The rows over which the report has figures, found without the scripts' masks."""
    found = {"overall": rows}
    found |= {group: [row for row in rows if group in row["groups"]] for group in GROUPS}
    return found | {"no_target": [row for row in rows if not row["groups"]]}


def divide(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def count_rates(pairs: list[tuple[str, str | None]], labels: list[str]) -> dict[str, Any]:
    """The figures of (label, answer) pairs, each counted by itself; None where undefined."""
    pairs = [(true, answer) for true, answer in pairs if answer is not None]
    n = len(pairs)
    tp = sum(true == "hate" and answer == "hate" for true, answer in pairs)
    fp = sum(true != "hate" and answer == "hate" for true, answer in pairs)
    fn = sum(true == "hate" and answer != "hate" for true, answer in pairs)
    tn = n - tp - fp - fn
    right = sum(true == answer for true, answer in pairs)
    recalls, scores, weighted = [], [], 0.0
    true_counts = Counter(true for true, _ in pairs)
    answer_counts = Counter(answer for _, answer in pairs)
    for label in labels:
        hits = sum(true == answer == label for true, answer in pairs)
        recalls.append(divide(hits, true_counts[label]))
        score = divide(2 * hits, true_counts[label] + answer_counts[label])
        scores.append(score)
        weighted += true_counts[label] * (score or 0)
    whole = all(true_counts[label] for label in labels)
    # Gorodkin (2004): the correlation of two n x k matrices of indicators.
    covariance = right * n - sum(true_counts[one] * answer_counts[one] for one in labels)
    spread = (n**2 - sum(true_counts[one] ** 2 for one in labels)) * (
        n**2 - sum(answer_counts[one] ** 2 for one in labels)
    )
    return {
        "accuracy": divide(right, n),
        "precision": divide(tp, tp + fp),
        "recall": divide(tp, tp + fn),
        "false_positive_rate": divide(fp, fp + tn),
        "false_negative_rate": divide(fn, fn + tp),
        "flag_rate": divide(tp + fp, n),
        "f1_hate": divide(2 * tp, 2 * tp + fp + fn),
        "balanced_accuracy": sum(recalls) / len(labels) if whole else None,
        "f1_macro": sum(scores) / len(labels) if whole else None,
        "f1_weighted": divide(weighted, n),
        "mcc": covariance / math.sqrt(spread) if spread else None,
    }


def pairwise_auc(high: list[float], low: list[float]) -> float | None:
    """P that a score of `high` is above one of `low`, by counting all pairs."""
    won = sum(1.0 if one > other else 0.5 if one == other else 0.0 for one in high for other in low)
    return divide(won, len(high) * len(low))


def naive_precision(pairs: list[tuple[bool, float]]) -> float | None:
    """Average precision by its sum over thresholds: precision times the recall gained."""
    positives = sum(hate for hate, _ in pairs)
    found, before = 0.0, 0
    for threshold in sorted({p for _, p in pairs}, reverse=True):
        taken = [hate for hate, p in pairs if p >= threshold]
        found += sum(taken) / len(taken) * (sum(taken) - before)
        before = sum(taken)
    return divide(found, positives)


def naive_ece(pairs: list[tuple[bool, float]]) -> float | None:
    """Mean over the posts of their bin's |share of hate - mean score|, bin by bin."""
    scores = sorted(p for _, p in pairs)
    bins = max(1, min(10, len(pairs) // 15))
    edges = [float(np.quantile(scores, step / bins)) for step in range(1, bins)] if scores else []
    total = 0.0
    for index in range(bins):
        low = edges[index - 1] if index else -1.0
        high = edges[index] if index < bins - 1 else 2.0
        inside = [(hate, p) for hate, p in pairs if low < p <= high]
        if inside:
            mean = sum(p for _, p in inside) / len(inside)
            total += len(inside) * abs(sum(hate for hate, _ in inside) / len(inside) - mean)
    return divide(total, len(pairs))


def check(figure: dict[str, Any], expected: float | None, where: Any) -> None:
    """A figure is the expected one, or null with a reason where that is undefined."""
    if expected is None:
        assert figure["value"] is None and figure["reason"], where
        assert figure["low"] is None and figure["high"] is None, where
    else:
        assert figure["value"] == pytest.approx(expected, **CLOSE), where
        assert figure["reason"] is None, where


def check_figures(evaluate: ModuleType, rows: Rows, labels: list[str], sample: Any) -> None:
    """Everything of `build_figures` and `group_auc`, overall and per group, by counting."""
    masks = {"overall": np.ones(len(rows), dtype=bool), **sample.members}
    for place, some in places(rows).items():
        figures = evaluate.build_figures(sample, "model_0", masks[place])
        pairs = [(row["label"], row["answers"][0][0]) for row in some]
        for name, expected in count_rates(pairs, labels).items():
            check(figures[name], expected, (place, name, some))
        assert figures["n_total"] == len(some)
        assert figures["n_unparsed"] == sum(answer is None for _, answer in pairs)
        scored = [(row["label"] == "hate", row["answers"][0][1]) for row in some]
        high, low = ([p for hate, p in scored if hate is side] for side in (True, False))
        check(figures["roc_auc"], pairwise_auc(high, low), place)
        check(figures["average_precision"], naive_precision(scored), place)
        brier = divide(sum((p - hate) ** 2 for hate, p in scored), len(scored))
        check(figures["brier"], brier, place)
        check(figures["ece"], naive_ece(scored), place)
    # Borkan et al. (2019), section 3: background positive, subgroup negative, and the reverse.
    for group in GROUPS:
        found = evaluate.group_auc(sample, "model_0", group)
        sides = {
            (inside, hate): [
                row["answers"][0][1]
                for row in rows
                if (group in row["groups"]) is inside and (row["label"] == "hate") is hate
            ]
            for inside in (True, False)
            for hate in (True, False)
        }
        check(found["bpsn_auc"], pairwise_auc(sides[False, True], sides[True, False]), group)
        check(found["bnsp_auc"], pairwise_auc(sides[True, True], sides[False, False]), group)


def test_every_figure_of_random_tables_is_the_counted_one(evaluate: ModuleType) -> None:
    chance = random.Random(1)
    for index in range(1000):
        labels = [LABELS, ["normal", "offensive", "hate"], NINE][index % 3]
        rows = make_rows(chance, chance.randrange(1, 40), labels)
        check_figures(evaluate, rows, labels, as_sample(evaluate, rows, labels))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_figure_of_random_tables_is_that_of_sklearn(evaluate: ModuleType) -> None:
    from sklearn import metrics

    chance = random.Random(2)
    for index in range(400):
        labels = [LABELS, ["normal", "offensive", "hate"], NINE][index % 3]
        rows = make_rows(chance, chance.randrange(1, 80), labels)
        sample = as_sample(evaluate, rows, labels)
        figures = evaluate.build_figures(sample, "model_0", np.ones(len(rows), dtype=bool))
        parsed = [row for row in rows if row["answers"][0][0]]
        truth = [row["label"] for row in parsed]
        answers = [row["answers"][0][0] for row in parsed]
        if not parsed:
            continue
        matrix = metrics.confusion_matrix(truth, answers, labels=labels)
        precision, recall, f1, support = metrics.precision_recall_fscore_support(
            truth, answers, labels=labels, zero_division=np.nan
        )
        counts = [figures[name] for name in ("true_positive", "false_negative", "false_positive")]
        assert counts == [matrix[-1, -1], matrix[-1, :-1].sum(), matrix[:-1, -1].sum()]
        expected = {
            "precision": precision[-1],
            "recall": recall[-1],
            "f1_hate": f1[-1],
            "accuracy": metrics.accuracy_score(truth, answers),
            "f1_weighted": np.nansum(f1 * support) / support.sum(),
            "f1_macro": f1.mean() if support.all() else math.nan,
            "balanced_accuracy": recall.mean() if support.all() else math.nan,
        }
        if figures["mcc"]["value"] is not None:
            expected["mcc"] = metrics.matthews_corrcoef(truth, answers)
        hate = np.array([row["label"] == "hate" for row in rows])
        p = np.array([row["answers"][0][1] for row in rows])
        expected["brier"] = metrics.brier_score_loss(hate, p, labels=[False, True])
        if hate.any():
            expected["average_precision"] = metrics.average_precision_score(hate, p)
            if not hate.all():
                expected["roc_auc"] = metrics.roc_auc_score(hate, p)
        for name, value in expected.items():
            check(figures[name], None if math.isnan(value) else float(value), (name, rows))


def test_gaps_of_random_tables_are_those_of_fairlearn(
    evaluate: ModuleType, few_draws: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fairlearn.metrics import MetricFrame, selection_rate
    from sklearn.metrics import recall_score

    # fairlearn's own error rates are 0 for a group without such posts.
    def false_positive_rate(truth: Any, answers: Any) -> float:
        return 1 - recall_score(truth, answers, pos_label=0, zero_division=np.nan)

    def false_negative_rate(truth: Any, answers: Any) -> float:
        return 1 - recall_score(truth, answers, pos_label=1, zero_division=np.nan)

    monkeypatch.setattr(evaluate, "MIN_DENOMINATOR", 1)
    chance = random.Random(3)
    defined = 0
    for _ in range(30):
        rows = make_rows(chance, chance.randrange(10, 60), LABELS)
        for row in rows:
            row["groups"] = [chance.choice(GROUPS)]
        rows = [row for row in rows if row["answers"][0][0]]
        if len({row["answers"][0] for row in rows}) < 2:
            continue
        sample = as_sample(evaluate, rows, LABELS)
        answers = evaluate.Answers("model_0", "model", [], None)
        bias = evaluate.build_strategy(sample, answers, {}, {}, 0)["bias"]
        frame = MetricFrame(
            metrics={
                "false_positive_rate": false_positive_rate,
                "false_negative_rate": false_negative_rate,
                "flag_rate": selection_rate,
            },
            y_true=[int(row["label"] == "hate") for row in rows],
            y_pred=[int(row["answers"][0][0] == "hate") for row in rows],
            sensitive_features=[row["groups"][0] for row in rows],
        )
        for rate in ("false_positive_rate", "false_negative_rate"):
            known = frame.by_group[rate].dropna()
            gap = bias["gaps"][rate]
            check(gap["max_min"], known.max() - known.min() if len(known) > 1 else None, rate)
            if len(known) > 1 and known.max() > 0:
                check(gap["min_max_ratio"], known.min() / known.max(), rate)
                defined += 1
            assert set(known.index) | set(gap["left_out"]) == set(GROUPS)
        rates = frame.by_group["flag_rate"]
        check(
            bias["demographic_parity_difference"],
            rates.max() - rates.min() if len(rates) > 1 else None,
            "flag_rate",
        )
        both = frame.by_group.dropna()
        odds = [
            both[rate].max() - both[rate].min()
            for rate in ("false_positive_rate", "false_negative_rate")
        ]
        check(bias["equalized_odds_difference"], max(odds) if len(both) > 1 else None, "odds")
    assert defined > 25


def test_a_group_against_the_rest_and_all_is_counted(evaluate: ModuleType, few_draws: None) -> None:
    chance = random.Random(4)
    for _ in range(20):
        rows = make_rows(chance, 200, LABELS)
        sample = as_sample(evaluate, rows, LABELS)
        answers = evaluate.Answers("model_0", "model", [], None)
        bias = evaluate.build_strategy(sample, answers, {}, {}, 0)["bias"]
        for rate, gap in bias["gaps"].items():
            for group, one in gap["groups"].items():
                some = places(rows)[group]
                rest = [row for row in rows if row not in some]
                own, other, whole = (
                    count_rates([(row["label"], row["answers"][0][0]) for row in part], LABELS)[
                        rate
                    ]
                    for part in (some, rest, rows)
                )
                check(one["vs_rest"], own - other, (rate, group))
                check(one["vs_overall"], own - whole, (rate, group))
        for name, mean in bias["power_means"].items():
            each = [
                evaluate.build_figures(sample, "model_0", sample.members[group])["roc_auc"]
                if name == "roc_auc"
                else evaluate.group_auc(sample, "model_0", group)[name]
                for group in GROUPS
            ]
            power = sum(one["value"] ** -5 for one in each) / len(each)
            check(mean, power ** (-1 / 5), name)


def test_power_mean_of_an_auc_of_0_is_0_and_of_equal_ones_theirs(evaluate: ModuleType) -> None:
    assert float(evaluate.power_mean([0.8, 0.0])) == 0
    assert float(evaluate.power_mean([0.8, 0.8])) == pytest.approx(0.8, **CLOSE)
    assert 0.6 < float(evaluate.power_mean([0.6, 0.9])) < 0.75


def small_tables(kinds: list[tuple[str, str | None]], most: int) -> list[Rows]:
    """Every table of at most so many posts."""
    tables = []
    for counts in itertools.product(range(most + 1), repeat=len(kinds)):
        if sum(counts) <= most:
            pairs = [kind for kind, n in zip(kinds, counts, strict=True) for _ in range(n)]
            tables.append(
                [
                    {
                        "label": true,
                        "groups": [],
                        "answers": [(answer, float(answer == "hate") if answer else 0.5)],
                    }
                    for true, answer in pairs
                ]
            )
    return tables


@pytest.mark.parametrize(
    ("labels", "with_unparsed", "most"),
    [(LABELS, True, 6), (["normal", "offensive", "hate"], False, 3)],
)
def test_null_exactly_where_the_denominator_is_0_in_every_small_table(
    evaluate: ModuleType, labels: list[str], with_unparsed: bool, most: int
) -> None:
    kinds = list(itertools.product(labels, [*labels, *([None] if with_unparsed else [])]))
    tables = small_tables(kinds, most)
    assert len(tables) == math.comb(len(kinds) + most, most)
    for rows in tables:
        sample = as_sample(evaluate, rows, labels)
        figures = evaluate.build_figures(sample, "model_0", np.ones(len(rows), dtype=bool))
        pairs = [(row["label"], row["answers"][0][0]) for row in rows]
        for name, expected in count_rates(pairs, labels).items():
            check(figures[name], expected, (name, pairs))
        hate = [row["label"] == "hate" for row in rows]
        for name, defined in (
            ("roc_auc", any(hate) and not all(hate)),
            ("average_precision", any(hate)),
            ("brier", bool(hate)),
            ("ece", bool(hate)),
        ):
            assert (figures[name]["value"] is not None) == defined, (name, pairs)
            assert (figures[name]["reason"] is None) == defined, (name, pairs)


def test_wilson_is_that_of_scipy(evaluate: ModuleType) -> None:
    from scipy.stats import binomtest

    for whole in (1, 2, 3, 5, 12, 40, 86, 514):
        for part in range(0, whole + 1, max(1, whole // 40)):
            expected = binomtest(part, whole).proportion_ci(method="wilson")
            assert evaluate.wilson(part, whole) == pytest.approx(
                (expected.low, expected.high), **CLOSE
            )
    assert evaluate.share(0, 0, "no posts")["value"] is None


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    # Table II of Newcombe, "Interval estimation for the difference between independent
    # proportions" (1998), method 10.
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((0, 10), (0, 10), -0.2775, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_a_difference_of_rates_has_the_interval_of_newcombe_1998(
    evaluate: ModuleType,
    first: tuple[int, int],
    second: tuple[int, int],
    low: float,
    high: float,
) -> None:
    away = evaluate.against_rest(*first, *second)["vs_rest"]
    assert (away["low"], away["high"]) == pytest.approx((low, high), abs=5.1e-5)
    assert away["value"] == pytest.approx(first[0] / first[1] - second[0] / second[1], **CLOSE)


def test_interval_of_f1_is_that_of_the_rate_behind_it(evaluate: ModuleType) -> None:
    from scipy.stats import binomtest

    for hits, misses in ((40, 12), (1, 0), (0, 7), (9, 300)):
        figure = evaluate.dice(hits, misses, "none", 400)
        rate = binomtest(hits, hits + misses).proportion_ci(method="wilson")
        ends = [2 * one / (1 + one) for one in (rate.low, rate.high)]
        assert [figure["low"], figure["high"]] == pytest.approx(ends, **CLOSE)
        assert figure["value"] == pytest.approx(2 * hits / (2 * hits + misses), **CLOSE)
        assert figure["n"] == 400
    nothing = evaluate.dice(0, 0, "none", 3)
    assert (nothing["value"], nothing["low"], nothing["reason"]) == (None, None, "none")


def test_bca_intervals_are_those_of_scipy(evaluate: ModuleType, normal_point: None) -> None:
    """Within Monte Carlo error: the ends of 10,000 draws vary by about 1 % of the width."""
    from scipy.stats import bootstrap

    chance = np.random.default_rng(5)
    values = chance.exponential(size=60).round(1)
    truth = chance.random(60) < 0.6
    p = np.clip(0.3 * truth + chance.random(60) * 0.7, 0, 1).round(2)

    def area(hate: Any, score: Any, axis: int = -1) -> Any:
        higher = (score[..., :, None] > score[..., None, :]) + 0.5 * (
            score[..., :, None] == score[..., None, :]
        )
        sides = hate[..., :, None] & ~hate[..., None, :]
        return (higher * sides).sum((-2, -1)) / sides.sum((-2, -1))

    order = evaluate.pair_order(p[truth], p[~truth])

    def statistic(counts: Any) -> dict[Any, Any]:
        total = counts.sum(1)
        mean = counts @ values / total
        return {
            "mean": mean,
            "spread": np.sqrt(counts @ values**2 / total - mean**2),
            "auc": evaluate.auc(counts[:, truth], counts[:, ~truth], order),
        }

    found = evaluate.intervals(statistic, np.ones(60, dtype=int), 0)
    options = {"method": "BCa", "n_resamples": 10_000, "rng": np.random.default_rng(6)}
    for name, expected in (
        ("mean", bootstrap((values,), np.mean, vectorized=True, **options)),
        ("spread", bootstrap((values,), np.std, vectorized=True, **options)),
        ("auc", bootstrap((truth, p), area, paired=True, vectorized=True, batch=500, **options)),
    ):
        ends = expected.confidence_interval
        width = ends.high - ends.low
        assert found[name]["low"] == pytest.approx(ends.low, abs=0.04 * width), name
        assert found[name]["high"] == pytest.approx(ends.high, abs=0.04 * width), name


def test_bca_of_equal_draws_is_scipys_to_the_last_bits(
    evaluate: ModuleType, normal_point: None
) -> None:
    """The same draws give the same ends: the formulas agree, not only the draws."""
    from scipy.stats import bootstrap

    values = np.random.default_rng(7).exponential(size=40)
    result = bootstrap(
        (values,), np.mean, method="BCa", n_resamples=2000, rng=np.random.default_rng(8)
    )
    left = (values.sum() - values) / 39
    low, high = evaluate.bca(
        np.array([values.mean()]),
        result.bootstrap_distribution[None],
        left[None],
        np.ones(40, dtype=int),
    )
    ends = result.confidence_interval
    assert (low[0], high[0]) == pytest.approx((ends.low, ends.high), rel=1e-9)


def test_students_point_has_the_freedom_of_the_posts_influences(evaluate: ModuleType) -> None:
    from scipy.stats import t

    def point(influences: Any, counts: Any) -> float:
        return float(evaluate.jackknife(influences[None], counts)[2][0])

    chance = np.random.default_rng(19)
    normal = chance.standard_normal(20_000)
    assert point(normal, np.ones(20_000)) == pytest.approx(1.96, abs=1e-3)
    # 3 of 25 posts differ, so three make the variance.
    few = np.array([1.0, 0.0])
    away = np.repeat(few, [3, 22]) - 3 / 25
    freedom = 2 / ((away**4).sum() / (away**2).sum() ** 2 - 1 / 25)
    assert point(few, np.array([3, 22])) == pytest.approx(t.ppf(0.975, freedom))
    assert 5 < freedom < 10
    assert point(np.zeros(2), np.array([3, 22])) == evaluate.NORMAL_95


def test_a_calibration_errors_interval_takes_its_bias_off(evaluate: ModuleType) -> None:
    point, drawn = np.array([0.08]), np.array([[0.09, 0.13, 0.11, 0.11]])
    left = np.array([[0.079, 0.081]])
    low, high = evaluate.bias_corrected(point, drawn, left, np.array([50, 50]))
    # The draws are .03 above the figure, so it is itself .03 above the truth.
    assert (low[0] + high[0]) / 2 == pytest.approx(0.05, **CLOSE)
    assert evaluate.bias_corrected(point, drawn + 1, left, np.array([50, 50]))[0][0] == 0


def test_a_ratio_has_the_interval_of_two_rates(evaluate: ModuleType) -> None:
    """By its definition: where the difference of one rate and that many times the other is 0."""
    for part, whole in ((12, 80), (1, 20), (30, 90)):
        one, other = evaluate.share(part, whole, ""), evaluate.share(2, 40, "")
        low, high = evaluate.ratio_ends(one, other)
        for end, mine, theirs in ((low, "low", "high"), (high, "high", "low")):
            away = one["value"] - end * other["value"]
            near = one["value"] - one[mine]
            far = end * (other[theirs] - other["value"])
            assert abs(away) == pytest.approx(math.hypot(near, far), rel=1e-9)
        assert low < one["value"] / other["value"] < high
    nothing = evaluate.ratio_ends(evaluate.share(0, 40, ""), evaluate.share(20, 40, ""))
    assert nothing[0] == pytest.approx(0, abs=1e-9) and 0 < nothing[1] < 0.3
    assert evaluate.ratio_ends(evaluate.share(5, 40, ""), evaluate.share(0, 40, ""))[1] == math.inf


def test_a_gap_has_the_widest_ends_of_its_pairs(evaluate: ModuleType) -> None:
    some = [evaluate.share(part, 80, "") for part in (8, 16, 28)]
    gap = evaluate.widest_gap([some])
    low, high = evaluate.difference_ends(some[2], some[0])
    assert gap["value"] == pytest.approx(0.25, **CLOSE)
    assert (gap["low"], gap["high"]) == (low, high)
    assert evaluate.widest_gap([some[:1]])["value"] is None
    equal = evaluate.widest_gap([[some[0]] * 2])
    assert equal["value"] == equal["low"] == 0 < equal["high"]


def test_paired_differences_are_those_of_newcombe(evaluate: ModuleType) -> None:
    """Newcombe's paper of 1998 on paired data, method 10, 36 and 12 and 2 and 0 of 50."""
    found = evaluate.paired_difference(36, 12, 2, 0)
    assert (found["low"], found["high"]) == pytest.approx((0.0569, 0.3404), abs=5.1e-5)
    same = evaluate.paired_difference(10, 0, 0, 30)
    assert same["value"] == 0 and same["low"] == pytest.approx(-same["high"]) and same["high"] > 0


def test_ranking_of_counted_cells_is_that_of_sklearn_with_weights(evaluate: ModuleType) -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    chance = np.random.default_rng(9)
    for _ in range(50):
        size = int(chance.integers(4, 40))
        hate = chance.random(size) < 0.5
        hate[:2] = True, False
        p = chance.random(size).round(1)
        counts = chance.integers(0, 5, (3, size)).astype(float)
        counts[:, :2] += 1
        high, low = counts[:, hate], counts[:, ~hate]
        area = evaluate.auc(high, low, evaluate.pair_order(p[hate], p[~hate]))
        precision = evaluate.average_precision(high, low, p[hate], p[~hate])
        for row in range(3):
            weights = {"sample_weight": counts[row]}
            assert area[row] == pytest.approx(roc_auc_score(hate, p, **weights), **CLOSE)
            expected = average_precision_score(hate, p, **weights)
            assert precision[row] == pytest.approx(expected, **CLOSE)
    nothing = np.zeros((1, 2))
    assert np.isnan(evaluate.auc(nothing, nothing, np.ones((2, 2))))
    assert np.isnan(evaluate.average_precision(nothing, nothing, np.ones(2), np.ones(2)))


def test_cells_count_equal_posts(evaluate: ModuleType) -> None:
    chance = np.random.default_rng(10)
    columns = chance.integers(-1, 3, (200, 4))
    cells = evaluate.build_cells(columns[:, 0], columns[:, 1:])
    expected = Counter(map(tuple, columns.tolist()))
    assert Counter(
        dict(zip(map(tuple, columns[cells.first].tolist()), cells.counts, strict=True))
    ) == (expected)
    assert (columns[cells.first][cells.of] == columns).all()
    assert len(evaluate.build_cells(columns[:0]).counts) == 0


def test_holm_is_that_of_an_independent_version(evaluate: ModuleType) -> None:
    chance = random.Random(11)
    for _ in range(200):
        p = {
            index: chance.choice([chance.random() ** 3, 0.01])
            for index in range(chance.randrange(9))
        }
        adjusted = evaluate.holm(p)
        for name, value in p.items():
            # The largest of (m - i + 1) p over the hypotheses that are rejected before or with it.
            ordered = sorted(p.values())
            steps = [(len(p) - i) * one for i, one in enumerate(ordered) if one <= value]
            assert adjusted[name] == pytest.approx(min(1, max(steps)), **CLOSE)


def test_permutation_p_values_are_those_of_all_permutations(evaluate: ModuleType) -> None:
    in_groups = ((0,), (0,), (0, 1), (0,), (1,), (1,), (2,), (2,), ())
    members = np.array([[group in some for group in range(3)] for some in in_groups])
    wrong = np.array([1, 1, 1, 0, 0, 0, 0, 0, 1], dtype=bool)

    def gaps(deal: Any) -> tuple[float, list[float]]:
        rates = [deal[column].mean() for column in members.T]
        away = [abs(deal[column].mean() - deal[~column].mean()) for column in members.T]
        return max(rates[:2]) - min(rates[:2]), away

    observed = gaps(wrong)
    deals = [gaps(np.isin(np.arange(9), chosen)) for chosen in itertools.combinations(range(9), 4)]
    expected = sum(gap >= observed[0] - 1e-9 for gap, _ in deals) / len(deals)
    gap, each = evaluate.permute_groups(wrong, members, [0, 1], 0, 40_000)
    assert gap == pytest.approx(expected, abs=0.01)
    for group in range(3):
        share = sum(away[group] >= observed[1][group] - 1e-9 for _, away in deals) / len(deals)
        assert each[group] == pytest.approx(share, abs=0.01)
    assert evaluate.permute_groups(wrong, members, [0], 0, 50)[0] == 1
    nobody = evaluate.permute_groups(wrong[:0], members[:0], [0, 1], 0, 50)
    assert nobody[0] in (0, 1) or math.isnan(nobody[0])


def test_a_comparison_is_the_difference_of_the_figures(
    evaluate: ModuleType, few_draws: None
) -> None:
    from scipy.stats import binomtest

    chance = random.Random(12)
    for labels in (LABELS, ["normal", "offensive", "hate"]) * 4:
        rows = make_rows(chance, 90, labels, models=2)
        sample = as_sample(evaluate, rows, labels)
        pair = ("model_0", "model_1")
        found = evaluate.build_comparison(
            *(sample, *pair),
            evaluate.count_intervals(sample, [pair], 0),
            evaluate.rank_intervals(sample, [pair], 0),
        )
        other = next(label for label in labels if label != "hate")

        def decided(row: dict[str, Any], model: int, other: str = other) -> str:
            answer = row["answers"][model][0]
            return answer or (other if row["label"] == "hate" else "hate")

        for place, some in places(rows).items():
            figures = found["overall"] if place == "overall" else found["groups"][place]
            first, second = (
                count_rates([(row["label"], decided(row, model)) for row in some], labels)
                | score_values(some, rows, place, model)
                for model in (0, 1)
            )
            for name, figure in figures.items():
                key = "f1_hate" if name == "f1" else name
                if first.get(key) is None:
                    assert figure["value"] is None and figure["reason"], (place, name)
                    continue
                assert figure["value"] == pytest.approx(first[key] - second[key], **CLOSE), name
        right = [[decided(row, model) == row["label"] for row in rows] for model in (0, 1)]
        only = [sum(a > b for a, b in zip(*sides, strict=True)) for sides in (right, right[::-1])]
        assert [found["only_first_right"], found["only_second_right"]] == only
        assert found["overall"]["accuracy"]["p"] == binomtest(only[0], sum(only)).pvalue
        for group in (*GROUPS, "no_target"):
            some = [row for row in places(rows)[group] if row["label"] == "hate"]
            missed = [[decided(row, model) != "hate" for row in some] for model in (0, 1)]
            only = [sum(a > b for a, b in zip(*one, strict=True)) for one in (missed, missed[::-1])]
            figure = found["groups"][group]["false_negative_rate"]
            assert figure["n"] == len(some)
            if len(some) >= evaluate.MIN_DENOMINATOR:
                expected = binomtest(only[0], sum(only)).pvalue if sum(only) else 1
                assert figure["p"] == pytest.approx(expected, **CLOSE)
                assert figure["p_holm"] >= figure["p"]
            else:
                assert "p" not in figure


def score_values(some: Rows, rows: Rows, place: str, model: int) -> dict[str, float | None]:
    """What a model's scores give in a place, by counting pairs."""
    scored = [(row["label"] == "hate", row["answers"][model][1]) for row in some]
    high, low = ([p for hate, p in scored if hate is side] for side in (True, False))
    found: dict[str, float | None] = {
        "roc_auc": pairwise_auc(high, low),
        "average_precision": naive_precision(scored),
        "brier": divide(sum((p - hate) ** 2 for hate, p in scored), len(scored)),
    }
    if place in GROUPS:
        outside = [row for row in rows if place not in row["groups"]]
        other_high, other_low = (
            [row["answers"][model][1] for row in outside if (row["label"] == "hate") is side]
            for side in (True, False)
        )
        found["bpsn_auc"] = pairwise_auc(other_high, low)
        found["bnsp_auc"] = pairwise_auc(high, other_low)
    return found


def all_results(evaluate: ModuleType, sample: Any, seed: int = 0) -> list[Any]:
    """What metrics.json holds of the sample's strategies."""
    names = [*sample.predicted]
    pairs = [(names[0], other) for other in names[1:]]
    counted = evaluate.count_intervals(sample, pairs, seed)
    ranked = evaluate.rank_intervals(sample, pairs, seed)
    strategies = [
        evaluate.build_strategy(
            sample, evaluate.Answers(name, "model", [], None), ranked, counted, seed
        )
        for name in names
    ]
    compared = [evaluate.build_comparison(sample, *pair, counted, ranked) for pair in pairs]
    return [strategies, compared]


def flatten(value: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {path: value}
    return {key: one for name, part in items for key, one in flatten(part, (*path, name)).items()}


def test_results_do_not_depend_on_the_order_of_the_posts_and_repeat(evaluate: ModuleType) -> None:
    rows = make_rows(random.Random(13), 300, LABELS, models=2)
    first = flatten(all_results(evaluate, as_sample(evaluate, rows, LABELS)))
    assert flatten(all_results(evaluate, as_sample(evaluate, rows, LABELS))) == first
    random.Random(14).shuffle(rows)
    second = flatten(all_results(evaluate, as_sample(evaluate, rows, LABELS)))
    assert first.keys() == second.keys()
    for path, value in first.items():
        same = pytest.approx(value, **CLOSE) if isinstance(value, float) else value
        assert second[path] == same, path


def test_intervals_surround_their_figures_and_json_has_no_nan(evaluate: ModuleType) -> None:
    rows = make_rows(random.Random(15), 300, LABELS, models=2)
    found = flatten(all_results(evaluate, as_sample(evaluate, rows, LABELS)))
    surrounded = 0
    for path, value in found.items():
        assert not isinstance(value, float) or math.isfinite(value), path
        if path[-1] == "low" and value is not None:
            # The draws of a calibration error are larger than itself: it is never below 0.
            high = found[*path[:-1], "high"]
            assert value < high, path
            if path[-2] != "ece":
                assert value <= found[*path[:-1], "value"] <= high, path
                surrounded += 1
    assert surrounded > 100


def test_many_posts_are_drawn_as_levels_that_agree_with_single_posts(
    evaluate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,400 posts both ways: the values are equal, and the ends within 15 % of the width."""
    chance = random.Random(16)
    rows = make_rows(chance, 2400, LABELS, models=2)
    for row in rows:
        row["answers"] = [
            (answer, min(1.0, max(0.0, p + chance.uniform(-0.05, 0.05))))
            for answer, p in row["answers"]
        ]
    sample, pair = as_sample(evaluate, rows, LABELS), ("model_0", "model_1")
    monkeypatch.setattr(evaluate.intervals, "__defaults__", (1000,))
    levels = evaluate.rank_intervals(sample, [pair], 0)
    monkeypatch.setattr(evaluate, "MOST_CELLS", 4000)
    single = evaluate.rank_intervals(sample, [pair], 0)
    assert {key for key in single if len(key) == 4} <= levels.keys()
    for key, expected in single.items():
        if key not in levels or key[2] == "ece":
            continue
        width = expected["high"] - expected["low"]
        if len(key) == 4:
            assert levels[key]["value"] == pytest.approx(expected["value"], abs=1e-9), key
        # `add_interval` moves a strategy's own interval to the exact value.
        moved = expected["value"] - levels[key]["value"]
        for end in ("low", "high"):
            assert levels[key][end] + moved == pytest.approx(expected[end], abs=0.15 * width), key


def single_answers(truth: list[str], answers: list[str | None], p: list[float]) -> Rows:
    return [
        {"label": label, "groups": [GROUPS[index % 2]], "answers": [(answer, score), ("hate", 1.0)]}
        for index, (label, answer, score) in enumerate(zip(truth, answers, p, strict=True))
    ]


@pytest.mark.parametrize("n", [1, 2, 60])
@pytest.mark.parametrize(
    "case",
    ["all right", "all wrong", "all hate", "all normal", "equal scores", "certain", "unparsed"],
)
def test_degenerate_cases_have_figures_or_reasons(
    evaluate: ModuleType, few_draws: None, case: str, n: int
) -> None:
    truth = ["hate" if index % 3 else "normal" for index in range(n)]
    if case in ("all hate", "all normal"):
        truth = [case.removeprefix("all ")] * n
    answers: list[str | None] = list(truth)
    if case in ("all wrong", "certain"):
        answers = ["normal" if label == "hate" else "hate" for label in truth]
    if case == "unparsed":
        answers = [None] * n
    p = [0.9 if answer == "hate" else 0.1 for answer in answers]
    if case == "equal scores":
        p = [0.7] * n
    if case == "certain":
        p = [float(answer == "hate") for answer in answers]
    sample = as_sample(evaluate, single_answers(truth, answers, p), LABELS)
    (model, baseline), _ = all_results(evaluate, sample)
    flat = flatten(model) | flatten(baseline, ("baseline",))
    for path, value in flat.items():
        assert not isinstance(value, float) or math.isfinite(value), path
        if path[-1] == "value":
            reason = flat[*path[:-1], "reason"]
            assert (value is None) == bool(reason), path
    overall = model["overall"]
    if case == "all right":
        assert overall["accuracy"]["value"] == overall["f1_weighted"]["value"] == 1
        assert overall["accuracy"]["low"] < 1 == overall["accuracy"]["high"]
    if case in ("all wrong", "certain"):
        assert overall["accuracy"]["value"] == 0 < overall["accuracy"]["high"]
    if case == "equal scores" and n > 1:
        assert overall["roc_auc"]["value"] == 0.5
    if case == "unparsed":
        assert overall["accuracy"]["value"] is None
        assert overall["n_unparsed"] == n
        assert model["unparsed"]["as_errors"]["overall"]["accuracy"]["value"] == 0
    empty = model["groups"]["middle_east"]
    assert all(empty[name]["value"] is None for name in ("false_positive_rate", "f1_hate", "ece"))
    assert baseline["bias"] is None


def test_equalized_odds_has_the_interval_of_the_groups_it_is_of(evaluate: ModuleType) -> None:
    """A group with enough negatives and too few positives counts in neither."""
    rows: Rows = []
    for group, negatives, flagged, positives in (
        *(("lgbtq", 40, 6, 40), ("mexican", 40, 8, 40)),
        ("middle_east", 40, 35, 5),
    ):
        for index in range(negatives + positives):
            wrong = index < flagged
            label = "normal" if index < negatives else "hate"
            answer = "hate" if wrong or label == "hate" else "normal"
            rows.append({"label": label, "groups": [group], "answers": [(answer, 0.5)]})
    sample = as_sample(evaluate, rows, LABELS, scored=False)
    answers = evaluate.Answers("model_0", "model", [], None)
    counted = evaluate.count_intervals(sample, [], 0)
    odds = evaluate.build_strategy(sample, answers, {}, counted, 0)["bias"][
        "equalized_odds_difference"
    ]
    assert odds["value"] == pytest.approx(0.05, **CLOSE)
    assert odds["left_out"] == ["middle_east"]
    assert odds["low"] == 0 and 0.05 < odds["high"] < 0.3
    assert odds["p"] > 0.05


def test_a_model_with_one_answer_and_several_scores_has_intervals(
    evaluate: ModuleType, few_draws: None
) -> None:
    rows = make_rows(random.Random(17), 500, LABELS)
    for row in rows:
        row["answers"] = [("normal", row["answers"][0][1])]
    ((model,), _) = all_results(evaluate, as_sample(evaluate, rows, LABELS))
    assert model["overall"]["roc_auc"]["low"] is not None
    assert model["bias"]["power_means"]["bpsn_auc"]["low"] is not None


def test_too_few_posts_are_insufficient_and_never_significant(
    evaluate: ModuleType, few_draws: None
) -> None:
    rows = make_rows(random.Random(18), 30, LABELS)
    for index, row in enumerate(rows):
        row["groups"] = [GROUPS[index % 3]]
    ((model,), _) = all_results(evaluate, as_sample(evaluate, rows, LABELS))
    for gap in model["bias"]["gaps"].values():
        assert gap["max_min"]["value"] is None and "20" in gap["max_min"]["reason"]
        assert gap["significant"] is None
        assert gap["left_out"] == list(GROUPS)
