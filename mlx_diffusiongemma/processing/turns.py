"""An assistant's message as the model would write it: the tokens of a reply, taken from the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import PromptError

if TYPE_CHECKING:
    from ..events import Reply
    from .processor import Processor, Prompt

THOUGHT_BEGIN, THOUGHT_END = "<|channel>thought\n", "<channel|>"
# How templates can end a prompt that asks for no thinking: the model then goes on after it.
EMPTY_THOUGHT = THOUGHT_BEGIN + THOUGHT_END
THOUGHT_KEYS = ("reasoning", "reasoning_content", "thinking")
QUESTION = {"role": "user", "content": "?"}


def thought_of(message: Mapping[str, Any]) -> str:
    """Find what an assistant's message says that it thought, in any of the spellings in use; "" for nothing."""
    return next((message[key] for key in THOUGHT_KEYS if message.get(key)), "")


class ReplyWriter:
    """Writes messages as a processor's model would. Raises PromptError where its chat template is of no known form."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        asked = processor.prompt([QUESTION]).text
        self._opening = asked[asked.rindex("<|turn>") :]
        self._before = asked.removesuffix(EMPTY_THOUGHT)

    def write(self, message: Mapping[str, Any], prompt: Prompt) -> tuple[tuple[int, ...], Reply]:
        """Write `message`, an assistant's in the form of `normalize_messages`, as the reply to `prompt`.

        Returns its tokens, with what ends the model's turn (`<turn|>`, or `<|tool_response>` after tool calls) and
        without the template's newline after that, and the reply as it is read from them.

        The text is what the chat template makes of the message after a plain question, not of the whole conversation:
        templates render a turn that is over otherwise than one that is being written, and some open the model's turn
        anew after a tool's answer. The thought stands before it in the model's own notation; a prompt that does not ask
        for thinking is answered without. Raises PromptError where the message would be read back as another.
        """
        content = message["content"]
        said = content if isinstance(content, str) else "".join(part["text"] for part in content)
        thought = (thought_of(message) if prompt.thinking else "").strip()
        text = self._body({**message, **dict.fromkeys(THOUGHT_KEYS), "content": said})
        if thought:
            text = f"{THOUGHT_BEGIN}{thought}\n{THOUGHT_END}{text}"
        if prompt.text.endswith(THOUGHT_BEGIN):
            text = text.removeprefix(THOUGHT_BEGIN) if thought else THOUGHT_END + text
        tokens = tuple(self._processor.tokenizer.encode(text, add_special_tokens=False))
        reply = self._processor.parse(tokens, prompt)
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        if [(call.name, call.arguments) for call in reply.tool_calls] != [(c["name"], c["arguments"]) for c in calls]:
            raise PromptError("The tool calls are not read back as they are written; simplify their arguments.")
        if (reply.text.strip(), reply.thinking) != (said.strip(), thought):  # templates trim texts
            raise PromptError(
                "The assistant's text is not read back as it is written; leave markers of the chat format out of it, "
                "and give a thought as `reasoning` and calls as `tool_calls`."
            )
        return tokens, reply

    def _body(self, message: Mapping[str, Any]) -> str:
        """Render what follows the opening of the model's turn, up to its end. Raises PromptError."""
        answered = self._processor.prompt([QUESTION, message]).text
        body = answered.removeprefix(self._before).removesuffix(self._opening).removesuffix("\n")
        if not answered.startswith(self._before) or not body.endswith(("<turn|>", "<|tool_response>")):
            raise PromptError(
                "The checkpoint's chat template ends the assistant's turn in a way that is not known here."
            )
        return body
