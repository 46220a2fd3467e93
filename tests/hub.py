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
    jobs/ID/                            job.json, log.jsonl, and the job's home folder
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
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

DEFAULT_USERS = ("alice:hf_alice:write", "alice:hf_alice_read:read", "bob:hf_bob:write")
# The Hub decides by a repo's .gitattributes and the content; suffixes and the first bytes do here.
LFS_SUFFIXES = {
    ".arrow",
    ".bin",
    ".gz",
    ".model",
    ".npz",
    ".parquet",
    ".pt",
    ".pth",
    ".safetensors",
}
REGULAR_LIMIT = 10 * 2**20  # bytes; a larger file is never stored as regular git content
GITATTRIBUTES = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in sorted(LFS_SUFFIXES))


# ------------------------------------------------------------------------------------------
# The server as its users see it
# ------------------------------------------------------------------------------------------


class Hub:
    """A Hub on a free port of 127.0.0.1; a context manager that serves from a thread.

    `uploads`: "xet" lets the client choose; "lfs" also puts HF_HUB_DISABLE_XET=1 into `env()` and
    the jobs; "regular" takes every file inside the commit. `page_size` is the length of a page of
    every paginated listing. Two servers on one root destroy each other's state.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        port: int = 0,
        uploads: str = "xet",
        users: tuple[str, ...] | list[str] = DEFAULT_USERS,
        page_size: int = 1000,
        own_process: bool = False,
    ) -> None:
        self.root = Path(root or tempfile.mkdtemp(prefix="hub-")).absolute()
        self.uploads = uploads
        self.page_size = page_size
        self.own_process = own_process
        self.users = {}
        for entry in users:
            name, token, role = entry.split(":")
            self.users[token] = {"name": name, "role": role}
        self.token = next(iter(self.users))
        self.requests: list[tuple[str, str, int]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.store = Store(self.root)
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
        """Stop serving; connections that clients keep alive are cut, running jobs are killed."""
        self.server.shutdown()
        self.server.server_close()
        with self.lock:
            open_connections = list(self.connections)
        for connection in open_connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def env(self, token: str | None = None, home: str | Path | None = None) -> dict[str, str]:
        """Return the variables that point a client process here; `home` is its HF_HOME."""
        env = {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": token or self.token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        if self.uploads == "lfs":
            env["HF_HUB_DISABLE_XET"] = "1"
        if home is not None:
            env["HF_HOME"] = str(home)
        return env

    def repo_folder(self, repo_id: str, repo_type: str = "model") -> Path:
        """Return the folder that holds the files of the repo's branch main."""
        return self.store.repo(repo_type + "s", repo_id).folder / "main"

    def commits(self, repo_id: str, repo_type: str = "model") -> list[dict[str, Any]]:
        """Return main's commits, newest first: oid, message, files {path: {sha256, size, ...}}."""
        repo = self.store.repo(repo_type + "s", repo_id)
        return [
            {"oid": commit["oid"], "message": commit["title"], "files": commit["files"]}
            for commit in repo.history(repo.resolve("main"))
        ]

    def add_fault(self, **fault: Any) -> None:
        """Add a fault, see `Fault`; the same over HTTP is POST /_hub/faults."""
        added = Fault(**fault)
        if added.kill and not self.own_process:
            raise ValueError("kill=True would end this process; start tests/hub.py by itself")
        with self.lock:
            self.faults.append(added)

    def clear_faults(self) -> None:
        """Remove every fault, spent or not."""
        with self.lock:
            self.faults.clear()


@dataclass
class Fault:
    """What goes wrong with the requests whose path, query included, contains the regex `path`.

    The first `skip` matches pass, the next `times` are hit (None: all). `delay_s` waits before the
    work. `status` and `headers` answer instead of the work. `drop` cuts the connection: "before"
    the body is read, or "after" the work is done and before its answer. `kill` ends the server
    process at that same point.
    """

    path: str = ""
    method: str | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0
    drop: str | None = None
    kill: bool = False
    times: int | None = 1
    skip: int = 0

    def __post_init__(self) -> None:
        self.headers = self.headers or {}
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


# ------------------------------------------------------------------------------------------
# HTTP: connections, routing, access
# ------------------------------------------------------------------------------------------

ROUTES: list[tuple[str, re.Pattern[str], Callable]] = []
PLACEHOLDERS = {
    "{repo}": r"(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+(?:/[^/]+)?)",
    "{bucket}": r"(?P<bucket_id>[^/]+/[^/]+)",
    "{rev}": r"(?P<rev>[^/]+)",
    "{path}": r"(?P<path>.+)",
    "{hash}": r"(?P<hash>[0-9a-f]{64})",
    "{job}": r"(?P<namespace>[^/]+)/(?P<job_id>[^/]+)",
    "{name}": r"(?P<name>[^/]+)",
}


