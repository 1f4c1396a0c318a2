"""Tokens to text as they come: whole characters only, and never a part of a stop string.

Everything works on a `decode` that is passed in (token ids to text, what is not valid UTF-8 as U+FFFD), so that the
edge, the server and the tests use it with the tokenizer they have. What one class holds back the next never sees:

    tokens ─▶ Detokenizer ─▶ whole characters ─▶ StopMatcher ─▶ final text
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]
Decode = Callable[[Sequence[int]], str]
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an incomplete UTF-8 sequence decodes to
MAX_HELD_TOKENS = 64  # every token decodes those that are held anew


class Detokenizer:
    """Decodes a growing list of tokens; gives text once it is complete.

    A character whose bytes are spread over tokens is held back until its last byte is there. The pieces together are
    what `decode` gives for all tokens, unless `MAX_HELD_TOKENS` in a row are no text: they are given as they are, and
    dropped if they are nothing (special tokens).
    `context`: tokens before the first one, where the decoder's treatment of a space depends on them (SentencePiece).
    """

    def __init__(self, decode: Decode, context: TokenIds = ()) -> None:
        self._decode_ids = decode
        self._ids = [int(i) for i in context]  # from the last piece given on; older ones are dropped
        self._num_given = len(self._ids)
        self._given = self._decode()  # the part of their text that was given already

    def push(self, ids: TokenIds) -> str:
        """The new complete text after `ids`; empty if they end within a character."""
        return "".join([self._push_one(int(i)) for i in ids])  # 64 at once may well be text

    def _push_one(self, token: int) -> str:
        start = len(self._ids)
        self._ids.append(token)
        text = self._decode()
        are_enough = len(self._ids) - self._num_given >= MAX_HELD_TOKENS
        if len(text) <= len(self._given):
            if are_enough:
                del self._ids[self._num_given :]
            return ""
        if text.endswith(_REPLACEMENT) and not are_enough:
            return ""
        new = text[len(self._given) :]
        self._ids = self._ids[start:]
        self._num_given = len(self._ids)
        self._given = self._decode()
        return new

    def flush(self) -> str:
        """What is still held back; a character that never became complete is U+FFFD."""
        new = self._decode()[len(self._given) :]
        self._given += new
        return new

    def _decode(self) -> str:
        return self._decode_ids(self._ids)


class StopMatcher:
    """Passes text on up to the first stop string, which it swallows.

    The first stop string is the one that is complete first, so the result does not depend on how the text is cut
    into pieces. `stopped` is that string, else None.
    """

    def __init__(self, stop_strings: Iterable[str] = ()) -> None:
        self._stops = tuple(dict.fromkeys(stop_strings))
        if "" in self._stops:
            raise ValueError("a stop string must not be empty")
        self._held = ""
        self.stopped: str | None = None
        self.num_passed = 0  # characters given; once stopped, where the stop string began

    def push(self, text: str) -> str:
        """The part of the text that is certainly not in a stop string; nothing once stopped."""
        if self.stopped is not None:
            return ""
        text = self._held + text
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            _, at, self.stopped = min(matches)
            self._held = ""
            return self._pass(text[:at])
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return self._pass(text[: len(text) - num_held])

    def flush(self) -> str:
        """What was held back as the possible beginning of a stop string, at the end of the text."""
        held, self._held = self._held, ""
        return self._pass(held)

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

    def _pass(self, text: str) -> str:
        self.num_passed += len(text)
        return text


class TextStream:
    """The text of one generation, token by token, up to a stop string.

    `text`: all that was given. `stopped`: the stop string that ended it, else None. `num_tokens`: tokens that count,
    those up to and with the one that completed the stop string.
    """

    def __init__(self, decode: Decode, stop: Iterable[str] = (), context: TokenIds = ()) -> None:
        """`context` as in `Detokenizer`. ValueError if a stop string is empty."""
        self._characters, self._stops = Detokenizer(decode, context), StopMatcher(stop)
        self._given: list[str] = []
        self.num_tokens = 0

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.stopped

    @property
    def text(self) -> str:
        """All text given so far."""
        return "".join(self._given)

    def push(self, tokens: TokenIds) -> list[str]:
        """The text that each of `tokens` makes final, one piece per token, in order.

        A piece is empty while a character or what may be a stop string is incomplete; the token that settles it brings
        all that was held back. Tokens behind a stop string count for nothing and bring nothing.
        """
        pieces = [self._push_one(int(token)) for token in tokens]
        self._given += pieces
        return pieces

    def flush(self) -> str:
        """What is still held back, at the end of the generation. May complete a stop string (of U+FFFD alone)."""
        if self.stopped is not None:
            return ""
        rest = self._stops.push(self._characters.flush()) + self._stops.flush()
        self._given.append(rest)
        return rest

    def _push_one(self, token: int) -> str:
        if self.stopped is not None:
            return ""
        self.num_tokens += 1
        return self._stops.push(self._characters.push([token]))
