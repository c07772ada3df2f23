"""The decoder of replies that follow a grammar: a causal pass chooses every token among those that may come next.

What the grammar leaves no choice about is not chosen but appended, with the token before it, in one pass. Between such
passes a canvas may draft the rest of the reply at once: what the grammar fixes along its tokens is pinned, and the pass
that reads the draft chooses at every place where there is a choice. As long as it chooses what was drafted, the next
choice holds as well. So the text is the same however good the drafts are, and whether there are any: without them, this
is the autoregressive decoder, and with them the speculative one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from ...events import Event
from .. import sampling
from ..writer import cut_at_end
from .drafting import POSITIONS, Drafting, Round, Row, Shown
from .grammar import Guide, allows, masked
from .plans import FixedPlan, Plan
from .tokens import REMEMBERED, TOKEN, choose_tokens, penalized, token_keys

if TYPE_CHECKING:
    from ...model.diffusion_gemma import DiffusionGemma
    from ...options import Settings
    from ..writer import Writer

CORRECTED = 8  # drafted tokens of a step that may be replaced by the likeliest one that the grammar allows: a read each


class Guided(Drafting["_Row"]):
    """Replies that follow grammars. plan: as for `Drafting`, but None is no drafts for the autoregressive decoder."""

    def __init__(self, model: DiffusionGemma, options: Settings, plan: Plan | None = None) -> None:
        undrafted = FixedPlan(1, 0) if options.decoder == "autoregressive" else None
        super().__init__(model, options, plan or undrafted)

    def add(self, writer: Writer) -> Iterator[Event]:
        hidden = yield from writer.read_whole_prompt()
        if hidden is None:
            return
        row = _Row(writer, self.plan.start())
        if not row.guide.fork().forced():
            place = _Place(row, [], _Choice(-1, None, None))
            row.first = _choose(self.model, self.options, hidden[:, 0], [place])
        self.start([row])

    def _round(self, rows: list[_Row], length: int, steps: int) -> _Round:
        return _Round(self.model, self.options, rows, length, steps)


class _Choice(NamedTuple):
    """A place where the grammar leaves a choice: behind token number `after` of what a pass reads.

    mask: what may come there; None where the row's own guide is there and can say so later. drafted: what the draft has
    there, where it goes on.
    """

    after: int
    mask: np.ndarray | None
    drafted: int | None


class _Path(NamedTuple):
    """A draft as the grammar has it: its tokens, the known ones first, and its choices, of which at most the last has
    nothing drafted. fixed: the places of what the grammar forced or corrected.
    """

    tokens: list[int]
    choices: list[_Choice]
    fixed: list[int]


class _Row(Row):
    """One reply: where it is in its grammar, its `known` tokens that the cache does not hold yet, and a plan."""

    def __init__(self, writer: Writer, plan: Plan) -> None:
        super().__init__(writer, plan)
        assert writer.request.grammar is not None
        self.guide = Guide(writer.request.grammar.matcher())
        self.known: list[int] = []
        self.first: list[int] = []  # the reply's first token, where the grammar leaves a choice

    def begin(self) -> list[Event]:
        return self._advance(self.first)

    def _advance(self, tokens: list[int], steps: int = 0) -> list[Event]:
        """Take in tokens that became certain after so many denoising steps, and what the grammar adds to them."""
        writer, ends = self.writer, self.writer.options.end_tokens
        text, ended = cut_at_end(tokens, ends)
        self.guide.take(text)
        self.known = text[-1:]
        if not ended:
            forced = self.guide.forced()
            text, self.known, ended = text + forced, self.known + forced, self.guide.ended
        limit = writer.model.config.text.max_position_embeddings
        left = limit - len(writer.request.prompt.tokens) - len(writer.tokens)
        last = len(text) > left or (len(text) == left and not ended)
        given = text[:left] if last else text + list(ends[:1]) * ended
        return self._take(given, steps, last=last)

    def next_shape(self) -> tuple[int, int]:
        length, steps = self.plan.shape()
        known, longest = len(self.known), self.writer.model.config.canvas_length
        length = min(known + min(length - 1, self.writer.room), longest, self.writer.context)
        return (length, steps) if steps and length > known else (known, 0)

    def walk(self, best: list[int], correct: Callable[[int, np.ndarray], int]) -> _Path:
        """Follow the grammar along the tokens `best` of a canvas, which begins with those known.

        correct: finds the likeliest token at a place of those that a mask allows.
        """
        guide, tokens, ends = self.guide.fork(), self.known[:], self.writer.options.end_tokens
        choices: list[_Choice] = []
        fixed: list[int] = []
        corrections = CORRECTED
        while len(tokens) < len(best):
            place, mask = len(tokens), guide.mask()
            token = best[place]
            if not allows(mask, token):
                if not corrections:
                    choices.append(_Choice(place - 1, mask, None))
                    break
                corrections -= 1
                token = correct(place, mask)
                fixed += [place] * (token not in ends)
            choices.append(_Choice(place - 1, mask, token))
            if token in ends:
                break
            tokens.append(token)
            guide.take([token])
            forced = guide.forced()
            fixed += range(len(tokens), len(tokens) + len(forced))
            tokens += forced
            if guide.ended or len(tokens) > len(best):
                break
        else:
            choices.append(_Choice(len(tokens) - 1, guide.mask(), None))
        return _Path(tokens, choices, [place for place in fixed if place < len(best)])

    def undrafted(self) -> _Path:
        """The known tokens, and the choice of the one after them."""
        return _Path(self.known, [_Choice(len(self.known) - 1, None, None)], [])

    def take(self, path: _Path, chosen: list[int], read: int, steps: int) -> list[Event]:
        """Take in what a pass over `read` tokens chose at the path's places, up to where it is not what was drafted."""
        drafted = [choice.drafted for choice in path.choices if choice.drafted is not None]
        kept = 0
        while kept < len(drafted) and chosen[kept] == drafted[kept]:
            kept += 1
        last = min(kept, len(path.choices) - 1)
        held = path.choices[last].after + 1
        known, cache = len(self.known), self.writer.cache
        cache.trim(read - held)
        cache.labels += path.tokens[:held]
        self.plan.learn(len(drafted), kept)
        self.writer.count(steps=steps or None, passes=1)
        return self._advance([*path.tokens[known:held], chosen[last]], steps)


