"""A hub on this machine: as much of the Hugging Face and ModelScope protocols as their clients need to download."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the server serves and what it was asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        """Holds ``<owner>/<name>/<files>``."""
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path, Range."""
        self.stall_after: int | None = None
        """Send so many bytes of a large file and then nothing more."""
        self.released = threading.Event()
        self.stalled = threading.Event()
        self.endpoint = ""

    def fetched(self, name: str) -> list[str | None]:
        """The ranges asked of one file."""
        return [header for method, path, header in self.requests if method == "GET" and name in unquote(path)
                and ("/resolve/" in path or "FilePath=" in path)]


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._json({}, 404)

    def _answer(self, method: str) -> None:
        self.hub.requests.append((method, self.path, self.headers.get("Range")))
        url = urlparse(self.path)
        parts, query = unquote(url.path).strip("/").split("/"), parse_qs(url.query)
        if parts[:2] == ["api", "models"]:
            self._huggingface_api(parts[2:])
        elif "resolve" in parts:
            cut = parts.index("resolve")
            self._file(method, self.hub.root.joinpath(*parts[:cut], *parts[cut + 2 :]))
        elif parts[:3] == ["api", "v1", "models"] and "FilePath" in query:
            self._file(method, self.hub.root.joinpath(*parts[3:5], query["FilePath"][0]))
        elif parts[:3] == ["api", "v1", "models"]:
            self._modelscope_api(parts[3:], query)
        else:
            self._json({"Code": 404, "Success": False, "Message": "not found"}, 404)

    def _files(self, repository: Path) -> list[Path]:
        return sorted(path for path in repository.rglob("*") if path.is_file())

    def _huggingface_api(self, parts: list[str]) -> None:
        repository = self.hub.root.joinpath(*parts[:2])
        if not repository.is_dir():
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        names = [path.relative_to(repository).as_posix() for path in self._files(repository)]
        if "tree" in parts:
            self._json([{"type": "file", "path": name, "oid": _sha1(repository / name),
                         "size": (repository / name).stat().st_size} for name in names])
            return
        self._json({"id": "/".join(parts[:2]), "modelId": "/".join(parts[:2]), "sha": COMMIT, "private": False,
                    "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in names]})

    def _modelscope_api(self, parts: list[str], query: dict[str, list[str]]) -> None:
        repository = self.hub.root.joinpath(*parts[:2])
        if not repository.is_dir():
            self._json({"Code": 10010205001, "Success": False, "Message": "not found"}, 404)
            return
        if parts[2:] == ["revisions"]:
            data: object = {"RevisionMap": {"Branches": [{"Revision": "master"}], "Tags": []}}
        elif parts[2:] == ["repo", "files"]:
            root = query.get("Root", [""])[0].strip("/")
            data = {"Files": [
                {"Path": path.relative_to(repository).as_posix(), "Name": path.name, "Type": "blob",
                 "Size": path.stat().st_size, "Sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                 "Revision": COMMIT}
                for path in self._files(repository) if path.relative_to(repository).as_posix().startswith(root)
            ]}
        else:
            data = {"Path": parts[0], "Name": parts[1], "Revision": "master", "Visibility": 5}
        self._json({"Code": 200, "Success": True, "Message": "", "Data": data})

    def _file(self, method: str, path: Path) -> None:
        if not path.is_file():
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        start, end = 0, len(content)
        asked = self.headers.get("Range")
        if asked and asked.startswith("bytes="):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else end
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{_etag(path)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        if method == "HEAD":
            return
        stop = self.hub.stall_after
        if stop is not None and end - start > stop:
            self.wfile.write(content[start : start + stop])
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.released.wait(60)
            self.close_connection = True
            return
        self.wfile.write(content[start:end])

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(path: Path) -> str:
    """Large files are named by the hash of their content, the others as git does."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.stat().st_size > 10_000 else _sha1(path)


def _sha1(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@contextmanager
def local_hub(root: Path) -> Iterator[Hub]:
    """Serve ``root`` on the loopback interface for the length of the block."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
