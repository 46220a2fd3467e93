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
"""Fit an adapter's temperature and cut-offs on posts of their own, and store them as a profile."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

SCRIPT = "eval/calibrate.py"
SCHEMA = 1
CONTRACT = "contract.json"

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


# --- shared: the same text in every script that has it ---------------------------------------


def visible(text: str, most: int = 60) -> str:
    """Text as shown to people: control and direction characters as escapes, long text cut."""
    text = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    return text if len(text) <= most else f"{text[: most - 1]}…"


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one message that says what is wrong, what there is and what to do.

    Exit codes: 1 the Hub or the run failed, 2 arguments, config or data that the user must change.
    """
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


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


def is_folder(argument: str) -> bool:
    """Say whether a repo argument means a local folder: ids never begin with ./, ../, ~ or /."""
    return argument in (".", "..") or argument.startswith(("./", "../", "~", "/"))


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
