"""The plans of the capacity planner: what each change changes, which there are, and how long their runs are."""

from __future__ import annotations

from dataclasses import fields

import pytest

from bench import plans
from bench.baseline_rules import ControllerOf
from bench.settings import NO_DRAFTS, PRICE
from bench.trace_walk import WalkOf
from bench.workload import DeviceKind
from tests.planner_fakes import plans_by_name


def differences(name: str, *words: str) -> dict[str, object]:
    """What a plan's scenario and workload have otherwise than those of what is asked, by field."""
    by_name = plans_by_name(*words)
    old, new = by_name[plans.AS_ASKED].scenario, by_name[name].scenario
    changed: dict[str, object] = {}
    for before, after in ((old, new), (old.workload, new.workload)):
        values = {field.name: getattr(after, field.name) for field in fields(after) if field.name != "workload"}
        changed |= {field: value for field, value in values.items() if value != getattr(before, field)}
    return changed


class TestPlans:
    def test_what_is_asked(self) -> None:
        words = ("--rtt-ms", "30", "--speed", "20", "--prompt", "300", "--output-tokens", "90", "--think-s", "3")
        plan = plans_by_name(*words, "--kv-tokens", "9000")[plans.AS_ASKED]
        workload = plan.scenario.workload
        assert workload.slo(0, 0).tpot_ms == pytest.approx(60.0)
        assert (workload.rtt_s, workload.kinds, workload.think_s) == ((0.03, 0.03), (DeviceKind(20.0),), 3.0)
        assert (workload.median_prompt_tokens, workload.median_output_tokens) == (300, 90)
        assert plan.scenario.controller == ControllerOf(PRICE, "int4")
        assert (plan.scenario.policy, plan.scenario.kv_tokens, plan.scenario.server_draft) == ("wisp", 9000, None)
        assert plan.loads == (40,)

    @pytest.mark.parametrize(
        ("name", "changed"),
        [
            (plans.WITHOUT_DRAFTS, {"controller": ControllerOf(NO_DRAFTS, "int4")}),
            ("devices that draft twice as fast", {"kinds": (DeviceKind(120.0),)}),
            ("half the round trip", {"rtt_s": (0.0125, 0.0125)}),
            ("prompts half as long", {"median_prompt_tokens": 125}),
            ("the better draft mixed48", {"controller": ControllerOf(PRICE, "mixed48"), "tokens": WalkOf("mixed48")}),
            ("the better draft int8", {"controller": ControllerOf(PRICE, "int8"), "tokens": WalkOf("int8")}),
            (plans.SECOND_SERVER, {}),
        ],
    )
    def test_a_change_is_what_its_name_says_and_nothing_else(self, name: str, changed: dict[str, object]) -> None:
        assert differences(name) == changed

    def test_a_longer_tpot(self) -> None:
        assert set(differences("tpot 25 % longer")) == {"classes"}
        workload = plans_by_name()["tpot 25 % longer"].scenario.workload
        assert workload.slo(0, 0).tpot_ms == pytest.approx(75.0)

    @pytest.mark.parametrize(("num_drafts", "kv_share"), [(3, 0.7), (2, 0.7), (3, 0.35), (1, 0.7)])
    def test_drafts_of_the_server(self, num_drafts: int, kv_share: float) -> None:
        drafts = f"up to {num_drafts} drafts" if num_drafts > 1 else "one draft"
        name = f"{drafts} of the server as well, KV for {kv_share:.0%}"
        assert set(differences(name)) == {"engine", "kv_tokens", "server_draft", "server_draft_kv_tokens"}
        scenario = plans_by_name()[name].scenario
        assert scenario.engine["max_server_drafts"] == num_drafts
        assert scenario.server_draft_kv_tokens == int(kv_share * scenario.kv_tokens)

    @pytest.mark.parametrize(
        ("words", "name", "is_there"),
        [
            (("--prompt", "31"), "prompts half as long", False),
            (("--prompt", "32"), "prompts half as long", True),
            (("--rtt-ms", "0"), "half the round trip", False),
            (("--draft", "int8"), "the better draft int8", False),
            (("--profile", "xeon-2-smollm2-135m"), "up to 3 drafts of the server as well, KV for 70%", False),
        ],
    )
    def test_what_would_change_nothing_or_is_unknown_is_no_plan(
        self, words: tuple[str, ...], name: str, is_there: bool
    ) -> None:
        assert (name in plans_by_name(*words)) is is_there

    @pytest.mark.parametrize(("asked", "loads"), [("40", (20, 20)), ("41", (20, 21)), ("1", (0, 1))])
    def test_a_second_server_has_half_of_the_devices(self, asked: str, loads: tuple[int, int]) -> None:
        assert plans_by_name("--devices", asked)[plans.SECOND_SERVER].loads == loads

    @pytest.mark.parametrize(("kv_tokens", "shares"), [("3072", ["70%", "70%", "35%", "70%"]), ("4000", 3 * ["70%"]),
                                                       ("4500", [])])  # fmt: skip
    def test_drafts_of_the_server_leave_room_for_the_longest_session(self, kv_tokens: str, shares: list[str]) -> None:
        without_room = [plan for plan in plans_by_name("--kv-tokens", kv_tokens).values() if not plan.has_room]
        assert [plan.name.rpartition(" ")[2] for plan in without_room] == shares
        assert all(plan.scenario.server_draft is not None for plan in without_room)


class TestLengths:
    def test_runs_are_longer_for_few_devices(self) -> None:
        timing = plans.PlanTiming(10.0)
        assert [next(timing.lengths_s(n)) for n in (1, 20, 60, 1000)] == [600.0, 75.0, 36.0, 36.0]

    @pytest.mark.parametrize(
        ("seconds", "num_devices", "lengths"),
        [
            (None, 1, [600.0, 1200.0, 2400.0, 4800.0, 9600.0, 14_400.0]),
            (None, 60, [36.0, 72.0, 144.0, 288.0, 576.0, 600.0]),
            (250.0, 12, [250.0, 500.0, 1000.0, 1200.0]),
            (900.0, 100, [900.0]),
        ],
    )
    def test_each_is_twice_the_one_before_up_to_a_bound(
        self, seconds: float | None, num_devices: int, lengths: list[float]
    ) -> None:
        assert list(plans.PlanTiming(10.0, seconds).lengths_s(num_devices)) == lengths

    def test_a_third_of_a_run_is_warm_up(self) -> None:
        run = next(plans_by_name("--seconds", "6")[plans.AS_ASKED].runs(3))
        assert (run.duration_s, run.warm_up_s, run.workload.stagger_s, run.workload.num_devices) == (6.0, 2.0, 2.0, 3)
