"""Whether a fetched file holds what the hub says that it holds.

The libraries compare sizes; a proxy, a mirror or a disk that changes bytes goes unseen. A hub lists for each file its git
id and, for large files (LFS), the SHA-256. What was fetched is read once more and compared; what was there before is not.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK_BYTES = 1 << 20
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Listed:
    """A file as the hub lists it.

    Attributes:
        path: inside the repository.
        size_bytes: None where the hub does not say.
        digest: SHA-256 (64 hex digits) of the content, or the git id of a small file (40); None where the hub does not say.
    """

    path: str
    size_bytes: int | None
    digest: str | None


def complaint(file: Path, listed: Listed) -> str | None:
    """What is wrong with a fetched file, in a few words; None when it is what the hub lists."""
    size_bytes = file.stat().st_size
    if listed.size_bytes is not None and size_bytes != listed.size_bytes:
        return f"{size_bytes} bytes came, the hub lists {listed.size_bytes}"
    digest = (listed.digest or "").lower()
    if _SHA256.fullmatch(digest):
        found = digest_of(file, hashlib.sha256())
        return None if found == digest else f"SHA-256 {found[:12]}... came, the hub lists {digest[:12]}..."
    if _SHA1.fullmatch(digest):
        # Git's own hash of a file: of its length and content.
        header = b"blob %d\0" % size_bytes
        found = digest_of(file, hashlib.sha1(header, usedforsecurity=False))
        return None if found == digest else f"git id {found[:12]}... came, the hub lists {digest[:12]}..."
    return None


def digest_of(file: Path, digest: "hashlib._Hash") -> str:
    """The hex digest of a file's content after what `digest` has seen already."""
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