def route(methods: str, template: str) -> Callable[[Callable], Callable]:
    """Register a handler; the first template that fits, in the order of the file, is taken."""
    pattern = template
    for placeholder, regex in PLACEHOLDERS.items():
        pattern = pattern.replace(placeholder, regex)

    def register(handler: Callable) -> Callable:
        ROUTES.extend((method, re.compile(pattern), handler) for method in methods.split())
        return handler

    return register


class Refusal(Exception):
    """An answer other than success; `code` is the X-Error-Code that the clients switch on."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body
        self.headers: dict[str, str] = {}


class Dropped(Exception):
    """The connection ends here without an answer."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent on clients that go away; print anything else."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Request(BaseHTTPRequestHandler):
    """One connection; `answer` runs once per request on it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub
        self.store = self.hub.store
        with self.hub.lock:
            self.hub.connections.add(self.connection)

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
        self.body_left = None
        with self.hub.lock:
            fault = next((f for f in self.hub.faults if f.hits(self.command, self.path)), None)
        try:
            self.enact(fault)
            reply = self.dispatch()
            if fault and (fault.drop == "after" or fault.kill):
                self.cut(fault)
            self.send(*reply)
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message.replace("\n", " "), **refusal.headers}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.send(refusal.status, {"error": refusal.message, **refusal.body}, headers)
        except (Dropped, ConnectionError):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        finally:
            self.hub.requests.append((self.command, self.path, self.status))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = answer

    def enact(self, fault: Fault | None) -> None:
        """Do what the fault says before the work."""
        if fault is None:
            return
        time.sleep(fault.delay_s)
        if fault.status is not None:
            refusal = Refusal(fault.status, "injected fault")
            refusal.headers = fault.headers
            raise refusal
        if fault.drop == "before" or (fault.kill and fault.drop is None):
            self.cut(fault)

    def cut(self, fault: Fault) -> None:
        if fault.kill:
            os._exit(137)
        raise Dropped

    def dispatch(self) -> tuple:
        """Return (status, content, headers) of the handler that fits; content: see `send`."""
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.user = self.authenticate()
        for method, pattern, handler in ROUTES:
            if method == self.command and (match := pattern.fullmatch(url.path)):
                reply = handler(self, **{k: unquote(v) for k, v in match.groupdict("").items()})
                return reply if isinstance(reply, tuple) else (200, reply)
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
        if namespace is not None and self.user["name"] != namespace:
            raise Refusal(403, f"You don't have access to the namespace {namespace}")
        if write and self.user["role"] != "write":
            raise Refusal(403, "Forbidden: you must use a write token")
        return self.user

    def repo(self, kind: str, repo_id: str, write: bool = False) -> Repo:
        """Return the repo if the user may see it (or write to it), else refuse as the Hub does.

        A private repo of somebody else looks like a missing one; both are 401 without a token.
        """
        try:
            repo = self.store.repo(kind, repo_id)
        except Refusal:
            repo = None
        owner = repo_id.split("/")[0]
        name = self.user["name"] if self.user else None
        if repo is None or (repo.state["private"] and name != owner):
            if self.user is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write:
            self.require_user(owner, write=True)
        return repo

    # Bodies and answers -------------------------------------------------------------------

    def body_chunks(self) -> Iterator[bytes]:
        """Yield the rest of the request's body, whether it has a length or comes in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            if self.body_left == 0:
                return
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            self.body_left = 0
            return
        if self.body_left is None:
            self.body_left = int(self.headers.get("Content-Length", 0))
        while self.body_left:
            chunk = self.rfile.read(min(self.body_left, 2**20))
            if not chunk:
                raise ConnectionError("the client went away inside a body")
            self.body_left -= len(chunk)
            yield chunk

    def body(self) -> bytes:
        return b"".join(self.body_chunks())

    def json(self) -> Any:
        try:
            return json.loads(self.body() or b"{}")
        except ValueError as error:
            raise Refusal(400, f"the body is not JSON: {error}") from None

    def ndjson(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.body().splitlines() if line.strip()]

    def send(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        """Send JSON, bytes, a file's Path, or an iterator of bytes (until the connection ends)."""
        for _ in self.body_chunks():  # A body left unread would be taken for the next request.
            pass
        headers = dict(headers or {})
        if isinstance(content, Path):
            return self.send_file(content, headers)
        stream = isinstance(content, Iterator)
        if not isinstance(content, bytes) and not stream:
            content = b"" if content is None else json.dumps(content).encode()
            headers.setdefault("Content-Type", "application/json; charset=utf-8")
        if stream:
            headers["Connection"] = "close"
        else:
            headers["Content-Length"] = str(len(content))
        self.send_head(status, headers)
        if self.command != "HEAD":
            for chunk in content if stream else [content]:
                self.wfile.write(chunk)

    def send_file(self, path: Path, headers: dict[str, str]) -> None:
        """Send a file, or the one byte range that is asked for."""
        size = path.stat().st_size
        start, end, status = 0, size - 1, 200
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = asked.groups()
            start = int(first) if first else max(size - int(last), 0)
            end = min(int(last), size - 1) if first and last else size - 1
            status = 206
            if start > end:
                refusal = Refusal(416, "range not satisfiable")
                refusal.headers["Content-Range"] = f"bytes */{size}"
                raise refusal
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        headers |= {"Content-Length": str(end - start + 1), "Accept-Ranges": "bytes"}
        headers.setdefault("Content-Type", "application/octet-stream")
        self.send_head(status, headers)
        if self.command != "HEAD":
            with path.open("rb") as file:
                file.seek(start)
                left = end - start + 1
                while left and (chunk := file.read(min(left, 2**20))):
                    self.wfile.write(chunk)
                    left -= len(chunk)

    def send_head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def page(self, items: list) -> tuple:
        """Return one page of the items; the Link header names the next, as `paginate` follows."""
        start = int(self.query.get("cursor", 0))
        end = start + self.hub.page_size
        headers = {}
        if end < len(items):
            query = "&".join(
                f"{key}={quote(value)}" for key, value in {**self.query, "cursor": str(end)}.items()
            )
            url = f"{self.hub.endpoint}{urlsplit(self.path).path}?{query}"
            headers["Link"] = f'<{url}>; rel="next"'
        return 200, items[start:end], headers


# ------------------------------------------------------------------------------------------
# Endpoints: account and repos
# ------------------------------------------------------------------------------------------


@route("POST", "/_hub/faults")
def post_fault(request: Request) -> dict:
    """Add a fault to a server that was started by hand: the fields of `Fault` as JSON."""
    try:
        request.hub.add_fault(**request.json())
    except (TypeError, ValueError) as error:
        raise Refusal(400, str(error)) from None
    return {}


@route("DELETE", "/_hub/faults")
def delete_faults(request: Request) -> dict:
    request.hub.clear_faults()
    return {}


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> dict:
    """`HfApi.whoami`, `hf auth whoami`."""
    user = request.require_user()
    token = {"displayName": "loopback", "role": user["role"]}
    return {
        "type": "user",
        "id": hashlib.sha1(user["name"].encode()).hexdigest()[:24],
        "name": user["name"],
        "fullname": user["name"].title(),
        "isPro": False,
        "orgs": [],
        "auth": {"type": "access_token", "accessToken": token},
    }


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> dict:
    """`ModelCard.validate`, and every commit that holds a README.md; the content is not judged."""
    return {"errors": [], "warnings": []}


@route("POST", "/api/repos/create")
def create_repo(request: Request) -> dict:
    """`HfApi.create_repo`; 409 carries the url that `exist_ok=True` reads."""
    body = request.json()
    user = request.require_user()
    kind = body.get("type", "model") + "s"
    namespace = body.get("organization") or user["name"]
    repo_id = f"{namespace}/{body['name']}"
    request.require_user(namespace, write=True)
    private = body.get("visibility") == "private" or body.get("private", False)
    with request.hub.lock:
        created = request.store.create(kind, repo_id, private, user["name"])
    url = f"{request.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
    if not created:
        raise Refusal(409, f"You already created this {kind[:-1]} repo", url=url)
    return {"url": url, "name": repo_id, "id": repo_id}


@route("DELETE", "/api/repos/delete")
def delete_repo(request: Request) -> dict:
    """`HfApi.delete_repo`."""
    body = request.json()
    namespace = body.get("organization") or request.require_user()["name"]
    repo = request.repo(body.get("type", "model") + "s", f"{namespace}/{body['name']}", write=True)
    with request.hub.lock:
        request.store.delete(repo)
    return {}


@route("PUT", "/api/{repo}/settings")
def update_settings(request: Request, kind: str, repo_id: str) -> dict:
    """`HfApi.update_repo_settings(private=...)`."""
    body = request.json()
    repo = request.repo(kind, repo_id, write=True)
    with request.hub.lock:
        repo.save(private=body.get("visibility", body.get("private")) in ("private", True))
    return {"private": repo.state["private"]}


@route("GET", "/api/{repo}/auth-check")
def auth_check(request: Request, kind: str, repo_id: str) -> dict:
    """`HfApi.auth_check`."""
    request.repo(kind, repo_id)
    return {}


@route("GET", "/api/(?P<kind>models|datasets|spaces)")
def list_repos(request: Request, kind: str) -> tuple:
    """`HfApi.list_models(author=..., search=...)` and the same for datasets."""
    name = request.user["name"] if request.user else None
    found = [
        repo_info(request, kind, repo.id, "")
        for repo in request.store.repos.values()
        if repo.kind == kind
        and (not repo.state["private"] or repo.id.split("/")[0] == name)
        and request.query.get("author", repo.id.split("/")[0]) == repo.id.split("/")[0]
        and request.query.get("search", "") in repo.id
    ]
    return request.page(found)


@route("POST", "/api/{repo}/preupload/{rev}")
def preupload(request: Request, kind: str, repo_id: str, rev: str) -> dict:
    """First step of every upload: how each file is to come, and the oid of what is there.

    The client drops a file whose own oid is equal, so that an unchanged folder makes no commit.
    """
    repo = request.repo(kind, repo_id, write=True)
    files = repo.files(rev)
    answers = []
    for asked in request.json()["files"]:
        lfs = request.hub.uploads != "regular" and is_lfs(asked)
        answer = {
            "path": asked["path"],
            "uploadMode": "lfs" if lfs else "regular",
            "shouldIgnore": False,
        }
        present = files.get(asked["path"])
        if present and present["lfs"] == lfs:
            answer["oid"] = present["sha256"] if lfs else present["oid"]
        answers.append(answer)
    return {"files": answers}


def is_lfs(asked: dict[str, Any]) -> bool:
    """Decide from name, size and the first 512 bytes whether a file is stored outside git."""
    if PurePosixPath(asked["path"]).suffix in LFS_SUFFIXES or asked["size"] > REGULAR_LIMIT:
        return True
    return b"\0" in base64.b64decode(asked.get("sample", ""))


@route("POST", "/api/{repo}/commit/{rev}")
def commit(request: Request, kind: str, repo_id: str, rev: str) -> dict:
    """`HfApi.create_commit` and whatever ends in it; 412 where parentCommit is not the head."""
    repo = request.repo(kind, repo_id, write=True)
    if "create_pr" in request.query:
        raise Refusal(400, "pull requests are not implemented here")
    lines = request.ndjson()
    header = next((line["value"] for line in lines if line["key"] == "header"), {})
    changes = [stored(request.store, line) for line in lines if line["key"] != "header"]
    with request.hub.lock:
        head = repo.branch_head(rev)
        if header.get("parentCommit") not in (None, head):
            message = f"A commit has happened since. Please refresh and try again. Head: {head}"
            raise Refusal(412, message)
        files = apply_changes(dict(repo.commit(head)["files"]), changes)
        title, text = header.get("summary", ""), header.get("description", "")
        oid = repo.add_commit(rev, head, files, title, text, request.user["name"])
    prefix = "" if kind == "models" else kind + "/"
    url = f"{request.hub.endpoint}/{prefix}{repo_id}/commit/{oid}"
    return {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}


def stored(store: Store, line: dict[str, Any]) -> tuple[str, str, dict | None]:
    """Return (change, path, manifest entry or None) of a commit's line; keep regular bytes."""
    value = line["value"]
    path = value["path"].rstrip("/")
    if not path or any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise Refusal(400, f"invalid path: {value['path']!r}")
    if line["key"] == "file":
        content = base64.b64decode(value["content"])
        return "add", path, file_entry(store.put(content), len(content), git_oid(content), False)
    if line["key"] == "lfsFile":
        blob = store.blob(value["oid"])
        if not blob.exists():
            raise Refusal(400, f"{path} points to content that was not uploaded: {value['oid']}")
        size = blob.stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\n"
        pointer_oid = git_oid(f"{pointer}size {size}\n".encode())
        return "add", path, file_entry(value["oid"], size, pointer_oid, True)
    if line["key"] in ("deletedFile", "deletedFolder"):
        return line["key"], path, None
    raise Refusal(400, f"unknown operation: {line['key']}")


def apply_changes(files: dict[str, dict], changes: list[tuple[str, str, dict | None]]) -> dict:
    """Return the manifest after the changes, which are applied in the order they came in."""
    for change, path, entry in changes:
        if change == "add":
            files[path] = entry
            continue
        inside = path + "/" if change == "deletedFolder" else None
        gone = [p for p in files if (p.startswith(inside) if inside else p == path)]
        if not gone:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        for p in gone:
            del files[p]
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents}
    if both := folders & files.keys():
        raise Refusal(400, f"both a file and a folder: {', '.join(sorted(both))}")
    return files


