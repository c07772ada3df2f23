"""The options of how a reply is decoded, which `generate` and `chat` share, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import PromptError
from ..common import chosen_mode, number, whole

if TYPE_CHECKING:
    from ...options import Decoder, GenerationOptions

NAMES: dict[str, Decoder] = {"diffusion": "diffusion", "ar": "autoregressive", "speculative": "speculative"}
# Options by the fields that they set.
FLAGS = {
    "max_steps": "--steps",
    "entropy_bound": "--entropy-bound",
    "confidence": "--confidence",
    "canvas_length": "--canvas-length",
    "temperature": "--temp",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "min_p": "--min-p",
    "repetition_penalty": "--repetition-penalty",
}
OF_OTHER_SAMPLERS = (
    "A denoising step's temperature follows the checkpoint's schedule (0.8 falling to 0.4) and its tokens are accepted "
    "by their entropy, so {name} has no meaning here; leave it out, change how much is accepted per step with {bound}, "
    "or write left to right with {decoder}."
)

Decoding = Annotated[
    str,
    typer.Option(
        "--decoder", metavar="NAME", help="diffusion, ar (left to right) or speculative (drafts, ar's own text)."
    ),
]
Temp = Annotated[
    float | None,
    typer.Option("--temp", "--temperature", metavar="X", parser=number(0), help="Of ar and speculative; 0: greedy."),
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", metavar="X", parser=number(0, 1), help="Of ar and speculative [the checkpoint's]."),
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", metavar="N", parser=whole(0), help="Of ar and speculative [the checkpoint's]."),
]
MinP = Annotated[
    float | None, typer.Option("--min-p", metavar="X", parser=number(0, 1), help="Of ar and speculative [none].")
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", metavar="X", parser=number(0, above=True), help="Of ar and speculative [none]."
    ),
]
Schema = Annotated[
    Path | None, typer.Option("--schema", metavar="FILE", help="A JSON Schema that the answer is valid for.")
]
Grammar = Annotated[
    str | None,
    typer.Option("--grammar", metavar="FILE|TEXT", help="A regular expression or Lark grammar that it follows."),
]


def asked_form(schema: Path | None, grammar: str | None) -> dict[str, Any]:
    """Read what an answer has to be like, as `stream` takes it. Raises PromptError where a file cannot be read."""
    if schema is not None:
        return {"schema": read_schema(schema), "grammar": grammar}
    if grammar is not None and len(grammar) < 1024 and "\n" not in grammar and Path(grammar).is_file():
        return {"grammar": _text_of(Path(grammar)).strip()}
    return {"grammar": grammar}


def read_schema(path: Path) -> dict[str, Any]:
    """Read a JSON Schema from a file. Raises PromptError where there is none."""
    try:
        schema = json.loads(_text_of(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise PromptError(f"{path} is not JSON ({error}); give a file with a JSON Schema.") from None
    if not isinstance(schema, dict):
        raise PromptError(f"{path} holds no JSON object; give a file with a JSON Schema.")
    return schema


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PromptError(f"{path} cannot be read ({reason}); check the path.") from None


def chosen_decoder(name: str) -> Decoder:
    """The decoder that goes by `name`, its own or a short one. Raises typer.BadParameter where none does."""
    for short, decoder in NAMES.items():
        if name in (short, decoder):
            return decoder
    raise typer.BadParameter(f"{name!r} is none of {', '.join(NAMES)}.", param_hint="'--decoder'")


def make_options(
    *,
    max_tokens: int,
    decoder: str,
    mode: str,
    steps: int | None,
    entropy_bound: float | None,
    confidence: float | None,
    canvas_length: int | None,
    stop: list[str] | None,
    seed: int | None,
    temp: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
) -> GenerationOptions:
    """The options that a command line gives. Raises PromptError where one means nothing to the decoder."""
    from ... import GenerationOptions

    options = GenerationOptions(
        max_tokens=max_tokens,
        max_steps=steps,
        entropy_bound=entropy_bound,
        confidence=confidence,
        canvas_length=canvas_length,
        stop=tuple(stop or ()),
        seed=seed,
        decoder=chosen_decoder(decoder),
        temperature=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    check_foreign(options)
    options = options.filled_from(chosen_mode(mode))
    if options.decoder != "diffusion" and mode != "reference":
        raise PromptError(f"--mode {mode} is about denoising and means nothing to --decoder {decoder}; leave it out.")
    return options


def check_foreign(options: GenerationOptions) -> None:
    """Raises PromptError where an option is set that means nothing to the decoder."""
    for field in options.foreign():
        name = FLAGS.get(field, field)
        if options.decoder == "diffusion":
            raise PromptError(OF_OTHER_SAMPLERS.format(name=name, bound="--entropy-bound", decoder="--decoder ar"))
        short = next(short for short, own in NAMES.items() if own == options.decoder)
        raise PromptError(f"{name} is about denoising and means nothing to --decoder {short}; leave it out.")
