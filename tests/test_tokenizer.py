"""Text to tokens and back, streaming, stop strings, chat prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.tokenizer import Tokenizer
from tests import tiny_model
from wisp_plugin.errors import ModelError
from wisp_plugin.text_stream import StopMatcher

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model.write_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_model.write_tokenizer(folder)
    return Tokenizer.load(folder)


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """`ids` in pieces of `sizes`, over and over."""
    pieces, at = [], 0
    while at < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(ids[at : at + size])
        at += size
    return pieces


def test_round_trip(tokenizer: Tokenizer) -> None:
    text = "the lazy 🙂 in 東京\n  café"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.special_token_ids == {0, 1}
    assert tokenizer.decode([0, *ids, 1]) == text
    assert tokenizer.decode([0, *ids, 1], skip_special_tokens=False) == f"<s>{text}</s>"


@given(text=st.text(min_size=1, max_size=40), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_streamed_text_is_the_text(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    stream = tokenizer.detokenizer()
    pieces = [stream.push(piece) for piece in cut(tokenizer.encode(text, False).tolist(), sizes)]
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.flush() == text
    assert stream.flush() == ""


@given(
    ids=st.lists(st.integers(0, tiny_model.make_tokenizer().get_vocab_size() - 1), max_size=30),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_streamed_garbage_is_what_decode_gives(tokenizer: Tokenizer, ids: list[int], sizes: list[int]) -> None:
    stream = tokenizer.detokenizer()
    assert "".join([stream.push(piece) for piece in cut(ids, sizes)]) + stream.flush() == tokenizer.decode(ids)


def test_a_split_character_comes_once_and_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀b", False)
    assert len(ids) > 4
    stream = tokenizer.detokenizer()
    assert [stream.push([i]) for i in ids] == ["a", *[""] * (len(ids) - 3), "😀", "b"]
    stream = tokenizer.detokenizer()
    assert stream.push(ids[:1]) == "a"
    assert stream.push(ids[1:-2]) == ""
    assert stream.flush() == "\ufffd"


def test_context_goes_before_the_stream(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the 😀", False)
    stream = tokenizer.detokenizer(context=ids[:-1])
    assert stream.push(ids[-1:]) != "the 😀"
    stream = tokenizer.detokenizer(context=tokenizer.encode("the"))
    assert stream.push(tokenizer.encode(" fox")) == " fox"


def first_complete(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition, character by character."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    text=st.text("ab<", max_size=25),
    stops=st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_text_ends_before_the_first_complete_stop_string(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher, passed = StopMatcher(stops), ""
    for piece in cut(list(text), sizes):
        passed += matcher.push("".join(piece))
        assert not any(stop in passed for stop in stops)
    passed += matcher.flush()
    assert (passed, matcher.stopped) == first_complete(text, stops)
    assert matcher.num_passed == len(passed)


def test_text_is_held_back_only_as_long_as_needed() -> None:
    matcher = StopMatcher(["###END"])
    assert matcher.push("abc##") == "abc"
    assert matcher.push("#x #") == "###x "
    assert matcher.push("##END tail") == ""
    assert matcher.stopped == "###END"
    assert matcher.push("more") == matcher.flush() == ""
    assert matcher.num_passed == len("abc###x ")
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([""])


def test_chat_prompt_follows_the_template(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    expected = "<s>[user]hi</s>[assistant]"
    assert tokenizer.chat_prompt(MESSAGES) == expected
    assert tokenizer.encode(expected, False)[0] == 0


@pytest.mark.parametrize("notation", ["string", "list"])
def test_template_in_the_tokenizers_configuration(folder: Path, notation: str) -> None:
    (folder / "chat_template.jinja").unlink()
    template = "{{ eos_token }}{{ messages[0]['content'] | tojson }}"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    config = {"eos_token": {"content": "</s>"}, "chat_template": template if notation == "string" else named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(folder).chat_prompt([{"role": "user", "content": "é<"}]) == '</s>"é<"'


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|access"),
        ("{% if %}", "Expected"),
    ],
)
def test_templates_that_refuse_or_misbehave(folder: Path, template: str, reason: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=reason) as caught:
        Tokenizer.load(folder).chat_prompt(MESSAGES)
    assert "\n" not in str(caught.value)


def test_without_template_there_is_no_chat(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        Tokenizer.load(folder).chat_prompt(MESSAGES)


def test_eos_is_found_in_the_order_of_transformers(folder: Path) -> None:
    assert Tokenizer.load(folder).eos_token_ids == (1,)
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.load(folder).eos_token_ids == (7,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert Tokenizer.load(folder).eos_token_ids == (5, 6)


def test_missing_and_damaged_files_are_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="end-of-sequence"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is damaged"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json is damaged"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"holds no tokenizer\.json"):
        Tokenizer.load(folder)
