"""One canvas with gaps: denoised open at first, until its steps say where the text belongs, and then around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoints.accounting import rows_after
from ..generation.denoising import Denoising, Job, Step
from ..generation.sampling import Draws
from .denoisers import Allowed, InParts, Restricted
from .places import Evidence, Place, Ranked, Watch
from .window import GappedCanvas, Window

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..options import Settings

DECIDED = 20.0  # nats between the best places and their rivals, from which on they count as known
CLOSE = 10.0  # nats: the same once the canvas has settled, or has had OPEN_STEPS
OPEN_STEPS = 12  # after which rivals are denoised beside the best: a canvas settles about so fast, from left to right
REFUTED = 6.0  # nats by which another token was likelier, from which on a canvas that saw it begins anew
ROWS = 3  # the best and its rivals, where the caller asks for no more


@dataclass(frozen=True)
class Try:
    """A canvas after a step.

    places: those of its texts that are decided, and `layout` what they make of it. seen: all places as they look best,
    None where nothing was to be seen. is_rival: one of several that only their likelihood can tell apart.
    """

    places: tuple[Place, ...]
    layout: GappedCanvas
    seen: Ranked | None = None
    is_rival: bool = False
    step: Step | None = None

    @property
    def evidence(self) -> float:
        return 0.0 if self.seen is None else self.seen.evidence

    @property
    def tokens(self) -> list[int]:
        return self.layout.over(self.layout.canvas.tokens if self.step is None else self.step.tokens)  # type: ignore[arg-type]

    @property
    def entropy(self) -> list[float]:
        return [0.0] * len(self.layout.canvas.tokens) if self.step is None else self.step.entropy


class Settling:
    """Settles what lies on one canvas: the places of its texts, and what fills the gaps between.

    As soon as the evidence sets the best places apart from all others, their texts are pinned and the canvas goes on
    from where it is. What is still undecided after OPEN_STEPS goes on as several rows.

    window: what may lie there. number: the canvas's. tries: rows to denoise in any case; None leaves it to the
    evidence. shown: is told of each step: its number among all, and the likeliest row.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        cache: Cache,
        options: Settings,
        window: Window,
        number: int,
        tries: int | None,
        shown: Callable[[int, Try], None],
    ) -> None:
        self.window, self.number, self.tries, self.shown = window, number, tries, shown
        self.cache, self.options = cache, options
        texts = [text for leg in window.legs for text in (leg.text, *leg.gap.options)]
        self.watch = None if window.is_whole(window.settled()) else Watch(model, texts)
        self.work: dict[Job, Try] = {}
        self.done: list[Try] = []
        self.allowed: dict[Job, Sequence[Allowed]] = {}
        denoiser = InParts(model, rows_after(cache, max(ROWS, tries or 1)))
        reader = Restricted(model, denoiser, self.allowed, self.watch)
        self.run = Denoising(denoiser, options, model.config.text.vocab_size, reader)

    def tried(self) -> list[Try]:
        """Denoise the canvas to its end, in every way that stayed open. Once one is done, others get as many steps
        again: what fits settles early.
        """
        places = self.window.settled()
        first = Try(places, self.window.lay_out(places))
        if all(first.layout.canvas.pinned):
            return [first]
        self.run.add(self._job(first))
        last = self.options.max_steps
        with closing(self.run.steps()) as steps:
            for count, shown in enumerate(steps, 1):
                now = [self._follow(step) for step in shown]
                self.shown(count, max([*now, *self.done], key=lambda each: each.evidence))
                over = [step for step in shown if step.finished and step.job in self.work]
                self.done += [self.work[step.job] for step in over]
                last = min([last, *(2 * step.number for step in over)])
                self.run.drop([job for job in self.run.jobs if self._steps(job) >= last])
        return self.done

    def _steps(self, job: Job) -> int:
        step = self.work[job].step
        return 0 if step is None else step.number

    def _job(self, start: Try, row: int = 0, attempt: int = 0) -> Job:
        job = Job(start.layout.canvas, self.cache, Draws(self.options.seed, row, self.number, attempt))
        self.work[job], self.allowed[job] = start, start.layout.allowed
        return job

    def _follow(self, step: Step) -> Try:
        """Take in a step of a row; where it decides places, other rows go on in its place."""
        now = replace(self.work[step.job], step=step)
        if self.watch is not None and not now.is_rival and not self.window.is_whole(now.places):
            late = step.finished or step.number >= OPEN_STEPS
            ranked = self._ranked(now.places, step, late)
            now = replace(now, seen=ranked[0] if ranked else None)
            rows = self._rows(ranked, late)
            if any(len(places) > len(now.places) for places, _ in rows):
                self._go_on(now, step, rows)
                return now
        self.work[step.job] = now
        return now

    def _ranked(self, places: Sequence[Place], step: Step, late: bool) -> list[Ranked]:
        """All places by their evidence, those that are decided as they are."""
        assert self.watch is not None
        window, options = self.window, self.options
        fits, fillings = [], []
        for number, leg in enumerate(window.legs):
            fit = self.watch.along(step.notes, leg.text, window.earlier, leg.bears)
            if number < len(places):
                fit = _only(fit, places[number].start, len(window.earlier))
            fits.append(fit)
            fillings.append([self.watch.along(step.notes, option, window.earlier) for option in leg.gap.options])
        behind = step.tokens[max(window.start, 0) :]
        ended = late and any(token in options.end_tokens for token in behind)  # a reply that ended goes on nowhere
        wanted = 1 if self.tries is None else self.tries - 1
        return Evidence(window.legs, window.start, window.length, fits, fillings, not ended).rank(wanted)

    def _rows(self, ranked: list[Ranked], late: bool) -> list[tuple[tuple[Place, ...], Ranked]]:
        """The places to go on with: those that all close rivals agree on; late, those of each rival."""
        margin = CLOSE if late else DECIDED
        close = [each for each in ranked if ranked[0].evidence - each.evidence < margin]  # the best among them
        rivals = [each for each in (close if self.tries is None else ranked) if not self._goes_on(each.places)]
        is_open = late and (not close or self._goes_on(close[0].places))
        wanted = ROWS if self.tries is None else self.tries
        if not is_open and wanted > 1 and (late or (self.tries is not None and len(close) == 1)):
            return [(each.places, each) for each in rivals[:wanted]]
        agreed: list[Place] = []
        for same in zip(*(each.places for each in (close[:1] if is_open else close)), strict=False):
            if len(set(same)) > 1 or same[0].start == self.window.length:
                break
            agreed.append(same[0])
        return [(tuple(agreed), ranked[0])] if ranked else []

    def _goes_on(self, places: Sequence[Place]) -> bool:
        """Whether a gap goes on beyond the canvas."""
        return any(stop == self.window.length for _, stop in self.window.spans(places)[: len(self.window.legs)])

    def _go_on(self, now: Try, step: Step, rows: Sequence[tuple[tuple[Place, ...], Ranked]]) -> None:
        """Let rows with these places go on where a row is; from its tokens where it is done already, and from noise
        where it was sure of something else than the texts that are now in place.
        """
        del self.work[step.job]
        jobs: list[Job] = []
        for row, (places, seen) in enumerate(rows):
            layout = self.window.lay_out(places, drafted=len(now.places) + 1)
            follower = replace(now, places=places, layout=layout, seen=seen, is_rival=len(rows) > 1)
            if all(layout.canvas.pinned):
                self.done.append(follower)
            elif self._is_refuted(places, step):
                begun = replace(follower, layout=self.window.lay_out(places), step=None)
                self.run.add(self._job(begun, row, attempt=1))
            elif step.finished:
                begun = replace(follower, layout=layout.beginning_with(step.tokens), step=None)
                self.run.add(self._job(begun, row, attempt=1))
            else:
                jobs.append(self._job(follower, row))
        if jobs:
            self.run.replace(step.job, jobs)
        else:
            self.run.drop([step.job])

    def _is_refuted(self, places: Sequence[Place], step: Step) -> bool:
        """Whether the step was sure of something else than the texts in their places."""
        assert self.watch is not None
        kept = [(leg, place.start) for leg, place in zip(self.window.legs, places, strict=False)]
        return any(
            start is not None and self.watch.against(step.notes, leg.text, start) > REFUTED for leg, start in kept
        )


def _only(fit: np.ndarray, place: int | None, before: int) -> np.ndarray:
    """The evidence for one place, none for all others."""
    only = np.full(len(fit), -np.inf)
    if place is not None:
        only[place + before] = fit[place + before]
    return only
