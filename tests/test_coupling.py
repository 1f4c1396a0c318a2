"""Seeded coupling: golden vectors, an independent big-integer reference, numpy against torch, the distribution.

`python tests/test_coupling.py` writes tests/golden/coupling.json anew, from the reference below alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from triton_models.torch_coupling import (
    ChoiceRow,
    choose_on_device,
    choose_tokens,
    chosen_logprobs,
    device_hash,
    keep_top_p,
    noise_keys,
)
from wisp_plugin import coupling
from wisp_plugin.errors import InvalidRequest, ModelError
from wisp_plugin.messages import Sampling, Tokens

GOLDEN = Path(__file__).parent / "golden" / "coupling.json"
FALSE_ALARM = 1e-6  # probability that a chi-square test here fails on a right implementation (per fresh set of seeds)
SEEDS = st.integers(0, 2**63 - 1)
POSITIONS = st.integers(0, 2**31)
NO_CONTEXT = np.zeros(0, np.int32)


# --- the reference: plain Python integers and floats, straight from DESIGN.md section 3


def reference_splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def reference_fmix32(h: int) -> int:
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def reference_hash(seed: int, position: int, token: int) -> int:
    key = reference_splitmix64(reference_splitmix64(seed) ^ position)
    return reference_fmix32(reference_fmix32(token ^ key % 2**32) ^ key >> 32)


def reference_gumbel(seed: int, position: int, token: int) -> float:
    return -math.log(-math.log((reference_hash(seed, position, token) + 0.5) / 2**32))


def reference_choice(logits: list[float], sampling: Sampling, position: int, context: list[int]) -> int:
    """Section 3 with sorted lists; unfit for inputs within rounding of a tie or of top_p."""
    z = {token: float(logit) for token, logit in enumerate(logits)}
    for token in set(context):
        z[token] *= sampling.repetition_penalty if z[token] < 0 else 1 / sampling.repetition_penalty
    z = {token: value for token, value in z.items() if token not in sampling.banned_token_ids}
    if sampling.temperature == 0:
        return max(z, key=lambda token: (z[token], -token))
    z = {token: value / sampling.temperature for token, value in z.items()}
    if sampling.top_k:
        threshold = sorted(z.values(), reverse=True)[: sampling.top_k][-1]
        z = {token: value for token, value in z.items() if value >= threshold}
    if sampling.top_p < 1:
        total, cumulative, kept = sum(math.exp(value) for value in z.values()), 0.0, {}
        for token in sorted(z, key=lambda token: (-z[token], token)):
            if cumulative >= sampling.top_p * total:
                break
            kept[token] = z[token]
            cumulative += math.exp(z[token])
        z = kept
    return max(z, key=lambda token: (z[token] + reference_gumbel(sampling.seed, position, token), -token))


def golden_logits(case: int) -> list[float]:
    """64 values with 16 binary places, from the reference hash: exact in float32."""
    return [reference_hash(case, 0, token) % 2**20 / 2**16 - 8 for token in range(64)]


def make_golden() -> dict[str, Any]:
    places = [(0, 0, 0), (1, 0, 1), (1, 1, 0), (42, 17, 49_151), (2**63 - 1, 2**31, 151_935), (2**62 + 3, 5, 65_536)]
    hashes = [[*place, reference_hash(*place), reference_gumbel(*place)] for place in places]
    parameters = [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.5, "top_p": 0.8}]
    parameters.append({"temperature": 1.2, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.3})
    choices = []
    for case, parameter in enumerate(parameters * 4):
        sampling = Sampling(seed=case * 977, banned_token_ids=(3, 9), **parameter)
        context = [case, 7, case, 40]
        chosen = reference_choice(golden_logits(case), sampling, 100 + case, context)
        choices.append({"case": case, "position": 100 + case, "context": context, "chosen": chosen, **parameter})
    return {"hashes": hashes, "choices": choices}


# --- the hash and the noise


def test_golden_vectors() -> None:
    golden = json.loads(GOLDEN.read_text())
    for seed, position, token, expected_hash, expected_noise in golden["hashes"]:
        ids = np.array([token], np.uint32)
        assert coupling.noise_hash(seed, position, ids).tolist() == [expected_hash]
        assert coupling.gumbel(seed, position, ids)[0] == pytest.approx(expected_noise, rel=1e-14)
    for choice in golden["choices"]:
        case, position, context, chosen = (choice.pop(name) for name in ("case", "position", "context", "chosen"))
        sampling = Sampling(seed=case * 977, banned_token_ids=(3, 9), **choice)
        logits = np.array(golden_logits(case), np.float32)
        assert coupling.choose_token(logits, sampling, position, np.array(context, np.int32)) == chosen


@settings(deadline=None)
@given(SEEDS, POSITIONS, st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
def test_hash_equals_reference(seed: int, position: int, tokens: list[int]) -> None:
    found = coupling.noise_hash(seed, position, np.array(tokens, np.uint32))
    assert found.dtype == np.uint32
    assert found.tolist() == [reference_hash(seed, position, token) for token in tokens]


@settings(max_examples=25, deadline=None)
@given(SEEDS, POSITIONS, st.integers(1, 200_000))
def test_hash_and_noise_of_a_vocabulary_in_numpy_and_torch(seed: int, position: int, vocab_size: int) -> None:
    hashes = coupling.noise_hash(seed, position, np.arange(vocab_size))
    rows = [ChoiceRow(Sampling(seed=seed, temperature=1.0), at, NO_CONTEXT) for at in (position, position + 1)]
    keys, _ = noise_keys(torch.empty(2, vocab_size), rows)
    on_device = device_hash(vocab_size, keys).numpy()
    assert np.array_equal(on_device[0], hashes)
    assert np.array_equal(on_device[1], coupling.noise_hash(seed, position + 1, np.arange(vocab_size)))
    noise = coupling.gumbel(seed, position, np.arange(vocab_size))
    assert -3.2 < noise.min() <= noise.max() < 22.9
    # An element's noise must not depend on the shape of the array around it (SIMD and its remainder).
    some = np.arange(0, vocab_size, 7)
    assert np.array_equal(coupling.gumbel(seed, position, some), noise[some])


@pytest.mark.parametrize("noise", [-4.0, -3.0, 0.0, 1.0, 5.0, 15.0, 22.8])
def test_threshold_never_excludes_enough_noise(noise: float) -> None:
    threshold = int(coupling._least_hash(noise))
    if threshold:
        assert coupling._noise(np.array([threshold - 1], np.uint32))[0] < noise
        assert coupling._noise(np.array([min(threshold + 2**17, 2**32 - 1)], np.uint32))[0] >= noise


# --- the choice


@st.composite
def choices(draw: st.DrawFn) -> tuple[np.ndarray, ChoiceRow]:
    """A row of logits (rough values make ties; some -inf) with a way to choose from it."""
    vocab_size = draw(st.one_of(st.integers(1, 50), st.integers(1, 60_000)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.standard_normal(vocab_size) * draw(st.sampled_from([0.0, 0.1, 1.0, 3.5, 30.0, 1e4]))
    logits += draw(st.sampled_from([0.0, -7.0, 1e6]))
    if draw(st.booleans()):
        logits = np.round(logits)  # ties
    if draw(st.booleans()):
        logits[rng.random(vocab_size) < 0.3] = -np.inf
    logits[rng.integers(vocab_size)] = draw(st.sampled_from([0.0, 20.0]))
    banned = draw(st.sampled_from([(), (), tuple(rng.integers(0, vocab_size, 3).tolist())]))
    if np.all(np.delete(logits, list(banned)) == -np.inf):
        banned = ()
    sampling = Sampling(
        seed=draw(SEEDS),
        temperature=draw(st.sampled_from([0.0, 1e-4, 0.3, 0.7, 1.0, 1.0, 5.0, 1e4])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 40, 1500, 20_000, 10**6])),
        top_p=draw(st.sampled_from([1.0, 1.0, 1e-9, 0.5, 0.9, 0.95, 1 - 1e-12])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.8])),
        banned_token_ids=banned,
    )
    context = rng.integers(0, vocab_size, draw(st.integers(0, 300))).astype(np.int32)
    return logits.astype(np.float32), ChoiceRow(sampling, draw(POSITIONS), context)


@settings(max_examples=300, deadline=None)
@given(choices(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_every_path_takes_the_argmax_of_final_scores(case: tuple[np.ndarray, ChoiceRow], dtype: torch.dtype) -> None:
    logits, row = case
    tensor = torch.from_numpy(logits).clamp(max=6e4).to(dtype)[None]
    exact = tensor[0].double().numpy() if dtype == torch.float64 else tensor[0].float().numpy()
    untouched = exact.copy()
    scores = coupling.final_scores(exact, row.sampling, row.position, row.context)
    expected = int(scores.argmax())
    assert coupling.choose_token(exact, row.sampling, row.position, row.context) == expected
    assert choose_tokens(tensor, [row]).tolist() == [expected]
    assert choose_on_device(tensor, [row]).tolist() == [expected]
    assert np.array_equal(exact, untouched)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32), SEEDS, POSITIONS, st.data())
def test_choice_equals_reference(vocab_size: int, noise: int, seed: int, position: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(noise)
    logits = (rng.standard_normal(vocab_size) * 3).astype(np.float32)
    sampling = Sampling(
        seed=seed,
        temperature=data.draw(st.sampled_from([0.0, 0.6, 1.0, 2.0])),
        top_k=data.draw(st.sampled_from([0, 1, 5, 30])),
        top_p=data.draw(st.sampled_from([1.0, 0.3, 0.9])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.2])),
        banned_token_ids=data.draw(st.sampled_from([(), (0,)])) if vocab_size > 1 else (),
    )
    context = rng.integers(0, vocab_size, 8).astype(np.int32)
    expected = reference_choice(logits.tolist(), sampling, position, context.tolist())
    assert coupling.choose_token(logits, sampling, position, context) == expected


@pytest.mark.parametrize("seed", range(8))
def test_a_batch_of_unlike_rows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row by its own parameters, also when the rows are cut into chunks on a device."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((9, 3000)) * 3.5).astype(np.float32)
    parameters: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.95}]
    parameters += [{"temperature": 1.3, "top_k": 20, "repetition_penalty": 1.2}, {"repetition_penalty": 1.5}]
    rows = []
    for i in range(9):
        context = rng.integers(0, 3000, 40).astype(np.int32)
        rows.append(ChoiceRow(Sampling(seed=i, **parameters[i % 5]), 1000 * seed + i, context))
    expected = [
        int(coupling.final_scores(logits[i], row.sampling, row.position, row.context).argmax())
        for i, row in enumerate(rows)
    ]
    assert choose_tokens(torch.from_numpy(logits), rows).tolist() == expected
    monkeypatch.setattr("triton_models.torch_coupling._CHUNK_ELEMENTS", 4 * 3000)
    assert choose_on_device(torch.from_numpy(logits), rows).tolist() == expected


def test_ties_go_to_the_lowest_id() -> None:
    logits = np.array([1.0, 5.0, 5.0, -np.inf, 5.0], np.float32)
    for path in (choose_tokens, choose_on_device):
        greedy = ChoiceRow(Sampling(banned_token_ids=(1,)), 0, NO_CONTEXT)
        plain = ChoiceRow(Sampling(), 0, NO_CONTEXT)
        assert path(torch.from_numpy(np.stack((logits, logits))), [plain, greedy]).tolist() == [1, 2]
    # A whole nucleus of equals: the lowest ids stay. Top-k keeps all that equal the k-th best.
    equal = np.zeros(10, np.float32)
    kept = coupling.filter_logits(equal, Sampling(temperature=1.0, top_p=0.35), NO_CONTEXT)
    assert np.flatnonzero(kept > -np.inf).tolist() == [0, 1, 2, 3]
    kept = coupling.filter_logits(equal, Sampling(temperature=1.0, top_k=3), NO_CONTEXT)
    assert np.all(kept == 0.0)


@pytest.mark.parametrize("tail_size", [400, 3000])
def test_winners_far_behind_the_best_logit_are_found(tail_size: int) -> None:
    """One token against a crowd 7 below it, of 0.4 and 2.7 times its weight: the crowd wins often, and narrowly."""
    rng = np.random.default_rng(tail_size)
    logits = np.concatenate((rng.normal(0.0, 0.3, tail_size), [7.0])).astype(np.float32)
    num_from_tail = 0
    for position in range(600):
        sampling = Sampling(seed=tail_size, temperature=1.0)
        expected = int(
            (logits.astype(np.float64) + coupling.gumbel(tail_size, position, np.arange(len(logits)))).argmax()
        )
        assert coupling.choose_token(logits, sampling, position, NO_CONTEXT) == expected
        num_from_tail += expected < tail_size
    assert 50 < num_from_tail < 550


def test_equal_scores_go_to_the_lowest_id() -> None:
    """Beside a logit of 3e38 noise is lost in rounding, so all scores are equal."""
    logits = np.full(3000, 3e38, np.float32)
    logits[:7] = 0.0
    row = ChoiceRow(Sampling(seed=5, temperature=1.0), 11, NO_CONTEXT)
    for path in (choose_tokens, choose_on_device):
        assert path(torch.from_numpy(logits)[None], [row]).tolist() == [7]


def test_nucleus_on_a_device_is_that_of_numpy() -> None:
    logits = np.random.default_rng(8).standard_normal((500, 200))
    samplings = [Sampling(temperature=1.0, top_p=0.002 * i + 0.001) for i in range(499)] + [Sampling()]
    z = torch.from_numpy(logits.copy())
    is_unclear = keep_top_p(z, [ChoiceRow(sampling, 0, NO_CONTEXT) for sampling in samplings])
    expected = [coupling.filter_logits(*pair, NO_CONTEXT) for pair in zip(logits, samplings, strict=True)]
    assert not is_unclear.any()
    assert np.array_equal(z.numpy(), np.stack(expected))
    z = torch.zeros(1, 10, dtype=torch.float64)  # 5 of 10 equals are exactly a half: rounding decides, so the host must
    assert keep_top_p(z, [ChoiceRow(Sampling(temperature=1.0, top_p=0.5), 0, NO_CONTEXT)]).tolist() == [True]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 7, 200]), st.sampled_from([0.1, 0.9, 0.999]))
def test_filters_are_those_of_transformers(noise: int, top_k: int, top_p: float) -> None:
    rng = np.random.default_rng(noise)
    logits = rng.standard_normal(500) * 3
    context = rng.integers(0, 500, 50)
    scores, ids = torch.from_numpy(logits)[None], torch.from_numpy(context)[None]
    scores = RepetitionPenaltyLogitsProcessor(1.2)(ids, scores) / 0.8
    scores = TopPLogitsWarper(top_p)(ids, TopKLogitsWarper(top_k)(ids, scores))
    sampling = Sampling(temperature=0.8, top_k=top_k, top_p=top_p, repetition_penalty=1.2)
    found = coupling.filter_logits(logits, sampling, context.astype(np.int32))
    np.testing.assert_allclose(found, scores[0].numpy(), rtol=1e-12)


def test_count_accepted() -> None:
    def count(draft: list[int], chosen: list[int]) -> int:
        return coupling.count_accepted(np.array(draft, np.int32), np.array(chosen, np.int32))

    assert [count([], [4]), count([4], [4, 5]), count([4, 6, 7], [4, 5, 7, 8]), count([1], [4, 5])] == [0, 1, 1, 0]


def test_logprobs() -> None:
    logits = np.random.default_rng(1).standard_normal((3, 50_000)).astype(np.float32) * 4 + 100
    expected = torch.from_numpy(logits).double().log_softmax(dim=1)[range(3), [0, 5, 49_999]].numpy()
    tokens = np.array([0, 5, 49_999], np.int32)
    np.testing.assert_allclose(chosen_logprobs(torch.from_numpy(logits), tokens), expected, atol=2e-5)
    assert coupling.chosen_logprob(logits[1], 5) == pytest.approx(expected[1], abs=2e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_logits_are_refused(temperature: float, bad: float) -> None:
    logits = np.full(100, -np.inf if bad == -np.inf else 1.0, np.float32)
    logits[50] = bad
    row = ChoiceRow(Sampling(temperature=temperature, top_p=0.9, banned_token_ids=(50,)), 3, NO_CONTEXT)
    with pytest.raises(ModelError):
        coupling.choose_token(logits, row.sampling, row.position, row.context)
    for path in (choose_tokens, choose_on_device):
        with pytest.raises(ModelError):
            path(torch.from_numpy(logits)[None], [row])


@pytest.mark.parametrize(
    ("sampling", "context", "message"),
    [
        (Sampling(temperature=1.0, banned_token_ids=(9,)), [], "banned token id is outside .* 0 to 8"),
        (Sampling(repetition_penalty=1.1), [-1], "context token id is outside"),
        (Sampling(temperature=-1.0), [], "temperature is -1.0; allowed"),
        (Sampling(temperature=math.nan), [], "temperature is nan; allowed"),
    ],
)
def test_bad_parameters_are_refused(sampling: Sampling, context: list[int], message: str) -> None:
    row = ChoiceRow(sampling, 0, np.array(context, np.int32))
    for path in (choose_tokens, choose_on_device):
        with pytest.raises(InvalidRequest, match=message):
            path(torch.zeros(1, 9), [row])


# --- the distribution and the coupling of two models


def chi_square_p_value(observed: np.ndarray, probabilities: np.ndarray) -> float:
    """Upper tail for an even number of degrees of freedom (the closed form)."""
    expected = probabilities * observed.sum()
    half, degrees = float(((observed - expected) ** 2 / expected).sum()) / 2, len(observed) - 1
    assert degrees % 2 == 0
    assert expected.min() > 5
    return math.exp(-half) * sum(half**i / math.factorial(i) for i in range(degrees // 2))


def choose_many(logits: np.ndarray, places: list[tuple[int, int]], **parameters: Any) -> np.ndarray:
    return np.array(
        [
            coupling.choose_token(logits, Sampling(seed=seed, temperature=0.9, **parameters), position, NO_CONTEXT)
            for seed, position in places
        ]
    )


SMALL_LOGITS = np.random.default_rng(3).standard_normal(11).astype(np.float32)


@pytest.mark.parametrize("places", ["seeds", "positions"])
def test_choices_follow_the_softmax(places: str) -> None:
    """Chi-square over 8,000 seeds at one position, and over 8,000 positions of one seed; also of neighbours."""
    where = [(i, 77) if places == "seeds" else (77, i) for i in range(8000)]
    tokens = choose_many(SMALL_LOGITS, where)
    probabilities = np.exp(SMALL_LOGITS.astype(np.float64) / 0.9)
    probabilities /= probabilities.sum()
    assert chi_square_p_value(np.bincount(tokens, minlength=11), probabilities) > FALSE_ALARM
    # Neighbouring seeds or positions are independent: pairs of (token groups) follow the product.
    groups, mass = tokens % 3, np.array([probabilities[i::3].sum() for i in range(3)])
    pairs = np.bincount(3 * groups[0::2] + groups[1::2], minlength=9)
    assert chi_square_p_value(pairs, np.outer(mass, mass).ravel()) > FALSE_ALARM


def test_filtered_choices_follow_the_filtered_softmax() -> None:
    tokens = choose_many(SMALL_LOGITS, [(seed, 5) for seed in range(8000)], top_k=5, top_p=0.999)
    kept = np.sort(np.argsort(SMALL_LOGITS)[-5:])
    assert set(tokens.tolist()) == set(kept.tolist())
    weights = np.exp(SMALL_LOGITS[kept].astype(np.float64) / 0.9)
    assert chi_square_p_value(np.bincount(tokens, minlength=11)[kept], weights / weights.sum()) > FALSE_ALARM


@pytest.mark.parametrize("distance", [0.0, 0.3, 1.0, 3.0])
def test_draft_and_target_agree_as_often_as_promised(distance: float) -> None:
    """At least (1-TV)/(1+TV) of the choices agree (Daliri et al. 2024), less five standard errors."""
    target_logits = SMALL_LOGITS * 2
    draft_logits = target_logits + distance * np.random.default_rng(4).standard_normal(11).astype(np.float32)
    places: list[tuple[int, int]] = [(seed, seed % 13) for seed in range(4000)]
    agreed = float((choose_many(target_logits, places) == choose_many(draft_logits, places)).mean())
    target, draft = (np.exp(logits.astype(np.float64) / 0.9) for logits in (target_logits, draft_logits))
    distance_tv = 0.5 * np.abs(target / target.sum() - draft / draft.sum()).sum()
    promised = (1 - distance_tv) / (1 + distance_tv)
    assert agreed >= promised - 5 * math.sqrt(promised * (1 - promised) / len(places))
    assert agreed <= 1 - distance_tv + 5 * math.sqrt(0.25 / len(places))  # no scheme does better than 1 - TV


def test_context_before_each_position_is_its_own() -> None:
    """The penalty of a row sees that row's context only, draft tokens included."""
    logits = torch.tensor([[2.0, 1.9, 0.0]]).repeat(2, 1)
    committed: Tokens = np.array([2], np.int32)
    with_draft: Tokens = np.array([2, 0], np.int32)
    sampling = Sampling(repetition_penalty=1.2)
    rows = [ChoiceRow(sampling, 1, committed), ChoiceRow(sampling, 2, with_draft)]
    assert choose_tokens(logits, rows).tolist() == choose_on_device(logits, rows).tolist() == [0, 1]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(make_golden(), indent=1) + "\n")
