"""The passes of a sweep: which ones, as items, and how long one takes.

What is timed is what `TorchVerifier.run` does, except that nothing is kept: the cached tokens are not computed but
only accounted for (time does not depend on the values), so this KV must never be remembered as somebody's prefix.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from triton_models.torch_verifier import TorchVerifier
from wisp_plugin.config import EngineConfig
from wisp_plugin.estimator import EMPTY_PASS, Floats, item_features
from wisp_plugin.messages import PassItem, Sampling

_NUM_RANDOM = 24
_MAX_CONTEXT, _MAX_DRAFTS = 2048, 8  # the lines go on beyond
_SESSIONS_ON_CPU, _SESSIONS = (1, 8, 16), (1, 8, 32, 128)  # an accelerator serves more at once
_ROUNDING = 32  # tokens of a session that its last block of KV may waste
_CHUNKS, _LARGEST_CHUNK = (32, 128), 512
_SAMPLING = (Sampling(seed=1, temperature=1.0), Sampling())


@dataclass(frozen=True, slots=True)
class Member:
    """A session's part of a pass: `num_new` tokens behind `num_cached`; `num_choices` 0 is a prefill chunk."""

    num_cached: int
    num_new: int
    num_choices: int


Cell = tuple[Member, ...]  # one pass


@dataclass(frozen=True, slots=True)
class _Limits:
    """What a pass may hold."""

    window: int  # tokens of a session
    free_tokens: int  # of all sessions
    new_tokens: int
    sessions: int


def sweep_cells(verifier: TorchVerifier, config: EngineConfig) -> list[Cell]:
    """Passes that cover what free KV memory, context window and `config` allow; equal for equal limits."""
    pool = verifier.pool
    free_tokens = pool.num_free * pool.block_tokens
    window = min(verifier.max_context_tokens, _MAX_CONTEXT, free_tokens)
    largest = _SESSIONS_ON_CPU[-1] if verifier.device_name == "cpu" else _SESSIONS[-1]
    limits = _Limits(window, free_tokens, config.max_pass_tokens, min(config.max_pass_sessions, largest))
    random = np.random.default_rng(0)
    cells = _corners(limits, _SESSIONS_ON_CPU if verifier.device_name == "cpu" else _SESSIONS) + _chunks(limits)
    cells += [_random_cell(random, limits) for _ in range(_NUM_RANDOM)]

    def fits(cell: Cell) -> bool:
        tokens = [member.num_cached + member.num_new for member in cell]
        num_blocks = sum(map(pool.num_blocks_for, tokens))
        return num_blocks <= pool.num_free and max(tokens) <= window and num_new_tokens(cell) <= limits.new_tokens

    return [cell for cell in dict.fromkeys(cells) if fits(cell)]


def _corners(limits: _Limits, counts: tuple[int, ...]) -> list[Cell]:
    """Equal sessions: few and many, fresh and as long as memory allows, decoding and verifying."""
    cells = []
    for num_sessions in sorted({min(count, limits.sessions) for count in counts}):
        num_drafts = min(_MAX_DRAFTS, limits.new_tokens // num_sessions - 1)
        longest = min(limits.window // 2, limits.free_tokens // num_sessions - _ROUNDING - num_drafts - 1)
        for num_cached in (16, longest):
            for num_new in (1, 1 + num_drafts):
                if num_cached > 0 < num_new:
                    cells.append((Member(num_cached, num_new, num_new),) * num_sessions)
    return cells


def _chunks(limits: _Limits) -> list[Cell]:
    """Prefill of one session: chunks at the beginning, behind a long prefix, and beside decoding sessions."""
    window = limits.window
    cells: list[Cell] = [(Member(0, min(_LARGEST_CHUNK, window, limits.new_tokens), 0),)]
    for size in _CHUNKS:
        chunk, behind = Member(0, size, 0), Member(max(0, window - size), size, 0)
        cells += [(chunk,), (behind,), (chunk, *(Member(window // 4, 1, 1),) * 4)]
    return cells


def _random_cell(random: np.random.Generator, limits: _Limits) -> Cell:
    """A ragged pass; one in four carries a chunk of prefill too."""
    num_sessions = round(float(np.exp(random.uniform(0, np.log(limits.sessions)))))
    # Twice the mean that memory allows: lengths are uniform in their logarithm, so their mean lies far below the half.
    longest = max(17, min(limits.window - _MAX_DRAFTS - 1, 2 * limits.free_tokens // num_sessions))
    cached = np.exp(random.uniform(np.log(16), np.log(longest), num_sessions)).astype(int)
    new = random.integers(1, min(_MAX_DRAFTS, 2 * limits.new_tokens // num_sessions) + 2, num_sessions)
    members = [Member(c, n, n) for c, n in zip(cached.tolist(), new.tolist(), strict=True)]
    if random.random() < 0.25:
        largest = max(9, min(limits.new_tokens, limits.window) // 2)
        members[0] = Member(0, round(float(np.exp(random.uniform(np.log(8), np.log(largest))))), 0)
    return tuple(members)


def time_pass(
    verifier: TorchVerifier,
    cell: Cell,
    random: np.random.Generator,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of one pass with random tokens, choice included. Leaves no KV behind.

    Raises:
        CapacityError: the pool cannot hold the pass.
    """
    items = make_items(cell, verifier.vocab_size, random)
    try:
        for item in items:
            if item.num_cached:
                verifier.pool.extend(item.session, item.num_cached)
        start_s = clock()
        verifier.choose(items, verifier.compute_logits(items))
        if verifier.device_name.startswith("cuda"):
            torch.cuda.synchronize(verifier.device_name)  # a pass without choices returns before it is done
        return clock() - start_s
    finally:
        for item in items:
            verifier.release(item.session)


def make_items(cell: Cell, vocab_size: int, random: np.random.Generator) -> list[PassItem]:
    """The pass as items with random tokens; every second session is greedy."""
    items = []
    for i, member in enumerate(cell):
        tokens = random.integers(0, vocab_size, member.num_cached + member.num_new).astype(np.int32)
        items.append(
            PassItem(
                session=f"profile-{i}",
                tokens=tokens,
                num_cached=member.num_cached,
                num_draft_tokens=max(0, member.num_choices - 1),
                sampling=_SAMPLING[i % len(_SAMPLING)],
                is_prefill_chunk=member.num_choices == 0,
            )
        )
    return items


def cell_features(cell: Cell) -> Floats:
    """Features of the pass, `[F]`."""
    cached, new, choices = np.array([(m.num_cached, m.num_new, m.num_choices) for m in cell], np.float64).T
    result: Floats = EMPTY_PASS + item_features(cached, new, choices).sum(axis=0)
    return result


def num_new_tokens(cell: Cell) -> int:
    return sum(member.num_new for member in cell)
