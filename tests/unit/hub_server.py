"""A model hub on the loopback device that speaks the two requests and the downloads of the Hugging Face hub.

Written from what `huggingface_hub` asks for: the revision's commit, the tree of files, and each file with its ETag and
commit. Which answers a repository gives is set by its name.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIDE = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "README.md": b"# x\n"}
REPOSITORIES = {
    "acme/safe": {
        **SIDE,
        "model.safetensors": b"S" * 3000,
        "pytorch_model.bin": b"B" * 3000,
        "consolidated.safetensors": b"C" * 9,
        "original/consolidated.00.pth": b"P" * 9,
        "onnx/model.onnx": b"O" * 9,
        "fp32/model.safetensors": b"F" * 9,
    },
    "acme/pickle": {**SIDE, "pytorch_model.bin": b"B" * 3000, "training_args.bin": b"T" * 9, "tf_model.h5": b"H" * 9},
    "acme/empty": dict(SIDE),
}


class Hub(BaseHTTPRequestHandler):
    """One request; what was asked for is kept in `asked`."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._api(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[3])
        else:
            self._answer(404, b"")

    def _api(self, repository: str, kind: str | None, revision: str | None) -> None:
        if repository == "acme/gated":
            self._answer(403, b'{"error": "gated"}', {"X-Error-Code": "GatedRepo"})
        elif repository == "acme/private":
            self._answer(401, b'{"error": "Invalid username or password."}')
        elif repository == "acme/broken":
            self._answer(500, b'{"error": "Internal Error"}')
        elif repository not in REPOSITORIES:
            self._answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", COMMIT):
            self._answer(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        else:
            files = REPOSITORIES[repository]
            if kind == "tree":
                body = [
                    {"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in files.items()
                ]
                self._answer(200, json.dumps(body).encode())
            else:
                siblings = [{"rfilename": name} for name in files]
                body = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "tags": []}
                self._answer(200, json.dumps(body).encode())

    def _file(self, repository: str, name: str) -> None:
        data = REPOSITORIES[repository][name]
        self._answer(200, data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class names it
        """Say nothing: tests print only what fails."""


@contextmanager
def running() -> Iterator[str]:
    """The address of a hub that runs in a thread until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _oid(data: bytes) -> str:
    """A git blob's id, which the hub gives as ETag of small files."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # git's hash
