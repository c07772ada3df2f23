"""A conversation in a file: safetensors with the keys and values, the messages in its metadata.

Nothing is executed when it is read, and no other file: the images and videos of its messages are in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..errors import CheckpointError, PromptError
from ..files import Kind, check_place, write_file
from ..processing.images import PreparedImage, PreparedVideo, image_of_patches
from ..processing.messages import VideoPart, normalize_messages

if TYPE_CHECKING:
    from ..config import VisionConfig
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma

KIND, VERSION = "mlx-diffusiongemma session", "1"
SAMPLES = 64  # of every weight, in a model's fingerprint
IMAGE_KEY, VIDEO_KEY = "prepared image", "prepared video"  # the keys that stand for them in JSON

Arrays = dict[str, mx.array]


def write_session(
    path: str | Path, model: DiffusionGemma, conversation: dict[str, Any], cache: Cache, *, force: bool = False
) -> None:
    """Save a conversation and the keys and values of `cache`; the file appears when it is whole.

    conversation: its system, thinking and messages: what JSON can hold, and prepared images and videos. force: replace
    a file that is no saved session, too. Raises PromptError where it cannot be written.
    """
    path = check_place(_checked(path), SESSION, force=force)
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
    with write_file(path, SESSION, force=force) as file:
        try:
            mx.save_safetensors(file, arrays, metadata)
        except RuntimeError as error:  # of MLX, where the file is none that it can write
            raise OSError(str(error)) from None


def read_session(path: str | Path, model: DiffusionGemma) -> tuple[dict[str, Any], Cache]:
    """Read the conversation, and the cache, that `write_session` saved with the same model. Raises PromptError for a
    path without a file, CheckpointError for a file that is something else, damaged, or of another model.
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
        conversation, labels = json.loads(text)
        conversation = _checked_conversation(conversation, arrays, model.config.vision)
        if not isinstance(labels, list) or not all(isinstance(label, int | str) for label in labels):
            raise ValueError("what it says of its keys and values is neither token ids nor digests")
        cache.adopt(arrays, labels)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, PromptError) as error:
        raise CheckpointError(f"{path} does not hold a session of this model ({error}); save it again.") from None
    cache.snapshot()
    return conversation, cache


def _checked_conversation(conversation: dict[str, Any], arrays: Arrays, vision: VisionConfig | None) -> dict[str, Any]:
    """Put the conversation together that a file's JSON and arrays hold. Raises PromptError, ValueError and its kin
    where they hold none that a session can go on with.
    """
    system, thinking = conversation["system"], conversation["thinking"]
    if not isinstance(system, str | None) or not isinstance(thinking, bool):
        raise ValueError("its instructions are no text, or its thinking is neither on nor off")
    messages = [_with_pictures(message, arrays, vision) for message in conversation["messages"]]
    (_, *normal), sources = normalize_messages([{"role": "user", "content": ""}, *messages])
    for source in sources:
        is_video = isinstance(source, VideoPart)
        if not isinstance(source.source if is_video else source, PreparedVideo if is_video else PreparedImage):
            raise ValueError("it lacks an image or a video of its messages")
    # Earlier versions numbered the tool calls of every turn anew.
    ids = [{key: new[key] for key in ("tool_calls", "tool_call_id") if new.get(key)} for new in normal]
    messages = [message | own for message, own in zip(messages, ids, strict=True)]
    return {"system": system, "thinking": thinking, "messages": messages}


def _is_session(path: Path) -> bool:
    """Whether the file at `path` is a saved session as far as its header tells; what follows may be damaged."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= path.stat().st_size else b""
    try:
        return bool(json.loads(header)["__metadata__"]["kind"] == KIND)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


SESSION = Kind("a saved session", _is_session)


def _checked(path: str | Path) -> Path:
    """Make sure that `path` can be one. Raises PromptError."""
    if not isinstance(path, str | os.PathLike) or "\0" in os.fspath(path):
        raise PromptError(f"{str(path)!r} is not the path of a file; give one as text.")
    return Path(path)


def fingerprint(model: DiffusionGemma) -> str:
    """Hash what tells this checkpoint from others: its configuration, and samples of every weight."""
    parameters: Arrays = {}
    tree_flatten(model.parameters(), destination=parameters)
    weights = sorted(parameters.items())
    samples = [array.reshape(-1)[:: max(array.size // SAMPLES, 1)].astype(mx.float32) for _, array in weights]
    mx.eval(samples)
    digest = hashlib.sha256(repr(model.config).encode())
    for (name, array), sample in zip(weights, samples, strict=True):
        digest.update(f"{name} {array.shape} ".encode() + np.array(sample).tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Read the arrays, into memory, and the metadata of a safetensors file. Raises CheckpointError."""
    from .safetensors import read_header  # which looks closer than MLX's own reader

    try:
        read_header(path)
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)  # typed for all formats at once
        arrays, metadata = loaded
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
        digest.update(np.array(array.reshape(-1).view(mx.uint8)).data)
    return digest.hexdigest()


def _picture_as_json(value: Any, images: list[PreparedImage]) -> dict[str, Any]:
    """Write what stands in JSON for a prepared image, which goes into `images`, or a prepared video. Raises TypeError
    for all else.
    """
    if isinstance(value, PreparedVideo):
        return {VIDEO_KEY: value.frames, "times": value.times}
    if not isinstance(value, PreparedImage):
        raise TypeError(f"a {type(value).__name__}")
    images.append(value)
    return {IMAGE_KEY: len(images) - 1, "soft_tokens": value.soft_tokens, "digest": value.digest}


def _with_pictures(message: dict[str, Any], arrays: Arrays, vision: VisionConfig | None) -> dict[str, Any]:
    """Put prepared images and videos back into a message. They are looked for in its parts alone: what a tool
    answered, or is called with, may look like anything.
    """
    if not isinstance(message.get("content"), list):
        return message
    parts = [
        {key: _picture_from_json(value, arrays, vision) for key, value in part.items()} for part in message["content"]
    ]
    return {**message, "content": parts}


def _picture_from_json(value: Any, arrays: Arrays, vision: VisionConfig | None) -> Any:
    """Make the prepared image or video that `value` stands for; other values stay what they are. Raises ValueError and
    its kin.
    """
    if not isinstance(value, dict) or not {IMAGE_KEY, VIDEO_KEY} & value.keys():
        return value
    if vision is None:
        raise ValueError("there are images in it, and this model cannot see")
    if VIDEO_KEY in value:
        frames = tuple(_picture_from_json(frame, arrays, vision) for frame in value[VIDEO_KEY])
        times = tuple(value["times"])
        if not frames or not all(isinstance(frame, PreparedImage) for frame in frames):
            raise ValueError("a video has no frames, or some that are no images")
        are_times = all(isinstance(time, int | float) and 0 <= time < math.inf for time in times)
        if len(times) != len(frames) or not are_times:
            raise ValueError("a video does not say when each frame is shown")
        return PreparedVideo(frames, times)
    pixels, positions = (arrays[f"images.{value[IMAGE_KEY]}.{name}"] for name in ("pixels", "positions"))
    if pixels.dtype != mx.float32 or positions.dtype != mx.int32:
        raise ValueError("the arrays of an image have types that no image has")
    image = image_of_patches(
        np.array(pixels), np.array(positions), patch_size=vision.patch_size, pooling=vision.pooling_kernel_size
    )
    if (value["soft_tokens"], value["digest"]) != (image.soft_tokens, image.digest):
        raise ValueError("an image is not the one that the messages show")
    return image
