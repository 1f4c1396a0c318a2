"""The tree of registered blocks against a search over all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wisp_plugin.kv_prefixes import PrefixTree

BLOCK_TOKENS = 3
KEYS = st.lists(st.sampled_from([0, 1, 255, 256, 65_536]), min_size=BLOCK_TOKENS, max_size=BLOCK_TOKENS).map(tuple)
CHAINS = st.lists(st.lists(KEYS, max_size=3), max_size=8)


def as_bytes(*tokens: int) -> bytes:
    return np.array(tokens, np.int32).tobytes()


def build(chains: list[list[tuple[int, ...]]]) -> tuple[PrefixTree, dict[int, tuple[int, ...]]]:
    """A tree with one block per element of each chain, and all tokens up to the end of each block."""
    tree, blocks = PrefixTree(BLOCK_TOKENS), {}
    for chain in chains:
        node, tokens = tree.root, ()
        for key in chain:
            tokens += key
            blocks[len(blocks)] = tokens
            node = tree.add(node, as_bytes(*key), len(blocks) - 1)
    return tree, blocks


@given(CHAINS, st.lists(st.sampled_from([0, 1, 255, 256, 65_536]), max_size=10))
def test_the_longest_known_prefix_is_found(chains: list[list[tuple[int, ...]]], tokens: list[int]) -> None:
    tree, blocks = build(chains)
    tree.check_integrity()
    found, num_matched = tree.match(tree.root, as_bytes(*tokens))
    expected = max(
        (
            sum(itertools.takewhile(bool, (1 if a == b else 0 for a, b in zip(known, tokens, strict=False))))
            for known in blocks.values()
        ),
        default=0,
    )
    assert num_matched == expected
    assert len(found) == -(-num_matched // BLOCK_TOKENS)
    for i, node in enumerate(found):
        part = tokens[i * BLOCK_TOKENS : min(num_matched, (i + 1) * BLOCK_TOKENS)]
        assert node.key.startswith(as_bytes(*part))


@given(CHAINS, st.randoms(use_true_random=False))
def test_nothing_is_left_when_all_blocks_are_gone(chains: list[list[tuple[int, ...]]], random: object) -> None:
    tree, blocks = build(chains)
    order = sorted(blocks)
    random.shuffle(order)  # type: ignore[attr-defined]
    for block in order:
        tree.remove(block)
        assert block not in tree
        tree.check_integrity()
    assert not tree.root.children


def test_a_block_stands_for_one_thing() -> None:
    tree, _ = build([[(0, 0, 0)]])
    with pytest.raises(AssertionError, match="registered already"):
        tree.add(tree.root, as_bytes(1, 1, 1), 0)
