"""eval/eval.py: evasion, functional tests with their contrasts, and identity swaps.

pytest tests/test_behaviour.py
"""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import re
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import load_script, made_cases

script = load_script("eval/eval.py")

POST = (
    "Those people ruin everything @joe_hate #keepout <user> [URL] https://t.co/hateful?a=some "
    "www.some.example/thing &amp; write to some.one@mail.example or <|endoftext|> some.site/path."
)
KEPT = (
    *("@joe_hate", "#keepout", "<user>", "[URL]", "https://t.co/hateful?a=some"),
    *("www.some.example/thing", "&amp;", "some.one@mail.example", "<|endoftext|>"),
    "some.site/path.",
)
every_kind = pytest.mark.parametrize("kind", script.EVASIONS)


def undo(text: str, kind: str) -> str:
    """The text before it was perturbed, for texts whose own signs do not look like a change."""
    if kind == "leet":
        return text.translate(str.maketrans("431057", "aeiost"))
    if kind == "homoglyphs":
        latin = {other: letter for letter, other in script.HOMOGLYPHS.items()}
        return text.translate(latin)
    if kind == "elongation":
        return re.sub(r"([aeiou])\1\1", r"\1", text)
    return text.replace(script.ZERO_WIDTH, "")


# --- evasion ---------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("seed", range(5))
def test_perturbing_changes_half_of_the_words_and_nothing_else(kind: str, seed: int) -> None:
    text = "you will never ruin our beautiful little street, neighbour"
    found = script.perturb(text, kind, seed)
    assert found == script.perturb(text, kind, seed) != text
    if kind == "spacing":
        # Beside one another, two such words are one: that is what the reader is to work out.
        assert found.replace(" ", "") == text.replace(" ", "")
        assert found.split() != text.split()
    else:
        assert undo(found, kind) == text
        changed = sum(a != b for a, b in zip(text.split(), found.split(), strict=True))
        able = sum(script.evade_word(word, kind) != word for word in text.strip(",").split())
        assert changed == math.ceil(able / 2)
    assert len({script.perturb(text, kind, other) for other in range(20)}) > 5


@every_kind
def test_links_mentions_hashtags_and_placeholders_stay(kind: str) -> None:
    for seed in range(20):
        found = script.perturb(POST, kind, seed)
        assert found != POST
        place = 0
        for part in KEPT:
            place = found.index(part, place)  # in their order


@every_kind
@pytest.mark.parametrize(
    "text", ["", "42 % ok", "@everybody #everywhere <number> [HASHTAG] \u200b"]
)
def test_a_text_without_words_to_change_is_said_to_be_so(kind: str, text: str) -> None:
    assert script.perturb(text, kind, 0) is None


def test_which_words_each_kind_can_change() -> None:
    assert script.perturb("hmm", "leet", 0) is script.perturb("hmm", "elongation", 0) is None
    assert script.perturb("hmm", "spacing", 0) == "h m m"
    assert script.perturb("\u043d\u0435\u0442", "homoglyphs", 0) is None
    assert script.perturb("\u043d\u0435\u0442", "zero_width", 0) == "\u043d\u200b\u0435\u200b\u0442"
    assert script.perturb("Hate", "leet", 0) == "H473"
    assert script.perturb("Hate", "homoglyphs", 0) == "\u041d\u0430t\u0435"
    assert script.perturb("Oh HATE", "elongation", 0) == "Oh HAAATE"


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80), st.sampled_from(script.EVASIONS), st.integers(0, 3))
def test_any_text_is_changed_or_said_to_be_unchanged(text: str, kind: str, seed: int) -> None:
    found = script.perturb(text, kind, seed)
    words = [match["word"] for match in script.WORDS.finditer(text) if match["word"]]
    if found is None:
        assert all(script.evade_word(word, kind) == word for word in words)
    else:
        assert found != text
        assert script.perturb(text, kind, seed) == found
    # Whatever is no word stands in the result as it stood, in its order.
    place = 0
    for match in script.WORDS.finditer(text):
        if not match["word"] and found is not None:
            place = found.index(match[0], place) + len(match[0])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([*"ab @#.", "hate", "<user>", "http://a.b", "\ud800"]), max_size=30)
)
def test_hostile_texts_perturb_and_swap_without_error(parts: list[str]) -> None:
    text = "".join(parts)
    for kind in script.EVASIONS:
        found = script.perturb(text, kind, 1)
        assert found is None or found != text
    assert script.swap_identity(text, "lgbtq", "mexican") is None


