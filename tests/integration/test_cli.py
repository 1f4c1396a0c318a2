"""`wisp-edge` as a user meets it: processes of their own, exit codes, standard output and standard error."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.tokenizer import Tokenizer
from tests.integration.support import GREEDY, Judge
from triton_models.processes import free_ports
from triton_models.server_process import ServerProcess
from wisp_plugin.draft_trace import DraftTrace
from wisp_plugin.home import default_draft_dir

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
QUESTION = "Name three colours."
NUM_TOKENS = 24
RESIDENT_LIMIT_MB = 450
HELP_LIMIT_S = 0.5
WITH_REPORT = """
import json, re, sys
from pathlib import Path
from edge_runtime.cli import main
code = main(sys.argv[1:])
status = Path("/proc/self/status").read_text()
peak_kb = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
heavy = sorted({"torch", "transformers", "triton_models"} & set(sys.modules))
print(json.dumps({"peak_mb": peak_kb / 1024, "heavy": heavy}), file=sys.stderr)
sys.exit(code)
"""


def wisp_edge(*args: str, program: tuple[str, ...] = ("-m", "edge_runtime.cli")) -> subprocess.CompletedProcess[str]:
    """`wisp-edge` with `args`, to its end."""
    command = [sys.executable, *program, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=False, cwd=ROOT)


def generate(server: ServerProcess, *args: str) -> str:
    """The text of `wisp-edge generate` for `QUESTION`."""
    result = wisp_edge(*generate_args(server), *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


def generate_args(server: ServerProcess) -> tuple[str, ...]:
    """A short generation on `server`."""
    return ("generate", QUESTION, "--chat", "--max-new-tokens", str(NUM_TOKENS), "--server", server.grpc_url)


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The only line of standard error of a command that failed with exit code 2."""
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("wisp-edge: ")
    return line


def test_generate_gives_the_targets_text(server: ServerProcess, judge: Judge) -> None:
    text = generate(server)
    tokenizer = Tokenizer.load(default_draft_dir("int8"))
    prompt = tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    ids = tokenizer.encode(text.removesuffix("\n"), add_special_tokens=False)
    assert len(ids) >= 8
    judge.check(prompt, ids, GREEDY)


def test_one_seed_gives_one_text_however_it_is_drafted(server: ServerProcess) -> None:
    sampling = ("--temperature", "0.8", "--top-p", "0.95", "--seed", "3")
    ways = (("--no-draft",), ("--mode", "free"), ("--mode", "sync", "--draft", "int4", "--rule", "fixed:4"))
    texts = {generate(server, *sampling, *way) for way in ways}
    assert len(texts) == 1
    assert len(texts.pop().strip()) > 10
    assert generate(server, "--no-draft", "--temperature", "2", "--seed", "4") not in texts


def test_stats_tell_what_drafts_gave(server: ServerProcess) -> None:
    result = wisp_edge(*generate_args(server), "--stats", "--mode", "sync")
    assert result.returncode == 0
    stats, controller, times = result.stderr.splitlines()
    assert "tokens/s" in stats
    assert "tokens per pass" in stats
    assert "WDT share" in stats
    assert re.fullmatch(r"controller: chose not to draft \d+ of \d+ times, probed \d+ times; .*", controller)
    assert re.fullmatch(r".*ttft \d+ ms, mean tpot [\d.]+ ms.*", times)


