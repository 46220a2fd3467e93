"""The loopback Hub speaks to the real clients: every answer here comes through one of them."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub import DEFAULT_USERS, Hub, Job
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    Volume,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    JobNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

HUB_SCRIPT = Path(__file__).with_name("hub.py")
HF = str(Path(sys.executable).with_name("hf"))


def client(hub: Hub, token: str | bool | None = None) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token if token is None else token)


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return client(hub)


@pytest.fixture
def repo_id(api: HfApi, request: pytest.FixtureRequest) -> str:
    """A private model repo of the test's own."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return api.create_repo(f"alice/{name.strip('-')}", private=True).repo_id


def add(path: str, content: bytes = b"content") -> CommitOperationAdd:
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)


def wait_until(condition: Callable[[], object]) -> object:
    """Poll until the condition holds; the limit only ends a test that has failed anyway."""
    for _ in range(600):
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError("the condition never held")


# Repos ------------------------------------------------------------------------------------


def make_folder(folder: Path) -> dict[str, bytes]:
    """Write files that take each path through the Xet formats; return their contents."""
    contents = {
        "random.safetensors": os.urandom(3_000_000),  # several chunks, stored as they are
        "floats.safetensors": b"".join(
            int(i).to_bytes(4, "little") for i in range(0, 2**26, 97)
        ),  # numbers of 4 bytes are grouped by byte position before compression
        "deep/er/text.bin": b"compressible " * 40_000,
        "copy.safetensors": b"",
        "notes.txt": "regular, naïve".encode(),
        "empty.txt": b"",
    }
    contents["copy.safetensors"] = contents["random.safetensors"]
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return contents


def test_folder_comes_back_as_it_went_through_xet(
    hub: Hub, api: HfApi, repo_id: str, tmp_path: Path
) -> None:
    contents = make_folder(tmp_path / "up")
    api.upload_folder(folder_path=tmp_path / "up", repo_id=repo_id)
    assert any("/xorbs/" in path for _, path, _ in hub.requests)

    assert {*api.list_repo_files(repo_id)} == {*contents, ".gitattributes"}
    for name, content in contents.items():
        assert (hub.repo_folder(repo_id) / name).read_bytes() == content
    down = snapshot_download(
        repo_id, endpoint=hub.endpoint, token=hub.token, cache_dir=tmp_path / "cache"
    )
    assert {name: (Path(down) / name).read_bytes() for name in contents} == contents

    commits = len(hub.commits(repo_id))
    api.upload_folder(folder_path=tmp_path / "up", repo_id=repo_id)
    assert len(hub.commits(repo_id)) == commits, "an unchanged folder makes no commit"


