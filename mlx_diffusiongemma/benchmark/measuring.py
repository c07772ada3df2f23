"""Measures how fast a model runs here and where a step's time goes; `report` shows it.

On a machine without a GPU the same runs with smaller ceilings, and the report says that it was a CPU.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..checkpoints import accounting
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.hub import download_snapshot, is_repository
from ..convert.plan import fitting_mac
from ..convert.reading import remote
from ..errors import CheckpointError
from ..generation.canvas import Canvas
from ..generation.denoising import Denoising, Job
from ..generation.request import request_options
from ..generation.sampling import Draws
from ..options import GenerationOptions
from ..paths import user_path
from . import ceilings
from .decoding import DecoderSpeeds, Replies, measure_decoders
from .prediction import Prediction, predict
from .step_profile import Component, measure_step

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor

PROMPTS = (
    "Explain why the sky is blue.",
    "Write a Python function that merges two sorted lists, with a docstring.",
    "List the planets of the solar system with one fact about each.",
    "Write a short letter that asks a landlord to repair a window.",
)
PREFIX = 1024  # tokens before the canvas, where the context has room
Log = Callable[[str], None]


@dataclass(frozen=True)
class Machine:
    """The machine that ran the measurements. load_average: the operating system's at the start, where it says one."""

    chip: str
    system: str
    mlx: str
    device: str
    memory_bytes: int
    load_average: float | None


@dataclass(frozen=True)
class FixedWork:
    """A canvas denoised for `steps` steps, whatever it holds. Seconds are for the whole canvas."""

    steps: int
    seconds: float
    tokens: int

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Autoregressive:
    """The same prompts answered by another model through mlx-lm, token after token."""

    model: str
    tokens: int
    seconds: float
    peak_memory_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Report:
    """Everything measured. ceilings: the best rate seen of each operation in a step, by name, in operations a second.

    step_seconds: of a whole step, which is more than its components.
    """

    machine: Machine
    best: ceilings.Machine
    ceilings: dict[str, float]
    canvas_tokens: int
    prefix_tokens: int
    components: list[Component]
    step_seconds: float
    fixed: list[FixedWork]
    decoders: DecoderSpeeds
    prefill_tokens_per_second: float
    against: Autoregressive | None

    @property
    def natural(self) -> Replies:
        """The replies of the diffusion decoder."""
        return self.decoders.replies["diffusion"]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it, with the rates that follow from the rest."""
        content = asdict(self)
        content["machine"] |= content.pop("best")
        content["ceilings_in_operations_per_second"] = content.pop("ceilings")
        content["fixed_work"] = content.pop("fixed")
        for written, measured in zip(content["fixed_work"], self.fixed, strict=True):
            written |= {"seconds_per_step": measured.seconds_per_step, "tokens_per_second": measured.tokens_per_second}
        natural = self.natural
        content["natural_stop"] = {
            "steps": natural.steps,
            "tokens": natural.tokens,
            "seconds": natural.seconds,
            "first_canvas_seconds": natural.first_seconds,
            "peak_memory_bytes": natural.peak_memory_bytes,
            "tokens_per_second": natural.tokens_per_second,
            "canvases_by_steps": natural.distribution,
        }
        content["decoders"] = self.decoders.to_dict()
        if self.against:
            content["against"]["tokens_per_second"] = self.against.tokens_per_second
        return content


def run_benchmark(
    model: DiffusionGemma,
    processor: Processor,
    *,
    prompts: Sequence[str] = PROMPTS,
    steps: Sequence[int] = (8, 16),
    max_tokens: int = 512,
    against: Autoregressive | None = None,
    log: Log = lambda message: None,
) -> Report:
    """Measure this machine, then the model on it.

    steps: the fixed amounts of work to time a canvas for. max_tokens: of each answer. against: what
    `measure_autoregressive` gave for the same prompts; measure it first, as two models need the memory of both. log:
    told what is being measured.
    """
    machine = describe_machine()
    log("this machine at best")
    best, measured = ceilings.measure_machine(model.dtype), ceilings.Ceilings()
    canvas = model.config.canvas_length
    prefix = min(PREFIX, model.config.text.max_position_embeddings - canvas)
    log(f"prefill of {prefix} tokens")
    cache, prefill_seconds = encode_prefix(model, prefix)
    log("a step by component, each beside its ceilings")
    components, step_seconds = measure_step(model, cache, measured)
    fixed = []
    for count in steps:
        log(f"{count} steps")
        fixed.append(measure_fixed(model, cache, count))
    log(f"{len(prompts)} prompts to their natural stop, by each decoder")
    decoders = measure_decoders(model, processor, cache, prompts, max_tokens)
    return Report(
        machine=machine,
        best=best,
        ceilings={operation.name: rate for operation, rate in measured.best.items()},
        canvas_tokens=canvas,
        prefix_tokens=prefix,
        components=components,
        step_seconds=step_seconds,
        fixed=fixed,
        decoders=decoders,
        prefill_tokens_per_second=prefix / prefill_seconds,
        against=against,
    )


@dataclass(frozen=True)
class Plan:
    """The memory that a checkpoint needs after `context` tokens, and how fast Macs are predicted to be with it.

    most_context: the tokens that the model was made for.
    """

    memory: accounting.Memory
    context: int
    most_context: int
    predictions: list[Prediction]

    @property
    def macs(self) -> str:
        """The Macs that it fits, to answer prompts."""
        return fitting_mac(self.memory.total)

    @property
    def macs_to_infill(self) -> str:
        """The Macs that it fits with what infilling adds."""
        return fitting_mac(self.memory.total + self.memory.rows)

    @property
    def warning(self) -> str:
        """A sentence where the model cannot be given so much context, else empty."""
        if self.context <= self.most_context:
            return ""
        return f"{self.context:,} tokens are beyond this model: {self.most_context:,} and a canvas fit its context."

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON can hold it."""
        memory = self.memory
        return {
            "context_tokens": self.context,
            "most_context_tokens": self.most_context,
            "weights_bytes": memory.weights,
            "keys_and_values_bytes": memory.cache,
            "one_step_bytes": memory.step,
            "total_bytes": memory.total,
            "more_for_a_kept_conversation_bytes": memory.snapshot,
            "more_for_infilling_bytes": memory.rows,
            "macs": self.macs,
            "macs_to_infill": self.macs_to_infill,
            "predictions": [prediction.to_dict() for prediction in self.predictions],
        }


