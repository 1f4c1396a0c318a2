"""The emulated verifier: its KV accounting, its texts, its time by a fake clock, and its configuration."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.gpu_cost import A100_32G
from bench.sim_client import SessionTokens
from bench.workload import SessionSpec
from tests.factories import make_config
from tests.traces import make_text, make_trace
from triton_models.emulated_text import EmulatedText, HashText, RingText
from triton_models.emulated_verifier import EmulatedVerifier, Emulation, is_emulated, load_emulated
from wisp_plugin.config import VerifierConfig
from wisp_plugin.draft_trace import DraftTrace
from wisp_plugin.engine import Engine
from wisp_plugin.errors import CapacityError, ConfigError
from wisp_plugin.estimator import EMPTY_PASS, Estimator
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.messages import Commit, Draft, Open, PassItem, Sampling, Slo, Status
from wisp_plugin.pass_features import member_features
from wisp_plugin.profile import Fingerprint, Measurement, Profile, save_profile
from wisp_plugin.scheduler import make_scheduler

PROFILE = Profile(
    Fingerprint("32g", "", "bfloat16", "derived", 0, {}), A100_32G, 1.0, 0.05,
    Measurement(0, 0, 0.0, 0.0, 0.0, "derived", "test"),
)  # fmt: skip
RING = RingText.of(make_trace(3).texts)
TEXTS = [HashText(), RING]


class FakeClock:
    """A clock that sleeping moves, the first time by `early_s` less than was asked for."""

    def __init__(self, early_s: float = 0.0) -> None:
        self.now_s, self.sleeps_s = 100.0, list[float]()
        self._early_s = early_s

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0.0
        self.sleeps_s.append(seconds)
        self.now_s += seconds - self._early_s
        self._early_s = 0.0


def make_verifier(
    text: EmulatedText = RING, num_blocks: int = 64, noise_sigma: float = 0.0, seed: int = 0,
    clock: FakeClock | None = None,
) -> EmulatedVerifier:  # fmt: skip
    clock, pool = clock or FakeClock(), BlockPool(num_blocks, 8)
    return EmulatedVerifier(text, PROFILE, pool, noise_sigma, seed, clock=clock, sleep=clock.sleep)


def make_item(
    text: EmulatedText, seed: int, num_committed: int, num_cached: int = 0, drafts: tuple[int, ...] = ()
) -> PassItem:
    """A session with `seed` that has `num_committed` tokens of its text, and draft tokens."""
    tokens = np.concatenate([text.tokens(seed, 0, num_committed), np.array(drafts, np.int32)]).astype(np.int32)
    return PassItem(f"{seed:032x}", tokens, num_cached, len(drafts), Sampling(seed=seed))


@pytest.mark.parametrize("text", TEXTS)
@given(seed=st.integers(0, 2**63 - 1), start=st.integers(0, 5000), length=st.integers(0, 300))
def test_a_text_is_a_function_of_seed_and_position(text: EmulatedText, seed: int, start: int, length: int) -> None:
    whole = text.tokens(seed, 0, start + length)
    assert whole.dtype == np.int32
    assert np.array_equal(text.tokens(seed, start, start + length), whole[start:])


def test_hashes_are_those_of_the_simulation() -> None:
    spec = SessionSpec(7 << 20 | 3, 7, 0, Slo(1.0, 1.0), 20, 50, None, 0)
    assert np.array_equal(HashText().tokens((5 << 40) ^ spec.number, 0, 70), SessionTokens(5, spec, 0.7).target)


def test_a_ring_holds_what_was_generated() -> None:
    generated = np.concatenate([text.generated for text in make_trace(3).texts])
    first = RING.first(42)
    assert np.array_equal(RING.tokens(42, 0, len(generated)), np.roll(generated, -first))


@pytest.mark.parametrize("text", TEXTS)
def test_accepted_drafts_stay_and_wrong_ones_leave_the_memory(text: EmulatedText) -> None:
    verifier = make_verifier(text)
    own = text.tokens(9, 0, 40)
    (outcome,) = verifier.run([make_item(text, 9, 20)])
    assert outcome.chosen.tolist() == [own[20]]
    assert verifier.pool.length(outcome.session) == 20
    drafts = (int(own[21]), int(own[22]), int(own[23]) ^ 1, int(own[24]))
    (outcome,) = verifier.run([make_item(text, 9, 21, 20, drafts)])
    assert outcome.chosen.tolist() == own[21:26].tolist()
    assert verifier.pool.length(outcome.session) == 23
    verifier.pool.check_integrity()
    verifier.release(outcome.session)
    assert verifier.pool.num_free == verifier.pool.num_blocks


def test_a_prefill_chunk_chooses_nothing() -> None:
    verifier, item = make_verifier(), make_item(RING, 1, 24)
    (outcome,) = verifier.run([dataclasses.replace(item, is_prefill_chunk=True)])
    assert not len(outcome.chosen)
    assert verifier.pool.length(item.session) == 24


def test_a_pass_that_does_not_fit_grows_nobody() -> None:
    verifier = make_verifier(num_blocks=4)
    verifier.run([make_item(RING, 1, 8)])
    with pytest.raises(CapacityError, match="needs 4 KV blocks, 3 are free"):
        verifier.run([make_item(RING, 1, 9, 8), make_item(RING, 2, 24)])
    assert verifier.pool.length(f"{1:032x}") == 8
    with pytest.raises(CapacityError, match="counts on 16 tokens"):
        verifier.run([make_item(RING, 1, 17, 16)])
    with pytest.raises(ValueError, match="takes part once"):
        verifier.run([make_item(RING, 1, 9, 8)] * 2)
    verifier.pool.check_integrity()


class TestTime:
    def test_a_pass_ends_when_the_profile_says(self) -> None:
        clock = FakeClock()
        verifier = make_verifier(clock=clock)
        items = [make_item(RING, seed, 30 + seed) for seed in range(5)]
        expected_s = float(Estimator(A100_32G).predict(EMPTY_PASS + member_features(items).sum(axis=0)))
        verifier.run(items)
        assert clock.now_s - 100.0 == pytest.approx(expected_s)

    def test_what_is_computed_meanwhile_is_part_of_the_pass(self) -> None:
        """The end is a moment and not a length: time spent before the sleep shortens it."""
        clock, items = FakeClock(), [make_item(RING, 1, 30)]

        class SlowText:
            def tokens(self, *args: int) -> np.ndarray:
                clock.now_s += 0.02
                return RING.tokens(*args)

        verifier = make_verifier(SlowText(), clock=clock)
        verifier.run(items)
        assert sum(clock.sleeps_s) == pytest.approx(verifier.pass_s(items) - 0.02)
        assert clock.now_s - 100.0 == pytest.approx(verifier.pass_s(items))

    def test_tokens_are_chosen_late_but_so_early_that_the_pass_ends_in_time(self) -> None:
        """While a GPU computes, Python has time for other things."""
        clock, chosen_s = FakeClock(), []

        class SlowText:
            seconds = 0.005

            def tokens(self, *args: int) -> np.ndarray:
                chosen_s.append(clock.now_s)
                clock.now_s += self.seconds
                return RING.tokens(*args)

        text = SlowText()
        verifier = make_verifier(text, clock=clock)

        def chosen_before_end_s() -> float:
            started_s = clock.now_s
            verifier.run([make_item(RING, 1, 30)])
            assert clock.now_s - started_s == pytest.approx(0.0362, abs=1e-3)
            verifier.release(make_item(RING, 1, 30).session)
            return clock.now_s - chosen_s[-1]

        assert [chosen_before_end_s() for _ in range(20)][-1] == pytest.approx(0.01)
        text.seconds = 0.009
        assert [chosen_before_end_s() for _ in range(2)][-1] == pytest.approx(0.018)

    def test_a_sleep_that_ends_early_goes_on(self) -> None:
        clock = FakeClock(early_s=0.001)
        make_verifier(clock=clock).run([make_item(RING, 1, 30)])
        assert len(clock.sleeps_s) > 1
        assert clock.now_s - 100.0 >= 0.036

    def test_noise_has_mean_one_and_comes_from_the_seed(self) -> None:
        items = [make_item(RING, 1, 30)]
        first, second = make_verifier(noise_sigma=0.2), make_verifier(noise_sigma=0.2)
        times_s = np.array([first.pass_s(items) for _ in range(4000)])
        assert times_s[:10].tolist() == [second.pass_s(items) for _ in range(10)]
        other = make_verifier(noise_sigma=0.2, seed=1)
        assert not set(times_s) & {other.pass_s(items) for _ in range(10)}
        assert times_s.mean() == pytest.approx(make_verifier().pass_s(items), rel=0.02)
        assert np.log(times_s).std() == pytest.approx(0.2, rel=0.05)


class Answers:
    """A reply that keeps what it is sent."""

    def __init__(self) -> None:
        self.commits: list[Commit] = []

    def send(self, commit: Commit) -> None:
        self.commits.append(commit)

    def finish(self) -> None:
        pass

    def fail(self, message: str) -> None:
        raise AssertionError(message)

    def is_cancelled(self) -> bool:
        return False


@pytest.mark.parametrize("policy", ["wisp", "continuous", "edf"])
def test_the_engine_commits_the_text_whatever_is_drafted(policy: str) -> None:
    """Too little memory for all, wrong drafts: evictions and rollbacks, and at the end nothing is held."""
    clock = FakeClock()
    verifier = make_verifier(num_blocks=24, clock=clock)
    config = make_config(policy=policy, max_load=0.0, max_pass_tokens=64)
    engine = Engine(make_scheduler(config, verifier.pool, PROFILE.estimator()), verifier, config, clock)
    answers = {seed: Answers() for seed in range(6)}
    for seed, reply in answers.items():
        prompt = RING.tokens(seed, 0, 10 + seed)
        engine.submit(Open(f"{seed:032x}", prompt, len(prompt), 40, Sampling(seed=seed), Slo(1000.0, 100.0)), reply)
    for turn in range(600):
        if not engine.step():
            clock.now_s += 0.01
        verifier.pool.check_integrity()
        seed = turn % 6
        seen = 10 + seed + sum(len(commit.tokens) for commit in answers[seed].commits)
        if seen < 48 + seed and turn % 4:
            drafts = RING.tokens(seed, seen, seen + 2) ^ np.array([0, turn % 3 == 0], np.int32)
            engine.submit(Draft(f"{seed:032x}", seen, seen, drafts), Answers())
    for seed, reply in answers.items():
        assert reply.commits[-1].status is Status.LENGTH
        tokens = np.concatenate([commit.tokens for commit in reply.commits])
        assert np.array_equal(tokens, RING.tokens(seed, 10 + seed, 50 + seed))
    assert verifier.pool.num_free == verifier.pool.num_blocks


class TestConfiguration:
    @pytest.mark.parametrize(
        ("target", "line"),
        [
            ("emulated:", "names no profile; the form is emulated:PROFILE.json"),
            ("emulated:,t.npz", "names no profile"),
            ("emulated:p.json,noise=x", "noise of an emulated target is 'x'; allowed: 0 to 1"),
            ("emulated:p.json,noise=-1", "allowed: 0 to 1"),
            ("emulated:p.json,seed=-1", "seed of an emulated target is '-1'; allowed: 0 to"),
            pytest.param(f"emulated:p.json,seed={'9' * 5000}", "; allowed: 0 to", id="endless seed"),
            ("emulated:p.json,speed=2", "has 'speed=2'; the form is"),
            ("emulated:p.json,a.npz,b.npz", "has 'b.npz'; the form is"),
            ("emulated:p.json,", "has ''; the form is"),
            ("emulated:missing.json", "profile missing.json cannot be read"),
        ],
    )
    def test_what_cannot_work_says_why_in_one_line(self, target: str, line: str) -> None:
        with pytest.raises(ConfigError, match=line) as caught:
            load_emulated(VerifierConfig(target=target))
        assert "\n" not in str(caught.value)

    def test_a_target_says_all(self, tmp_path: Path) -> None:
        save_profile(PROFILE, tmp_path / "p.json")
        trace = make_trace(3)
        trace.save(tmp_path / "t.npz")
        emulation = Emulation(tmp_path / "p.json", tmp_path / "t.npz", 0.1, 7)
        assert Emulation.parse(emulation.target) == emulation
        verifier = load_emulated(VerifierConfig(target=emulation.target, kv_tokens=4096))
        assert verifier.profile == PROFILE
        assert verifier.max_context_tokens == verifier.pool.num_tokens == 4096
        (outcome,) = verifier.run([make_item(RING, 5, 12)])
        assert outcome.chosen.tolist() == RING.tokens(5, 12, 13).tolist()

    def test_a_trace_that_is_none_fails_the_load(self, tmp_path: Path) -> None:
        save_profile(PROFILE, tmp_path / "p.json")
        with pytest.raises(ConfigError, match=r"no\.npz does not exist"):
            load_emulated(VerifierConfig(target=f"emulated:{tmp_path / 'p.json'},{tmp_path / 'no.npz'}"))

    @pytest.mark.parametrize("num_texts", [0, 1])
    def test_a_trace_without_tokens_fails_the_load(
        self, num_texts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_profile(PROFILE, tmp_path / "p.json")
        texts = [make_text(0, num_generated=0)] * num_texts
        monkeypatch.setattr(DraftTrace, "load", lambda path: DraftTrace(texts, {}))
        with pytest.raises(ConfigError, match="a trace with generated tokens is needed"):
            load_emulated(VerifierConfig(target=f"emulated:{tmp_path / 'p.json'},{tmp_path / 'x.npz'}"))

    def test_other_targets_are_not_emulated(self) -> None:
        assert not is_emulated("default")
        assert is_emulated("emulated:p.json")


def test_no_torch_on_the_way_to_an_emulated_target() -> None:
    script = (
        "import sys, types; sys.modules['triton_python_backend_utils'] = types.SimpleNamespace(\n"
        "  TRITONSERVER_RESPONSE_COMPLETE_FINAL=1)\n"
        "import triton_models.verifier_model\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