def test_stream_goes_through_lfs(hub: Hub, api: HfApi, repo_id: str, tmp_path: Path) -> None:
    content = os.urandom(100_000)
    stream = io.BytesIO(content)
    api.upload_file(path_or_fileobj=stream, path_in_repo="a/w.safetensors", repo_id=repo_id)
    assert any(f"/{repo_id}.git/info/lfs" in path for _, path, _ in hub.requests)
    path = api.hf_hub_download(repo_id, "a/w.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == content
    [info] = api.get_paths_info(repo_id, ["a/w.safetensors", "missing"])
    assert (info.size, info.lfs.size) == (100_000, 100_000)


def test_regular_uploads_need_no_other_storage(tmp_path: Path) -> None:
    with Hub(tmp_path / "hub", uploads="regular") as hub:
        api = client(hub)
        api.create_repo("alice/m")
        make_folder(tmp_path / "up")
        api.upload_folder(folder_path=tmp_path / "up", repo_id="alice/m")
        assert (hub.repo_folder("alice/m") / "deep/er/text.bin").stat().st_size == 520_000
        assert not any("xet" in path or "lfs" in path for _, path, _ in hub.requests)


def test_part_of_a_file(hub: Hub, api: HfApi, repo_id: str) -> None:
    content = bytes(range(256)) * 100
    api.upload_file(path_or_fileobj=content, path_in_repo="f.bin", repo_id=repo_id)
    files = HfFileSystem(endpoint=hub.endpoint, token=hub.token)
    with files.open(f"{repo_id}/f.bin", block_size=500) as file:
        file.seek(20_000)
        assert file.read(300) == content[20_000:20_300]
        file.seek(-7, os.SEEK_END)
        assert file.read() == content[-7:]
    assert any("206" in str(status) for _, _, status in hub.requests)


def test_commit_deletes_and_adds_at_once(hub: Hub, api: HfApi, repo_id: str) -> None:
    steps = ["checkpoint-1/model.bin", "checkpoint-1/trainer_state.json", "old.txt"]
    api.create_commit(repo_id, [add(step) for step in steps], commit_message="first")
    operations = [
        CommitOperationDelete("checkpoint-1/"),
        CommitOperationDelete("old.txt"),
        add("checkpoint-2/model.bin", b"two"),
    ]
    done = api.create_commit(repo_id, operations, commit_message="second")

    newest, first, _ = hub.commits(repo_id)
    assert (newest["oid"], newest["message"]) == (done.oid, "second")
    assert sorted(newest["files"]) == [".gitattributes", "checkpoint-2/model.bin"]
    assert {*steps} < {*first["files"]}
    assert not (hub.repo_folder(repo_id) / "checkpoint-1").exists()
    assert api.list_repo_files(repo_id, revision=first["oid"]) == sorted([".gitattributes", *steps])


def test_refused_commits_change_nothing(hub: Hub, api: HfApi, repo_id: str) -> None:
    api.create_commit(repo_id, [add("file")], commit_message="first")
    before = hub.commits(repo_id)
    with pytest.raises(EntryNotFoundError):
        api.create_commit(
            repo_id, [add("new"), CommitOperationDelete("missing")], commit_message="second"
        )
    with pytest.raises(BadRequestError, match="both a file and a folder"):
        api.create_commit(repo_id, [add("file/below")], commit_message="second")
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(repo_id, [add("new")], commit_message="second", revision="missing")
    assert hub.commits(repo_id) == before
    assert not (hub.repo_folder(repo_id) / "new").exists()


def test_stale_parent_is_412(api: HfApi, repo_id: str) -> None:
    stale = api.repo_info(repo_id).sha
    api.create_commit(repo_id, [add("a")], commit_message="first", parent_commit=stale)
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit(repo_id, [add("b")], commit_message="second", parent_commit=stale)
    assert refused.value.response.status_code == 412


def test_one_of_four_writers_with_one_parent_wins(hub: Hub, api: HfApi, repo_id: str) -> None:
    parent = api.repo_info(repo_id).sha

    def claim(writer: int) -> int:
        try:
            content = str(writer).encode()
            message = f"writer {writer}"
            api.create_commit(
                repo_id, [add("claim", content)], commit_message=message, parent_commit=parent
            )
        except HfHubHTTPError as error:
            return error.response.status_code
        return 200

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(claim, range(4))) == [200, 412, 412, 412]
    assert len(hub.commits(repo_id)) == 2


def test_branches_tags_and_squash(hub: Hub, api: HfApi, repo_id: str, tmp_path: Path) -> None:
    first = api.create_commit(repo_id, [add("a", b"1")], commit_message="first").oid
    api.create_tag(repo_id, tag="v1", tag_message="the first")
    api.create_branch(repo_id, branch="refs/convert/parquet")
    api.create_branch(repo_id, branch="side", revision="v1")
    api.create_commit(repo_id, [add("a", b"side")], commit_message="aside", revision="side")
    api.create_commit(repo_id, [add("a", b"2")], commit_message="second")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(repo_id, tag="v1")

    refs = api.list_repo_refs(repo_id)
    assert [tag.target_commit for tag in refs.tags] == [first]
    assert [branch.name for branch in refs.branches] == ["main", "side"]
    assert [convert.ref for convert in refs.converts] == ["refs/convert/parquet"]
    contents = {
        "main": b"2",
        "side": b"side",
        "v1": b"1",
        first: b"1",
        "refs/convert/parquet": b"1",
    }
    for revision, content in contents.items():
        path = api.hf_hub_download(repo_id, "a", revision=revision, cache_dir=tmp_path)
        assert Path(path).read_bytes() == content, revision
    assert [commit.title for commit in api.list_repo_commits(repo_id)][:2] == ["second", "first"]

    api.super_squash_history(repo_id, commit_message="all in one")
    assert [commit["message"] for commit in hub.commits(repo_id)] == ["all in one"]
    assert (hub.repo_folder(repo_id) / "a").read_bytes() == b"2"
    assert api.repo_info(repo_id, revision="v1").sha == first, "a tag keeps its history"
    api.delete_tag(repo_id, tag="v1")
    api.delete_branch(repo_id, branch="side")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(repo_id, revision="v1")


