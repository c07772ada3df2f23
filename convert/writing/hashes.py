"""SHA-256 of files, and where one is already known: a flipped byte in a weight shows nowhere else."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

REPORT = "conversion.json"  # ours, beside converted weights
SHA256 = re.compile(r"[0-9a-f]{64}")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()


def known_sha256(path: Path) -> str | None:
    """The hash that the content of `path` should have, if something says so.

    The hub's cache names large files by their hash, its downloads into a directory note it, and our own conversions
    list it.
    """
    if SHA256.fullmatch(path.resolve().name):
        return path.resolve().name
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if note.is_file():
        lines = note.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(lines) > 1 and SHA256.fullmatch(lines[1]):
            return lines[1]
    return reported_hashes(path.parent).get(path.name)


def reported_hashes(directory: Path) -> dict[str, str]:
    """The hashes in the report of an earlier conversion, by file name; empty without a readable one."""
    try:
        content = json.loads((directory / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    hashes = content.get("sha256") if isinstance(content, dict) else None
    return hashes if isinstance(hashes, dict) else {}
