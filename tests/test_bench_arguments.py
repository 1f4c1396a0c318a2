"""Options of benchmarks that cannot work are refused in one line, before anything runs."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import arguments, cli, load, load_run, matrix
from bench.cells import MIX
from bench.gpu_profile import FOLDER, draft_step_on
from bench.load_clients import LiveEvents, LiveWorld
from bench.load_figures import CommitLog
from bench.load_options import MOST_SEED, Load
from bench.load_tokens import session_seed
from bench.scenario import Scenario
from bench.sim_result import ServerRecord, SimResult
from bench.traces_folder import trace_path
from bench.workload import Workload
from wisp_plugin.errors import ConfigError


def never(*_: object, **__: object) -> None:
    """Stands for what a refused command must not come to."""
    raise AssertionError("the command has begun to run")


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command begins a run."""
    names = ("capacity.compare", "goodput.compare", "matrix_run.find_best", "planner.solve", "simulator_speed.measure",
             "load.run_on_own_server", "validate.run_on_own_server", "validate.simulate_logged")  # fmt: skip
    for name in names:
        monkeypatch.setattr(f"bench.{name}", never)


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of stderr of a command that is refused with exit code 2; nothing is printed to stdout."""
    try:
        code = cli.main(words)
    except SystemExit as stop:  # of argparse
        code = stop.code  # type: ignore[assignment]
    output = capsys.readouterr()
    assert (code, output.out) == (2, "")
    assert "Traceback" not in output.err
    return output.err.splitlines()[-1]


class TestNumbers:
    @pytest.mark.parametrize(
        ("parse", "good", "bad"),
        [
            (arguments.positive_int, ["1", "12"], ["0", "-3", "1.5", "x", "", "nan"]),
            (arguments.not_negative_int, ["0", "7"], ["-1", "x"]),
            (arguments.whole_number(16, 2000), ["16", "2000"], ["15", "2001"]),
            (arguments.number(0.0, above=True), ["0.1", "3"], ["0", "-1", "nan", "inf", "x"]),
            (arguments.number(0.0), ["0", "2.5"], ["-0.1", "nan", "inf", "-inf", ""]),
            (arguments.num_kv_tokens, ["100000", "100000000"], ["1", "100000001", "1e6"]),
            (arguments.share, ["0", "0.5", "1"], ["-0.1", "1.1", "nan"]),
        ],
    )
    def test_what_is_allowed(self, parse: Callable[[str], float], good: list[str], bad: list[str]) -> None:
        assert [parse(text) for text in good] == [float(text) for text in good]
        for text in bad:
            with pytest.raises(argparse.ArgumentTypeError, match=r"is not a .*number"):
                parse(text)

    def test_addresses_and_folders(self) -> None:
        good = ["localhost:1", "[::1]:8001", "h:65535"]
        assert [arguments.host_and_port(text) for text in good] == good
        for text in ("", "localhost", ":1", "h:", "h:0", "h:65536", "h:x", "h:\u00b2"):
            with pytest.raises(argparse.ArgumentTypeError, match="is not HOST:PORT with a port from 1 to 65535"):
                arguments.host_and_port(text)
        assert arguments.report_folder("here") == Path("here")
        with pytest.raises(argparse.ArgumentTypeError, match="not an empty name"):
            arguments.report_folder("")

    def test_the_least_kv_holds_the_longest_session(self) -> None:
        workload = Workload()
        assert workload.prompt_range[1] + workload.output_range[1] < arguments.LEAST_KV_TOKENS

    def test_seeds_of_sessions_go_over_the_wire(self) -> None:
        spec = next(Workload().sessions(Workload(num_devices=1000).devices()[999]))
        assert session_seed(MOST_SEED, spec) < 1 << 63


@pytest.mark.usefixtures("nothing_runs")
class TestRefusals:
    @pytest.mark.parametrize(
        "words",
        [
            *(f"{command} {rest}" for command in ("load", "validate") for rest in (
                "--devices 0", "--devices -3", "--seed -1", "--seed 8388608", "--dilation 0", "--dilation -1",
                "--processes 0", "--speed 0 10", "--rtt -5 5", "--rtt nan 5", "--kv-tokens 10", "--slo 0", "--noise -1",
                "--acceptance 2", "--message-tokens 0", "--duration 0",
                "--jitter inf", "--dilation 1e4", "--duration 1e308", "--rtt 5 1e308", "--slo 1e9",
                "--kv-tokens 99999999999999", "--processes 100000",
            )),
            "load --server nowhere", "load --server 127.0.0.1:99999",
            "load --think -1", "load --stagger -1", "load --stagger 1e308", "load --noise 1.5", "validate --active 0",
            "profile --layers 0", "profile --kv-tokens 0",
            "profile --seed -1",
            *(f"{command} {rest}" for command in ("capacity", "goodput") for rest in (
                "--seed -1", "--seeds 0", "--jobs 0", "--together 0", "--systems none",
            )),
            *(f"matrix {rest}" for rest in (
                "--cells 0", "--cells -100", "--seeds 0", "--jobs 0", "--seed -1", "--recheck 0",
            )),
            *(f"plan --devices 2 --tpot-ms 60 {rest}" for rest in (
                "--seed -1", "--seconds 0", "--seconds -3", "--prompt 0", "--prompt -5", "--prompt 5000",
                "--output-tokens 0", "--output-tokens 5000", "--think-s -1", "--kv-tokens -5", "--kv-tokens 0",
                "--kv-tokens 10", "--rtt-ms nan", "--rtt-ms -1", "--tpot-ms inf", "--tpot-ms 0", "--speed 0",
                "--jobs 0", "--devices 0", "--seconds 1e300", "--think-s 1e300", "--speed 1e300", "--tpot-ms 1e300",
                "--rtt-ms 1e300", "--kv-tokens 99999999999999",
            )),
            "simulator --devices 0",
            "simulator --seconds inf",
            "simulator --seed -1",
        ],
    )  # fmt: skip
    def test_numbers(self, words: str, capsys: pytest.CaptureFixture[str]) -> None:
        line = refusal(words.split(), capsys)
        option = next(word for word in reversed(words.split()) if word.startswith("--"))
        assert f"argument {option}" in line

    @pytest.mark.parametrize("command", ["load", "validate"])
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("--rule nope", "'nope'; allowed: auto"),
            ("--rule fixed:99999999", "draft length is"),
            ("--rule price --mode sync", "for mode free"),
            ("--speed 120 60", "lowest number first"),
            ("--rtt 40 10", "lowest number first"),
            ("--warm-up 50 --duration 45", "below --duration"),
            ("--trace no-such.npz", "no-such"),
            pytest.param(f"--trace {'n' * 300}", "the name of a file is needed", id="trace with a long name"),
            ("--profile no-such.json", "no-such"),
        ],
    )
    def test_a_load_that_cannot_work(
        self, command: str, words: str, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert said in refusal([command, "--devices", "2", *words.split()], capsys)

    @pytest.mark.parametrize("words", ["capacity", "goodput", "matrix", "plan --devices 2 --tpot-ms 60"])
    def test_a_profile_that_is_none(
        self, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WISP_HOME", str(tmp_path))
        document = json.loads((FOLDER / "h100-qwen3-32b.json").read_text(encoding="utf-8"))
        costs = document["costs"]
        for name, price_s in (("dear.json", 1e6), ("endless.json", 1e300)):
            dear = {**document, "costs": {**costs, "memory": [price_s, *costs["memory"][1:]]}}
            (tmp_path / name).write_text(json.dumps(dear), encoding="utf-8")
        costs |= {line: [1e-12 * price for price in costs[line]] for line in ("memory", "arithmetic")}
        (tmp_path / "quick.json").write_text(json.dumps(document), encoding="utf-8")
        (tmp_path / "deep.json").write_text("[" * 100_000, encoding="utf-8")
        refused = {"no-such": "not among those shipped", "~nobody-here/x": "home", "n" * 300: "name",
                   "quick.json": "has passes of", "dear.json": "has a price of 1e+06 s; allowed: up to",
                   "deep.json": "not JSON", "endless.json": "costs.memory.0 is 1e+300 s; allowed: up to"}  # fmt: skip
        for name, said in refused.items():
            file = str(tmp_path / name) if name.endswith(".json") else name
            assert said in refusal([*words.split(), "--profile", file], capsys)

    @pytest.mark.parametrize("command", ["capacity", "goodput", "matrix"])
    def test_a_device_whose_draft_step_nobody_knows(
        self, command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WISP_HOME", str(tmp_path))
        profile = shutil.copy(FOLDER / "h100-qwen3-32b.json", tmp_path / "h100-mine.json")
        for name in ("xeon-2-smollm2-135m", str(profile)):
            assert "what drafting costs on its server is not known" in refusal([command, "--profile", name], capsys)
        shutil.copy(FOLDER / "h100-qwen3-0.6b.json", tmp_path)
        assert draft_step_on(str(profile), 1.0) == draft_step_on("h100-qwen3-32b", 1.0)

    def test_a_trace_without_chains(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_ring(_: object) -> None:
            raise ValueError("a ring needs texts")

        monkeypatch.setattr("bench.load_options.TraceRing", no_ring)
        with pytest.raises(ConfigError, match=r"--trace .*a ring needs texts"):
            Load.of(load_options(), 1)

    @pytest.mark.parametrize("folder", ["a,b", "d=1"])
    def test_a_trace_whose_name_no_server_could_read(self, folder: str, tmp_path: Path) -> None:
        (tmp_path / folder).mkdir()
        copy = shutil.copy(trace_path("int4", "eval"), tmp_path / folder)
        with pytest.raises(ConfigError, match=r"--trace .*the form is"):
            Load.of(load_options("--trace", str(copy)), 1)

    @pytest.mark.parametrize("command", ["capacity", "goodput", "matrix"])
    def test_a_report_folder_that_cannot_be_made(
        self, command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        file, state = tmp_path / "file", ["--state", str(tmp_path / "state")] if command == "matrix" else []
        file.write_text("")
        for folder in (file, file / "below"):
            said = refusal([command, *state, "--report", str(folder)], capsys)
            assert f"--report: the folder {folder} cannot be made" in said

    def test_a_report_without_matplotlib(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="matplotlib"):
            arguments.make_report_folder(tmp_path / "new")
        arguments.make_report_folder(None)

    def test_a_state_that_cannot_be_written(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "--state" in refusal(["matrix", "--state", str(tmp_path)], capsys)
        (tmp_path / "file").write_text("")
        assert "--state" in refusal(["matrix", "--state", str(tmp_path / "file" / "state")], capsys)
        arguments.check_appendable("--state", tmp_path / "new" / "state.jsonl")
        assert (tmp_path / "new" / "state.jsonl").read_bytes() == b""

    def test_a_profile_that_cannot_be_written_is_refused_before_it_is_measured(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert "a file that can be written to is needed" in refusal(["profile", "--output", str(tmp_path)], capsys)
        (tmp_path / "file").write_text("")
        assert "it is a file" in refusal(["profile", "--output", str(tmp_path / "file" / "profile.json")], capsys)
        arguments.check_writable("--output", tmp_path / "new" / "profile.json")
        assert not list((tmp_path / "new").iterdir())

    def test_a_trace_that_is_not_there_is_told_with_those_that_are(self, capsys: pytest.CaptureFixture[str]) -> None:
        said = refusal(["load", "--trace", "nosuch", "--devices", "2"], capsys)
        assert "nosuch" in said
        assert "int4-eval.npz" in said

    def test_a_draft_that_the_short_matrix_has_not(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "allowed without: mixed48, int8" in refusal(["matrix", "--drafts", "int4"], capsys)
        both = argparse.Namespace(full=True, drafts=["int4"], profile=MIX.profile, cells=7)
        assert {cell.draft for cell in matrix.wanted_cells(both)} == {"int4"}
        assert len(matrix.wanted_cells(both)) == 7


def load_options(*words: str) -> argparse.Namespace:
    """Of `load`, as its command line gives them."""
    parser = argparse.ArgumentParser()
    load.add_arguments(parser)
    return parser.parse_args(words)


class TestLiveRuns:
    def test_a_run_without_sessions_is_no_success(self, monkeypatch: pytest.MonkeyPatch) -> None:
        result = SimResult(("tight",), 5.0, 1.0, 5.0, [], ServerRecord.of(1))
        run = load_run.LiveRun(result, CommitLog(), [], [], 0, 0, 0, 0, 0.0, 5.0)
        monkeypatch.setattr(load_run, "_run_devices", lambda *_: run)
        with pytest.raises(ConfigError, match="none of 0 sessions"):
            load_run.run_load("localhost:1", Scenario(Workload(num_devices=1)))

    def test_what_an_event_raises_ends_the_events(self) -> None:
        async def play() -> tuple[list[str], LiveEvents]:
            events = LiveEvents(CommitLog(), time.monotonic())
            seen: list[str] = []
            events.schedule(0.0, seen.append, "first")
            events.schedule(0.01, lambda _: 1 / 0, None)
            events.schedule(0.02, seen.append, "never")
            await asyncio.sleep(0.05)
            return seen, events

        seen, events = asyncio.run(play())
        assert seen == ["first"]
        assert isinstance(events.error, ZeroDivisionError)

    def test_what_an_event_raises_ends_the_run(self) -> None:
        """Also what makes a client: once it was printed, and the run went on without its session."""

        def no_controller() -> None:
            raise ConfigError("no controller")

        scenario = Scenario(Workload(num_devices=2, stagger_s=0.0), controller=no_controller, duration_s=5.0)  # type: ignore[arg-type]

        async def play() -> None:
            await LiveWorld("localhost:1", scenario, scenario.workload.devices(), time.monotonic()).run()

        with pytest.raises(ConfigError, match="no controller"):
            asyncio.run(play())