@route("GET", "/api/{repo}/refs")
def list_refs(request: Request, kind: str, repo_id: str) -> dict:
    """`HfApi.list_repo_refs`."""
    state = request.repo(kind, repo_id).state
    refs: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for name, oid in state["branches"].items():
        convert = name.startswith("refs/convert/")
        entry = {
            "name": name.removeprefix("refs/convert/"),
            "ref": name if convert else f"refs/heads/{name}",
            "targetCommit": oid,
        }
        refs["converts" if convert else "branches"].append(entry)
    for name, tag in state["tags"].items():
        refs["tags"].append({"name": name, "ref": f"refs/tags/{name}", "targetCommit": tag["oid"]})
    return refs


@route("POST", "/api/{repo}/branch/{name}")
def create_branch(request: Request, kind: str, repo_id: str, name: str) -> dict:
    """`HfApi.create_branch(revision=...)`."""
    repo = request.repo(kind, repo_id, write=True)
    start = request.json().get("startingPoint", "main")
    with request.hub.lock:
        if name in repo.state["branches"]:
            raise Refusal(409, f"Reference already exists: {name}")
        repo.save(branches={**repo.state["branches"], name: repo.resolve(start)})
    return {}


@route("DELETE", "/api/{repo}/branch/{name}")
def delete_branch(request: Request, kind: str, repo_id: str, name: str) -> dict:
    """`HfApi.delete_branch`."""
    repo = request.repo(kind, repo_id, write=True)
    with request.hub.lock:
        if name == "main":
            raise Refusal(403, "The branch main cannot be deleted")
        repo.branch_head(name)
        repo.save(branches={k: v for k, v in repo.state["branches"].items() if k != name})
    return {}


