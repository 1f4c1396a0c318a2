"""Recorded passes: the same logits and KV whatever the padding, in any thread; what happens where recording fails."""

from __future__ import annotations

import functools
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.graph_fakes import FakeRecorder
from tests.test_torch_verifier import SAMPLED, folder, make_verifier, model_dirs, random_tokens  # noqa: F401
from triton_models import torch_verifier
from triton_models.pass_graphs import PassGraphs, record_passes
from triton_models.target_model import forward, prepare
from triton_models.torch_verifier import TorchVerifier
from wisp_plugin.config import VerifierConfig
from wisp_plugin.errors import ConfigError, ModelError
from wisp_plugin.messages import PassItem

NUM_LAYERS = 3
SIZES = (4, 16, 32)
# passes of (session, cached, new, drafts): 1, 4, 5, 13, 32 and 33 rows
PASSES = (
    [("a", 0, 1, 0)],
    [("a", 1, 2, 1), ("b", 0, 2, 0)],
    [("a", 3, 3, 0), ("b", 2, 1, 0), ("c", 0, 1, 0)],
    [("a", 6, 5, 4), ("b", 3, 8, 7)],
    [("c", 1, 20, 0), ("b", 11, 12, 5)],
    [("d", 0, 33, 0)],
)


def recorded(folder: Path, gather: bool = True) -> TorchVerifier:  # noqa: F811
    verifier = make_verifier(folder, gather=gather)
    target = verifier._target
    target.graphs.record(functools.partial(forward, target.model), target.device, FakeRecorder(), SIZES)
    return verifier


def items_of(shapes: list[tuple[str, int, int, int]]) -> list[PassItem]:
    return [
        PassItem(session, random_tokens(ord(session), cached + new), cached, drafts, SAMPLED)
        for session, cached, new, drafts in shapes
    ]


@pytest.mark.parametrize("gather", [False, True])
def test_recorded_passes_give_the_logits_and_the_kv_of_plain_ones(folder: Path, gather: bool) -> None:  # noqa: F811
    graphed, plain = recorded(folder, gather), make_verifier(folder, gather=gather)
    for shapes in PASSES:
        items = items_of(shapes)
        torch.testing.assert_close(graphed.compute_logits(items), plain.compute_logits(items), rtol=1e-4, atol=1e-4)
    for layer in range(NUM_LAYERS):  # all slots: padded rows have written nothing
        torch.testing.assert_close(graphed.cache.keys[layer], plain.cache.keys[layer], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(graphed.cache.values[layer], plain.cache.values[layer], rtol=1e-4, atol=1e-4)
    graphed.cache.check_integrity()


def test_a_replay_repeats_itself_in_any_thread(folder: Path) -> None:  # noqa: F811
    verifier, found = recorded(folder), []

    def run(shapes: list[tuple[str, int, int, int]]) -> None:
        items = items_of(shapes)
        found.append(verifier.compute_logits(items))
        for item in items:
            verifier.pool.truncate(item.session, item.num_cached)

    for shapes in PASSES:
        verifier.compute_logits(items_of(shapes))
    run([("a", 11, 3, 2)])
    run([("d", 33, 14, 0)])  # other rows behind those of the next
    thread = threading.Thread(target=run, args=([("a", 11, 3, 2)],))
    thread.start()
    thread.join()
    assert torch.equal(found[0], found[2])


def test_attention_of_padded_rows_is_zero(folder: Path) -> None:  # noqa: F811
    verifier = recorded(folder)
    verifier.compute_logits(items_of([("a", 0, 16, 0)]))
    for layer in range(NUM_LAYERS):
        verifier.cache.values[layer][20:] = torch.nan
    verifier.compute_logits(items_of([("b", 0, 5, 0)]))
    pieces = verifier._target.graphs._passes[16].pieces
    assert [piece.layer for piece in pieces] == list(range(NUM_LAYERS))
    assert all(bool((piece.output[:, 5:] == 0).all()) for piece in pieces)
    assert all(bool((piece.output[:, :5] != 0).any()) for piece in pieces)


def test_longer_passes_are_not_recorded(folder: Path) -> None:  # noqa: F811
    graphs = recorded(folder)._target.graphs
    assert graphs.sizes == SIZES
    assert [graphs.fits(num_rows) for num_rows in (1, 32, 33)] == [True, True, False]
    assert not PassGraphs().fits(1)


@pytest.mark.parametrize("fail_at", [2, 9])
def test_a_recording_that_fails_is_ended_and_nothing_is_recorded(folder: Path, fail_at: int) -> None:  # noqa: F811
    verifier, recorder = make_verifier(folder), FakeRecorder(fail_at)
    target = verifier._target
    with pytest.raises(RuntimeError, match="capturing"):
        target.graphs.record(functools.partial(forward, target.model), target.device, recorder, SIZES)
    assert recorder.discarded == []  # those that were begun have ended
    assert target.graphs.sizes == ()
    verifier.compute_logits(items_of([("a", 0, 5, 0)]))


def test_a_model_that_fails_while_it_is_recorded_ends_the_recording(folder: Path) -> None:  # noqa: F811
    verifier, recorder = make_verifier(folder), FakeRecorder()
    target = verifier._target

    def failing(input_ids: Any, positions: Any, attention: Any, keep: Any) -> torch.Tensor:
        logits = forward(target.model, input_ids, positions, attention, keep)
        if recorder.graphs:
            raise RuntimeError("the model looks at a value")
        return logits

    with pytest.raises(RuntimeError, match="looks at a value"):
        target.graphs.record(failing, target.device, recorder, SIZES)
    assert recorder.discarded == recorder.graphs[-1:]
    assert target.graphs.sizes == ()
    verifier.compute_logits(items_of([("a", 0, 5, 0)]))


def test_recorded_passes_make_room_for_kv(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:  # noqa: F811
    target, made = recorded(folder)._target, []

    class Scarce(torch_verifier.TorchVerifier):
        def __init__(self, *arguments: Any) -> None:
            made.append(target.graphs.sizes)
            if target.graphs.sizes:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(*arguments)

    monkeypatch.setattr(torch_verifier, "TorchVerifier", Scarce)
    monkeypatch.setattr(torch_verifier, "load_target", lambda _: target)
    verifier = torch_verifier.load_verifier(VerifierConfig(kv_tokens=256))
    assert made == [SIZES, ()]
    verifier.compute_logits(items_of([("a", 0, 5, 0)]))


def test_where_recording_fails_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def failing() -> None:
        raise RuntimeError("operation not permitted\nand more lines")

    with caplog.at_level(logging.WARNING):
        assert not record_passes(PassGraphs(), "auto", failing)
    assert caplog.messages == [
        "passes cannot be recorded here (RuntimeError: operation not permitted): kernels are launched one by one, "
        "which is slower"
    ]
    with pytest.raises(ModelError, match=r"\(RuntimeError: operation not permitted\); allowed: compile=auto, always"):
        record_passes(PassGraphs(), "graphs", failing)


def test_recorded_passes_that_are_wrong_are_not_used(folder: Path) -> None:  # noqa: F811
    graphs = recorded(folder)._target.graphs

    def wrong() -> None:
        raise ModelError("packed and plain forward differ")

    assert not record_passes(graphs, "auto", wrong)
    assert graphs.sizes == ()


def test_a_cpu_has_no_graphs(folder: Path) -> None:  # noqa: F811
    target = make_verifier(folder)._target
    assert target.graphs.sizes == ()
    assert VerifierConfig(compile="graphs").compile == "graphs"
    with pytest.raises(ConfigError, match="'graphs', but the device is cpu"):
        prepare(target, "graphs")