class _Round(Round[_Row]):
    """A round of some replies, whose draft follows their grammars."""

    def __init__(self, model: DiffusionGemma, options: Settings, rows: list[_Row], length: int, steps: int) -> None:
        super().__init__(model, options, rows, length, steps)
        self._paths = [row.undrafted() for row in rows]
        self._canvas = self._soft = mx.zeros((0,))
        if steps:
            self._canvas = self._pinned(self._noise(0))

    def _keep(self, staying: list[int]) -> None:
        self._paths = [self._paths[number] for number in staying]
        if self.steps:
            self._canvas = self._canvas[mx.array(staying)]
            self._soft = self._soft[mx.array(staying)] if self._taken else self._soft

    def _denoised(self) -> list[Shown]:
        """Take a step, and pin what the grammar fixes."""
        number = self._taken + 1
        hidden, reading = self._reading(self._canvas, self._soft)
        accepted = sampling.accept(reading.entropy, self.options.entropy_bound)
        self._cache.settle()
        mx.eval(hidden, reading.tokens, accepted, reading.entropy, reading.soft_embedding)
        best: list[list[int]] = np.array(reading.tokens).tolist()
        self._paths = [
            row.walk(own, self._corrector(hidden[n])) for n, (row, own) in enumerate(zip(self.rows, best, strict=True))
        ]
        if reading.sample is not None and reading.soft_embedding is not None:
            self._canvas = self._pinned(mx.where(accepted, reading.sample, self._noise(number)))
            is_pinned = mx.array(self._pins() >= 0)[..., None]
            self._soft = mx.where(is_pinned, self.model.embed(self._canvas), reading.soft_embedding)
            mx.eval(self._canvas, self._soft)
        columns = zip(self.rows, self._paths, best, np.array(accepted), np.array(reading.entropy), strict=True)
        return [
            Shown(
                number,
                self.steps + 1,
                [*path.tokens, *own[len(path.tokens) :]][len(row.known) : self.length],
                *(column[len(row.known) :].tolist() for column in (is_accepted, entropy)),
            )
            for row, path, own, is_accepted, entropy in columns
        ]

    def _corrector(self, hidden: mx.array) -> Callable[[int, np.ndarray], int]:
        """What finds the likeliest token that a mask allows at a place of hidden [L, H]."""

        def correct(place: int, mask: np.ndarray) -> int:
            logits = self.model.logits(hidden[None, place : place + 1])[0]
            return int(np.array(masked(logits, [mask]).argmax()))

        return correct

    def _read(self) -> list[list[Event]]:
        chosen, read = self._chosen()
        rows = zip(self.rows, self._paths, chosen, strict=True)
        return [row.take(path, own, read, self.steps) for row, path, own in rows]

    def _chosen(self) -> tuple[list[list[int]], int]:
        """What a causal pass chooses at every place of each row's path, and how many tokens the pass read."""
        ends = [path.choices[-1].after + 1 for path in self._paths]
        read = max(ends)
        # Those behind a row's own are read for nothing, and trimmed off.
        tokens = [[*path.tokens[:end], *[0] * (read - end)] for path, end in zip(self._paths, ends, strict=True)]
        hidden = self.model.encode_lazily(mx.array(tokens), self._cache)
        mx.async_eval(hidden)
        where = [(n, choice.after) for n, path in enumerate(self._paths) for choice in path.choices]
        places = [
            _Place(row, path.tokens, choice)
            for row, path in zip(self.rows, self._paths, strict=True)
            for choice in path.choices
        ]
        rows, columns = zip(*where, strict=True)
        found = iter(_choose(self.model, self.options, hidden[mx.array(rows), mx.array(columns)], places))
        return [[next(found) for _ in path.choices] for path in self._paths], read

    def _pinned(self, canvas: mx.array) -> mx.array:
        """The canvas [B, L] with the known tokens, and those that the grammar fixes, at their places."""
        pins = mx.array(self._pins())
        return mx.where(pins < 0, canvas, pins)

    def _pins(self) -> np.ndarray:
        """The tokens that are known or fixed, [B, L]; -1 where the canvas is free."""
        pins = np.full((len(self.rows), self.length), -1, np.int32)
        for own, row, path in zip(pins, self.rows, self._paths, strict=True):
            own[: len(row.known)] = row.known
            own[path.fixed] = [path.tokens[place] for place in path.fixed]
        return pins