@route("POST", "/api/{repo}/tag/{rev}")
def create_tag(request: Request, kind: str, repo_id: str, rev: str) -> dict:
    """`HfApi.create_tag(tag=..., revision=...)`."""
    repo = request.repo(kind, repo_id, write=True)
    body = request.json()
    with request.hub.lock:
        if body["tag"] in repo.state["tags"]:
            raise Refusal(409, f"Tag already exists: {body['tag']}")
        tag = {"oid": repo.resolve(rev), "message": body.get("message", "")}
        repo.save(tags={**repo.state["tags"], body["tag"]: tag})
    return {}


@route("DELETE", "/api/{repo}/tag/{name}")
def delete_tag(request: Request, kind: str, repo_id: str, name: str) -> dict:
    """`HfApi.delete_tag`."""
    repo = request.repo(kind, repo_id, write=True)
    with request.hub.lock:
        if name not in repo.state["tags"]:
            raise Refusal(404, f"Tag not found: {name}", "RevisionNotFound")
        repo.save(tags={k: v for k, v in repo.state["tags"].items() if k != name})
    return {}


@route("POST", "/api/{repo}/super-squash/{rev}")
def super_squash(request: Request, kind: str, repo_id: str, rev: str) -> dict:
    """`HfApi.super_squash_history`: the branch keeps its files and one commit."""
    repo = request.repo(kind, repo_id, write=True)
    title = request.json().get("message", "")
    with request.hub.lock:
        files = repo.commit(repo.branch_head(rev))["files"]
        oid = repo.add_commit(rev, None, files, title, "", request.user["name"])
        repo.forget_unreachable()
    return {"commitOid": oid}