def test_the_text_ends_before_a_stop_string(server: ServerProcess) -> None:
    text = generate(server)
    words = text.split()
    stop = words[len(words) // 2]
    assert generate(server, "--stop", stop) == text[: text.index(stop)] + "\n"


def test_the_text_streams(server: ServerProcess) -> None:
    """The first part is there well before the last."""
    command = [sys.executable, "-m", "edge_runtime.cli", *generate_args(server), "--no-draft", "--ignore-eos"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        first_s = time.monotonic()
        process.stdout.read()
        assert time.monotonic() - first_s > 0.1
    assert process.returncode == 0


def test_an_edge_process_stays_small(server: ServerProcess) -> None:
    result = wisp_edge(*generate_args(server), program=("-c", WITH_REPORT))
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stderr.splitlines()[-1])
    assert report["heavy"] == []
    assert report["peak_mb"] <= RESIDENT_LIMIT_MB


@pytest.mark.alone
def test_help_answers_at_once() -> None:
    """Processor time counts, so that other work on the machine does not."""
    costs_s = []
    for _ in range(3):
        before = os.times()
        assert "generate" in wisp_edge("--help").stdout
        after = os.times()
        costs_s.append(after.children_user - before.children_user + after.children_system - before.children_system)
    assert statistics.median(costs_s) < HELP_LIMIT_S, costs_s


def test_no_server_is_one_line() -> None:
    begin_s = time.monotonic()
    address = f"127.0.0.1:{free_ports().grpc}"
    line = one_line(wisp_edge("generate", "Hello", "--no-draft", "--server", address))
    assert address in line
    assert time.monotonic() - begin_s < 10.0


FAULTS = {
    "no draft folder": (("--draft", "no/such/folder"), "no/such/folder"),
    "temperature": (("--temperature", "-1"), "'temperature' is -1.0; allowed: a number from 0 to 100"),
    "rule": (("--rule", "guess"), "stop rule is 'guess'; allowed: auto, fixed"),
    "rule of the other mode": (("--rule", "ratio"), "stop rule 'ratio' is for mode sync, not free"),
    "energy price": (("--energy-price", "2"), "energy price is 2.0; allowed: 0"),
    "no controller": (("--controller", "no/such.npz"), "controller weights no/such.npz do not exist"),
    "threads": (("--threads", "-1"), "--threads is -1; allowed: 0"),
    "length": (("--max-new-tokens", "0"), "--max-new-tokens is 0; allowed: "),
    "no certificate": (("--tls", "--ca", "no/such.pem"), "TLS file no/such.pem does not exist"),
    "beyond the window": (("--max-new-tokens", "9000", "--no-draft"), "'max_new_tokens' is 9000; allowed: "),
}


@pytest.mark.parametrize(("args", "message"), FAULTS.values(), ids=FAULTS)
def test_what_cannot_work_is_one_line(server: ServerProcess, args: tuple[str, ...], message: str) -> None:
    assert message in one_line(wisp_edge(*generate_args(server), *args))


def test_a_graph_of_an_unknown_layout_is_one_line(server: ServerProcess, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((default_draft_dir("int8") / name).read_bytes())
    assert str(tmp_path) in one_line(wisp_edge(*generate_args(server), "--draft", str(tmp_path)))


# -- traces and training ----------------------------------------------------------------------------------------


def trace_args(server: ServerProcess, out: Path, *args: str) -> tuple[str, ...]:
    """`wisp-edge trace` into `out` with at most 12 new tokens per prompt."""
    return ("trace", str(out), "--server", server.grpc_url, "--max-new-tokens", "12", *args)


def prompts_file(folder: Path, *lines: str) -> str:
    """A file of prompts with these lines."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_traces_of_two_drafts_along_the_targets_texts(server: ServerProcess, judge: Judge, tmp_path: Path) -> None:
    prompts = prompts_file(
        tmp_path, json.dumps({"prompt": QUESTION}), json.dumps({"prompt": "One, two, three,", "chat": False})
    )
    first, second = tmp_path / "int8.npz", tmp_path / "int4.npz"
    result = wisp_edge(*trace_args(server, first, "--prompts", prompts, "--draft", "int8", "--chain-length", "3"))
    assert result.returncode == 0, result.stderr
    assert f"wrote {first}: 2 texts" in result.stderr
    # The texts are those of the first trace: no server is needed.
    address = f"127.0.0.1:{free_ports().grpc}"
    reuse = ("--texts", str(first), "--draft", "int4", "--server", address, "--chain-length", "0")
    result = wisp_edge("trace", str(second), *reuse)
    assert result.returncode == 0, result.stderr
    traces = [DraftTrace.load(path) for path in (first, second)]
    assert [trace.about["draft"] for trace in traces] == ["int8", "int4"]
    for text, same in zip(traces[0].texts, traces[1].texts, strict=True):
        assert 0 < len(text.drafted) <= 12
        judge.check(text.tokens[: text.prompt_len], text.tokens[text.prompt_len :], GREEDY)
        np.testing.assert_array_equal(text.tokens, same.tokens)
        assert text.behind.shape[1] == 3
        assert same.behind.shape[1] == 0
    assert traces[0].acceptance > 0.5
    refused = one_line(wisp_edge("train-controller", str(first), str(second), "--out", str(tmp_path / "weights.npz")))
    assert "2 prompts are too few to train on; at least" in refused
    assert not (tmp_path / "weights.npz").exists()


TRACE_FAULTS = {
    "no prompts file": (("--prompts", "no/such.jsonl"), "cannot read no/such.jsonl: "),
    "no texts file": (("--texts", "no/such.npz"), "trace no/such.npz does not exist"),
    "neither": ((), "give --prompts (a server generates their texts) or --texts"),
    "both": (("--prompts", "a.jsonl", "--texts", "b.npz"), "give --prompts (a server generates their texts) or"),
    "chain length": (("--prompts", "a.jsonl", "--chain-length", "65"), "--chain-length is 65; allowed: 0 to 64"),
    "no draft folder": (("--prompts", "a.jsonl", "--draft", "no/such/folder"), "no/such/folder"),
}


@pytest.mark.parametrize(("args", "message"), TRACE_FAULTS.values(), ids=TRACE_FAULTS)
def test_a_trace_that_cannot_work_is_one_line(
    server: ServerProcess, args: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "trace.npz"
    assert message in one_line(wisp_edge(*trace_args(server, out, *args)))
    assert not out.exists()


LINE_FAULTS = {
    "no JSON": ("no JSON", 'line 2 of {path} must be like {{"prompt": "...", "chat": true}}'),
    "no object": ("[1]", 'line 2 of {path} must be like {{"prompt": "...", "chat": true}}'),
    "no prompt": ('{"chat": true}', 'line 2 of {path} must be like {{"prompt": "...", "chat": true}}'),
    "no text": ('{"prompt": 5}', "line 2 of {path}: `prompt` must be a text, `chat` true or false"),
}


@pytest.mark.parametrize(("line", "message"), LINE_FAULTS.values(), ids=LINE_FAULTS)
def test_a_bad_line_of_prompts_is_named(server: ServerProcess, line: str, message: str, tmp_path: Path) -> None:
    path = prompts_file(tmp_path, json.dumps({"prompt": QUESTION}), line)
    found = one_line(wisp_edge(*trace_args(server, tmp_path / "trace.npz", "--prompts", path)))
    assert message.format(path=path) in found


def test_training_on_what_is_no_trace_is_one_line(tmp_path: Path) -> None:
    out = str(tmp_path / "weights.npz")
    assert "no/such.npz does not exist" in one_line(wisp_edge("train-controller", "no/such.npz", "--out", out))
    other = tmp_path / "other.npz"
    np.savez(other, x=np.zeros(3))
    assert str(other) in one_line(wisp_edge("train-controller", str(other), "--out", out))
