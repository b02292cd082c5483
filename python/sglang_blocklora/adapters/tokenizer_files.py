"""Looks at a tokenizer that was saved beside an adapter: new tokens are refused, a chat template is not used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from sglang_blocklora.adapters.errors import AdapterError, brief, listed
from sglang_blocklora.adapters.files import not_json, read_bytes

ADDED_TOKENS = "added_tokens.json"  # transformers 4
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKEN_FILES = (TOKENIZER, TOKENIZER_CONFIG, ADDED_TOKENS)
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
MAX_BYTES = 128 * 2**20  # the largest vocabularies in use take about 35 MiB


class _Token(msgspec.Struct):
    id: int
    content: str


class _Vocabulary(msgspec.Struct):
    """Token -> id; a Unigram model has a list of pairs, in which a token's place is its id."""

    vocab: dict[str, int] | list[tuple[str, float]] | None = None


class _Tokenizer(msgspec.Struct):
    added_tokens: list[_Token] | None = None
    model: _Vocabulary | None = None


class _Content(msgspec.Struct):
    content: str


class _TokenizerConfig(msgspec.Struct):
    added_tokens_decoder: dict[int, _Content] | None = None
    chat_template: Any = None


def check_tokens(adapter: str, folder: Path, vocab_size: int) -> None:
    """Refuse tokens beyond the base model's vocabulary of ``vocab_size`` ids, in whichever file they are.

    Ids below it are the base model's own embeddings, whatever a tokenizer calls them. Raises ``AdapterError``, for a
    file that cannot be understood too: whether the adapter needs other embeddings is then unknown.
    """
    new = {index: (token, file) for index, token, file in _tokens(adapter, folder) if index >= vocab_size}
    if new:
        names = [f"{brief(token)} = {index}" for index, (token, _) in sorted(new.items())]
        files = sorted({file for _, file in new.values()})
        raise AdapterError(
            adapter,
            f"{len(new)} new tokens in {', '.join(files)} ({listed(names)})",
            f"no token beyond the base model's vocabulary of {vocab_size}",
            "New tokens are not served, since their embeddings are not: train without them, or merge the adapter. If "
            f"it was trained without (a padding token, say), delete {', '.join(files)} from its folder.",
        )


def chat_template(adapter: str, folder: Path) -> str | None:
    """Where ``folder`` holds a chat template, or None. Raises ``AdapterError`` for a file that cannot be understood."""
    for name in CHAT_TEMPLATES:
        if (folder / name).exists():
            return name
    config = _read(adapter, folder / TOKENIZER_CONFIG, _TokenizerConfig)
    return f"chat_template of {TOKENIZER_CONFIG}" if config and config.chat_template else None


def _tokens(adapter: str, folder: Path) -> Iterator[tuple[int, str, str]]:
    """(id, token, file) of all tokens in the files that transformers 4 and 5 write."""
    added = _read(adapter, folder / ADDED_TOKENS, dict[str, int] | list[_Token])
    if isinstance(added, list):
        added = {token.content: token.id for token in added}
    for token, index in (added or {}).items():
        yield index, token, ADDED_TOKENS
    config = _read(adapter, folder / TOKENIZER_CONFIG, _TokenizerConfig)
    for index, one in ((config and config.added_tokens_decoder) or {}).items():
        yield index, one.content, TOKENIZER_CONFIG
    tokenizer = _read(adapter, folder / TOKENIZER, _Tokenizer)
    if tokenizer is None:
        return
    for one in tokenizer.added_tokens or []:
        yield one.id, one.content, TOKENIZER
    vocabulary = (tokenizer.model and tokenizer.model.vocab) or {}
    if isinstance(vocabulary, list):
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    for token, index in vocabulary.items():
        yield index, token, TOKENIZER


def _read(adapter: str, path: Path, kind: Any) -> Any:
    """The contents of ``path`` as a ``kind``, or None where there is no such file."""
    data = read_bytes(adapter, path, MAX_BYTES)
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise AdapterError(
            adapter,
            f"{path} of a form that is not known ({error})",
            "a tokenizer file as transformers writes it",
            "Save the tokenizer again, or delete the file if the adapter has no new tokens.",
        ) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise not_json(adapter, path, error) from error
