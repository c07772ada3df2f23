"""The cost of quantizing in use: how far the predictions move, and how many more steps a canvas takes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import read_json
from ..errors import CheckpointError
from ..files import write_whole
from ..options import GenerationOptions
from ..paths import user_path
from .conversion import convert_checkpoint, find_source, plan_conversion
from .writing.hashes import REPORT
from .writing.packaging import CARD
from .writing.partial import write_json

PROMPTS = (
    "Why is the sky blue?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Summarise the plot of Hamlet in three sentences.",
    "Translate to German: The meeting was moved to next Tuesday.",
    "A train leaves at 14:05 and arrives at 17:50. How long is the journey?",
    'Return a JSON object with the keys "name" and "age" for Ada Lovelace in 1843.',
    "List five uses for a paper clip.",
    "Explain to a ten-year-old how vaccines work.",
)
NOISE = 0.5  # of a finished canvas is replaced by random tokens before the predictions are compared
LONGEST = 4  # canvases per prompt
HEADING = "## Against the unquantized model"


@dataclass(frozen=True)
class Calibration:
    """Means over the prompts. kl: of the predictions for half-noised canvases, unquantized from quantized, in nats per
    token. agreement: how often both think the same token likeliest. steps: per canvas; the last three are None where
    the unquantized model was not run, and `note` says why.
    """

    prompts: int
    steps: float
    reference_steps: float | None = None
    kl: float | None = None
    agreement: float | None = None
    note: str = ""

    def render(self) -> str:
        """The result as a person reads it, in Markdown too."""
        if self.kl is None:
            return f"{self.steps:.2f} steps per canvas over {self.prompts} prompts. {self.note}"
        return (
            f"{self.steps:.2f} steps per canvas against {self.reference_steps:.2f} unquantized, KL divergence "
            f"{self.kl:.4f} nats per token, the same likeliest token {self.agreement:.1%} of the time, over "
            f"{self.prompts} prompts."
        )


def calibrate(
    directory: str | Path,
    source: str | Path | None = None,
    prompts: Sequence[str] = PROMPTS,
    *,
    revision: str | None = None,
    stream: bool = False,
    seed: int = 0,
) -> Calibration:
    """Compare the converted checkpoint in `directory` with its unquantized `source`, and add the result to its model
    card and report.

    source: what it was converted from, a directory or repository; it is converted without quantization beside
    `directory` for the time of the comparison. Without it, or where it does not fit, only the steps are counted.
    stream: as `convert_checkpoint` takes it. Raises CheckpointError and PromptError.
    """
    directory = user_path(directory).absolute()
    prompts = _some(prompts)
    note = "The unquantized model was not given." if source is None else _misfit(source, revision)
    if source is None or note:
        result = Calibration(len(prompts), Subject(directory).replies(prompts, seed)[0], note=note)
    else:
        with tempfile.TemporaryDirectory(prefix=f"{directory.name}.", dir=directory.parent) as scratch:
            result = _compare(directory, source, revision, stream, prompts, seed, Path(scratch))
    _publish(directory, result)
    return result


def check_calibration(source: str | Path, prompts: Sequence[str] = PROMPTS, *, revision: str | None = None) -> int:
    """Make sure, before a conversion, that `calibrate` can put `prompts` to the checkpoint at `source`.

    Returns the bytes that it will write beside the converted one for the time of the comparison. Raises CheckpointError
    and PromptError.
    """
    from ..config import ModelConfig
    from ..processing.processor import Processor

    directory = find_source(source, revision).directory
    processor = Processor.from_directory(directory, ModelConfig.from_directory(directory))
    for prompt in _some(prompts):
        processor.prompt(prompt)
    return 0 if _misfit(source, revision) else plan_conversion(source, bits=None, revision=revision).file_bytes


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a text file, one per line. Raises CheckpointError."""
    try:
        return _some(user_path(path).read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:  # a ValueError for what is no text, and what no path can be
        raise CheckpointError(f"{path} cannot be read as text ({error}); give a file with a prompt per line.") from None


def _some(prompts: Sequence[str]) -> list[str]:
    """The prompts that are not blank. Raises CheckpointError where there are none."""
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise CheckpointError("There is no prompt to calibrate with; give a file with one per line.")
    return prompts


def _misfit(source: str | Path, revision: str | None) -> str:
    """Why the unquantized source cannot run here; empty if it can."""
    needed = plan_conversion(source, bits=None, revision=revision).running_bytes()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > int(mx.device_info().get("max_recommended_working_set_size", memory)):
        return f"The unquantized model needs {needed / 1e9:.0f} GB and was not run."
    return ""


def _compare(
    directory: Path,
    source: str | Path,
    revision: str | None,
    stream: bool,
    prompts: list[str],
    seed: int,
    scratch: Path,
) -> Calibration:
    """One model in memory after the other; the first one's logits wait on the disk."""
    reference = convert_checkpoint(source, scratch / "reference", bits=None, revision=revision, stream=stream)
    subject = Subject(reference.out)
    reference_steps, canvases = subject.replies(prompts, seed)
    noised = _noised(canvases, subject.model.config.text.vocab_size, seed)
    for i, logits in enumerate(subject.logits(prompts, noised)):
        np.save(scratch / f"{i}.npy", np.array(logits))
    del subject
    subject = Subject(directory)
    steps, _ = subject.replies(prompts, seed)
    compared = [
        divergence(mx.array(np.load(scratch / f"{i}.npy")), logits)
        for i, logits in enumerate(subject.logits(prompts, noised))
    ]
    kl, agreement = np.mean(compared, axis=0).tolist()
    return Calibration(len(prompts), steps, reference_steps, kl, agreement)


class Subject:
    """A loaded checkpoint that is asked things."""

    def __init__(self, directory: Path) -> None:
        from ..checkpoints.loading import load

        self.model, self.processor = load(directory)

    def replies(self, prompts: list[str], seed: int) -> tuple[float, list[list[int]]]:
        """Mean steps per canvas, and the first canvas of every reply, filled up with end tokens."""
        from ..generation.replying import generate
        from ..generation.request import request_options

        length = self.model.config.canvas_length
        options = request_options(self.model, GenerationOptions(max_tokens=LONGEST * length, seed=seed))
        results = [generate(self.model, self.processor, prompt, options=options) for prompt in prompts]
        steps = [count for result in results for count in result.stats.steps]
        end = next(iter(options.end_tokens), 0)
        return sum(steps) / len(steps), [(result.tokens + [end] * length)[:length] for result in results]

    def logits(self, prompts: list[str], canvases: list[np.ndarray]) -> Iterator[mx.array]:
        """The logits of every canvas after its prompt, float32 [L, V], one after the other."""
        for prompt, canvas in zip(prompts, canvases, strict=True):
            cache = self.model.make_cache()
            self.model.encode(mx.array([self.processor.prompt(prompt).tokens]), cache)
            yield self.model.logits(self.model.denoise(mx.array(canvas)[None], cache))[0]


def divergence(reference: mx.array, logits: mx.array) -> tuple[float, float]:
    """Mean KL divergence in nats and share of equal argmaxes, of logits [L, V] from a reference [L, V]."""
    log_p = reference - mx.logsumexp(reference, axis=-1, keepdims=True)
    log_q = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    kl = (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()
    same = (mx.argmax(reference, axis=-1) == mx.argmax(logits, axis=-1)).astype(mx.float32).mean()
    return float(kl), float(same)


def _noised(canvases: list[list[int]], vocabulary: int, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    clean = [np.array(canvas) for canvas in canvases]
    return [np.where(random.random(c.size) < NOISE, random.integers(0, vocabulary, c.size), c) for c in clean]


def _publish(directory: Path, result: Calibration) -> None:
    report: dict[str, Any] = read_json(directory / REPORT) if (directory / REPORT).is_file() else {}
    write_json(directory / REPORT, report | {"calibration": asdict(result)})
    card = directory / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {directory.name}\n"
    write_whole(card, f"{text.split(HEADING)[0].rstrip()}\n\n{HEADING}\n\n{result.render()}\n")
