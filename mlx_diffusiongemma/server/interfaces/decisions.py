"""Decisions, as Inception's clients ask for them: how probable each answer to a question is; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from ...events import Done, Event, Result, Stats
from ...filling.choosing import choose
from ...processing.processor import Prompt
from ..answering import result_of
from ..fields import caller_of
from ..service import Service
from ..work.waiting import Item, Job, Turn

MOST_OPTIONS = 255


class NoulQuestion(BaseModel):
    """A question that is answered with how probable "yes" is. criteria: what `true` and `false` mean."""

    type: Literal["noul"]
    instructions: Any = None
    criteria: dict[Literal["true", "false"], Any] | None = None

    @property
    def options(self) -> dict[str, Any]:
        meant = self.criteria or {}
        return {"yes": meant.get("true"), "no": meant.get("false")}

    def answer(self, probable: dict[str, float]) -> dict[str, Any]:
        return {"type": self.type, "noul": probable["yes"]}


class ChoiceQuestion(BaseModel):
    """A question that is answered with one of the labels in `criteria`, each with what it means or null."""

    type: Literal["choice"]
    instructions: Any = None
    criteria: dict[str, Any] = Field(min_length=1, max_length=MOST_OPTIONS)

    @property
    def options(self) -> dict[str, Any]:
        return self.criteria

    def answer(self, probable: dict[str, float]) -> dict[str, Any]:
        best = max(probable, key=probable.__getitem__)
        return {"type": self.type, "choice": best, "confidence": probable[best], "probabilities": probable}


class ScoreQuestion(BaseModel):
    """A question that is answered with a place, from 0, on the scale whose steps `criteria` describes in order.

    The score is the mean of the places; the confidence is how probable the likeliest one is.
    """

    type: Literal["score"]
    instructions: Any = None
    criteria: list[Any] = Field(min_length=1, max_length=MOST_OPTIONS)

    @property
    def options(self) -> dict[str, Any]:
        return {str(place): meaning for place, meaning in enumerate(self.criteria)}

    def answer(self, probable: dict[str, float]) -> dict[str, Any]:
        score = sum(int(place) * share for place, share in probable.items())
        confidence = max(probable.values())
        return {
            "type": self.type,
            "score": score,
            "confidence": confidence,
            "probabilities": probable,
            "legend": self.options,
        }


Question: TypeAlias = Annotated[NoulQuestion | ChoiceQuestion | ScoreQuestion, Field(discriminator="type")]


class DecisionsBody(BaseModel):
    """Questions about a state: a text, or any JSON, with images as parts of chat messages anywhere in it."""

    state: Any
    questions: dict[str, Question] = Field(min_length=1)
    model: str | None = None
    seed: int | None = None


def routes(service: Service) -> APIRouter:
    """Make the routes of this interface."""
    router = APIRouter(tags=["Decisions"])

    @router.post("/v1/decisions")
    async def decisions(request: Request, body: DecisionsBody) -> Response:
        """Answer questions about a state with probabilities."""
        service.check_model(body.model)
        asked = list(body.questions.values())
        prompts = [await service.chat_prompt([_message(body.state, question)]) for question in asked]
        for prompt in prompts:
            service.checked(prompt, service.options.with_decoder("diffusion"))
        job = _decide(prompts, [list(question.options) for question in asked], body.seed, caller_of(request))
        service.engine.submit(job)
        result = await result_of(request, service.engine, job)
        answers = {
            name: question.answer(probable)
            for (name, question), probable in zip(body.questions.items(), result.data, strict=True)
        }
        used = {"input_tokens": result.stats.prompt_tokens, "output_tokens": 0}
        return JSONResponse({"answers": answers, "model": service.name, "usage": used})

    return router


def _decide(prompts: Sequence[Prompt], options: Sequence[list[str]], seed: int | None, caller: str) -> Job:
    """Make the job whose result's `data` are the probabilities of each prompt's options."""

    def work(turn: Turn) -> Generator[Item, None, None]:
        spent = Stats()

        def count(event: Event) -> None:
            nonlocal spent
            if isinstance(event, Done):
                spent = replace(
                    spent,
                    prompt_tokens=spent.prompt_tokens + event.stats.prompt_tokens,
                    cached_tokens=spent.cached_tokens + event.stats.cached_tokens,
                    prompt_seconds=spent.prompt_seconds + event.stats.prompt_seconds,
                    denoise_seconds=spent.denoise_seconds + event.stats.denoise_seconds,
                )

        found: list[dict[str, float]] = []
        for prompt, labels in zip(prompts, options, strict=True):
            if len(labels) == 1:
                found.append({labels[0]: 1.0})
                continue
            found.append(
                choose(
                    turn.model,
                    turn.processor,
                    prompt,
                    labels,
                    seed=seed,
                    cache=turn.cache,
                    cancel=turn.cancel,
                    on_event=count,
                )
            )
            if turn.cancel.is_set():
                return
        yield Result("", stats=spent, data=found)

    return Job(work, prompts[-1], caller, urgent=True)


def _message(state: Any, question: NoulQuestion | ChoiceQuestion | ScoreQuestion) -> dict[str, Any]:
    """Put a question to the model. The state comes first: it is read once for all of its questions."""
    images: list[dict[str, Any]] = []
    options = [
        f"- {label}" if meaning is None else f"- {label}: {_text(meaning, [])}"
        for label, meaning in question.options.items()
    ]
    asked = [_text(part, images) for part in (state, question.instructions) if part is not None]
    text = "\n\n".join([*asked, "Answer with one of these alone:\n" + "\n".join(options)])
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def _text(value: Any, images: list[dict[str, Any]]) -> str:
    """Write any JSON as text. Images in it move to `images`, and leave their number."""
    if isinstance(value, str):
        return value
    return json.dumps(_without_images(value, images), ensure_ascii=False)


def _without_images(value: Any, images: list[dict[str, Any]]) -> Any:
    if isinstance(value, dict) and value.get("type") == "image_url":
        images.append(value)
        return f"image {len(images)}"
    if isinstance(value, dict):
        return {name: _without_images(part, images) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_images(part, images) for part in value]
    return value