def test_lfs_files_count_until_they_are_deleted_for_good(
    hub: Hub, api: HfApi, repo_id: str
) -> None:
    big, kept = os.urandom(50_000), os.urandom(1000)
    api.create_commit(repo_id, [add("old.bin", big), add("kept.bin", kept)], commit_message="add")
    api.create_commit(repo_id, [CommitOperationDelete("old.bin")], commit_message="delete")
    assert api.model_info(repo_id, expand="usedStorage").used_storage == 51_000
    [old] = [file for file in api.list_lfs_files(repo_id) if file.filename == "old.bin"]
    assert old.ref is None

    api.permanently_delete_lfs_files(repo_id, [old])
    assert [file.filename for file in api.list_lfs_files(repo_id)] == ["kept.bin"]
    assert all("old.bin" not in commit["files"] for commit in hub.commits(repo_id))
    assert [commit["message"] for commit in hub.commits(repo_id)][:2] == ["delete", "add"]
    assert not (hub.root / "blobs" / old.file_oid).exists()
    assert (hub.repo_folder(repo_id) / "kept.bin").read_bytes() == kept


def test_listing_in_pages_and_by_folder(tmp_path: Path) -> None:
    with Hub(tmp_path, page_size=3) as hub:
        api = client(hub)
        api.create_repo("alice/data", repo_type="dataset")
        files = [f"data/{name}.txt" for name in "abcdefg"] + ["README.md"]
        repo = {"repo_id": "alice/data", "repo_type": "dataset"}
        api.create_commit(operations=[add(file) for file in files], commit_message="add", **repo)
        assert sorted(api.list_repo_files(**repo)) == sorted([".gitattributes", *files])
        top = list(api.list_repo_tree(**repo, expand=True))
        assert [item.path for item in top] == [".gitattributes", "README.md", "data"]
        assert [item.last_commit.title for item in top] == ["initial commit", "add", "add"]
        inside = api.list_repo_tree(**repo, path_in_repo="data")
        assert [item.path for item in inside] == files[:-1]
        with pytest.raises(EntryNotFoundError):
            list(api.list_repo_tree(**repo, path_in_repo="missing"))
        assert sum("cursor=" in path for _, path, _ in hub.requests) == 5


def test_who_may_see_and_change_what(hub: Hub, api: HfApi, repo_id: str) -> None:
    owner, reader, other = (client(hub, entry.split(":")[1]) for entry in DEFAULT_USERS)
    anonymous = client(hub, False)
    assert owner.whoami()["auth"]["accessToken"]["role"] == "write"
    assert reader.whoami()["name"] == "alice"
    assert reader.repo_info(repo_id).private
    for stranger, status in ((anonymous, 401), (other, 404)):
        with pytest.raises(RepositoryNotFoundError) as hidden:
            stranger.repo_info(repo_id)
        assert hidden.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        client(hub, "hf_unknown").repo_info(repo_id)

    api.update_repo_settings(repo_id, private=False)
    assert not anonymous.repo_info(repo_id).private
    refused = [
        lambda: reader.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo_id),
        lambda: other.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo_id),
        lambda: other.auth_check(repo_id, write=True),
        lambda: reader.create_repo("alice/new"),
        lambda: other.create_repo("alice/new"),
    ]
    for attempt in refused:
        with pytest.raises(HfHubHTTPError, match="403"):
            attempt()
    assert len(hub.commits(repo_id)) == 1

    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(repo_id)
    assert api.create_repo(repo_id, exist_ok=True).repo_id == repo_id
    api.delete_repo(repo_id)
    assert not api.repo_exists(repo_id)


def test_models_are_listed_by_author_to_those_who_may_see_them(tmp_path: Path) -> None:
    with Hub(tmp_path) as hub:
        alice, bob = client(hub), client(hub, "hf_bob")
        alice.create_repo("alice/private-one", private=True)
        alice.create_repo("alice/public-one")
        alice.create_repo("alice/a-dataset", repo_type="dataset")
        bob.create_repo("bob/private-two", private=True)
        names = {"alice/private-one", "alice/public-one"}
        assert {model.id for model in alice.list_models(author="alice")} == names
        assert {model.id for model in bob.list_models(author="alice")} == {"alice/public-one"}
        assert [model.id for model in bob.list_models(author="bob")] == ["bob/private-two"]


