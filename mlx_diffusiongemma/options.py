"""A request's options, the checkpoint's own settings of them, and modes: settings that go by a name."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from .config import check_object, is_whole, read_json
from .errors import CheckpointError, PromptError

Decoder = Literal["diffusion", "autoregressive", "speculative"]
DECODERS: tuple[Decoder, ...] = ("diffusion", "autoregressive", "speculative")


@dataclass(frozen=True)
class GenerationOptions:
    """One request's options. None means the checkpoint's own setting, so nothing replaces its sampler silently.

    max_tokens: most tokens to commit (ours; the checkpoints' own 256 is a single canvas).
    max_steps: most denoising steps per canvas.
    entropy_bound: nats; positions are accepted in ascending entropy while the sum of those before stays within it.
    t_max, t_min: temperature at the first step and the limit it falls to.
    stability: steps for which the argmax canvas must not have changed. 0: always stable.
    confidence: nats; a canvas stops once stable with a mean entropy below this.
    end_tokens: ids that end a reply.
    stop: strings that end a reply; they are not part of it.
    seed: of every random draw. None: another one each time.
    retries: how often a first canvas that would make the reply empty is denoised again. 0: as the model has it.
    canvas_length: tokens per canvas, at most the checkpoint's. Of the speculative decoder: of its longest draft.
    active_rows: compute only the rows of a reply's canvas that have not settled, which is approximate: see
        `generation.decoders.active_rows`. Infilling and editing always compute all.
    decoder: "diffusion" denoises canvas after canvas; "autoregressive" writes a token at a time, left to right, with
        the encoder; "speculative" drafts on a canvas, and keeps what the encoder would have written.
    temperature, top_p, top_k, min_p, repetition_penalty: how the latter two choose tokens, as mlx-lm's sampler
        does. temperature 0: the likeliest; top_p 1, top_k 0, min_p 0, repetition_penalty 1: without effect.
    """

    max_tokens: int = 1024
    max_steps: int | None = None
    entropy_bound: float | None = None
    t_max: float | None = None
    t_min: float | None = None
    stability: int | None = None
    confidence: float | None = None
    end_tokens: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    canvas_length: int | None = None
    retries: int = 3
    decoder: Decoder = "diffusion"
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    active_rows: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "end_tokens"):
            if isinstance(getattr(self, name), list | set | frozenset):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, lowest in (
            ("max_tokens", 1),
            ("max_steps", 1),
            ("canvas_length", 1),
            ("stability", 0),
            ("retries", 0),
            ("top_k", 0),
        ):
            _check_number(self, name, int, lowest)
        check_seed(self.seed)
        for name in ("entropy_bound", "t_max", "t_min", "confidence", "temperature", "repetition_penalty"):
            _check_number(self, name, float, 0.0)
        for name in ("top_p", "min_p"):
            _check_number(self, name, float, 0.0, 1.0)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise PromptError(f"{name} must be above 0; 1 leaves it without effect.")
        if self.decoder not in DECODERS:
            raise PromptError(f"decoder is {self.decoder!r}; it is one of {', '.join(DECODERS)}.")
        if self.t_max == 0:
            raise PromptError("t_max must be above 0; give a low temperature, such as 0.01, for the likeliest tokens.")
        if self.t_max is not None and self.t_min is not None and self.t_max < self.t_min:
            raise PromptError(f"t_max ({self.t_max}) must not be below t_min ({self.t_min}).")
        if self.active_rows not in (None, True, False):
            raise PromptError(f"active_rows must be True or False, not {self.active_rows!r}.")
        if not isinstance(self.stop, tuple) or any(not isinstance(text, str) or not text for text in self.stop):
            raise PromptError("stop takes strings of at least one character.")
        tokens = () if self.end_tokens is None else self.end_tokens
        if not isinstance(tokens, tuple) or not all(is_whole(token, 0) for token in tokens):
            raise PromptError(f"end_tokens takes a list of token ids, not {self.end_tokens!r}.")

    @classmethod
    def from_checkpoint(cls, directory: str | Path, config: dict[str, Any] | None = None) -> GenerationOptions:
        """The checkpoint's own settings, filled in with the reference's defaults where it says nothing.

        End tokens are the union of config.json's and generation_config.json's: each file leaves some out.
        config: what config.json holds, where that is read already. Raises CheckpointError.
        """
        directory = Path(directory)
        config = read_json(directory / "config.json") if config is None else config
        path = directory / "generation_config.json"
        generation = read_json(path) if path.exists() else config.get("generation_config") or {}
        inside = [check_object(config.get(name) or {}, name) for name in ("text_config", "generation_config")]
        declared = [config, *inside, generation]
        end_tokens = sorted({token for source in declared for token in _token_ids(source.get("eos_token_id"))})
        sampler = check_object(generation.get("sampler_config") or {}, "sampler_config", path.name)
        settings = {
            "max_steps": generation.get("max_denoising_steps"),
            "entropy_bound": sampler.get("entropy_bound"),
            "t_max": generation.get("t_max"),
            "t_min": generation.get("t_min"),
            "stability": generation.get("stability_threshold"),
            "confidence": generation.get("confidence_threshold"),
            "canvas_length": config.get("canvas_length"),
            **{name: generation.get(name) for name in OF_CAUSAL_DECODERS},
        }
        given = {name: value for name, value in settings.items() if value is not None}
        try:
            return replace(REFERENCE_SETTINGS, **given, end_tokens=tuple(end_tokens))
        except PromptError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def foreign(self, checkpoint: GenerationOptions | None = None) -> list[str]:
        """List the options that are set, to another value than the checkpoint's, and mean nothing to this decoder."""
        match self.decoder:
            case "diffusion":
                names = OF_CAUSAL_DECODERS
            case "autoregressive":
                names = (*OF_DIFFUSION, "max_steps", "canvas_length")
            case "speculative":
                names = OF_DIFFUSION
        own = checkpoint or GenerationOptions()
        return [name for name in names if getattr(self, name) not in (None, getattr(own, name))]

    def with_decoder(self, decoder: Decoder) -> GenerationOptions:
        """These options for another decoder: those that mean nothing to it are left to the checkpoint."""
        options = replace(self, decoder=decoder)
        unset: dict[str, Any] = dict.fromkeys(options.foreign())
        return replace(options, **unset)

    def filled_from(self, checkpoint: GenerationOptions) -> GenerationOptions:
        """These options with every None replaced by the checkpoint's setting."""
        unset = [f.name for f in fields(self) if getattr(self, f.name) is None]
        return replace(self, **{name: getattr(checkpoint, name) for name in unset})


@dataclass(frozen=True, kw_only=True)
class Settings(GenerationOptions):
    """Options with nothing left open, the seed neither: what a request runs with."""

    max_steps: int
    entropy_bound: float
    t_max: float
    t_min: float
    stability: int
    confidence: float
    end_tokens: tuple[int, ...]
    seed: int
    canvas_length: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    active_rows: bool


def check_seed(seed: int | None) -> None:
    """Raises PromptError where `seed` is neither None nor one that random draws can start from."""
    if seed is not None and not (is_whole(seed, 0) and seed < 2**64):
        raise PromptError(f"seed must be a whole number from 0 to 2**64 - 1, not {seed!r}.")


def _check_number(options: GenerationOptions, name: str, kind: type, lowest: float, highest: float = math.inf) -> None:
    value = getattr(options, name)
    if value is None and name not in ("max_tokens", "retries"):
        return
    accepted = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, accepted) or not lowest <= value <= highest:
        what = "a whole number" if kind is int else "a number"
        limits = f"of at least {lowest:g}" if highest == math.inf else f"from {lowest:g} to {highest:g}"
        raise PromptError(f"{name} must be {what} {limits}, not {value!r}.")


