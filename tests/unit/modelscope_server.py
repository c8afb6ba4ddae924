"""A ModelScope hub on the loopback device: what the package `modelscope` asks for to read and to write.

Written from what the client asks for: the list of files with their SHA-256, each file in ranges, and for writing the
repository, the LFS batch, the bytes and the commit. Failures are set by the repository's name and by `Scope.faults`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from hub_server import REPOSITORIES, serving


class Scope(BaseHTTPRequestHandler):
    """One request; see `hub_server.Hub` for what is kept and which faults there are."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []
    ranges: ClassVar[list[str | None]] = []
    faults: ClassVar[dict[str, dict[str, Any]]] = {}
    written: ClassVar[dict[str, dict[str, bytes]]] = {}
    created: ClassVar[list[dict[str, Any]]] = []
    objects: ClassVar[dict[str, bytes]] = {}
    branches: ClassVar[list[str]] = []  # of each repository, besides master

    @classmethod
    def forget(cls) -> None:
        """Start anew: nothing asked, no faults, nothing written."""
        for kept in (cls.asked, cls.ranges, cls.faults, cls.written, cls.created, cls.objects, cls.branches):
            kept.clear()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        parts = urlsplit(self.path)
        asked = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if match := re.fullmatch(
            r"/api/v1/(?:models|datasets)/([^/]+/[^/]+)(/repo(?:/files|/tree)?|/revisions)?", parts.path
        ):
            self._read(match[1], match[2], asked)
        else:
            self._answer(404, {"Code": 404, "Message": "not found"})

    def _read(self, repository: str, what: str | None, asked: dict[str, str]) -> None:
        fault = self.faults.get(repository, {})
        files = REPOSITORIES.get(repository) or self.written.get(f"{repository}@{asked.get('Revision', 'master')}")
        if "status" in fault:
            self._answer(fault["status"], {"Code": fault["status"], "Message": "no"})
        elif repository == "acme/private":
            self._answer(403, {"Code": 403, "Message": "no permission"})
        elif files is None or asked.get("Revision", "master") not in ("master", "v1"):
            self._answer(404, {"Code": 10010205001, "Message": f"{repository} not found"})
        elif what is None:
            self._answer(200, {"Code": 200, "Data": {"Name": repository, "Path": "acme"}})
        elif what == "/revisions":
            found = {
                "Branches": [{"Revision": name, "CreatedAt": 1} for name in ("master", *self.branches)],
                "Tags": [{"Revision": "v0", "CreatedAt": 1}],
            }
            self._answer(200, {"Code": 200, "Success": True, "Data": {"RevisionMap": found}})
        elif what in ("/repo/files", "/repo/tree"):
            listed = [_entry(name, data) for name, data in files.items()] if asked.get("PageNumber", "1") == "1" else []
            self._answer(200, {"Code": 200, "Success": True, "Data": {"Files": listed}, "TotalCount": len(files)})
        else:
            self._file(files[asked["FilePath"]], fault)

    def _file(self, data: bytes, fault: dict[str, Any]) -> None:
        if fault.get("flip"):
            data = data[:-1] + bytes([data[-1] ^ 1])
        wanted = self.headers.get("Range")
        if self.command == "GET":
            self.ranges.append(wanted)
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted else 0  # type: ignore[index]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = fault.get("cuts") or (fault.pop("cut", None) if len(data) > fault.get("cut", len(data)) else None)
        self.wfile.write(data[start:] if cut is None or cut >= len(data) - start else data[start : start + cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def do_POST(self) -> None:
        self.asked.append(f"POST {self.path}")
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        path = urlsplit(self.path).path
        if path == "/api/v1/models":
            self.created.append(body)
            self._answer(200, {"Code": 200, "Data": {"Id": 1}})
        elif match := re.fullmatch(r"/api/v1/repos/models/([^/]+/[^/]+)/info/lfs/objects/batch", path):
            address = f"http://{self.headers['Host']}/put"
            objects = [
                {"oid": item["oid"], "size": item["size"], "actions": {"upload": {"href": f"{address}/{item['oid']}"}}}
                for item in body["objects"]
            ]
            self._answer(200, {"Code": 200, "Data": {"objects": objects}})
        elif match := re.fullmatch(r"/api/v1/repos/models/([^/]+/[^/]+)/commit/(.+)", path):
            kept = self.written.setdefault(f"{match[1]}@{match[2]}", {})
            for action in body["actions"]:
                data = (
                    base64.b64decode(action["content"])
                    if action["type"] == "normal"
                    else self.objects[action["sha256"]]
                )
                kept[action["path"]] = data
            self._answer(200, {"Code": 200, "Success": True, "Data": {"CommitId": "c0ffee"}})
        else:
            self._answer(404, {"Code": 404, "Message": "not found"})

    def do_PUT(self) -> None:
        self.asked.append(f"PUT {self.path}")
        self.objects[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(200, {"Code": 200})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class names it
        """Say nothing: tests print only what fails."""


@contextmanager
def running() -> Iterator[str]:
    """The address of a hub that runs in a thread until the block ends."""
    with serving(Scope) as address:
        yield address


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {
        "Path": name,
        "Name": name.rpartition("/")[2],
        "Type": "blob",
        "Size": len(data),
        "Sha256": hashlib.sha256(data).hexdigest(),
        "Revision": "c0ffee",
    }
