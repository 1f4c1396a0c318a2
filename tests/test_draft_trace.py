"""Traces: the chain behind every position, as a file, and what is learnt from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.train_controller import auc, calibration_error, held_out_figures, train
from edge_runtime.training_samples import Samples
from tests.traces import make_text, make_trace
from wisp_plugin.draft_trace import DraftTrace
from wisp_plugin.errors import ModelError


def test_the_chain_behind_every_position() -> None:
    text = make_text(3)
    agrees = text.agrees.tolist()
    for index in range(len(agrees)):
        run = 0
        while index + run < len(agrees) and agrees[index + run]:
            run += 1
        assert text.run_length(index) == run
        for ahead in range(run + 1):
            if index + ahead < len(agrees):
                token, stats = text.chain_token(index, ahead)
                assert token == text.drafted[index + ahead]
                assert stats == pytest.approx(tuple(text.stats[index + ahead]))
    assert text.run_length(len(agrees)) == 0


def test_the_chain_behind_a_rejection_is_its_own() -> None:
    text = make_text(3)
    wrong = np.flatnonzero(~text.agrees)
    for number, at in enumerate(wrong.tolist()):
        for depth in range(text.behind.shape[1]):
            token, stats = text.chain_token(at, depth + 1)
            assert token == text.behind_tokens[number, depth]
            assert stats == pytest.approx(tuple(text.behind[number, depth]))
        assert text.chain_token(at, 99)[0] == text.behind_tokens[number, -1]


def test_a_file_holds_all_but_precision(tmp_path: Path) -> None:
    trace = make_trace(5)
    trace.save(tmp_path / "t.npz")
    loaded = DraftTrace.load(tmp_path / "t.npz")
    assert loaded.about == trace.about
    assert loaded.acceptance == trace.acceptance
    for mine, theirs in zip(trace.texts, loaded.texts, strict=True):
        assert np.array_equal(mine.tokens, theirs.tokens)
        assert np.array_equal(mine.drafted, theirs.drafted)
        assert np.allclose(mine.stats, theirs.stats, rtol=1e-3)
        assert np.allclose(mine.behind, theirs.behind, rtol=1e-3)


def test_a_trace_without_what_lies_behind_rejections(tmp_path: Path) -> None:
    trace = DraftTrace([make_text(1, chain_length=0)], {"draft_s": 0.01})
    trace.save(tmp_path / "t.npz")
    (text,) = DraftTrace.load(tmp_path / "t.npz").texts
    assert np.isfinite(text.chain_token(0, 40)[1]).all()


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    with pytest.raises(ModelError, match="does not exist"):
        DraftTrace.load(path)
    path.write_text("{}")
    with pytest.raises(ModelError, match="no trace"):
        DraftTrace.load(path)
    np.savez(path, tokens=np.zeros(3))
    with pytest.raises(ModelError, match="no trace"):
        DraftTrace.load(path)


def test_a_file_that_lacks_chains_behind_rejections_is_refused(tmp_path: Path) -> None:
    trace, path = make_trace(num_texts=3), tmp_path / "x.npz"
    for rows in (slice(None, -1), slice(1, None)):
        last = trace.texts[-1]
        short = dataclasses.replace(last, behind=last.behind[rows], behind_tokens=last.behind_tokens[rows])
        DraftTrace([*trace.texts[:-1], short], trace.about).save(path)
        with pytest.raises(ModelError, match=r"is no trace of `wisp-edge trace`: its arrays have .* rows"):
            DraftTrace.load(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_refused_in_one_line(share: float, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    make_trace(5).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError, match="no trace") as caught:
        DraftTrace.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_with_flipped_bytes_or_another_text_about_it_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    make_trace(5).save(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 50] = bytes(255 - byte for byte in content[middle : middle + 50])
    path.write_bytes(content)
    with pytest.raises(ModelError, match="no trace"):
        DraftTrace.load(path)
    np.savez(path, about=np.array("[1]"))
    with pytest.raises(ModelError, match="no trace"):
        DraftTrace.load(path)


def test_training_finds_what_there_is_to_find() -> None:
    """The made-up draft is right as often as its confidence says: the best AUC there is comes from that order."""
    lines: list[str] = []
    model, figures = train([make_trace(40)], 1.0, 25, 0, lines.append)
    texts = make_trace(40, seed=1).texts
    samples = Samples.of(texts, model.base, model.token_rates, 0)
    fresh = held_out_figures(model, samples)
    confidence = np.concatenate([text.stats[:, 0] for text in texts])
    best = auc(confidence.astype(float), np.concatenate([text.agrees for text in texts]))
    assert fresh["auc"] > best - 0.02
    assert fresh["ece"] < 0.06
    assert 0.4 < fresh["auc_next"] < 0.6  # nothing tells about the next token
    assert set(figures) == set(fresh)


def test_a_cost_on_false_alarms_gives_fewer_of_them() -> None:
    texts = make_trace(30, seed=1).texts
    rates = []
    for cost in (0.5, 1.0, 3.0):
        model, _ = train([make_trace(30)], cost, 15, 0, lambda line: None)
        figures = held_out_figures(model, Samples.of(texts, model.base, model.token_rates, 0))
        assert figures["ece"] < 0.08  # the weight does not bend the probabilities
        rates.append(figures["false_alarm_rate"])
    assert rates[0] > rates[1] >= rates[2]


def test_too_little_to_train_on() -> None:
    with pytest.raises(ModelError, match="too few"):
        train([make_trace(3)], 1.0, 1, 0, lambda line: None)


def test_auc_and_calibration_error_by_hand() -> None:
    positive = np.array([False, True, False, True])
    assert auc(np.array([1.0, 2.0, 3.0, 4.0]), positive) == pytest.approx(0.75)
    assert auc(np.zeros(4), positive) == pytest.approx(0.5)
    assert calibration_error(np.array([0.9, 0.9]), np.array([True, False])) == pytest.approx(0.4)
