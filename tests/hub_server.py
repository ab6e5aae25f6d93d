"""A local HTTP server that speaks the few endpoints of the Hub that reading and writing a model take; it can misbehave.

- `GET /api/models/OWNER/NAME[/revision/REV]?blobs=True`: the commit, and size, blob id and LFS hash of every file;
- `GET /OWNER/NAME/resolve/REV/FILE`: a small file is behind a redirect to `/api/resolve-cache/…`, which has its blob id
  as ETag; a large one behind a redirect that carries X-Linked-Etag and X-Linked-Size, to a signed address of
- `GET /storage/SHA256/…` on another host: byte ranges, with an ETag of the storage's own. It wants the signature, and
  refuses a request that comes with the Hub's token, as S3 does.
- every address of a repository that was renamed is a redirect to the same under its new name.
- `GET /api/models/OWNER/NAME/tree/REV`: the names of the files.
- what an upload without xet takes: `repos/create`, `branch`, `validate-yaml`, `preupload` (a `.bin` is a large
  file), LFS batch, `PUT /upload/SHA256`, `commit`. Each commit has an id of its own; older ones are forgotten.

A private repository, and everything that writes, asks for `Authorization: Bearer TOKEN`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_good"
REFUSALS: dict[str | None, tuple] = {
    "500": (500, b"busy"),
    "too many": (429, b"", {"RateLimit": '"resolvers";r=0;t=41'}),
    "wait": (503, b"", {"Retry-After": "7"}),
    "gated": (403, b"", {"X-Error-Code": "GatedRepo"}),
    "gone": (404, b"", {"X-Error-Code": "EntryNotFound"}),
    "forbidden": (403, b""),
}


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
    body, then the connection breaks), "no range" (the whole file, status 200), "short" (a byte less), "too many"
    (429 and the seconds left), "wait" (503 and Retry-After), "gone" (404), "other etag", "gated", or None.
    """

    def __init__(self, repositories: dict[str, dict[str, Content]]) -> None:
        self.repositories = repositories
        """Their main branches."""
        self.branches: dict[tuple[str, str], dict[str, Content]] = {}
        """The others, by repository and name."""
        self.commits: dict[tuple[str, str], str] = {}
        """Of each branch that was pushed to."""
        self.private: set[str] = set()
        self.renamed: dict[str, str] = {}
        """New names by the old ones."""
        self.uploaded: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.bytes_sent = 0
        self.trouble: Callable[[str, int], str | None] = lambda path, nth: None
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.storage = self.endpoint.replace("127.0.0.1", "localhost")

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

    def branch(self, repo: str, revision: str) -> tuple[str, dict[str, Content]] | None:
        """The name and the files of the branch that a revision is or is the commit of."""
        branches = {"main": self.repositories[repo]}
        branches |= {name: files for (of, name), files in self.branches.items() if of == repo}
        for name, files in branches.items():
            if revision in (name, self.commit_of(repo, name)) or (revision == "" and name == "main"):
                return name, files
        return None

    def commit_of(self, repo: str, branch: str) -> str:
        return self.commits.get((repo, branch), COMMIT)


def serve_directory(directory: Path) -> dict[str, Content]:
    """The files of a checkpoint directory as a repository's."""
    return {p.name: Bytes(p.read_bytes(), _is_large(p.name)) for p in sorted(directory.iterdir()) if p.is_file()}


