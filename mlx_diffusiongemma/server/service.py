"""From a request of any interface to a job: its prompt is made and checked before anything is answered."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import PromptError
from ..generation.canvas import Canvas
from ..generation.replying import stream
from ..generation.request import make_request, request_options
from ..options import OF_CAUSAL_DECODERS, GenerationOptions
from .limits import check_depth, check_images
from .refusals import Refusal
from .remote import with_images_fetched
from .work.engine import Engine
from .work.strict_calls import StrictCalls, stream_strictly, strict_tools
from .work.waiting import Item, Job, Turn

if TYPE_CHECKING:
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor, Prompt


@dataclass(frozen=True)
class Form:
    """The form that a reply must have. schema: a JSON Schema that it is valid for. tool_choice: "required" for calls of
    tools alone, or the name of the one to call. At most one of the two.
    """

    schema: Any = None
    tool_choice: str | None = None

    def __bool__(self) -> bool:
        return self.schema is not None or self.tool_choice is not None


FREE = Form()


@dataclass(frozen=True)
class Service:
    """The model that the interfaces serve, and on which terms.

    name: of the model. options: of requests that do not say otherwise. context: most tokens of prompt and reply; None
    is the model's own. strict_model: refuse requests for models of other names. remote_images: fetch images that
    requests name by https addresses.
    """

    engine: Engine
    name: str
    options: GenerationOptions
    context: int | None = None
    strict_model: bool = False
    remote_images: bool = False

    @property
    def most_tokens(self) -> int:
        """Tokens that prompt and reply may have together. Raises Refusal where no model is loaded."""
        most = self.engine.loaded.model.config.text.max_position_embeddings
        return most if self.context is None else min(most, self.context)

    def check_model(self, name: str | None) -> None:
        """Raises Refusal where another model is asked for, and that matters."""
        if self.strict_model and name not in (None, "", self.name):
            raise Refusal(
                f"There is no model {name!r} here; ask for {self.name!r}.", 404, code="model_not_found", param="model"
            )

    def request_options(self, fields: Mapping[str, Any], form: Form = FREE) -> GenerationOptions:
        """The options of a request whose `fields` are named as in `GenerationOptions`; None is the server's own.

        Clients send a temperature and the like to every model, and the diffusion decoder has a schedule of its own: it
        leaves out what only causal decoders know. In a form every token is chosen causally. A negative `max_tokens` is
        llama.cpp's clients' way not to limit a reply. Raises PromptError.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        if given.get("max_tokens", 0) < 0:
            del given["max_tokens"]
        options = self.options.with_decoder(given.pop("decoder", self.options.decoder))
        unused = OF_CAUSAL_DECODERS if options.decoder == "diffusion" and not form else ()
        if form:
            options = replace(options, stability=None, confidence=None, active_rows=None)  # of whole canvases
        return replace(options, **{name: value for name, value in given.items() if name not in unused})

    def canvas_options(self, fields: Mapping[str, Any]) -> GenerationOptions:
        """The options of a request that only a canvas can answer, whatever decoder the server's replies have. Raises
        PromptError where the request asks for another one.
        """
        if fields.get("decoder") not in (None, "diffusion"):
            raise PromptError("This is filled in on a canvas; leave out `decoder`, or ask for diffusion.")
        return self.request_options({**fields, "decoder": "diffusion"})

    async def prompt(self, make: Callable[[Processor], Prompt]) -> Prompt:
        """Make a prompt beside the event loop. Raises Refusal and PromptError."""
        processor = self.engine.loaded.processor
        return await self.engine.prepare(lambda: make(processor))

    async def chat_prompt(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), thinking: bool = False
    ) -> Prompt:
        """Render messages of a caller, who can name no files, and addresses of images only where that was opted for.
        Raises Refusal and PromptError.
        """
        check_images(messages)
        check_depth(list(tools), "tools")
        if self.remote_images:
            messages = await with_images_fetched(messages)
        return await self.prompt(
            lambda processor: processor.prompt(
                messages, tools=tools, thinking=thinking, allow_files=False, allow_urls=False
            )
        )

    async def reply(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        caller: str,
        *,
        drafts: bool = False,
        canvas: Canvas | None = None,
        form: Form = FREE,
    ) -> Job:
        """Queue a reply. canvas: what it starts from. Raises Refusal and PromptError before anything is computed."""
        check_depth(form.schema, "response_format")
        options = self.checked(prompt, options, form)
        if canvas is not None:
            canvas = Canvas(canvas.tokens[: options.max_tokens])
        is_strict = bool(strict_tools(prompt)) and not form

        def work(turn: Turn) -> Generator[Item, None, None]:
            if is_strict:
                return stream_strictly(turn, prompt, options, canvas)
            return stream(
                turn.model,
                turn.processor,
                prompt,
                canvas=canvas,
                schema=form.schema,
                tool_choice=form.tool_choice,
                options=options,
                cache=turn.cache,
                cancel=turn.cancel,
            )

        def check(model: DiffusionGemma, processor: Processor) -> None:
            make_request(
                model,
                processor,
                prompt,
                canvas=canvas,
                schema=form.schema,
                tool_choice=form.tool_choice,
                options=options,
            )
            if is_strict:
                StrictCalls(model, processor, prompt, options)

        model, processor, _ = self.engine.loaded
        await self.engine.prepare(lambda: check(model, processor))
        job = Job(work, prompt, caller, drafts=drafts)
        self.engine.submit(job)
        return job

    def checked(self, prompt: Prompt, options: GenerationOptions, form: Form = FREE) -> GenerationOptions:
        """The options with a reply no longer than the context allows. Raises Refusal where the prompt leaves no room,
        and PromptError.
        """
        model = self.engine.loaded.model
        settings = request_options(model, options, in_grammar=bool(form))
        least = settings.canvas_length if settings.decoder == "diffusion" and not form else 1
        most, count = self.most_tokens, len(prompt.tokens)
        if count + least > most:
            raise Refusal(
                f"The prompt has {count} tokens; with room for a reply, at most {most - least} fit the context of "
                f"{most}. Send less.",
                code="context_length_exceeded",
                param="messages",
                more={"n_prompt_tokens": count, "n_ctx": most},
            )
        return replace(options, max_tokens=min(options.max_tokens, most - count))


def one_of(field: str, value: object, known: Sequence[str]) -> None:
    """Raises PromptError where a field has a value that cannot be honoured."""
    if value not in known:
        raise PromptError(f"`{field}` is {value!r}, which this server cannot do; it knows {', '.join(known)}.")