def test_long_texts_take_no_long_time() -> None:
    start = time.perf_counter()
    for text in (
        "a" * 20_000,
        "a." * 10_000,
        "a-" * 10_000,
        "@" * 20_000,
        "<" * 20_000,
        ". " * 9000,
    ):
        script.perturb(text, "leet", 0)
        script.swap_identity(text, "lgbtq", "mexican")
    assert time.perf_counter() - start < 3


def make_posts(n: int, seed: int = 0) -> tuple[list[dict[str, Any]], list[float]]:
    draw = random.Random(seed)
    words = re.findall(r"\w+", "these people ruin every nice street and should leave now for good")
    posts = []
    for _ in range(n):
        text = " ".join(draw.sample(words, 6)) if draw.random() < 0.95 else "42 @x"
        label = draw.choice(["hate", "normal"])
        group = draw.choices([["a"], ["b"], ["a", "b"], [], ["few"]], [4, 4, 1, 2, 0.2])[0]
        posts.append({"text": text, "label": label, "target_groups": group})
    return posts, [draw.random() for _ in posts]


def test_only_positive_posts_are_perturbed() -> None:
    posts, _ = make_posts(50)
    found = script.build_perturbed(posts, "hate", 3)
    assert (
        found
        == script.build_perturbed(posts, "hate", 3)
        != script.build_perturbed(posts, "hate", 4)
    )
    wanted = {
        (kind, index, script.perturb(post["text"], kind, 3))
        for kind in script.EVASIONS
        for index, post in enumerate(posts)
        if post["label"] == "hate"
    }
    assert {*found} == {one for one in wanted if one[2] is not None}
    assert len(found) == len({*found})


def test_evasion_equals_a_naive_count() -> None:
    from scipy.stats import binomtest, ttest_1samp

    posts, p = make_posts(400)
    members = script.group_members(posts, ["a", "b"])
    perturbed = script.build_perturbed(posts, "hate", 0)
    draw = random.Random(1)
    after = [max(0.0, p[index] - draw.random() * 0.4) for _, index, _ in perturbed]
    report = script.build_evasion(posts, members, "hate", p, perturbed, after, 0.5)
    json.dumps(report, allow_nan=False)
    assert report["n_positive"] == sum(post["label"] == "hate" for post in posts)
    p_values = {}
    for kind in script.EVASIONS:
        entry = report["kinds"][kind]
        rows = [
            (index, p[index], value)
            for (one, index, _), value in zip(perturbed, after, strict=True)
            if one == kind
        ]
        assert entry["n_unchanged"] == report["n_positive"] - len(rows) > 0
        assert {*entry["groups"]} == {"a", "b", "no_target"} and "few" in entry["left_out"]
        for figures, group in [(entry, None), *((entry["groups"][g], g) for g in entry["groups"])]:
            own = [
                (one, two)
                for index, one, two in rows
                if group is None or (group in (posts[index]["target_groups"] or ["no_target"]))
            ]
            was, now = [one >= 0.5 for one, _ in own], [two >= 0.5 for _, two in own]
            n = len(own)
            assert figures["n"] == figures["recall_before"]["n"] == figures["recall_lost"]["n"] == n
            assert figures["recall_before"]["value"] == sum(was) / n
            assert figures["recall_after"]["value"] == sum(now) / n
            lost = figures["recall_lost"]
            assert math.isclose(lost["value"], (sum(was) - sum(now)) / n)
            assert lost["low"] < lost["value"] < lost["high"]
            one_way = sum(a and not b for a, b in zip(was, now, strict=True))
            other_way = sum(b and not a for a, b in zip(was, now, strict=True))
            wanted = binomtest(one_way, one_way + other_way).pvalue
            assert math.isclose(figures["p"], wanted)
            test = ttest_1samp([two - one for one, two in own], 0).confidence_interval()
            change = figures["mean_change"]
            assert math.isclose(change["low"], test.low) and math.isclose(change["high"], test.high)
        p_values[kind] = entry["p"]
    for kind, value in script.holm(p_values).items():
        assert report["kinds"][kind]["p_holm"] == value


