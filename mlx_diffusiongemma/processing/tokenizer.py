"""A checkpoint's tokenizer: read from its files, and what the rest of the package asks of it."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any, Literal, Protocol

from ..config import read_json
from ..errors import CheckpointError


class Detokenizer(Protocol):
    """Turns the token ids of one reply into text as they come (mlx-lm's `StreamingDetokenizer`)."""

    @property
    def text(self) -> str:
        """All of the text so far."""

    @property
    def last_segment(self) -> str:
        """The text that has come since this was last asked for."""

    def add_token(self, token: int) -> None: ...

    def finalize(self) -> None: ...

    def reset(self) -> None: ...


class Tokenizer(Protocol):
    """The part of mlx-lm's `TokenizerWrapper`, and of the Transformers tokenizer that it wraps, which is used here."""

    bos_token: str | None
    model_max_length: int
    has_chat_template: bool

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Transformers' `AddedToken`s by id, which know whether they are special."""

    @property
    def detokenizer(self) -> Detokenizer:
        """A new one, for one reply."""

    @property
    def backend_tokenizer(self) -> Any:
        """The tokenizer of Hugging Face's library in Rust, which `to_str` writes as tokenizer.json."""

    def __len__(self) -> int: ...

    def get_vocab(self) -> dict[str, int]: ...

    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool = False) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        enable_thinking: bool,
        tokenize: Literal[False],
    ) -> str: ...


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer in `directory`, from tokenizer.json or else a SentencePiece model. Raises CheckpointError."""
    if not (directory / "tokenizer.json").exists() and not (directory / "tokenizer.model").exists():
        raise CheckpointError(
            f"{directory} has no tokenizer.json and no tokenizer.model; download the whole checkpoint."
        )
    from huggingface_hub.errors import StrictDataclassError

    try:
        if (directory / "tokenizer.json").exists():
            return _wrapped(directory)
        with tempfile.TemporaryDirectory() as folder:
            _convert_sentencepiece(directory, Path(folder))
            return _wrapped(Path(folder))
    # Transformers reads config.json as well, and checks fields in it that nothing here uses.
    except (OSError, ValueError, TypeError, LookupError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CheckpointError(f"{directory}: the tokenizer cannot be read ({reason}); download it again.") from None


def _wrapped(directory: Path) -> Tokenizer:
    """Load tokenizer.json as mlx-lm does."""
    from mlx_lm.tokenizer_utils import load

    # The wrapper hands most of a `Tokenizer` on with `__getattr__`, which type checkers do not look into.
    wrapper: Any = load(directory, {"trust_remote_code": False})  # or Transformers asks at the terminal
    tokenizer: Tokenizer = wrapper
    return tokenizer


def _convert_sentencepiece(directory: Path, folder: Path) -> None:
    """Write the SentencePiece model of `directory` to `folder` as tokenizer.json, with its chat template and the
    tokens that tokenizer_config.json adds at their ids. Raises CheckpointError.
    """
    from transformers import AddedToken, PreTrainedTokenizerFast

    # Not AutoTokenizer: the class that it picks for Gemma appends added tokens that replace an unused piece.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    # Where tokenizer_config.json has extra tokens, Transformers forgets the symbols that the model itself defines.
    # Its classes are made when it is imported, where type checkers do not see them.
    formats: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = formats.ModelProto.FromString((directory / "tokenizer.model").read_bytes())
    kinds = model.SentencePiece.Type
    symbols = [piece for piece in model.pieces if piece.type in (kinds.CONTROL, kinds.USER_DEFINED)]
    vocabulary, known = tokenizer.get_vocab(), tokenizer.added_tokens_encoder
    tokenizer.add_tokens(
        [
            AddedToken(symbol.piece, special=symbol.type == kinds.CONTROL, normalized=False)
            for symbol in symbols
            if symbol.piece in vocabulary and symbol.piece not in known
        ]
    )
    path = directory / "tokenizer_config.json"
    declared = (read_json(path).get("added_tokens_decoder") or {}) if path.exists() else {}
    for token, entry in declared.items():
        found = tokenizer.convert_tokens_to_ids(entry["content"])
        if found != int(token):
            raise CheckpointError(
                f"{path} puts {entry['content']!r} at id {token}, and tokenizer.model has it at {found}; "
                "use the two files of one checkpoint."
            )
    tokenizer.save_pretrained(folder)
