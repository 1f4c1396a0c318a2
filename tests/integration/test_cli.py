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

import pytest

from edge_runtime.tokenizer import Tokenizer
from tests.integration.support import GREEDY, Judge
from triton_models.processes import free_ports
from triton_models.server_process import ServerProcess
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
    ways = (("--no-draft",), ("--mode", "free"), ("--mode", "sync", "--draft", "int4", "--draft-length", "4"))
    texts = {generate(server, *sampling, *way) for way in ways}
    assert len(texts) == 1
    assert len(texts.pop().strip()) > 10
    assert generate(server, "--no-draft", "--temperature", "2", "--seed", "4") not in texts


def test_stats_tell_what_drafts_gave(server: ServerProcess) -> None:
    result = wisp_edge(*generate_args(server), "--stats", "--mode", "sync")
    assert result.returncode == 0
    stats, times = result.stderr.splitlines()
    assert "tokens/s" in stats
    assert "tokens per pass" in stats
    assert "WDT share" in stats
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