def make_plan(source: str | Path, context: int | None = None) -> Plan:
    """Plan a converted checkpoint, a directory or a repository, after `context` tokens: its memory, and its speed.

    From its shapes alone, see `read_shapes`. Raises CheckpointError.
    """
    checkpoint = read_shapes(source)
    config = checkpoint.config
    most = config.text.max_position_embeddings - config.canvas_length
    context = min(accounting.CONTEXT, most) if context is None else context
    memory = accounting.memory_needed(config, checkpoint.nbytes, context, checkpoint.item)
    return Plan(memory, context, most, predict(config, checkpoint.tensors, context, checkpoint.item))


def read_shapes(source: str | Path) -> Checkpoint:
    """Read a converted checkpoint's configuration and shapes, in a directory or a repository, of which only the small
    files and the headers of the large ones are downloaded: its arrays cannot be read. Raises CheckpointError.
    """
    if not is_repository(source):
        return Checkpoint.open(source)
    directory = remote.download(str(source), None, weights=False)
    return Checkpoint.in_directory(directory, remote.remote_headers(str(source), directory.name))


def describe_machine() -> Machine:
    info = mx.device_info()
    return Machine(
        chip=_chip(str(info.get("device_name", ""))),
        system=f"{platform.system()} {platform.mac_ver()[0] or platform.release()}",
        mlx=metadata.version("mlx"),
        device="GPU" if mx.default_device() == mx.gpu else "CPU",
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load_average=os.getloadavg()[0],
    )


def _chip(device: str) -> str:
    if platform.system() != "Darwin":
        return device or platform.machine()
    found = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or device


def encode_prefix(model: DiffusionGemma, count: int) -> tuple[Cache, float]:
    """A cache of `count` random tokens, and the seconds that encoding them took, warmed up."""
    tokens = mx.random.randint(0, model.config.text.vocab_size, (1, count), key=mx.random.key(0))

    def encode() -> Cache:
        cache = model.make_cache()
        for _ in model.encode_chunks(tokens, cache):
            pass
        return cache

    encode()
    started = time.perf_counter()
    cache = encode()
    return cache, time.perf_counter() - started


def measure_fixed(model: DiffusionGemma, cache: Cache, steps: int) -> FixedWork:
    """A canvas that is never sure enough to stop, after the cached prefix."""
    length = model.config.canvas_length
    options = GenerationOptions(max_steps=steps, confidence=0.0, canvas_length=length)
    run = Denoising(model, request_options(model, options), model.config.text.vocab_size)
    run.add(Job(Canvas([]).part(0, length), cache, Draws(seed=0)))
    started = time.perf_counter()
    for _ in run.steps():
        pass
    return FixedWork(steps, time.perf_counter() - started, length)


def measure_autoregressive(source: str, prompts: Sequence[str] = PROMPTS, max_tokens: int = 512) -> Autoregressive:
    """Answers through mlx-lm, one prompt after the other; the time of its prefill is left out, as it is of ours.

    source: a directory or a hub repository in mlx-lm's format. Raises CheckpointError.
    """
    from huggingface_hub.errors import StrictDataclassError
    from mlx_lm import stream_generate
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, load

    files = DEFAULT_ALLOW_PATTERNS
    directory = download_snapshot(source, None, files) if is_repository(source) else user_path(source)
    try:
        model, tokenizer = load(str(directory))[:2]
    # mlx-lm raises what its files' readers raise.
    except (
        *(OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError),
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CheckpointError(f"mlx-lm cannot load {source} ({reason}); give a model that it can run.") from None
    if not tokenizer.has_chat_template:
        raise CheckpointError(f"{source} has no chat template; give an instruction-tuned model.")
    tokens, seconds, peak = 0, 0.0, 0
    for prompt in prompts:
        turn = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        mx.reset_peak_memory()
        *_, last = stream_generate(model, tokenizer, turn, max_tokens=max_tokens)
        tokens += last.generation_tokens
        seconds += last.generation_tokens / last.generation_tps
        peak = max(peak, mx.get_peak_memory())
    return Autoregressive(source, tokens, seconds, peak)
