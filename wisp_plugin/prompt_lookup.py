"""Drafting without a draft model: what followed the last tokens when they stood in the text before.

Prompt lookup decoding (Saxena 2023): texts repeat themselves (a summary its source, code its names, an answer its
question), so the continuation of an earlier occurrence of the last n tokens is a fair guess. It costs a few
microseconds. How good a guess it is differs from text to text, so a session learns it: every guess is compared with
what the target then chose, also those that were not sent, so that a session without luck costs nothing and still
notices when its luck turns.

A guess of which each token is right with probability a, if those before it are, has survival a, a^2, a^3, ... A draft
token pays if its survival is above the price of a place in the pass (`LOAD`, DESIGN.md section 7). Only as many tokens
are sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wisp_plugin.messages import Commit, Draft, Status

NGRAM_LENGTHS = (4, 3, 2)  # tried in this order
MAX_DRAFT_TOKENS = 24
# Before anything is known: as so many tokens of guesses right and wrong, by the length of the match. Texts of one
# model differ much; few counts, so that a session soon goes by its own.
_PRIOR = {4: (2.4, 0.8), 3: (1.5, 1.5), 2: (0.9, 2.1)}
_MEMORY = 0.95  # how much of the counts each guess keeps
# A rejected draft token costs more than its place: a lower survival than this is not worth it, however cheap the place.
_LEAST_SURVIVAL = 0.1
_PRICE_MARGIN = 1.5  # the price is an estimate too: a draft token has to be worth so much more
_ACK_TOKENS = 64  # commits are acknowledged at least this often


class NgramIndex:
    """The tokens of a session, and where each n-gram of them was last followed by something."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # n-gram -> position behind its newest occurrence but the last

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append committed tokens."""
        for token in tokens:
            end = len(self._tokens)
            for length in NGRAM_LENGTHS:
                if length <= end:
                    self._behind[tuple(self._tokens[end - length : end])] = end
            self._tokens.append(int(token))

    def guess(self, max_tokens: int) -> tuple[list[int], int]:
        """Up to `max_tokens` tokens that may follow, and the length of the match they stand on; ([], 0) without one."""
        end = len(self._tokens)
        for length in NGRAM_LENGTHS:
            at = self._behind.get(tuple(self._tokens[end - length :])) if length <= end else None
            if at is not None:
                period = end - at  # a text that repeats itself right here goes on in circles
                return [self._tokens[at + i % period] for i in range(max_tokens)], length
        return [], 0


@dataclass(slots=True)
class _Guess:
    """What was thought to follow position `start`."""

    start: int
    tokens: list[int]
    match_length: int


class PromptLookup:
    """The drafts of one session, from its commits. Not thread-safe: `on_commit` belongs to one thread.

    With `drafts` false it only acknowledges commits, for a client that leaves this to the server.
    """

    def __init__(self, session: str, tokens: npt.NDArray[np.int32], end: int, drafts: bool = True) -> None:
        """`tokens`: all committed so far. `end`: absolute position behind the last token that may be committed."""
        self._session = session
        self._end = end
        self._drafts = drafts
        self._num_committed = self._num_acked = len(tokens)
        self._index = NgramIndex()
        if drafts:
            self._index.extend(tokens.tolist())
        self._counts = {length: list(prior) for length, prior in _PRIOR.items()}
        self._guess: _Guess | None = None

    def acceptance(self, match_length: int) -> float:
        """Learnt probability that a guessed token is right if those before it are."""
        right, wrong = self._counts[match_length]
        return right / (right + wrong)

    def on_commit(self, commit: Commit) -> Draft | None:
        """What to send after `commit`: a draft, or an empty one as an acknowledgement, or nothing."""
        self._num_committed = commit.end
        if commit.status is not Status.RUNNING:
            return None
        if self._drafts:
            tokens = commit.tokens.tolist()
            self._learn(commit.start, tokens)
            self._index.extend(tokens)
            draft = self._draft(commit.load_price)
            if draft is not None:
                self._num_acked = commit.end
                return draft
        if commit.end - self._num_acked < _ACK_TOKENS:
            return None
        self._num_acked = commit.end
        return Draft(self._session, commit.end, commit.end, np.empty(0, np.int32))

    def _learn(self, start: int, committed: list[int]) -> None:
        """Compare the last guess with what came instead. A token behind the first difference tells nothing."""
        guess = self._guess
        if guess is None or guess.start != start:
            return
        num_shared = min(len(guess.tokens), len(committed))
        num_right = next((i for i in range(num_shared) if guess.tokens[i] != committed[i]), num_shared)
        counts = self._counts[guess.match_length]
        counts[0] = _MEMORY * counts[0] + num_right
        counts[1] = _MEMORY * counts[1] + (num_right < num_shared)

    def _draft(self, price: float) -> Draft | None:
        # The pass that verifies a draft adds a token of its own: there is no room for one at the last position.
        room = self._end - self._num_committed - 1
        tokens, match_length = self._index.guess(min(MAX_DRAFT_TOKENS, max(room, 0)))
        self._guess = _Guess(self._num_committed, tokens, match_length) if tokens else None
        if not tokens:
            return None
        acceptance = self.acceptance(match_length)
        length = min(len(tokens), num_worth(acceptance, price))
        if not length:
            return None
        survival = np.round(255 * acceptance ** np.arange(1, length + 1)).astype(np.uint8)
        start = self._num_committed
        return Draft(self._session, start, start, np.array(tokens[:length], np.int32), survival)


def num_worth(acceptance: float, price: float) -> int:
    """How many tokens of a guess have a survival above what a place in the pass is worth."""
    least = max(_LEAST_SURVIVAL, _PRICE_MARGIN * price)
    if acceptance <= least:
        return 0
    return MAX_DRAFT_TOKENS if acceptance >= 0.999 else int(math.log(least) / math.log(acceptance))
