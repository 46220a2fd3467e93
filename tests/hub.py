"""A loopback Hub and Jobs server for the real clients: huggingface_hub, hf_xet, datasets, `hf`.

    python tests/hub.py --root /tmp/hub

prints two `export` lines for the shell that is to use it, and serves until Ctrl-C. From Python:

    with Hub(root) as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)

Everything lies in ROOT in plain form, so that a person can look into it:

    models/alice/hsd-lora/main/         the files of the branch main, as committed
    models/alice/hsd-lora/.hub/         repo.json (branches, tags, visibility), commits/OID.json
    datasets/alice/hsd-data/...         the same for dataset repos
    buckets/alice/jobs-artifacts/       the files of a bucket
    jobs/ID/                            job.json, log.jsonl; machine/ while the job runs
    blobs/SHA256                        every file's bytes, once; main/ holds hard links to them
    xet/                                what the Xet uploads are put together from

A commit is one os.replace of repo.json: it is there as a whole or not at all, and a server that is
killed at any point loses nothing it has answered. One server owns a ROOT at a time.
Needs the package lz4 for Xet uploads, otherwise the standard library.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

DEFAULT_USERS = ("alice:hf_alice:write", "alice:hf_alice_read:read", "bob:hf_bob:write")
DEFAULT_GRACE = 10.0  # seconds from SIGTERM to SIGKILL, docker's default; the Hub's is not public
DEFAULT_TIMEOUT = 1800  # seconds that a job may run, the Hub's default

# ------------------------------------------------------------------------------------------
# The server as its users see it
# ------------------------------------------------------------------------------------------


class Hub:
    """A Hub on 127.0.0.1, by default on a free port; a context manager that serves from a thread.

    `uploads`: "xet" lets the client choose; "lfs" also puts HF_HUB_DISABLE_XET=1 into `env()` and
    the jobs; "regular" takes every file inside the commit. `grace` is the time in seconds that a
    job has between SIGTERM and SIGKILL; with 0 there is no SIGTERM. `job_env` adds NAME=VALUE, or
    NAME from this process, to every job. `page_size` is the length of a page of every listing.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        port: int = 0,
        uploads: str = "xet",
        grace: float = DEFAULT_GRACE,
        job_env: Sequence[str] = (),
        users: Sequence[str] = DEFAULT_USERS,
        page_size: int = 1000,
        own_process: bool = False,
    ) -> None:
        self.root = Path(root or tempfile.mkdtemp(prefix="hub-")).absolute()
        self.uploads, self.grace, self.job_env = uploads, grace, job_env
        self.page_size, self.own_process = page_size, own_process
        entries = [entry.split(":") for entry in users]
        self.users = {token: {"name": name, "role": role} for name, token, role in entries}
        self.token = entries[0][1]
        self.requests: list[tuple[str, str, int]] = []  # method, path, status; 0 if cut
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.store = Store(self.root)
        self.jobs = load_jobs(self)
        self.connections: set[socket.socket] = set()
        self.server = Server(("127.0.0.1", port), Request)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving; running jobs are killed, connections that clients keep alive are cut."""
        self.server.shutdown()
        self.server.server_close()
        jobs = list(self.jobs.values())
        for job in jobs:
            job.stop_reason = job.stop_reason or SERVER_STOPPED
        for job in jobs:
            if job.thread.is_alive():
                job.thread.join()
        with self.lock:
            open_connections = list(self.connections)
        for connection in open_connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def env(self, token: str | None = None, home: str | Path | None = None) -> dict[str, str]:
        """Return the variables that point a client process here; `home` is its HF_HOME."""
        env = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": token or self.token}
        env["HF_HUB_DISABLE_TELEMETRY"] = "1"
        if self.uploads == "lfs":
            env["HF_HUB_DISABLE_XET"] = "1"
        return env if home is None else {**env, "HF_HOME": str(home)}

    def repo_folder(self, repo_id: str, repo_type: str = "model") -> Path:
        """Return the folder that holds the files of the repo's branch main.

        They are hard links to the blobs: writing into one corrupts what the server serves.
        """
        return self.store.repo(repo_type + "s", repo_id).folder / "main"

    def commits(self, repo_id: str, repo_type: str = "model") -> list[dict[str, Any]]:
        """Return main's commits, newest first: oid, message, files {path: {sha256, size, ...}}."""
        repo = self.store.repo(repo_type + "s", repo_id)
        return [
            {"oid": commit["oid"], "message": commit["title"], "files": commit["files"]}
            for commit in repo.history(repo.resolve("main"))
        ]

    def add_fault(self, **fields: Any) -> None:
        """Add a fault, see `Fault`; the same over HTTP is POST /_hub/faults."""
        fault = Fault(**fields)
        if fault.kill and not self.own_process:
            raise ValueError("kill=True would end this process: start tests/hub.py by itself")
        with self.lock:
            self.faults.append(fault)

    def clear_faults(self) -> None:
        """Remove every fault, spent or not."""
        with self.lock:
            self.faults.clear()


