"""A Hugging Face hub on the loopback device: what `huggingface_hub` asks for to read and to write, and its failures.

Written from what the client asks for: the revision's commit with its files, the tree, each file with its ETag (large ones as
LFS, with their SHA-256, in ranges), and for writing the repository, the branch, the preupload, the LFS batch, the bytes and
the commit. Which answers a repository gives is set by its name and by `Hub.faults`.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_BYTES = 1000  # files of so many bytes and more are LFS objects here


def safetensors(count: int = 700, name: str = "w") -> bytes:
    """A file of weights with one tensor of `count` f32 numbers."""
    header = json.dumps({name: {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + bytes(4 * count)


SIDE = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "README.md": b"# x\n"}
WEIGHTS = safetensors()
INDEX = json.dumps(
    {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
).encode()
ROWS = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "acme/safe": {
        **SIDE,
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"B" * 3000,
        "consolidated.safetensors": b"C" * 9,
        "original/consolidated.00.pth": b"P" * 9,
        "onnx/model.onnx": b"O" * 9,
        "fp32/model.safetensors": b"F" * 9,
    },
    "acme/pickle": {**SIDE, "pytorch_model.bin": b"B" * 3000, "training_args.bin": b"T" * 9, "tf_model.h5": b"H" * 9},
    "acme/empty": dict(SIDE),
    "acme/large": {**SIDE, "model.safetensors": safetensors(250_000)},
    "acme/shardless": {
        **SIDE,
        "model.safetensors.index.json": INDEX,
        "model-00001-of-00002.safetensors": safetensors(9, "a"),
    },
    "acme/broken-weights": {**SIDE, "model.safetensors": b"S" * 3000},
    "acme/rows": {"rows.jsonl": ROWS, "README.md": b"# rows\n"},
}


class Hub(BaseHTTPRequestHandler):
    """One request.

    `asked` keeps what was asked for, `ranges` the Range header of each GET of a file, `tokens` the tokens sent.
    `faults` by repository: `status` (of every answer of the API), `file_status` (of the files), `cut` (bytes after which
    the connection breaks, once a file), `cuts` (the same, every time), `flip` (files come with one other byte), `slow_s`
    (seconds before a file of at least `slow_bytes`), `put_status` (of an LFS object that is sent). `written` keeps what was
    pushed: repository to revision to file to bytes.
    """

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []
    ranges: ClassVar[list[str | None]] = []
    tokens: ClassVar[set[str]] = set()
    faults: ClassVar[dict[str, dict[str, Any]]] = {}
    written: ClassVar[dict[str, dict[str, dict[str, bytes]]]] = {}
    created: ClassVar[list[dict[str, Any]]] = []
    objects: ClassVar[dict[str, bytes]] = {}

    @classmethod
    def forget(cls) -> None:
        """Start anew: nothing asked, no faults, nothing written."""
        for kept in (cls.asked, cls.ranges, cls.tokens, cls.faults, cls.written, cls.created, cls.objects):
            kept.clear()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._begin()
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path):
            self._api(match[2], match[3], match[4])
        elif match := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[3])
        else:
            self._answer(404, b"")

    def do_POST(self) -> None:
        path = self._begin()
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if path == "/api/validate-yaml":
            self._answer(200, b'{"errors": [], "warnings": []}')
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|branch|commit)/(.+)", path):
            getattr(self, f"_{match[2]}")(match[1], match[3], body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(match[1], json.loads(body))
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/(.+)", path):
            self._paths(match[2])
        else:
            self._answer(404, b"")

    def do_PUT(self) -> None:
        path = self._begin()
        length = int(self.headers.get("Content-Length") or 0)
        repository = "/".join(path.split("/")[2:4])
        if "put_status" in self.faults.get(repository, {}):
            self.rfile.read(length)
            self._answer(self.faults[repository]["put_status"], b"")
            return
        self.objects[path.rpartition("/")[2]] = self.rfile.read(length)
        self._answer(200, b"")

    def _begin(self) -> str:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        if token := self.headers.get("Authorization", "").removeprefix("Bearer "):
            self.tokens.add(token)
        return path

    def _at(self, repository: str) -> str:
        return f"http://{self.headers['Host']}/{repository}"

    def _is_refused(self, repository: str) -> bool:
        fault = self.faults.get(repository, {})
        if repository == "acme/gated":
            self._answer(403, b'{"error": "gated"}', {"X-Error-Code": "GatedRepo"})
        elif repository == "acme/private":
            self._answer(401, b'{"error": "Invalid username or password."}')
        elif "status" in fault:
            self._answer(fault["status"], b'{"error": "no"}', {"Retry-After": "0"})
        else:
            return False
        return True

    def _api(self, repository: str, kind: str | None, revision: str | None) -> None:
        if self._is_refused(repository):
            return
        files = REPOSITORIES.get(repository) or self.written.get(repository, {}).get(revision or "main")
        if files is None:
            self._answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", COMMIT) and revision not in self.written.get(repository, {}):
            self._answer(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        elif kind == "tree":
            self._answer(200, json.dumps([_entry(name, data) for name, data in files.items()]).encode())
        else:
            siblings = [{"rfilename": name} | _blob(data) for name, data in files.items()]
            body = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}  # fmt: skip
            self._answer(200, json.dumps(body).encode())

    def _paths(self, repository: str) -> None:
        files = REPOSITORIES.get(repository, {})
        self._answer(200, json.dumps([_entry(name, data) for name, data in files.items()]).encode())

    def _file(self, repository: str, name: str) -> None:
        if self._is_refused(repository):
            return
        fault = self.faults.get(repository, {})
        if name not in REPOSITORIES.get(repository, {}):
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        data = REPOSITORIES[repository][name]
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self._answer(200, data, headers)
            return
        if "file_status" in fault:
            self._answer(fault["file_status"], b"", {"Retry-After": "0"})
            return
        if len(data) >= fault.get("slow_bytes", 0):
            time.sleep(fault.get("slow_s", 0))
        if fault.get("flip"):
            data = data[:-1] + bytes([data[-1] ^ 1])
        wanted = self.headers.get("Range")
        self.ranges.append(wanted)
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted else 0  # type: ignore[index]
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = fault.get("cuts") or (fault.pop("cut", None) if len(data) > fault.get("cut", len(data)) else None)
        self._answer(206 if wanted else 200, data[start:], headers, cut=cut)

    def _create(self, wanted: dict[str, Any]) -> None:
        repository = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        if self._is_refused(repository):
            return
        self.created.append(wanted)
        if repository in self.written:
            self._answer(409, json.dumps({"error": "You already created it", "url": self._at(repository)}).encode())
            return
        self.written.setdefault(repository, {})["main"] = {}
        self._answer(200, json.dumps({"url": self._at(repository), "name": repository, "id": "1"}).encode())

    def _branch(self, repository: str, branch: str, _body: bytes) -> None:
        self.written[repository].setdefault(branch, {})
        self._answer(201, b"")

    def _preupload(self, _repository: str, _revision: str, body: bytes) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LFS_BYTES else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, json.dumps({"files": modes}).encode())

    def _batch(self, repository: str, wanted: dict[str, Any]) -> None:
        address = f"http://{self.headers['Host']}/put/{repository}"
        objects = [
            {"oid": item["oid"], "size": item["size"], "actions": {"upload": {"href": f"{address}/{item['oid']}"}}}
            for item in wanted["objects"]
        ]
        self._answer(200, json.dumps({"transfer": "basic", "objects": objects}).encode())

    def _commit(self, repository: str, revision: str, body: bytes) -> None:
        if "commit_status" in self.faults.get(repository, {}):
            self._answer(self.faults[repository]["commit_status"], b'{"error": "no"}')
            return
        files = self.written[repository].setdefault(revision, {})
        for line in body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        self._answer(
            200,
            json.dumps(
                {"commitUrl": f"{self._at(repository)}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            ).encode(),
        )

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut is not None and cut < len(body):
            self.wfile.write(body[:cut])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class names it
        """Say nothing: tests print only what fails."""


@contextmanager
def running() -> Iterator[str]:
    """The address of a hub that runs in a thread until the block ends."""
    with serving(Hub) as address:
        yield address


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server that runs in a thread until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    """A file as the tree of a revision lists it."""
    lfs = {"lfs": {"oid": _digest(data), "size": len(data), "pointerSize": 130}} if len(data) >= LFS_BYTES else {}
    return {"type": "file", "path": name, "size": len(data), "oid": _oid(data)} | lfs


def _blob(data: bytes) -> dict[str, Any]:
    """A file's size and hashes as the revision lists them with `blobs=true`."""
    lfs = {"lfs": {"sha256": _digest(data), "size": len(data), "pointerSize": 130}} if len(data) >= LFS_BYTES else {}
    return {"size": len(data), "blobId": _oid(data)} | lfs


def _digest(data: bytes) -> str:
    """What the hub gives as ETag: SHA-256 of an LFS object, the git id of a small file."""
    return hashlib.sha256(data).hexdigest() if len(data) >= LFS_BYTES else _oid(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # git's hash
