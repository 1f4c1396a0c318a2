"""Triton's own perf_analyzer against both verifiers: closed loop and open loop, with prepared prompts.

A request to `wisp_verifier` (streaming) is a whole session of a thin client: its open, and commits until the length is
reached; perf_analyzer counts the time to the first response. A request to `wisp_verifier_batched` (unary) verifies a
prompt with a draft behind it, without a session. One server per model, one after the other. The open loop sends at a
half and at four fifths of what the closed loop has reached. perf_analyzer is the one on PATH, or fetched.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.perf_tool import PerfAnalyzer, find_perf_analyzer
from bench.prompts import mt_bench_questions
from bench.report import Progress, finish, print_table
from edge_runtime.tokenizer import Tokenizer
from triton_models.launcher import make_server
from wisp_plugin.errors import ConfigError, ModelError
from wisp_plugin.home import default_draft_dir

NUM_PROMPTS, NUM_DRAFTS = 16, 4
OPEN_LOADS = (0.5, 0.8)  # of the closed loop's best throughput
_WINDOWS = 4  # measurement windows that perf_analyzer may take until it is content
_STABLE_PERCENT = 900  # no window is refused: they hold few passes, and machines are shared
_REQUESTS_PER_WINDOW = 8
_MARGIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Target:
    """A model and how perf_analyzer talks to it."""

    model: str
    options: tuple[str, ...]
    concurrency: tuple[int, ...]


TARGETS = (
    Target(
        "wisp_verifier_batched",
        ("-i", "grpc", "--async"),
        (1, 4, 8),
    ),
    Target(
        "wisp_verifier",
        ("-i", "grpc", "--streaming", "--async", "--request-parameter", "op:open:string",
         "--request-parameter", "protocol:1:int", "--request-parameter", "max_new_tokens:8:int"),
        (1, 2, 4),
    ),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench perf`."""
    parser.add_argument("--output", type=Path, default=Path("perf-results"), metavar="DIR", help="CSVs [%(default)s]")
    parser.add_argument("--window-s", type=float, default=5.0, metavar="S", help="measurement window [%(default)s]")
    parser.add_argument("--verbose", action="store_true", help="show what perf_analyzer prints")
    parser.add_argument("--quick", action="store_true", help="windows of 3 s, one concurrency")


def main(args: argparse.Namespace) -> int:
    """Exit code 0 if every run gave a CSV."""
    if args.quick:
        args.window_s = 3.0
    if not 0.5 <= args.window_s <= 600.0:
        raise ConfigError(f"--window-s is {args.window_s}; allowed: 0.5 to 600")
    tool = find_perf_analyzer(lambda line: print(f"wisp-bench: {line}", flush=True))
    print(f"{tool.executable.name}: {tool.version()}")
    args.output.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            data = Path(folder) / f"{target.model}.json"
            data.write_text(json.dumps(input_data(target.model)), encoding="utf-8")
            with make_server(models=(target.model,), settings={"max_load": 0}) as server:
                rows = measure(args, tool, target, server.grpc_url, data)
            print_rows(target, rows)
            best = max(row["Inferences/Second"] for row in rows)
            figures[f"requests_per_s_{target.model}"] = best
    finish("perf", figures, {"window_s": args.window_s, "quick": args.quick, "output": str(args.output)}, seed=None)
    return 0


def input_data(model: str) -> dict[str, Any]:
    """Prompts in perf_analyzer's form: one stream of several requests; the server draws the sessions."""
    tokenizer = Tokenizer.load(default_draft_dir("int8"))
    requests = []
    for question in mt_bench_questions()[:NUM_PROMPTS]:
        tokens = tokenizer.encode_chat([{"role": "user", "content": question}]).tolist()
        if model == "wisp_verifier":
            requests.append({
                "SESSION": {"content": [""], "shape": [1]},
                "TOKENS": {"content": tokens, "shape": [len(tokens)]},
            })  # fmt: skip
        else:
            draft = tokens[-NUM_DRAFTS:]
            requests.append({
                "TOKENS": {"content": tokens, "shape": [len(tokens)]},
                "DRAFT": {"content": draft, "shape": [len(draft)]},
            })  # fmt: skip
    return {"data": requests}


def measure(
    args: argparse.Namespace, tool: PerfAnalyzer, target: Target, url: str, data: Path
) -> list[dict[str, Any]]:  # fmt: skip
    """Closed loop, then open loop; a row per run, as perf_analyzer writes it."""
    concurrency = target.concurrency[1:2] if args.quick else target.concurrency
    rows = []
    with Progress(len(concurrency) + len(OPEN_LOADS), f"perf {target.model}") as progress:
        for number in concurrency:
            load = ["--concurrency-range", str(number)]
            row = run(args, tool, target, url, data, load, f"closed-{number}", args.window_s)
            rows.append(row | {"loop": f"closed, {number}"})
            progress.step()
        fastest = max(row["Inferences/Second"] for row in rows)
        for share in OPEN_LOADS:
            rate = max(0.1, round(share * fastest, 1))
            load = ["--request-rate-range", str(rate), "--request-distribution", "poisson"]
            window_s = max(args.window_s, _REQUESTS_PER_WINDOW / rate)  # perf_analyzer fails on one without an answer
            row = run(args, tool, target, url, data, load, f"open-{share}", window_s)
            rows.append(row | {"loop": f"open, {rate}/s"})
            progress.step()
    return rows


def run(
    args: argparse.Namespace, tool: PerfAnalyzer, target: Target, url: str, data: Path, load: Sequence[str], name: str,
    window_s: float,
) -> dict[str, Any]:  # fmt: skip
    """One run of perf_analyzer; the row of its CSV, numbers as floats. Raises ModelError if it writes none."""
    path = args.output.absolute() / f"{target.model}-{name}.csv"
    path.unlink(missing_ok=True)
    command = [
        str(tool.executable), "-m", target.model, "-u", url, *target.options, "--input-data", str(data), *load,
        "-p", str(round(1e3 * window_s)), "-r", str(_WINDOWS), "-s", str(_STABLE_PERCENT), "-f", str(path),
    ]  # fmt: skip
    limit_s = 2 * _WINDOWS * window_s + _MARGIN_S
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=limit_s, check=False, env=tool.environment()
    )  # fmt: skip
    if args.verbose:
        print(f"$ {' '.join(['perf_analyzer', *command[1:]])}\n{done.stdout}", flush=True)
    if not path.is_file():
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise ModelError(
            f"perf_analyzer gave no CSV for {target.model}, {name}: {lines[-1] if lines else 'no message'}"
        )
    with path.open(newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    return {key: _number(value) for key, value in row.items() if key}


def print_rows(target: Target, rows: Sequence[dict[str, Any]]) -> None:
    """The table of one model."""
    latencies = ("p50 latency", "p90 latency", "p99 latency")
    print_table(
        f"{target.model}: perf_analyzer, latency in ms",
        ["loop", "requests/s", *(name.split()[0] for name in latencies)],
        [[row["loop"], row["Inferences/Second"], *(row[name] / 1e3 for name in latencies)] for row in rows],
    )


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