def test_evasion_without_positive_or_changeable_posts_is_undefined() -> None:
    posts = [{"text": "fine weather", "label": "normal", "target_groups": []}]
    members = script.group_members(posts, ["a"])
    report = script.build_evasion(posts, members, "hate", [0.1], [], [], 0.5)
    assert report["reason"] == "no hate posts" and report["kinds"] == {}
    posts[0] |= {"label": "hate", "text": "42"}
    report = script.build_evasion(posts, members, "hate", [0.1], [], [], 0.5)
    for entry in report["kinds"].values():
        assert entry["n_unchanged"] == 1 and entry["p"] is None and entry["p_holm"] is None
        for key in ("recall_before", "recall_after", "recall_lost", "mean_change"):
            assert entry[key]["value"] is None and entry[key]["reason"]
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        # Newcombe 1998, table II, and Altman et al. 2000, Statistics with Confidence, chapter 6.
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((1, 1, 7, 12), -0.507, -0.026),
    ],
)
def test_paired_interval_equals_published_ones(
    cells: tuple[int, ...], low: float, high: float
) -> None:
    found = script.paired_difference(*cells)
    assert (found["low"], found["high"]) == (
        pytest.approx(low, abs=5e-4),
        pytest.approx(high, abs=5e-4),
    )


def test_paired_interval_equals_a_second_implementation() -> None:
    """Written from the formula with scipy's Wilson interval, over all tables with n <= 7."""
    from scipy.stats import binomtest

    for a, b, c, d in itertools.product(range(8), repeat=4):
        n = a + b + c + d
        if not 0 < n <= 7:
            continue
        one = binomtest(a + b, n).proportion_ci(method="wilson")
        two = binomtest(a + c, n).proportion_ci(method="wilson")
        top = a * d - b * c
        top = top - n / 2 if top > n / 2 else min(top, 0)
        below = (a + b) * (c + d) * (a + c) * (b + d)
        phi = top / below**0.5 if below else 0
        p1, p2 = (a + b) / n, (a + c) / n
        l1, u1, l2, u2 = p1 - one.low, one.high - p1, p2 - two.low, two.high - p2
        under = (l1**2 - 2 * phi * l1 * u2 + u2**2) ** 0.5
        over = (u1**2 - 2 * phi * u1 * l2 + l2**2) ** 0.5
        found = script.paired_difference(a, b, c, d)
        assert found["value"] == pytest.approx((b - c) / n, abs=1e-12)
        assert found["low"] == pytest.approx(max(-1, (b - c) / n - under), abs=1e-9)
        assert found["high"] == pytest.approx(min(1, (b - c) / n + over), abs=1e-9)
        assert -1 <= found["low"] <= found["value"] <= found["high"] <= 1
        mirrored = script.paired_difference(a, c, b, d)
        assert mirrored["low"] == pytest.approx(-found["high"], abs=1e-12)


def test_paired_intervals_cover_what_they_should() -> None:
    import numpy as np

    draw = np.random.default_rng(0)
    for truth, n in (((0.5, 0.2, 0.05, 0.25), 60), ((0.7, 0.05, 0.02, 0.23), 170)):
        tables = draw.multinomial(n, truth, size=4000)
        wanted = truth[1] - truth[2]
        found = [script.paired_difference(*map(int, table)) for table in tables]
        inside = sum(one["low"] <= wanted <= one["high"] for one in found)
        assert 0.93 <= inside / 4000 <= 0.98


def test_a_mean_without_spread_has_no_interval() -> None:
    assert script.mean_change([], "none")["reason"] == "none"
    for changes in ([0.25], [0.25] * 9):
        found = script.mean_change(changes, "none")
        assert found["value"] == 0.25 and found["low"] is None and found["reason"] is None


# --- functional tests ------------------------------------------------------------------------


def hatecheck_posts() -> list[dict[str, Any]]:
    """The made cases as rows of datasets/build_hatecheck.py: all ids are text, '' where absent."""
    posts = []
    for case in made_cases():
        row = {key: str(value).removesuffix(".0") for key, value in case.items() if key}
        label = {"hateful": "hate", "non-hateful": "normal"}[row.pop("label_gold")]
        posts.append(row | {"text": row.pop("test_case"), "label": label, "target_groups": []})
    return posts


def answers(posts: list[dict[str, Any]], seed: int = 0) -> tuple[list[str], list[float]]:
    draw = random.Random(seed)
    p = [draw.choice([0.1, 0.4, 0.4, 0.6, 0.9]) for _ in posts]
    return ["hate" if value >= 0.5 else "normal" for value in p], p


