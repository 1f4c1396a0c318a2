"""What the gateway on the edge costs, and what it stands: a real tritonserver, a real `wisp-edge serve`, HTTP.

  throughput  concurrent streams of /generate_stream against the same sessions (prompts, seeds, one draft graph shared
              in the same way) driven in this process without HTTP, in turn; tokens/s of all together
  first byte  a request for one token, time from connecting to its event, against the first commit of the same
              session without HTTP, in turn; difference of the medians. The target of these is emulated: its passes
              take the same time every time, else they would hide what is to be measured
  fairness    largest over smallest number of tokens of the streams that run to their length, when the first one ends
  fuzz        request bodies that are right, nearly right and no JSON at all, one after the other; status counts

Streams must bring the tokens of the sessions driven without the gateway, id by id: a difference ends the benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import threading
import time
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from bench.gateway_bodies import requests
from bench.gateway_clients import Address, request, stream
from bench.gateway_process import ROOT, serving
from bench.prompts import mt_bench_questions
from bench.report import Progress, alternate, check_targets, finish, median, percentile, print_table
from edge_runtime.drafting_thread import set_switch_interval
from edge_runtime.gateway.app import load_device
from edge_runtime.gateway.device import GatewayDevice
from edge_runtime.gateway.parameters import GenerationRequest
from edge_runtime.options import add_serve_arguments
from triton_models.launcher import make_server
from wisp_plugin.messages import Sampling

TARGETS = {
    "throughput_ratio": ">= 0.9",
    "first_byte_cost_ms": "<= 3",
    "fairness": "<= 1.5",
    "internal_errors": "<= 0",
    "healthy_after": ">= 1",
}
REQUEST_LIMIT_S = 60.0  # a fuzzed request that takes longer hangs
TEMPERATURE = 0.7
PROFILE = ROOT / "bench" / "profiles" / "a100-qwen3-32b.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--streams", type=int, default=32, metavar="N", help="at once [%(default)s]")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="per stream [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of both, behind one to warm [%(default)s]")
    parser.add_argument("--first-bytes", type=int, default=100, metavar="N", help="requests of each [%(default)s]")
    parser.add_argument("--requests", type=int, default=2000, metavar="N", help="fuzzed requests [%(default)s]")
    parser.add_argument("--no-draft", action="store_true", help="thin sessions: what HTTP costs without drafts")
    parser.add_argument("--quick", action="store_true", help="8 streams of 32 tokens, one round, 100 fuzzed requests")


def main(args: argparse.Namespace) -> int:
    """Exit code 0 also where a target is missed: speeds depend on the machine, and the table says it."""
    if args.quick:
        args.streams, args.tokens, args.rounds, args.first_bytes, args.requests = 8, 32, 1, 20, 100
    options = ["--no-draft"] if args.no_draft else []
    room = 256 * args.streams + 8192
    with make_server(settings={"kv_tokens": room, "max_load": 0.0}) as server:
        device = load_device(_serve_arguments(server.grpc_url, options))
        with serving(server.grpc_url, *options) as url:
            load = Load(args, device, Address.of(url))
            figures = {**throughput(load), **fuzz(load.where, args.requests)}
    with make_server(settings={"target": f"emulated:{PROFILE}", "max_load": 0.0}) as server:
        device = load_device(_serve_arguments(server.grpc_url, options))
        with serving(server.grpc_url, *options) as url:
            figures |= first_byte(Load(args, device, Address.of(url)))
    missed = check_targets(figures, TARGETS)
    finish("gateway", {**figures, "missed": missed}, vars(args), seed=0)
    return 0


def _serve_arguments(server: str, options: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    return parser.parse_args(["--server", server, *options])


@dataclass(frozen=True, slots=True)
class Run:
    """All streams or sessions of one round, to their ends."""

    elapsed_s: float
    token_ids: list[list[int]]
    fairness: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """Of all together."""
        return sum(map(len, self.token_ids)) / self.elapsed_s


class Load:
    """The same work with the gateway and without it."""

    def __init__(self, args: argparse.Namespace, device: GatewayDevice, where: Address) -> None:
        self.args, self.device, self.where = args, device, where
        questions = mt_bench_questions()
        chats = [[{"role": "user", "content": questions[i % len(questions)]}] for i in range(args.streams)]
        self.prompts = [device.tokenizer.chat_prompt(chat) for chat in chats]

    def wanted(self, index: int, num_tokens: int) -> GenerationRequest:
        """Session `index`, as the gateway makes it of `parameters`."""
        prompt = self.device.tokenizer.encode(self.prompts[index])
        chosen = Sampling(seed=index, temperature=TEMPERATURE)
        return GenerationRequest(prompt, self.prompts[index], num_tokens, chosen, logprobs=True)

    def parameters(self, index: int, num_tokens: int) -> dict[str, Any]:
        """The same for /generate_stream."""
        return {"max_new_tokens": num_tokens, "temperature": TEMPERATURE, "seed": index}

    def without_gateway(self) -> Run:
        """A thread for each session."""
        token_ids: list[list[int]] = [[] for _ in self.prompts]

        def session(index: int) -> None:
            token_ids[index], _ = self.session(index, self.args.tokens)

        threads = [threading.Thread(target=session, args=(index,)) for index in range(self.args.streams)]
        set_switch_interval(self.args.streams)
        began_s = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed_s = time.monotonic() - began_s
        set_switch_interval()
        return Run(elapsed_s, token_ids)

    def session(self, index: int, num_tokens: int) -> tuple[list[int], float]:
        """Tokens of one session, and seconds to the first one."""
        began_s, first_s, tokens = time.monotonic(), 0.0, []
        run = self.device.start(self.wanted(index, num_tokens))
        try:
            for part in run.client.run():
                first_s = first_s or time.monotonic()
                tokens += part.tolist()
                if run.share is not None:
                    run.share.num_tokens += len(part)
        finally:
            self.device.end(run)
        return tokens, first_s - began_s

    def with_gateway(self) -> Run:
        """A stream for each session."""
        counts = [0] * self.args.streams
        at_first_end: list[int] = []

        def count(index: int) -> None:
            counts[index] += 1
            if counts[index] == self.args.tokens and not at_first_end:
                at_first_end.extend(counts)

        async def one(index: int) -> list[int]:
            wanted = self.parameters(index, self.args.tokens)
            result = await stream(self.where, self.prompts[index], wanted, lambda: count(index))
            if result.error is not None:
                raise AssertionError(f"stream {index}: {result.error}")
            return result.token_ids

        async def every() -> list[list[int]]:
            return await asyncio.gather(*(one(index) for index in range(self.args.streams)))

        began_s = time.monotonic()
        token_ids = asyncio.run(every())
        elapsed_s = time.monotonic() - began_s
        whole = [at for at, ids in zip(at_first_end, token_ids, strict=False) if len(ids) == self.args.tokens]
        return Run(elapsed_s, token_ids, max(whole) / max(1, min(whole)) if whole else None)


def throughput(load: Load) -> dict[str, Any]:
    """Tokens per second of both, and fairness."""
    ways = {"without": load.without_gateway, "with": load.with_gateway}
    with Progress(load.args.rounds + 1, "throughput"):
        runs = alternate(ways, load.args.rounds + 1)
    for number, (bare, through) in enumerate(zip(runs["without"], runs["with"], strict=True)):
        if bare.token_ids != through.token_ids:
            raise AssertionError(f"round {number}: the gateway's tokens are not those of the sessions without it")
    bare_s, through_s = ([run.tokens_per_s for run in runs[name][1:]] for name in ("without", "with"))
    fairness = [run.fairness for run in runs["with"] if run.fairness is not None]
    print_table(
        f"{load.args.streams} streams of {load.args.tokens} tokens",
        ["", "tokens/s, median", "slowest", "fastest"],
        [[n, median(v), min(v), max(v)] for n, v in (("sessions alone", bare_s), ("through the gateway", through_s))],
    )
    return {
        "tokens_per_s_without": median(bare_s),
        "tokens_per_s_with": median(through_s),
        "throughput_ratio": median(t / b for t, b in zip(through_s, bare_s, strict=True)),
        "fairness": max(fairness) if fairness else None,
    }


def first_byte(load: Load) -> dict[str, Any]:
    """Time to the first token of both."""

    def through() -> float:
        result = asyncio.run(stream(load.where, load.prompts[0], load.parameters(0, 1)))
        return result.first_s - result.sent_s

    ways = {"without": lambda: load.session(0, 1)[1], "with": through}
    times_s = alternate(ways, load.args.first_bytes + 2)
    in_ms = {name: [1e3 * value for value in values[2:]] for name, values in times_s.items()}
    print_table(
        "First token",
        ["", "ms, median", "p10", "p90"],
        [[name, median(v), percentile(v, 10), percentile(v, 90)] for name, v in in_ms.items()],
    )
    cost = median(in_ms["with"]) - median(in_ms["without"])
    return {
        "first_byte_ms_without": median(in_ms["without"]),
        "first_byte_cost_ms": cost,
        # Where others use the machine, too, the fast tenths tell more.
        "first_byte_cost_ms_p10": percentile(in_ms["with"], 10) - percentile(in_ms["without"], 10),
    }


def fuzz(where: Address, num_requests: int) -> dict[str, Any]:
    """Status counts of `num_requests` bodies, and the gateway's health after them."""
    counts: collections.Counter[tuple[str, int]] = collections.Counter()

    @seed(0)
    @settings(
        max_examples=num_requests, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(wanted=requests())
    def one(wanted: tuple[str, bytes]) -> None:
        path, body = wanted
        status, _ = asyncio.run(asyncio.wait_for(request(where, "POST", path, body), REQUEST_LIMIT_S))
        counts[path, status] += 1

    one()
    statuses = sorted({status for _, status in counts})
    paths = sorted({path for path, _ in counts})
    rows = [[path, *(counts[path, status] for status in statuses)] for path in paths]
    print_table("Fuzzed requests by route and status", ["route", *map(str, statuses)], rows)
    healthy, _ = asyncio.run(request(where, "GET", "/health"))
    metrics = asyncio.run(request(where, "GET", "/metrics"))[1].decode()
    return {
        "fuzzed_requests": sum(counts.values()),
        "statuses": {str(status): sum(counts[path, status] for path in paths) for status in statuses},
        "internal_errors": sum(n for (_, status), n in counts.items() if status >= 500),
        "healthy_after": int(healthy == 200 and "tgi_batch_current_size 0\n" in metrics),
    }
