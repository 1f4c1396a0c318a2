"""`wisp-edge train-controller`: from traces to the weights of an acceptance model.

Cross entropy by Adam, in numpy: some ten thousand tokens of thirteen features need no framework. A token that would be
accepted weighs `false_alarm_cost`: to predict its rejection stops drafting too early. That weight shifts all
probabilities, so slope and shift of the log-odds are fitted at the end, unweighted. A seventh of the prompts is held
out, with every text behind them (greedy and sampled ones, in whichever trace): for the choice of the best epoch, and
for the figures that are printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_runtime.training_samples import Samples, TokenCounts
from wisp_plugin.acceptance_model import FEATURES, AcceptanceModel
from wisp_plugin.draft_trace import DraftTrace, TextTrace
from wisp_plugin.errors import ConfigError, ModelError
from wisp_plugin.npz_file import cannot_write, check_out_file

Floats = npt.NDArray[np.float64]
Report = Callable[[str], None]
NUM_HIDDEN = 24
_HELD_OUT = 7  # one prompt of so many
_REPORT_S = 2.0


def train(
    traces: Sequence[DraftTrace], false_alarm_cost: float, epochs: int, seed: int, report: Report
) -> tuple[AcceptanceModel, dict[str, float]]:
    """The model, and its figures on held-out texts (`held_out_figures`). Raises ModelError if there is too little, or
    nothing to tell apart."""
    texts = [text for trace in traces for text in trace.texts if len(text.drafted)]
    fitted, checked = split_by_prompt(texts, seed)
    base = float(np.mean(np.concatenate([text.agrees for text in texts])))
    if base in (0.0, 1.0):
        raise ModelError(f"all draft tokens of the traces were {'accepted' if base else 'rejected'}: nothing to learn")
    counts = TokenCounts.of(fitted, 1 + max(int(text.drafted.max()) for text in texts))
    rates = counts.rates(base)
    held_out = Samples.of(checked, base, rates, seed + 1)
    training = Samples.for_training(fitted, base, counts, seed, 2)
    model = _fit(training, held_out, (base, false_alarm_cost), rates, epochs, seed, report)
    return model, held_out_figures(model, held_out)


def split_by_prompt(texts: Sequence[TextTrace], seed: int) -> tuple[list[TextTrace], list[TextTrace]]:
    """The texts to train on and those held out, which share no prompt: `seed` draws a seventh of the prompts.

    Raises:
        ModelError: too few prompts.
    """
    prompts = list(dict.fromkeys(prompt_of(text) for text in texts))
    if len(prompts) < 2 * _HELD_OUT:
        raise ModelError(f"{len(prompts)} prompts are too few to train on; at least {2 * _HELD_OUT} are needed")
    drawn = np.random.default_rng(seed).permutation(len(prompts))[: -(-len(prompts) // _HELD_OUT)]
    held_out = {prompts[i] for i in drawn.tolist()}
    fitted = [text for text in texts if prompt_of(text) not in held_out]
    return fitted, [text for text in texts if prompt_of(text) in held_out]


def prompt_of(text: TextTrace) -> bytes:
    """The tokens of a text's prompt, as a key."""
    return text.tokens[: text.prompt_len].astype(np.int32).tobytes()