def test_heat_map_equals_an_independent_count() -> None:
    from scipy.stats import binomtest

    posts = hatecheck_posts()
    random.Random(0).shuffle(posts)
    predicted, p = answers(posts)
    found = script.build_functional(posts, "hate", "normal", predicted, p)
    json.dumps(found, allow_nan=False)
    cells: dict[Any, list[bool]] = defaultdict(list)
    for post, answer in zip(posts, predicted, strict=True):
        for identity in (post["target_ident"] or "no_target", "all"):
            for row in (post["functionality"], "all"):
                cells[post["label"], row, identity].append(answer == post["label"])
    seen = {}
    for side in found["sides"]:
        label = side["label"]
        seen[label, "all", "all"] = side["accuracy"]
        seen |= {(label, "all", name): one for name, one in side["identities"].items()}
        for row in side["rows"]:
            seen[label, row["functionality"], "all"] = row["accuracy"]
            for name, one in row["cells"].items():
                seen[label, row["functionality"], name] = one
    assert seen.keys() == cells.keys()
    for key, right in cells.items():
        test = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
        assert seen[key]["n"] == len(right) and seen[key]["value"] == sum(right) / len(right)
        assert seen[key]["low"] == pytest.approx(test.low, abs=1e-9)
        assert seen[key]["high"] == pytest.approx(test.high, abs=1e-9)
    assert [side["side"] for side in found["sides"]] == ["hateful", "non_hateful"]
    rows = [[row["functionality"] for row in side["rows"]] for side in found["sides"]]
    assert rows == [["derog_neg_emote_h"], ["negate_neg_nh", "target_obj_nh"]]
    assert found["identities"][-1] == "no_target" and found["n"] == 31 == len(posts)
    # An empty square is absent, not 0.
    assert {*found["sides"][1]["rows"][1]["cells"]} == {"no_target"}


def test_answers_without_label_are_wrong_and_counted() -> None:
    posts = hatecheck_posts()
    found = script.build_functional(posts, "hate", "normal", [None] * len(posts), None)
    assert found["n_unparsed"] == len(posts)
    assert [side["accuracy"]["value"] for side in found["sides"]] == [0, 0]
    apart = found["contrasts"]["told_apart"]
    assert apart["value"] is None and apart["reason"] == "answers without probability"
    assert found["contrasts"]["n_equal"] is None


def test_a_third_label_counts_as_not_positive() -> None:
    posts = [
        {"label": "offensive", "functionality": "f", "target_ident": "x"},
        {"label": "hate", "functionality": "f", "target_ident": "x"},
    ]
    found = script.build_functional(posts, "hate", "not hate", ["normal", "normal"], None)
    assert [side["accuracy"]["value"] for side in found["sides"]] == [0, 1]


def test_contrast_pairs_equal_a_naive_count() -> None:
    posts = hatecheck_posts()
    random.Random(5).shuffle(posts)
    by_id = {post["case_id"]: index for index, post in enumerate(posts)}
    wanted = {
        (by_id[post["ref_case_id"]], index)
        for index, post in enumerate(posts)
        if post["ref_case_id"]
    }
    pairs, alone = script.find_contrasts(posts, "hate")
    assert {*pairs} == wanted and len(pairs) == 14 and alone == []
    for seed in range(5):
        predicted, p = answers(posts, seed)
        contrasts = script.build_functional(posts, "hate", "normal", predicted, p)["contrasts"]
        both = sum(predicted[a] == "hate" and predicted[b] == "normal" for a, b in wanted)
        flagged = sum(predicted[a] == predicted[b] == "hate" for a, b in wanted)
        assert contrasts["both_right"]["value"] == both / 14
        assert contrasts["n_both_flagged"] == flagged
        assert contrasts["told_apart"]["value"] == sum(p[a] > p[b] for a, b in wanted) / 14
        assert contrasts["n_equal"] == sum(p[a] == p[b] for a, b in wanted)
        low, high = script.wilson(both, 14)
        assert (contrasts["both_right"]["low"], contrasts["both_right"]["high"]) == (low, high)
        assert sum(one["n"] for one in contrasts["identities"].values()) == 14
        assert {*contrasts["functionalities"]} == {"negate_neg_nh"}
        outcomes = ("n_both_flagged", "n_neither_flagged", "n_reversed")
        assert both + sum(contrasts[key] for key in outcomes) == 14


def case(
    number: int, label: str, ident: str, templ: str, ref: str = "", ref_templ: str = ""
) -> Any:
    linked = {"ref_case_id": ref, "ref_templ_id": ref_templ, "functionality": "f"}
    named = {"case_id": str(number), "label": label, "target_ident": ident, "templ_id": templ}
    return linked | named


