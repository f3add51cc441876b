"""A stand-in of the hub: as much of its HTTP interface as uploads and downloads of models use, all in memory."""

import base64
import contextlib
import hashlib
import importlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

TOKENS = {"hf_mine": "write", "hf_reader": "read"}  # all of the user `me`
LARGE = (".safetensors", ".png")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)  # the paths of each

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server and what it holds.

    Args:
        takes: so many large files, then it refuses; None = all.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.takes: int | None = None
        self.unknown: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def hold(self, repo: str, folder: Path, private: bool = False) -> None:
        """Publish a folder."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories[repo] = Repository(private, files, [sorted(files)])


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def answer(self, body: Any = b"", status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, what: str) -> None:
        self.answer({"error": f"{what} not found"}, 404, X_Error_Code=what)

    def log_message(self, *_: Any) -> None: ...

    def respond(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        path = unquote(urlsplit(self.path).path)
        for method, pattern, action in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                with self.server.lock:
                    return action(self, *match.groups())
        self.server.unknown.append(f"{self.command} {path}")
        return self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = respond  # noqa: N815

    def found(self, repo: str) -> Repository | None:
        """None, and an answer, where it is not there for this user."""
        repository = self.server.repositories.get(repo)
        if repository is None or (repository.private and self.token not in TOKENS):
            self.missing("RepoNotFound")
            return None
        return repository

    def whoami(self) -> None:
        if self.token not in TOKENS:
            return self.answer({"error": "Invalid credentials"}, 401)
        orgs = [{"name": "club", "roleInOrg": "write"}, {"name": "archive", "roleInOrg": "read"}]
        access = {"accessToken": {"displayName": "t", "role": TOKENS[self.token]}}
        return self.answer({"type": "user", "name": "me", "orgs": orgs, "auth": access})

    def create(self) -> None:
        wanted = json.loads(self.body)
        repo = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        if repo.partition("/")[0] not in ("me", "club"):
            return self.answer({"error": "no rights"}, 403)
        status = 409 if repo in self.server.repositories else 200
        self.server.repositories.setdefault(repo, Repository(wanted["visibility"] == "private"))
        return self.answer({"url": f"{self.server.address}/{repo}"}, status)

    def info(self, repo: str) -> None:
        if repository := self.found(repo):
            files = [{"rfilename": path} for path in repository.files]
            self.answer({"id": repo, "sha": repository.sha, "private": repository.private, "siblings": files})

    def may_write(self, repo: str) -> None:
        if self.found(repo):
            self.answer(b"{}", 200 if repo != "club/locked" else 403)

    def tree(self, repo: str) -> None:
        if repository := self.found(repo):
            self.answer([
                {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
                | ({"lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 1}} if is_large(path) else {})
                for path, content in repository.files.items()
            ])  # fmt: skip

    def preupload(self, repo: str) -> None:
        if repository := self.found(repo):
            self.answer({"files": [
                {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False}
                | ({"oid": oid(path, repository.files[path])} if path in repository.files else {})
                for path in (wanted["path"] for wanted in json.loads(self.body)["files"])
            ]})  # fmt: skip

    def batch(self, repo: str) -> None:
        wanted = json.loads(self.body)["objects"]
        place, there = f"{self.server.address}/objects/", self.server.objects
        self.answer({"transfer": "basic", "objects": [
            item | ({} if item["oid"] in there else {"actions": {"upload": {"href": place + item["oid"]}}})
            for item in wanted
        ]})  # fmt: skip

    def put(self, digest: str) -> None:
        if self.server.takes is not None and len(self.server.puts) >= self.server.takes:
            return self.answer(status=403, X_Error_Message="storage is full")
        assert sha256(self.body) == digest
        self.server.puts.append(digest)
        self.server.objects[digest] = self.body
        return self.answer()

    def commit(self, repo: str) -> None:
        if not (repository := self.found(repo)):
            return
        items = [json.loads(line) for line in self.body.splitlines()]
        files = {
            item["value"]["path"]: base64.b64decode(item["value"]["content"])
            if item["key"] == "file"
            else self.server.objects[item["value"]["oid"]]
            for item in items
            if item["key"] != "header"
        }
        repository.files |= files
        repository.commits.append(sorted(files))
        url = f"{self.server.address}/{repo}/commit/{repository.sha}"
        self.answer({"commitUrl": url, "commitOid": repository.sha})

    def resolve(self, repo: str, path: str) -> None:
        if not (repository := self.found(repo)):
            return None
        if path not in repository.files:
            return self.missing("EntryNotFound")
        content = repository.files[path]
        etag = f'"{oid(path, content)}"'
        return self.answer(content, ETag=etag, X_Repo_Commit=repository.sha)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def oid(path: str, content: bytes) -> str:
    return sha256(content) if is_large(path) else git_oid(content)


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", lambda handler: handler.answer({})),
    ("GET", f"/api/models/{REPO}(?:/revision/[^/]+)?", Handler.info),
    ("GET", f"/api/models/{REPO}/auth-check/write", Handler.may_write),
    ("GET", f"/api/models/{REPO}/tree/[^/]+", Handler.tree),
    ("POST", f"/api/models/{REPO}/preupload/main", Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/main", Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/objects/(.+)", Handler.put),
    ("GET", f"/{REPO}/resolve/[^/]+/(.+)", Handler.resolve),
    ("HEAD", f"/{REPO}/resolve/[^/]+/(.+)", Handler.resolve),
]


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Hub]:
    """A hub that this process talks to, as `me`; what it fetches goes to `folder`."""
    settings = {"HF_TOKEN": "hf_mine", "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (settings | {"HF_ENDPOINT": hub.address}).items():
                patch.setenv(name, value)
            read_again()
            try:
                yield hub
            finally:
                patch.undo()
                read_again()
                hub.shutdown()


def read_again() -> None:
    """What huggingface_hub reads from the environment when it is imported."""
    importlib.reload(constants)
    huggingface_hub.hf_api.api.endpoint = constants.ENDPOINT
