"""Whether a model does its task: it answers conversations, and its replies are compared with the expected ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..events import Reply, Result
from ..generation.batch import generate_batch
from ..options import GenerationOptions

if TYPE_CHECKING:
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor
    from .data import Record

MARGIN = 1.25  # a reply may be this much longer than the expected one before it is cut


@dataclass(frozen=True)
class Score:
    """The share of `count` replies that are exactly as expected, and the mean denoising steps of a canvas."""

    right: float
    steps: float
    count: int


def score(
    model: DiffusionGemma,
    processor: Processor,
    records: Sequence[Record],
    options: GenerationOptions | None = None,
    seed: int = 0,
) -> Score:
    """Answer the last turn of each conversation with the decoder that `options` name, the same way every time."""
    longest = max(len(record.examples[-1].reply) for record in records)
    most = int(longest * MARGIN) + model.config.canvas_length
    prompts = [record.prompt for record in records]
    results = generate_batch(model, processor, prompts, options=options, max_tokens=most, seed=seed)
    right, steps, canvases = 0, 0, 0
    for result in results:
        right += is_as_expected(result, records[result.index].expected)
        steps += sum(result.stats.steps)
        canvases += len(result.stats.steps)
    return Score(right / len(records), steps / max(canvases, 1), len(records))


def is_as_expected(result: Result, expected: Reply) -> bool:
    """Whether a reply says and calls what is expected; what it thought is its own affair."""
    calls = [[(call.name, call.arguments) for call in reply.tool_calls] for reply in (result, expected)]
    return result.text.strip() == expected.text.strip() and calls[0] == calls[1]