def test_contrasts_by_template_stay_within_an_identity_and_labels_differ() -> None:
    posts = [
        case(1, "hate", "women", "10"),
        case(2, "hate", "Muslims", "10"),
        case(3, "normal", "Muslims", "11", ref_templ="10"),
        # A hateful case that was made from a simpler hateful one is no contrast.
        case(4, "hate", "women", "12", ref="1", ref_templ="10"),
        # Its template is about identities, itself it is about none.
        case(5, "normal", "", "13", ref_templ="10"),
        # Its twin was taken out of the suite.
        case(6, "normal", "women", "14", ref="99"),
        # The link stands on the hateful side; and a second time on the other.
        case(7, "hate", "women", "15", ref="8"),
        case(8, "normal", "women", "16", ref="7"),
        case(9, "normal", "women", "17", ref="1", ref_templ="10"),
        case(10, "normal", "women", "18"),
    ]
    pairs, alone = script.find_contrasts(posts, "hate")
    assert {*pairs} == {(1, 2), (6, 7), (0, 8)} and len(pairs) == 3
    assert [posts[index]["case_id"] for index in alone] == ["5", "6"]


def test_what_cannot_be_counted_has_a_reason() -> None:
    plain = [{"text": "x", "label": "hate", "target_groups": []}]
    found = script.build_functional(plain, "hate", "normal", ["hate"], [0.9])
    assert found["reason"] == "the posts have no column functionality, target_ident"
    assert found["sides"] == [] and found["contrasts"] is None
    empty = [plain[0] | {"functionality": "", "target_ident": ""}]
    found = script.build_functional(empty, "hate", "normal", ["hate"], [0.9])
    assert found["reason"] == "no post names a functionality"
    lone = [plain[0] | {"functionality": "f", "target_ident": ""}]
    found = script.build_functional(lone, "hate", "normal", ["hate"], [0.9])
    assert found["sides"][0]["accuracy"]["value"] == 1
    assert found["sides"][1]["accuracy"] == script.share(0, 0, "no cases")
    contrasts = found["contrasts"]
    assert contrasts["reason"].startswith("no case names") and contrasts["n"] == 0
    assert contrasts["both_right"]["value"] is None and contrasts["told_apart"]["value"] is None


# --- identity swap ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "source", "target", "wanted"),
    [
        ("A Mexican family lives here.", "mexican", "middle_east", "An Arab family lives here."),
        ("We met a Mexican.", "mexican", "lgbtq", "We met a gay person."),
        ("The Mexican said hello.", "mexican", "lgbtq", "The gay person said hello."),
        ("He is Mexican.", "mexican", "lgbtq", "He is gay."),
        ("MEXICANS OUT, NOT AN ARTIST", "mexican", "lgbtq", "GAY PEOPLE OUT, NOT AN ARTIST"),
        ("i hate mexicans", "mexican", "lgbtq", "i hate gay people"),
        ("Gay people! Gay people?", "lgbtq", "mexican", "Mexicans! Mexicans?"),
        ("gay people and a lesbian", "lgbtq", "mexican", "mexicans and a latina"),
        ("I saw gay   people", "lgbtq", "middle_east", "I saw Arabs"),
        ("AN ARAB! An Arab's bread", "middle_east", "mexican", "A MEXICAN! A Mexican's bread"),
        ("transparent, engaging, Mexicanos, Arabia", "lgbtq", "mexican", None),
        ("non-Mexican Mexican-American", "mexican", "lgbtq", None),
        ("#mexicans @Mexican https://x.example/Mexican <Mexican>", "mexican", "lgbtq", None),
        # It speaks of both groups: the swap would say something else.
        ("Mexicans and Arabs", "mexican", "middle_east", None),
        ("", "mexican", "middle_east", None),
    ],
)
def test_swap_takes_whole_words_and_keeps_case(
    text: str, source: str, target: str, wanted: str | None
) -> None:
    assert script.swap_identity(text, source, target) == wanted


def every_pair() -> list[tuple[str, str]]:
    return list(itertools.permutations(("lgbtq", "mexican", "middle_east"), 2))


