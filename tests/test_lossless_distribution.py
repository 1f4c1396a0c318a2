"""Part distribution of `wisp-bench lossless`: right samplers pass, wrong ones are caught."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from bench import lossless_distribution
from bench.lossless_reference import torch_threads
from bench.report import Progress
from triton_models.torch_verifier import TorchVerifier
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.messages import PassItem, PassOutcome, Sampling


def test_chi_square_passes_the_right_distribution_and_fails_wrong_ones() -> None:
    rng, exact = np.random.default_rng(0), np.array([0.5, 0.3, 0.1995, 0.0005, 0.0])
    p_values = [lossless_distribution.chi_square_p(rng.multinomial(4000, exact), exact) for _ in range(300)]
    assert min(p_values) > 1e-4
    assert 0.4 < float(np.mean(p_values)) < 0.6  # p-values of a right sampler are uniform
    shifted = np.array([0.45, 0.35, 0.1995, 0.0005, 0.0])
    assert lossless_distribution.chi_square_p(rng.multinomial(4000, shifted), exact) < 1e-6
    assert lossless_distribution.chi_square_p(np.array([2000, 1200, 797, 2, 1]), exact) == 0.0  # cannot be
    with pytest.raises(ValueError, match="too few"):
        lossless_distribution.chi_square_p(np.array([3, 2, 1, 0, 0]), exact)


def test_probabilities_are_softmax_cut_to_the_nucleus() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    plain = lossless_distribution.probabilities(logits, Sampling(temperature=1.0))
    np.testing.assert_allclose(plain, [0.1, 0.5, 0.15, 0.25], rtol=1e-6)
    cut = lossless_distribution.probabilities(logits, Sampling(temperature=1.0, top_p=0.7))
    np.testing.assert_allclose(cut, [0.0, 2 / 3, 0.0, 1 / 3], rtol=1e-6)


def test_served_tokens_follow_the_target_and_a_verifier_that_trusts_drafts_is_caught() -> None:
    class Trusting(TorchVerifier):
        def run(self, items: Sequence[PassItem]) -> list[PassOutcome]:
            outcomes = super().run(items)
            for item, outcome in zip(items, outcomes, strict=True):
                outcome.chosen[: item.num_draft_tokens] = item.tokens[item.first_choice_position :]
            return outcomes

    model, sampling = lossless_distribution.random_model(1), lossless_distribution.SAMPLINGS["temperature 1"]
    target = lossless_distribution.Table.of(model)
    draft = lossless_distribution.Table.of(lossless_distribution.random_model(2))
    right = lossless_distribution.small_verifier(model)
    wrong = Trusting(right._target, BlockPool(512, 8))
    least = {}
    with torch_threads(1):
        for name, verifier in (("right", right), ("wrong", wrong)):
            pairs, acceptance = lossless_distribution.served_pairs(
                verifier, verifier.pool, draft, sampling, 1000, Progress(1000, name)
            )
            least[name] = min(lossless_distribution.pair_test(pairs, target.pair_probabilities(sampling)).values())
            assert 0.1 < acceptance < 0.9 or name == "wrong"
    assert least["wrong"] < lossless_distribution.threshold() < least["right"]
