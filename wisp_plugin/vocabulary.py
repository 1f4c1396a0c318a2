"""Fingerprint of a tokenizer: the `vocab_hash` of section 6. Draft and target agree on token ids if it is equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wisp_plugin.errors import ModelError


def vocab_hash(folder: Path) -> str:
    """sha256 (hex) over the id-ordered vocabulary, added tokens included, and the merges of `folder`/tokenizer.json.

    Independent of how the file is written: merges as "a b" or as pairs, order of keys, escapes.

    Raises:
        ModelError: tokenizer.json is missing, damaged or of an unknown kind.
    """
    path, tokenizer = _read(folder)
    tokens = sorted(_tokens_by_id(tokenizer, path).items())
    merges = [_merge(entry, path) for entry in tokenizer["model"].get("merges") or ()]
    canonical = json.dumps([tokens, merges], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def vocab_size(folder: Path) -> int:
    """Highest token id of `folder`/tokenizer.json plus one (a model may have more rows); raises as `vocab_hash`."""
    path, tokenizer = _read(folder)
    return max(_tokens_by_id(tokenizer, path)) + 1


def _read(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder} holds no tokenizer.json")
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}") from None
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("model"), dict):
        raise ModelError(f"{path} is damaged: a JSON object with a `model` is needed")
    return path, tokenizer


def _tokens_by_id(tokenizer: dict[str, Any], path: Path) -> dict[int, str]:
    """id -> token. BPE, WordPiece and WordLevel keep a mapping, Unigram a list of [token, score]."""
    vocabulary = tokenizer["model"].get("vocab")
    try:
        if isinstance(vocabulary, dict):
            tokens = _checked((token_id, token) for token, token_id in vocabulary.items())
        elif isinstance(vocabulary, list):
            tokens = _checked((token_id, entry[0]) for token_id, entry in enumerate(vocabulary))
        else:
            raise ModelError(f"{path} holds no vocabulary; accepted models: BPE, WordPiece, WordLevel, Unigram")
        tokens |= _checked((token["id"], token["content"]) for token in tokenizer.get("added_tokens") or ())
    except (TypeError, KeyError, IndexError):
        raise ModelError(f"{path} is damaged: its vocabulary is not a list of tokens with ids") from None
    if not tokens:
        raise ModelError(f"{path} is damaged: its vocabulary is empty")
    return tokens


def _checked(pairs: Iterable[tuple[Any, Any]]) -> dict[int, str]:
    tokens = dict(pairs)
    if not all(type(token_id) is int and type(token) is str for token_id, token in tokens.items()):
        raise TypeError
    return tokens


def _merge(entry: Any, path: Path) -> list[str]:
    """A merge as a pair, from either notation."""
    pair = entry.split(" ") if isinstance(entry, str) else entry
    if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
        raise ModelError(f"{path} is damaged: merge {entry!r} is not a pair of tokens")
    return pair