@pytest.mark.parametrize(("source", "target"), every_pair())
def test_swapping_back_gives_the_text_where_terms_are_one_to_one(source: str, target: str) -> None:
    table = script.IDENTITY_TERMS
    texts = []
    for template in itertools.chain(*script.SWAP_TEMPLATES.values()):
        form = re.search(r"\{(\w+)\}", template)[1]
        assert len(table[source][form]) == len(table[target][form])
        texts += [script.fill_template(template, word) for word in table[source][form]]
    for text in texts:
        for written in (text, text.lower(), text.upper()):
            swapped = script.swap_identity(written, source, target)
            assert swapped not in (None, written)
            assert script.swap_identity(swapped, target, source) == written


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.sampled_from(["Mexicans", "a Latino", "HISPANICS"]), st.text())
def test_swap_leaves_any_other_text_alone(before: str, term: str, after: str) -> None:
    pattern = script.term_pattern(script.IDENTITY_TERMS["mexican"])
    assume(not any(script.has_term(other, pattern) for other in (before, after)))
    text = f"{before} {term} {after}"
    swapped = script.swap_identity(text, "mexican", "women")
    if swapped is not None:
        assert swapped.startswith(before) and swapped.endswith(after)


def test_every_template_renders_for_every_group_and_swaps_into_the_other() -> None:
    table = script.IDENTITY_TERMS
    assert {side: len(group) for side, group in script.SWAP_TEMPLATES.items()} == {
        True: 12,
        False: 12,
    }
    swaps, left_out = script.build_swaps([], "hate", [*table], table, 0, 0)
    shared = {frozenset(pair) for pair in itertools.combinations(table, 2)} - {
        frozenset((swap.source, swap.target)) for swap in swaps
    }
    assert shared == {frozenset(("lgbtq", "gay_people")), frozenset(("lgbtq", "trans_people"))}
    assert len(left_out) == 2 and all("shares terms" in one["reason"] for one in left_out)
    for swap in swaps:
        for text in (swap.original, swap.swapped):
            assert not set("{}") & set(text) and text[0].isupper() and text[-1] == "."
            assert not re.search(r"\b[Aa] (?!Euro)[aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]", text)
        assert swap.original != swap.swapped and swap.post is None


def test_template_swaps_agree_with_swaps_of_their_text() -> None:
    groups = ["lgbtq", "mexican", "middle_east"]
    swaps, _ = script.build_swaps([], "hate", groups, script.IDENTITY_TERMS, 0, 0)
    same = sum(
        script.swap_identity(swap.original, swap.source, swap.target) == swap.swapped
        for swap in swaps
    )
    # The rest are words that are noun and adjective, read as the other one.
    assert same / len(swaps) > 0.95


def identity_posts() -> list[dict[str, Any]]:
    texts = ["Some Mexicans came.", "My gay neighbour sings.", "Arabs, Arabs.", "Nobody at all."]
    return [
        {"text": f"{text} {index}", "label": "hate" if index % 3 else "normal"}
        for index, text in enumerate(texts * 12)
    ]


def test_swaps_of_posts_are_seeded_limited_and_of_both_labels() -> None:
    posts, groups = identity_posts(), ["lgbtq", "mexican", "unknown", "no_target"]
    build = script.build_swaps
    swaps, left_out = build(posts, "hate", groups, script.IDENTITY_TERMS, 3, 1)
    assert (swaps, left_out) == build(posts, "hate", groups, script.IDENTITY_TERMS, 3, 1)
    assert swaps != build(posts, "hate", groups, script.IDENTITY_TERMS, 3, 2)[0]
    assert left_out == [{"group": "unknown", "reason": "the table has no terms for it"}]
    named = ["lgbtq", "mexican", "canadian", "christian", "heterosexual"]
    counts: dict[Any, int] = defaultdict(int)
    for swap in swaps:
        counts[swap.source, swap.target, swap.positive, swap.post is None] += 1
        if swap.post is not None:
            assert posts[swap.post]["text"] == swap.original
            assert swap.positive == (posts[swap.post]["label"] == "hate")
            assert swap.swapped == script.swap_identity(swap.original, swap.source, swap.target)
    for source, target in itertools.permutations(named, 2):
        for side in (True, False):
            assert counts[source, target, side, True] == 12
            wanted = 3 if source in ("lgbtq", "mexican") else 0
            assert counts[source, target, side, False] == wanted


