"""The distribution itself: over many seeds the tokens follow the target's softmax.

A small random target (32 tokens) serves sessions that differ in their seed alone, through the real engine,
scheduler and verifier; another random model drafts, coupled by the same seed. A chi-square test compares the first
token, the second and the pair with the products of the target's exact probabilities, computed from transformers'
logits in float64. The same test must reject two wrong samplers, so that passing it means something: one that trusts
the draft, and one that accepts by coupling but draws anew, with fresh noise, at a rejection.

`FALSE_ALARM_PROBABILITY` bounds the chance that a correct sampler fails any of the tests of a run (Bonferroni). Seeds
are fixed: what passes once passes always.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import chi2
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench.lossless_schedule import ALONE, Recorder, drive, make_engine
from bench.report import Progress
from triton_models.torch_verifier import TorchVerifier, load_verifier
from wisp_plugin.config import EngineConfig, VerifierConfig
from wisp_plugin.coupling import choose_token, count_accepted
from wisp_plugin.kv_admission import KvAccount
from wisp_plugin.messages import Open, Sampling, Slo, Tokens
from wisp_plugin.protocols import Verifier

Floats = npt.NDArray[np.float64]
Pairs = npt.NDArray[np.int64]  # [N, 2]: the first two tokens of N sessions

FALSE_ALARM_PROBABILITY = 1e-6
VOCAB_SIZE = 32
PROMPT = np.array([3, 17, 8, 29], np.int32)
SAMPLINGS = {
    "temperature 1": Sampling(temperature=1.0),
    "temperature 0.8, top-p 0.9": Sampling(temperature=0.8, top_p=0.9),
}
NUM_TESTS = 3 * len(SAMPLINGS)  # first token, second token, pair
_BATCH = 256  # sessions at once
_MIN_EXPECTED = 5.0  # per cell of the chi-square test; smaller cells are put together
_NUM_NEW_TOKENS = 3  # so that a chain of two draft tokens fits in front of the end
_FIRST_SEED = 1_000_000


@dataclass(frozen=True, slots=True)
class Table:
    """Logits of a model behind the prompt `[V]`, and behind the prompt and one more token `[V, V]`."""

    first: npt.NDArray[np.float32]
    second: npt.NDArray[np.float32]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Table:
        """By plain transformers, without a cache."""
        rows = np.concatenate([np.tile(PROMPT, (VOCAB_SIZE, 1)), np.arange(VOCAB_SIZE)[:, None]], axis=1)
        with torch.inference_mode():
            logits = model(input_ids=torch.from_numpy(rows.astype(np.int64)), use_cache=False).logits.numpy()
        return cls(logits[0, -2], logits[:, -1])

    def choose(self, tokens: Tokens, sampling: Sampling) -> int:
        """The model's token behind `tokens` (the prompt, or one more) by coupling."""
        logits = self.first if len(tokens) == len(PROMPT) else self.second[tokens[-1]]
        return choose_token(logits, sampling, len(tokens), tokens)

    def pair_probabilities(self, sampling: Sampling) -> Floats:
        """Exact probability of each pair of tokens, `[V, V]`."""
        first = probabilities(self.first, sampling)
        return first[:, None] * np.stack([probabilities(row, sampling) for row in self.second])


