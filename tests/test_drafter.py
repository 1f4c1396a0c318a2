"""The contract of the drafter over both layouts of draft graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.draft_graph import GrowingKvGraph, SharedKvGraph, load_graph
from edge_runtime.drafter import Drafter
from tests import tiny_model
from tests.factories import ids
from wisp_plugin.coupling import choose_token
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.errors import ModelError
from wisp_plugin.messages import Sampling

Reference = Callable[[np.ndarray], np.ndarray]
LAYOUTS = {
    "shared": (lambda: tiny_model.draft_folder("fp32"), tiny_model.target_logits, SharedKvGraph),
    "community": (tiny_model.community_folder, tiny_model.target_logits, GrowingKvGraph),
    "positions": (tiny_model.positions_folder, tiny_model.positions_logits, GrowingKvGraph),
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> tuple[Path, Reference, type]:
    folder, reference, kind = LAYOUTS[request.param]
    return folder(), reference, kind


class CountingGraph:
    """Stands for a model: logits tell the whole sequence; counts what it is fed."""

    vocab_size = 1000
    context_length = 512

    def __init__(self) -> None:
        self.fed: list[list[int]] = []
        self.kv: list[int] = []

    def forward(self, tokens: np.ndarray, num_past: int) -> np.ndarray:
        assert num_past <= len(self.kv), "KV that is not there"
        self.kv = self.kv[:num_past] + tokens.tolist()
        self.fed.append(tokens.tolist())
        return np.full(self.vocab_size, hash(tuple(self.kv)) % 10_007, np.float32)


def random_walk(seed: int, num_steps: int, max_tokens: int) -> list[np.ndarray]:
    """Sequences as a device sees them: longer by some tokens, or cut back and continued differently."""
    random = np.random.default_rng(seed)
    walk, tokens = [], random.integers(0, tiny_model.VOCAB_SIZE, 20)
    for _ in range(num_steps):
        kept = len(tokens) if random.random() < 0.5 else int(random.integers(1, len(tokens) + 1))
        num_new = int(random.choice([0, 1, 1, 2, 5, 90]))
        tokens = np.concatenate([tokens[:kept], random.integers(0, tiny_model.VOCAB_SIZE, num_new)])[:max_tokens]
        walk.append(tokens.astype(np.int32))
    return walk


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_logits_equal_the_model_alone_after_any_rollbacks(layout: tuple[Path, Reference, type], seed: int) -> None:
    folder, reference, kind = layout
    graph = load_graph(folder, num_threads=1)
    assert isinstance(graph, kind)
    drafter = Drafter(graph)
    atol = 2e-3 if reference is tiny_model.positions_logits else 2e-4  # sums of up to 300 terms
    for tokens in random_walk(seed, num_steps=20, max_tokens=300):
        logits = drafter.next_logits(tokens)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, reference(tokens), atol=atol, rtol=1e-4)


def test_siblings_share_the_graph_and_not_the_kv(layout: tuple[Path, Reference, type]) -> None:
    folder, reference, _kind = layout
    first = Drafter(load_graph(folder, num_threads=1), max_context_tokens=300)
    drafters = [first, first.sibling()]
    assert drafters[1].max_context_tokens == 300
    atol = 2e-3 if reference is tiny_model.positions_logits else 2e-4
    for walk in zip(random_walk(4, 8, max_tokens=300), random_walk(5, 8, max_tokens=300), strict=True):
        for drafter, tokens in zip(drafters, walk, strict=True):  # in turns
            np.testing.assert_allclose(drafter.next_logits(tokens), reference(tokens), atol=atol, rtol=1e-4)


def test_kv_survives_the_growth_of_its_buffer(layout: tuple[Path, Reference, type]) -> None:
    folder, reference, _ = layout
    drafter = Drafter.load(folder, num_threads=1, max_context_tokens=1200)
    tokens = np.random.default_rng(0).integers(0, tiny_model.VOCAB_SIZE, 1200).astype(np.int32)
    for length in (500, 511, 512, 513, 514, 1024, 1025, 1200, 505):
        expected = reference(tokens[:length])
        np.testing.assert_allclose(drafter.next_logits(tokens[:length]), expected, atol=5e-3, rtol=1e-3)
    with pytest.raises(ModelError, match="1 to 1200"):
        drafter.next_logits(np.zeros(1201, np.int32))


def test_limit_is_the_models_own_if_that_is_lower() -> None:
    assert Drafter.load(tiny_model.positions_folder()).max_context_tokens == tiny_model.CONTEXT_LENGTH
    assert Drafter(CountingGraph(), max_context_tokens=4096).max_context_tokens == 512


@pytest.mark.parametrize("seed", range(20))
def test_feeds_only_the_difference(seed: int) -> None:
    graph = CountingGraph()
    drafter = Drafter(graph)
    before: list[int] = []
    for tokens in random_walk(seed, num_steps=30, max_tokens=500):
        graph.fed.clear()
        logits = drafter.next_logits(tokens)
        assert graph.kv == tokens.tolist()
        assert logits[0] == hash(tuple(tokens.tolist())) % 10_007
        num_equal = next((i for i, (a, b) in enumerate(zip(tokens, before, strict=False)) if a != b),
                         min(len(tokens), len(before)))
        assert sum(map(len, graph.fed)) == len(tokens) - min(num_equal, len(tokens) - 1)
        assert all(len(chunk) <= drafter.chunk_tokens for chunk in graph.fed)
        before = tokens.tolist()


def test_advance_feeds_one_chunk_at_a_time_and_leaves_the_last_run_to_next_logits() -> None:
    graph = CountingGraph()
    drafter = Drafter(graph)
    tokens = np.arange(drafter.chunk_tokens * 2 + 10, dtype=np.int32)
    assert drafter.advance(tokens) == 10
    assert drafter.advance(tokens) == 0
    assert drafter.advance(tokens) == 0
    assert [len(chunk) for chunk in graph.fed] == [drafter.chunk_tokens] * 2
    drafter.next_logits(tokens)
    assert len(graph.fed[-1]) == 10


def test_logits_belong_to_the_caller() -> None:
    drafter = Drafter.load(tiny_model.draft_folder("fp32"))
    first = drafter.next_logits(ids(5, 6, 7))
    kept = first.copy()
    drafter.next_logits(ids(5, 6, 8))
    np.testing.assert_array_equal(first, kept)


def test_draft_token_is_the_coupled_choice_at_its_position() -> None:
    drafter = Drafter.load(tiny_model.draft_folder("fp32"))
    tokens = ids(5, 6, 7, 8)
    logits = drafter.next_logits(tokens)
    drawn = set()
    for seed in range(30):
        sampling = Sampling(seed=seed, temperature=1.5, top_p=0.95, repetition_penalty=1.1)
        token, stats = drafter.draft_token_with_stats(tokens, sampling)
        assert token == drafter.draft_token(tokens, sampling) == choose_token(logits, sampling, 4, tokens)
        drawn.add(token)
    assert len(drawn) > 5
    assert stats == pytest.approx(DraftStats.of(logits, token), rel=1e-5)
    assert stats.chosen <= stats.confidence


def test_a_failing_run_leaves_no_trusted_kv_behind() -> None:
    graph = CountingGraph()
    drafter = Drafter(graph)
    drafter.next_logits(ids(1, 2, 3))
    with pytest.raises(ModelError, match=r"token ids 0 to 999, not 4 to 1000"):
        drafter.next_logits(ids(1, 2, 4, 1000))
    with pytest.raises(ModelError, match=r"-1 to -1"):
        drafter.next_logits(ids(1, 2, -1))
    with pytest.raises(ModelError, match="0 tokens"):
        drafter.next_logits(ids())
    drafter.next_logits(ids(1, 2, 3, 4))
    assert graph.kv == [1, 2, 3, 4]


@pytest.mark.parametrize("best_at", [0, 7, 999])
def test_stats_equal_their_definitions(best_at: int) -> None:
    """Up to what lies 11 and more below the best logit: here 0.0015 of the probability."""
    logits = np.random.default_rng(3).normal(-12.0, 3.0, 1000).astype(np.float32)
    logits[best_at] = logits.max() + 1.0
    exact = logits.astype(np.float64)
    probabilities = np.exp(exact - exact.max())
    probabilities /= probabilities.sum()
    top = np.sort(probabilities)
    order = logits.argsort()
    for token in (int(order[-1]), int(order[-2]), int(order[500]), int(order[0])):
        stats = DraftStats.of(logits, token)
        assert stats.confidence == pytest.approx(top[-1], rel=2e-3)
        assert stats.margin == pytest.approx(top[-1] - top[-2], rel=2e-3)
        assert stats.entropy == pytest.approx(-(probabilities * np.log(probabilities)).sum(), rel=1.5e-2)
        assert stats.spread == pytest.approx(exact.std(), rel=1e-3)
        assert stats.chosen == pytest.approx(probabilities[token], rel=2e-3)
    assert DraftStats.of(logits, best_at).chosen == DraftStats.of(logits, best_at).confidence


def test_stats_of_extreme_logits() -> None:
    sure = np.full(1000, -30.0, np.float32)
    sure[7] = 30.0
    assert DraftStats.of(sure, 7) == pytest.approx((1.0, 0.0, 1.0, sure.std(), 1.0), abs=1e-3)
    assert DraftStats.of(sure, 8).chosen == pytest.approx(np.exp(-60.0), rel=1e-3)
    flat = DraftStats.of(np.zeros(1000, np.float32), 3)
    assert flat == pytest.approx((1e-3, np.log(1000), 0.0, 0.0, 1e-3), rel=1e-4, abs=1e-9)
    before = np.random.default_rng(1).normal(size=50).astype(np.float32)
    after = before.copy()
    DraftStats.of(after, 0)
    np.testing.assert_array_equal(before, after)


def _refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Drafter.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_layouts_are_refused_with_what_was_found(tmp_path: Path) -> None:
    assert "does not exist" in _refused(tmp_path / "nowhere")
    assert "found nothing" in _refused(tmp_path)
    (tmp_path / "weights.gguf").touch()
    message = _refused(tmp_path)
    assert "weights.gguf" in message
    assert "onnx/model.onnx" in message


def test_an_undecided_choice_of_graphs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "config.json").write_text("{}")
    assert "found none" in _refused(tmp_path)
    for name in ("model_q4.onnx", "model_fp16.onnx"):
        (tmp_path / "onnx" / name).touch()
    assert "model_fp16.onnx, model_q4.onnx" in _refused(tmp_path)


def test_graphs_that_draft_nothing_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model.positions_folder(), folder)
    (folder / "config.json").write_text("{}")
    assert "context length" in _refused(folder)
    (folder / "config.json").write_text("[1]")
    assert "JSON object" in _refused(folder)
    (folder / "config.json").write_text("{}")
    onnx, helper = tiny_model.onnx, tiny_model.helper
    value = [helper.make_tensor_value_info(name, tiny_model.TensorProto.FLOAT, [1]) for name in ("pixels", "out")]
    graph = helper.make_graph([helper.make_node("Neg", ["pixels"], ["out"])], "no", value[:1], value[1:])
    path = folder / "onnx" / "model_quantized.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    assert "inputs pixels" in _refused(folder)


def test_damaged_drafts_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model.draft_folder("fp32"), folder)
    config = json.loads((folder / "genai_config.json").read_text())
    (folder / "model.onnx.data").unlink()
    assert "cannot be loaded" in _refused(folder)
    (folder / "model.onnx").write_bytes(b"no graph")
    assert "cannot be loaded" in _refused(folder)
    (folder / "model.onnx").unlink()
    assert "model.onnx does not exist" in _refused(folder)
    del config["model"]["decoder"]
    (folder / "genai_config.json").write_text(json.dumps(config))
    assert "model.decoder is missing" in _refused(folder)
    (folder / "genai_config.json").write_text("{")
    assert "damaged" in _refused(folder)