def test_swap_report_equals_a_naive_count() -> None:
    from scipy.stats import binomtest, ttest_1samp

    posts, groups = identity_posts(), ["lgbtq", "mexican", "middle_east"]
    swaps, left_out = script.build_swaps(posts, "hate", groups, script.IDENTITY_TERMS, 5, 1)
    draw = random.Random(0)
    before = [draw.random() for _ in swaps]
    after = [min(1.0, p + draw.random() * 0.3) for p in before]
    report = script.build_swap_report(swaps, left_out, "hate", "normal", before, after, 0.5)
    json.dumps(report, allow_nan=False)
    assert "label stays the same" in report["assumption"] and report["threshold"] == 0.5
    assert {*report["groups"]} == {*groups, "canadian", "christian", "heterosexual"}
    assert len(report["pairs"]) == 30
    for pair in report["pairs"]:
        assert pair["n"] == pair["parts"]["all"]["all"]["n"]
        for kind, label in itertools.product(
            ("all", "post", "template"), ("all", "hate", "normal")
        ):
            rows = [
                (one, two)
                for swap, one, two in zip(swaps, before, after, strict=True)
                if (swap.source, swap.target) == (pair["source"], pair["target"])
                and kind in ("all", "template" if swap.post is None else "post")
                and label in ("all", "hate" if swap.positive else "normal")
            ]
            figures = pair["parts"][kind][label]
            n = len(rows)
            assert figures["n"] == n and figures["insufficient"] == (n < 20)
            if not n:
                assert figures["flip_rate"]["value"] is figures["mean_change"]["value"] is None
                continue
            flips = sum((one >= 0.5) != (two >= 0.5) for one, two in rows)
            assert figures["flip_rate"]["value"] == flips / n
            test = binomtest(flips, n).proportion_ci(method="wilson")
            assert figures["flip_rate"]["high"] == pytest.approx(test.high, abs=1e-9)
            assert figures["n_to_positive"] + figures["n_to_negative"] == flips
            test = ttest_1samp([two - one for one, two in rows], 0).confidence_interval()
            assert figures["mean_change"]["low"] == pytest.approx(test.low, abs=1e-9)
            assert figures["mean_change"]["high"] == pytest.approx(test.high, abs=1e-9)
            size = sum(abs(two - one) for one, two in rows) / n
            assert figures["mean_absolute_change"]["value"] == pytest.approx(size)


def test_a_report_without_groups_says_why() -> None:
    table = {"a": script.IDENTITY_TERMS["women"], "b": script.IDENTITY_TERMS["muslims"]}
    swaps, left_out = script.build_swaps(identity_posts(), "hate", ["c"], table, 5, 1)
    assert swaps == [] and [one["group"] for one in left_out] == ["c"]
    report = script.build_swap_report(swaps, left_out, "hate", "normal", [], [], 0.5)
    assert report["reason"].startswith("fewer than two groups") and report["pairs"] == []


def test_the_table_passes_its_own_check(tmp_path: Path) -> None:
    file = tmp_path / "terms.json"
    file.write_text(json.dumps(script.IDENTITY_TERMS), encoding="utf-8")
    assert script.read_identity_terms(str(file)) == script.IDENTITY_TERMS


FORMS = {"singular": ["x"], "plural": ["xs"], "adjective": ["x"]}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (None, "is not a file"),
        ("{", "is not JSON"),
        ("[]", "two groups or more"),
        ({"a": FORMS}, "two groups or more"),
        ({"a": FORMS, "b": []}, "group 'b': it is to be an object"),
        ({"a": FORMS, "b": {**FORMS, "plurals": ["x"]}}, "unknown key 'plurals'"),
        ({"a": FORMS, "b": {"singular": ["x"], "plural": ["xs"]}}, "adjective is to be a list"),
        ({"a": FORMS, "b": {**FORMS, "plural": []}}, "plural is to be a list of one"),
        ({"a": FORMS, "b": {**FORMS, "plural": "xs"}}, "plural is to be a list of one"),
        ({"a": FORMS, "b": {**FORMS, "plural": [" "]}}, "is no term"),
        ({"a": FORMS, "b": {**FORMS, "plural": ["x!"]}}, "'x!' of plural is no term"),
        ({"a": FORMS, "b": {**FORMS, "plural": [3]}}, "3 of plural is no term"),
        ({"a": FORMS, "b": {**FORMS, "plural": ["xs", "XS"]}}, "stands twice in plural"),
        ({"a": FORMS, "b": {**FORMS, "comparison": 1}}, "comparison is to be true or false"),
    ],
)
def test_a_wrong_table_of_terms_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: Any, words: str
) -> None:
    file = tmp_path / "terms.json"
    if table is not None:
        text = table if isinstance(table, str) else json.dumps(table)
        file.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        script.read_identity_terms(str(file))
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and words in shown and "--identity_terms" in shown


