"""The fingerprint depends on tokens, ids and merges, and on nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_model
from wisp_plugin.errors import ModelError
from wisp_plugin.vocabulary import vocab_hash, vocab_size


def _write(folder: Path, tokenizer: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def _bpe(**changes: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "é": 3}, "merges": ["a b"], **changes}
    return {"added_tokens": [{"id": 4, "content": "<s>", "special": True}], "model": model}


def test_value_is_fixed(tmp_path: Path) -> None:
    """Client and server of different releases compare this value: a change of it is a change of the protocol."""
    hashed = rb'[[[0,"a"],[1,"b"],[2,"ab"],[3,"\u00e9"],[4,"<s>"]],[["a","b"]]]'
    assert vocab_hash(_write(tmp_path / "a", _bpe())) == hashlib.sha256(hashed).hexdigest()


@pytest.mark.parametrize(
    "same",
    [
        _bpe(merges=[["a", "b"]]),
        _bpe(vocab={"é": 3, "ab": 2, "b": 1, "a": 0}),
        _bpe(dropout=0.1),
        {**_bpe(), "normalizer": {"type": "NFC"}},
        _bpe(vocab={"a": 0, "b": 1, "ab": 2, "é": 3, "<s>": 4}),
    ],
)
def test_notation_does_not_matter(tmp_path: Path, same: dict[str, Any]) -> None:
    assert vocab_hash(_write(tmp_path / "a", _bpe())) == vocab_hash(_write(tmp_path / "b", same))


@pytest.mark.parametrize(
    "other",
    [
        _bpe(vocab={"a": 1, "b": 0, "ab": 2, "é": 3}),
        _bpe(vocab={"a": 0, "b": 1, "ab": 2, "è": 3}),
        _bpe(vocab={"a": 0, "b": 1, "ab": 2}),
        _bpe(merges=["b a"]),
        _bpe(merges=[]),
        {**_bpe(), "added_tokens": []},
        {**_bpe(), "added_tokens": [{"id": 5, "content": "<s>"}]},
    ],
)
def test_any_difference_in_tokens_ids_or_merges_matters(tmp_path: Path, other: dict[str, Any]) -> None:
    assert vocab_hash(_write(tmp_path / "a", _bpe())) != vocab_hash(_write(tmp_path / "b", other))


def test_other_models_of_tokenizer(tmp_path: Path) -> None:
    unigram = _write(tmp_path / "u", {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.5]]}})
    wordpiece = _write(tmp_path / "w", {"model": {"type": "WordPiece", "vocab": {"a": 0, "b": 1}}})
    swapped = _write(tmp_path / "s", {"model": {"type": "Unigram", "vocab": [["b", -2.5], ["a", -1.0]]}})
    assert vocab_hash(unigram) == vocab_hash(wordpiece) != vocab_hash(swapped)
    assert vocab_size(unigram) == 2


def test_size_counts_added_tokens(tmp_path: Path) -> None:
    assert vocab_size(_write(tmp_path / "a", _bpe())) == 5
    tiny_model.write_tokenizer(tmp_path)
    assert vocab_size(tmp_path) == tiny_model.make_tokenizer().get_vocab_size()


@pytest.mark.parametrize(
    "damaged",
    [
        [],
        {},
        {"model": {"type": "BPE"}},
        {"model": {"vocab": {}}},
        {"model": {"vocab": {"a": "0"}}},
        {"model": {"vocab": [1, 2]}},
        {"model": {"vocab": {"a": 0}, "merges": ["a b c"]}},
        {"model": {"vocab": {"a": 0}, "merges": [7]}},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]},
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, damaged: Any) -> None:
    with pytest.raises(ModelError) as caught:
        vocab_hash(_write(tmp_path, damaged))
    assert "\n" not in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no tokenizer\.json"):
        vocab_hash(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        vocab_hash(tmp_path)
