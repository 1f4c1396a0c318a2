"""The packed forward against plain transformers, one session at a time (sdpa, DynamicCache)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from triton_models.packed_linear import PackedLinear, pack_linears
from triton_models.target_model import load_target
from triton_models.torch_verifier import TorchVerifier, load_verifier
from wisp_plugin import coupling
from wisp_plugin.config import VerifierConfig
from wisp_plugin.errors import CapacityError, ConfigError, ModelError
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.messages import PassItem, Sampling, Tokens

VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # logits of a spread that makes choices and rejections definite
    "eos_token_id": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}
SAMPLED = Sampling(seed=5, temperature=0.9, top_k=40, top_p=0.95)


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models with random weights."""
    folders = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(7)
        folders[name] = tmp_path_factory.mktemp("models") / name
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
    return folders


@pytest.fixture(params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, model_dirs: dict[str, Path]) -> Path:
    return model_dirs[request.param]


def make_verifier(folder: Path, num_blocks: int = 64, gather: bool = False) -> TorchVerifier:
    target = load_target(VerifierConfig(target=str(folder), device="cpu"))
    return TorchVerifier(target, BlockPool(num_blocks, 4), gather=gather)


def plain_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, tokens: Tokens, num_cached: int) -> torch.Tensor:
    """Logits `[num_new, V]` of the tokens behind `num_cached`, with transformers' own cache."""
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    cache = model(input_ids=ids[:, :num_cached], use_cache=True).past_key_values if num_cached else None
    return model(input_ids=ids[:, num_cached:], past_key_values=cache, use_cache=True).logits[0]


def random_tokens(seed: int, num_tokens: int) -> Tokens:
    return np.random.default_rng(seed).integers(0, VOCAB, num_tokens).astype(np.int32)


def chunk(session: str, tokens: Tokens, start: int) -> PassItem:
    return PassItem(session, tokens, start, 0, Sampling(), is_prefill_chunk=True)


def step_by_step(model: PreTrainedModel, prompt: Tokens, sampling: Sampling, num_tokens: int) -> Tokens:
    """The target alone: one token at a time, no cache, choice by coupling with the true context."""
    tokens = prompt
    for _ in range(num_tokens):
        logits = plain_logits(model, tokens, 0)[-1].numpy()
        chosen = coupling.choose_token(logits, sampling, len(tokens), tokens)
        tokens = np.append(tokens, np.int32(chosen))
    return tokens


@pytest.mark.parametrize("gather", [False, True])
def test_ragged_pass_equals_plain_transformers(folder: Path, gather: bool) -> None:
    verifier, plain = make_verifier(folder, gather=gather), plain_model(folder)
    # (cached, new, drafts): decode, verify, across block boundaries (4), whole prefill, a chunk behind cached tokens
    shapes = [(5, 1, 0), (8, 5, 4), (3, 2, 1), (16, 9, 8), (0, 12, 0), (7, 24, 0), (12, 4, 3)]
    tokens = [random_tokens(i, cached + new) for i, (cached, new, _) in enumerate(shapes)]
    for i, (cached, _, _) in enumerate(shapes):
        if cached:
            verifier.run([chunk(f"s{i}", tokens[i][:cached], 0)])
    items = [PassItem(f"s{i}", tokens[i], cached, drafts, Sampling()) for i, (cached, _, drafts) in enumerate(shapes)]
    logits = verifier.compute_logits(items)
    expected = [plain_logits(plain, item.tokens, item.num_cached)[-item.num_choices :] for item in items]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)
    verifier.cache.check_integrity()


