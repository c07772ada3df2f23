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
    from huggingface_hub import HfApi

    directory = user_path(directory)
    problems = check_files(directory)
    if problems:
        raise CheckpointError(f"{directory} is not fit to upload: {problems[0]}")
    if not (directory / CARD).is_file():
        raise CheckpointError(f"{directory} has no model card ({CARD}); convert the checkpoint here first.")
    check_upload(repository, force=force)
    api = HfApi()
    reaching(repository, lambda: api.create_repo(repository, private=private, exist_ok=True))
    message = "Converted with mlx-diffusiongemma"
    reaching(
        repository,
        lambda: api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message=message, ignore_patterns=[".*"]
        ),
    )
    return f"{api.endpoint}/{repository}"


def check_upload(repository: str, *, force: bool = False) -> None:
    """Make sure, before a conversion, that `upload_checkpoint` may write to `repository`. Raises CheckpointError."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        is_name = repository.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise CheckpointError(f"{repository!r} is not the name of a repository on the hub; give one as owner/name.")
    if get_token() is None:
        raise CheckpointError("There is no login for the hub on this machine; run `hf auth login` first.")
    api = HfApi()
    user = reaching(repository, api.whoami)  # refuses a token that is no longer valid
    if ((user.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise CheckpointError("The login for the hub on this machine may only read; run `hf auth login` with another.")
    files = reaching(repository, lambda: api.list_repo_files(repository) if api.repo_exists(repository) else [])
    if set(files) - {".gitattributes"} and not force:
        raise CheckpointError(f"{repository} has files already; choose another name, or --force to overwrite them.")
