"""A run of `mlx-dg train`: data and model are read, the model learns, and what came of it is said."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ...checkpoints.adapter_files import export_peft, load_adapter, read_arrays
from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.memory import CACHE_LIMIT
from ...errors import TrainingError
from ...model.adapters import use_arrays
from ...paths import user_path
from ...processing.processor import Processor
from ...training.data import Record, mix_records, read_folder
from ...training.memory import check_memory
from ...training.trainer import BEST, Report, TrainingResult, evaluate, prepare, train
from ..common import announced_model, load_source, notice, say
from .reporting import Narrator, Places, Reporter, losses, scored
from .settings import Settings, size_in_bytes

if TYPE_CHECKING:
    from ...model.diffusion_gemma import DiffusionGemma

Data = dict[str, list[Record]]


def run(settings: Settings, *, yes: bool) -> None:
    """Train, test or both, as the settings say. Raises TrainingError and what else makes it impossible, before the
    weights are read where that can be known, and typer.Exit(130) where it was interrupted.
    """
    import mlx.core as mx

    if settings.export_peft:
        if settings.options.adapter.fine_tune_type == "full":
            raise TrainingError("--export-peft has no form for whole weights; train lora or dora, or leave it out.")
        if user_path(settings.export_peft).resolve() == user_path(settings.adapter_path).resolve():
            raise TrainingError(
                "--export-peft and --adapter-path are one folder; give two, for files of both have one name."
            )
    places = Places.named(settings.report_to or "")
    kept = CACHE_LIMIT if settings.clear_cache_threshold is None else size_in_bytes(settings.clear_cache_threshold)
    source = announced_model(settings.model, yes=yes)
    checkpoint = Checkpoint.open(source)
    data = read_data(settings, checkpoint)
    if settings.trains:
        check_memory(checkpoint, settings.options, longest(data, checkpoint.config.canvas_length))
    model, processor = load_source(source, fuse=False)  # an adapter goes beside each projection
    mx.set_cache_limit(kept)
    is_first = mx.distributed.init().rank() == 0  # of the machines under mlx.launch: the one that speaks and writes
    if settings.trains:
        _train(settings, model, processor, data, places if is_first else None)
    if not is_first:
        return
    if settings.test:
        _test(settings, model, processor, data["test"])
    if settings.export_peft:
        export_peft(user_path(settings.export_peft), load_adapter(settings.adapter_path))
        say(f"Written for PEFT: {settings.export_peft}")
    if settings.trains:
        typer.echo(settings.adapter_path)
        say(f"Next: mlx-dg generate --model {shlex.quote(source)} --adapter {shlex.quote(settings.adapter_path)} …")


def read_data(settings: Settings, checkpoint: Checkpoint) -> Data:
    """Read all examples, and say how many there are. Raises TrainingError."""
    processor = Processor.from_directory(checkpoint.directory, checkpoint.config)
    options, folder = settings.options, settings.data or ""
    required = ["train"] * settings.trains + ["test"] * settings.test
    data = read_folder(folder, processor, options.max_seq_length, required)
    if settings.mix:
        others = read_folder(settings.mix, processor, options.max_seq_length)["train"]
        known = len(data["train"])
        data["train"] = mix_records(data["train"], others, settings.mix_share, options.seed)
        say(f"Mixed in: {len(data['train']) - known:,} of {settings.mix}")
    if settings.trains and not data["valid"]:
        for name, value in (("--generate", options.generate), ("--patience", options.patience)):
            if value:
                raise TrainingError(f"{name} is about examples of {folder}/valid.jsonl, which is not there.")
    examples = [example for record in data["train"] for example in record.examples]
    cut = sum(not example.whole for example in examples)
    counts = ", ".join(f"{len(records):,} in {name}.jsonl" for name, records in data.items() if records)
    say(f"Examples: {counts}")
    if cut:
        notice(f"{cut:,} of {len(examples):,} replies are cut at {options.max_seq_length} tokens and teach no ending.")
    return data


def longest(data: Data, canvas: int) -> int:
    """The most tokens of an example to learn: its prompt, and its reply in whole canvases."""
    examples = [example for records in data.values() for record in records for example in record.examples]
    return max(len(example.prompt) + -(-len(example.reply) // canvas) * canvas for example in examples)


def _train(settings: Settings, model: DiffusionGemma, processor: Processor, data: Data, places: Places | None) -> None:
    """Train, saying how it goes and reporting to `places`, or silently for None. Raises typer.Exit(130) where it was
    interrupted.
    """
    directory, options = user_path(settings.adapter_path), settings.options
    initial = None
    if settings.resume_adapter_file:
        initial = read_arrays(user_path(settings.resume_adapter_file))
    with (
        Reporter(places or Places((), ()), settings.project_name, directory, asdict(settings)) as write,
        Narrator(options.iters) as narrate,
        _cancelled_by_interruption() as cancel,
    ):

        def tell(report: Report) -> None:
            if places is not None:
                narrate(report)
                write(report)

        result = train(
            model,
            processor,
            data["train"],
            options,
            adapter_path=directory,
            valid=data["valid"],
            resume=settings.resume,
            initial=initial,
            on_report=tell,
            cancel=cancel,
        )
    ended = _ended(result, directory)
    if places is not None:
        say(ended)
    if result.finish_reason == "cancelled":
        raise typer.Exit(130)


def _ended(result: TrainingResult, directory: Path) -> str:
    if result.finish_reason == "cancelled":
        return (
            f"Interrupted after iteration {result.iterations}, which is saved in {directory}; the same command with "
            "--resume goes on from there"
        )
    why = " without further progress" if result.finish_reason == "patience" else ""
    text = f"Ended after {result.iterations} iterations{why}; the adapter is in {directory}"
    if result.best is None:
        return text
    return f"{text}, and the one with the lowest validation loss, {result.best:.3f}, in {directory / BEST}"


def _test(settings: Settings, model: DiffusionGemma, processor: Processor, records: Sequence[Record]) -> None:
    """Measure the model on the test data: as it was just trained, else with the adapter of an earlier run."""
    options = replace(settings.options, val_batches=settings.test_batches)
    if not settings.trains:
        adapter = load_adapter(settings.adapter_path)
        prepare(model, replace(options, adapter=adapter.config))
        use_arrays(model, adapter.arrays)
    measured, score = evaluate(model, processor, records, options)
    typer.echo(f"test {losses(measured)}" + (f"; {scored(score)}" if score else ""))


@contextmanager
def _cancelled_by_interruption() -> Iterator[threading.Event]:
    """Let the first Ctrl-C set an event, so that training ends after an update, saved; a second one ends it at once."""
    cancel = threading.Event()

    def end(number: int, frame: object) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()
        notice("ending after this update; Ctrl-C again ends at once.")

    before = signal.signal(signal.SIGINT, end)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)
