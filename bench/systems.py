"""The systems that are compared, and what may be tuned about each of them (issue: every baseline at its best).

    centralized    continuous batching, no edge (Orca, vLLM, with chunked prefill), decodes first or in turn
    sled           `sync`, drafting to a confidence threshold, FIFO static batches (arXiv 2506.09397)
    published      WISP as published: `sync`, drafting to the predicted rejection, SLO-aware batches (2601.11652)
    slo-central    policy `wisp` without drafts: what scheduling alone brings
    colocated      drafts made on the server at its cost; continuous batching, or earliest deadline first
    fixed-edf      `free`, a fixed draft length, earliest deadline first
    wisp           `free`, `price`, `wisp`: ours, one set of constants everywhere; only devices draft, or a draft model
                   beside the target as well, for who has nothing ready (`server_drafts`, which takes KV memory)
    wisp-edge-only ours without that draft model
    wisp-no-*      ours without drafts of devices, without its controller, its scheduler, its holding; with the same
                   choice of a draft model on the server
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.baseline_rules import RuleSpec
from bench.settings import LENGTHS, NO_DRAFTS, PRICE, WHOLE, Kind, Setting
from wisp_plugin.messages import Mode
from wisp_plugin.wisp_policy import WispParameters

SIX, THREE = RuleSpec("fixed", 6), RuleSpec("fixed", 3)
# Of the target's tokens, whose KV a draft model holds that does not draft for everybody: for most, or for a few.
DRAFT_KV_SHARES = (0.7, 0.35)


def _centralized(chunks: Sequence[int], decodes_first: Sequence[int]) -> Kind:
    usual = [Setting("centralized", "continuous", NO_DRAFTS, chunk) for chunk in chunks]
    first = [Setting("centralized", "continuous", NO_DRAFTS, chunk, decodes_first=True) for chunk in decodes_first]
    return Kind("centralized", [*first, *usual])


def _sled(
    lengths: Sequence[int], thresholds: Sequence[float], batches: Sequence[tuple[int, float]], chunks: Sequence[int]
) -> Kind:
    """`chunks`: of the last length and the first threshold and batch, with chunked prefill."""
    grid = itertools.product(lengths, thresholds, batches)
    rules = [(RuleSpec("confidence", length, threshold), batch) for length, threshold, batch in grid]
    whole = [Setting("sled", "fcfs", rule, WHOLE, Mode.SYNC, batch) for rule, batch in rules]
    longest = RuleSpec("confidence", lengths[-1], thresholds[0])
    return Kind("sled", [*whole, *(Setting("sled", "fcfs", longest, c, Mode.SYNC, batches[0]) for c in chunks)])


def _published(
    thresholds: Sequence[float], chunks: Sequence[int], edf_chunks: Sequence[int], lengths: Sequence[int]
) -> Kind:
    """`chunks` and `lengths`: of policy `wisp` with the first threshold; `edf_chunks`: of `edf` with every one."""
    rules = [RuleSpec("paper", LENGTHS[-1], threshold) for threshold in thresholds]
    ours = [Setting("published", "wisp", rule, WHOLE, Mode.SYNC) for rule in rules]
    ours += [replace(ours[0], chunk=chunk) for chunk in chunks]
    ours += [replace(ours[0], rule=replace(rules[0], length=length)) for length in lengths]
    edf = [Setting("published", "edf", rule, chunk, Mode.SYNC) for rule in rules for chunk in edf_chunks]
    return Kind("published", [*ours, *edf])


def _colocated(policies: Sequence[str], chunks: Sequence[int], rules: Sequence[RuleSpec]) -> Kind:
    grid = itertools.product(policies, chunks, rules)
    return Kind("colocated", [Setting("colocated", p, rule, chunk, on_server=True) for p, chunk, rule in grid])


def _fixed_edf(lengths: Sequence[int], chunks: Sequence[int]) -> Kind:
    settings = [Setting("fixed-edf", "edf", RuleSpec("fixed", n), chunks[0]) for n in lengths]
    return Kind("fixed-edf", [*settings, *(replace(settings[0], chunk=c) for c in chunks[1:])])


_EDGE_ONLY = Setting("wisp", "wisp", PRICE, WHOLE)
_OURS, _OURS_LITTLE_KV = [replace(_EDGE_ONLY, server_drafts=3, draft_kv_share=share) for share in DRAFT_KV_SHARES]
WISP = Kind(
    "wisp",
    [_EDGE_ONLY, _OURS, replace(_OURS, server_drafts=2), _OURS_LITTLE_KV, replace(_OURS, server_drafts=1)],
)
SLO_CENTRAL = Kind("slo-central", [Setting("slo-central", "wisp", NO_DRAFTS, WHOLE)])


def _without(name: str, *changes: dict[str, Any], settings: Sequence[Setting] = WISP.settings) -> Kind:
    """WISP with its own choice of a draft model on the server, and otherwise each of `changes`."""
    return Kind(name, [replace(setting, system=name, **change) for change in changes for setting in settings])


ABLATIONS = (
    _without("wisp-edge-only", {}, settings=[_EDGE_ONLY]),
    _without("wisp-no-devices", {"rule": NO_DRAFTS}, settings=WISP.settings[1:]),
    _without("wisp-no-controller", {"rule": SIX}, {"rule": THREE}),
    _without("wisp-no-scheduler", *({"policy": "edf", "chunk": chunk} for chunk in (96, 192))),
    _without("wisp-no-holding", {"parameters": WispParameters(holds=False)}),
)
# What the full sweeps begin with; `FEW` are those that were best in the default mix.
FULL: tuple[Kind, ...] = (
    _centralized((96, 64, 128, 192, 256, 384), (96, 80, 112, 128)),
    _sled((4, 1, 2, 6, 12, 8), (0.3, 0.6), ((16, 10.0), (64, 0.0), (8, 10.0)), (128, 192)),
    _published((0.7, 0.5, 0.3), (192,), (128, 192), (1, 2, 4)),
    SLO_CENTRAL,
    _colocated(
        ("edf", "continuous"),
        (192, 256, 384),
        [*(RuleSpec("fixed", n) for n in (1, 2, 3, 4)), RuleSpec("paper", 8, 0.6)],
    ),
    _fixed_edf((4, 2, 6, 8), (192, 96, 256, 384)),
)
FEW: tuple[Kind, ...] = (
    _centralized((192, 256), (96, 112)),
    _sled((4, 1, 8), (0.3,), ((16, 10.0),), (128,)),
    _published((0.7,), (192,), (128,), (1, 4)),
    SLO_CENTRAL,
    _colocated(("edf",), (192, 256), [RuleSpec("fixed", 1), RuleSpec("fixed", 2)]),
    _fixed_edf((4, 2), (192, 96, 256)),
)
BASELINES = tuple(kind.name for kind in FULL)
SYSTEMS = {kind.name: kind for kind in (*FULL, WISP, *ABLATIONS)}
# What people call them, in tables and plots.
LABELS = {
    "wisp": "WISP",
    "centralized": "centralized serving",
    "slo-central": "our scheduler, no drafts",
    "sled": "SLED",
    "published": "WISP as published",
    "colocated": "co-located speculation",
    "fixed-edf": "fixed draft length, EDF",
    "wisp-no-controller": "WISP without its controller",
    "wisp-no-scheduler": "WISP without its scheduler",
    "wisp-no-holding": "WISP without holding",
    "wisp-edge-only": "WISP, devices draft alone",
    "wisp-no-devices": "WISP, server drafts alone",
}
