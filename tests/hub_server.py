"""A local HTTP server that speaks the few endpoints of the Hub that reading a model takes, and can misbehave.

- `GET /api/models/OWNER/NAME[/revision/REV]?blobs=True`: the commit, and size, blob id and LFS hash of every file;
- `GET /OWNER/NAME/resolve/REV/FILE`: small files are answered at once with their blob id as ETag; large ones with a
  redirect to `/storage/…` that carries X-Linked-Etag and X-Linked-Size, as the Hub does;
- `GET /storage/SHA256/…`: byte ranges, with an ETag of the storage's own.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Content(Protocol):
    """The bytes of a file."""

    size: int
    sha256: str
    large: bool

    def read(self, start: int, stop: int) -> bytes: ...


class Bytes:
    """A file that is held in memory; safetensors and GGUF are large files to the Hub, whatever their size."""

    def __init__(self, content: bytes, large: bool) -> None:
        self._content, self.size, self.large = content, len(content), large
        self.sha256 = hashlib.sha256(content).hexdigest()

    def read(self, start: int, stop: int) -> bytes:
        return self._content[start:stop]


class Request(NamedTuple):
    """One request as the server saw it."""

    path: str
    range: str | None


class HubServer:
    """Serves repositories {"owner/name": {file: Content}}, all at COMMIT. Use as a context manager.

    trouble(path, nth): what to do to the nth request of a path instead of answering it: "500", "drop" (half of the
    body, then the connection breaks), "no range" (the whole file, status 200), "other etag", "gated", or None.
    """

    def __init__(self, repositories: dict[str, dict[str, Content]]) -> None:
        self.repositories = repositories
        self.requests: list[Request] = []
        self.bytes_sent = 0
        self.trouble: Callable[[str, int], str | None] = lambda path, nth: None
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def note(self, request: Request) -> str | None:
        with self._lock:
            self.requests.append(request)
            return self.trouble(request.path, sum(r.path == request.path for r in self.requests))


def serve_directory(directory: Path) -> dict[str, Content]:
    """The files of a checkpoint directory as a repository's."""
    return {p.name: Bytes(p.read_bytes(), p.suffix in (".safetensors", ".gguf")) for p in sorted(directory.iterdir())}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        trouble = self.hub.note(Request(path, self.headers.get("Range")))
        with suppress(BrokenPipeError, ConnectionResetError):
            if trouble == "500":
                self._answer(500, b"busy")
            elif trouble == "gated":
                self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
            elif path.startswith("/api/models/"):
                self._api(path)
            elif path.startswith("/storage/"):
                self._file(path, trouble)
            else:
                self._resolve(path, trouble)

    def _api(self, path: str) -> None:
        repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        if repo not in self.hub.repositories:
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("", "main", COMMIT):
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        siblings = [
            {"rfilename": name, "size": content.size, "blobId": _blob_id(content)}
            | ({"lfs": {"sha256": content.sha256, "size": content.size, "pointerSize": 135}} if content.large else {})
            for name, content in self.hub.repositories[repo].items()
        ]
        body = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
        return self._answer(200, body, {"Content-Type": "application/json"})

    def _resolve(self, path: str, trouble: str | None) -> None:
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        commit, _, name = rest.partition("/")
        content = self.hub.repositories.get(repo, {}).get(name)
        if content is None or commit not in ("main", COMMIT):
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if not content.large:
            return self._file(path, trouble)
        etag = "0" * 64 if trouble == "other etag" else content.sha256
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(content.size), "X-Repo-Commit": COMMIT}
        return self._answer(
            302, b"", linked | {"Location": f"/storage/{content.sha256}/{repo}/resolve/{commit}/{name}"}
        )

    def _file(self, path: str, trouble: str | None) -> None:
        repo, _, rest = path.removeprefix("/").rpartition("/resolve/")
        repo = "/".join(repo.split("/")[-2:])
        content = self.hub.repositories[repo][rest.partition("/")[2]]
        start, stop = 0, content.size
        asked = self.headers.get("Range")
        if asked and trouble != "no range":
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1, content.size)
        etag = '"storage-of-its-own"' if content.large else f'"{_blob_id(content)}"'
        headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Content-Range": f"bytes {start}-{stop - 1}/{content.size}"}
        status = 206 if asked and trouble != "no range" else 200
        if trouble == "no range":
            del headers["Content-Range"]
        self._answer(status, content.read(start, stop), headers, drop=trouble == "drop")

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, drop: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if drop else body)
        self.hub.bytes_sent += len(body)
        if drop:
            self.close_connection = True
            self.wfile.flush()
            self.connection.close()


def _blob_id(content: Content) -> str:
    return content.sha256[:40]
