"""`wisp-bench lossless` on tiny models and fakes: it must pass what is right and catch every kind of wrong."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch

from bench import lossless, lossless_rules
from bench.live import ServerShare
from bench.lossless_live import Cell, References, case_key, judge, run_all
from bench.lossless_reference import Case, Difference, Reference, first_difference, torch_threads
from bench.report import Progress
from tests.factories import ids
from tests.fakes import target_alone
from tests.tiny_model import hf_folder, target_logits
from wisp_plugin.acceptance_model import shipped_model
from wisp_plugin.coupling import Float64s, choose_token
from wisp_plugin.errors import ConfigError, TransportError
from wisp_plugin.messages import Mode, Sampling, Tokens
from wisp_plugin.speculation import RULES, make_controller

SAMPLED = Sampling(seed=3, temperature=0.8, top_p=0.95)
CASE = Case(7, ids(1, 2, 3), Sampling())


def scores_of(row: Sequence[float]) -> Float64s:
    return np.array(row, np.float64)


def difference(expected: Tokens, found: Tokens, row: Sequence[float] = (0.0, 1.0, 2.0, 3.0)) -> Difference | None:
    return first_difference(CASE, expected, found, lambda case, prefix: scores_of(row))


# -- the reference and the verdict -------------------------------------------------------------------------------


def naive(prompt: Tokens, sampling: Sampling, num_tokens: int, eos: Iterable[int] = ()) -> list[int]:
    """The target alone without any cache."""
    tokens = prompt
    for _ in range(num_tokens):
        token = choose_token(target_logits(tokens), sampling, len(tokens), tokens)
        tokens = np.append(tokens, np.int32(token))
        if token in eos:
            break
    return [int(t) for t in tokens[len(prompt) :]]


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED])
def test_reference_is_the_target_alone_and_stops_behind_an_eos(sampling: Sampling) -> None:
    prompt = ids(5, 9, 200, 31)
    expected = naive(prompt, sampling, 10)
    assert Reference(hf_folder(), 10, ()).generate(Case(0, prompt, sampling)).tolist() == expected
    eos = expected[4]
    stopped = Reference(hf_folder(), 10, (eos,)).generate(Case(0, prompt, sampling)).tolist()
    assert stopped == naive(prompt, sampling, 10, (eos,)) == expected[: expected.index(eos) + 1]


def test_reference_scores_explain_its_choice() -> None:
    reference, case = Reference(hf_folder(), 6, ()), Case(0, ids(5, 9, 200, 31), SAMPLED)
    generated = reference.generate(case)
    for i in range(6):
        assert int(reference.scores(case, generated[:i]).argmax()) == generated[i]


def test_equal_ids_are_no_difference_and_cost_no_scores() -> None:
    def never(case: Case, prefix: Tokens) -> Float64s:
        raise AssertionError("scores of equal sessions are not needed")

    assert first_difference(CASE, ids(3, 1, 2), ids(3, 1, 2), never) is None


def test_a_wrong_token_is_a_mismatch_with_its_place_and_scores() -> None:
    asked: list[list[int]] = []

    def scores(case: Case, prefix: Tokens) -> Float64s:
        asked.append(prefix.tolist())
        return scores_of([0.0, 1.0, 2.0, 3.0])

    found = first_difference(CASE, ids(3, 3, 1), ids(3, 2, 1), scores)
    assert found is not None
    assert not found.is_tie
    assert asked == [[3]]
    assert (found.index, found.position, found.expected, found.found) == (1, 4, 3, 2)
    assert (found.best, found.best_scores, found.scores) == ((3, 2), (3.0, 2.0), (3.0, 2.0))


@pytest.mark.parametrize(
    ("row", "found", "is_tie"),
    [
        ([0.0, 1.0, 2.9995, 3.0], 2, True),
        ([0.0, 1.0, 2.998, 3.0], 2, False),  # too far apart
        ([0.0, 2.9994, 2.9995, 3.0], 1, False),  # near, but not one of the two best
        ([0.0, 1.0, 3.0, 2.9995], 2, True),  # the score behind the whole prefix may turn the order round
        ([-np.inf, -np.inf, -np.inf, 3.0], 2, False),  # a token that the filters removed
    ],
)
def test_only_the_two_best_tokens_close_together_are_a_tie(row: list[float], found: int, is_tie: bool) -> None:
    verdict = difference(ids(3), ids(found), row)
    assert verdict is not None
    assert verdict.is_tie is is_tie


@pytest.mark.parametrize(("expected", "found"), [(ids(3, 2), ids(3)), (ids(3), ids(3, 2)), (ids(3), ids())])
def test_ending_early_or_late_is_a_mismatch_however_near_the_scores(expected: Tokens, found: Tokens) -> None:
    verdict = difference(expected, found, [3.0, 3.0, 3.0, 3.0])
    assert verdict is not None
    assert not verdict.is_tie
    assert None in (verdict.expected, verdict.found)


# -- live cells --------------------------------------------------------------------------------------------------


class NamedDrafter:
    """Notices if two sessions use it at once."""

    def __init__(self) -> None:
        self.in_use = False

    def advance(self, tokens: Tokens) -> int:
        return 0

    def draft_token_with_stats(self, tokens: Tokens, sampling: Sampling) -> tuple[int, None]:
        return 0, None


def make_references(num_cases: int = 5) -> References:
    cases = [Case(i, ids(1, 2, i), Sampling()) for i in range(num_cases)]
    expected = {case_key(case): np.array(target_alone(case.prompt, 12)[3:], np.int32) for case in cases}
    return References({"greedy": cases}, expected, lambda case, prefix: scores_of([5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0]))


def test_run_all_lends_a_drafter_to_one_session_at_a_time() -> None:
    drafters = [NamedDrafter(), NamedDrafter()]

    def run(case: Case, mode: Mode, drafter: NamedDrafter) -> Tokens:
        assert not drafter.in_use
        drafter.in_use = True
        tokens = np.array(target_alone(case.prompt, 12)[3:], np.int32)
        drafter.in_use = False
        return tokens

    refs = make_references(20)
    found = run_all(run, refs.cases["greedy"], Mode.FREE, drafters, Progress(20, "test"))
    assert [case.number for case, _ in found] == list(range(20))
    cell = judge("int8", Mode.FREE, "greedy", found, refs)
    assert (cell.num_sessions, cell.num_equal, cell.differences) == (20, 20, ())


def test_run_all_raises_what_a_session_raises() -> None:
    def run(case: Case, mode: Mode, drafter: NamedDrafter) -> Tokens:
        raise TransportError("the server is gone")

    with pytest.raises(TransportError, match="the server is gone"):
        run_all(run, make_references().cases["greedy"], Mode.FREE, [NamedDrafter()], Progress(5, "test"))


def cell_with_one_wrong_token() -> Cell:
    refs = make_references()
    found = [(case, refs.expected[case_key(case)].copy()) for case in refs.cases["greedy"]]
    found[3][1][5] = (found[3][1][5] + 1) % 7
    return judge("int4", Mode.SYNC, "greedy", found, refs)


def test_one_wrong_token_of_one_session_is_counted_and_described() -> None:
    cell = cell_with_one_wrong_token()
    assert (cell.num_equal, len(cell.ties), len(cell.mismatches)) == (4, 0, 1)
    figures = lossless.live_figures([cell])
    assert figures["mismatches"] == 1
    [details] = figures["mismatch_details"]
    assert (details["draft"], details["mode"], details["prompt"], details["index"]) == ("int4", "sync", 3, 5)


def test_a_cell_that_verified_no_drafts_is_noticed() -> None:
    refs = make_references()
    found = [(case, refs.expected[case_key(case)]) for case in refs.cases["greedy"]]
    with_drafts = judge("int8", Mode.FREE, "greedy", found, refs, ServerShare(9.0, 2.0, 0.8))
    without = judge("int8", Mode.FREE, "greedy", found, refs, ServerShare(9.0, 1.0, None))
    assert lossless.live_figures([with_drafts, without])["cells_without_verified_drafts"] == 1


def test_every_stop_rule_is_run_in_every_mode_that_it_is_for() -> None:
    model = shipped_model(lossless_rules.DRAFT)
    for mode, cases in lossless_rules.RULE_CASES.items():
        names = {case.rule.partition(":")[0] for case in cases}
        for rule in {name.partition(":")[0] for name in RULES} - {"auto"}:
            if rule in names:
                continue
            with pytest.raises(ConfigError, match="is for mode"):
                make_controller(rule, mode, model)
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            case.controller(mode, model)


def test_a_few_of_the_references_are_spread_prompts_of_one_seed_and_shorter() -> None:
    cases = {
        "greedy": [Case(i, ids(1, i), Sampling()) for i in range(10)],
        "sampled": [Case(i, ids(1, i), dataclasses.replace(SAMPLED, seed=s)) for s in (1, 2) for i in range(10)],
    }
    expected = {case_key(case): ids(*range(6)) for group in cases.values() for case in group}
    found = lossless_rules.few(References(cases, expected, lambda case, prefix: scores_of([1.0])), 4, 3)
    for sampling, seed in (("greedy", 0), ("sampled", 1)):
        assert [(case.number, case.sampling.seed) for case in found.cases[sampling]] == [
            (number, seed) for number in (0, 2, 5, 7)
        ]
    assert len(found.expected) == 8
    assert all(tokens.tolist() == [0, 1, 2] for tokens in found.expected.values())


def test_a_mismatch_of_a_rule_is_counted_with_the_others_and_named() -> None:
    cell = dataclasses.replace(cell_with_one_wrong_token(), rule="svip")
    figures = lossless.live_figures([cell])
    assert (figures["mismatches"], figures["rule_mismatches"], figures["rule_sessions"]) == (1, 1, 5)
    assert figures["mismatch_details"][0]["rule"] == "svip"
    assert lossless.live_figures([cell_with_one_wrong_token()])["rule_mismatches"] == 0


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    lossless.add_arguments(parser)
    return parser.parse_args(argv)


def test_a_mismatch_makes_the_exit_code_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def outcome(cell: Cell) -> int:
        figures = lossless.live_figures([cell])
        monkeypatch.setattr(lossless, "run", lambda config: (figures, {"mismatches": "<= 0"}))
        return lossless.main(arguments("--quick"))

    refs = make_references()
    right = judge("int8", Mode.FREE, "greedy", [(c, refs.expected[case_key(c)]) for c in refs.cases["greedy"]], refs)
    assert outcome(right) == 0
    assert outcome(cell_with_one_wrong_token()) == 1
    assert '"mismatches": 1' in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    "argv",
    [
        ("--prompts", "81"),
        ("--sessions", "0"),
        ("--drafts", "int8,fp4"),
        ("--drafts", "int8,int8"),
        ("--modes", ""),
        ("--transport", "unary", "--modes", "free,sync"),
        ("--distribution-seeds", "10"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(argv: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        lossless.checked(arguments(*argv))


def test_torch_threads_are_given_back() -> None:
    def fail_within() -> None:
        with torch_threads(1):
            assert torch.get_num_threads() == 1
            raise RuntimeError("inside")

    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="inside"):
        fail_within()
    assert torch.get_num_threads() == before