def test_restart_keeps_everything(tmp_path: Path) -> None:
    contents = make_folder(tmp_path / "up")
    with Hub(tmp_path / "hub") as hub:
        api = client(hub)
        api.create_repo("alice/m", private=True)
        api.upload_folder(folder_path=tmp_path / "up", repo_id="alice/m")
        api.create_tag("alice/m", tag="v1")
        commits = hub.commits("alice/m")
        job = run_python(api, "print('before the restart')")
        wait(api, job.id)
    # What a kill between a commit and its working tree leaves behind is repaired at the start.
    (hub.repo_folder("alice/m") / "notes.txt").unlink()
    (hub.repo_folder("alice/m") / "half.tmp").write_text("")
    with Hub(tmp_path / "hub") as hub:
        api = client(hub)
        assert hub.commits("alice/m") == commits
        folder = hub.repo_folder("alice/m")
        found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert found == {*contents, ".gitattributes"}
        assert api.repo_info("alice/m", revision="v1").private
        assert "before the restart" in logs(api, job.id)


DATASETS_CLIENT = """
import os
from datasets import Dataset, load_dataset
from huggingface_hub import ModelCard

rows = {"text": [f"post {i}" for i in range(30)], "label": [i % 2 for i in range(30)]}
data = Dataset.from_dict(rows)
for config in ("unified", "simple"):
    for split in ("train", "test"):
        data.push_to_hub("alice/posts", config, split=split, private=True)
part = data.select(range(5))
part.push_to_hub("alice/posts", "simple", split="test", private=True)
for config, split, length in (("unified", "train", 30), ("simple", "test", 5)):
    loaded = load_dataset("alice/posts", config, split=split)
    assert loaded.to_dict() == (data if length == 30 else part).to_dict(), (config, split)
streamed = load_dataset("alice/posts", "unified", split="test", streaming=True)
assert next(iter(streamed)) == {"text": "post 0", "label": 0}
card = ModelCard("---\\nlicense: mit\\ntags: [hate-speech]\\n---\\n# A card\\n")
card.push_to_hub("alice/posts", repo_type="dataset")
loaded = ModelCard.load("alice/posts", repo_type="dataset")
assert loaded.data.license == "mit"
"""


@pytest.mark.parametrize("uploads", ["xet", "lfs"])
def test_datasets_push_and_load(uploads: str, tmp_path: Path) -> None:
    with Hub(tmp_path / "hub", uploads=uploads) as hub:
        env = {**os.environ, **hub.env(home=tmp_path / "home")}
        command = [sys.executable, "-c", DATASETS_CLIENT]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        folder = hub.repo_folder("alice/posts", "dataset")
        shards = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.parquet"))
        assert [shard.split("-")[0] for shard in shards] == [
            f"{config}/{split}" for config in ("simple", "unified") for split in ("test", "train")
        ]
        assert client(hub).repo_info("alice/posts", repo_type="dataset").private
        assert any("/xorbs/" in path for _, path, _ in hub.requests) == (uploads == "xet")


# Faults -----------------------------------------------------------------------------------


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[tuple[Hub, HfApi]]:
    """A Hub of the test's own with a repo alice/m."""
    with Hub(tmp_path / "faulty") as hub:
        api = client(hub)
        api.create_repo("alice/m")
        yield hub, api