@route("GET", "/api/{repo}/commits/{rev}")
def list_commits(request: Request, kind: str, repo_id: str, rev: str) -> tuple:
    """`HfApi.list_repo_commits`."""
    repo = request.repo(kind, repo_id)
    history = [
        {
            "id": commit["oid"],
            "title": commit["title"],
            "message": commit["message"],
            "authors": [{"user": commit["author"]}],
            "date": commit["date"],
        }
        for commit in repo.history(repo.resolve(rev))
    ]
    return request.page(history)


@route("GET", "/api/{repo}/tree/{rev}(?:/{path})?")
def list_tree(request: Request, kind: str, repo_id: str, rev: str, path: str) -> tuple:
    """`HfApi.list_repo_tree`, `list_repo_files`, `snapshot_download`."""
    repo = request.repo(kind, repo_id)
    oid = repo.resolve(rev)
    inside = path.strip("/") + "/" if path.strip("/") else ""
    recursive = request.query.get("recursive", "").lower() == "true"
    expand = request.query.get("expand", "").lower() == "true"
    items: dict[str, dict] = {}
    for name, entry in repo.files(oid).items():
        if not name.startswith(inside):
            continue
        parents = [str(p) for p in PurePosixPath(name[len(inside) :]).parents if str(p) != "."]
        for parent in parents if recursive else parents[-1:]:
            items.setdefault(inside + parent, repo.folder_item(oid, inside + parent, expand))
        if recursive or not parents:
            items[name] = repo.file_item(oid, name, entry, expand)
    if inside and not items:
        raise Refusal(404, f"{path} does not exist on {rev}", "EntryNotFound")
    return request.page([items[name] for name in sorted(items)])


@route("POST", "/api/{repo}/paths-info/{rev}")
def paths_info(request: Request, kind: str, repo_id: str, rev: str) -> list:
    """`HfApi.get_paths_info`, as a form or as JSON; what does not exist is left out."""
    repo = request.repo(kind, repo_id)
    oid = repo.resolve(rev)
    if "json" in request.headers.get("Content-Type", ""):
        form = request.json()
        expand = bool(form.get("expand"))
    else:
        form = parse_qs(request.body().decode())
        expand = form.get("expand", [""])[0].lower() == "true"
    files = repo.files(oid)
    items = []
    for path in (p.strip("/") for p in form.get("paths", [])):
        if path in files:
            items.append(repo.file_item(oid, path, files[path], expand))
        elif any(name.startswith(path + "/") for name in files):
            items.append(repo.folder_item(oid, path, expand))
    return items


