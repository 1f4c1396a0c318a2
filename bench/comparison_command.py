"""Options, assumptions and report that `wisp-bench capacity` and `wisp-bench goodput` have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.arguments import not_negative_int, num_processes, num_seeds, positive_int, report_folder
from bench.cells import DRAFTS, MEDIUM, MIX, QUICK, Cell, Timing
from bench.comparison import PUBLISHED, SUMMARY_COLUMNS, Comparison, chosen_kinds, ratio_figures, summary_rows
from bench.gpu_profile import DEFAULT, NORMS, draft_step_on, find_profile, is_derived, kv_tokens
from bench.html_report import DEFINITIONS, Page
from bench.intervals import mean_interval
from bench.report import commit
from bench.settings import Kind
from bench.sim_colocated import DraftingCost
from bench.systems import ABLATIONS, BASELINES, FEW, FULL, SYSTEMS
from bench.trace_walk import load_ring
from edge_runtime.cores import usable_cores
from wisp_plugin.estimator import FEATURES


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add = parser.add_argument
    add("--draft", choices=DRAFTS, default=MIX.draft, help=f"traces: acceptance and draft features [{MIX.draft}]")
    add("--profile", default=DEFAULT, metavar="P", help=f"of bench/profiles, or a file [{DEFAULT}]")
    add("--seeds", type=num_seeds, default=5, metavar="N", help="runs of everything with other sessions [5]")
    add("--seed", type=not_negative_int, default=0, help="the first of them [0]")
    add("--systems", nargs="+", choices=list(SYSTEMS), default=[*BASELINES, *(k.name for k in ABLATIONS)],
        metavar="NAME", help=f"of {', '.join(SYSTEMS)}; wisp is always among them [all]")  # fmt: skip
    add("--few", action="store_true", help="sweep few settings of each system, in larger steps")
    add("--quick", action="store_true", help="still shorter, with one seed: shows that it works")
    add("--jobs", type=num_processes, default=usable_cores(), metavar="N", help="processes [the cores]")
    add("--together", type=positive_int, default=0, metavar="N",
        help="settings of a system that one process sweeps; few suit many cores [all]")  # fmt: skip
    add("--report", type=report_folder, metavar="DIR", help="write PNG plots and one HTML page there")


def asked(args: argparse.Namespace) -> tuple[Cell, list[Kind], Timing, list[int]]:
    """Cell, systems with their settings, length of runs and seeds that the options ask for.

    Raises:
        ConfigError: there is no such profile, or it is none for a comparison.
    """
    kinds = chosen_kinds(args.systems, lists(args))
    timing = QUICK if args.quick else MEDIUM if args.few else Timing()
    seeds = [args.seed + i for i in range(1 if args.quick else args.seeds)]
    cell = replace(MIX, draft=args.draft, profile=args.profile)
    cell.scenario(timing, args.seed)  # what is wrong with the profile is said now, not by a run
    return cell, kinds, timing, seeds


def lists(args: argparse.Namespace) -> Sequence[Kind]:
    """The systems with the settings that searches begin with."""
    return FEW if args.few or args.quick else FULL


def assumptions(cell: Cell, timing: Timing, seeds: Sequence[int], has_finals: bool = True) -> list[str]:
    """What a reader has to know about a comparison. `has_finals`: the best settings of the sweep ran on every seed."""
    profile = find_profile(cell.profile)
    how = profile.fingerprint.model_hash if is_derived(profile) else f"measured on {profile.fingerprint.device}"
    forms = {norm: suffix for suffix, norm in NORMS.items()}
    form = {"": "smooth maximum", "-maximum": "plain maximum", "-additive": "sum"}.get(
        forms.get(profile.costs.norm, ""), f"norm {profile.costs.norm:g}"
    )
    longer = ", longer where sessions are (1.5 times at a tpot of 4 passes)" if timing.suits else ""
    return [
        f"Target: {profile.fingerprint.model} on {profile.fingerprint.device}; {how}. "
        f"A pass takes the {form} of reading and computing, with 3 % noise.",
        f"KV memory for {kv_tokens():,} tokens; a draft model on the server (0.6 G parameters) takes its part of it, "
        f"and {1e3 * DraftingCost(draft_step_on(cell.profile, profile.costs.norm)).step_s:.1f} ms for a step of one "
        "session.",
        f"Acceptance and draft statistics: recorded traces of the {cell.draft} draft of the default pair, "
        f"{load_ring(cell.draft).acceptance:.3f} of its tokens agree. They are a stand-in for a draft of the target.",
        f"Devices: {cell.name}; in equal shares of their kinds, speeds with 15 % spread, at times throttled to half.",
        f"Sessions: prompts of median 250, outputs of 200 tokens, lognormal; users pause {timing.think_s:g} s on "
        "average; without admission control.",
        f"Runs of {timing.duration_s:g} simulated seconds, {timing.warm_up_s:g} of them warm-up{longer}; "
        f"{_search(timing, seeds, has_finals)} Of wisp these are whether a draft model on the server helps. "
        "Constants of its policy were chosen looking at seeds 0 to 8.",
        "Simulated: the real scheduler, engine, controller and sessions; only link, draft step and pass are modelled.",
    ]


def _search(timing: Timing, seeds: Sequence[int], has_finals: bool) -> str:
    """How closely and on which seeds settings were looked for."""
    resolution = (timing.closer() if has_finals else timing).resolution
    swept = f"Settings of each system are swept on {'the first' if len(seeds) > 1 else 'it'}"
    counts = "those that come close to the best run on all, and the best by the mean counts" if has_finals else (
        "the best one there counts")  # fmt: skip
    return f"capacities to {resolution:.0%}; {len(seeds)} seed{'s' * (len(seeds) > 1)}. {swept}; {counts}."


def goodput_ceiling(cell: Cell, timing: Timing) -> float | None:
    """Output tokens per second that no system can exceed on this profile, with these lengths of prompts and outputs, if
    it serves long prompts as it does short ones.

    Every prompt and output token is computed once, at the marginal arithmetic price and nothing else: perfect drafts,
    passes without end, no SLO. Prompts count: they are more than half of all tokens. None: there is no such price.
    """
    scenario = cell.scenario(timing, 0).with_devices(400)
    drawn = [next(scenario.workload.sessions(device)) for device in scenario.workload.devices()]
    per_output = 1.0 + sum(s.prompt_len for s in drawn) / sum(s.num_output_tokens for s in drawn)
    new_token_s = scenario.costs.arithmetic[FEATURES.index("new_tokens")]
    return 1.0 / (new_token_s * per_output) if new_token_s > 0 else None


def page_of(
    title: str, comparison: Comparison, timing: Timing, seeds: Sequence[int], figures: Sequence[str]
) -> Page:
    """A page with what all comparisons show; the ratios of `figures`, `capacity` or `goodput` or both."""
    page = Page(title)
    page.text(DEFINITIONS, is_note=True)
    page.heading("What was assumed")
    page.points([*assumptions(comparison.cell, timing, seeds), f"Commit {commit()}."])
    page.heading("Every system at its best")
    page.text("Means over the seeds with 95 % confidence intervals; other columns are of the first seed, those behind "
              "the settings at its capacity, or at the peak of a system that holds nobody.")
    page.table(SUMMARY_COLUMNS, summary_rows(comparison))
    for figure in figures:
        _add_ratios(page, comparison, figure)
    return page


RATIO_COLUMNS = ("system", "wisp / system", "95 % interval", "published", "reached")


def ratio_rows(comparison: Comparison, figure: str) -> list[list[Any]]:
    """A row per system, see RATIO_COLUMNS, and one for the best baseline; None for what there is not."""
    figures = ratio_figures(comparison, figure)
    rows: list[list[Any]] = []
    for system in comparison.bests:
        if system != "wisp":
            key = f"{figure}_vs_{system.replace('-', '_')}"
            low, high = figures[f"{key}_ci"] or (None, None)
            interval = None if low is None or high is None else f"{low:.3g} to {high:.3g}"
            published, is_reached = figures.get(f"{key}_published"), figures.get(f"{key}_reaches_published")
            rows.append([system, figures[key], interval, published, is_reached])
    if best := figures[f"{figure}_best_other"]:
        rows.append([f"best other: {best}, by means", figures[f"{figure}_vs_best_other"], None, None, None])
    return rows


def missed_lines(comparison: Comparison, figure: str) -> list[str]:
    """What is to be said about each published ratio that is not reached, or that nothing can be said about."""
    lines = []
    for system, ratio, interval, published, is_reached in ratio_rows(comparison, figure):
        if system not in PUBLISHED or is_reached:
            continue
        if ratio is None:
            lines.append(f"{figure.capitalize()} over {system}: no ratio, because {system} or wisp has none with some "
                         f"seed; published is {published:g}.")
        else:
            within = f" ({interval})" if interval else ""
            lines.append(f"Not reached: {figure} of wisp is {ratio:.3g}{within} times that of {system}, which is tuned "
                         f"here, with this profile and these drafts; the best case of the paper is {published:g}.")
    return lines


def _add_ratios(page: Page, comparison: Comparison, figure: str) -> None:
    rows = ratio_rows(comparison, figure)
    page.heading(f"{figure.capitalize()}: WISP / every other system")
    page.text("Geometric means over the seeds with 95 % confidence intervals. Published: the best case of the paper.")
    page.table(RATIO_COLUMNS, rows, [i for i, row in enumerate(rows) if row[-1] is False])
    if missed := missed_lines(comparison, figure):
        page.points(missed)


def means_of(comparison: Comparison, figure: str, timing: Timing) -> dict[str, float | None]:
    """`FIGURE_SYSTEM` of `capacity` or `goodput`, mean over the seeds, and the ceiling of goodput."""
    values = comparison.capacities if figure == "capacity" else comparison.goodputs
    means: dict[str, float | None] = {}
    for name in comparison.bests:
        means[f"{figure}_{name.replace('-', '_')}"] = mean_interval(values(name)).mean
    return means | {"goodput_ceiling": goodput_ceiling(comparison.cell, timing)}


def systems_figures(comparison: Comparison) -> dict[str, Any]:
    """Per system, for JSON: capacities and goodputs of all seeds, intervals, settings, figures of the first seed; no
    peaks where none was looked for."""
    result: dict[str, Any] = {}
    for name, bests in comparison.bests.items():
        capacity, goodput = mean_interval(comparison.capacities(name)), mean_interval(comparison.goodputs(name))
        result[name] = {
            "capacity": capacity.mean, "capacity_ci": [capacity.low, capacity.high],
            "capacity_by_seed": comparison.capacities(name), "capacity_setting": bests[0].capacity_setting,
            "at_capacity": _finite(bests[0].capacity_figures),
        }  # fmt: skip
        if bests[0].has_peak:
            result[name] |= {
                "peak_goodput": goodput.mean, "peak_goodput_ci": [goodput.low, goodput.high],
                "peak_goodput_by_seed": comparison.goodputs(name), "peak_devices": bests[0].peak_devices,
                "peak_setting": bests[0].peak_setting, "at_peak": _finite(bests[0].peak_figures),
            }  # fmt: skip
    return result


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: value if abs(value) < float("inf") else None for name, value in figures.items()}
