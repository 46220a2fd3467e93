"""The README holds what it says: its commands parse, its files exist, it stays short.

pytest tests/test_readme.py
"""

from __future__ import annotations

import re
import shlex

import pytest
from tiny import ROOT, load_script

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("datasets", "train", "eval", "merge")
    for path in (ROOT / folder).glob("*.py")
)
COMMANDS = [
    line.strip()
    for line in README.splitlines()
    if line.startswith("    ") and re.search(r"\buv run\b", line)
]


def test_it_stays_under_150_lines() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_a_row_and_a_command(script: str) -> None:
    assert f"| `{script}` |" in README
    assert [command for command in COMMANDS if script in command]


@pytest.mark.parametrize("command", [line for line in COMMANDS if "tests/" not in line])
def test_every_command_parses(command: str) -> None:
    words = shlex.split(command)
    if "pytest" in words:
        assert (ROOT / words[words.index("--with-requirements") + 1]).is_file()
        return
    [script] = [word for word in words if word in SCRIPTS]
    load_script(script).parse_args(words[words.index(script) + 1 :])


def test_every_flag_it_names_exists() -> None:
    known = set()
    for script in SCRIPTS:
        known |= set(re.findall(r'"(--\w+)"', (ROOT / script).read_text(encoding="utf-8")))
    others = {"--flavor", "--secrets", "--env", "--no-project", "--with-requirements", "--optim"}
    others |= {"--timeout", "--attempts", "--network-group", "--network-alias", "--logdir"}
    # An arrow of the diagram, --train/train.py-->, is no flag.
    named = set(re.findall(r"(?<![\w-])--\w[\w-]*(?![\w/-])", README)) - others
    assert named <= known, named - known


def test_every_file_it_links_exists() -> None:
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_first_screen_says_what_it_is_and_how_to_begin() -> None:
    screen = "\n".join(README.splitlines()[:25])
    for part in ("tests/demo.py", "train/train.py", "private", "not for unattended removal"):
        assert part in screen
