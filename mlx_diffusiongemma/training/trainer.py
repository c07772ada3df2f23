"""The training loop: from conversations to an adapter."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ..checkpoints.adapter_files import save_adapter
from ..errors import TrainingError
from ..model.adapters import TRAINED, Adapter, put_in, take_out, use_arrays
from .draws import Batch, Drawn, draw
from .loss import diffusion_loss
from .options import ADAMW, TrainingOptions
from .scoring import Score, score
from .state import Progress, State, read_state, save_state

if TYPE_CHECKING:
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor
    from .data import Record

BEST = "best"  # the folder inside the adapter's that keeps the one with the lowest validation loss
# What a generator draws, beside the run's seed: the order of an epoch, an update's replies, validation's.
ORDER, UPDATE, VALIDATION = range(3)


@dataclass(frozen=True)
class Losses:
    """Mean losses in nats per token, and the number of tokens that they are of."""

    denoising: float
    next_token: float
    tokens: int

    @property
    def total(self) -> float:
        return self.denoising + self.next_token


@dataclass(frozen=True)
class UpdateReport:
    """One more update is done. iteration: how many are now."""

    iteration: int


@dataclass(frozen=True)
class TrainReport:
    """Losses over the last updates. iteration: updates done. seconds: they took. peak_memory: bytes."""

    iteration: int
    losses: Losses
    learning_rate: float
    updates: int
    seconds: float
    peak_memory: int


@dataclass(frozen=True)
class ValidationReport:
    """Losses on fixed draws of the validation data, and what generating gave, if it was asked for."""

    iteration: int
    losses: Losses
    score: Score | None
    is_best: bool


@dataclass(frozen=True)
class SaveReport:
    """The adapter and the run's state are on disk."""

    iteration: int
    directory: Path


Report = UpdateReport | TrainReport | ValidationReport | SaveReport


@dataclass(frozen=True)
class TrainingResult:
    """The end of a run. finish_reason: "done", "patience" or "cancelled". best: the lowest validation loss."""

    finish_reason: str
    iterations: int
    best: float | None


def train(
    model: DiffusionGemma,
    processor: Processor,
    records: Sequence[Record],
    options: TrainingOptions | None = None,
    *,
    adapter_path: str | Path = "adapters",
    valid: Sequence[Record] = (),
    resume: bool = False,
    initial: Mapping[str, mx.array] | None = None,
    on_report: Callable[[Report], object] = lambda report: None,
    cancel: threading.Event | None = None,
) -> TrainingResult:
    """Train an adapter, or the model itself, on conversations, and leave the model with it.

    records, valid: see `read_folder`. adapter_path: the folder for the adapter, its best state in `best/`, and what
    `resume` goes on from. initial: arrays of an adapter of the same shape to begin with. cancel: ends the run within
    one update, saved. Under `mlx.launch`, each machine computes its share of every update. Raises TrainingError, with
    the last good adapter on disk, where a loss is not a number.
    """
    run = _Run(model, processor, list(records), list(valid), options or TrainingOptions(), Path(adapter_path))
    run.begin(resume, initial)
    return run.go_on(on_report, cancel or threading.Event())


