"""Properties every script keeps because it is shipped to the Job alone.

pytest tests/test_scripts.py
"""

from __future__ import annotations

import ast
import difflib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("datasets", "train", "eval", "merge")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
DEMO = ROOT / "tests" / "demo.py"
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate")
HEAVY += ("pandas", "pyarrow", "sklearn", "scipy", "wandb", "numpy", "jinja2")
# What each script says of itself; every other name that two scripts share is the same text.
OWN_NAMES = {"main", "parse_args", "SCRIPT"}
METADATA = re.compile(r"(?m)^# /// script$\s(?P<body>(^#(| .*)$\s)+)^# ///$")

every_script = pytest.mark.parametrize(
    "script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}"
)


def metadata(script: Path) -> dict[str, Any]:
    """The PEP 723 block of a script."""
    body = METADATA.search(script.read_text(encoding="utf-8"))["body"]
    lines = [line.removeprefix("# ").removeprefix("#") for line in body.splitlines(keepends=True)]
    return tomllib.loads("".join(lines))


def requirements() -> tuple[list[str], list[str]]:
    """The pins of requirements.txt: for the scripts, and for development."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    parts = text.split("# Development")
    assert len(parts) == 2, "requirements.txt has one line that begins with '# Development'"
    pins = [[line for line in part.splitlines() if re.match(r"\w", line)] for part in parts]
    return pins[0], pins[1]


def test_all_four_stages_are_there() -> None:
    names = {str(script.relative_to(ROOT)) for script in SCRIPTS}
    assert {"train/train.py", "eval/eval.py", "merge/merge.py"} <= names
    assert "datasets/build_unified.py" in names


@every_script
def test_dependencies_are_exact_sorted_and_those_of_requirements_txt(script: Path) -> None:
    dependencies = metadata(script)["dependencies"]
    assert dependencies == sorted(dependencies)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in dependencies)
    assert set(dependencies) <= set(requirements()[0])


def test_requirements_txt_is_the_union_of_the_scripts_pins() -> None:
    used = {pin for script in SCRIPTS for pin in metadata(script)["dependencies"]}
    runtime, development = requirements()
    assert set(runtime) == used
    assert runtime == sorted(runtime) and len({pin.split("==")[0] for pin in runtime}) == len(
        runtime
    )
    assert set(metadata(DEMO)["dependencies"]) <= set(runtime) | set(development)


def test_scripts_agree_on_python_and_on_the_date_of_their_packages() -> None:
    blocks = [metadata(script) for script in [*SCRIPTS, DEMO]]
    assert {block["requires-python"] for block in blocks} == {">=3.11"}
    assert len({block["tool"]["uv"]["exclude-newer"] for block in blocks}) == 1


@every_script
def test_a_bare_job_submission_is_complete(script: Path) -> None:
    job = metadata(script)["tool"]["hf-jobs"]
    gpu = "torch" in {pin.split("==")[0] for pin in metadata(script)["dependencies"]}
    gpu = gpu and script.parent.name in ("train", "eval")
    assert job["flavor"] == ("a100-large" if gpu else "cpu-upgrade")
    assert job["secrets"] == ["HF_TOKEN"] and job["name"].startswith("hsd-")
    assert re.fullmatch(r"\d+[mh]", job["timeout"])


@every_script
def test_the_pins_can_be_solved(script: Path, tmp_path: Path) -> None:
    """`exclude-newer` must not be older than a pin's upload."""
    copy = shutil.copy(script, tmp_path / script.name)
    command = [sys.executable, "-m", "uv", "lock", "-q", "--script", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@every_script
def test_imports_nothing_of_ours(script: Path) -> None:
    ours = {path.stem for path in SCRIPTS} | {"train", "eval", "merge", "tests"}
    tree = ast.parse(script.read_text(encoding="utf-8"))
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert not imported & ours


@every_script
def test_help_answers_before_any_heavy_import(script: Path) -> None:
    block = f"import sys, runpy; sys.modules.update(dict.fromkeys({HEAVY!r}))"
    call = f"sys.argv[:] = [{str(script)!r}, '--help']"
    call += f"; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", f"{block}; {call}"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def definitions(script: Path) -> dict[str, str]:
    """Source text of every top-level function, class and constant, decorators included."""
    source = script.read_text(encoding="utf-8")
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names, decorators = [node.name], node.decorator_list
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            decorators = []
        else:
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        for name in names:
            found[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def test_one_name_means_one_thing_in_every_script() -> None:
    """A function, class or constant that two scripts both define reads the same in both."""
    versions: dict[str, dict[str, str]] = defaultdict(dict)
    for script in SCRIPTS:
        for name, text in definitions(script).items():
            versions[name].setdefault(text, str(script.relative_to(ROOT)))
    differences = []
    for name, texts in versions.items():
        if len(texts) > 1 and name not in OWN_NAMES:
            (one, first), (other, second) = list(texts.items())[:2]
            lines = difflib.unified_diff(
                one.splitlines(), other.splitlines(), first, second, lineterm=""
            )
            differences.append(f"{name}:\n" + "\n".join(lines))
    assert not differences, "\n\n".join(differences)


@every_script
def test_every_shared_function_is_used(script: Path) -> None:
    source = script.read_text(encoding="utf-8")
    unused = [
        name
        for name in definitions(script)
        if name != "main" and len(re.findall(rf"\b{re.escape(name)}\b", source)) < 2
    ]
    assert not unused


@every_script
def test_the_script_knows_its_own_name(script: Path) -> None:
    assert f'SCRIPT = "{script.relative_to(ROOT)}"' in script.read_text(encoding="utf-8")


def test_nothing_shadows_a_library() -> None:
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    assert not list(ROOT.glob("*/__init__.py")) and not list(ROOT.glob("*/*/__init__.py"))
    assert not {path.stem for path in SCRIPTS} & taken
    assert "site-packages" in (find_spec("datasets").origin or "")


def test_the_header_fills_in_the_job(tmp_path: Path) -> None:
    """`hf jobs uv run --dry-run train/train.py` says flavor, timeout and secrets by itself."""
    hf = str(Path(sys.executable).with_name("hf"))
    command = [hf, "jobs", "uv", "run", "--dry-run", str(ROOT / "train/train.py")]
    env = {**os.environ, "HF_TOKEN": "hf_secret_of_the_caller", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown
    for part in ("a100-large", "HF_TOKEN", "hsd-train"):
        assert part in shown
    assert "hf_secret_of_the_caller" not in shown
