"""A small Hugging Face hub on the loopback, as far as huggingface_hub's client asks one for models.

    with Hub() as hub:
        hub.add("org/tiny", directory, tags=("v1",))
        run(..., env=hub.environment(cache))

It serves the API's listing of a revision and the files, counts what is fetched, and can refuse or die.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"


@dataclass
class Repository:
    """Commits by their names, and each commit's files by path."""

    commits: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


class Hub:
    """`fetched` counts the files sent, by (repository, path). `claimed` replaces the sizes that listings give.

    `dies_after`: bytes of a file after which the server is gone; None when it lives. `status`: what every request
    is answered with, when set.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.fetched: Counter[tuple[str, str]] = Counter()
        self.claimed: dict[str, int] = {}
        self.dies_after: int | None = None
        self.status: int | None = None
        self._held: socket.socket | None = None
        self._ending = threading.Lock()

    def __enter__(self) -> Hub:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._release()

    def start(self, port: int = 0) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._release()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """From now on nobody listens; no other process gets the port."""
        with self._ending:
            self._server.shutdown()
            self._server.server_close()
            if self._held is None:
                self._held = socket.socket()
                self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self._held.bind(("127.0.0.1", self.port))

    def _release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def environment(self, cache: Path, **more: str) -> dict[str, str]:
        """The environment of a process that uses this hub, with its own home of huggingface_hub."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **more,
        }

    def add(self, name: str, directory: Path, tags: tuple[str, ...] = (), **options: bool) -> str:
        """A commit with the files of `directory` on branch main, and under `tags`; returns its hash."""
        files = {
            path.relative_to(directory).as_posix(): path.read_bytes()
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        digest = hashlib.sha1()
        for path, content in files.items():
            digest.update(path.encode() + b"\0" + content)
        commit = digest.hexdigest()
        repository = self.repositories.setdefault(name, Repository(**options))
        repository.files[commit] = files
        repository.commits |= dict.fromkeys(("main", commit, *tags), commit)
        return commit

    def files(self, name: str) -> set[str]:
        """What was sent of a repository."""
        return {path for repository, path in self.fetched if repository == name}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, send: bool) -> None:
        if self.hub.status is not None:
            return self._error(self.hub.status, "", "no")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        listing = parts[:2] == ["api", "models"]
        if listing:
            parts = parts[2:]
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.hub.repositories.get(name)
        token = self.headers.get("Authorization", "")
        if token and token != f"Bearer {TOKEN}":
            return self._error(401, "", "Invalid credentials in Authorization header")
        if repository is None or (repository.private and not token):
            return self._error(404 if token else 401, "RepoNotFound", "Repository not found")
        if listing:
            revision = rest[1] if rest[:1] == ["revision"] else "main"
            return self._list(name, repository, revision)
        # A revision may hold slashes; a file's path begins after the longest one there is.
        for end in range(len(rest), 1, -1):
            revision, path = "/".join(rest[1:end]), "/".join(rest[end:])
            if rest[0] == "resolve" and revision in repository.commits and path:
                return self._file(name, repository, repository.commits[revision], path, send)
        return self._error(404, "RevisionNotFound", "Invalid rev id")

    def _list(self, name: str, repository: Repository, revision: str) -> None:
        commit = repository.commits.get(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [
            {"rfilename": path, "size": self.hub.claimed.get(path, len(content)), "blobId": _etag(content)}
            for path, content in repository.files[commit].items()
        ]
        self._send(json.dumps({"id": name, "modelId": name, "sha": commit, "siblings": siblings}).encode(), {}, True)

    def _file(self, name: str, repository: Repository, commit: str, path: str, send: bool) -> None:
        if repository.gated and not self.headers.get("Authorization"):
            return self._error(401, "GatedRepo", f"Access to model {name} is restricted")
        content = repository.files[commit].get(path)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        if send:
            self.hub.fetched[name, path] += 1
        self._send(content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}, send)

    def _send(self, content: bytes, headers: dict[str, str], send: bool) -> None:
        first = 0
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes=") and asked.endswith("-"):
            first = int(asked[6:-1])
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if not send:
            return
        limit = self.hub.dies_after
        if limit is None or len(content) <= limit or "ETag" not in headers:
            self.wfile.write(content[first:])
            return
        self.wfile.write(content[first : first + limit])
        self.wfile.flush()
        threading.Thread(target=self.hub.stop, daemon=True).start()
        self.close_connection = True

    def _error(self, status: int, code: str, message: str) -> None:
        content = json.dumps({"error": message}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