class _Run:
    """One run on one machine of `group`."""

    def __init__(
        self,
        model: DiffusionGemma,
        processor: Processor,
        records: list[Record],
        valid: list[Record],
        options: TrainingOptions,
        directory: Path,
    ):
        self.model, self.processor, self.options = model, processor, options
        self.records, self.valid, self.directory = records, valid if options.val_batches else [], directory
        if not records:
            raise TrainingError("There is nothing to train on; give at least one conversation.")
        self.group = mx.distributed.init()
        if self.group.size() > options.update_size:
            raise TrainingError(
                f"The {options.update_size} replies of an update are too few for {self.group.size()} machines; raise "
                "grad_accumulation_steps."
            )
        self.optimizer = _optimizer(options)
        self.progress = Progress()
        self.loss_and_gradient = nn.value_and_grad(model, self._loss)

    def begin(self, resume: bool, initial: Mapping[str, mx.array] | None = None) -> None:
        """Make the model trainable, and take up what an earlier run left."""
        prepare(self.model, self.options)
        if initial is not None:
            use_arrays(self.model, self._parameters(), initial)
        self.optimizer.init(self.model.trainable_parameters())
        if resume:
            state = read_state(self.directory, self._settings())
            self.model.load_weights(list(state.parameters.items()), strict=False)
            self.optimizer.state = tree_map_with_path(lambda name, _: state.optimizer[name], self.optimizer.state)
            self.progress = state.progress
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)

    def go_on(self, on_report: Callable[[Report], object], cancel: threading.Event) -> TrainingResult:
        """Update until the run is over."""
        options, since, sums = self.options, time.perf_counter(), _Sums()
        mx.reset_peak_memory()
        if self.valid and not self.progress.done:
            on_report(self._validate())
        finish = "done"
        while self.progress.done < options.iters:
            if self._is_cancelled(cancel):
                finish = "cancelled"
                break
            try:
                sums.add(self._update())
            except TrainingError:
                self._save()
                raise
            self.progress = replace(self.progress, done=self.progress.done + 1)
            done, is_last = self.progress.done, self.progress.done == options.iters
            on_report(UpdateReport(done))
            if done % options.steps_per_report == 0 or is_last:
                now = time.perf_counter()
                rate = _number(self.optimizer.learning_rate)
                losses = sums.mean(self.group)
                on_report(TrainReport(done, losses, rate, sums.updates, now - since, mx.get_peak_memory()))
                since, sums = now, _Sums()
            if self.valid and (done % options.steps_per_eval == 0 or is_last):
                began = time.perf_counter()
                on_report(self._validate())
                since += time.perf_counter() - began
                if options.patience and self.progress.stale >= options.patience:
                    finish = "patience"
                    break
            if done % options.save_every == 0 and not is_last:
                on_report(self._save())
        on_report(self._save())
        return TrainingResult(finish, self.progress.done, self.progress.best)

    def _is_cancelled(self, cancel: threading.Event) -> bool:
        """Whether any machine is to end: all end after the same update."""
        if self.group.size() == 1:
            return cancel.is_set()
        return _number(mx.distributed.all_sum(mx.array(float(cancel.is_set())), group=self.group)) > 0

    def _loss(self, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        denoising, next_token = diffusion_loss(self.model, batch, checkpoint=self.options.grad_checkpoint)
        return denoising + next_token, denoising, next_token

    def _update(self) -> list[tuple[Losses, float]]:
        """Learn from the next replies; the losses of each batch, and its share."""
        drawn = self._drawn(self.progress.done)
        # Replies of like lengths share a batch, which is as long as its longest.
        own = sorted(drawn, key=lambda one: len(one[1].tokens))[self.group.rank() :: self.group.size()]
        losses: list[tuple[Losses, float]] = []
        wrong: list[tuple[Record, Drawn]] = []
        gradients: Any = None
        for start in range(0, len(own), self.options.batch_size):
            part = own[start : start + self.options.batch_size]
            share = len(part) / len(drawn)
            batch = Batch.of([one for _, one in part], mask_prompt=self.options.mask_prompt)
            (_, denoising, next_token), gradient = self.loss_and_gradient(batch)
            weighted = tree_map(lambda array, share=share: array * share * self.group.size(), gradient)
            gradients = weighted if gradients is None else tree_map(mx.add, gradients, weighted)
            mx.eval(gradients, denoising, next_token)
            measured = Losses(_number(denoising), _number(next_token), sum(len(one.tokens) for _, one in part))
            wrong += [] if math.isfinite(measured.total) else part
            losses.append((measured, share))
        gradients = nn.utils.average_gradients(gradients, self.group)
        gradients, norm = mlx.optimizers.clip_grad_norm(gradients, self.options.clip)
        if not math.isfinite(_number(norm)):  # which every machine sees
            what = "loss" if wrong else "gradient"
            raise TrainingError(f"The {what} is not a number {_at(wrong or drawn)}; the adapter is as it was before.")
        self.optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        return losses

    def _drawn(self, update: int) -> list[tuple[Record, Drawn]]:
        """The replies of one update, which all machines draw alike."""
        size, count = self.options.update_size, len(self.records)
        drawn: list[tuple[Record, Drawn]] = []
        for index in range(update * size, (update + 1) * size):
            order = np.random.default_rng([self.options.seed, ORDER, index // count]).permutation(count)
            record = self.records[order[index % count]]
            drawn.append((record, _draw(self.model, self.options, record, [UPDATE, index])))
        return drawn

    def _validate(self) -> ValidationReport:
        losses, answered = evaluate(self.model, self.processor, self.valid, self.options)
        self.progress = self.progress.after(losses.total)
        if is_best := self.progress.stale == 0:
            self._write(self.directory / BEST)
        return ValidationReport(self.progress.done, losses, answered, is_best)

    def _save(self) -> SaveReport:
        """Write the state, which is what a run resumes from, and then the adapter."""
        if self.group.rank() == 0:
            flat: Any = tree_flatten(self.optimizer.state)
            save_state(self.directory, State(self.progress, self._parameters(), dict(flat)), self._settings())
        self._write(self.directory)
        return SaveReport(self.progress.done, self.directory)

    def _write(self, directory: Path) -> None:
        if self.group.rank() == 0:
            save_adapter(directory, Adapter(self.options.adapter, self._parameters()))

    def _parameters(self) -> dict[str, mx.array]:
        flat: Any = tree_flatten(self.model.trainable_parameters())
        return dict(flat)

    def _settings(self) -> str:
        """What a run may not change when it goes on: all but how long it is and what it says."""
        free = {"iters", "steps_per_report", "save_every", "patience", "generate"}
        settings = {name: value for name, value in asdict(self.options).items() if name not in free}
        data = hashlib.sha256(repr([record.examples for record in self.records]).encode()).hexdigest()
        return json.dumps([settings, data], sort_keys=True, default=list)


class _Sums:
    """Losses of several updates."""

    def __init__(self) -> None:
        self.updates, self.denoising, self.next_token, self.share, self.tokens = 0, 0.0, 0.0, 0.0, 0

    def add(self, parts: Sequence[tuple[Losses, float]]) -> None:
        """Add the batches of an update, each with its share of it."""
        self.updates += 1
        for losses, share in parts:
            self.denoising += losses.denoising * share
            self.next_token += losses.next_token * share
            self.share += share
            self.tokens += losses.tokens

    def mean(self, group: mx.distributed.Group | None = None) -> Losses:
        """The mean over all batches; group: of all its machines, which ask at the same time."""
        sums = [self.denoising, self.next_token, self.share, float(self.tokens)]
        if group is not None and group.size() > 1:
            sums = mx.distributed.all_sum(mx.array(sums), group=group).tolist()  # type: ignore[assignment]
        denoising, next_token, share, tokens = sums
        return Losses(denoising / share, next_token / share, round(tokens))


def evaluate(
    model: DiffusionGemma, processor: Processor, records: Sequence[Record], options: TrainingOptions
) -> tuple[Losses, Score | None]:
    """Measure the losses on `val_batches` of the records, with the same draws every time, and the score that
    `generate` of them get, None for 0.
    """
    sums = _Sums()
    most = len(records) if options.val_batches < 0 else options.val_batches * options.batch_size
    drawn = [_draw(model, options, record, [VALIDATION, index]) for index, record in enumerate(records[:most])]
    for start in range(0, len(drawn), options.batch_size):
        part = drawn[start : start + options.batch_size]
        denoising, next_token = diffusion_loss(model, Batch.of(part, mask_prompt=options.mask_prompt))
        mx.eval(denoising, next_token)
        tokens = sum(len(one.tokens) for one in part)
        sums.add([(Losses(_number(denoising), _number(next_token), tokens), len(part) / len(drawn))])
    return sums.mean(), score(model, processor, records[: options.generate]) if options.generate else None


def _draw(model: DiffusionGemma, options: TrainingOptions, record: Record, place: list[int]) -> Drawn:
    """Draw one of a record's replies and its noise; place: which draw of the run it is."""
    random = np.random.default_rng([options.seed, *place])
    example = record.examples[int(random.integers(len(record.examples)))]
    return draw(example, model.config.canvas_length, model.config.text.vocab_size, random)


def prepare(model: DiffusionGemma, options: TrainingOptions) -> None:
    """Put a fresh adapter into a model and make it alone trainable; or all of the model, in float32. Raises
    AdapterError, and TrainingError where weights to be trained are quantized.
    """
    take_out(model)
    model.freeze()
    if options.adapter.fine_tune_type != "full":
        put_in(model, options.adapter, options.seed)
        model.unfreeze(keys=list(TRAINED))
        return
    if any("scales" in layer for layer in model.modules()):
        raise TrainingError("A quantized model cannot be trained in full; train an adapter, or convert it without -q.")
    model.unfuse()
    model.set_dtype(mx.float32)
    model.unfreeze()


def _optimizer(options: TrainingOptions) -> mlx.optimizers.Optimizer:
    """The optimizer and its schedule."""
    kinds: dict[str, Callable[..., mlx.optimizers.Optimizer]] = {
        "adam": mlx.optimizers.Adam,
        "adamw": mlx.optimizers.AdamW,
        "muon": mlx.optimizers.Muon,
        "sgd": mlx.optimizers.SGD,
        "adafactor": mlx.optimizers.Adafactor,
    }
    settings = options.optimizer_config
    if settings is None:
        settings = ADAMW if options.optimizer == "adamw" else {}
    try:
        return kinds[options.optimizer](learning_rate=_schedule(options), **settings)
    except TypeError as error:
        raise TrainingError(f"optimizer_config does not fit {options.optimizer} ({error}).") from None


def _schedule(options: TrainingOptions) -> Any:
    from mlx_lm.tuner.utils import build_schedule

    if options.lr_schedule is not None:
        return build_schedule(dict(options.lr_schedule))
    rate, warmup = options.learning_rate, min(options.warmup, options.iters - 1)
    rest = max(options.iters - warmup, 1)
    return build_schedule(
        {"name": "cosine_decay", "arguments": [rate, rest, rate * options.final_rate], "warmup": warmup}
    )


def _number(array: Any) -> float:
    return float(array.item())


def _at(drawn: Sequence[tuple[Record, Drawn]]) -> str:
    lines = ", ".join(str(record.line) for record, _ in drawn)
    return f"at line {lines} of the data" if len(drawn) == 1 else f"at one of the lines {lines} of the data"
