"""A conversation in a file: safetensors with the keys and values, the messages in its metadata. Nothing is executed
when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..errors import CheckpointError, PromptError
from ..processing.images import PreparedImage, PreparedVideo
from ..processing.messages import normalize_messages

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma

KIND, VERSION = "mlx-diffusiongemma session", "1"
SAMPLES = 64  # of every weight, in a model's fingerprint
IMAGE, VIDEO = "prepared image", "prepared video"  # the keys that stand for them in JSON

Arrays = dict[str, mx.array]


def write_session(path: str | Path, model: DiffusionGemma, conversation: dict[str, Any], cache: Cache) -> None:
    """Save a conversation and the keys and values of `cache`; the file appears when it is whole.

    conversation: what JSON can hold, `PreparedImage`s and `PreparedVideo`s. Raises PromptError where it cannot be
    written.
    """
    path = _checked(path)
    images: list[PreparedImage] = []
    try:
        text = json.dumps([conversation, cache.labels], default=lambda value: _picture_as_json(value, images))
    except (TypeError, ValueError) as error:
        raise PromptError(f"The messages hold something that JSON cannot ({error}); it cannot be saved.") from None
    arrays = cache.export()
    for number, image in enumerate(images):
        arrays[f"images.{number}.pixels"] = mx.array(image.pixels)
        arrays[f"images.{number}.positions"] = mx.array(image.positions)
    metadata = {"kind": KIND, "version": VERSION, "model": fingerprint(model), "content": text}
    metadata["sha256"] = _checksum(arrays, text)
    if not path.name:
        raise PromptError(f"The conversation cannot be saved to {path}, which is a directory; give a file's path.")
    part = path.with_name(f".{path.name}.{os.getpid()}.safetensors")
    try:
        mx.save_safetensors(str(part), arrays, metadata)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        raise PromptError(f"The conversation cannot be saved to {path} ({error}); give another path.") from None
    finally:
        with suppress(OSError):  # what kept it from being written keeps it from being there
            part.unlink(missing_ok=True)


def read_session(path: str | Path, model: DiffusionGemma) -> tuple[dict[str, Any], Cache]:
    """What `write_session` saved with the same model. Raises PromptError for a path without a file, CheckpointError for
    a file that is something else, damaged, or of another model.
    """
    path = _checked(path)
    if not os.path.isfile(path):  # which a name that is too long is not, where `Path.is_file` raises
        raise PromptError(f"There is no file {path}; give one that a session was saved to.")
    arrays, metadata = _read(path)
    if metadata.get("kind") != KIND:
        raise CheckpointError(f"{path} is not a saved session; give a file that a session was saved to.")
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} was saved in version {metadata.get('version')} of the format and this is version {VERSION}; "
            "use the mlx-diffusiongemma that saved it."
        )
    text = metadata.get("content", "")
    if metadata.get("sha256") != _checksum(arrays, text):
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum; save the session again.")
    if metadata.get("model") != fingerprint(model):
        raise CheckpointError(f"{path} was saved with another model; load that one to go on with it.")
    cache = model.make_cache()
    try:
        conversation, labels = json.loads(text, object_hook=lambda value: _picture_from_json(value, arrays))
        conversation["messages"] = _with_unique_ids(conversation["messages"])
        if not isinstance(conversation["system"], str | None) or not isinstance(conversation["thinking"], bool):
            raise ValueError("its instructions are no text, or its thinking is neither on nor off")
        cache.adopt(arrays, labels)
    except (ValueError, TypeError, KeyError, RecursionError, PromptError) as error:
        raise CheckpointError(f"{path} does not hold a session of this model ({error}); save it again.") from None
    cache.snapshot()
    return conversation, cache


def _with_unique_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check `messages` and give every tool call an id of its own, which files of earlier versions do not. Raises
    PromptError.
    """
    _, *normal = normalize_messages([{"role": "user", "content": ""}, *messages])[0]
    keys = ("tool_calls", "tool_call_id")
    return [own | {key: new[key] for key in keys if new.get(key)} for own, new in zip(messages, normal, strict=True)]


def _checked(path: str | Path) -> Path:
    """Raises PromptError where `path` cannot be one."""
    if not isinstance(path, str | os.PathLike) or "\0" in os.fspath(path):
        raise PromptError(f"{str(path)!r} is not the path of a file; give one as text.")
    return Path(path)


def fingerprint(model: DiffusionGemma) -> str:
    """What tells this checkpoint from others: its configuration, and samples of every weight of the text model."""
    weights = sorted(tree_flatten(model.parameters()))
    samples = [array.reshape(-1)[:: max(array.size // SAMPLES, 1)].astype(mx.float32) for _, array in weights]
    mx.eval(samples)
    digest = hashlib.sha256(repr(model.config).encode())
    for (name, array), sample in zip(weights, samples, strict=True):
        digest.update(f"{name} {array.shape} ".encode() + np.array(sample).tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[Arrays, dict[str, str]]:
    """The arrays, in memory, and the metadata of a safetensors file. Raises CheckpointError."""
    from ..checkpoints.safetensors import read_header  # which looks closer than MLX's own reader

    try:
        read_header(path)
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
        mx.eval(arrays)
    except (CheckpointError, RuntimeError, ValueError):
        raise CheckpointError(
            f"{path} is not a saved session, or a damaged one; give another file, or save the session again."
        ) from None
    return arrays, metadata


def _checksum(arrays: Arrays, text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.array(array.reshape(-1).view(mx.uint8)))
    return digest.hexdigest()


def _picture_as_json(value: Any, images: list[PreparedImage]) -> dict[str, Any]:
    if isinstance(value, PreparedVideo):
        return {VIDEO: value.frames, "times": value.times}
    if not isinstance(value, PreparedImage):
        raise TypeError(f"a {type(value).__name__}")
    images.append(value)
    return {IMAGE: len(images) - 1, "soft_tokens": value.soft_tokens, "digest": value.digest}


def _picture_from_json(value: dict[str, Any], arrays: Arrays) -> Any:
    if value.keys() == {VIDEO, "times"}:
        return PreparedVideo(tuple(value[VIDEO]), tuple(value["times"]))
    if value.keys() != {IMAGE, "soft_tokens", "digest"}:
        return value
    pixels, positions = (np.array(arrays[f"images.{value[IMAGE]}.{name}"]) for name in ("pixels", "positions"))
    return PreparedImage(pixels, positions, value["soft_tokens"], value["digest"])
