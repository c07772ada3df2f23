"""Pictures as the vision tower takes them: patches of pixels and where each patch sits.

Equal to Transformers' `Gemma4ImageProcessorPil`, image by image: upright, RGB on white, resized with its aspect kept
to at most `budget` soft tokens, cut into patches in reading order. The reference pads every image of a batch to the
budget with zero patches at position (-1, -1), masks them in attention and drops them after pooling, so an image
alone, without padding, gives the same soft tokens.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..errors import PromptError
from .sources import MAX_PIXELS, MOVING, STILL, one_sentence, opened

BUDGETS = (70, 140, 280, 560, 1120)
# Of Gemma 4's video processor: most soft tokens per frame, most frames, and frames per second where nothing says.
VIDEO_BUDGET, VIDEO_FRAMES, VIDEO_FPS = 70, 32, 24.0
MAX_VIDEO_PIXELS = 2**30  # of all frames together: 500 frames of 1920 × 1080
SLOWEST_FPS = 1e-6  # a frame in twelve days; a time has to stay a number

ImageSource = str | os.PathLike[str] | bytes | Image.Image
VideoSource = ImageSource | Sequence[ImageSource]


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """One image, ready for `VisionTower`.

    pixels: [patches, patch_size * patch_size * 3] float32 in 0…1, each patch in (row, column, channel) order.
    positions: [patches, 2] int32, (x, y) of each patch in the grid of patches, in reading order.
    soft_tokens: how many embeddings the tower makes of it, patches / pooling².
    digest: hash of the resized picture; images with equal digests have equal embeddings.
    """

    pixels: np.ndarray
    positions: np.ndarray
    soft_tokens: int
    digest: str


@dataclass(frozen=True, eq=False)
class PreparedVideo:
    """A video's frames, ready for `VisionTower`, and when each is shown, in seconds."""

    frames: tuple[PreparedImage, ...]
    times: tuple[float, ...]


def prepare_image(
    source: ImageSource,
    *,
    budget: int = 280,
    patch_size: int = 16,
    pooling: int = 3,
    allow_files: bool = True,
    allow_urls: bool = False,
) -> PreparedImage:
    """Read `source` and cut it into patches (`Gemma4ImageProcessorPil._preprocess`).

    source: a file's bytes, a `data:` URL, a Pillow image, with `allow_files` a path, with `allow_urls` an http(s) URL.
    budget: most soft tokens, one of `BUDGETS`.
    pooling: patches per soft token along each side.
    Raises PromptError.
    """
    if budget not in BUDGETS:
        raise PromptError(f"An image budget is one of {', '.join(map(str, BUDGETS))} soft tokens, not {budget!r}.")
    return _cut(load_image(source, allow_files=allow_files, allow_urls=allow_urls), budget, patch_size, pooling)


def prepare_video(
    source: VideoSource,
    *,
    frames: int | None = None,
    fps: float | None = None,
    patch_size: int = 16,
    pooling: int = 3,
    allow_files: bool = True,
    allow_urls: bool = False,
) -> PreparedVideo:
    """Take frames from a video as `sample_video` does, and cut each into patches for at most `VIDEO_BUDGET` soft
    tokens. Raises PromptError.
    """
    sampled = sample_video(source, frames=frames, fps=fps, allow_files=allow_files, allow_urls=allow_urls)
    prepared = [(_cut(picture, VIDEO_BUDGET, patch_size, pooling), seconds) for picture, seconds in sampled]
    return PreparedVideo(*zip(*prepared, strict=True))


def image_of_patches(pixels: np.ndarray, positions: np.ndarray, *, patch_size: int, pooling: int) -> PreparedImage:
    """Put a prepared image together again from its two arrays. Raises ValueError where no image has such."""
    if pixels.ndim != 2 or pixels.shape[1] != 3 * patch_size**2 or positions.shape != (len(pixels), 2):
        raise ValueError("the arrays of an image have other shapes than patches have")
    if not len(pixels) or not np.all((pixels >= 0) & (pixels <= 1)):  # which what is not a number is not either
        raise ValueError("an image has no pixels, or some that are not from 0 to 1")
    columns, rows = (int(last) + 1 for last in positions.max(axis=0))
    if columns * rows != len(pixels) or columns % pooling or rows % pooling:
        raise ValueError("the patches of an image form no grid")
    raster = np.rint(pixels * 255).astype(np.uint8).reshape(rows, columns, patch_size, patch_size, 3)
    image = _in_patches(raster.swapaxes(1, 2).reshape(rows * patch_size, -1, 3), patch_size, pooling)
    if not np.array_equal(image.positions, positions) or not np.array_equal(image.pixels, pixels):
        raise ValueError("the patches of an image are not in order, or have colors that no picture has")
    return image


def _cut(picture: Image.Image, budget: int, patch_size: int, pooling: int) -> PreparedImage:
    """Resize an upright RGB picture and cut it into patches."""
    size = resized_size(*picture.size, budget=budget, patch_size=patch_size, pooling=pooling)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return _in_patches(np.asarray(picture), patch_size, pooling)