def test_fault_status_once_then_well(faulty: tuple[Hub, HfApi]) -> None:
    hub, api = faulty
    hub.add_fault(method="POST", path="/commit/", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.create_commit("alice/m", [add("a")], commit_message="first")
    assert len(hub.commits("alice/m")) == 1
    api.create_commit("alice/m", [add("a")], commit_message="first")
    assert len(hub.commits("alice/m")) == 2


def test_fault_waits_for_its_turn(faulty: tuple[Hub, HfApi]) -> None:
    hub, api = faulty
    hub.add_fault(path="whoami", status=429, headers={"Retry-After": "7"}, skip=1, times=2)
    statuses = []
    for _ in range(4):
        try:
            api.whoami()
            statuses.append(200)
        except HfHubHTTPError as error:
            statuses.append(error.response.status_code)
            assert error.response.headers["Retry-After"] == "7"
    assert statuses == [200, 429, 429, 200]
    hub.add_fault(path="whoami", status=500, times=None)
    hub.clear_faults()
    assert api.whoami()["name"] == "alice"


def test_fault_in_the_storage_is_retried(faulty: tuple[Hub, HfApi], tmp_path: Path) -> None:
    hub, api = faulty
    contents = make_folder(tmp_path / "up")
    hub.add_fault(method="POST", path="/xorbs/", drop="before")
    hub.add_fault(method="POST", path="/shards", status=503, delay_s=0.1, skip=1)
    api.upload_folder(folder_path=tmp_path / "up", repo_id="alice/m")
    assert {*hub.commits("alice/m")[0]["files"]} == {*contents, ".gitattributes"}
    assert [status for _, path, status in hub.requests if "/xorbs/" in path] == [0, 200]


def test_fault_answer_lost_after_the_commit(faulty: tuple[Hub, HfApi]) -> None:
    hub, api = faulty
    hub.add_fault(path="/commit/", drop="after")
    with pytest.raises(Exception, match=r"(?i)disconnected|reset|closed"):
        api.create_commit("alice/m", [add("a")], commit_message="done, but who knows")
    assert hub.commits("alice/m")[0]["message"] == "done, but who knows"


def test_fault_cannot_kill_its_own_process(faulty: tuple[Hub, HfApi]) -> None:
    hub, _ = faulty
    with pytest.raises(ValueError, match="end this process"):
        hub.add_fault(path="/commit/", kill=True)


class Served:
    """`python tests/hub.py` as a process: its endpoint and token come from the lines it prints."""

    def __init__(self, root: Path, *flags: str) -> None:
        command = [sys.executable, str(HUB_SCRIPT), "--root", str(root), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines = [self.process.stdout.readline() for _ in range(2)]
        exported = dict(line.removeprefix("export ").strip().split("=", 1) for line in lines)
        self.endpoint, self.token = exported["HF_ENDPOINT"], exported["HF_TOKEN"]
        self.port = self.endpoint.rsplit(":", 1)[1]

    def add_fault(self, **fault: object) -> None:
        data = json.dumps(fault).encode()
        urllib.request.urlopen(f"{self.endpoint}/_hub/faults", data).close()

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        self.process.send_signal(with_signal)
        rest, _ = self.process.communicate()
        assert rest == "", "nothing but the two lines on stdout"
        return self.process.returncode


def test_killed_server_has_the_commit_whole_or_not_at_all(tmp_path: Path) -> None:
    served = Served(tmp_path)
    api = client(served)
    api.create_repo("alice/m")
    served.add_fault(path="/commit/", kill=True)
    with pytest.raises(Exception, match=r"(?i)disconnected|reset|closed"):
        api.create_commit("alice/m", [add("a"), add("b")], commit_message="at the commit")
    assert served.process.wait() == 137
    served.process.stdout.close()

    served = Served(tmp_path, "--port", served.port)
    assert api.list_repo_files("alice/m") == [".gitattributes"]
    served.add_fault(path="/commit/", kill=True, drop="after")
    with pytest.raises(Exception, match=r"(?i)disconnected|reset|closed"):
        api.create_commit("alice/m", [add("a"), add("b")], commit_message="after the commit")
    assert served.process.wait() == 137
    served.process.stdout.close()

    served = Served(tmp_path, "--port", served.port)
    assert api.list_repo_files("alice/m") == [".gitattributes", "a", "b"]
    assert (tmp_path / "models/alice/m/main/a").read_bytes() == b"content"
    assert served.stop() == 0


# Jobs -------------------------------------------------------------------------------------

SCRIPT = """\
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
import os, signal, sys, time
from pathlib import Path

behaviour, *rest = sys.argv[1:]
print("arguments", rest, flush=True)
if behaviour == "exit":
    sys.exit(int(rest[0]))
if behaviour == "write":
    print("secret arrived", os.environ["API_KEY"] == "v4lue")
    Path(__file__).with_name("artifact.txt").write_text("from the job")
if behaviour in ("obey", "ignore"):
    def on_sigterm(*_):
        print("SIGTERM seen", flush=True)
        if behaviour == "obey":
            sys.exit(0)
    signal.signal(signal.SIGTERM, on_sigterm)
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def jobs_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub whose jobs have half a second between SIGTERM and SIGKILL."""
    with Hub(tmp_path_factory.mktemp("jobs"), grace=0.5, job_env=["GIVEN=yes", "ABSENT"]) as hub:
        yield hub


@pytest.fixture
def jobs_api(jobs_hub: Hub) -> HfApi:
    return client(jobs_hub)


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def run_python(api: HfApi, code: str, **options: object) -> object:
    """Start a job without uv, in this interpreter."""
    return api.run_job(image="python:3.12", command=[sys.executable, "-c", code], **options)


def wait(api: HfApi, job_id: str) -> object:
    return api.wait_for_job(job_id, poll_interval=0.05, timeout=60)


def logs(api: HfApi, job_id: str) -> list[str]:
    return list(api.fetch_job_logs(job_id=job_id, follow=True))


def wait_for_line(hub: Hub, job_id: str, line: str) -> None:
    job: Job = hub.jobs[job_id]
    wait_until(lambda: any(entry["data"] == line for entry in job.lines))


def hf(hub: Hub, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **hub.env(home=home)}
    return subprocess.run([HF, *words], env=env, capture_output=True, text=True, check=False)


def test_hf_jobs_uv_run(jobs_hub: Hub, jobs_api: HfApi, script: str, tmp_path: Path) -> None:
    options = ["--flavor", "a100-large", "--secrets", "API_KEY=v4lue", "--name", "shown"]
    done = hf(jobs_hub, tmp_path, "jobs", "uv", "run", *options, script, "write", "3", "--x=y z")
    assert done.returncode == 0, done.stderr
    assert "arguments ['3', '--x=y z']" in done.stdout
    assert "secret arrived True" in done.stdout

    [job] = jobs_api.list_jobs(namespace="alice", labels={"name": "shown"})
    assert (job.status.stage, job.flavor, job.retry) == ("COMPLETED", "a100-large", 0)
    assert job.created_at <= job.started_at <= job.finished_at
    assert job.secrets == {"API_KEY": "***"}
    assert "v4lue" not in hf(jobs_hub, tmp_path, "jobs", "inspect", job.id).stdout
    assert "v4lue" not in (jobs_hub.root / "jobs" / job.id / "job.json").read_text()
    [artifact] = jobs_hub.root.glob("buckets/alice/jobs-artifacts/*/artifact.txt")
    assert artifact.read_text() == "from the job", "the script's folder is the bucket"

    again = jobs_api.rerun_job(job_id=job.id)
    assert wait(jobs_api, again.id).status.stage == "COMPLETED"
    assert "secret arrived True" in logs(jobs_api, again.id)
    assert again.initiator.type == "duplicated-job"


def test_hf_jobs_uv_run_that_fails(jobs_hub: Hub, script: str, tmp_path: Path) -> None:
    done = hf(jobs_hub, tmp_path, "jobs", "uv", "run", script, "exit", "7")
    assert done.returncode == 1
    assert "exit code: 7" in done.stderr


def test_timeout_sends_sigterm(jobs_hub: Hub, jobs_api: HfApi, script: str) -> None:
    job = jobs_api.run_uv_job(script, script_args=["obey"], timeout=4, attempts=3)
    ended = wait(jobs_api, job.id)
    assert (ended.status.stage, ended.status.message) == ("ERROR", "Job timeout")
    assert logs(jobs_api, job.id) == ["arguments []", "ready", "SIGTERM seen"]


def test_sigkill_follows_where_sigterm_is_ignored(
    jobs_hub: Hub, jobs_api: HfApi, script: str
) -> None:
    job = jobs_api.run_uv_job(script, script_args=["ignore"])
    wait_for_line(jobs_hub, job.id, "ready")
    assert jobs_api.inspect_job(job_id=job.id).status.stage == "RUNNING"
    running = jobs_api.list_jobs(namespace="alice", status="RUNNING")
    assert job.id in [listed.id for listed in running]
    jobs_api.cancel_job(job_id=job.id)
    assert wait(jobs_api, job.id).status.stage == "CANCELED"
    assert logs(jobs_api, job.id)[-1] == "SIGTERM seen"


def test_attempts(jobs_api: HfApi) -> None:
    job = run_python(jobs_api, "print('again'); raise SystemExit(3)", attempts=3)
    ended = wait(jobs_api, job.id)
    assert (ended.status.stage, ended.retry) == ("ERROR", 2)
    assert "exit code: 3" in ended.status.message
    assert logs(jobs_api, job.id) == ["again"] * 3
    assert list(jobs_api.fetch_job_logs(job_id=job.id, follow=True, tail=1)) == ["again"]


def test_job_sees_a_new_machine(
    jobs_hub: Hub, jobs_api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_SERVER", "not for jobs")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_server")
    monkeypatch.setenv("UV_OF_THE_SERVER", "for jobs")
    code = "import json, os; print(json.dumps([dict(os.environ), os.getcwd(), os.listdir()]))"
    job = run_python(jobs_api, code, env={"OWN": 1}, flavor="l4x1")
    [line] = logs(jobs_api, job.id)
    env, folder, files = json.loads(line)
    passed = {name for name in os.environ if name.startswith(("UV_", "SSL_CERT_"))}
    assert {*env} == passed | {
        *("ACCELERATOR", "CPU_CORES", "GIVEN", "HF_ENDPOINT", "HF_HOME", "HOME", "JOB_ID", "LANG"),
        *("MEMORY", "OWN", "PATH", "TMPDIR", "UV_CACHE_DIR", "UV_PYTHON_INSTALL_DIR"),
    }
    expected = {"ACCELERATOR": "l4x1", "CPU_CORES": "8", "MEMORY": "30Gi", "JOB_ID": job.id}
    expected |= {"HF_ENDPOINT": jobs_hub.endpoint, "OWN": "1", "GIVEN": "yes", "HOME": folder}
    assert expected.items() <= env.items()
    assert env["HF_HOME"].startswith(folder)
    assert files == []
    wait(jobs_api, job.id)
    assert not Path(folder).exists(), "a machine is gone when its job has ended"


def test_labels_hardware_and_refusals(jobs_hub: Hub, jobs_api: HfApi) -> None:
    job = run_python(jobs_api, "pass")
    assert jobs_api.update_job_labels(job_id=job.id, labels={"a": "b"}).labels == {"a": "b"}
    labelled = jobs_api.list_jobs(namespace="alice", labels={"a": "b"})
    assert [listed.id for listed in labelled] == [job.id]
    assert not list(jobs_api.list_jobs(namespace="alice", labels={"a": "c"}))
    prices = {flavor.name: flavor.unit_cost_usd * 60 for flavor in jobs_api.list_jobs_hardware()}
    assert prices["a100-large"] == pytest.approx(2.50)
    with pytest.raises(HfHubHTTPError, match="unknown flavor a1000"):
        run_python(jobs_api, "pass", flavor="a1000")
    with pytest.raises(JobNotFoundError):
        jobs_api.inspect_job(job_id="0" * 24)
    with pytest.raises(HfHubHTTPError, match="403"):
        client(jobs_hub, "hf_bob").inspect_job(job_id=job.id, namespace="alice")
    with pytest.raises(HfHubHTTPError, match="403"):
        run_python(client(jobs_hub, "hf_alice_read"), "pass")
    with pytest.raises(HfHubHTTPError, match="no bucket alice/none to mount"):
        volume = Volume(type="bucket", source="alice/none", mount_path="/mnt")
        run_python(jobs_api, "pass", volumes=[volume])
    missing = jobs_api.run_job(image="python:3.12", command=["no-such-program"])
    assert wait(jobs_api, missing.id).status.stage == "ERROR"


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGKILL])
def test_jobs_die_with_their_server(with_signal: int, tmp_path: Path) -> None:
    served = Served(tmp_path)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(30)
    # A child of the job's first process, in its group, holds the line open as long as it lives.
    child = f"import socket; socket.create_connection({listener.getsockname()}).recv(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with listener:
        job = run_python(client(served), code)
        line, _ = listener.accept()
        with line:
            line.settimeout(30)
            threading.Thread(target=served.stop, args=[with_signal]).start()
            assert line.recv(1) == b"", "the line is cut because its holder is dead"
    served.process.wait()

    with Hub(tmp_path) as hub:
        ended = client(hub).inspect_job(job_id=job.id)
        assert (ended.status.stage, ended.status.message) == ("ERROR", "The server stopped")
