"""Lossless: what the system generates is exactly what the target alone generates, and follows its distribution.

Five parts (DESIGN.md section 3):
  references   transformers alone: its greedy `generate`, and sampling with the same seeds
  live         a real tritonserver, several devices at once, every draft graph, mode and way of choosing tokens,
               drafting as `wisp-edge` does by default: ids equal. At a first difference, two scores closer than
               1e-3 (fp32) are a tie and are listed; anything else is a mismatch
  rules        the same with every stop rule in every mode it is for, on a few of the prompts
  schedule     the same passes with and without what the draft model said: equal bit for bit, no ties
  distribution chi-square tests of the tokens of many seeds against the target's exact softmax

With `--transport unary` the live parts go through `wisp_verifier_batched`, in mode sync; schedule and distribution,
which know no transport, are left out.

Exit code 1 if anything is not as it must be.
"""

from __future__ import annotations

import argparse
import gc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from bench import lossless_distribution as distribution
from bench import lossless_schedule as schedule
from bench.live import ServerShare, requests_per_batch
from bench.lossless_live import (
    AUTO,
    Cell,
    References,
    case_key,
    live_figures,
    load_drafters,
    on_server,
    run_cells,
    show,
)
from bench.lossless_reference import TIE_GAP, Case, Reference, torch_threads
from bench.lossless_rules import RULE_CASES, few, run_rules
from bench.prompts import mt_bench_questions
from bench.report import Progress, check_targets, finish, print_table
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.transport import VERIFIER_MODEL, GrpcStream
from edge_runtime.unary_transport import UNARY_MODEL, UnaryTransport
from triton_models.launcher import make_server
from triton_models.target_model import load_target, resolve_device
from triton_models.torch_verifier import TorchVerifier
from wisp_plugin.acceptance_model import shipped_model
from wisp_plugin.config import VerifierConfig
from wisp_plugin.errors import ConfigError
from wisp_plugin.home import DRAFT_NAMES, default_target_dir
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.messages import Mode, Open, Sampling, Tokens
from wisp_plugin.speculation import make_controller

