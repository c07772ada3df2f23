"""Checkpoints on the Hugging Face hub: downloading, and reading their headers without downloading them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import CheckpointError
from ..paths import user_path
from .headers import Entry, check_index
from .packaging import CARD, COPIED
from .partial import Interrupted

COMPANIONS = (*COPIED, CARD, "config.json", "generation_config.json", "model.safetensors.index.json")
T = TypeVar("T")


def is_repository(source: str | Path) -> bool:
    """Whether `source` is written like owner/name and is no path that exists. Raises CheckpointError if it is neither
    that nor a directory.
    """
    if user_path(source).is_dir():
        return False
    name = str(source)
    if isinstance(source, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise CheckpointError(f"There is no directory {name}; check the path, or give a repository as owner/name.")
    return True


def download(repository: str, revision: str | None, weights: bool = True) -> Path:
    """The local snapshot of a repository, with or without its weights; resumes what an earlier call left unfinished.

    Its last path component is the commit. Raises CheckpointError.
    """
    from huggingface_hub import snapshot_download

    patterns = [*COMPANIONS, "model*.safetensors"] if weights else list(COMPANIONS)
    path = reaching(repository, lambda: snapshot_download(repository, revision=revision, allow_patterns=patterns))
    return Path(path)


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


def reaching(repository: str, action: Callable[[], T]) -> T:
    """What `action` returns; its failures, which concern `repository`, as CheckpointErrors of one sentence."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    # The errors of the hub client's own transport, whose name differs between its versions.
    transport = HfHubHTTPError.__mro__[1]
    try:
        return action()
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{repository} is neither a directory nor a repository on the hub ({_first_line(error)}); check its name "
            "and revision, and `hf auth login` if it is private."
        ) from None
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise CheckpointError(f"{repository} has no readable safetensors weights ({_first_line(error)}).") from None
    except LocalEntryNotFoundError as error:
        raise Interrupted(
            f"{repository} is not a directory here, and the hub cannot be reached ({_first_line(error)}); check the "
            "network and run the same command again."
        ) from None
    except EntryNotFoundError as error:
        raise CheckpointError(f"{repository} lacks a file it needs ({_first_line(error)}).") from None
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise CheckpointError(
                f"The hub refuses access to {repository} ({_first_line(error)}); run `hf auth login` with a token that "
                "may do this."
            ) from None
        raise Interrupted(f"The hub answers for {repository}: {_first_line(error)}; try again later.") from None
    except (transport, ConnectionError, TimeoutError) as error:
        raise Interrupted(
            f"The hub could not be reached for {repository} ({_first_line(error)}); check the network and run the "
            "same command again."
        ) from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
