"""Part `model` of `wisp-bench controller`: how well acceptance is predicted, and what a decision costs."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bench.report import median, print_table
from edge_runtime.train_controller import auc, calibration_error
from edge_runtime.training_samples import Samples
from wisp_plugin.acceptance_model import FEATURES, AcceptanceModel
from wisp_plugin.controller import SpeculationController
from wisp_plugin.draft_trace import DraftTrace
from wisp_plugin.pace import Pace
from wisp_plugin.stop_rules import Price, Ratio

_CHAIN = 8


def report_model(draft: str, trace: DraftTrace, model: AcceptanceModel, suffix: str) -> dict[str, Any]:
    """Print the table of one draft and return its figures; keys end with `suffix`."""
    samples = Samples.of(trace.texts, model.base, model.token_rates, seed=0)
    accepted = samples.accepted == 1
    z = model.log_odds_of(samples.values.astype(np.float32)).astype(np.float64)
    followed = np.isfinite(samples.following)
    alone = {name: _auc_of(samples.values[:, i], accepted) for i, name in enumerate(FEATURES)}
    without = {name: auc(_without(model, samples, i), accepted) for i, name in enumerate(FEATURES)}
    whole = auc(z[:, 0], accepted)
    print_table(
        f"Acceptance model, {draft} draft: AUC {whole:.4f}",
        ["feature", "AUC alone", "model's AUC if it is unknown"],
        [[name, alone[name], without[name]] for name in FEATURES],
    )
    stats = ("log_confidence", "entropy", "margin", "spread")
    decision_us = time_decision_us(trace, model)
    probability, outcome = predict_online(trace, model)
    figures = {
        "auc": whole,
        "auc_next": auc(z[followed, 1], samples.following[followed] == 1),
        "auc_best_single": max(alone[name] for name in stats),
        "auc_gain": whole - max(alone[name] for name in stats),
        "ece": calibration_error(probability, outcome),
        "ece_offline": calibration_error(1 / (1 + np.exp(-z[:, 0])), accepted),
        "decision_us": decision_us,
        "decision_share": decision_us / (1e6 * trace.draft_s),
    }
    return {f"{name}{suffix}": value for name, value in figures.items()}


def _auc_of(values: np.ndarray, accepted: np.ndarray) -> float:
    """Of one feature, whichever way it points."""
    area = auc(values, accepted)
    return max(area, 1.0 - area)


def _without(model: AcceptanceModel, samples: Samples, index: int) -> np.ndarray:
    """The model's log-odds if a feature always has its mean."""
    values = samples.values.astype(np.float32)
    values[:, index] = model.mean[index]
    return model.log_odds_of(values)[:, 0].astype(np.float64)


def predict_online(trace: DraftTrace, model: AcceptanceModel) -> tuple[np.ndarray, np.ndarray]:
    """What a controller predicts for each draft token behind a right prefix, learning as it goes, and the outcome.

    Chains of up to eight tokens; each text is a session of its own.
    """
    probability: list[float] = []
    outcome: list[bool] = []
    for text in trace.texts:
        controller, index = SpeculationController(Ratio(), model), 0
        while index < len(text.drafted):
            num_right = min(text.run_length(index), _CHAIN)
            found_wrong = num_right < _CHAIN and index + num_right < len(text.drafted)
            for ahead in range(num_right + found_wrong):
                controller.on_drafted(*text.chain_token(index, ahead))
                probability.append(controller.chain.accepts)
                outcome.append(ahead < num_right)
            controller.on_commit(num_right, found_wrong, is_kept=False)
            index += num_right + found_wrong or 1
    return np.array(probability), np.array(outcome)


def time_decision_us(trace: DraftTrace, model: AcceptanceModel) -> float:
    """Microseconds to take in a draft token and to decide about the next one, median; rule `price`, the dearer one."""
    text = trace.texts[0]
    pace = Pace(draft_s=0.005, rtt_s=0.02, verify_s=0.04, heard_s=1.0, wait_s=0.03)
    controller, times_us = SpeculationController(Price(0.0), model), []
    for k in range(2000):
        token, stats = text.chain_token(0, k % 16)
        started = time.perf_counter()
        controller.on_drafted(token, stats)
        controller.draft_on(pace, 1.0 + 0.001 * k)
        times_us.append(1e6 * (time.perf_counter() - started))
        if k % 16 == 15:
            controller.on_commit(0, found_wrong=False, is_kept=False)
    return median(times_us)