@dataclass
class Fault:
    """What goes wrong with the requests whose path, query included, contains the regex `path`.

    A request is hit by one fault at most, the oldest that fits. The first `skip` matches pass, the
    next `times` are hit (None: all). `delay_s` waits before the work. `status` and `headers` answer
    instead of the work. `drop` cuts the connection: "before" the work, or "after" the work is done
    and before its answer. `kill` ends the server process at that same point, by default before.
    """

    path: str = ""
    method: str | None = None
    status: int | None = None
    headers: dict[str, str] | None = None
    delay_s: float = 0
    drop: str | None = None
    kill: bool = False
    times: int | None = 1
    skip: int = 0

    def __post_init__(self) -> None:
        re.compile(self.path)
        if self.drop not in (None, "before", "after"):
            raise ValueError(f'drop is "before", "after" or None, not {self.drop!r}')

    def hits(self, method: str, path: str) -> bool:
        """Say whether this request is hit, and count it."""
        if self.times == 0 or self.method not in (None, method) or not re.search(self.path, path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True

    def strike(self, moment: str) -> None:
        """Do what is due "before" or "after" the work."""
        if moment == "before":
            time.sleep(self.delay_s)
        if (self.drop or "before") == moment and (self.drop or self.kill):
            if self.kill:
                os._exit(137)
            raise Dropped
        if self.status is not None:
            raise Refusal(self.status, "injected fault", headers=self.headers)


# ------------------------------------------------------------------------------------------
# HTTP: routing, access, bodies
# ------------------------------------------------------------------------------------------


class Refusal(Exception):
    """An answer other than success; `code` is the X-Error-Code that the clients switch on."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        **body: str,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **body}
        # A header holds one line of ASCII, a message may quote any path.
        line = message.replace("\n", " ").encode("ascii", "replace").decode()
        self.headers = {"X-Error-Message": line, **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code


class Dropped(Exception):
    """The connection ends here without an answer."""


class Route(NamedTuple):
    method: str
    pattern: re.Pattern[str]
    handler: Callable[..., Any]
    write: bool
    stream: bool


ROUTES: list[Route] = []
PLACEHOLDERS = {
    "{repo}": r"(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+(?:/[^/]+)?)",
    "{page}": r"(?:/(?P<kind>datasets|spaces))?/(?P<repo_id>[^/]+(?:/[^/]+?)?)",
    "{bucket}": r"(?P<bucket>[^/]+/[^/]+)",
    "{job}": r"(?P<job>[^/]+/[^/]+)",
    "{rev}": r"(?P<rev>[^/]+)",
    "{name}": r"(?P<name>[^/]+)",
    "{path}": r"(?P<path>.+)",
    "{hash}": r"(?P<hash>[0-9a-f]{64})",
}


def route(methods: str, template: str, write: bool = False, stream: bool = False) -> Callable:
    """Register a handler; the first route that fits, in the order of this file, is taken.

    A template with {repo} or {page} (a repo's web address) hands over the `Repo`, {job} the `Job`,
    after the check that the user may see it, or with `write` change it. `write` also holds the
    hub's lock around the handler; `stream` leaves the body to the handler.
    """
    for placeholder, regex in PLACEHOLDERS.items():
        template = template.replace(placeholder, regex)

    def register(handler: Callable) -> Callable:
        for method in methods.split():
            ROUTES.append(Route(method, re.compile(template), handler, write, stream))
        return handler

    return register


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    hub: Hub


class Request(BaseHTTPRequestHandler):
    """One connection; `answer` runs once per request on it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        super().setup()
        self.hub, self.store = self.server.hub, self.server.hub.store
        with self.hub.lock:
            self.hub.connections.add(self.connection)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # Clients go away, and faults cut them off.
            super().handle()

    def finish(self) -> None:
        with self.hub.lock:
            self.hub.connections.discard(self.connection)
        with contextlib.suppress(ConnectionError):
            super().finish()

    def log_message(self, *_: object) -> None:
        """Requests are kept in `hub.requests` instead of on stderr."""

    def answer(self) -> None:
        """Apply the faults, run the handler, and send its answer or its refusal."""
        self.status = 0
        self.chunks = self.read_chunks()
        with self.hub.lock:
            fault = next((f for f in self.hub.faults if f.hits(self.command, self.path)), Fault())
        try:
            fault.strike("before")
            reply = self.dispatch()
            fault.strike("after")
            self.send(*(reply if isinstance(reply, tuple) else (200, reply)))
        except Refusal as refusal:
            self.send(refusal.status, refusal.body, refusal.headers)
        except Dropped:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        except ConnectionError:
            raise
        except Exception as error:
            traceback.print_exc()
            self.send(500, {"error": f"{type(error).__name__}: {error}"})
        finally:
            self.hub.requests.append((self.command, self.path, self.status))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = answer

    def dispatch(self) -> Any:
        """Run the handler that fits and return its answer: JSON, or (status, content, headers)."""
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.user = self.authenticate()
        for route in ROUTES:
            match = route.pattern.fullmatch(url.path)
            if match is None or route.method != self.command:
                continue
            found = {key: unquote(value) for key, value in match.groupdict("").items()}
            if "repo_id" in found:
                kind = found.pop("kind") or "models"
                found["repo"] = self.repo(kind, found.pop("repo_id"), route.write)
            if "job" in found:
                found["job"] = self.job(found["job"], route.write)
            self.content = b"" if route.stream else b"".join(self.chunks)
            with self.hub.lock if route.write else contextlib.nullcontext():
                return route.handler(self, **found)
        raise Refusal(404, f"no such endpoint: {self.command} {url.path}")

    def authenticate(self) -> dict[str, str] | None:
        """Return the token's user, None without a token; 401 for an unknown token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token or token == XET_TOKEN:
            return None
        if token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def require_user(self, namespace: str | None = None, write: bool = False) -> dict[str, str]:
        """Return the user; 401 without a token, 403 where it may not act in the namespace."""
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if namespace not in (None, self.user["name"]):
            raise Refusal(403, f"You don't have the rights to act in the namespace {namespace}")
        if write and self.user["role"] != "write":
            raise Refusal(403, "Your token is read-only: this needs a token with the role write")
        return self.user

    def repo(self, kind: str, repo_id: str, write: bool = False) -> Repo:
        """Return the repo if the user may see it, or write to it; else refuse as the Hub does.

        A private repo of somebody else looks like a missing one; both are 401 without a token.
        """
        repo = self.store.repos.get((kind, repo_id))
        owner = repo_id.split("/")[0]
        if repo is None or (repo.state["private"] and (self.user or {}).get("name") != owner):
            if self.user is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write:
            self.require_user(owner, write=True)
        return repo

    def job(self, address: str, write: bool = False) -> Job:
        namespace, job_id = address.split("/")
        self.require_user(namespace, write)
        if job_id not in self.hub.jobs:
            raise Refusal(404, f"Job not found: {job_id}")
        return self.hub.jobs[job_id]

    # Bodies and answers -------------------------------------------------------------------

    def read_chunks(self) -> Iterator[bytes]:
        """Yield the request's body, whether it has a length or comes in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            chunk = self.rfile.read(min(left, 2**20))
            if not chunk:
                raise ConnectionError("the client went away inside a body")
            left -= len(chunk)
            yield chunk

    def json(self) -> Any:
        try:
            return json.loads(self.content or b"{}")
        except ValueError as error:
            raise Refusal(400, f"the body is not JSON: {error}") from None

    def ndjson(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.content.splitlines() if line.strip()]

    def page(self, items: list) -> tuple:
        """Return one page of the items; the Link header names the next, as `paginate` follows."""
        start = int(self.query.get("cursor", 0))
        end = start + self.hub.page_size
        headers = {}
        if end < len(items):
            query = urlencode({**self.query, "cursor": end})
            url = f"{self.hub.endpoint}{urlsplit(self.path).path}?{query}"
            headers["Link"] = f'<{url}>; rel="next"'
        return 200, items[start:end], headers

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        """Send JSON, a file's Path, or an iterator of bytes, which ends with the connection."""
        for _ in self.chunks:  # A body left unread would be taken for the next request.
            pass
        headers = dict(headers or {})
        if isinstance(content, Path):
            status, chunks = file_range(content, self.headers.get("Range", ""), headers)
        elif isinstance(content, Iterator):
            chunks, headers["Connection"] = content, "close"
        else:
            chunks = [json.dumps(content).encode()]
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(chunks[0]))}
        self.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for chunk in chunks:
                self.wfile.write(chunk)