def test_a_table_of_ones_own_is_used(tmp_path: Path) -> None:
    file = tmp_path / "terms.json"
    cats = {"singular": ["cat  lover"], "plural": ["cat lovers"], "adjective": ["feline"]}
    dogs = {"singular": ["dog lover"], "plural": ["dog lovers"], "adjective": ["canine"]}
    file.write_text(json.dumps({"cats": cats, "dogs": {**dogs, "comparison": True}}))
    terms = script.read_identity_terms(str(file))
    assert script.swap_identity("A cat lover.", "cats", "dogs", terms) == "A dog lover."
    swaps, left_out = script.build_swaps([], "hate", ["cats"], terms, 0, 0)
    assert len(swaps) == 48 and left_out == []


# --- plots -----------------------------------------------------------------------------------

COLOURS = {"#1c2127", "#57606a", "#d5dae0", "#0a5bb0", "#8a5a00"}


def draw_svg(plot: Any, *panels: int) -> str:
    """What `plot` draws on one axis, or on as many as there are panels."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none"}):
        warnings.simplefilter("error")
        figure, axes = pyplot.subplots(*panels, figsize=(8, 8), layout="constrained")
        figure.set_facecolor("none")
        plot(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg")
        pyplot.close(figure)
    return stream.getvalue()


def test_the_heat_map_shows_its_figures_in_the_pages_colours() -> None:
    posts = hatecheck_posts()
    predicted, p = answers(posts)
    found = script.build_functional(posts, "hate", "normal", predicted, p)
    svg = draw_svg(lambda axes: script.plot_functional(axes, found), 2)
    assert {*re.findall("#[0-9a-fA-F]{3,8}\\b", svg)} - {""} <= COLOURS | {"#ffffff"}
    assert "#ffffff" not in svg and "<image" not in svg
    shown = re.findall(r">(\d+)</text>", svg)
    wanted = [
        f"{100 * cell['value']:.0f}"
        for side in found["sides"]
        for row in side["rows"]
        for cell in (row["accuracy"], *row["cells"].values())
    ]
    assert sorted(shown) == sorted(wanted)
    counts = re.findall(r">\((\d+)\)</text>", svg)
    assert sum(map(int, counts)) == 2 * len(posts)


def test_a_side_without_cases_is_an_empty_map() -> None:
    posts = [post for post in hatecheck_posts() if post["label"] == "hate"]
    found = script.build_functional(posts, "hate", "normal", ["hate"] * len(posts), None)
    assert found["sides"][1]["rows"] == []
    svg = draw_svg(lambda axes: script.plot_functional(axes, found), 2)
    assert len(re.findall(r">100</text>", svg)) == 8


def test_the_matrix_of_swaps_shows_its_figures_in_the_pages_colours() -> None:
    swaps, left_out = script.build_swaps(
        [], "hate", ["lgbtq", "mexican"], script.IDENTITY_TERMS, 0, 0
    )
    draw = random.Random(0)
    before, after = ([draw.random() for _ in swaps] for _ in range(2))
    report = script.build_swap_report(swaps, left_out, "hate", "normal", before, after, 0.5)
    svg = draw_svg(lambda axis: script.plot_swaps(axis, report))
    assert {*re.findall("#[0-9a-fA-F]{3,8}\\b", svg)} <= COLOURS
    for pair in report["pairs"]:
        assert f"{pair['mean_change']['value']:+.3f}" in svg
    assert len(re.findall("% flip</text>", svg)) == len(report["pairs"]) == 20


@pytest.mark.parametrize("dark", [False, True])
def test_text_on_the_strongest_fill_has_enough_contrast(dark: bool) -> None:
    """WCAG AA asks for 4.5; the dark colours are those that the page puts in their place."""
    shown, paper = {name: name for name in COLOURS}, "#ffffff"
    if dark:
        shown |= {"#1c2127": "#e4e8ec", "#0a5bb0": "#74b3ff", "#8a5a00": "#dca94f"}
        paper = "#14181d"
        assert all(colour in script.PAGE for colour in (paper, *shown.values()))

    def channels(colour: str) -> list[float]:
        return [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]

    def luminance(parts: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for fill, alpha in itertools.product((script.PLOT_MODEL, script.PLOT_OTHER), script.PLOT_STEPS):
        pair = zip(channels(shown[fill]), channels(paper), strict=True)
        behind = luminance([alpha * top + (1 - alpha) * under for top, under in pair])
        ink = luminance(channels(shown[script.PLOT_INK]))
        assert (max(ink, behind) + 0.05) / (min(ink, behind) + 0.05) >= 4.5