def test_prefill_in_chunks_chooses_only_at_the_end(folder: Path) -> None:
    verifier, plain = make_verifier(folder), plain_model(folder)
    tokens = random_tokens(1, 30)
    for start, end in ((0, 7), (7, 8), (8, 21)):
        (outcome,) = verifier.run([chunk("a", tokens[:end], start)])
        assert len(outcome.chosen) == 0
        assert verifier.pool.length("a") == end
    (outcome,) = verifier.run([PassItem("a", tokens, 21, 0, Sampling())])
    assert outcome.chosen.tolist() == [int(plain_logits(plain, tokens, 0)[-1].argmax())]


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED, Sampling(seed=3, temperature=1.0, repetition_penalty=1.6)])
def test_drafts_right_and_wrong_give_the_tokens_of_the_target_alone(
    folder: Path, sampling: Sampling, gather: bool
) -> None:
    verifier = make_verifier(folder, gather=gather)
    truth = step_by_step(plain_model(folder), random_tokens(2, 9), sampling, 24)
    rng, tokens, num_cached = np.random.default_rng(0), truth[:9], 0
    while len(tokens) < 33:
        num_right, num_drafts = int(rng.integers(0, 4)), int(rng.integers(0, 6))
        draft = truth[len(tokens) : len(tokens) + num_drafts].copy()
        draft[num_right : num_right + 1] = (draft[num_right : num_right + 1] + 1) % VOCAB  # the first wrong one
        item = PassItem("a", np.concatenate([tokens, draft]), num_cached, len(draft), sampling)
        (outcome,) = verifier.run([item])
        num_accepted = coupling.count_accepted(draft, outcome.chosen)
        assert num_accepted == min(num_right, len(draft))
        num_cached = len(tokens) + num_accepted
        assert verifier.pool.length("a") == num_cached
        tokens = np.concatenate([tokens, outcome.chosen[: num_accepted + 1]])[:33]
        assert tokens.tolist() == truth[: len(tokens)].tolist()


def test_eviction_and_recompute_change_nothing(folder: Path) -> None:
    truth = step_by_step(plain_model(folder), random_tokens(3, 10), SAMPLED, 12)
    verifier = make_verifier(folder)
    num_cached = 0
    for end in range(10, 22):
        if end % 4 == 0:
            verifier.release("a")
            num_cached = 0
            assert verifier.pool.num_free == 64
        (outcome,) = verifier.run([PassItem("a", truth[:end], num_cached, 0, SAMPLED)])
        assert outcome.chosen.tolist() == [truth[end]]
        num_cached = end


@pytest.mark.parametrize("gather", [False, True])
def test_an_adopted_prefix_gives_the_same_logits_and_leaves_its_owner_alone(folder: Path, gather: bool) -> None:
    verifier, plain = make_verifier(folder, gather=gather), plain_model(folder)
    system = random_tokens(11, 22)  # five blocks and a half
    own, other = (np.concatenate([system, random_tokens(seed, 9)]) for seed in (12, 13))
    verifier.run([chunk("a", own[:28], 0)])
    num_cached = verifier.pool.adopt("b", other)
    assert num_cached == 22
    items = [PassItem("a", own, 28, 1, Sampling()), PassItem("b", other, num_cached, 3, Sampling())]
    logits = verifier.compute_logits(items)
    expected = [plain_logits(plain, item.tokens, 0)[-item.num_choices :] for item in items]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert len(set(verifier.pool.blocks("a")) & set(verifier.pool.blocks("b"))) == 5
    verifier.cache.check_integrity()