def _fit(
    fitted: Samples, held_out: Samples, base_and_cost: tuple[float, float], rates: npt.NDArray[np.int8], epochs: int,
    seed: int, report: Report,
) -> AcceptanceModel:  # fmt: skip
    cost = base_and_cost[1]
    mean, deviation = fitted.values.mean(axis=0), fitted.values.std(axis=0)
    # A feature that never varied here (the chosen token's share in greedy traces) must not speak elsewhere either.
    scale = np.where(deviation > 1e-3, 1.0 / np.maximum(deviation, 1e-3), 0.0)
    inputs, checked = (fitted.values - mean) * scale, (held_out.values - mean) * scale
    labels, check_labels = (np.stack([s.accepted, s.following], axis=1) for s in (fitted, held_out))
    rng = np.random.default_rng(seed)
    shape = (len(FEATURES), NUM_HIDDEN)
    weights = [rng.normal(0, shape[0] ** -0.5, shape), np.zeros(NUM_HIDDEN), np.zeros((NUM_HIDDEN, 2)), np.zeros(2)]
    adam, best, best_loss, shown_s = _Adam(weights), weights, np.inf, time.monotonic()
    for epoch in range(epochs):
        for rows in np.array_split(rng.permutation(len(inputs)), max(1, len(inputs) // 512)):
            adam.step(_gradients(weights, inputs[rows], labels[rows], cost))
        loss = _loss(_forward(weights, checked)[1], check_labels, cost)
        if loss < best_loss:
            best, best_loss = [w.copy() for w in weights], loss
        if time.monotonic() - shown_s > _REPORT_S:
            shown_s = time.monotonic()
            report(f"epoch {epoch + 1}/{epochs}: loss {loss:.4f} on held-out texts, best {best_loss:.4f}")
    _recalibrate(best, inputs, labels)
    first, bias, out, out_bias = (w.astype(np.float32) for w in best)
    return AcceptanceModel(
        mean.astype(np.float32), scale.astype(np.float32), first, bias, out, out_bias, rates, *base_and_cost
    )  # fmt: skip


def _forward(weights: Sequence[Floats], inputs: Floats) -> tuple[Floats, Floats]:
    hidden = np.tanh(inputs @ weights[0] + weights[1])
    return hidden, hidden @ weights[2] + weights[3]


def _loss(z: Floats, labels: Floats, cost: float) -> float:
    known = np.isfinite(labels)
    per_token = np.logaddexp(0, z) - np.where(known, labels, 0) * z
    return float((per_token * np.where(labels == 1, cost, 1.0))[known].mean())


def _gradients(weights: Sequence[Floats], inputs: Floats, labels: Floats, cost: float) -> list[Floats]:
    hidden, z = _forward(weights, inputs)
    known = np.isfinite(labels)
    error = (1 / (1 + np.exp(-z)) - np.where(known, labels, 0)) * np.where(labels == 1, cost, 1.0) * known
    error /= len(inputs)
    back = error @ weights[2].T * (1 - hidden**2)
    decay = 1e-4
    return [
        inputs.T @ back + decay * weights[0],
        back.sum(axis=0),
        hidden.T @ error + decay * weights[2],
        error.sum(axis=0),
    ]


class _Adam:
    """Kingma and Ba 2015, updating its arrays in place."""

    def __init__(self, weights: list[Floats], rate: float = 0.003) -> None:
        self._weights, self._rate, self._num_steps = weights, rate, 0
        self._mean, self._square = ([np.zeros_like(w) for w in weights] for _ in range(2))

    def step(self, gradients: Sequence[Floats]) -> None:
        self._num_steps += 1
        rate = self._rate * np.sqrt(1 - 0.999**self._num_steps) / (1 - 0.9**self._num_steps)
        for w, mean, square, gradient in zip(self._weights, self._mean, self._square, gradients, strict=True):
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            w -= rate * mean / (np.sqrt(square) + 1e-8)


def _recalibrate(weights: list[Floats], inputs: Floats, labels: Floats) -> None:
    """Fold the slope and shift that fit unweighted labels best into the last layer (Newton, per output)."""
    z = _forward(weights, inputs)[1]
    for k in range(2):
        known = np.isfinite(labels[:, k])
        x, y = np.stack([z[known, k], np.ones(int(known.sum()))], axis=1), labels[known, k]
        line = np.array([1.0, 0.0])
        for _ in range(20):
            p = 1 / (1 + np.exp(-x @ line))
            hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-6 * np.eye(2)
            line -= np.linalg.solve(hessian, x.T @ (p - y))
        weights[2][:, k] *= line[0]
        weights[3][k] = weights[3][k] * line[0] + line[1]


def held_out_figures(model: AcceptanceModel, samples: Samples) -> dict[str, float]:
    """`auc` and `auc_next` (the token behind), `ece`, and `false_alarm_rate`: accepted tokens in front of which the
    cost-sensitive rule (reject below 1 / (1 + cost)) would have stopped; `caught`: rejected ones that it finds."""
    z = model.log_odds_of(samples.values.astype(np.float32)).astype(np.float64)
    accepted = samples.accepted == 1
    followed = np.isfinite(samples.following)
    probability = 1 / (1 + np.exp(-z[:, 0]))
    alarm = probability < 1 / (1 + model.false_alarm_cost)
    return {
        "auc": auc(z[:, 0], accepted),
        "auc_next": auc(z[followed, 1], samples.following[followed] == 1),
        "ece": calibration_error(probability, accepted),
        "false_alarm_rate": float(alarm[accepted].mean()),
        "caught": float(alarm[~accepted].mean()) if not accepted.all() else 1.0,
    }


def auc(scores: Floats, positive: npt.NDArray[np.bool_]) -> float:
    """Probability that a positive has a higher score than a negative; ties count half."""
    order = np.argsort(scores, kind="stable")
    ranks = np.empty(len(scores))
    ranks[order] = np.arange(1, len(scores) + 1)
    values, inverse = np.unique(scores, return_inverse=True)
    ranks = (np.bincount(inverse, ranks) / np.bincount(inverse))[inverse] if len(values) < len(scores) else ranks
    num_positive = int(positive.sum())
    num_negative = len(scores) - num_positive
    if not num_positive or not num_negative:
        return 1.0
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def calibration_error(probability: Floats, outcome: npt.NDArray[np.bool_], num_bins: int = 15) -> float:
    """Expected calibration error: mean distance of predicted and observed rate over bins of equal width."""
    bins = np.minimum((probability * num_bins).astype(int), num_bins - 1)
    size = np.bincount(bins, minlength=num_bins)
    off = np.bincount(bins, probability, num_bins) - np.bincount(bins, outcome, num_bins)
    return float(np.abs(off).sum() / size.sum())


def main(args: argparse.Namespace) -> int:
    """Run `wisp-edge train-controller`; the exit code. Raises WispError with one line."""
    if not 0.01 <= args.false_alarm_cost <= 100.0:
        raise ConfigError(f"--false-alarm-cost is {args.false_alarm_cost:g}; allowed: 0.01 to 100")
    if not 1 <= args.epochs <= 10_000:
        raise ConfigError(f"--epochs is {args.epochs}; allowed: 1 to 10000")
    if not 0 <= args.seed < 1 << 63:
        raise ConfigError(f"--seed is {args.seed}; allowed: 0 to {(1 << 63) - 1}")
    check_out_file(args.out)
    traces = [DraftTrace.load(path) for path in args.traces]
    evaluation = None if args.evaluate is None else _evaluation(args.evaluate, traces)
    model, figures = train(traces, args.false_alarm_cost, args.epochs, args.seed, _to_stderr)
    if evaluation is not None:
        figures = held_out_figures(model, Samples.of(evaluation, model.base, model.token_rates, args.seed))
    try:
        model.save(args.out, " ".join(path.name for path in args.traces))
    except OSError as error:
        raise cannot_write(args.out, error) from None
    _to_stderr(f"wrote {args.out}; on held-out texts:")
    print(
        f"AUC {figures['auc']:.3f} (of the token behind it {figures['auc_next']:.3f}), calibration error "
        f"{figures['ece']:.3f}, false alarms {figures['false_alarm_rate']:.1%} of accepted tokens, "
        f"{figures['caught']:.1%} of rejections caught"
    )
    return 0


def _evaluation(path: Path, traces: Sequence[DraftTrace]) -> Sequence[TextTrace]:
    """The texts of the trace at `path`. ConfigError if prompts of theirs are trained on: the figures would flatter."""
    texts = DraftTrace.load(path).texts
    prompts = {prompt_of(text) for text in texts}
    num_known = len(prompts & {prompt_of(text) for trace in traces for text in trace.texts})
    if num_known:
        raise ConfigError(
            f"{num_known} of {len(prompts)} prompts in {path} are in the traces to train on, too; allowed with "
            "--evaluate: a trace of other prompts"
        )
    return texts


def _to_stderr(line: str) -> None:
    print(f"wisp-edge train-controller: {line}", file=sys.stderr, flush=True)