@route("GET", "/api/{repo}/lfs-files")
def list_lfs_files(request: Request, kind: str, repo_id: str) -> tuple:
    """`HfApi.list_lfs_files`: also what no commit refers to any more, because it still counts."""
    repo = request.repo(kind, repo_id)
    live = {entry["sha256"] for entry in repo.files("main").values()}
    return request.page(
        [
            {"fileOid": sha, "oid": sha, "ref": "main" if sha in live else None, **record}
            for sha, record in repo.state["lfs"].items()
        ]
    )


@route("POST", "/api/{repo}/lfs-files/batch")
def delete_lfs_files(request: Request, kind: str, repo_id: str) -> dict:
    """`HfApi.permanently_delete_lfs_files(rewrite_history=...)`."""
    repo = request.repo(kind, repo_id, write=True)
    deletions = request.json()["deletions"]
    gone = set(deletions["sha"])
    with request.hub.lock:
        if deletions.get("rewriteHistory", True):
            repo.rewrite_without(gone)
        repo.save(lfs={k: v for k, v in repo.state["lfs"].items() if k not in gone})
        for sha in gone:
            request.store.drop_blob(sha)
    return {}


@route(
    "GET HEAD", "(?:/(?P<kind>datasets|spaces))?/(?P<repo_id>[^/]+(?:/[^/]+)?)/resolve/{rev}/{path}"
)
def resolve_file(request: Request, kind: str, repo_id: str, rev: str, path: str) -> tuple:
    """`hf_hub_download` and everything above it: HEAD for the metadata, GET for the bytes."""
    repo = request.repo(kind or "models", repo_id)
    oid = repo.resolve(rev)
    entry = repo.files(oid).get(path)
    if entry is None or not request.store.blob(entry["sha256"]).exists():
        refusal = Refusal(404, "Entry not found", "EntryNotFound")
        refusal.headers["X-Repo-Commit"] = oid
        raise refusal
    headers = {"X-Repo-Commit": oid, "ETag": f'"{entry["oid"]}"'}
    if entry["lfs"]:
        headers |= {"X-Linked-Etag": f'"{entry["sha256"]}"', "X-Linked-Size": str(entry["size"])}
    return 200, request.store.blob(entry["sha256"]), headers