def test_sessions_that_share_give_the_tokens_of_the_target_alone(model_dirs: dict[str, Path]) -> None:
    verifier, plain = make_verifier(model_dirs["llama"], num_blocks=40), plain_model(model_dirs["llama"])
    system = random_tokens(14, 14)
    prompts = [np.concatenate([system, random_tokens(20 + i, 1 + 2 * i)]) for i in range(3)]
    truths = [step_by_step(plain, prompt, SAMPLED, 10) for prompt in prompts]
    lengths = {0: (len(prompts[0]), 0)}  # committed and cached tokens of the sessions that have begun
    for _ in range(8):
        items = []
        for i, (num_tokens, num_cached) in lengths.items():
            draft = truths[i][num_tokens : num_tokens + 2].copy()
            draft[1:] = (draft[1:] + 1) % VOCAB  # right, then wrong: KV is written and cut off in every pass
            tokens = np.concatenate([truths[i][:num_tokens], draft])
            items.append(PassItem(str(i), tokens, num_cached, len(draft), SAMPLED))
        for i, (item, outcome) in enumerate(zip(items, verifier.run(items), strict=True)):
            first = item.first_choice_position
            num_accepted = coupling.count_accepted(item.tokens[first:], outcome.chosen)
            assert num_accepted == min(item.num_draft_tokens, 1)
            assert outcome.chosen[0] == truths[i][first]
            lengths[i] = (min(first + num_accepted + 1, len(truths[i]) - 1), first + num_accepted)
            lengths[i] = lengths[i][0], min(lengths[i][1], lengths[i][0] - 1)
        if len(lengths) < len(prompts):
            new = len(lengths)
            lengths[new] = len(prompts[new]), verifier.pool.adopt(str(new), prompts[new])
            assert lengths[new][1] >= 12
    verifier.cache.check_integrity()