def file_range(path: Path, asked: str, headers: dict[str, str]) -> tuple[int, Iterator[bytes]]:
    """Return status and bytes of a file, or of the one byte range asked for; complete headers."""
    size = path.stat().st_size
    start, end, status = 0, size, 200
    if match := re.fullmatch(r"bytes=(\d*)-(\d*)", asked):
        first, last = match.groups()
        start = int(first) if first else max(size - int(last), 0)
        end = min(int(last) + 1, size) if first and last else size
        status = 206
        if start >= end:
            raise Refusal(416, "no such range", headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers |= {"Content-Length": str(end - start), "Accept-Ranges": "bytes"}
    headers["Content-Type"] = "application/octet-stream"

    def read() -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(start)
            for at in range(start, end, 2**20):
                yield file.read(min(end - at, 2**20))

    return status, read()


# ------------------------------------------------------------------------------------------
# Endpoints: account and repos
# ------------------------------------------------------------------------------------------


@route("POST", "/_hub/faults")
def post_fault(request: Request) -> dict:
    """Add a fault to a server that was started by hand: the fields of `Fault` as JSON."""
    try:
        request.hub.add_fault(**request.json())
    except (TypeError, ValueError, re.error) as error:
        raise Refusal(400, str(error)) from None
    return {}


@route("DELETE", "/_hub/faults")
def delete_faults(request: Request) -> dict:
    """Remove every fault."""
    request.hub.clear_faults()
    return {}


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> dict:
    """`HfApi.whoami`, `hf auth whoami`."""
    user = request.require_user()
    account = {"type": "user", "id": object_id(user["name"]), "name": user["name"]}
    token = {"displayName": "loopback", "role": user["role"]}
    access = {"type": "access_token", "accessToken": token}
    return {**account, "fullname": user["name"], "isPro": False, "orgs": [], "auth": access}


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> dict:
    """`ModelCard.validate`, and every commit that holds a README.md; the content is not judged."""
    return {"errors": [], "warnings": []}


@route("POST", "/api/repos/create")
def create_repo(request: Request) -> dict:
    """`HfApi.create_repo`; 409 carries the url that `exist_ok=True` reads."""
    body = request.json()
    namespace = body.get("organization") or request.require_user()["name"]
    user = request.require_user(namespace, write=True)
    kind, repo_id = body.get("type", "model") + "s", f"{namespace}/{body['name']}"
    private = body.get("visibility") == "private" or body.get("private", False)
    with request.hub.lock:
        created = request.store.create(kind, repo_id, private, user["name"])
    url = f"{request.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
    if not created:
        raise Refusal(409, f"You already created this {kind[:-1]} repo", url=url)
    return {"url": url, "name": repo_id}


@route("DELETE", "/api/repos/delete")
def delete_repo(request: Request) -> dict:
    """`HfApi.delete_repo`."""
    body = request.json()
    namespace = body.get("organization") or request.require_user()["name"]
    repo = request.repo(body.get("type", "model") + "s", f"{namespace}/{body['name']}", write=True)
    with request.hub.lock:
        request.store.delete(repo)
    return {}


@route("PUT", "/api/{repo}/settings", write=True)
def update_settings(request: Request, repo: Repo) -> dict:
    """`HfApi.update_repo_settings(private=...)`."""
    repo.save(private=request.json().get("visibility") == "private")
    return {"private": repo.state["private"]}


@route("GET", "/api/{repo}/auth-check")
@route("GET", "/api/{repo}/auth-check/write", write=True)
def auth_check(request: Request, repo: Repo) -> dict:
    """`HfApi.auth_check(write=...)`: the access was checked on the way here."""
    return {}


@route("POST", "/api/{repo}/preupload/{rev}", write=True)
def preupload(request: Request, repo: Repo, rev: str) -> dict:
    """First step of every upload: how each file is to come, and the oid of what is there.

    The client drops a file whose own oid is equal, so that an unchanged folder makes no commit.
    """
    files = repo.files(rev)
    answers = []
    for asked in request.json()["files"]:
        lfs = request.hub.uploads != "regular" and is_lfs(asked)
        answer = {"path": asked["path"], "uploadMode": "lfs" if lfs else "regular"}
        present = files.get(asked["path"])
        if present and present["lfs"] == lfs:
            answer["oid"] = present["sha256"] if lfs else present["oid"]
        answers.append({**answer, "shouldIgnore": False})
    return {"files": answers}


# The Hub decides by a repo's .gitattributes and by content; here suffix, size and sample do.
LFS_SUFFIXES = (".arrow", ".bin", ".gz", ".model", ".npz", ".parquet", ".pt", ".safetensors")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs\n" for suffix in LFS_SUFFIXES)
REGULAR_LIMIT = 10 * 2**20  # bytes


def is_lfs(asked: dict[str, Any]) -> bool:
    """Decide from name, size and the first 512 bytes whether a file is stored outside git."""
    if asked["path"].endswith(LFS_SUFFIXES) or asked["size"] > REGULAR_LIMIT:
        return True
    return b"\0" in base64.b64decode(asked.get("sample", ""))


@route("POST", "/api/{repo}/commit/{rev}", write=True)
def commit(request: Request, repo: Repo, rev: str) -> dict:
    """`HfApi.create_commit` and whatever ends in it; 412 where parentCommit is not the head."""
    if "create_pr" in request.query:
        raise Refusal(400, "pull requests are not implemented here")
    lines = request.ndjson()
    header = next((line["value"] for line in lines if line["key"] == "header"), {})
    head = repo.branch_head(rev)
    if header.get("parentCommit") not in (None, head):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repo.commit(head)["files"])
    for line in lines:
        apply_change(request.store, files, line["key"], line["value"])
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents}
    if both := folders & files.keys():
        raise Refusal(400, f"both a file and a folder: {', '.join(sorted(both))}")
    text = header.get("summary", ""), header.get("description", "")
    oid = repo.add_commit(rev, head, files, *text, request.user["name"])
    prefix = "" if repo.kind == "models" else repo.kind + "/"
    url = f"{request.hub.endpoint}/{prefix}{repo.id}/commit/{oid}"
    return {"success": True, "commitOid": oid, "commitUrl": url}


def apply_change(store: Store, files: dict[str, dict], change: str, value: dict) -> None:
    """Apply one line of a commit to the manifest; the lines are applied in the order they came."""
    if change == "header":
        return
    path = checked_path(value["path"].rstrip("/"))
    if change == "file":
        content = base64.b64decode(value["content"])
        files[path] = file_entry(store.put(iter([content])), len(content), git_oid(content), False)
    elif change == "lfsFile":
        if not store.blob(value["oid"]).exists():
            raise Refusal(400, f"the content of {path} was not uploaded: {value['oid']}")
        size = store.blob(value["oid"]).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\n"
        pointer_oid = git_oid(f"{pointer}size {size}\n".encode())
        files[path] = file_entry(value["oid"], size, pointer_oid, True)
    elif change in ("deletedFile", "deletedFolder"):
        inside = path + "/" if change == "deletedFolder" else None
        gone = [p for p in files if (p.startswith(inside) if inside else p == path)]
        if not gone:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        for p in gone:
            del files[p]
    else:
        raise Refusal(400, f"unknown operation: {change}")


def checked_path(path: str) -> str:
    """Return the path if it stays inside the folder it is put into."""
    if any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise Refusal(400, f"invalid path: {path!r}")
    return path


@route("POST", "/api/{repo}/super-squash/{rev}", write=True)
def super_squash(request: Request, repo: Repo, rev: str) -> dict:
    """`HfApi.super_squash_history`: the branch keeps its files and one commit."""
    files = repo.commit(repo.branch_head(rev))["files"]
    title = request.json().get("message", "")
    oid = repo.add_commit(rev, None, files, title, "", request.user["name"])
    repo.forget_unreachable()
    return {"commitOid": oid}


