"""A small Hub on this machine for tests: the real API's shapes, gated repositories, redirects to a file server, ranges.

Use it with HF_ENDPOINT=<server.address>: real huggingface_hub is the client.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

# Files of this size and more are LFS files: served by another host, with the sha256 of their content as ETag.
LFS_BYTES = 2**20
TOKEN = "hf_secret"
CHUNK = 2**18


@dataclass
class Repository:
    """One model or dataset."""

    commits: dict[str, dict[str, bytes]]  # commit -> path -> content
    refs: dict[str, str] = field(default_factory=dict)  # branch -> commit
    gated: bool = False  # read with TOKEN alone


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    address: str = ""
    files_address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)  # "models/a/b" or "datasets/a/b"
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    leaked: list[str] = field(default_factory=list)  # tokens that the file server saw
    bytes_per_s: float = 1e9
    down: bool = False  # answers 503 to everything
    sent: int = 0

    def add(self, name: str, files: dict[str, bytes], *, commit: str = "a" * 40, kind: str = "models") -> Repository:
        """A repository whose main is `commit` now."""
        found = self.repositories.setdefault(f"{kind}/{name}", Repository({}))
        found.commits[commit] = {".gitattributes": b"*", **files}
        found.refs["main"] = commit
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    is_file_server = False

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, *_: Any) -> None:
        """Nothing: a test reads `requests`."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.down:
            self._answer(503, b"down")
        elif self.is_file_server:
            self.hub.leaked += [value for value in [self.headers.get("Authorization")] if value]
            self._content(self._blob(path.strip("/")))
        elif found := re.fullmatch(r"/api/(models|datasets)/(.+?)/refs", path):
            repository = self.hub.repositories[f"{found[1]}/{found[2]}"]
            self._json({"branches": [{"name": name} for name in repository.refs], "tags": []})
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._description(f"{found[1]}/{found[2]}", found[3] or "main")
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(f"{'datasets' if found[1] else 'models'}/{found[2]}", found[3], found[4])
        else:
            self._answer(404, b"no such page", {"X-Error-Code": "EntryNotFound"})

    def _commit(self, key: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(key)
        if repository is None:
            # Without a valid token the Hub does not tell whether a name exists.
            self._answer(404 if self._logged_in() else 401, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, commit

    def _description(self, key: str, revision: str) -> None:
        if (found := self._commit(key, revision)) is None:
            return
        repository, commit = found
        siblings = []
        for name, content in repository.commits[commit].items():
            lfs = {"lfs": {"sha256": _sha256(content), "size": len(content)}} if len(content) >= LFS_BYTES else {}
            siblings.append({"rfilename": name, "size": len(content), **lfs})
        name = key.partition("/")[2]
        gated = "manual" if repository.gated else False
        self._json({"id": name, "modelId": name, "sha": commit, "gated": gated, "private": False,
                    "siblings": siblings, "tags": [], "downloads": 0})  # fmt: skip

    def _file(self, key: str, revision: str, name: str) -> None:
        if (found := self._commit(key, revision)) is None:
            return
        repository, commit = found
        if repository.gated and not self._logged_in():
            self._answer(403 if self.headers.get("Authorization") else 401, b"", {"X-Error-Code": "GatedRepo"})
            return
        content = repository.commits[commit].get(name)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            self._answer(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        elif len(content) >= LFS_BYTES:
            digest = _sha256(content)
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"'}
            self._answer(302, b"", {**headers, **linked, "Location": f"{self.hub.files_address}/{digest}"})
        else:
            self._content(content, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _blob(self, digest: str) -> bytes:
        every = (files for one in self.hub.repositories.values() for files in one.commits.values())
        return next(content for files in every for content in files.values() if _sha256(content) == digest)

    def _content(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        part = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return
        for position in range(0, len(part), CHUNK):
            try:
                self.wfile.write(part[position : position + CHUNK])
            except OSError:  # the client was killed
                return
            self.hub.sent += CHUNK
            time.sleep(CHUNK / self.hub.bytes_per_s)

    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


_DIGESTS: dict[int, str] = {}


def _sha256(content: bytes) -> str:
    # Of the same object once: tests serve a few large files many times.
    return _DIGESTS.setdefault(id(content), hashlib.sha256(content).hexdigest())


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub and its file server on ports of their own, until the end of the block."""
    hub = Hub()
    _DIGESTS.clear()
    servers = []
    for is_file_server in (False, True):
        handler = type("Handler", (_Handler,), {"hub": hub, "is_file_server": is_file_server})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
    # Another host by name, so that a client must not send its token along.
    hub.address = f"http://127.0.0.1:{servers[0].server_port}"
    hub.files_address = f"http://localhost:{servers[1].server_port}"
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