OF_DIFFUSION: tuple[str, ...] = ("entropy_bound", "t_max", "t_min", "stability", "confidence", "active_rows")
OF_CAUSAL_DECODERS: tuple[str, ...] = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

# `_get_default_generation_params` of the reference; the canvas length is its configuration's default, and what ends a
# reply is a checkpoint's to say. The sampling of causal decoders is what Gemma 4 is published with.
REFERENCE_SETTINGS = GenerationOptions(
    max_steps=48,
    entropy_bound=0.1,
    t_max=0.8,
    t_min=0.4,
    stability=1,
    confidence=0.005,
    end_tokens=(),
    canvas_length=256,
    temperature=1.0,
    top_p=0.95,
    top_k=64,
    min_p=0.0,
    repetition_penalty=1.0,
    active_rows=False,
)


def _token_ids(value: Any) -> list[int]:
    """The ids in an `eos_token_id`: one, a list of them, or nothing. Raises CheckpointError."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(is_whole(token, 0) for token in ids):
        raise CheckpointError(f"The checkpoint's eos_token_id is {value!r}, not token ids; download it again.")
    return ids


# Chosen by `tests/benchmarks/modes.py`.
# `reference` leaves everything to the checkpoint. `fast` stops a canvas as soon as it is confident, more so than the
# reference asks, without a step to confirm it, and gives up early on one that does not settle. `turbo` computes fewer
# rows in each step, which is approximate: `tests/benchmarks/active_rows.py`. An option given beside a mode wins:
# `options.filled_from(MODES["fast"])`.
MODES: dict[str, GenerationOptions] = {
    "reference": GenerationOptions(),
    "fast": GenerationOptions(max_steps=24, stability=0, confidence=0.002),
    "turbo": GenerationOptions(active_rows=True),
}
# The fields that any mode sets, which go back to the checkpoint's where another mode is chosen.
OF_MODES = tuple(
    name for name, unset in vars(MODES["reference"]).items() if {unset} != {vars(mode)[name] for mode in MODES.values()}
)