@route("GET", "/api/{repo}/refs")
def list_refs(request: Request, repo: Repo) -> dict:
    """`HfApi.list_repo_refs`."""
    refs: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for name, oid in repo.state["branches"].items():
        convert = name.startswith("refs/convert/")
        ref = name if convert else f"refs/heads/{name}"
        entry = {"name": name.removeprefix("refs/convert/"), "ref": ref, "targetCommit": oid}
        refs["converts" if convert else "branches"].append(entry)
    for name, oid in repo.state["tags"].items():
        refs["tags"].append({"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid})
    return refs


@route("POST", "/api/{repo}/branch/{name}", write=True)
def create_branch(request: Request, repo: Repo, name: str) -> dict:
    """`HfApi.create_branch(branch=..., revision=...)`."""
    repo.add_ref("branches", name, request.json().get("startingPoint", "main"))
    return {}


@route("POST", "/api/{repo}/tag/{rev}", write=True)
def create_tag(request: Request, repo: Repo, rev: str) -> dict:
    """`HfApi.create_tag(tag=..., revision=...)`."""
    repo.add_ref("tags", request.json()["tag"], rev)
    return {}


@route("DELETE", "/api/{repo}/branch/{name}", write=True)
def delete_branch(request: Request, repo: Repo, name: str) -> dict:
    """`HfApi.delete_branch`."""
    if name == "main":
        raise Refusal(403, "The branch main cannot be deleted")
    repo.delete_ref("branches", name)
    return {}


@route("DELETE", "/api/{repo}/tag/{name}", write=True)
def delete_tag(request: Request, repo: Repo, name: str) -> dict:
    """`HfApi.delete_tag`."""
    repo.delete_ref("tags", name)
    return {}


@route("GET", "/api/{repo}/commits/{rev}")
def list_commits(request: Request, repo: Repo, rev: str) -> tuple:
    """`HfApi.list_repo_commits`."""
    history = []
    for commit in repo.history(repo.resolve(rev)):
        text = {key: commit[key] for key in ("title", "message", "date")}
        history.append({"id": commit["oid"], "authors": [{"user": commit["author"]}], **text})
    return request.page(history)


@route("GET", "/api/{repo}/tree/{rev}(?:/{path})?")
def list_tree(request: Request, repo: Repo, rev: str, path: str) -> tuple:
    """`HfApi.list_repo_tree`, `list_repo_files`, `snapshot_download`."""
    oid = repo.resolve(rev)
    inside = path.strip("/") + "/" if path.strip("/") else ""
    recursive = request.query.get("recursive", "").lower() == "true"
    expand = request.query.get("expand", "").lower() == "true"
    names = set()
    for name in repo.files(oid):
        if name.startswith(inside):
            # From the file itself up to the entry that lies directly in the listed folder.
            steps = [inside + str(p) for p in below(PurePosixPath(name[len(inside) :]))]
            names.update(steps if recursive else steps[-1:])
    if inside and not names:
        raise Refusal(404, f"{path} does not exist on {rev}", "EntryNotFound")
    return request.page([repo.item(oid, name, expand) for name in sorted(names)])


def below(path: PurePosixPath) -> list[PurePosixPath]:
    """Return the path and its parents, without the root."""
    return [path, *path.parents][:-1]


@route("POST", "/api/{repo}/paths-info/{rev}")
def paths_info(request: Request, repo: Repo, rev: str) -> list:
    """`HfApi.get_paths_info`, as a form or as JSON; what does not exist is left out."""
    oid = repo.resolve(rev)
    if "json" in request.headers.get("Content-Type", ""):
        form = request.json()
    else:
        form = parse_qs(request.content.decode())
    expand = form.get("expand") not in (None, False, ["False"], ["false"])
    exists = {str(step) for name in repo.files(oid) for step in below(PurePosixPath(name))}
    paths = [path.strip("/") for path in form.get("paths", [])]
    return [repo.item(oid, path, expand) for path in paths if path in exists]


@route("GET", "/api/{repo}/lfs-files")
def list_lfs_files(request: Request, repo: Repo) -> tuple:
    """`HfApi.list_lfs_files`: also what no commit refers to any more, because it still counts."""
    live = {entry["sha256"] for entry in repo.files("main").values()}
    return request.page(
        [
            {"fileOid": sha, "oid": sha, "ref": "main" if sha in live else None, **record}
            for sha, record in repo.state["lfs"].items()
        ]
    )


@route("POST", "/api/{repo}/lfs-files/batch", write=True)
def delete_lfs_files(request: Request, repo: Repo) -> dict:
    """`HfApi.permanently_delete_lfs_files(rewrite_history=...)`."""
    deletions = request.json()["deletions"]
    gone = set(deletions["sha"])
    if deletions.get("rewriteHistory", True):
        repo.rewrite_without(gone)
    repo.save(lfs={sha: kept for sha, kept in repo.state["lfs"].items() if sha not in gone})
    for sha in gone:
        request.store.drop_blob(sha)
    return {}


@route("GET HEAD", "{page}/resolve/{rev}/{path}")
def resolve_file(request: Request, repo: Repo, rev: str, path: str) -> tuple:
    """`hf_hub_download` and everything above it: HEAD for the metadata, GET for the bytes."""
    oid = repo.resolve(rev)
    entry = repo.files(oid).get(path)
    headers = {"X-Repo-Commit": oid}
    if entry is None or not request.store.blob(entry["sha256"]).exists():
        raise Refusal(404, "Entry not found", "EntryNotFound", headers)
    headers["ETag"] = f'"{entry["oid"]}"'
    if entry["lfs"]:
        headers |= {"X-Linked-Etag": f'"{entry["sha256"]}"', "X-Linked-Size": str(entry["size"])}
    return 200, request.store.blob(entry["sha256"]), headers


@route("GET", "/api/models")
def list_models(request: Request) -> list[dict]:
    """`HfApi.list_models(author=...)`: all models that the user may see."""
    author, found = request.query.get("author"), []
    for kind, name in sorted(request.store.repos):
        if kind == "models" and author in (None, name.split("/")[0]):
            with contextlib.suppress(Refusal):
                found.append(repo_info(request, request.repo(kind, name)))
    return found


@route("GET", "/api/{repo}/revision/{rev}")
@route("GET", "/api/{repo}")
def repo_info(request: Request, repo: Repo, rev: str = "main") -> dict:
    """`HfApi.repo_info`, `model_info`, `dataset_info`, `repo_exists`."""
    head = repo.commit(repo.resolve(rev))
    siblings = []
    for path, entry in sorted(head["files"].items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if "blobs" in request.query:
            sibling |= {"size": entry["size"], "blobId": entry["oid"], "lfs": lfs_item(entry)}
        siblings.append(sibling)
    return {
        "_id": object_id(f"{repo.kind}/{repo.id}"),
        "id": repo.id,
        "author": repo.id.split("/")[0],
        "sha": head["oid"],
        "private": repo.state["private"],
        "gated": False,
        "disabled": False,
        "createdAt": repo.state["createdAt"],
        "lastModified": head["date"],
        "usedStorage": sum(record["size"] for record in repo.state["lfs"].values()),
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
    }


# ------------------------------------------------------------------------------------------
# Endpoints: content uploads by LFS and by Xet, buckets
# ------------------------------------------------------------------------------------------

XET_TOKEN = "xet-loopback"  # for whoever may write; the content store itself trusts every client


@route("POST", r"{page}\.git/info/lfs/objects/batch", write=True)
def lfs_batch(request: Request, repo: Repo) -> dict:
    """Uploads with HF_HUB_DISABLE_XET=1 or from a stream: where to put each object."""
    objects = []
    for asked in request.json()["objects"]:
        answer = {"oid": asked["oid"], "size": asked["size"]}
        if not request.store.blob(asked["oid"]).exists():
            url = f"{request.hub.endpoint}/_lfs/{asked['oid']}"
            answer["actions"] = {"upload": {"href": url}}
        objects.append(answer)
    return {"transfer": "basic", "objects": objects}


@route("PUT", "/_lfs/{hash}", stream=True)
def lfs_put(request: Request, hash: str) -> dict:
    """The object itself; its address is the authorisation, as a presigned one's is."""
    return {"oid": request.store.put(request.chunks, expected=hash)}


@route("GET", "/api/{repo}/xet-read-token/{rev}")
@route("GET", "/api/{repo}/xet-write-token/{rev}", write=True)
def repo_xet_token(request: Request, repo: Repo, rev: str) -> tuple:
    """hf_xet, before it uploads to a repo."""
    return xet_token(request)


def xet_token(request: Request) -> tuple:
    url = f"{request.hub.endpoint}/_cas/{request.store.xet_id}"
    expires = int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": XET_TOKEN}
    headers["X-Xet-Token-Expiration"] = str(expires)
    return 200, {"casUrl": url, "accessToken": XET_TOKEN, "exp": expires}, headers


@route("POST", "/_cas/[^/]+/v1/xorbs/default/{hash}")
def put_xorb(request: Request, hash: str) -> dict:
    """hf_xet: a block of compressed chunks."""
    replace_file(request.store.xorb(hash), request.content)
    return {"was_inserted": True}


@route("POST", "/_cas/[^/]+/v1/shards")
def put_shard(request: Request) -> dict:
    """hf_xet: which chunks of which blocks make up each file; the files are put together here."""
    for file_hash, segments in shard_files(request.content):
        request.store.put_xet(file_hash, segments)
    return {"result": 1}


@route("POST", "/api/buckets/{bucket}")
def create_bucket(request: Request, bucket: str) -> dict:
    """`HfApi.create_bucket`; `hf jobs uv run LOCAL.py` keeps its scripts in one."""
    request.require_user(bucket.split("/")[0], write=True)
    url = f"{request.hub.endpoint}/buckets/{bucket}"
    folder = request.store.bucket(bucket)
    if folder.exists():
        raise Refusal(409, "You already created this bucket", url=url)
    folder.mkdir(parents=True)
    return {"url": url, "id": bucket}


@route("GET", "/api/buckets/{bucket}/xet-write-token")
def bucket_xet_token(request: Request, bucket: str) -> tuple:
    """hf_xet, before it uploads to a bucket."""
    request.require_user(bucket.split("/")[0], write=True)
    return xet_token(request)


@route("POST", "/api/buckets/{bucket}/batch")
def bucket_batch(request: Request, bucket: str) -> dict:
    """`HfApi.batch_bucket_files`: give uploaded content its paths, or delete paths."""
    request.require_user(bucket.split("/")[0], write=True)
    folder = request.store.bucket(bucket)
    for line in request.ndjson():
        path = folder / checked_path(line["path"])
        if line["type"] == "addFile":
            path.parent.mkdir(parents=True, exist_ok=True)
            # A copy, because a job may write to its bucket.
            shutil.copyfile(request.store.blob(request.store.xet_sha256(line["xetHash"])), path)
        elif line["type"] == "deleteFile":
            path.unlink(missing_ok=True)
        else:
            raise Refusal(400, f"not implemented here: {line['type']}")
    return {"success": True, "failed": []}


# ------------------------------------------------------------------------------------------
# Endpoints: Jobs
# ------------------------------------------------------------------------------------------


@route("GET", "/api/jobs/hardware")
def list_hardware(request: Request) -> list:
    """`HfApi.list_jobs_hardware`, `hf jobs hardware`."""
    return [hardware_item(flavor) for flavor in HARDWARE.values()]


@route("POST", "/api/jobs/{name}")
def run_job(request: Request, name: str) -> dict:
    """`HfApi.run_job`, `run_uv_job`, `hf jobs run`, `hf jobs uv run`."""
    user = request.require_user(name, write=True)
    return start_job(request.hub, user["name"], request.json(), "user").item()


@route("GET", "/api/jobs/{name}")
def list_jobs(request: Request, name: str) -> tuple:
    """`HfApi.list_jobs(status=..., labels=...)`, `hf jobs ls`; newest first."""
    request.require_user(name)
    wanted = parse_qs(urlsplit(request.path).query)
    stages, labels = wanted.get("stage", []), [x.split("=", 1) for x in wanted.get("label", [])]
    found = [
        job.item()
        for job in request.hub.jobs.values()
        if job.info["owner"]["name"] == name
        and (not stages or job.info["status"]["stage"] in stages)
        and all((job.info["labels"] or {}).get(key) == value for key, value in labels)
    ]
    return request.page(sorted(found, key=lambda item: item["createdAt"], reverse=True))


@route("GET", "/api/jobs/{job}")
def inspect_job(request: Request, job: Job) -> dict:
    """`HfApi.inspect_job`, `wait_for_job`, `hf jobs inspect`, `hf jobs wait`."""
    return job.item()


@route("GET", "/api/jobs/{job}/logs")
def job_logs(request: Request, job: Job) -> tuple:
    """`HfApi.fetch_job_logs`, `hf jobs logs`: server-sent events until the job has ended."""
    events = job.events(int(request.query.get("tail", 0)))
    return 200, events, {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}


@route("POST", "/api/jobs/{job}/cancel", write=True)
def cancel_job(request: Request, job: Job) -> dict:
    """`HfApi.cancel_job`: the stage turns to CANCELED when the processes have ended."""
    job.stop_reason = job.stop_reason or "canceled"
    return job.item()


@route("POST", "/api/jobs/{job}/duplicate", write=True)
def rerun_job(request: Request, job: Job) -> dict:
    """`HfApi.rerun_job`: a new job of the same specification, secrets included."""
    spec = {**job.info, "secrets": job.secrets, "attempts": job.info["retry"] + 1}
    return start_job(request.hub, request.user["name"], spec, "duplicated-job").item()


@route("PUT", "/api/jobs/{job}/labels", write=True)
def label_job(request: Request, job: Job) -> dict:
    """`HfApi.update_job_labels`, `hf jobs labels`: replaces the labels."""
    job.save(labels=request.json()["labels"])
    return job.item()


# ------------------------------------------------------------------------------------------
# The store: blobs, commits, plain folders
# ------------------------------------------------------------------------------------------


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def object_id(name: str) -> str:
    """Return a stable id in the form that the Hub gives to users, repos and jobs."""
    return hashlib.sha1(name.encode()).hexdigest()[:24]


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def replace_file(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a restart, sees all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(temporary, path)


def file_entry(sha256: str, size: int, oid: str, lfs: bool) -> dict[str, Any]:
    """Return a manifest's record of a file; `oid` is git's, of the pointer where `lfs` is true."""
    return {"sha256": sha256, "size": size, "oid": oid, "lfs": lfs}


def lfs_item(entry: dict[str, Any]) -> dict[str, Any] | None:
    sha256, size = entry["sha256"], entry["size"]
    if not entry["lfs"]:
        return None
    return {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 134}


class Store:
    """The blobs, repos and buckets of one root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True, exist_ok=True)
        # hf_xet remembers per address which blocks it has sent: a new root needs a new address.
        id_file = root / "xet" / "id"
        if not id_file.exists():
            replace_file(id_file, secrets.token_hex(8))
        self.xet_id = id_file.read_text()
        self.repos: dict[tuple[str, str], Repo] = {}
        for state_file in root.glob("*/*/*/.hub/repo.json"):
            repo = Repo(self, json.loads(state_file.read_text()))
            self.repos[repo.kind, repo.id] = repo
            repo.update_folder()

    def repo(self, kind: str, repo_id: str) -> Repo:
        if (kind, repo_id) not in self.repos:
            raise KeyError(f"no repo {kind}/{repo_id}; there are {sorted(self.repos)}")
        return self.repos[kind, repo_id]

    def create(self, kind: str, repo_id: str, private: bool, author: str) -> bool:
        """Create the repo with its first commit; False if it is there."""
        if (kind, repo_id) in self.repos:
            return False
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id):
            raise Refusal(400, f"invalid repo name: {repo_id}")
        state = {"id": repo_id, "kind": kind, "private": private, "createdAt": now()}
        repo = Repo(self, {**state, "branches": {}, "tags": {}, "lfs": {}})
        content = GITATTRIBUTES.encode()
        entry = file_entry(self.put(iter([content])), len(content), git_oid(content), False)
        repo.add_commit("main", None, {".gitattributes": entry}, "initial commit", "", author)
        self.repos[kind, repo_id] = repo
        return True

    def delete(self, repo: Repo) -> None:
        del self.repos[repo.kind, repo.id]
        (repo.folder / ".hub" / "repo.json").unlink()
        shutil.rmtree(repo.folder)

    def bucket(self, bucket_id: str) -> Path:
        return self.root / "buckets" / bucket_id

    def blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256

    def put(self, chunks: Iterator[bytes], expected: str | None = None) -> str:
        """Keep the bytes under their sha256 and return it; 400 if another one was announced."""
        temporary = self.root / "blobs" / f".{secrets.token_hex(8)}"
        digest = hashlib.sha256()
        try:
            with temporary.open("wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            if expected not in (None, digest.hexdigest()):
                raise Refusal(400, f"the content's sha256 is {digest.hexdigest()}, not {expected}")
            os.replace(temporary, self.blob(digest.hexdigest()))
        finally:
            temporary.unlink(missing_ok=True)
        return digest.hexdigest()

    def drop_blob(self, sha256: str) -> None:
        """Delete the bytes unless a commit of any repo refers to them."""
        for repo in self.repos.values():
            for oid in repo.reachable():
                if any(entry["sha256"] == sha256 for entry in repo.commit(oid)["files"].values()):
                    return
        self.blob(sha256).unlink(missing_ok=True)

    def xorb(self, block: str) -> Path:
        return self.root / "xet" / "xorbs" / block

    def put_xet(self, file_hash: str, segments: list[tuple[str, int, int]]) -> None:
        """Put a file together from its segments (block, first chunk, end) and remember its hash."""
        chunks = (
            chunk
            for block, start, end in segments
            for chunk in xorb_chunks(self.xorb(block), start, end)
        )
        replace_file(self.root / "xet" / "files" / file_hash, self.put(chunks))

    def xet_sha256(self, file_hash: str) -> str:
        """Return the sha256 of a file that came by Xet; an empty file's hash is all zeros."""
        if not file_hash.strip("0"):
            return self.put(iter([b""]))
        known = self.root / "xet" / "files" / file_hash
        if not known.exists():
            raise Refusal(400, f"no file with the Xet hash {file_hash} was uploaded")
        return known.read_text()


class Repo:
    """One repo: `state` is repo.json, commits are immutable files beside it."""

    def __init__(self, store: Store, state: dict[str, Any]) -> None:
        self.store, self.state = store, state
        self.kind, self.id = state["kind"], state["id"]
        self.folder = store.root / self.kind / self.id
        self.loaded: dict[str, dict] = {}

    def save(self, **changes: Any) -> None:
        """Change the state: this one os.replace is what makes a commit, a tag or a branch exist."""
        state = {**self.state, **changes}
        replace_file(self.folder / ".hub" / "repo.json", json.dumps(state, indent=1))
        self.state = state

    def commit_file(self, oid: str) -> Path:
        return self.folder / ".hub" / "commits" / f"{oid}.json"

    def commit(self, oid: str) -> dict[str, Any]:
        if oid not in self.loaded:
            self.loaded[oid] = json.loads(self.commit_file(oid).read_text())
        return self.loaded[oid]

    def history(self, oid: str | None) -> Iterator[dict[str, Any]]:
        """Yield the commit and its ancestors, newest first."""
        while oid is not None:
            commit = self.commit(oid)
            yield commit
            oid = commit["parent"]

    def resolve(self, rev: str) -> str:
        """Return the commit of a branch, a tag, a full hash or a ref (refs/convert/parquet)."""
        branches, tags = self.state["branches"], self.state["tags"]
        branch, tag = rev.removeprefix("refs/heads/"), rev.removeprefix("refs/tags/")
        if branch in branches or tag in tags:
            return branches[branch] if branch in branches else tags[tag]
        if re.fullmatch("[0-9a-f]{40}", rev) and self.commit_file(rev).exists():
            return rev
        raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")

    def branch_head(self, name: str) -> str:
        if name not in self.state["branches"]:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return self.state["branches"][name]

    def add_ref(self, sort: str, name: str, rev: str) -> None:
        if name in self.state[sort]:
            raise Refusal(409, f"Reference already exists: {name}")
        self.save(**{sort: {**self.state[sort], name: self.resolve(rev)}})

    def delete_ref(self, sort: str, name: str) -> None:
        if name not in self.state[sort]:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        self.save(**{sort: {k: oid for k, oid in self.state[sort].items() if k != name}})

    def files(self, rev: str) -> dict[str, dict]:
        return self.commit(self.resolve(rev))["files"]

    def add_commit(
        self, branch: str, parent: str | None, files: dict, title: str, message: str, author: str
    ) -> str:
        """Write a commit and make it the branch's head; return its oid."""
        date = now()
        oid = self.write_commit(parent, files, title, message, author, date)
        lfs = dict(self.state["lfs"])
        for path, entry in files.items():
            if entry["lfs"]:
                record = {"filename": path, "size": entry["size"], "pushedAt": date}
                lfs.setdefault(entry["sha256"], record)
        self.save(branches={**self.state["branches"], branch: oid}, lfs=lfs)
        if branch == "main":
            self.update_folder()
        return oid

    def write_commit(
        self, parent: str | None, files: dict, title: str, message: str, author: str, date: str
    ) -> str:
        commit = {"parent": parent, "title": title, "message": message, "author": author}
        commit |= {"date": date, "files": files}
        oid = hashlib.sha1(json.dumps(commit, sort_keys=True).encode()).hexdigest()
        replace_file(self.commit_file(oid), json.dumps({"oid": oid, **commit}, indent=1))
        return oid

    def update_folder(self) -> None:
        """Make main/ hold the head's files; a restart repairs what a kill left half done."""
        files = self.files("main")
        tree = self.folder / "main"
        tree.mkdir(parents=True, exist_ok=True)
        for path in sorted(tree.rglob("*"), reverse=True):
            if path.is_dir():
                with contextlib.suppress(OSError):
                    path.rmdir()  # Fails on folders that still hold something.
            elif path.relative_to(tree).as_posix() not in files:
                path.unlink()
        for name, entry in files.items():
            path, blob = tree / name, self.store.blob(entry["sha256"])
            if not blob.exists() or (path.exists() and path.samefile(blob)):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            os.link(blob, path)

    def reachable(self) -> set[str]:
        """Return the commits that a branch or a tag leads to."""
        tips = [*self.state["branches"].values(), *self.state["tags"].values()]
        return {commit["oid"] for tip in tips for commit in self.history(tip)}

    def forget_unreachable(self) -> None:
        keep = self.reachable()
        for path in (self.folder / ".hub" / "commits").glob("*.json"):
            if path.stem not in keep:
                path.unlink()
                self.loaded.pop(path.stem, None)

    def rewrite_without(self, gone: set[str]) -> None:
        """Rewrite every commit so that no file with these sha256 was ever in it."""
        rewritten: dict[str | None, str | None] = {None: None}

        def rewrite(tip: str) -> str | None:
            for old in reversed(list(self.history(tip))):
                if old["oid"] not in rewritten:
                    kept = {p: e for p, e in old["files"].items() if e["sha256"] not in gone}
                    text = old["title"], old["message"], old["author"], old["date"]
                    new = self.write_commit(rewritten[old["parent"]], kept, *text)
                    rewritten[old["oid"]] = new
            return rewritten[tip]

        refs = {
            s: {n: rewrite(oid) for n, oid in self.state[s].items()} for s in ("branches", "tags")
        }
        self.save(**refs)
        self.forget_unreachable()
        self.update_folder()

    def item(self, oid: str, path: str, expand: bool) -> dict[str, Any]:
        """Return a file or folder as the listings show it; `expand` adds its last commit."""
        entry = self.files(oid).get(path)
        if entry is None:
            tree_id = hashlib.sha1(f"{oid}/{path}".encode()).hexdigest()
            item = {"type": "directory", "path": path, "oid": tree_id, "size": 0}
        else:
            item = {"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"]}
            if entry["lfs"]:
                item["lfs"] = lfs_item(entry)
        if expand:
            last = self.last_change(oid, path)
            item["lastCommit"] = {"id": last["oid"], "title": last["title"], "date": last["date"]}
        return item

    def last_change(self, oid: str, path: str) -> dict[str, Any]:
        """Return the newest commit in which the path, or something below it, changed."""

        def content(commit: dict) -> dict:
            return {p: e for p, e in commit["files"].items() if f"{p}/".startswith(f"{path}/")}

        head = last = self.commit(oid)
        for commit in self.history(oid):
            if content(commit) != content(head):
                break
            last = commit
        return last


# ------------------------------------------------------------------------------------------
# The Xet formats
# ------------------------------------------------------------------------------------------


def hash_hex(raw: bytes) -> str:
    """Return the text form of a Xet hash: four little-endian 64-bit numbers in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def shard_files(shard: bytes) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
    """Yield (file hash, [(block hash, first chunk, end chunk), ...]) for each file of a shard.

    Layout, in records of 48 bytes: a header; per file its hash, flags and number of segments, then
    the segments, then (flag bit 31) as many verification records and (bit 30) one with the sha256;
    a record that begins with 32 bytes 0xff ends the list.
    """
    at = 48
    while shard[at : at + 32] != b"\xff" * 32:
        file_hash = hash_hex(shard[at : at + 32])
        flags, num_segments = struct.unpack_from("<II", shard, at + 32)
        at += 48
        segments = []
        for _ in range(num_segments):
            _, _, start, end = struct.unpack_from("<4I", shard, at + 32)
            segments.append((hash_hex(shard[at : at + 32]), start, end))
            at += 48
        at += 48 * (num_segments * (flags >> 31 & 1) + (flags >> 30 & 1))
        yield file_hash, segments


def xorb_chunks(xorb: Path, start: int, end: int) -> Iterator[bytes]:
    """Yield the chunks start..end-1 of a block, decompressed.

    A chunk is a version byte (0), its length (3 bytes, little-endian), the compression (0 none,
    1 LZ4 frame, 2 LZ4 of the bytes grouped by their position modulo 4), and its plain length.
    """
    import lz4.frame

    if not xorb.exists():
        raise Refusal(400, f"the Xet block {xorb.name} was not uploaded to this server")
    with xorb.open("rb") as file:
        for index in range(end):
            head = file.read(8)
            length = int.from_bytes(head[1:4], "little")
            if index < start:
                file.seek(length, os.SEEK_CUR)
                continue
            chunk = file.read(length)
            if head[4]:
                chunk = lz4.frame.decompress(chunk)
            if head[4] == 2:
                grouped, chunk, at = chunk, bytearray(len(chunk)), 0
                for position in range(4):
                    count = len(chunk[position::4])
                    chunk[position::4] = grouped[at : at + count]
                    at += count
            yield chunk


# ------------------------------------------------------------------------------------------
# Jobs
# ------------------------------------------------------------------------------------------


class Flavor(NamedTuple):
    """A machine to rent: memory in GB, price in dollars per hour."""

    name: str
    cores: int
    memory: int
    accelerator: str
    quantity: int
    vram: int
    price: float


HARDWARE = {
    row[0]: Flavor(*row)
    for row in [
        ("cpu-basic", 2, 16, "", 0, 0, 0.01),
        ("cpu-upgrade", 8, 32, "", 0, 0, 0.03),
        ("t4-small", 4, 15, "T4", 1, 16, 0.40),
        ("l4x1", 8, 30, "L4", 1, 24, 0.80),
        ("a10g-large", 12, 46, "A10G", 1, 24, 1.50),
        ("a100-large", 12, 142, "A100", 1, 80, 2.50),
        ("a100x4", 48, 568, "A100", 4, 320, 10.00),
        ("h200", 23, 256, "H200", 1, 141, 5.00),
    ]
}
JOB_KEYS = ("dockerImage", "spaceId", "command", "arguments", "environment", "flavor")
JOB_KEYS += ("labels", "volumes", "network")
SERVER_STOPPED = "The server stopped"
TERMINAL = ("COMPLETED", "ERROR", "CANCELED")
# Reads until its input ends: on a word the job is over, on nothing the server has died.
WATCHER = "import os, sys; os.read(0, 1) or os.killpg(int(sys.argv[1]), 9)"


def hardware_item(flavor: Flavor) -> dict[str, Any]:
    per_minute = flavor.price / 60
    item = {
        "name": flavor.name,
        "prettyName": flavor.name,
        "cpu": f"{flavor.cores} vCPU",
        "ram": f"{flavor.memory} GB",
        "accelerator": None,
        "unitCostMicroUSD": round(per_minute * 1e6),
        "unitCostUSD": per_minute,
        "unitLabel": "minute",
    }
    if flavor.quantity:
        gpu = {"type": "gpu", "model": flavor.accelerator, "manufacturer": "Nvidia"}
        amount = {"quantity": str(flavor.quantity), "vram": f"{flavor.vram} GB"}
        item["accelerator"] = gpu | amount
    return item


def load_jobs(hub: Hub) -> dict[str, Job]:
    """Return the jobs of earlier servers on this root; what ran then has died with its server."""
    jobs = {}
    for file in (hub.root / "jobs").glob("*/job.json"):
        job = jobs[file.parent.name] = Job(hub, json.loads(file.read_text()))
        if not job.finished:
            job.save(status={"stage": "ERROR", "message": SERVER_STOPPED}, finishedAt=now())
    return jobs


def volume_source(store: Store, volume: dict[str, Any]) -> Path:
    """Return the folder of the bucket or the repo that a job mounts."""
    if volume["type"] == "bucket":
        return store.bucket(volume["source"])
    return store.root / f"{volume['type']}s" / volume["source"] / "main"


def start_job(hub: Hub, owner: str, spec: dict[str, Any], initiator: str) -> Job:
    """Check the specification, write the job down, and run it in a thread."""
    if spec.get("flavor") not in HARDWARE:
        raise Refusal(400, f"unknown flavor {spec.get('flavor')}; there are {', '.join(HARDWARE)}")
    if not spec.get("command"):
        raise Refusal(400, "the command is empty")
    for volume in spec.get("volumes") or []:
        if not volume_source(hub.store, volume).is_dir():
            raise Refusal(400, f"no {volume['type']} {volume['source']} to mount")
    user = {"id": object_id(owner), "name": owner, "type": "user"}
    info = {
        "id": secrets.token_hex(12),
        "createdAt": now(),
        "startedAt": None,
        "finishedAt": None,
        "owner": user,
        "initiator": {**user, "type": initiator},
        "status": {"stage": "SCHEDULING", "message": None},
        "retry": int(spec.get("attempts", 1)) - 1,
        "timeoutSeconds": spec.get("timeoutSeconds", DEFAULT_TIMEOUT),
    }
    job = Job(hub, info | {key: spec.get(key) for key in JOB_KEYS}, spec.get("secrets") or {})
    job.save()
    with hub.lock:
        hub.jobs[job.info["id"]] = job
    job.thread.start()
    return job


class Job:
    """One job: `info` is job.json, in the API's own names; its secrets lie beside it."""

    def __init__(self, hub: Hub, info: dict, secret_values: dict[str, str] | None = None) -> None:
        self.hub, self.info = hub, info
        self.folder = hub.root / "jobs" / info["id"]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.changed = threading.Condition()
        self.stop_reason: str | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        secrets_file = self.folder / "secrets.json"
        if secret_values is not None:
            secrets_file.touch(mode=0o600)
            secrets_file.write_text(json.dumps(secret_values))
        self.secrets: dict[str, str] = json.loads(secrets_file.read_text())
        self.log_file = self.folder / "log.jsonl"
        self.log_file.touch()
        self.lines = [json.loads(line) for line in self.log_file.read_text().splitlines()]

    @property
    def finished(self) -> bool:
        return self.info["status"]["stage"] in TERMINAL

    def save(self, **changes: Any) -> None:
        with self.changed:
            self.info = {**self.info, **changes}
            replace_file(self.folder / "job.json", json.dumps(self.info, indent=1))
            self.changed.notify_all()

    def item(self) -> dict[str, Any]:
        """Return what `JobInfo` parses; of the secrets only their names."""

        def seconds(start: str | None, end: str | None) -> int | None:
            moments = [datetime.fromisoformat(x) if x else datetime.now(UTC) for x in (start, end)]
            return int((moments[1] - moments[0]).total_seconds()) if start else None

        created, started, ended = (self.info[f"{x}At"] for x in ("created", "started", "finished"))
        durations = {
            "schedulingSecs": seconds(created, started) if started else None,
            "runningSecs": seconds(started, ended),
            "totalSecs": seconds(created, ended),
        }
        return {**self.info, "durations": durations, "secrets": dict.fromkeys(self.secrets, "***")}

    def log(self, text: str) -> None:
        with self.changed:
            line = {"timestamp": now(), "data": text}
            self.lines.append(line)
            with self.log_file.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.changed.notify_all()

    def events(self, tail: int) -> Iterator[bytes]:
        """Yield the log, or its last lines, as server-sent events until the job has ended."""
        at = max(len(self.lines) - tail, 0) if tail else 0
        while True:
            with self.changed:
                if at == len(self.lines) and not self.finished:
                    self.changed.wait(timeout=30)
                new, finished = self.lines[at:], self.finished
            at += len(new)
            yield b"".join(b"data: %s\n\n" % json.dumps(line).encode() for line in new)
            if finished:
                return
            if not new:
                yield b": keep-alive\n\n"

    def run(self) -> None:
        try:
            stage, message = self.run_attempts()
        except OSError as error:
            stage, message = "ERROR", f"Failed to start: {error}"
        shutil.rmtree(self.folder / "machine", ignore_errors=True)
        self.save(status={"stage": stage, "message": message}, finishedAt=now())

    def run_attempts(self) -> tuple[str, str | None]:
        """Run the command until it succeeds, the attempts are used up, or it is stopped.

        The timeout spans all attempts, and a job that it ends is not tried again; what the Hub
        does here is not public.
        """
        deadline = time.monotonic() + self.info["timeoutSeconds"]
        for _ in range(self.info["retry"] + 1):
            self.log(f"===== Job started at {now()} =====")
            code = self.attempt(deadline)
            if self.stop_reason == "canceled":
                return "CANCELED", None
            if code is None:
                return "ERROR", self.stop_reason or "Job timeout"
            if code == 0:
                return "COMPLETED", None
        return "ERROR", f"Job failed with exit code: {code if code > 0 else 128 - code}"

    def attempt(self, deadline: float) -> int | None:
        """Run the command once on a machine of its own; return its exit code, None if stopped."""
        machine = self.folder / "machine"
        shutil.rmtree(machine, ignore_errors=True)
        for name in ("home", "tmp"):
            (machine / name).mkdir(parents=True)
        process = subprocess.Popen(
            self.command(),
            cwd=machine / "home",
            env=self.environment(machine),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", WATCHER, str(process.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self.save(
            status={"stage": "RUNNING", "message": None},
            startedAt=self.info["startedAt"] or now(),
        )
        reader = threading.Thread(target=self.read_output, args=[process.stdout], daemon=True)
        reader.start()
        while not exited(process, 0.05) and not self.stop_reason and time.monotonic() < deadline:
            pass
        stopped = process.returncode is None
        # As docker does: SIGTERM to the first process, and all die when it has ended.
        if stopped and self.hub.grace and self.stop_reason != SERVER_STOPPED:
            process.terminate()
            exited(process, self.hub.grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(timeout=5)  # A process that left the group may hold the pipe open.
        watcher.communicate(b"done")
        return None if stopped else process.returncode

    def read_output(self, output: Any) -> None:
        with output:
            for line in output:
                self.log(line.decode(errors="replace").rstrip("\r\n"))

    def command(self) -> list[str]:
        """Return the command with the paths of mounted volumes replaced by their folders."""
        words = [*self.info["command"], *(self.info["arguments"] or [])]
        for volume in self.info["volumes"] or []:
            folder = volume_source(self.hub.store, volume) / volume.get("path", "")
            inside = volume["mountPath"].rstrip("/") + "/"
            words = [str(folder / w[len(inside) :]) if w.startswith(inside) else w for w in words]
        if words[0] == "uv" and shutil.which("uv") is None:
            # `uv run` names itself to its children; pip may have put uv beside this Python only.
            words[:1] = [os.environ["UV"]] if "UV" in os.environ else [sys.executable, "-m", "uv"]
        return words

    def environment(self, machine: Path) -> dict[str, str]:
        """Return the job's whole environment: nothing of this process but what is named here."""
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        data = Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local" / "share"))
        # The machine is new, the packages and interpreters that uv has fetched are not.
        env = {"UV_CACHE_DIR": str(cache / "uv")}
        env["UV_PYTHON_INSTALL_DIR"] = str(data / "uv" / "python")
        env |= {k: v for k, v in os.environ.items() if k.startswith(("UV_", "SSL_CERT_"))}
        for entry in self.hub.job_env:
            name, given, value = entry.partition("=")
            if given or name in os.environ:
                env[name] = value if given else os.environ[name]
        home = machine / "home"
        env |= {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "HOME": str(home)}
        env |= {"TMPDIR": str(machine / "tmp"), "HF_HOME": str(home / ".cache" / "huggingface")}
        env |= {"HF_ENDPOINT": self.hub.endpoint, "JOB_ID": self.info["id"]}
        if self.hub.uploads == "lfs":
            env["HF_HUB_DISABLE_XET"] = "1"
        flavor = HARDWARE[self.info["flavor"]]
        env |= {"CPU_CORES": str(flavor.cores), "MEMORY": f"{flavor.memory}Gi"}
        env["ACCELERATOR"] = flavor.name if flavor.quantity else "none"
        given = {**(self.info["environment"] or {}), **self.secrets}
        return env | {name: str(value) for name, value in given.items()}


def exited(process: subprocess.Popen, timeout: float) -> bool:
    """Wait up to `timeout` seconds for the process; say whether it has ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout)
    return process.returncode is not None


# ------------------------------------------------------------------------------------------
# Started by hand
# ------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--root", help="folder that keeps everything (default: a new one)")
    add("--port", type=int, default=0, help="0, the default, takes a free one")
    uploads_help = "lfs: set HF_HUB_DISABLE_XET=1 for the client too; regular: all in the commit"
    add("--uploads", choices=("xet", "lfs", "regular"), default="xet", help=uploads_help)
    add("--grace", type=float, default=DEFAULT_GRACE, help="seconds from SIGTERM to SIGKILL")
    add("--page_size", type=int, default=1000, help="items on a page of a listing")
    add("--job_env", action="append", default=[], metavar="NAME[=VALUE]", help="add to the jobs")
    user_help = f"role is read or write; default: {' '.join(DEFAULT_USERS)}"
    add("--user", action="append", metavar="NAME:TOKEN:ROLE", help=user_help)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = vars(parse_args(argv))
    users = args.pop("user") or DEFAULT_USERS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Hub(**args, users=users, own_process=True) as hub:
        print(f"export HF_ENDPOINT={hub.endpoint}")
        print(f"export HF_TOKEN={hub.token}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
