"""A stand-in for the hub's HTTP API on this machine: the endpoints that huggingface_hub asks, over repositories in memory.

Written from the client's requests and the public documentation; it misbehaves on demand.
"""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Repository:
    """Files by revision; `state` is what the hub answers: open, gated, private."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    state: str = "open"


@dataclass
class Hub:
    """What the server serves, what it was asked, and how it misbehaves: by file name."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    token: str = "hf_right"
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)  # so many times the connection ends in the middle of the file
    damaged: set[str] = field(default_factory=set)  # one bit of the file is wrong, its size right
    short: set[str] = field(default_factory=set)  # the file ends early, and its length says so
    sizes: dict[str, int] = field(default_factory=dict)  # what the list of files claims
    down: bool = False

    def add(self, name: str, folder: Path, branch: str = "main", state: str = "open") -> str:
        """Publish a folder as a new commit of a repository; returns the commit."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        commit = hashlib.sha1(repr((name, branch, sorted(files.items()))).encode()).hexdigest()
        repository = self.repositories.setdefault(name, Repository({}, {}, state))
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    def downloads(self) -> list[str]:
        """The files that were downloaded, in order."""
        got = (path for method, path, _ in self.asked if method == "GET" and not path.startswith("/api/"))
        sent = (path for path in got if path.startswith("/cdn/") or not is_large(path))
        return [path.rpartition("/")[2] for path in sent]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        path = urllib.parse.urlsplit(self.path).path
        self.hub.asked.append((self.command, path, self.headers.get("Authorization")))
        if self.hub.down:
            self.send(503, {}, b"", body)
        elif path.startswith("/api/models/"):
            self.info(path.removeprefix("/api/models/"), body)
        elif "/resolve/" in path:
            self.file(path[1:], body)
        elif path.startswith("/cdn/"):
            self.content(path, body)
        else:
            self.send(404, {}, b"", body)

    def repository(self, name: str, body: bool) -> Repository | None:
        found = self.hub.repositories.get(name)
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if found is None or (found.state == "private" and not allowed):
            self.send(404 if allowed else 401, {"X-Error-Code": "RepoNotFound"}, b"", body)
            return None
        if found.state == "gated" and not allowed:
            self.send(403, {"X-Error-Code": "GatedRepo"}, b"", body)
            return None
        return found

    def info(self, rest: str, body: bool) -> None:
        name, _, revision = rest.partition("/revision/")
        repository = self.repository(name, body)
        if repository is None:
            return
        commit = self.commit(repository, urllib.parse.unquote(revision) or "main", body)
        if commit is None:
            return
        files = []
        for path, content in repository.commits[commit].items():
            size = self.hub.sizes.get(path, len(content))
            entry: dict[str, Any] = {"rfilename": path, "size": size, "blobId": git_hash(content)}
            if is_large(path):
                entry["lfs"] = {"size": size, "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
            files.append(entry)
        answer = {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": commit,
            "siblings": files,
            "tags": [],
            "private": False,
        }
        self.send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode(), body)

    def commit(self, repository: Repository, revision: str, body: bool) -> str | None:
        commit = revision if revision in repository.commits else repository.branches.get(revision)
        if commit is None:
            self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"", body)
        return commit

    def file(self, rest: str, body: bool) -> None:
        name, _, rest = rest.partition("/resolve/")
        revision, _, path = rest.partition("/")
        repository = self.repository(name, body)
        if repository is None:
            return
        commit = self.commit(repository, urllib.parse.unquote(revision), body)
        if commit is None:
            return
        content = repository.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            self.send(404, {**headers, "X-Error-Code": "EntryNotFound"}, b"", body)
        elif is_large(path):
            tag = hashlib.sha256(content).hexdigest()
            linked = {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(self.hub.sizes.get(path, len(content)))}
            # Another host, as the hub's content network is one: the client does not follow this when it asks for headers.
            place = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{name}/{commit}/{path}"
            self.send(302, {**headers, **linked, "Location": place}, b"", body)
        else:
            self.data(path, content, {**headers, "ETag": f'"{git_hash(content)}"'}, body)

    def content(self, path: str, body: bool) -> None:
        *name, commit, file = path.removeprefix("/cdn/").split("/")
        content = self.hub.repositories["/".join(name)].commits[commit][file]
        self.data(file, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, body)

    def data(self, file: str, content: bytes, headers: dict[str, str], body: bool) -> None:
        if body and file in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if body and file in self.hub.short:
            content = content[:-5]
        first, status = 0, 200
        if self.headers.get("Range"):
            first, status = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0]), 206
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if body and self.hub.cut.get(file, 0) > 0:
            self.hub.cut[file] -= 1
            self.send(status, headers, content[first:], body, stop=(len(content) - first) // 2)
        else:
            self.send(status, headers, content[first:], body)

    def send(self, status: int, headers: dict[str, str], content: bytes, body: bool, stop: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[:stop])
        if stop is not None:
            self.close_connection = True


def is_large(path: str) -> bool:
    """Whether the hub keeps a file outside git, behind a redirect."""
    return path.endswith((".safetensors", ".bin", ".gguf"))


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """The server in a thread of its own, on a port that was free."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
