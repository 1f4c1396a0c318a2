"""`wisp-bench draft`: agreement, the model of what a draft is worth, which prompts, the report."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from bench import draft
from edge_runtime.drafter import Drafter
from tests import tiny_model
from wisp_plugin.errors import ConfigError
from wisp_plugin.home import DEFAULT_DRAFT, DRAFT_NAMES

PROMPTS = [np.arange(3, 20, dtype=np.int32), np.arange(40, 45, dtype=np.int32), np.arange(100, 130, dtype=np.int32)]


@pytest.fixture(scope="module")
def texts() -> list[draft.Text]:
    return draft.target_texts(tiny_model.hf_folder(), PROMPTS, 12)


def test_the_targets_texts_are_its_greedy_tokens_also_in_a_padded_batch(texts: list[draft.Text]) -> None:
    for prompt, text in zip(PROMPTS, texts, strict=True):
        np.testing.assert_array_equal(text.prompt, prompt)
        whole = np.concatenate([text.prompt, text.generated])
        for end in range(len(prompt), len(whole)):
            logits = tiny_model.target_logits(whole[:end])
            assert logits[whole[end]] > logits.max() - 1e-3
        assert 1 not in text.generated[:-1], "nothing behind the end token"


def test_the_model_agrees_with_itself_and_a_quantized_one_less(texts: list[draft.Text]) -> None:
    found = {name: Drafter.load(tiny_model.draft_folder(name), num_threads=1) for name in ("fp32", "int4")}
    shares = {name: draft.agreement(drafter, texts, name) for name, drafter in found.items()}
    assert shares["fp32"] > 0.97
    assert 0 <= shares["int4"] <= shares["fp32"]


def test_times_are_one_value_per_round_and_draft(texts: list[draft.Text]) -> None:
    drafters = {name: Drafter.load(tiny_model.draft_folder(name), num_threads=1) for name in ("fp32", "int4")}
    times_ms = draft.measure_times(drafters, texts[0], 3)
    assert {name: len(values) for name, values in times_ms.items()} == {"fp32": 3, "int4": 3}
    assert min(map(min, times_ms.values())) > 0


def test_what_a_draft_is_worth() -> None:
    alone = 1000 / (20 + 42 + 3)
    assert draft.expected_tokens_per_s(0.0, 5.0) == pytest.approx(alone)
    assert draft.expected_tokens_per_s(0.9, 1e6) == pytest.approx(alone), "too slow to draft at all"
    by_hand = max(1000 * (1 - 0.8 ** (k + 1)) / 0.2 / (65 + 13 * k) for k in range(17))
    assert draft.expected_tokens_per_s(0.8, 10.0) == pytest.approx(by_hand)
    assert draft.expected_tokens_per_s(0.96, 6.4) > draft.expected_tokens_per_s(0.69, 4.9)


def test_summary_reports_the_chosen_draft_and_the_best_by_class(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("int8", "int4", "mixed48")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "model.onnx").write_bytes(bytes(2_000_000))
    times_ms = {"int8": [6.0, 13.0], "int4": [5.0, 10.0], "mixed48": [5.5, 11.0]}
    figures = draft.summary(folders, {"int8": 0.96, "int4": 0.69, "mixed48": 0.87}, times_ms)
    assert (figures["chosen"], figures["agreement"]) == ("mixed48", 0.87)
    assert figures["time_vs_plain_int4"] == pytest.approx(1.1)
    assert figures["precisions"]["int8"]["time_vs_plain_int4"] == pytest.approx(1.25)
    assert figures["precisions"]["int4"]["size_mb"] == 2.0
    assert set(figures["best_by_class"]) == set(draft.DEVICE_CLASSES)
    assert figures["default_draft"] == DEFAULT_DRAFT


def test_names_of_default_drafts_are_known_to_the_exporter() -> None:
    assert set(DRAFT_NAMES) <= set(draft.PRECISIONS)
    assert DEFAULT_DRAFT in DRAFT_NAMES
    assert draft.BEST in DRAFT_NAMES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precisions", "int4"], "must name int4, mixed48"),
        (["--precisions", "int4", "mixed48", "int3"], "must name int4, mixed48"),
        (["--prompts", "41"], "--prompts must be 1 to 40"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_built(arguments: list[str], message: str) -> None:
    parser = argparse.ArgumentParser()
    draft.add_arguments(parser)
    with pytest.raises(ConfigError, match=message):
        draft.main(parser.parse_args(arguments))
