"""Part fixed schedule of `wisp-bench lossless` on tiny models: equal is equal, and a leak is found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from bench import lossless_schedule
from bench.lossless_reference import Case, torch_threads
from tests.factories import ids, make_open, session_id
from tests.fakes import FakeVerifier, target_alone
from tests.fakes import draft_token as fake_draft_token
from tests.tiny_model import VOCAB_SIZE, hf_folder, target_logits
from triton_models.target_model import load_target
from triton_models.torch_verifier import TorchVerifier
from wisp_plugin.config import EngineConfig, VerifierConfig
from wisp_plugin.coupling import choose_token
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.messages import Mode, Open, PassItem, PassOutcome, Sampling, Tokens

SAMPLED = Sampling(seed=3, temperature=0.8, top_p=0.95)


def tiny_opens() -> list[Open]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, VOCAB_SIZE, length).astype(np.int32) for length in (5, 130, 40, 9)]
    groups = [[Case(i, prompt, sampling) for i, prompt in enumerate(prompts)] for sampling in (Sampling(), SAMPLED)]
    return lossless_schedule.fixed_opens(groups, 6, 20, ())


def half_right(opened: Open, tokens: Tokens) -> int:
    """The target's token about every other time."""
    token = choose_token(target_logits(tokens), opened.sampling, len(tokens), tokens)
    return token if (token + len(tokens)) % 2 else (token + 1) % VOCAB_SIZE


class Leaking(TorchVerifier):
    """A verifier whose own token behind a rejection depends on the rejected draft token."""

    def run(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        outcomes = super().run(items)
        for item, outcome in zip(items, outcomes, strict=True):
            draft = item.tokens[item.first_choice_position :]
            if len(draft) and draft[0] != outcome.chosen[0]:
                outcome.chosen[0] = draft[0] // 2
        return outcomes


@pytest.mark.parametrize("kind", [TorchVerifier, Leaking])
def test_replay_without_drafts_is_equal_unless_the_verifier_leaks(kind: type[TorchVerifier]) -> None:
    target = load_target(VerifierConfig(target=str(hf_folder()), device="cpu"))
    verifiers = [kind(target, BlockPool(256, 4)) for _ in range(2)]
    with torch_threads(1):
        recorder, final = lossless_schedule.record(verifiers[0], tiny_opens(), half_right, 6, seed=0)
        result = lossless_schedule.replay(verifiers[1], recorder, final, VOCAB_SIZE, seed=0)
    assert any(item.is_prefill_chunk for one in recorder.passes for item in one.items)
    assert all(item.logprobs for one in recorder.passes for item in one.items)
    if kind is Leaking:
        assert result.mismatches
    else:
        assert result.mismatches == ()
        assert result.num_passes == len(recorder.passes)
        assert result.num_choices == 6 * 20
        assert result.num_replaced > 50


def test_every_draft_token_that_was_not_committed_is_replaced() -> None:
    item = PassItem(session_id(1), ids(1, 2, 3, 4, 5, 6, 4), 2, 4, Sampling())
    final = ids(1, 2, 3, 4, 5, 0)  # 4 and 5 were accepted, 6 was not, the last one stands behind the end
    for seed in range(50):
        masked, num_kept = lossless_schedule.without_drafts(item, final, 7, np.random.default_rng(seed))
        assert num_kept == 2
        assert masked.tokens[:5].tolist() == [1, 2, 3, 4, 5]
        assert masked.tokens[5] not in (6, 0)
        assert masked.tokens[6] != 4
        assert (masked.num_cached, masked.num_draft_tokens) == (2, 4)
    assert item.tokens.tolist() == [1, 2, 3, 4, 5, 6, 4]


def test_drive_commits_the_target_s_tokens_in_both_modes() -> None:
    verifier = FakeVerifier(num_blocks=200)
    engine = lossless_schedule.make_engine(verifier, verifier.pool, EngineConfig(max_pass_tokens=16))
    opens = [
        make_open(session=session_id(i), prompt=(1, 2, i), max_new_tokens=15, mode=(Mode.FREE, Mode.SYNC)[i % 2])
        for i in range(4)
    ]
    chains = lossless_schedule.chains_of_random_length(
        lambda opened, tokens: fake_draft_token(tokens), 4, np.random.default_rng(0)
    )
    final = lossless_schedule.drive(engine, opens, chains, opens_per_step=2)
    assert {name: tokens.tolist() for name, tokens in final.items()} == {
        opened.session: target_alone(opened.tokens, opened.end) for opened in opens
    }
