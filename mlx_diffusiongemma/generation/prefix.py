"""A prompt in a cache that has held others: only what they do not have in common is encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from ..model.vision import image_blocks

if TYPE_CHECKING:
    from ..model.cache import Cache, Label
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.images import PreparedImage
    from ..processing.processor import Prompt


def encode_prompt(model: DiffusionGemma, cache: Cache, prompt: Prompt, end: int | None = None) -> Iterator[int]:
    """Make `cache` hold exactly this prompt, as if it had been encoded into an empty one.

    end: hold no more than so many of its tokens, which must not part an image; None is all of them.

    Yields how many of its tokens the cache holds: first those that it had already, then after each chunk. The denoiser
    only reads keys and values, so where all of them are there nothing is encoded at all. Stopped early, the cache holds
    the part that is done. What `rewind` will be asked for next is kept: the prompt's end, behind which the reply goes,
    and the place where this prompt parts from the last, if that was out of reach.
    """
    end = len(prompt.tokens) if end is None else end
    blocks = _image_blocks(model, prompt)
    shared = min(rewind_to_common(model, cache, prompt), end)
    if cache.offset > end:
        cache.rewind(end)
    yield cache.offset
    for stop in (shared, end):
        start = cache.offset
        if start < stop:
            images = [image for image, (first, _) in zip(prompt.images, blocks, strict=True) if start <= first < stop]
            for done in model.encode_chunks(mx.array([prompt.tokens[start:stop]]), cache, images):
                yield start + done
            cache.snapshot()
    cache.snapshot()


def rewind_to_common(model: DiffusionGemma, cache: Cache, prompt: Prompt) -> int:
    """Make `cache` hold the beginning of `prompt`, as much of it as it has and can go back to. How many tokens the two
    had in common, which can be more.
    """
    shared = common_length(model.labels(prompt.tokens, prompt.images), cache.labels)
    # An image's tokens see each other both ways: it is reused as a whole or not at all.
    shared = next((first for first, last in _image_blocks(model, prompt) if first < shared < last), shared)
    cache.rewind(shared)
    return shared


def split_off_end(model: DiffusionGemma, prompt: Prompt) -> tuple[int, tuple[PreparedImage, ...]]:
    """The place of the prompt's last token, or of the image that it ends with, which is read as a whole; that image."""
    last = len(prompt.tokens) - 1
    for first, end in _image_blocks(model, prompt):
        if first <= last < end:
            return first, tuple(prompt.images[-1:])
    return last, ()


def _image_blocks(model: DiffusionGemma, prompt: Prompt) -> list[tuple[int, int]]:
    return image_blocks(prompt.tokens, model.config.image_token_id) if prompt.images else []


def common_length(first: Sequence[Label], second: Sequence[Label]) -> int:
    """The number of labels that two sequences begin with alike."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))