GREEDY, SAMPLED = "temperature 0", "temperature 0.8, top-p 0.95"
_FULL = {"prompts": 24, "tokens": 64, "seeds": 3, "distribution_seeds": 20_000}
_QUICK = {"prompts": 4, "tokens": 24, "seeds": 1, "distribution_seeds": 4_000}
_RULE_PROMPTS, _QUICK_RULE_PROMPTS, _RULE_TOKENS = 4, 1, 48  # per rule and mode: greedy, and as many sampled
_SCHEDULE_AHEAD = 8  # longest chain of the fixed schedule
TRANSPORTS = {"stream": (VERIFIER_MODEL, GrpcStream), "unary": (UNARY_MODEL, UnaryTransport)}
_LIMITS = {"prompts": (1, 80), "tokens": (2, 1024), "seeds": (1, 100), "sessions": (1, 64)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `wisp-bench lossless`."""
    parser.add_argument("--prompts", type=int, metavar="N", help=f"MT-bench questions [{_FULL['prompts']}]")
    parser.add_argument("--tokens", type=int, metavar="N", help=f"new tokens at most [{_FULL['tokens']}]")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"at temperature 0.8 [{_FULL['seeds']}]")
    parser.add_argument("--drafts", default="int8,int4", help="draft graphs, by commas [%(default)s]")
    parser.add_argument("--modes", help="modes, by commas [free,sync; with --transport unary: sync]")
    parser.add_argument("--transport", choices=list(TRANSPORTS), default="stream", help="[%(default)s]")
    parser.add_argument("--device", default="cpu", help="of the target: cpu, cuda, cuda:N [%(default)s]")
    parser.add_argument("--sessions", type=int, default=6, metavar="N", help="at once [%(default)s]")
    parser.add_argument(
        "--distribution-seeds", type=int, metavar="N", help=f"per test [{_FULL['distribution_seeds']}]"
    )
    sizes = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in _QUICK.items())
    parser.add_argument("--quick", action="store_true", help=f"about two minutes: {sizes}")


def main(args: argparse.Namespace) -> int:
    """Exit code 1 if a target is missed."""
    config = checked(args)
    transformers_logging.disable_progress_bar()
    figures, targets = run(config)
    missed = check_targets(figures, targets)
    finish("lossless", {**figures, "missed": missed}, config, seed=0)
    return 1 if missed else 0


def checked(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments with their defaults. Raises ConfigError."""
    sizes = _QUICK if args.quick else _FULL
    given = {name: getattr(args, name) for name in sizes}
    config: dict[str, Any] = {name: sizes[name] if value is None else value for name, value in given.items()}
    modes = ("sync" if args.transport == "unary" else "free,sync") if args.modes is None else args.modes
    config |= {"sessions": args.sessions, "drafts": args.drafts.split(","), "modes": modes.split(",")}
    config |= {"transport": args.transport, "device": str(resolve_device(args.device))}
    for name, (low, high) in _LIMITS.items():
        if not low <= config[name] <= high:
            raise ConfigError(f"--{name} is {config[name]}; allowed: {low} to {high}")
    if config["distribution_seeds"] < 1_000:
        raise ConfigError(f"--distribution-seeds is {config['distribution_seeds']}; allowed: 1000 or more")
    for name, allowed in (("drafts", DRAFT_NAMES), ("modes", tuple(Mode))):
        unknown = [value for value in config[name] if value not in allowed]
        if unknown or len(set(config[name])) != len(config[name]):
            raise ConfigError(f"--{name} is {getattr(args, name)!r}; allowed, once each: {', '.join(allowed)}")
    if args.transport == "unary" and config["modes"] != ["sync"]:
        raise ConfigError(f"--modes is {modes!r}; allowed with --transport unary: sync")
    num_prompts = min(config["prompts"], _QUICK_RULE_PROMPTS if args.quick else _RULE_PROMPTS)
    config |= {"rule_prompts": num_prompts, "rule_tokens": min(config["tokens"], _RULE_TOKENS)}
    return config | {"schedule_ahead": _SCHEDULE_AHEAD, "dtype": "float32", "tie_gap": TIE_GAP}


def run(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """All parts: figures, and what is asked of them."""
    tokenizer = Tokenizer.load(default_target_dir())
    cases = make_cases(tokenizer, config["prompts"], config["seeds"])
    figures: dict[str, Any] = {}
    if config["transport"] == "stream":
        figures |= fixed_schedule(cases, tokenizer, config)
        gc.collect()  # the target's weights, before the reference loads its own
        figures |= distributions(config["distribution_seeds"])
    refs = references(cases, config["tokens"], tokenizer.eos_token_ids, torch.device(config["device"]))
    figures |= live(refs, tokenizer, config)
    num_rule_sessions = sum(len(RULE_CASES[Mode(mode)]) for mode in config["modes"]) * 2 * config["rule_prompts"]
    num_sessions = len(config["drafts"]) * len(config["modes"]) * sum(map(len, cases.values())) + num_rule_sessions
    targets = {
        "sessions": f">= {num_sessions}",
        "rule_sessions": f">= {num_rule_sessions}",
        "mismatches": "<= 0",
        "rule_mismatches": "<= 0",
        "cells_without_verified_drafts": "<= 0",
    }
    if config["transport"] == "unary":
        return figures, targets
    return figures, targets | {
        "fixed_schedule_mismatches": "<= 0",
        "chi_square_least_p": f">= {distribution.threshold():.3g}",
        "chi_square_wrong_samplers_greatest_p": f"<= {distribution.threshold():.3g}",
    }


def make_cases(tokenizer: Tokenizer, num_prompts: int, num_seeds: int) -> dict[str, list[Case]]:
    """Cases by way of choosing tokens; the questions are spread over all categories of MT-bench."""
    questions = mt_bench_questions()
    numbers = [i * len(questions) // num_prompts for i in range(num_prompts)]
    prompts = {
        number: tokenizer.encode_chat([{"role": "user", "content": questions[number]}])
        for number in numbers
    }
    sampled = [Sampling(seed=seed, temperature=0.8, top_p=0.95) for seed in range(1, num_seeds + 1)]
    return {
        GREEDY: [Case(number, prompt, Sampling()) for number, prompt in prompts.items()],
        SAMPLED: [Case(number, prompt, sampling) for sampling in sampled for number, prompt in prompts.items()],
    }


def references(
    cases: dict[str, list[Case]], max_new_tokens: int, eos_token_ids: tuple[int, ...], device: torch.device
) -> References:
    """What the target alone generates in every case.

    On a CPU one case per core, each with one thread: on a busy machine several threads of one small forward wait for
    each other most of the time.
    """
    reference = Reference(default_target_dir(), max_new_tokens, eos_token_ids, device)
    every = [case for group in cases.values() for case in group]
    expected = {}
    num_at_once = torch.get_num_threads() if device.type == "cpu" else 1
    progress = Progress(len(every), "references by transformers")
    with torch_threads(1), ThreadPoolExecutor(num_at_once) as pool, progress:
        for case, tokens in zip(every, pool.map(reference.generate, every), strict=True):
            expected[case_key(case)] = tokens
            progress.step()
    return References(cases, expected, reference.scores)


def live(refs: References, tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    """Every cell on one tritonserver, those of the rules too."""
    cells: list[Cell] = []
    shares: dict[str, ServerShare] = {}
    modes = [Mode(mode) for mode in config["modes"]]
    model, connect = TRANSPORTS[config["transport"]]
    with make_server(models=[model], settings={"dtype": "float32", "device": config["device"]}) as server:
        for draft in config["drafts"]:
            by_default = partial(make_controller, AUTO, model=shipped_model(draft))
            run_one = on_server(server, config["tokens"], tokenizer.eos_token_ids, by_default, connect)
            found, shares[draft] = run_cells(server, run_one, draft, modes, refs, config["sessions"])
            cells += found
        run_with = partial(on_server, server, config["rule_tokens"], tokenizer.eos_token_ids, connect=connect)
        rule_refs = few(refs, config["rule_prompts"], config["rule_tokens"])
        cells += run_rules(server, run_with, modes, rule_refs, config["sessions"])
        per_batch = None if config["transport"] == "stream" else requests_per_batch(server, model)
    show(cells, tokenizer)
    figures = live_figures(cells) | {f"acceptance_{draft}": share.acceptance_rate for draft, share in shares.items()}
    return figures if per_batch is None else figures | {"requests_per_batch": per_batch}


def fixed_schedule(cases: dict[str, list[Case]], tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    """The part `schedule`, with the last (weakest) of the draft graphs."""
    target = load_target(VerifierConfig(device=config["device"], dtype="float32"))
    opens = schedule.fixed_opens(list(cases.values()), config["sessions"], config["tokens"], tokenizer.eos_token_ids)
    drafters = load_drafters(config["drafts"][-1], len(opens))
    own = dict(zip([opened.session for opened in opens], drafters, strict=True))

    def draft(opened: Open, tokens: Tokens) -> int:
        return own[opened.session].draft_token(tokens, opened.sampling)

    def new_verifier() -> TorchVerifier:
        return TorchVerifier(target, BlockPool(512, 32))

    recorder, final = schedule.record(new_verifier(), opens, draft, _SCHEDULE_AHEAD, seed=0)
    result = schedule.replay(new_verifier(), recorder, final, target.vocab_size, seed=0)
    columns = ("sessions", "passes", "committed tokens compared", "draft tokens replaced", "mismatches")
    row = (len(opens), result.num_passes, result.num_choices, result.num_replaced, len(result.mismatches))
    print_table("Fixed schedule: the same passes without what the draft model said", columns, [row])
    print("\n".join(result.mismatches), end="\n" if result.mismatches else "")
    names = ("sessions", "passes", "choices", "replaced", "mismatches")
    return {f"fixed_schedule_{name}": value for name, value in zip(names, row, strict=True)}


def distributions(num_seeds: int) -> dict[str, Any]:
    """The part `distribution`."""
    with torch_threads(1):  # matrices this small are slower on several
        result = distribution.run(num_seeds)
    rows: list[tuple[object, ...]] = []
    for choice, p_values in result.p_values.items():
        rows.append((choice, "speculative, coupled", result.acceptance[choice], *p_values.values()))
        rows += [(choice, f"wrong: {name}", None, *p.values()) for name, p in result.wrong_p_values[choice].items()]
    columns = ("choice", "sampler", "acceptance", "p, first token", "p, second", "p, pair")
    print_table(f"Distribution of the tokens of {num_seeds} seeds, chi-square", columns, rows)
    alarm = distribution.FALSE_ALARM_PROBABILITY
    print(f"a right sampler fails any of the tests with probability {alarm:g}: p below {distribution.threshold():.2g}")
    return {
        "chi_square": result.p_values,
        "chi_square_wrong_samplers": result.wrong_p_values,
        "chi_square_least_p": result.least_p,
        "chi_square_wrong_samplers_greatest_p": result.greatest_wrong_p,
        "chi_square_acceptance": result.acceptance,
        "false_alarm_probability": alarm,
    }
