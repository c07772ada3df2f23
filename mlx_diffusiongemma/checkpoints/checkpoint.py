"""A converted checkpoint's files: ours, mlx-community's, or those saved by mlx-vlm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..config import ModelConfig, read_json
from ..errors import CheckpointError
from ..options import GenerationOptions
from ..paths import user_path
from .hub import CONVERTED, download_snapshot, is_repository
from .safetensors import ITEM_BYTES, Entry, read_checkpoint_headers

ACTIVATIONS_AS = "model.decoder.norm.weight"  # is never quantized: activations have its type


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files, each read once. tensors: every tensor in them by name; their values stay there until
    `arrays` is called.
    """

    directory: Path
    config: ModelConfig
    options: GenerationOptions
    tensors: Mapping[str, Entry]

    @classmethod
    def open(cls, path_or_repo: str | Path, revision: str | None = None) -> Checkpoint:
        """The checkpoint in a directory, or in a repository of the hub, downloaded first. Raises CheckpointError."""
        if is_repository(path_or_repo):
            return cls.in_directory(download_snapshot(str(path_or_repo), revision, CONVERTED))
        if revision is not None:
            raise CheckpointError(f"`revision` is about a repository, and {path_or_repo} is a directory; leave it out.")
        return cls.in_directory(user_path(path_or_repo))

    @classmethod
    def in_directory(cls, directory: Path, tensors: Mapping[str, Entry] | None = None) -> Checkpoint:
        """The checkpoint in `directory`. tensors: where its weights lie elsewhere. Raises CheckpointError."""
        content = read_json(directory / "config.json")
        config = ModelConfig.from_dict(content)
        options = GenerationOptions.from_checkpoint(directory, content)
        return cls(directory, config, options, read_checkpoint_headers(directory) if tensors is None else tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def item(self) -> int:
        """Bytes of one activation."""
        norm = self.tensors.get(ACTIVATIONS_AS)
        return ITEM_BYTES[norm.dtype] if norm else 2

    def arrays(self, names: Iterable[str]) -> dict[str, mx.array]:
        """These tensors, to be read when they are evaluated: in the thread that calls this. Raises CheckpointError."""
        files: dict[str, list[str]] = {}
        for name in names:
            files.setdefault(self.tensors[name].file, []).append(name)
        arrays: dict[str, mx.array] = {}
        for file, wanted in files.items():
            try:
                # MLX's stub does not know that what a safetensors file holds has names.
                held: dict[str, mx.array] = mx.load(str(self.directory / file))  # type: ignore[assignment]
            except (RuntimeError, ValueError) as error:
                raise CheckpointError(
                    f"{self.directory / file} is damaged ({error}); download or convert it again."
                ) from None
            arrays |= {name: held[name] for name in wanted}
        return arrays
