"""Checkpoints on the Hugging Face hub: downloading, and reading their headers without downloading them."""

from __future__ import annotations

from pathlib import Path

from ...checkpoints.hub import download_snapshot, reaching
from ...checkpoints.safetensors import Entry, check_index
from ..writing.packaging import CARD, COPIED

COMPANIONS = (*COPIED, CARD, "config.json", "generation_config.json", "model.safetensors.index.json")
WHOLE = (*COMPANIONS, "model*.safetensors")


def download(repository: str, revision: str | None, weights: bool = True) -> Path:
    """Download a repository, with or without its weights, as `download_snapshot` does. Raises CheckpointError."""
    return download_snapshot(repository, revision, WHOLE if weights else COMPANIONS)


def download_file(repository: str, commit: str, name: str, directory: Path) -> Path:
    """Download one file into `directory`, where an unfinished download goes on. Raises CheckpointError."""
    from huggingface_hub import hf_hub_download

    return Path(
        reaching(repository, lambda: hf_hub_download(repository, name, revision=commit, local_dir=str(directory)))
    )


def remote_files(repository: str, commit: str) -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 of every large file of the repository. Raises CheckpointError."""
    from huggingface_hub import HfApi

    info = reaching(repository, lambda: HfApi().model_info(repository, revision=commit, files_metadata=True))
    return {file.rfilename: (file.lfs.size, file.lfs.sha256) for file in info.siblings or [] if file.lfs}


def remote_headers(repository: str, commit: str) -> dict[str, Entry]:
    """Every tensor of the repository at `commit`, from the beginnings of its files. Raises CheckpointError."""
    from huggingface_hub import get_safetensors_metadata

    found = reaching(repository, lambda: get_safetensors_metadata(repository, revision=commit))
    entries = {
        name: Entry(name, str(info.dtype), tuple(info.shape), file, info.data_offsets[0])
        for file, content in sorted(found.files_metadata.items())
        for name, info in sorted(content.tensors.items(), key=lambda tensor: tensor[1].data_offsets)
    }
    check_index(found.weight_map, entries, repository)
    return entries
