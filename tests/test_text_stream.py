"""Text as tokens make it final: characters split over tokens, stop strings split over tokens, what counts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wisp_plugin.text_stream import MAX_HELD_TOKENS, Detokenizer, TextStream


def decode(ids: Sequence[int]) -> str:
    """A token is a byte: the hardest cut there is."""
    return bytes(ids).decode("utf-8", errors="replace")


def pieces_of(text: str, *stop: str) -> tuple[TextStream, list[str]]:
    """A stream that was given `text` byte by byte, and its pieces with the flush at the end."""
    stream = TextStream(decode, stop)
    pieces = stream.push(text.encode())
    return stream, [*pieces, stream.flush()]


def test_one_piece_per_token_and_whole_characters() -> None:
    stream = TextStream(decode)
    assert stream.push("aé🙂".encode()) == ["a", "", "é", "", "", "", "🙂"]
    assert stream.push([]) == []
    assert stream.flush() == ""
    assert (stream.text, stream.num_tokens, stream.stopped) == ("aé🙂", 7, None)


def test_a_character_that_never_ends_is_told_as_such() -> None:
    stream = TextStream(decode)
    assert stream.push("a🙂".encode()[:-1]) == ["a", "", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.text == "a\ufffd"


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 200])
def test_many_tokens_at_once_that_end_within_a_character(num_tokens: int) -> None:
    characters = Detokenizer(decode)
    tokens = b"a" * (num_tokens - 1) + "é".encode()
    assert characters.push(tokens[:num_tokens]) == "a" * (num_tokens - 1)
    assert characters.push(tokens[num_tokens:]) == "é"


def test_bytes_that_are_no_text_are_not_held_for_ever() -> None:
    num_decoded = []

    def counting(ids: Sequence[int]) -> str:
        num_decoded.append(len(ids))
        return decode(ids)

    stream = TextStream(counting)
    stream.push(b"\x80" * 5000 + "é".encode())
    assert max(num_decoded) <= MAX_HELD_TOKENS + 1
    assert len(stream.text) > 4900
    assert stream.text.endswith("é")


def test_tokens_without_text_are_not_held_for_ever() -> None:
    num_decoded = []

    def special(ids: Sequence[int]) -> str:
        num_decoded.append(len(ids))
        return decode([i for i in ids if i < 256])

    stream = TextStream(special)
    assert "".join(stream.push([97, *[300] * 5000, *"é".encode()])) == "aé"
    assert max(num_decoded) <= MAX_HELD_TOKENS + 2


def test_a_long_context_takes_nothing_from_what_is_held() -> None:
    context = b"x" * MAX_HELD_TOKENS
    stream = TextStream(decode, context=context)
    assert stream.push("🙂".encode()) == ["", "", "", "🙂"]


def test_a_possible_stop_string_is_held_until_it_is_settled() -> None:
    stream, pieces = pieces_of("a##b##.", "##.")
    assert pieces == ["a", "", "", "##b", "", "", "", ""]
    assert (stream.text, stream.stopped, stream.num_tokens) == ("a##b", "##.", 7)
    stream, pieces = pieces_of("a#", "##.")
    assert pieces == ["a", "", "#"]
    assert stream.stopped is None


def test_tokens_behind_a_stop_string_count_for_nothing() -> None:
    stream, pieces = pieces_of("one🙂two", "🙂")
    assert pieces == ["o", "n", "e", *[""] * 8]
    assert (stream.text, stream.stopped, stream.num_tokens) == ("one", "🙂", 7)
    assert stream.push(b"more") == [""] * 4
    assert stream.num_tokens == 7


def test_the_stop_string_that_is_complete_first_counts() -> None:
    stream, _ = pieces_of("abcd", "bcd", "c")
    assert (stream.text, stream.stopped, stream.num_tokens) == ("ab", "c", 3)


def test_a_token_may_hold_text_on_both_sides_of_a_stop_string() -> None:
    words = ["He", "llo.\n", "Bye"]
    stream = TextStream(lambda ids: "".join(words[i] for i in ids), ["."])
    assert stream.push([0, 1, 2]) == ["He", "llo", ""]
    assert (stream.stopped, stream.num_tokens) == (".", 2)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        TextStream(decode, [""])


@given(text=st.text(max_size=40), stop=st.lists(st.text(min_size=1, max_size=3), max_size=3), size=st.integers(1, 5))
def test_the_text_does_not_depend_on_how_tokens_come(text: str, stop: list[str], size: int) -> None:
    whole, _ = pieces_of(text, *stop)
    stream, raw = TextStream(decode, stop), text.encode()
    pieces = [piece for at in range(0, len(raw), size) for piece in stream.push(raw[at : at + size])]
    assert "".join(pieces) + stream.flush() == stream.text == whole.text
    assert (stream.stopped, stream.num_tokens) == (whole.stopped, whole.num_tokens)
    ends = [text.index(s) for s in stop if s in text]
    assert stream.text == text if not ends else stream.stopped is not None and stream.text in text
    if not ends:
        assert stream.num_tokens == len(raw)
