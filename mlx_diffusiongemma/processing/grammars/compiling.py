"""Grammars that a reply has to follow: JSON Schemas, regular expressions, Lark grammars and tool calls, compiled."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import PromptError
from .calls import call_grammar
from .schemas import prepared_schema

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from ..processor import Prompt
    from ..tokenizer import Tokenizer

KEPT = 16  # compiled grammars: those that were asked for last


class Grammar:
    """A description of what a reply has to be like, compiled for one tokenizer, which many can follow at once.

    after: the token that ends a thought. answers_json: what comes after the last of those is JSON.
    """

    def __init__(self, tokenizer: LLTokenizer, compiled: LLMatcher, after: int | None, answers_json: bool) -> None:
        self._tokenizer, self._compiled, self._after, self._answers_json = tokenizer, compiled, after, answers_json

    def matcher(self) -> LLMatcher:
        """Begin to follow one reply, from its first token on."""
        return self._compiled.deep_copy()

    def is_complete(self, tokens: Sequence[int]) -> bool:
        """Whether these tokens, the end token aside, are a whole reply."""
        matcher = self.matcher()
        return matcher.consume_tokens(list(tokens)) and matcher.is_accepting()

    def value(self, tokens: Sequence[int]) -> Any:
        """The value that a whole reply gives: of JSON; None for anything else."""
        if not self._answers_json:
            return None
        start = max((place + 1 for place, token in enumerate(tokens) if token == self._after), default=0)
        return json.loads(self._tokenizer.decode_bytes(list(tokens[start:])))


class Grammars:
    """Makes grammars for a checkpoint's tokenizer, each of them once.

    vocabulary: how many ids the model knows. special: ids of marker tokens by their names.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, special: dict[str, int]) -> None:
        self._tokenizer, self._vocabulary, self._special = tokenizer, vocabulary, special
        self._tokenizers: dict[tuple[int, ...], LLTokenizer] = {}
        self._made: dict[tuple[str, str, tuple[int, ...]], Grammar] = {}

    def make(
        self,
        prompt: Prompt,
        in_thought: bool,
        end_tokens: tuple[int, ...],
        *,
        schema: Any = None,
        grammar: str | None = None,
        tool_choice: str | None = None,
    ) -> Grammar:
        """Compile what the reply to `prompt` has to be like: JSON that a schema describes, text that a regular
        expression or a Lark grammar describes, or calls of the prompt's tools.

        in_thought: the prompt left a thought open. What comes before the answer is a thought: any, where thinking was
        asked for, else an empty one. Raises PromptError where the grammar cannot be honoured, or llguidance is missing.
        """
        if sum(given is not None for given in (schema, grammar, tool_choice)) != 1:
            raise PromptError("A reply follows one of `schema`, `grammar` and `tool_choice`; give only one.")
        if not end_tokens:
            raise PromptError("A reply under a grammar ends with an end token; give end_tokens at least one.")
        _require_llguidance()
        around = self._around(prompt.thinking, in_thought, end_tokens)
        tools = prompt.tools if tool_choice is not None else ()
        key = (_written([schema, grammar, tool_choice, tools]), around, end_tokens)
        found = self._made.pop(key, None)
        if found is None:
            answer: dict[str, Any]
            if schema is not None:
                what, answer = "schema", {"json_schema": prepared_schema(schema)}
            elif grammar is not None:
                what, answer = "grammar", {"lark_grammar": _lark(grammar)}
            else:
                what, answer = "tool_choice", {"lark_grammar": call_grammar(tools, str(tool_choice), self._special)}
            found = self._compiled([{"lark_grammar": around}, {"name": "answer", **answer}], end_tokens, what)
        self._made[key] = found
        while len(self._made) > KEPT:
            del self._made[next(iter(self._made))]
        return found

    def _around(self, thinking: bool, in_thought: bool, end_tokens: tuple[int, ...]) -> str:
        """The answer, and the thought before it, in Lark."""
        if "<|channel>" not in self._special or "<channel|>" not in self._special:
            return "start: @answer"
        begin, end = self._special["<|channel>"], self._special["<channel|>"]
        others = f"<[^{','.join(map(str, sorted({end, *end_tokens})))}]>*"
        if in_thought:
            return f"start: {others} <[{end}]> @answer"
        body = others if thinking else '"thought\\n"'
        return f"start: thought? @answer\nthought: <[{begin}]> {body} <[{end}]>"

    def _compiled(self, grammars: list[dict[str, Any]], end_tokens: tuple[int, ...], what: str) -> Grammar:
        from llguidance import LLMatcher

        tokenizer = self._tokenizer_for(end_tokens)
        text = json.dumps({"grammars": grammars}, ensure_ascii=False)
        matcher = LLMatcher(tokenizer, text, log_level=0)
        reasons = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
        if reasons:
            reason = " ".join(reasons[0].split("\n<state>")[0].split())[:300].rstrip(".")
            named = "`pattern` of the schema" if what == "schema" and "regex" in reason else what
            raise PromptError(f"The {named} cannot be honoured ({reason}); leave that out, or change it.")
        return Grammar(tokenizer, matcher, self._special.get("<channel|>"), what == "schema")

    def _tokenizer_for(self, end_tokens: tuple[int, ...]) -> LLTokenizer:
        """The tokenizer as llguidance has it, which takes a second to make where the vocabulary is large."""
        from llguidance import LLTokenizer

        if end_tokens not in self._tokenizers:
            written = self._tokenizer.backend_tokenizer.to_str()
            self._tokenizers[end_tokens] = LLTokenizer(written, n_vocab=self._vocabulary, eos_token=list(end_tokens))
        return self._tokenizers[end_tokens]


def _written(asked: list[Any]) -> str:
    """What was asked for, as text that tells it from anything else. Raises PromptError where it has no end."""
    try:
        return json.dumps(asked, default=repr)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"The schema cannot be written as JSON ({error}); give plain lists and mappings.") from None


def _require_llguidance() -> None:
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise PromptError(
            "Schemas, grammars and chosen tools need llguidance; run: pip install 'mlx-diffusiongemma[grammar]'."
        ) from None


def _lark(grammar: str) -> str:
    """A grammar's text as Lark: what has a rule called `start` is Lark already, all else a regular expression that the
    whole reply matches. Raises PromptError.
    """
    from llguidance import regex_to_lark

    if not isinstance(grammar, str) or not grammar.strip():
        raise PromptError("`grammar` takes a regular expression or a Lark grammar with a rule called start.")
    if re.search(r"^\s*start\s*:", grammar, re.MULTILINE):
        return grammar
    return f"start: /{regex_to_lark(grammar, 'd')}/"