@contextmanager
def pointed_at(server: HubServer, monkeypatch) -> Iterator[None]:
    """The Hub's client asks this server, without xet and with short pauses; it decides on much when it is made."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("vindex.hub_files.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("vindex.hub_files.LONGEST_PAUSE", 0.02)
    close_session()
    yield
    close_session()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    body: bytes

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._take(self._get)

    def do_POST(self) -> None:
        self._take(self._post)

    do_PUT = do_POST

    def _take(self, answer: Callable[[str, str | None], None]) -> None:
        path = unquote(urlsplit(self.path).path)
        trouble = self.hub.note(Request(path, self.headers.get("Range")))
        with suppress(BrokenPipeError, ConnectionResetError):
            if trouble == "cut":
                return self._hang_up()
            # whatever the answer: what is left unread would be taken for the connection's next request
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if trouble in REFUSALS:
                self._answer(*REFUSALS[trouble])
            else:
                answer(path, trouble)

    def _get(self, path: str, trouble: str | None) -> None:
        if old := next((name for name in self.hub.renamed if f"{name}/" in f"{path}/"), None):
            self._answer(307, b"", {"Location": self.path.replace(old, self.hub.renamed[old])})
        elif path.startswith("/api/models/"):
            self._api(path)
        elif path.startswith("/api/resolve-cache/"):
            self._file(path, trouble)
        elif path.startswith("/storage/"):
            if "Signature=" not in self.path or "Authorization" in self.headers:
                return self._answer(400, b"Only one auth mechanism allowed")
            self._file(path, trouble)
        else:
            self._resolve(path, trouble)

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _hidden(self, repo: str) -> bool:
        return repo not in self.hub.repositories or (repo in self.hub.private and not self._known())

    def _json(self, record: object) -> None:
        self._answer(200, json.dumps(record).encode(), {"Content-Type": "application/json"})

    def _post(self, path: str, trouble: str | None) -> None:
        if path.startswith("/upload/"):
            self.hub.uploaded[path.removeprefix("/upload/")] = self.body
            return self._answer(200, b"")
        if not self._known():
            return self._answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._json({"objects": [self._upload(wanted) for wanted in json.loads(self.body)["objects"]]})
        if path == "/api/repos/create":
            return self._create(json.loads(self.body))
        repo, action, revision = self._action(path)
        if action == "branch":
            self.hub.branches.setdefault((repo, revision), dict(self.hub.repositories[repo]))
            return self._answer(200, b"")
        if action == "preupload":
            names = [file["path"] for file in json.loads(self.body)["files"]]
            modes = {name: "lfs" if _is_large(name) else "regular" for name in names}
            files = [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in names]
            return self._json({"files": files})
        return self._commit(repo, revision, [json.loads(line) for line in self.body.splitlines()])

    def _action(self, path: str) -> tuple[str, str, str]:
        owner, name, *what = path.removeprefix("/api/models/").split("/", 3)
        return f"{owner}/{name}", *what

    def _create(self, asked: dict) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.hub.repositories:
            return self._answer(409, b"")
        self.hub.repositories[repo] = {".gitattributes": Bytes(b"*.bin filter=lfs\n", False)}
        if asked.get("visibility") == "private" or asked.get("private"):
            self.hub.private.add(repo)
        return self._json({"url": f"{self.hub.endpoint}/{repo}"})

    def _upload(self, wanted: dict) -> dict:
        """What is there already is not asked for."""
        if wanted["oid"] in self.hub.uploaded:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.hub.endpoint}/upload/{wanted['oid']}", "header": {}}}}

    def _commit(self, repo: str, branch: str, lines: list[dict]) -> None:
        found = self.hub.branch(repo, branch)
        if found is None:
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        branch, files = found
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Bytes(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = Bytes(self.hub.uploaded[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = hashlib.sha1(repr((self.hub.commit_of(repo, branch), lines)).encode()).hexdigest()
        self.hub.commits[repo, branch] = commit
        return self._json({"commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit}"})

    def _api(self, path: str) -> None:
        repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        repo, _, tree = repo.partition("/tree/")
        if self._hidden(repo):
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        found = self.hub.branch(repo, tree or revision)
        if found is None:
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        branch, files = found
        if tree:
            names = [{"type": "file", "path": n, "size": c.size, "oid": _blob_id(c)} for n, c in files.items()]
            return self._json(names)
        siblings = [
            {"rfilename": name, "size": content.size, "blobId": _blob_id(content)}
            | ({"lfs": {"sha256": content.sha256, "size": content.size, "pointerSize": 135}} if content.large else {})
            for name, content in files.items()
        ]
        about = {"id": repo, "sha": self.hub.commit_of(repo, branch), "private": repo in self.hub.private}
        return self._json(about | {"siblings": siblings})

    def _resolve(self, path: str, trouble: str | None) -> None:
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        commit, _, name = rest.partition("/")
        found = None if self._hidden(repo) else self.hub.branch(repo, commit)
        content = found[1].get(name) if found else None
        if content is None:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if not content.large:
            place = f"/api/resolve-cache/models/{repo}/resolve/{quote(commit)}/{quote(name)}"
            query = f"?{quote(path, safe='')}=&etag=%22{_blob_id(content)}%22"
            return self._answer(307, b"", {"Location": place + query, "X-Repo-Commit": commit})
        etag = "0" * 64 if trouble == "other etag" else content.sha256
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(content.size), "X-Repo-Commit": commit}
        place = f"{self.hub.storage}/storage/{content.sha256}/{repo}/resolve/{commit}/{quote(name)}"
        return self._answer(302, b"", linked | {"Location": f"{place}?Expires=1&Signature=x~y"})

    def _file(self, path: str, trouble: str | None) -> None:
        repo, _, rest = path.removeprefix("/").rpartition("/resolve/")
        repo = "/".join(repo.split("/")[-2:])
        revision, _, name = rest.partition("/")
        content = (self.hub.branch(repo, revision) or ("", {}))[1][name]
        start, stop = 0, content.size
        asked = None if trouble == "no range" else self.headers.get("Range")
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1, content.size)
        etag = '"storage-of-its-own"' if content.large else f'"{_blob_id(content)}"'
        headers = {"ETag": etag, "X-Repo-Commit": revision}
        if asked or trouble != "no range":
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{content.size}"
        self._answer(
            206 if asked else 200, content.read(start, stop - (trouble == "short")), headers, drop=trouble == "drop"
        )

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, drop: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if drop else body)
        self.hub.bytes_sent += len(body)
        if drop:
            self.wfile.flush()
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()


def _is_large(name: str) -> bool:
    return Path(name).suffix in (".safetensors", ".gguf", ".bin")


def _blob_id(content: Content) -> str:
    return content.sha256[:40]
