"""A converted checkpoint goes to the hub, under the user's own login."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.hub import reaching
from ..errors import CheckpointError
from ..paths import user_path
from .check import check_files
from .writing.packaging import CARD


def upload_checkpoint(directory: str | Path, repository: str, *, force: bool = False, private: bool = False) -> str:
    """Upload a converted checkpoint, model card included, to the repository owner/name; returns its address.

    The token is the one `hf auth login` left. A repository that has files already is only written to with `force`.
    Raises CheckpointError.
    """
    from huggingface_hub import HfApi, get_token

    directory = user_path(directory)
    problems = check_files(directory)
    if problems:
        raise CheckpointError(f"{directory} is not fit to upload: {problems[0]}")
    if not (directory / CARD).is_file():
        raise CheckpointError(f"{directory} has no model card ({CARD}); convert the checkpoint here first.")
    if get_token() is None:
        raise CheckpointError("There is no login for the hub on this machine; run `hf auth login` first.")
    api = HfApi()
    files = reaching(repository, lambda: api.list_repo_files(repository) if api.repo_exists(repository) else [])
    if set(files) - {".gitattributes"} and not force:
        raise CheckpointError(f"{repository} has files already; choose another name, or --force to overwrite them.")
    reaching(repository, lambda: api.create_repo(repository, private=private, exist_ok=True))
    message = "Converted with mlx-diffusiongemma"
    reaching(
        repository,
        lambda: api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message=message, ignore_patterns=[".*"]
        ),
    )
    return f"{api.endpoint}/{repository}"
