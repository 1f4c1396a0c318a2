"""Edge session and engine together over a link that loses whatever is in flight when it breaks.

Whatever happens in whatever order, every session commits exactly the target's tokens, once, in order.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.factories import make_config, make_open, session_id
from tests.fakes import VOCAB_SIZE, FakeClock, FakeReply, FakeVerifier, draft_token, make_engine, target_alone
from wisp_plugin.controller import SpeculationController
from wisp_plugin.edge_session import DraftJob, EdgeSession, Step
from wisp_plugin.messages import Draft, Mode, Open, Status
from wisp_plugin.scheduler import POLICIES
from wisp_plugin.stop_rules import Fixed

EVENTS = ("edge", "up", "server", "down", "disconnect", "restart", "evict", "time")


class Device:
    """An edge session and the two directions of its link, which keep their order."""

    def __init__(self, opened: Open, max_ahead: int) -> None:
        self.opened = opened
        self.session = EdgeSession(opened, SpeculationController(Fixed(max_ahead)))
        self.job: DraftJob | None = None
        self.up: deque[Open | Draft] = deque([self.session.reopen()])
        self.reply = FakeReply()
        self.num_delivered = 0

    def edge(self, now_s: float) -> None:
        """Begin a draft step or end the one that runs; commits and lost connections come between the two."""
        if self.job is not None:
            job, self.job = self.job, None
            self.session.on_drafted(job, draft_token(job.context), 0.01)
            return
        step = self.session.next_step(now_s)
        if step is Step.DRAFT:
            self.job = self.session.begin_draft()
        elif step is Step.SEND:
            self.up.append(self.session.take_message(now_s))

    def down(self, now_s: float) -> None:
        if self.num_delivered < len(self.reply.commits):
            self.num_delivered += 1
            self.session.on_commit(self.reply.commits[self.num_delivered - 1], now_s)

    def reconnect(self) -> None:
        self.reply.cancelled = True
        self.reply = FakeReply()
        self.num_delivered = 0
        if self.session.status is Status.RUNNING:
            self.up = deque([self.session.reopen()])

    @property
    def done(self) -> bool:
        return self.session.status is not Status.RUNNING


class World:
    """Devices, one server, and the events between them."""

    def __init__(self, devices: list[Device], num_blocks: int, max_pass_tokens: int, policy: str = "wisp") -> None:
        self.devices = devices
        self.clock = FakeClock()
        self.num_blocks = num_blocks
        self.config = make_config(
            policy=policy, max_pass_tokens=max_pass_tokens, max_unacked_tokens=128, static_batch_sessions=2, max_load=0
        )
        self.boot()

    def __repr__(self) -> str:
        devices = [(device.opened.mode.value, device.opened.tokens.tolist()) for device in self.devices]
        return f"World({self.config.policy}, {devices}, {self.num_blocks} blocks)"

    def boot(self) -> None:
        self.verifier = FakeVerifier(self.num_blocks)
        self.engine = make_engine(self.verifier, self.clock, self.config)

    def do(self, event: str, device: Device) -> None:
        if event == "server":
            self.engine.step()
        elif event == "up" and device.up:
            message = device.up.popleft()
            draft_reply = FakeReply()
            self.engine.submit(message, device.reply if isinstance(message, Open) else draft_reply)
        elif event == "disconnect":
            device.reconnect()
        elif event == "restart":
            self.boot()
            for each in self.devices:
                each.reconnect()
        elif event == "evict":
            held = [s.id for s in self.engine.scheduler.sessions][:1]
            for each_id in held:
                self.verifier.release(each_id)
            self.engine.scheduler.evict(held)
        elif event == "time":
            self.clock.now_s += 0.3
        elif event in ("edge", "down"):
            getattr(device, event)(self.clock.now_s)

    def finish(self) -> None:
        """Run fairly until every device is done; nothing may hang: one more token is committed before everybody's
        tokens could be computed anew, behind the longest wait for a static batch each pass."""
        num_committed = num_idle = 0
        while not all(device.done for device in self.devices):
            for device in self.devices:
                for event in ("edge", "edge", "edge", "up", "server", "down"):
                    self.do(event, device)
            self.clock.now_s += 0.01
            before, num_committed = num_committed, sum(len(device.session.committed) for device in self.devices)
            num_idle = 0 if num_committed > before else num_idle + 1
            if num_idle > self.most_idle_rounds:
                raise AssertionError(f"hangs: {[d.session.next_step(self.clock.now_s) for d in self.devices]}")

    @property
    def most_idle_rounds(self) -> int:
        num_passes = sum(1 + -(-device.opened.end // self.config.max_pass_tokens) for device in self.devices)
        return 50 + num_passes * (2 + round(self.config.static_batch_wait_ms / 10))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    devices = []
    for number in range(draw(st.integers(1, 3))):
        prompt = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=9))
        opened = make_open(
            prompt,
            draw(st.integers(1, 40)),
            session=session_id(number),
            mode=draw(st.sampled_from(Mode)),
            eos_token_ids=draw(st.sampled_from([(), (3,)])),
        )
        devices.append(Device(opened, draw(st.integers(0, 6))))
    longest = max(device.opened.end for device in devices)
    fits_one = -(-longest // 4)
    policy = draw(st.sampled_from(list(POLICIES)))
    return World(devices, draw(st.integers(fits_one, 3 * fits_one)), draw(st.integers(1, 24)), policy)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds(), st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 2)), max_size=120))
def test_every_session_commits_exactly_the_targets_tokens(world: World, events: list[tuple[str, int]]) -> None:
    for event, number in events:
        world.do(event, world.devices[number % len(world.devices)])
    world.finish()
    for device in world.devices:
        opened = device.opened
        expected = target_alone(opened.tokens, opened.end, opened.eos_token_ids)
        assert device.session.committed.tolist() == expected
        ended_with_eos = expected[-1] in opened.eos_token_ids
        assert device.session.status is (Status.EOS if ended_with_eos else Status.LENGTH)


@pytest.mark.parametrize("mode", list(Mode))
def test_good_drafts_save_passes(mode: Mode) -> None:
    device = Device(make_open(max_new_tokens=60, mode=mode), max_ahead=5)
    world = World([device], num_blocks=32, max_pass_tokens=64)
    while not device.done:
        for event in ("edge",) * 12 + ("up",) * 6 + ("server", "down"):
            world.do(event, device)
    assert np.array_equal(device.session.generated, target_alone(device.opened.tokens, 63)[3:])
    assert len(world.verifier.passes) < 30
    assert device.session.stats.num_accepted > 20


@pytest.mark.parametrize("mode", list(Mode))
def test_a_thin_client_is_never_stuck_behind_its_acknowledgements(mode: Mode) -> None:
    device = Device(make_open(max_new_tokens=300, mode=mode), max_ahead=0)
    World([device], num_blocks=100, max_pass_tokens=64).finish()
    assert len(device.session.generated) == 300