class _Place(NamedTuple):
    """A choice of a row, behind the tokens that a pass reads."""

    row: _Row
    tokens: list[int]
    choice: _Choice

    @property
    def number(self) -> int:
        """The place in the reply of the token to choose."""
        return len(self.row.writer.tokens) - len(self.row.known) + self.choice.after + 1

    @property
    def before(self) -> list[int]:
        """The tokens before it that a penalty looks at."""
        writer, read = self.row.writer, self.tokens[: self.choice.after + 1]
        earlier = writer.tokens[: len(writer.tokens) - len(self.row.known)]
        return [*writer.request.prompt.tokens[-REMEMBERED:], *earlier[-REMEMBERED:], *read][-REMEMBERED:]


def _choose(model: DiffusionGemma, options: Settings, hidden: mx.array, places: Sequence[_Place]) -> list[int]:
    """Choose a token at each place, after hidden [N, H]: the masks are asked for while the device computes those."""
    masks = [place.row.guide.mask() if place.choice.mask is None else place.choice.mask for place in places]
    keys = token_keys([place.row.writer.options.seed for place in places], [place.number for place in places], TOKEN)
    found: list[int] = []
    for start in range(0, len(places), POSITIONS):
        part = slice(start, start + POSITIONS)
        windows = (mx.array(place.before) for place in places[part])
        logits = penalized(model.logits(hidden[None, part])[0], options, windows)
        found += np.array(choose_tokens(masked(logits, masks[part]), options, keys[part])).tolist()
    return found