def test_a_copy_that_fails_leaves_nothing_to_rely_on(
    model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier = make_verifier(model_dirs["llama"])
    tokens = random_tokens(0, 8)
    verifier.run([chunk("a", tokens, 0)])
    num_cached = verifier.pool.adopt("b", tokens)

    def fail(*_: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(verifier.cache, "copy_blocks", fail)
    with pytest.raises(MemoryError):
        verifier.run([PassItem("b", tokens, num_cached, 0, Sampling())])
    assert (verifier.pool.length("a"), verifier.pool.length("b")) == (8, 0)


def test_num_cached_below_the_held_length_drops_the_rest(folder: Path) -> None:
    verifier, plain = make_verifier(folder), plain_model(folder)
    verifier.run([chunk("a", random_tokens(4, 20), 0)])
    tokens = np.concatenate([random_tokens(4, 20)[:6], random_tokens(5, 9)])  # another continuation behind 6
    logits = verifier.compute_logits([PassItem("a", tokens, 6, 0, Sampling())])
    torch.testing.assert_close(logits, plain_logits(plain, tokens, 0)[-1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gather", [False, True])
def test_scattered_blocks_give_the_same_logits(folder: Path, gather: bool) -> None:
    verifier, plain = make_verifier(folder, num_blocks=8, gather=gather), plain_model(folder)
    for session in "abcdefgh":
        verifier.run([chunk(session, random_tokens(0, 4), 0)])
    for session in "abcdefgh":
        if verifier.pool.blocks(session)[0] % 2:
            verifier.release(session)
    tokens = random_tokens(6, 15)
    verifier.run([chunk("z", tokens[:10], 0)])
    logits = verifier.compute_logits([PassItem("z", tokens, 10, 2, Sampling())])
    assert verifier.cache.view("z").start is None
    torch.testing.assert_close(logits, plain_logits(plain, tokens, 10)[-3:], rtol=1e-4, atol=1e-4)


def test_logprobs_are_of_the_unfiltered_distribution(folder: Path) -> None:
    verifier, plain = make_verifier(folder), plain_model(folder)
    tokens = random_tokens(8, 12)
    items = [
        PassItem("a", tokens, 0, 3, SAMPLED, logprobs=True),
        PassItem("b", tokens[:5], 0, 0, SAMPLED),
    ]
    with_logprobs, without = verifier.run(items)
    expected = torch.log_softmax(plain_logits(plain, tokens, 0)[-4:], dim=-1)
    chosen = torch.from_numpy(with_logprobs.chosen.astype(np.int64))
    assert with_logprobs.logprobs is not None
    np.testing.assert_allclose(with_logprobs.logprobs, expected[torch.arange(4), chosen].numpy(), atol=1e-3)
    assert without.logprobs is None


def test_a_plan_that_cannot_be_served_changes_nothing(model_dirs: dict[str, Path]) -> None:
    verifier = make_verifier(model_dirs["llama"], num_blocks=8)
    verifier.run([chunk("a", random_tokens(0, 10), 0)])
    with pytest.raises(CapacityError, match="7 KV blocks, 5 are free"):
        verifier.run([PassItem("b", random_tokens(1, 28), 0, 0, Sampling())])
    with pytest.raises(CapacityError, match="counts on 11 tokens of a, 10 are held"):
        verifier.run([PassItem("a", random_tokens(0, 12), 11, 0, Sampling())])
    assert verifier.pool.length("a") == 10
    assert verifier.pool.sessions() == ("a",)


def test_a_failed_forward_leaves_no_half_written_kv(
    model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier = make_verifier(model_dirs["llama"])
    verifier.run([chunk("a", random_tokens(0, 10), 0)])

    def fail(*_: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr("triton_models.torch_verifier.choose_tokens", fail)
    with pytest.raises(MemoryError):
        verifier.run([PassItem("a", random_tokens(0, 14), 10, 0, Sampling())])
    assert verifier.pool.length("a") == 10


def test_load_verifier_describes_the_model(model_dirs: dict[str, Path]) -> None:
    config = VerifierConfig(target=str(model_dirs["llama"]), device="cpu", kv_tokens=4096, kv_block_tokens=16)
    verifier = load_verifier(config)
    assert (verifier.vocab_size, verifier.max_context_tokens, verifier.eos_token_ids) == (VOCAB, 256, (2,))
    assert (verifier.device_name, verifier.dtype_name) == ("cpu", "float32")
    assert (verifier.pool.num_blocks, verifier.pool.block_tokens) == (256, 16)


def test_bfloat16_runs(model_dirs: dict[str, Path]) -> None:
    verifier = load_verifier(VerifierConfig(target=str(model_dirs["qwen3"]), device="cpu", dtype="bfloat16"))
    assert verifier.dtype_name == "bfloat16"
    (outcome,) = verifier.run([PassItem("a", random_tokens(0, 12), 0, 2, SAMPLED)])
    assert len(outcome.chosen) == 3


def test_what_would_be_wrong_is_refused(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_target(VerifierConfig(target=str(tmp_path)))
    with pytest.raises(ConfigError, match="device"):
        load_target(VerifierConfig(target=str(model_dirs["llama"]), device="tpu"))
    sliding = tmp_path / "sliding"
    AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=8)).save_pretrained(sliding)
    with pytest.raises(ModelError, match="sliding"):
        load_target(VerifierConfig(target=str(sliding), device="cpu"))


def test_a_damaged_folder_is_refused(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen2"])
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "missing", state_dict=weights)
    with pytest.raises(ModelError, match=r"1 weights missing.*up_proj"):
        load_target(VerifierConfig(target=str(tmp_path / "missing"), device="cpu"))
    model.save_pretrained(tmp_path / "torn")
    file = tmp_path / "torn" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ModelError, match="cannot load") as caught:
        load_target(VerifierConfig(target=str(tmp_path / "torn"), device="cpu"))
    assert "\n" not in str(caught.value)


def test_a_model_of_another_build_works(tmp_path: Path) -> None:
    """GPT-2 has learned positions and one fused projection; the trial at load decides, not a list of names."""
    config = GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    verifier = make_verifier(tmp_path / "gpt2")
    tokens = random_tokens(0, 12)
    logits = verifier.compute_logits([PassItem("a", tokens, 0, 4, Sampling())])
    expected = plain_logits(plain_model(tmp_path / "gpt2"), tokens, 0)[-5:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_packed_linear_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 200), nn.Sequential(nn.Linear(200, 16, bias=False)))
    inputs = [torch.randn(1, num_tokens, 48) for num_tokens in (1, 2, 8, 32, 128)]
    with torch.inference_mode():
        expected = [model(batch) for batch in inputs]
        assert pack_linears(model) == 2
        assert isinstance(model[1][0], PackedLinear)
        for batch, wanted in zip(inputs, expected, strict=True):
            torch.testing.assert_close(model(batch), wanted, rtol=1e-5, atol=1e-5)
