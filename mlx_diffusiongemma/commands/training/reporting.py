"""Reports of a training run while it goes: lines for people, and figures for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from ...errors import TrainingError
from ...paths import user_path
from ...training.scoring import Score
from ...training.trainer import Losses, Report, SaveReport, TrainReport, UpdateReport, ValidationReport
from ..common import notice, say

SERVICES = ("wandb", "swanlab")


class Narrator:
    """Says on stderr what a run reports: losses by part, the rate, the speed and the time that is left. As a context,
    it also counts updates on a line of its own, where stderr is a terminal.

    iters: updates of the whole run.
    """

    def __init__(self, iters: int) -> None:
        self._iters = iters
        self._updates, self._seconds = 0, 0.0
        console = Console(stderr=True)
        columns = ("training", MofNCompleteColumn(), TimeRemainingColumn(), BarColumn(20))
        self._line = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._line.add_task("training", total=iters)

    def __enter__(self) -> Self:
        self._line.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._line.stop()

    def __call__(self, report: Report) -> None:
        match report:
            case UpdateReport():
                self._line.update(self._task, completed=report.iteration)
            case TrainReport():
                say(self._trained(report))
            case ValidationReport():
                say(_validated(report))
            case SaveReport():
                say(f"saved at iteration {report.iteration} in {report.directory}")

    def _trained(self, report: TrainReport) -> str:
        self._updates += report.updates
        self._seconds += report.seconds
        left = (self._iters - report.iteration) * self._seconds / self._updates
        parts = [
            f"iteration {report.iteration}/{self._iters}: {losses(report.losses)}",
            f"rate {report.learning_rate:.2e}",
            f"{report.updates / report.seconds:.3g} it/s",
            f"{report.losses.tokens / report.seconds:,.0f} tokens/s",
            f"peak {size(report.peak_memory)}",
            f"{duration(left)} left",
        ]
        return ", ".join(parts)


def _validated(report: ValidationReport) -> str:
    text = f"iteration {report.iteration}: validation {losses(report.losses)}"
    if report.is_best:
        text += ", the lowest so far"
    return text if report.score is None else f"{text}; {scored(report.score)}"


def losses(measured: Losses) -> str:
    """Write a loss and its parts, in nats per token."""
    return f"loss {measured.total:.3f} (denoising {measured.denoising:.3f}, next token {measured.next_token:.3f})"


def scored(score: Score) -> str:
    """Write how many replies were as expected, and at what cost."""
    return f"{score.right:.1%} of {score.count} replies as expected, {score.steps:.2f} steps per canvas"


def size(count: int) -> str:
    """Write bytes in the unit that suits them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Write a time in the two units that matter: 40 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def figures(report: Report, trained_tokens: int = 0) -> dict[str, Any] | None:
    """Name a report's figures as mlx-lm's callbacks have them, beside those that are of this model alone.

    Memory is in GB. trained_tokens: since the command began. None where there is nothing to plot.
    """
    match report:
        case TrainReport():
            return {
                "iteration": report.iteration,
                "train_loss": report.losses.total,
                "train_denoising_loss": report.losses.denoising,
                "train_next_token_loss": report.losses.next_token,
                "learning_rate": report.learning_rate,
                "iterations_per_second": report.updates / report.seconds,
                "tokens_per_second": report.losses.tokens / report.seconds,
                "trained_tokens": trained_tokens,
                "peak_memory": report.peak_memory / 1e9,
            }
        case ValidationReport():
            measured = {
                "iteration": report.iteration,
                "val_loss": report.losses.total,
                "val_denoising_loss": report.losses.denoising,
                "val_next_token_loss": report.losses.next_token,
            }
            if report.score is not None:
                measured |= {"val_right": report.score.right, "val_steps_per_canvas": report.score.steps}
            return measured
    return None


@dataclass(frozen=True)
class Places:
    """Where figures go: files of JSON Lines, and services that mlx-lm knows."""

    files: tuple[str, ...]
    services: tuple[str, ...]

    @classmethod
    def named(cls, report_to: str) -> Places:
        """Read `--report-to`: services and paths, comma-separated. Raises TrainingError."""
        names = [name.strip() for name in report_to.split(",") if name.strip()]
        services = tuple(name for name in names if name in SERVICES)
        files = tuple(name for name in names if name not in SERVICES)
        for name in files:
            if not name.endswith((".jsonl", ".json")):
                raise TrainingError(
                    f"Nothing can be reported to {name!r}; give {', '.join(SERVICES)} or a .jsonl file."
                )
        return cls(files, services)


class Reporter:
    """Writes figures to `places` as they come, a line of JSON each; as a context, it closes its files.

    As a run goes on, the files do: lines are added. project, directory, settings: what services are told of the run.
    Raises TrainingError.
    """

    def __init__(self, places: Places, project: str | None, directory: Path, settings: Mapping[str, Any]) -> None:
        self._open = ExitStack()
        self._tokens = 0
        try:
            self._files: dict[str, BinaryIO] = {
                name: self._open.enter_context(user_path(name).open("ab", buffering=0)) for name in places.files
            }
        except OSError as error:
            self._open.close()
            raise TrainingError(f"{error.filename} cannot be written ({error.strerror}); report elsewhere.") from None
        self._service = _service(places.services, project, directory, settings) if places.services else None

    def __enter__(self) -> Callable[[Report], None]:
        return self._report

    def __exit__(self, *raised: object) -> None:
        self._open.close()

    def _report(self, report: Report) -> None:
        if isinstance(report, TrainReport):
            self._tokens += report.losses.tokens
        named = figures(report, self._tokens)
        if named is None:
            return
        for name, file in list(self._files.items()):
            try:
                file.write(json.dumps(named).encode() + b"\n")
            except OSError as error:  # which is no reason to lose what was learned
                notice(f"{name} cannot be written ({error.strerror}); nothing more is reported to it.")
                del self._files[name]
        if self._service and isinstance(report, TrainReport):
            self._service.on_train_loss_report(named)
        elif self._service:
            self._service.on_val_loss_report(named)


def _service(services: Sequence[str], project: str | None, directory: Path, settings: Mapping[str, Any]) -> Any:
    """Begin a run at `services` with mlx-lm's callbacks. Raises TrainingError where one is not installed."""
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    directory.mkdir(parents=True, exist_ok=True)
    config: Any = dict(settings)
    try:
        return get_reporting_callbacks(",".join(services), project or Path.cwd().name, str(directory), config)
    except ImportError as error:
        raise TrainingError(f"Nothing can be reported to {', '.join(services)} ({error}).") from None
