"""The models that this user has converted or used, by name, the last used first.

They are kept in `models.json` in the user's data directory. The list is a convenience: where it cannot be read or
written, everything works by path.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import PromptError
from ..files import write_whole
from ..paths import data_directory, user_path

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Remembered:
    """A model that has been converted or used. source: a directory's absolute path, or a repository as owner/name."""

    name: str
    source: str

    @property
    def is_repository(self) -> bool:
        """Whether it lies on the hub, or in its cache."""
        return not os.path.isabs(self.source)

    @property
    def is_there(self) -> bool:
        """Whether it can still be loaded, as far as this machine can tell."""
        return self.is_repository or os.path.isfile(os.path.join(self.source, "config.json"))


def list_file() -> Path:
    """Where the list is kept."""
    return data_directory() / "models.json"


def remembered(tell: Tell = lambda _: None) -> list[Remembered]:
    """All models known, the last used first. tell: is given a sentence where the list is damaged, and so ignored."""
    try:
        path = list_file()
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (PromptError, OSError, ValueError, RecursionError) as error:
        tell(f"The list of models cannot be read ({error}); it is ignored, and made anew with the next model you use.")
        return []
    try:
        return [_checked(entry) for entry in content["models"]]
    except (TypeError, KeyError, ValueError):
        tell(f"{path} is damaged; it is ignored, and made anew with the next model you use.")
        return []


def remember(source: str | Path, tell: Tell = lambda _: None) -> None:
    """Put a model at the head of the list: it is what is used where none is named.

    source: a directory or a repository. tell: is given a sentence where the list cannot be written, which is no error.
    """
    path = user_path(source)
    place = str(path.resolve()) if path.is_dir() else str(source)
    known = remembered(tell)
    found = next((model for model in known if model.source == place), None)
    if found and known[0] is found:
        return
    model = found or Remembered(_new_name(place, {other.name for other in known}), place)
    _write([model, *(other for other in known if other is not found)], tell)


def forget(name: str, tell: Tell = lambda _: None) -> None:
    """Take a model off the list. Raises PromptError where there is none of this name, or the list cannot be written."""
    model = find(name)

    def fail(sentence: str) -> None:
        raise PromptError(sentence)

    _write([other for other in remembered(tell) if other != model], fail)


def find(name: str) -> Remembered:
    """The model of this name, path or repository. Raises PromptError where there is none."""
    known = remembered()
    found = [model for model in known if name in (model.name, model.source)]
    if not found and user_path(name).is_dir():
        place = str(user_path(name).resolve())
        found = [model for model in known if model.source == place]
    if not found:
        names = ", ".join(model.name for model in known)
        raise PromptError(f"No model is known as {name}; " + (f"there are {names}." if names else "none is known yet."))
    return found[0]


def source_of(name: str) -> str:
    """Find what to load for `name`: a directory that is there, else the remembered model of that name, else `name`."""
    if not user_path(name).exists():
        for model in remembered():
            if name == model.name:
                return model.source
    return name


def last_used() -> Remembered | None:
    """The model that was used last and is still there."""
    return next((model for model in remembered() if model.is_there), None)


def _checked(entry: dict[str, str]) -> Remembered:
    model = Remembered(**entry)
    if not all(isinstance(text, str) and text for text in (model.name, model.source)):
        raise ValueError("a model without a name or a place")
    return model


def _new_name(place: str, taken: set[str]) -> str:
    """The last part of a path or repository, with a number where another model has that name."""
    name = place.rstrip("/").rpartition("/")[2] or "model"
    number, free = 2, name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


def _write(models: Iterable[Remembered], tell: Tell) -> None:
    """Write the list: whole, or not at all."""
    try:
        path = list_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"models": [asdict(model) for model in models]}, indent=1))
    except (OSError, PromptError) as error:
        tell(f"The list of models cannot be written ({error}); name models by their paths.")