def probabilities(logits: npt.NDArray[np.float32], sampling: Sampling) -> Floats:
    """Softmax at the temperature, cut to the nucleus; written down here once more, apart from the coupling."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    weights /= weights.sum()
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= sampling.top_p]] = 0.0
    return weights / weights.sum()


def chi_square_p(counts: npt.NDArray[np.int64], exact: Floats) -> float:
    """p-value of `counts` against the probabilities `exact` (equal shapes). A token that cannot be is p = 0.

    Cells with an expectation below 5 are put together, the smallest first.
    """
    counts, expected = counts.reshape(-1), exact.reshape(-1) * counts.sum()
    if counts[expected == 0.0].any():
        return 0.0
    order = np.argsort(expected, kind="stable")
    observed, wanted = counts[order].astype(np.float64), expected[order]
    num_small = int(np.searchsorted(wanted, _MIN_EXPECTED))
    if num_small:
        num_small = max(num_small, int(np.searchsorted(np.cumsum(wanted), _MIN_EXPECTED)) + 1)
        observed = np.append(observed[num_small:], observed[:num_small].sum())
        wanted = np.append(wanted[num_small:], wanted[:num_small].sum())
    if len(wanted) < 2:
        raise ValueError(f"{int(counts.sum())} observations are too few for a chi-square test")
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    return float(chi2.sf(statistic, df=len(wanted) - 1))


def pair_test(pairs: Pairs, exact: Floats) -> dict[str, float]:
    """p-values of the first token, the second and the pair; `exact` `[V, V]`."""
    counts = np.zeros(exact.shape, np.int64)
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    return {
        "first": chi_square_p(counts.sum(axis=1), exact.sum(axis=1)),
        "second": chi_square_p(counts.sum(axis=0), exact.sum(axis=0)),
        "pair": chi_square_p(counts, exact),
    }


def with_seed(sampling: Sampling, seed: int) -> Sampling:
    """`sampling` with another seed."""
    return Sampling(seed=seed, temperature=sampling.temperature, top_p=sampling.top_p)


def served_pairs(
    verifier: Verifier, kv: KvAccount, draft: Table, sampling: Sampling, num_seeds: int, progress: Progress
) -> tuple[Pairs, float]:
    """The first two tokens of `num_seeds` sessions served with drafts, and the acceptance rate."""
    pairs: list[Tokens] = []
    num_verified = num_accepted = 0

    def chain(opened: Open, committed: Tokens) -> Tokens | None:
        tokens = committed
        while len(tokens) < opened.end - 1:
            tokens = np.append(tokens, np.int32(draft.choose(tokens, opened.sampling)))
        return tokens[len(committed) :] if len(tokens) > len(committed) else None

    for seeds in _batches(num_seeds):
        recorder = Recorder(verifier)
        engine = make_engine(recorder, kv, EngineConfig(**ALONE, max_pass_tokens=_BATCH * 16, max_pass_sessions=_BATCH))
        opens = [_open(seed, with_seed(sampling, _FIRST_SEED + seed)) for seed in seeds]
        final = drive(engine, opens, chain, opens_per_step=_BATCH)
        pairs += [final[opened.session][len(PROMPT) : len(PROMPT) + 2] for opened in opens]
        for one in recorder.passes:
            for item, outcome in zip(one.items, one.outcomes, strict=True):
                num_verified += item.num_draft_tokens
                num_accepted += count_accepted(item.tokens[item.first_choice_position :], outcome.chosen)
        progress.step(len(opens))
    return np.stack(pairs).astype(np.int64), num_accepted / num_verified


def _batches(num_seeds: int) -> list[range]:
    return [range(start, min(start + _BATCH, num_seeds)) for start in range(0, num_seeds, _BATCH)]


def _open(number: int, sampling: Sampling) -> Open:
    return Open(f"{number:032x}", PROMPT, len(PROMPT), _NUM_NEW_TOKENS, sampling, Slo(1000.0, 1000.0))


def wrong_pairs(target: Table, draft: Table, sampling: Sampling, num_seeds: int) -> dict[str, Pairs]:
    """What two wrong samplers give for the same seeds; every other token is chosen rightly."""

    def trusting(tokens: Tokens, seeded: Sampling) -> int:
        return draft.choose(tokens, seeded)

    def redrawing(tokens: Tokens, seeded: Sampling) -> int:
        if draft.choose(tokens, seeded) == (own := target.choose(tokens, seeded)):
            return own
        return target.choose(tokens, with_seed(sampling, seeded.seed + num_seeds))

    found = {}
    for name, choose in (("the draft's distribution", trusting), ("fresh noise at a rejection", redrawing)):
        pairs = np.empty((num_seeds, 2), np.int64)
        for i in range(num_seeds):
            seeded, tokens = with_seed(sampling, _FIRST_SEED + i), PROMPT
            for place in range(2):
                tokens = np.append(tokens, np.int32(choose(tokens, seeded)))
                pairs[i, place] = tokens[-1]
        found[name] = pairs
    return found


def random_model(seed: int) -> PreTrainedModel:
    """A random Llama with a definite, not too narrow distribution."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def small_verifier(model: PreTrainedModel) -> TorchVerifier:
    """The real verifier on `model`, with memory for a batch."""
    with tempfile.TemporaryDirectory(prefix="wisp-lossless-") as folder:
        model.save_pretrained(folder)
        return load_verifier(VerifierConfig(folder, "cpu", "float32", kv_tokens=_BATCH * 16, kv_block_tokens=8))


@dataclass(frozen=True, slots=True)
class DistributionResult:
    """p-values by way of choosing and place; those of wrong samplers by their name; acceptance by way of choosing."""

    p_values: Mapping[str, Mapping[str, float]]
    wrong_p_values: Mapping[str, Mapping[str, Mapping[str, float]]]
    acceptance: Mapping[str, float]

    @property
    def least_p(self) -> float:
        """The least p-value of the right sampler: must be at least `threshold()`."""
        return min(p for test in self.p_values.values() for p in test.values())

    @property
    def greatest_wrong_p(self) -> float:
        """The pair's p-value of the wrong sampler that comes off best: must be below `threshold()`."""
        return max(test["pair"] for tests in self.wrong_p_values.values() for test in tests.values())


def threshold() -> float:
    """A p-value below this fails."""
    return FALSE_ALARM_PROBABILITY / NUM_TESTS


def run(num_seeds: int) -> DistributionResult:
    """The whole test with `num_seeds` sessions for each of `SAMPLINGS`. Call it with one torch thread: it is faster."""
    target_model, draft_model = random_model(1), random_model(2)
    target, draft = Table.of(target_model), Table.of(draft_model)
    verifier = small_verifier(target_model)
    p_values, wrong, acceptance = {}, {}, {}
    for name, sampling in SAMPLINGS.items():
        exact = target.pair_probabilities(sampling)
        with Progress(num_seeds, f"distribution, {name}") as progress:
            pairs, acceptance[name] = served_pairs(verifier, verifier.pool, draft, sampling, num_seeds, progress)
        p_values[name] = pair_test(pairs, exact)
        wrong[name] = {
            label: pair_test(found, exact) for label, found in wrong_pairs(target, draft, sampling, num_seeds).items()
        }
    return DistributionResult(p_values, wrong, acceptance)