@route("GET", "/api/{repo}/revision/{rev}")
@route("GET", "/api/{repo}")
def repo_info(request: Request, kind: str, repo_id: str, rev: str = "") -> dict:
    """`HfApi.repo_info`, `model_info`, `dataset_info`, `repo_exists`."""
    repo = request.repo(kind, repo_id)
    head = repo.commit(repo.resolve(rev or "main"))
    siblings = []
    for path, entry in sorted(head["files"].items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if request.query.get("blobs"):
            sibling |= {"size": entry["size"], "blobId": entry["oid"]}
            if entry["lfs"]:
                sibling["lfs"] = lfs_item(entry)
        siblings.append(sibling)
    return {
        "_id": hashlib.sha1(f"{kind}/{repo_id}".encode()).hexdigest()[:24],
        "id": repo_id,
        "author": repo_id.split("/")[0],
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
# Endpoints: content uploads, by LFS and by Xet
# ------------------------------------------------------------------------------------------

# Given to whoever may write; the content store asks for nothing else.
XET_TOKEN = "xet-loopback"


@route(
    "POST", r"(?:/(?P<kind>datasets|spaces))?/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch"
)
def lfs_batch(request: Request, kind: str, repo_id: str) -> dict:
    """Uploads with HF_HUB_DISABLE_XET=1 or from a stream: where to put each object."""
    request.repo(kind or "models", repo_id, write=True)
    objects = []
    for asked in request.json()["objects"]:
        answer = {"oid": asked["oid"], "size": asked["size"]}
        if not request.store.blob(asked["oid"]).exists():
            url = f"{request.hub.endpoint}/_lfs/{asked['oid']}"
            answer["actions"] = {"upload": {"href": url}}
        objects.append(answer)
    return {"transfer": "basic", "objects": objects}


@route("PUT", "/_lfs/{hash}")
def lfs_put(request: Request, hash: str) -> dict:
    """The object itself; the address works as the authorisation, as a presigned URL does."""
    sha256 = request.store.put_stream(request.body_chunks(), expected=hash)
    return {"oid": sha256}


@route("GET", "/api/{repo}/xet-(?P<access>read|write)-token/{rev}")
def repo_xet_token(request: Request, kind: str, repo_id: str, access: str, rev: str) -> tuple:
    """hf_xet, before it uploads to a repo."""
    request.repo(kind, repo_id, write=access == "write")
    return xet_token(request)


def xet_token(request: Request) -> tuple:
    cas_url = f"{request.hub.endpoint}/_cas/{request.store.xet_id}"
    expires = int(time.time()) + 3600
    headers = {
        "X-Xet-Cas-Url": cas_url,
        "X-Xet-Access-Token": XET_TOKEN,
        "X-Xet-Token-Expiration": str(expires),
    }
    return 200, {"casUrl": cas_url, "accessToken": XET_TOKEN, "exp": expires}, headers


@route("POST", "/_cas/[^/]+/v1/xorbs/default/{hash}")
def put_xorb(request: Request, hash: str) -> dict:
    """hf_xet: a block of compressed chunks."""
    xorb = request.store.root / "xet" / "xorbs" / hash
    inserted = not xorb.exists()
    if inserted:
        replace_file(xorb, request.body())
    return {"was_inserted": inserted}


@route("POST", "/_cas/[^/]+/v1/shards")
def put_shard(request: Request) -> dict:
    """hf_xet: which chunks of which blocks make up each file; the files are put together here."""
    for file_hash, segments in shard_files(request.body()):
        request.store.put_xet(file_hash, segments)
    return {"result": 1}


# ------------------------------------------------------------------------------------------
# The store: blobs, commits, plain folders
# ------------------------------------------------------------------------------------------


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def replace_file(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a restart, sees all of it or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(temporary, path)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def file_entry(sha256: str, size: int, oid: str, lfs: bool) -> dict[str, Any]:
    """A file in a commit's manifest; `oid` is git's, of the pointer where `lfs` is true."""
    return {"sha256": sha256, "size": size, "oid": oid, "lfs": lfs}


def lfs_item(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "oid": entry["sha256"],
        "sha256": entry["sha256"],
        "size": entry["size"],
        "pointerSize": 134,
    }


class Store:
    """The blobs and the repos of one root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True, exist_ok=True)
        # hf_xet remembers per address which blocks it has sent: a new root needs a new address.
        id_file = root / "xet" / "id"
        if not id_file.exists():
            replace_file(id_file, secrets.token_hex(8))
        self.xet_id = id_file.read_text()
        self.repos: dict[tuple[str, str], Repo] = {}
        for kind in ("models", "datasets", "spaces"):
            for state_file in (root / kind).glob("*/*/.hub/repo.json"):
                repo = Repo(self, json.loads(state_file.read_text()))
                self.repos[kind, repo.id] = repo
                repo.update_folder()

    def repo(self, kind: str, repo_id: str) -> Repo:
        if (kind, repo_id) not in self.repos:
            raise Refusal(404, f"no repo {kind}/{repo_id}", "RepoNotFound")
        return self.repos[kind, repo_id]

    def create(self, kind: str, repo_id: str, private: bool, author: str) -> bool:
        """Create the repo with its first commit; False if it is there."""
        if (kind, repo_id) in self.repos:
            return False
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or ".." in repo_id:
            raise Refusal(400, f"invalid repo name: {repo_id}")
        state = {"id": repo_id, "kind": kind, "private": private, "createdAt": now()}
        repo = Repo(self, {**state, "branches": {}, "tags": {}, "lfs": {}})
        content = GITATTRIBUTES.encode()
        entry = file_entry(self.put(content), len(content), git_oid(content), False)
        repo.add_commit("main", None, {".gitattributes": entry}, "initial commit", "", author)
        self.repos[kind, repo_id] = repo
        return True

    def delete(self, repo: Repo) -> None:
        del self.repos[repo.kind, repo.id]
        (repo.folder / ".hub" / "repo.json").unlink()
        shutil.rmtree(repo.folder)

    def blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256

    def put(self, content: bytes) -> str:
        return self.put_stream(iter([content]))

    def put_stream(self, chunks: Iterator[bytes], expected: str | None = None) -> str:
        """Keep the bytes under their sha256 and return it; 400 if another one was announced."""
        temporary = self.root / "blobs" / f".{secrets.token_hex(8)}"
        digest = hashlib.sha256()
        try:
            with temporary.open("wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            sha256 = digest.hexdigest()
            if expected not in (None, sha256):
                raise Refusal(400, f"the content's sha256 is {sha256}, not {expected}")
            os.replace(temporary, self.blob(sha256))
        finally:
            temporary.unlink(missing_ok=True)
        return sha256

    def drop_blob(self, sha256: str) -> None:
        """Delete the bytes unless a commit of any repo refers to them."""
        for repo in self.repos.values():
            for oid in repo.reachable():
                if any(entry["sha256"] == sha256 for entry in repo.commit(oid)["files"].values()):
                    return
        self.blob(sha256).unlink(missing_ok=True)

    def put_xet(self, file_hash: str, segments: list[tuple[str, int, int]]) -> None:
        """Put a file together from its segments (block, first chunk, end) and remember its hash."""
        chunks = (
            chunk
            for block, start, end in segments
            for chunk in xorb_chunks(self.root / "xet" / "xorbs" / block, start, end)
        )
        replace_file(self.root / "xet" / "files" / file_hash, self.put_stream(chunks))

    def xet_sha256(self, file_hash: str) -> str:
        """Return the sha256 of a file that came by Xet; an empty file's hash is all zeros."""
        if not file_hash.strip("0"):
            return self.put(b"")
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
        name = rev.removeprefix("refs/heads/")
        if name in self.state["branches"]:
            return self.state["branches"][name]
        if rev.removeprefix("refs/tags/") in self.state["tags"]:
            return self.state["tags"][rev.removeprefix("refs/tags/")]["oid"]
        if re.fullmatch("[0-9a-f]{40}", rev) and self.commit_file(rev).exists():
            return rev
        raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")

    def branch_head(self, name: str) -> str:
        if name not in self.state["branches"]:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return self.state["branches"][name]

    def files(self, rev: str) -> dict[str, dict]:
        return self.commit(self.resolve(rev))["files"]

    def add_commit(
        self, branch: str, parent: str | None, files: dict, title: str, message: str, author: str
    ) -> str:
        """Write a commit and make it the branch's head; return its oid. Needs the hub's lock."""
        oid = self.write_commit(parent, files, title, message, author, now())
        lfs = dict(self.state["lfs"])
        for path, entry in files.items():
            if entry["lfs"] and entry["sha256"] not in lfs:
                record = {"filename": path, "size": entry["size"], "pushedAt": now()}
                lfs[entry["sha256"]] = record
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
            elif str(path.relative_to(tree)) not in files:
                path.unlink()
        for path, entry in files.items():
            target, blob = tree / path, self.store.blob(entry["sha256"])
            if not blob.exists() or (target.exists() and target.samefile(blob)):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            os.link(blob, target)

    def reachable(self) -> set[str]:
        """Return the commits that a branch or a tag leads to."""
        tips = [*self.state["branches"].values(), *(t["oid"] for t in self.state["tags"].values())]
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

        def rewrite(tip: str) -> str:
            for old in reversed(list(self.history(tip))):
                if old["oid"] in rewritten:
                    continue
                files = {p: e for p, e in old["files"].items() if e["sha256"] not in gone}
                parent, rest = rewritten[old["parent"]], (old["title"], old["message"])
                new = self.write_commit(parent, files, *rest, old["author"], old["date"])
                rewritten[old["oid"]] = new
            return rewritten[tip]

        branches = {name: rewrite(oid) for name, oid in self.state["branches"].items()}
        tags = {n: {**tag, "oid": rewrite(tag["oid"])} for n, tag in self.state["tags"].items()}
        self.save(branches=branches, tags=tags)
        self.forget_unreachable()
        self.update_folder()

    def file_item(self, oid: str, path: str, entry: dict, expand: bool) -> dict[str, Any]:
        """Return a file as the tree listing shows it; `expand` adds its last commit."""
        item = {"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"]}
        if entry["lfs"]:
            item["lfs"] = lfs_item(entry)
        return item | self.last_commit(oid, path) if expand else item

    def folder_item(self, oid: str, path: str, expand: bool) -> dict[str, Any]:
        tree_id = hashlib.sha1(f"{oid}/{path}".encode()).hexdigest()
        item = {"type": "directory", "path": path, "oid": tree_id, "size": 0}
        return item | self.last_commit(oid, path) if expand else item

    def last_commit(self, oid: str, path: str) -> dict[str, Any]:
        """Return the newest commit in which the path, or something below it, changed."""

        def content(commit: dict) -> dict:
            inside = path + "/"
            return {p: e for p, e in commit["files"].items() if p == path or p.startswith(inside)}

        last = None
        for commit in self.history(oid):
            if last is not None and content(commit) != content(last):
                break
            last = commit
        return {"lastCommit": {"id": last["oid"], "title": last["title"], "date": last["date"]}}


# ------------------------------------------------------------------------------------------
# The Xet formats
# ------------------------------------------------------------------------------------------


def hash_hex(raw: bytes) -> str:
    """Xet writes a 32-byte hash as four little-endian 64-bit numbers."""
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
                grouped, chunk = chunk, bytearray(len(chunk))
                at = 0
                for position in range(4):
                    count = len(chunk[position::4])
                    chunk[position::4] = grouped[at : at + count]
                    at += count
            yield bytes(chunk)


# ------------------------------------------------------------------------------------------
# Started by hand
# ------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", help="folder that keeps everything (default: a new one)")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--uploads", choices=("xet", "lfs", "regular"), default="xet")
    parser.add_argument("--page_size", type=int, default=1000, help="items per listing page")
    parser.add_argument(
        "--user",
        action="append",
        metavar="NAME:TOKEN:ROLE",
        help=f"role is read or write; default: {' '.join(DEFAULT_USERS)}",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    hub = Hub(
        args.root,
        args.port,
        args.uploads,
        users=args.user or DEFAULT_USERS,
        page_size=args.page_size,
        own_process=True,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with hub, contextlib.suppress(KeyboardInterrupt):
        print(f"export HF_ENDPOINT={hub.endpoint}")
        print(f"export HF_TOKEN={hub.token}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
