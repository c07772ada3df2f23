"""Text in and out: chat messages to token ids, token ids to replies."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from ..config import ModelConfig, VisionConfig, read_json
from ..errors import CheckpointError, PromptError
from ..events import Reply
from .grammars.compiling import Grammar, Grammars
from .messages import Message, VideoPart, call_ids, normalize_messages
from .replies import MARKERS, ReplyParser, reply_from_parts
from .tokenizer import load_tokenizer
from .tools import Tool, free_number, tool_schemas

if TYPE_CHECKING:
    from .images import ImageSource, PreparedImage, PreparedVideo, VideoSource
    from .tokenizer import Tokenizer

IMAGE_TOKEN, IMAGE_BEGIN, IMAGE_END = "<|image|>", "<|image>", "<image|>"


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    `text` is the whole prompt, markers included; `images` are in the order of their tokens, every frame of a video one
    of them. `first_call` is the number that the reply's first tool call has in its id, above those of the prompt's.
    `tools` are the schemas that it declares; `thinking` says whether it asks the model to think first.
    """

    text: str
    tokens: list[int]
    images: tuple[PreparedImage, ...] = ()
    first_call: int = 1
    tools: tuple[dict[str, Any], ...] = ()
    thinking: bool = False


class Processor:
    """A checkpoint's tokenizer, chat template and image settings.

    image_budget: most soft tokens an image becomes, where a prompt does not say.
    """

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, image_budget: int = 280) -> None:
        self.tokenizer = tokenizer
        self.image_budget = image_budget
        self._config = config
        tokenizer.model_max_length = sys.maxsize  # the loop checks lengths; Transformers would warn on stderr
        vocabulary = tokenizer.get_vocab()
        if tokenizer.bos_token is None and "<bos>" in vocabulary:
            tokenizer.bos_token = "<bos>"  # without tokenizer_config.json; chat templates begin with it
        special = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        named = {vocabulary[name]: name for name in MARKERS if name in vocabulary}
        # Embeddings can be padded: the model knows ids there that the tokenizer does not. They read as nothing.
        padding = dict.fromkeys(range(len(tokenizer), config.text.vocab_size), "")
        self._special = padding | special | named
        markers = {name: token for token, name in self._special.items() if name}
        self._grammars = Grammars(tokenizer, config.text.vocab_size, markers)

    @classmethod
    def from_directory(cls, directory: str | Path, config: ModelConfig) -> Processor:
        """Read tokenizer, chat template and image settings from a checkpoint's `directory`. Raises CheckpointError."""
        directory = Path(directory)
        settings: dict[str, Any] = {}
        for name in ("processor_config.json", "preprocessor_config.json"):
            if not settings and (directory / name).exists():
                content = read_json(directory / name)
                settings = content.get("image_processor") or content
                if not isinstance(settings, dict) or not isinstance(settings.get("max_soft_tokens") or 280, int):
                    raise CheckpointError(
                        f"{directory / name} does not hold image settings that can be read; download it again."
                    )
        return cls(load_tokenizer(directory), config, settings.get("max_soft_tokens") or 280)

    def prompt(
        self,
        text_or_messages: str | Sequence[Message] | Sequence[int] | Prompt,
        images: Sequence[ImageSource | PreparedImage] = (),
        tools: Sequence[Tool] = (),
        thinking: bool = False,
        *,
        image_budget: int | None = None,
        allow_files: bool = True,
        allow_urls: bool = False,
    ) -> Prompt:
        """Render a prompt that ends where the model's reply begins.

        text_or_messages: one user turn; chat messages; token ids, taken as they are; or a Prompt, returned as it is.
        images: fill the image parts that have no source, in order; before a plain string they come first.
        tools: OpenAI-style schemas or typed Python functions.
        image_budget: most soft tokens per image.
        allow_files: read images and videos from paths; False is for messages of strangers, who could name any.
        allow_urls: fetch images and videos from http(s).

        A video is a part {"type": "video", "video": source, "frames": most, "fps": of a list}: see `prepare_video`.
        Raises PromptError.
        """
        messages = text_or_messages
        if isinstance(messages, Prompt) or _are_tokens(messages):
            if images or tools or thinking:
                raise PromptError("Images, tools and thinking belong to messages; this prompt is already in tokens.")
            return messages if isinstance(messages, Prompt) else self._token_prompt(messages)
        _check_list("images", images)
        if isinstance(messages, str):
            parts = [*({"type": "image"} for _ in images), {"type": "text", "text": messages}]
            messages = [{"role": "user", "content": parts if images else messages}]
        if not isinstance(messages, Sequence) or isinstance(messages, Mapping | bytes):
            raise PromptError(f"A prompt is text, a list of messages or of token ids, not a {type(messages).__name__}.")
        normal, sources = normalize_messages(messages)
        declared = tool_schemas(tools)
        text = self._render(normal, declared, thinking)
        pictures = self._prepare_pictures(sources, images, image_budget, allow_files, allow_urls)
        text = _expand_pictures(text, pictures)
        return Prompt(
            text,
            self._encode(text),
            images=tuple(image for picture in pictures for image in _images(picture)),
            first_call=free_number(call_ids(normal)),
            tools=tuple(declared),
            thinking=bool(thinking),
        )

    def content(
        self,
        text: str,
        images: Sequence[ImageSource | PreparedImage] = (),
        videos: Sequence[VideoSource | PreparedVideo] = (),
        *,
        allow_files: bool = True,
        allow_urls: bool = False,
    ) -> str | list[dict[str, Any]]:
        """Make a message's content: `text` after images and videos, if any, which are prepared: prompts made of them
        read no file again. Raises PromptError.
        """
        if not isinstance(text, str):
            raise PromptError(f"`text` takes text, not a {type(text).__name__}.")
        _check_list("images", images)
        _check_list("videos", videos)
        allowed = {"allow_files": allow_files, "allow_urls": allow_urls}
        parts = [
            *({"type": "image", "image": self.prepare_image(image, **allowed)} for image in images),
            *({"type": "video", "video": self.prepare_video(video, **allowed)} for video in videos),
        ]
        return [*parts, {"type": "text", "text": text}] if parts else text

    def prepare_image(
        self,
        source: ImageSource | PreparedImage,
        *,
        budget: int | None = None,
        allow_files: bool = True,
        allow_urls: bool = False,
    ) -> PreparedImage:
        """Prepare an image for this checkpoint: see `images.prepare_image`. Raises PromptError."""
        vision = self._vision()
        from .images import PreparedImage, prepare_image

        if isinstance(source, PreparedImage):
            return source
        return prepare_image(
            source,
            budget=self.image_budget if budget is None else budget,
            patch_size=vision.patch_size,
            pooling=vision.pooling_kernel_size,
            allow_files=allow_files,
            allow_urls=allow_urls,
        )

    def prepare_video(
        self,
        source: VideoSource | PreparedVideo,
        *,
        frames: int | None = None,
        fps: float | None = None,
        allow_files: bool = True,
        allow_urls: bool = False,
    ) -> PreparedVideo:
        """Prepare a video's frames, with their times: of a file that Pillow can play (GIF, WebP, APNG, AVIF), or of a
        list of images.

        frames: how many at most, evenly spaced; None is 32. fps: of a list, None is 24; a file knows its own times.
        Raises PromptError.
        """
        vision = self._vision()
        from .images import PreparedVideo, prepare_video

        if isinstance(source, PreparedVideo):
            return source
        return prepare_video(
            source,
            frames=frames,
            fps=fps,
            patch_size=vision.patch_size,
            pooling=vision.pooling_kernel_size,
            allow_files=allow_files,
            allow_urls=allow_urls,
        )

    def raw_prompt(self, text: str) -> Prompt:
        """Make a prompt of `text` alone, without a chat template, after the token that begins every document. Raises
        PromptError.
        """
        if not isinstance(text, str):
            raise PromptError(f"A raw prompt is text, not a {type(text).__name__}.")
        text = (self.tokenizer.bos_token or "") + text
        return Prompt(text, self._encode(text))

    def parse(self, tokens: Sequence[int], prompt: Prompt | None = None) -> Reply:
        """Take a finished reply (to `prompt`) apart. Any ids in the vocabulary will do: nothing raises."""
        parser = self.reply_parser(prompt)
        return reply_from_parts([*parser.feed(tokens), *parser.finish()], prompt.first_call if prompt else 1)

    def reply_parser(self, prompt: Prompt | None = None) -> ReplyParser:
        """Begin to read a reply that arrives in pieces: give them to the parser's `feed`, and at last call `finish`.

        prompt: what it replies to. Templates can end a prompt inside a thought, as after a tool's answer.
        """
        in_thought = prompt is not None and self._ends_in_thought(prompt)
        return ReplyParser(self.tokenizer.detokenizer, self._special, in_thought=in_thought)

    def grammar(
        self,
        prompt: Prompt,
        end_tokens: tuple[int, ...],
        *,
        schema: Any = None,
        grammar: str | None = None,
        tool_choice: str | None = None,
    ) -> Grammar:
        """Compile what the reply to `prompt` has to be like: see `Grammars.make`. Raises PromptError."""
        return self._grammars.make(
            prompt,
            self._ends_in_thought(prompt),
            end_tokens,
            schema=schema,
            grammar=grammar,
            tool_choice=tool_choice,
        )

    def _ends_in_thought(self, prompt: Prompt) -> bool:
        names = (self._special.get(token) for token in reversed(prompt.tokens))
        return next((name for name in names if name in ("<|channel>", "<channel|>", "<|turn>")), None) == "<|channel>"

    def draft_text(self, tokens: Sequence[int]) -> str:
        """Decode `tokens` for display: without special tokens and without halves of characters."""
        return "".join(self.token_texts(tokens))

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """Say what each of `tokens` adds to the text that `draft_text` makes of them."""
        detokenizer = self.tokenizer.detokenizer
        texts: list[str] = []
        for token in tokens:
            if token not in self._special:
                detokenizer.add_token(token)
            texts.append(detokenizer.last_segment)
        detokenizer.finalize()
        texts[-1:] = [text + detokenizer.last_segment for text in texts[-1:]]
        return [text.replace("\ufffd", "") for text in texts]

    def _token_prompt(self, tokens: Sequence[int]) -> Prompt:
        self._check_vocabulary(tokens)
        return Prompt(self.tokenizer.decode(list(tokens)), list(tokens))

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: bool) -> str:
        """Write `messages` as the checkpoint's chat template has them. Raises PromptError."""
        from jinja2 import TemplateError

        if not self.tokenizer.has_chat_template:
            raise PromptError("This checkpoint has no chat template; give it raw text or add its chat_template.jinja.")
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                add_generation_prompt=True,
                enable_thinking=bool(thinking),  # mlx-lm turns it on where it is not given
                tokenize=False,
            )
        # Templates are programs: besides Jinja's own errors, whatever their expressions run into.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise PromptError(f"The checkpoint's chat template cannot render these messages ({reason}).") from None
        except RecursionError:
            raise PromptError("The messages or tools are nested too deep for the chat template.") from None

    def _vision(self) -> VisionConfig:
        if self._config.vision is None:
            raise PromptError("This checkpoint cannot see images; use one with vision weights or leave them out.")
        return self._config.vision

    def _prepare_pictures(
        self, sources: list[Any], images: Sequence[Any], budget: int | None, allow_files: bool, allow_urls: bool
    ) -> list[PreparedImage | PreparedVideo]:
        """Prepare what every image or video part shows: its own source, else the next of `images`. Raises
        PromptError.
        """
        empty = sum(source is None for source in sources)
        if empty != len(images):
            raise PromptError(
                f"Image parts to fill: {empty}, images given: {len(images)}; "
                'give one image for every {"type": "image"} part of the messages.'
            )
        rest = iter(images)
        allowed = {"allow_files": allow_files, "allow_urls": allow_urls}
        return [
            self.prepare_video(source.source, frames=source.frames, fps=source.fps, **allowed)
            if isinstance(source, VideoPart)
            else self.prepare_image(next(rest) if source is None else source, budget=budget, **allowed)
            for source in sources
        ]

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"The prompt is not valid Unicode ({error.reason}); check where it comes from.") from None
        # The template writes the beginning-of-document token, so the tokenizer must not.
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        self._check_vocabulary(tokens)
        return tokens

    def _check_vocabulary(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise PromptError("The prompt is empty.")
        size = self._config.text.vocab_size
        outside = next((token for token in tokens if not 0 <= token < size), None)
        if outside is not None:
            raise PromptError(f"The prompt has the token id {outside}; this model's vocabulary ends at {size - 1}.")


def _check_list(name: str, value: Any) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise PromptError(f"`{name}` takes a list, not a {type(value).__name__}.")


def _images(picture: PreparedImage | PreparedVideo) -> tuple[PreparedImage, ...]:
    from .images import PreparedVideo

    return picture.frames if isinstance(picture, PreparedVideo) else (picture,)


def _expand_pictures(text: str, pictures: Sequence[PreparedImage | PreparedVideo]) -> str:
    """Make room: every place holder in `text` becomes what its image or video needs. Raises PromptError."""
    if not pictures:
        return text
    pieces = text.split(IMAGE_TOKEN)
    if len(pieces) <= len(pictures):
        raise PromptError(
            f"The checkpoint's chat template shows {len(pieces) - 1} of the {len(pictures)} images and videos in the "
            "messages; put them into user messages."
        )
    if len(pieces) > len(pictures) + 1:
        raise PromptError(
            f"The prompt has {len(pieces) - 1} places, and images and videos for {len(pictures)}; "
            f"leave {IMAGE_TOKEN} out of its text."
        )
    return pieces[0] + "".join(_room(picture) + piece for picture, piece in zip(pictures, pieces[1:], strict=True))


def _room(picture: PreparedImage | PreparedVideo) -> str:
    """Write what stands for a picture in the prompt: a place holder for each soft token, and what Gemma reads with
    them.
    """
    from .images import PreparedVideo, video_text

    rooms = [f"{IMAGE_BEGIN}{IMAGE_TOKEN * image.soft_tokens}{IMAGE_END}" for image in _images(picture)]
    return video_text(picture.times, rooms) if isinstance(picture, PreparedVideo) else rooms[0]


def _are_tokens(prompt: Any) -> TypeGuard[Sequence[int]]:
    if not isinstance(prompt, list | tuple) or not prompt:
        return False
    return all(isinstance(token, int) and not isinstance(token, bool) for token in prompt)
