"""`wisp-edge generate` and `chat` without a server: the SLO that is asked for, how it was met, an overloaded server."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import generate
from edge_runtime.cli import main
from edge_runtime.client import EdgeClient, Patience, TokenTimes
from tests import tiny_model
from tests.factories import make_commit
from tests.fakes import FakeClock
from tests.test_client import LAST, ScriptedTransport, make_client, overloaded, run
from wisp_plugin.messages import Commit, Mode, Slo, Status
from wisp_plugin.wire_values import named_slo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("draft")
    tiny_model.write_tokenizer(made)
    return made


class Edge:
    """`wisp-edge generate` as a thin client of a scripted server; time moves when it waits."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *connections: list[Commit]) -> None:
        self.arguments = ["generate", "hi", "--no-draft", "--draft", str(folder), "--max-new-tokens", "3"]
        clock = FakeClock(0.0)
        self.transport = ScriptedTransport(clock, *connections)

        def sleep(seconds: float) -> None:
            clock.now_s += seconds

        def client(*parts: Any) -> EdgeClient:
            return EdgeClient(*parts, Patience(reconnect_s=10.0), clock, sleep)

        monkeypatch.setattr(generate, "GrpcStream", lambda *options: self.transport)
        monkeypatch.setattr(generate, "EdgeClient", client)

    def run(self, *arguments: str) -> int:
        return main([*self.arguments, *arguments])


def answer(first: int) -> list[Commit]:
    """All three tokens behind a prompt of `first` tokens."""
    return [make_commit(first, 40), make_commit(first + 1, 41, 42, status=Status.LENGTH)]


# -- what is asked for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "slo"),
    [
        ((), named_slo()),
        (("--slo", "tight"), named_slo("tight")),
        (("--slo", "default"), named_slo()),
        (("--ttft-ms", "500", "--tpot-ms", "60"), Slo(500.0, 60.0)),
        (("--ttft-ms", "500"), Slo(500.0, math.inf)),
        (("--tpot-ms", "60"), Slo(math.inf, 60.0)),
    ],
)
def test_the_slo_that_goes_to_the_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], slo: Slo
) -> None:
    edge = Edge(folder, monkeypatch, answer(2))
    assert edge.run(*arguments) == 0
    assert [message.slo for message in edge.transport.opens] == [slo]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--slo", "tight", "--ttft-ms", "500"), "--slo names a class of the server, --ttft-ms and --tpot-ms give"),
        (("--slo", "tight", "--tpot-ms", "60"), "use one or the other"),
        (("--slo", ""), "SLO class ''; allowed: a lower-case letter"),
        (("--slo", "Fast lane"), "SLO class 'Fast lane'; allowed"),
        (("--ttft-ms", "0"), "'ttft_ms' is 0.0; allowed: a number from 0.001 to 1e+07"),
        (("--tpot-ms", "nan"), "'tpot_ms' is nan; allowed"),
        (("--tpot-ms", "inf"), "'tpot_ms' is inf; allowed"),
    ],
)
def test_an_slo_that_cannot_be_is_refused_in_one_line_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], line: str
) -> None:
    assert main(["generate", "hi", "--draft", "no/such/folder", *arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("wisp-edge: ")
    assert line in said


# -- the transport -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [((), Mode.FREE), (("--mode", "sync"), Mode.SYNC), (("--transport", "unary"), Mode.SYNC)],
)
def test_the_mode_follows_from_the_transport(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], mode: Mode
) -> None:
    edge = Edge(folder, monkeypatch, answer(2))
    monkeypatch.setattr(generate, "UnaryTransport", lambda *options: edge.transport)
    assert edge.run(*arguments) == 0
    assert [message.mode for message in edge.transport.opens] == [mode]


def test_free_mode_over_unary_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hi", "--draft", "no/such/folder", "--transport", "unary", "--mode", "free"]) == 2
    assert "--mode free needs a stream; allowed with --transport unary: sync" in capsys.readouterr().err


# -- how it was met ---------------------------------------------------------------------------------------------


def test_token_times() -> None:
    times = TokenTimes(opened_s=10.0)
    assert (times.ttft_ms, times.mean_tpot_ms) == (math.inf, 0.0)
    times.on_tokens(0, 10.1)  # a status alone
    assert times.ttft_ms == math.inf
    times.on_tokens(2, 10.5)
    assert (times.ttft_ms, times.mean_tpot_ms) == (500.0, 0.0)
    times.on_tokens(3, 11.5)
    assert (times.ttft_ms, times.mean_tpot_ms, times.num_tokens) == (500.0, 250.0, 5)


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(500.0, 250.0), True),
        (Slo(499.0, 250.0), False),
        (Slo(500.0, 249.0), False),
        (Slo(math.inf, 250.0), True),
        (Slo(500.0, math.inf), True),
    ],
)
def test_an_slo_is_met_by_the_first_token_and_by_the_mean_of_the_others(slo: Slo, met: bool) -> None:
    times = TokenTimes(opened_s=10.0)
    for num_tokens, now_s in ((1, 10.5), (1, 11.25), (3, 11.5)):  # the second is late, the mean is not
        times.on_tokens(num_tokens, now_s)
    assert times.meet(slo) is met


def test_no_slo_is_met_without_a_token() -> None:
    assert not TokenTimes().meet(Slo(1e7, 1e7))


def test_the_wait_for_an_overloaded_server_counts() -> None:
    client = make_client(overloaded(3_000), [make_commit(3, 10, 11), LAST])
    client.sleep(50.0)
    run(client)
    assert (client.times.ttft_ms, client.times.num_tokens) == (pytest.approx(3_000.0), 3)


@pytest.mark.parametrize(
    ("slo", "line"),
    [
        (named_slo(), "ttft 500 ms, mean tpot 250.0 ms"),
        (named_slo("tight"), "ttft 500 ms, mean tpot 250.0 ms"),
        (Slo(500.0, 250.0), "ttft 500 ms, mean tpot 250.0 ms; SLO met (ttft at most 500 ms, tpot at most 250 ms)"),
        (Slo(500.0, 60.0), "ttft 500 ms, mean tpot 250.0 ms; SLO missed (ttft at most 500 ms, tpot at most 60 ms)"),
        (Slo(100.0, math.inf), "ttft 500 ms, mean tpot 250.0 ms; SLO missed (ttft at most 100 ms)"),
        (Slo(math.inf, 300.0), "ttft 500 ms, mean tpot 250.0 ms; SLO met (tpot at most 300 ms)"),
    ],
)
def test_the_report_of_an_slo(slo: Slo, line: str) -> None:
    times = TokenTimes(opened_s=10.0)
    times.on_tokens(1, 10.5)
    times.on_tokens(2, 11.0)
    assert generate.slo_report(times, slo) == line


def test_stats_tell_how_the_slo_was_met(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edge = Edge(folder, monkeypatch, overloaded(3_000), answer(2))
    assert edge.run("--stats", "--ttft-ms", "2000", "--tpot-ms", "60") == 0
    figures, slo = capsys.readouterr().err.splitlines()
    assert figures.startswith("3 tokens in ")
    assert slo == "ttft 3000 ms, mean tpot 0.0 ms; SLO missed (ttft at most 2000 ms, tpot at most 60 ms)"


# -- an overloaded server ---------------------------------------------------------------------------------------


def test_giving_up_on_an_overloaded_server_is_one_line_with_the_time_waited(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edge = Edge(folder, monkeypatch, overloaded(4_000))
    assert edge.run() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "wisp-edge: gave up after waiting 8.0 s: the server is overloaded (it asks to try again after 4 s)"
    assert edge.transport.num_closed == 1
