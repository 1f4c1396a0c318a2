"""`wisp-edge train-controller` and what it shares with `wisp-edge trace`: held-out prompts, files that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import cli, train_controller
from edge_runtime.train_controller import prompt_of, split_by_prompt
from tests.traces import make_text, make_trace
from wisp_plugin.acceptance_model import AcceptanceModel
from wisp_plugin.draft_trace import DraftTrace, TextTrace
from wisp_plugin.errors import ModelError


def sampled(text: TextTrace, seed: int) -> TextTrace:
    """Another text behind the prompt of `text`."""
    other = make_text(seed, prompt_len=text.prompt_len)
    tokens = np.concatenate([text.tokens[: text.prompt_len], other.generated]).astype(np.int32)
    return TextTrace(tokens, text.prompt_len, other.drafted, other.stats, other.behind, other.behind_tokens)


GREEDY = make_trace(30)
SAMPLED = replace(GREEDY, texts=[sampled(text, 5000 + i) for i, text in enumerate(GREEDY.texts[::4])])


def prompts(texts: Sequence[TextTrace]) -> set[bytes]:
    return {prompt_of(text) for text in texts}


# -- what is held out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_no_prompt_is_trained_on_and_held_out(seed: int) -> None:
    texts = [*GREEDY.texts, *SAMPLED.texts]
    fitted, held_out = split_by_prompt(texts, seed)
    assert not prompts(fitted) & prompts(held_out)
    assert len(fitted) + len(held_out) == len(texts)
    assert len(prompts(held_out)) == 5  # a seventh of thirty, rounded up


def test_a_seed_draws_the_prompts_whatever_texts_are_behind_them() -> None:
    drawn = [prompts(split_by_prompt(GREEDY.texts, seed)[1]) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert prompts(split_by_prompt([*GREEDY.texts, *SAMPLED.texts], 0)[1]) == drawn[0]


def test_texts_behind_few_prompts_are_too_few() -> None:
    texts = [sampled(text, 100 * k + i) for k in range(5) for i, text in enumerate(GREEDY.texts[:13])]
    with pytest.raises(ModelError, match="13 prompts are too few to train on; at least 14"):
        split_by_prompt(texts, 0)


def test_a_perfect_draft_teaches_nothing() -> None:
    perfect = [replace(text, drafted=text.generated.copy()) for text in GREEDY.texts]
    with pytest.raises(ModelError, match="all draft tokens of the traces were accepted: nothing to learn"):
        train_controller.train([replace(GREEDY, texts=perfect)], 1.0, 1, 0, lambda line: None)


# -- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.npz"
    GREEDY.save(path)
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that failed with exit code 2."""
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def train(trace: str, out: Path | str, *options: str) -> tuple[str, ...]:
    return ("train-controller", trace, "--out", str(out), "--epochs", "1", *options)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training fails the test."""
    monkeypatch.setattr(train_controller, "train", lambda *arguments: pytest.fail("it was trained"))


def test_weights_are_written_under_the_name_that_was_given(trace: str, tmp_path: Path) -> None:
    out, evaluation = tmp_path / "weights.npz", tmp_path / "evaluation.npz"
    make_trace(5, seed=1).save(evaluation)
    assert cli.main(train(trace, out, "--evaluate", str(evaluation))) == 0
    assert AcceptanceModel.load(out).base > 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.npz", "trace.npz", "weights.npz"]


@pytest.mark.usefixtures("untrained")
def test_an_evaluation_on_prompts_that_are_trained_on_is_refused(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = tmp_path / "evaluation.npz"
    DraftTrace([*make_trace(3, seed=1).texts, *SAMPLED.texts[:2]], GREEDY.about).save(evaluation)
    line = refused(capsys, *train(trace, tmp_path / "w.npz", "--evaluate", str(evaluation)))
    assert f"2 of 5 prompts in {evaluation} are in the traces to train on, too; allowed with --evaluate" in line


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("out", ["weights", ".", "weights.npy", ".npz", "no/such/folder/w.npz", "folder.npz"])
@pytest.mark.parametrize("command", ["train-controller", "trace"])
def test_an_output_file_that_cannot_be_is_refused_before_the_work(
    command: str, out: str, trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npz").mkdir()
    of_trace = ("trace", out, "--texts", trace, "--draft", "no/such/folder")
    line = refused(capsys, *(train(trace, out) if command == "train-controller" else of_trace))
    reason = "does not exist" if "/" in out else "allowed: a file name that ends with .npz"
    assert reason in line
    assert out in line


def test_a_file_that_cannot_be_written_is_one_line(
    trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    assert "w.npz: No space left on device" in refused(capsys, *train(trace, tmp_path / "w.npz"))


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("seed", ["-1", str(1 << 63)])
def test_a_seed_out_of_range_is_refused(
    seed: str, trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *train(trace, tmp_path / "w.npz", "--seed", seed))
    assert f"--seed is {seed}; allowed: 0 to 9223372036854775807" in line


def test_a_trace_that_is_cut_off_is_one_line(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = Path(trace).read_bytes()
    Path(trace).write_bytes(content[: len(content) // 2])
    assert f"{trace} is no trace" in refused(capsys, *train(trace, tmp_path / "w.npz"))


# -- help and exit codes ----------------------------------------------------------------------------------------


def test_help_keeps_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    assert "Make a draft graph from a Hugging Face model" in " ".join(capsys.readouterr().out.split())


def test_a_failed_export_exits_as_every_other_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "export", str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert line.startswith("wisp-edge export: ")
