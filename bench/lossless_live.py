"""Sessions on a real tritonserver, several at once, compared with what the target alone generates."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from bench.live import Drafting, ServerShare, make_open, run_session, server_totals
from bench.lossless_reference import Case, Difference, first_difference
from bench.report import Progress, print_table
from edge_runtime.client import TokenDrafter
from edge_runtime.drafter import Drafter
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.transport import GrpcStream, VerifyTransport
from triton_models.server_process import ServerProcess
from wisp_plugin.controller import SpeculationController
from wisp_plugin.coupling import Float64s
from wisp_plugin.home import default_draft_dir
from wisp_plugin.messages import Mode, Tokens

AUTO = "auto"  # the stop rule of the cells of all prompts: what a device does unless it is told otherwise

RunSession = Callable[[Case, Mode, TokenDrafter], Tokens]  # the tokens that a session generated


@dataclass(frozen=True, slots=True)
class Cell:
    """All sessions of one draft, mode, way of choosing tokens and stop rule."""

    draft: str
    mode: Mode
    sampling: str
    num_sessions: int
    num_tokens: int
    num_equal: int  # sessions without any difference
    differences: tuple[Difference, ...]  # the first of each session that has one
    share: ServerShare | None = None  # what the server counted
    rule: str = AUTO

    @property
    def ties(self) -> list[Difference]:
        """Differences that floating point explains."""
        return [difference for difference in self.differences if difference.is_tie]

    @property
    def mismatches(self) -> list[Difference]:
        """Differences that nothing explains."""
        return [difference for difference in self.differences if not difference.is_tie]

    def describe(self, difference: Difference) -> dict[str, Any]:
        """One of `differences` with everything needed to reproduce it."""
        return {
            "draft": self.draft,
            "mode": self.mode.value,
            "rule": self.rule,
            "prompt": difference.prompt,
            "temperature": difference.sampling.temperature,
            "top_p": difference.sampling.top_p,
            "seed": difference.sampling.seed,
            "position": difference.position,
            "index": difference.index,
            "tokens": [difference.expected, difference.found],
            "scores": list(difference.scores),
            "best": list(difference.best),
            "best_scores": list(difference.best_scores),
            "gap": difference.gap,
        }


@dataclass(frozen=True, slots=True)
class References:
    """The expected tokens of every case, and the scores behind a prefix, for the verdict on a difference."""

    cases: Mapping[str, Sequence[Case]]  # by way of choosing tokens
    expected: Mapping[tuple[int, int, float], Tokens]  # by `case_key`
    scores: Callable[[Case, Tokens], Float64s]


def case_key(case: Case) -> tuple[int, int, float]:
    """What tells the cases of one evaluation apart."""
    return case.number, case.sampling.seed, case.sampling.temperature


def load_drafters(precision: str, num_drafters: int) -> list[Drafter]:
    """Drafters of the embedded pair with one thread each: a drafter serves one device at a time."""
    folder = default_draft_dir(precision)
    return [Drafter.load(folder, num_threads=1) for _ in range(num_drafters)]


def on_server(
    server: ServerProcess,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    controller: Callable[[Mode], SpeculationController],
    connect: Callable[[str], VerifyTransport] = GrpcStream,
) -> RunSession:
    """Sessions on `server`, each with a connection made by `connect`, an edge client and a controller of its own.

    The drafter knows the prompt beforehand. With many devices on the server's own cores, drafts in `free` mode would
    otherwise come too late to be verified, and equality would say little.
    """

    def run(case: Case, mode: Mode, drafter: TokenDrafter) -> Tokens:
        while drafter.advance(case.prompt):
            pass
        drafter.draft_token_with_stats(case.prompt, case.sampling)
        opened = make_open(case.prompt, max_new_tokens, mode, case.sampling, eos_token_ids)
        drafting = Drafting(drafter, mode, make_controller=lambda: controller(mode))
        return run_session(server.grpc_url, opened, drafting, connect=connect).tokens

    return run


def run_cells(
    server: ServerProcess, run: RunSession, draft: str, modes: Sequence[Mode], refs: References, num_at_once: int
) -> tuple[list[Cell], ServerShare]:
    """All cells of one draft, and what the server counted over all of them."""
    drafters = load_drafters(draft, num_at_once)
    first = before = server_totals(server)
    cells = []
    for mode in modes:
        for sampling, cases in refs.cases.items():
            with Progress(len(cases), f"{draft}, {mode.value}, {sampling}") as progress:
                found = run_all(run, cases, mode, drafters, progress)
            after = server_totals(server)
            cells.append(judge(draft, mode, sampling, found, refs, ServerShare.between(before, after)))
            before = after
    return cells, ServerShare.between(first, before)


def run_all(
    run: RunSession, cases: Sequence[Case], mode: Mode, drafters: Sequence[TokenDrafter], progress: Progress
) -> list[tuple[Case, Tokens]]:
    """Run every case, as many at once as there are drafters. Whatever a session raises, this raises."""
    free: queue.SimpleQueue[TokenDrafter] = queue.SimpleQueue()
    for drafter in drafters:
        free.put(drafter)

    def one(case: Case) -> Tokens:
        drafter = free.get()
        try:
            return run(case, mode, drafter)
        finally:
            free.put(drafter)

    with ThreadPoolExecutor(len(drafters)) as pool:
        running: dict[Future[Tokens], Case] = {pool.submit(one, case): case for case in cases}
        try:
            for done in as_completed(running):
                done.result()
                progress.step()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [(case, future.result()) for future, case in running.items()]


def judge(
    draft: str,
    mode: Mode,
    sampling: str,
    found: Sequence[tuple[Case, Tokens]],
    refs: References,
    share: ServerShare | None = None,
    rule: str = AUTO,
) -> Cell:
    """Compare every session with its reference."""
    verdicts = [first_difference(case, refs.expected[case_key(case)], tokens, refs.scores) for case, tokens in found]
    differences = tuple(verdict for verdict in verdicts if verdict is not None)
    num_tokens = sum(len(tokens) for _, tokens in found)
    num_equal = len(found) - len(differences)
    return Cell(draft, mode, sampling, len(found), num_tokens, num_equal, differences, share, rule)


def live_figures(cells: Sequence[Cell]) -> dict[str, Any]:
    """Figures of all cells together and of each."""
    of_rules = [cell for cell in cells if cell.rule != AUTO]
    idle = [cell for cell in cells if cell.share is None or cell.share.acceptance_rate is None]
    return {
        "sessions": sum(cell.num_sessions for cell in cells),
        "sessions_equal": sum(cell.num_equal for cell in cells),
        "tokens": sum(cell.num_tokens for cell in cells),
        "mismatches": sum(len(cell.mismatches) for cell in cells),
        "rule_sessions": sum(cell.num_sessions for cell in of_rules),
        "rule_mismatches": sum(len(cell.mismatches) for cell in of_rules),
        "cells_without_verified_drafts": len(idle),
        "ties": [cell.describe(difference) for cell in cells for difference in cell.ties],
        "mismatch_details": [cell.describe(difference) for cell in cells for difference in cell.mismatches],
        "cells": [
            {
                "draft": cell.draft,
                "mode": cell.mode.value,
                "rule": cell.rule,
                "sampling": cell.sampling,
                "sessions": cell.num_sessions,
                "equal": cell.num_equal,
                "ties": len(cell.ties),
                "mismatches": len(cell.mismatches),
                **({} if cell.share is None else dataclasses.asdict(cell.share)),
            }
            for cell in cells
        ],
    }


def show(cells: Sequence[Cell], tokenizer: Tokenizer) -> None:
    """The table of cells, then every difference."""
    counted = ("sessions", "tokens", "equal", "ties", "mismatches", "acceptance", "per pass")
    columns = ("draft", "mode", "rule", "choice", *counted)
    rows = []
    for cell in cells:
        counts = (cell.num_sessions, cell.num_tokens, cell.num_equal, len(cell.ties), len(cell.mismatches))
        share = (None, None) if cell.share is None else (cell.share.acceptance_rate, cell.share.tokens_per_commit)
        rows.append((cell.draft, cell.mode.value, cell.rule, cell.sampling, *counts, *share))
    print_table("Live sessions against the target alone", columns, rows)
    for cell in cells:
        for difference in cell.differences:
            print(explain(cell, difference, tokenizer))


def explain(cell: Cell, difference: Difference, tokenizer: Tokenizer) -> str:
    """A difference in one line."""

    def name(token: int | None, score: float | None) -> str:
        if token is None:
            return "the end"
        return f"{token} {tokenizer.decode([token], False)!r} ({'filtered out' if score is None else f'{score:.6f}'})"

    expected, found = map(name, (difference.expected, difference.found), difference.scores)
    best = " and ".join(map(name, difference.best, difference.best_scores))
    return (
        f"{'tie' if difference.is_tie else 'MISMATCH'}: {cell.draft}, {cell.mode.value}, rule {cell.rule}, "
        f"prompt {difference.prompt}, {difference.sampling}, position {difference.position} "
        f"(generated token {difference.index}): expected "
        f"{expected}, found {found}; the two best are {best}, {difference.gap:.2e} apart"
    )