def _in_patches(raster: np.ndarray, patch_size: int, pooling: int) -> PreparedImage:
    """Cut a picture [height, width, 3] of bytes, whose sides are multiples of patch_size * pooling, into patches."""
    height, width, _ = raster.shape
    columns, rows = width // patch_size, height // patch_size
    patches = raster.reshape(rows, patch_size, columns, patch_size, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    y, x = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
    return PreparedImage(
        pixels=patches.astype(np.float32) / np.float32(255),
        positions=np.stack([x, y], axis=-1),
        soft_tokens=rows * columns // pooling**2,
        digest=hashlib.sha256(f"{width}x{height}:".encode() + raster.tobytes()).hexdigest(),
    )


def resized_size(width: int, height: int, *, budget: int, patch_size: int = 16, pooling: int = 3) -> tuple[int, int]:
    """Choose the (width, height) in pixels that a picture is resized to: both multiples of patch_size * pooling, of
    at most `budget` such squares, and about as long as wide as it was (`get_aspect_ratio_preserving_size`).
    """
    square = patch_size * pooling
    factor = math.sqrt(budget * square**2 / (width * height))
    columns, rows = int(factor * width / square), int(factor * height / square)
    # A very long picture is one square high (or wide) and keeps its length up to the budget.
    if rows == 0:
        columns, rows = min(width // height, budget), 1
    elif columns == 0:
        columns, rows = 1, min(height // width, budget)
    return columns * square, rows * square


def load_image(source: ImageSource, *, allow_files: bool = True, allow_urls: bool = False) -> Image.Image:
    """Read the picture in `source` (its first frame, if it moves): upright, as RGB on white. Raises PromptError."""
    if isinstance(source, Image.Image):
        with one_sentence("The image", STILL):
            return _upright_rgb(source)
    if not isinstance(source, str | os.PathLike | bytes):
        raise PromptError(f"An image is a path, a file's bytes or a Pillow image, not a {type(source).__name__}.")
    with opened(source, STILL, allow_files=allow_files, allow_urls=allow_urls) as image:
        return _upright_rgb(image)


def sample_video(
    source: VideoSource,
    *,
    frames: int | None = None,
    fps: float | None = None,
    allow_files: bool = True,
    allow_urls: bool = False,
) -> Iterator[tuple[Image.Image, float]]:
    """Yield at most `frames` pictures, evenly spaced from the first on, each with its time in seconds
    (`default_sample_indices_fn`). One is in memory at a time.

    source: a file that Pillow can play (GIF, WebP, APNG, AVIF), in any form `load_image` takes, or a list of frames.
    frames: None is `VIDEO_FRAMES`.
    fps: frames per second of a list, None is `VIDEO_FPS`; a file says how long each of its frames is shown.
    Raises PromptError.
    """
    frames = VIDEO_FRAMES if frames is None else frames
    fps = VIDEO_FPS if fps is None else fps
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise PromptError(f"A video takes a whole number of frames, at least 1, not {frames!r}.")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not SLOWEST_FPS <= fps < math.inf:
        raise PromptError(f"A video's frames per second are a number, at least {SLOWEST_FPS:f}, not {fps!r}.")
    if isinstance(source, Image.Image):
        with one_sentence("The video", MOVING):
            yield from _sample_animation(source, frames)
    elif isinstance(source, str | os.PathLike | bytes):
        with opened(source, MOVING, allow_files=allow_files, allow_urls=allow_urls) as image:
            yield from _sample_animation(image, frames)
    elif not isinstance(source, Sequence) or isinstance(source, bytearray | memoryview):
        raise PromptError(
            f"A video is a path, a file's bytes, a Pillow image or a list of frames, not a {type(source).__name__}."
        )
    elif not source:
        raise PromptError("The video has no frames; give at least one.")
    else:
        pictures: Sequence[Any] = source  # each is checked when it is read
        for place in _evenly_spaced(frames, len(pictures)):
            yield load_image(pictures[place], allow_files=allow_files, allow_urls=allow_urls), place / fps


def timestamp(seconds: float) -> str:
    """Write a frame's time as Gemma reads it: mm:ss, rounded down."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def video_text(times: Sequence[float], frames: Sequence[str]) -> str:
    """Write what stands for a video in the prompt: when each frame is shown, then the frame's own text
    (`Gemma4Processor.replace_video_token`). times: in seconds.
    """
    return " ".join(f"{timestamp(seconds)} {frame}" for seconds, frame in zip(times, frames, strict=True))


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF orientation says (`load_image`) and put what is transparent on white
    (`convert_to_rgb`), which Transformers' loader would cut off before its processor sees it. Raises PromptError.
    """
    _check_size(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey to 255, and the reference with it: all white. The high byte is the picture.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _check_size(image: Image.Image) -> None:
    if 0 in image.size:
        raise PromptError("The image has no pixels; give one that is at least 1 × 1.")
    if image.width * image.height > MAX_PIXELS:
        raise PromptError(
            f"The image has {image.width} × {image.height} pixels, more than {MAX_PIXELS / 1e6:.0f} million; "
            "make it smaller."
        )


def _sample_animation(image: Image.Image, frames: int) -> Iterator[tuple[Image.Image, float]]:
    _check_size(image)
    total = getattr(image, "n_frames", 1)  # Pillow's class for pictures that were never a file lacks it
    if total * image.width * image.height > MAX_VIDEO_PIXELS:
        raise PromptError(
            f"The video has {total} frames of {image.width} × {image.height} pixels, too many to decode; "
            "make it smaller or give a list of frames."
        )
    chosen = set(_evenly_spaced(frames, total))
    seconds = 0.0
    try:
        for index in range(total):
            image.seek(index)
            image.load()  # some formats know a frame's duration only then
            if index in chosen:
                yield _upright_rgb(image), seconds
            seconds += image.info.get("duration", 0) / 1000
    finally:
        image.seek(0)  # it may be the caller's


def _evenly_spaced(count: int, total: int) -> list[int]:
    count = min(count, total)
    return [i * total // count for i in range(count)]
