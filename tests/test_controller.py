"""Beliefs about the chain, what commits teach, and the choice not to draft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tests.traces import make_trace
from wisp_plugin.acceptance_model import FEATURES, AcceptanceModel, Calibration, features, log_odds
from wisp_plugin.controller import MAX_AHEAD, Abstention, Chain, SpeculationController
from wisp_plugin.draft_stats import DraftStats
from wisp_plugin.errors import ConfigError, ModelError
from wisp_plugin.messages import Mode
from wisp_plugin.pace import Pace
from wisp_plugin.speculation import RULES, make_controller, no_drafts
from wisp_plugin.stop_rules import Fixed

PACE = Pace()
SURE, UNSURE = DraftStats(0.95, 0.2, 0.9, 3.0, 0.95), DraftStats(0.3, 3.0, 0.05, 3.0, 0.3)


def model() -> AcceptanceModel:
    """Log-odds of the token: three times its margin less one; of the one behind it: zero."""
    num_features = len(FEATURES)
    weights = np.zeros((num_features, 1), np.float32)
    weights[FEATURES.index("margin")] = 0.01
    out = np.array([[300.0, 0.0]], np.float32)
    zeros, ones = np.zeros(num_features, np.float32), np.ones(num_features, np.float32)
    return AcceptanceModel(
        zeros, ones, weights, np.zeros(1, np.float32), out, np.array([-1.0, 0.0], np.float32),
        np.zeros((9, 2), np.int8), 0.7, 1.0
    )


class Scripted:
    """A rule with given answers."""

    def __init__(self, *answers: bool) -> None:
        self.answers = list(answers)

    def draft_on(self, chain: Chain, pace: Pace, now_s: float) -> bool:
        return self.answers.pop(0)

    def waits(self, chain: Chain, pace: Pace) -> bool:
        return True

    def on_commit(self, num_right: int, num_drafted: int) -> None:
        pass


def test_survival_is_the_product_along_the_chain() -> None:
    controller = SpeculationController(Fixed(9), model())
    controller.on_drafted(7, SURE)
    controller.on_drafted(7, UNSURE)
    sure, both = controller.survival()
    assert 0.8 < sure < 0.9
    assert both == pytest.approx(sure * controller.calibration.probability(3 * 0.05 - 1.0), rel=0.01)
    assert controller.chain.expected(1) == pytest.approx(both * controller.chain.following)


def test_without_a_model_tokens_are_as_good_as_the_recent_ones() -> None:
    controller = SpeculationController(Fixed(9))
    for _ in range(2):
        controller.on_drafted(7, None)
    assert controller.survival() == pytest.approx([0.75, 0.75**2])
    controller.on_commit(2, found_wrong=False, is_kept=True)
    assert controller.chain.acceptance > 0.75
    assert controller.survival() == []


def test_a_commit_makes_its_tokens_certain() -> None:
    controller = SpeculationController(Fixed(9), model())
    for _ in range(3):
        controller.on_drafted(7, SURE)
    before = controller.survival()
    controller.on_commit(1, found_wrong=False, is_kept=True)
    assert len(controller.survival()) == 2
    assert controller.survival()[0] > before[1]


@pytest.mark.parametrize(("found_wrong", "is_kept"), [(True, False), (False, False)])
def test_a_rollback_empties_the_chain(found_wrong: bool, is_kept: bool) -> None:
    controller = SpeculationController(Fixed(9), model())
    for _ in range(3):
        controller.on_drafted(7, SURE)
    controller.on_commit(1, found_wrong, is_kept)
    assert controller.survival() == []


def test_a_rule_hears_of_what_a_commit_settled_and_not_of_what_is_still_open() -> None:
    """In `free` a commit may agree with the front of a long chain: nothing was rejected."""

    class Listening(Scripted):
        heard: ClassVar[list[tuple[int, int]]] = []

        def on_commit(self, num_right: int, num_drafted: int) -> None:
            self.heard.append((num_right, num_drafted))

    controller = SpeculationController(Listening(), model())
    for _ in range(10):
        controller.on_drafted(7, SURE)
    controller.on_commit(3, found_wrong=False, is_kept=True)
    controller.on_commit(2, found_wrong=True, is_kept=False)
    assert Listening.heard == [(3, 3), (2, 7)]


def test_never_more_than_the_protocol_carries() -> None:
    controller = SpeculationController(Scripted(*[True] * 100))
    num_drafted = 0
    while controller.draft_on(PACE, 0.0):
        controller.on_drafted(7, None)
        num_drafted += 1
    assert num_drafted == MAX_AHEAD


def test_calibration_learns_a_shift_and_stays_bounded() -> None:
    rng = np.random.default_rng(0)
    calibration = Calibration(0.7)
    for _ in range(1500):  # the truth: two less in log-odds than the model says
        z = float(rng.normal(1.0, 1.5))
        calibration.learn(z, bool(rng.random() < 1 / (1 + np.exp(2.0 - z))))
    errors = [calibration.probability(z) - 1 / (1 + np.exp(2.0 - z)) for z in (-1.0, 0.0, 1.0, 2.0)]
    assert max(map(abs, errors)) < 0.12
    for _ in range(5000):
        calibration.learn(3.0, accepted=False)
    assert calibration.probability(3.0) > 0.0
    assert calibration.SHIFTS[0] <= calibration.shift <= calibration.SHIFTS[1]
    for _ in range(3000):  # and it comes back
        calibration.learn(1.0, accepted=True)
    assert calibration.probability(1.0) > 0.7


def test_not_drafting_has_hysteresis_is_probed_and_counted() -> None:
    answers = [True, False, True, False, False, *[False] * 30, True, True, True]
    controller = SpeculationController(Scripted(*answers), abstention=Abstention(2, first_probe=8))
    decisions = []
    for _ in range(len(answers)):
        decisions.append(controller.draft_on(PACE, 0.0))
        assert controller.draft_on(PACE, 0.0) is decisions[-1]  # until the next commit
        controller.on_commit(0, found_wrong=False, is_kept=False)
    assert decisions[:5] == [True, True, True, True, False]  # one refusal is not enough
    resting = decisions[5:35]
    assert [i for i, drafts in enumerate(resting) if drafts] == [6, 22]  # probes, farther and farther apart
    assert decisions[35:] == [False, True, True]
    assert (controller.num_choices, controller.num_probes) == (38, 2)
    assert controller.num_abstained == decisions.count(False)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "fixed:N"])
@pytest.mark.parametrize("mode", list(Mode))
def test_every_rule_by_its_name(rule: str, mode: Mode) -> None:
    if (rule, mode) in (("price", Mode.SYNC), ("ratio", Mode.FREE)):
        with pytest.raises(ConfigError, match="is for mode"):
            make_controller(rule, mode, model())
    else:
        assert make_controller(rule, mode, model()).draft_on(PACE, 0.0) in (True, False)


@pytest.mark.parametrize("rule", ["", "best", "fixed:", "fixed:x", "fixed:-1", "fixed:99", "svip:2"])
def test_other_names_are_refused(rule: str) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        make_controller(rule, Mode.FREE, model())


@pytest.mark.parametrize("rule", ["fixed", "fixed:4", "svip", "adaedl", "paper"])
def test_an_energy_price_is_refused_by_rules_that_have_none(rule: str) -> None:
    message = f"'{rule}' has no energy price, 0.2 was given; allowed with: auto, ratio, price"
    with pytest.raises(ConfigError, match=message):
        make_controller(rule, Mode.SYNC, model(), 0.2)
    make_controller("ratio", Mode.SYNC, model(), 0.2)
    make_controller("auto", Mode.FREE, model(), 0.2)


def test_a_thin_client_never_drafts() -> None:
    assert not no_drafts().draft_on(PACE, 0.0)


def test_model_file_round_trip(tmp_path: object) -> None:
    path = tmp_path / "weights.npz"  # type: ignore[operator]
    model().save(path, "nothing")
    loaded = AcceptanceModel.load(path)
    values = features(SURE, UNSURE, 3, 0.6, (0.5, -0.5))
    assert loaded.log_odds(values) == pytest.approx(model().log_odds(values))
    assert loaded.log_odds_of(np.array([values], np.float32))[0].tolist() == pytest.approx(loaded.log_odds(values))


def test_damaged_weights_are_refused_in_one_line(tmp_path: object) -> None:
    path = tmp_path / "weights.npz"  # type: ignore[operator]
    with pytest.raises(ModelError, match="do not exist"):
        AcceptanceModel.load(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ModelError, match="holds no controller weights"):
        AcceptanceModel.load(path)
    np.savez(path, format=99, features=np.array(FEATURES))
    with pytest.raises(ModelError, match="another version"):
        AcceptanceModel.load(path)
    make_trace(1, num_generated=5).save(path)
    with pytest.raises(ModelError, match="holds no controller weights"):
        AcceptanceModel.load(path)


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes:
    at = content.index(b"weights.npy") + 80
    return content[:at] + bytes(255 - byte for byte in content[at : at + 60]) + content[at + 60 :]


@pytest.mark.parametrize("damage", [_cut, _flipped, lambda content: b"", lambda content: content[:4]])
def test_weights_that_are_cut_off_or_flipped_are_refused_in_one_line(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "weights.npz"
    model().save(path, "nothing")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match="holds no controller weights") as caught:
        AcceptanceModel.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("format", [1, 2]), ("base", [0.5, 0.5]), ("bias", 0.0), ("bias", [[0.0] * 4]), ("token_rates", 1), ("mean", "x")],
)
def test_weights_of_other_shapes_are_refused_in_one_line(name: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    model().save(path, "nothing")
    with np.load(path) as data:
        arrays = dict(data)
    np.savez(path, **(arrays | {name: np.array(value)}))
    with pytest.raises(ModelError, match="controller weights"):
        AcceptanceModel.load(path)


@pytest.mark.parametrize("stats", [SURE, UNSURE, DraftStats(1.0, 0.0, 1.0, 0.0, 1.0), DraftStats(0.5, 1, 0, 3, 1e-30)])
def test_features_are_finite(stats: DraftStats) -> None:
    assert np.isfinite(features(stats, None, 0, 0.0, (0.0, 0.0))).all()
    assert abs(log_odds(0.0)) < 7
