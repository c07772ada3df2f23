"""Repositories on the Hugging Face hub: telling them from directories, downloading them, saying how much that is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..errors import CheckpointError
from ..paths import user_path

CONVERTED = ("*.json", "*.safetensors", "*.jinja", "*.model")  # files of a converted checkpoint
ANSWER_SECONDS = 10  # that the hub has to say how large a repository is
T = TypeVar("T")


class Interrupted(CheckpointError):
    """The network or the user stopped what can go on later."""


def is_repository(source: str | Path) -> bool:
    """Whether `source` is written like owner/name and is no path that exists. Raises CheckpointError if it is neither
    that nor a directory.
    """
    path = user_path(source)
    if path.is_dir():
        return False
    name = str(source)
    is_name = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
    if path.is_file():
        raise CheckpointError(f"{name} is a file; give the directory that it lies in.")
    if isinstance(source, Path) or path.exists() or not is_name:
        raise CheckpointError(f"There is no directory {name}; check the path, or give a repository as owner/name.")
    return True


def download_snapshot(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The local snapshot of a repository's files that match; resumes what an earlier call left unfinished.

    Its last path component is the commit. Raises CheckpointError.
    """
    from huggingface_hub import snapshot_download

    wanted = list(patterns)
    return Path(reaching(repository, lambda: snapshot_download(repository, revision=revision, allow_patterns=wanted)))


def bytes_to_download(source: str | Path, revision: str | None, patterns: Sequence[str]) -> int:
    """The most that `download_snapshot` would fetch now: all files but those that it had already, of this commit. 0 for
    a directory, and where the hub does not say: the download may do without it, or reports what is wrong. Raises
    CheckpointError as `is_repository` does.
    """
    if not is_repository(source):
        return 0
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    name = str(source)
    ask = partial(HfApi().model_info, name, revision=revision, timeout=ANSWER_SECONDS, files_metadata=True)
    try:
        info = reaching(name, ask)
    except CheckpointError:
        return 0
    files = filter_repo_objects(info.siblings or [], allow_patterns=list(patterns), key=lambda file: file.rfilename)
    return sum(
        file.size or 0
        for file in files
        if not isinstance(try_to_load_from_cache(name, file.rfilename, revision=info.sha), str)
    )


def check_room(nbytes: int, beside: Mapping[Path, int]) -> None:
    """Make sure that the disk has room for a download of so many bytes. beside: bytes that will be written elsewhere,
    by directory; they count where that is on the same disk. Raises CheckpointError.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = user_path(HF_HUB_CACHE).absolute()
    place = next(directory for directory in (cache, *cache.parents) if directory.is_dir())
    disk = place.stat().st_dev
    needed = nbytes + sum(more for directory, more in beside.items() if directory.stat().st_dev == disk)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"{cache} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} are needed with the download; free some "
            "space, or set HF_HOME to a directory on another disk."
        )


def reaching(repository: str, action: Callable[[], T]) -> T:
    """Return what `action` does; its failures, which concern `repository`, are CheckpointErrors of one sentence."""
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
    transport: type[BaseException] = HfHubHTTPError.__mro__[1]
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
    except OSError as error:
        raise CheckpointError(
            f"Files of {repository} cannot be read or written ({_first_line(error)}); check the disk and try again."
        ) from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
