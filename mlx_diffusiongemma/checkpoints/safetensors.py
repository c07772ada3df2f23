"""Safetensors headers, parsed and written by us: what every tensor is, without reading or mapping any of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import read_json
from ..errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4},
    **{"U64": 8, "I64": 8, "F64": 8},
}
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: `begin` counts bytes from the end of the header of `file`, a plain name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    begin: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_header(path: Path) -> tuple[list[Entry], int]:
    """The tensors of the safetensors file at `path` and the byte where its data begins.

    Raises CheckpointError when the header is damaged or does not fit the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise CheckpointError(
                    f"{path} is damaged: it announces a header of {length:,} bytes and has {size:,} in all; "
                    "download it again."
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); check the path and its permissions."
        ) from None
    entries = parse_header(text, path.name, str(path))
    end = 8 + length + max((entry.begin + entry.nbytes for entry in entries), default=0)
    if size != end:
        wrong = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(f"{path} is {wrong}: {size:,} bytes instead of {end:,}; download it again.")
    return entries, 8 + length


def parse_header(text: bytes, file: str, where: str) -> list[Entry]:
    """The tensors in a safetensors header. `where` names the file in errors. Raises CheckpointError."""
    try:
        content = json.loads(text)
        content.pop("__metadata__", None)
        entries = [_entry(name, tensor, file, where) for name, tensor in content.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{where} has no readable safetensors header; download it again.") from None
    position = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.nbytes)):
        if entry.begin != position:
            raise CheckpointError(f"{where}: the bytes of {entry.name} overlap or leave a gap; download it again.")
        position += entry.nbytes
    return entries


def _entry(name: str, tensor: dict[str, Any], file: str, where: str) -> Entry:
    dtype, shape, (begin, end) = tensor["dtype"], tuple(tensor["shape"]), tensor["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where}: {name} has the unknown type {dtype}; save the checkpoint in bfloat16.")
    entry = Entry(name, dtype, shape, file, begin)
    if any(type(size) is not int or size < 0 for size in shape) or end - begin != entry.nbytes:
        raise CheckpointError(f"{where}: the size of {name} does not match its shape; download it again.")
    return entry


def write_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The bytes before the data of a safetensors file that holds (name, dtype, shape) in this order, without gaps."""
    content: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return len(text).to_bytes(8, "little") + text


def read_checkpoint_headers(directory: Path) -> dict[str, Entry]:
    """Every tensor of the checkpoint in `directory` by name, in the order of its files. Raises CheckpointError."""
    index = read_index(directory)
    names = sorted(set(index.values())) if index else sorted(path.name for path in directory.glob("model*.safetensors"))
    if not names:
        raise CheckpointError(
            f"{directory} has no model.safetensors and no {INDEX_NAME}; weights in other formats (such as pickled "
            ".bin files) are not read, so save the checkpoint as safetensors."
        )
    entries: dict[str, Entry] = {}
    for name in names:
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} lacks {name}, which its index lists; download the checkpoint again.")
        for entry in read_header(directory / name)[0]:
            if entry.name in entries:
                raise CheckpointError(f"{directory}: {entry.name} is in {entries[entry.name].file} and in {name}.")
            entries[entry.name] = entry
    check_index(index, entries, str(directory))
    return entries


def read_index(directory: Path) -> dict[str, str]:
    """The file of every tensor as the index of `directory` lists it; empty without an index. Raises CheckpointError."""
    path = directory / INDEX_NAME
    if not path.exists() and directory.is_dir():
        return {}
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to files; download it again.")
    for file in sorted(set(files.values())):
        if file in ("", ".", "..") or os.path.basename(file) != file or "\\" in file or "\0" in file:
            raise CheckpointError(f"{path} names the file {file!r}, outside its own directory; do not trust it.")
    return files


def check_index(index: dict[str, str], entries: dict[str, Entry], where: str) -> None:
    """Raise CheckpointError unless every tensor lies in the file that `index` names."""
    for name, file in index.items():
        if name not in entries or entries[name].file != file:
            raise CheckpointError(
                f"{where}: {file} does not hold {name}, which {INDEX_NAME} promises; its shards may be swapped or of "
                "different versions, so download them again."
            )
