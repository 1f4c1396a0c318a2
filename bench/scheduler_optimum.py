"""How near `Spare.fill` comes to the best pass there is, by its own objective.

density_vs_optimum     value per predicted second of the pass that `fill` chooses / the highest of all passes, mean
density_vs_optimum_p5  the same, 5th percentile over the instances

An instance is up to 8 sessions with buffers of 0 to 5 draft tokens. Costs range from memory-bound to arithmetic-bound.
All combinations of levels are tried (own token, then draft tokens in order; up to 7^8), but those without a session
that needs a token: both sides have to serve it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.gpu_cost import line
from bench.report import Progress, percentile, print_table
from wisp_plugin.config import EngineConfig
from wisp_plugin.estimator import EMPTY_PASS, Costs, Estimator, Floats
from wisp_plugin.roster import Candidates, Ints
from wisp_plugin.wisp_offers import Offers
from wisp_plugin.wisp_parameters import WispParameters
from wisp_plugin.wisp_policy import Wisp
from wisp_plugin.wisp_spare import Spare

TARGETS = {"density_vs_optimum": ">= 0.95"}
_MAX_SESSIONS, _MAX_BUFFERED = 8, 5
_NORMS = (2.0, 4.0, 16.0)
_OF_HOLDING = ("draft_gap_s", "acceptance", "way_s", "worth_tokens", "worth_gain", "is_new_chain", "is_sync")
_TPOT_S = (0.040, 0.054, 0.090)


@dataclass(frozen=True, slots=True)
class Instance:
    """Sessions, what a pass costs, and what `fill` made of them; `reached` and `best` in value per second."""

    num_sessions: int
    num_needed: int
    norm: float
    reached: float
    best: float

    @property
    def ratio(self) -> float:
        """Share of the best."""
        return self.reached / self.best


def run(num_instances: int, seed: int) -> dict[str, Any]:
    """Figures over random instances, with a table."""
    random = np.random.default_rng(seed)
    instances = []
    with Progress(num_instances, "exhaustive search") as progress:
        for _ in range(num_instances):
            instances.append(solve(random))
            progress.step()
    groups = {f"norm {norm:g}": [i for i in instances if i.norm == norm] for norm in _NORMS}
    groups |= {"nobody in need": [i for i in instances if not i.num_needed], "all": instances}
    rows = [(name, len(g), *_spread([i.ratio for i in g])) for name, g in groups.items() if g]
    print_table("Value per second against exhaustive search", ("instances", "number", "mean", "5 %", "worst"), rows)
    ratios = [i.ratio for i in instances]
    return {"density_vs_optimum": float(np.mean(ratios)), "density_vs_optimum_p5": percentile(ratios, 5)}


def _spread(ratios: list[float]) -> tuple[float, float, float]:
    return float(np.mean(ratios)), percentile(ratios, 5), min(ratios)


def solve(random: np.random.Generator) -> Instance:
    """A random instance."""
    estimator = Estimator(random_costs(random))
    config = EngineConfig(policy="wisp", max_pass_tokens=2048)
    offers = offers_of(random_candidates(random), config, estimator)
    taken, _ = Spare(config, estimator, WispParameters()).fill(offers)
    value, work = worth_of(offers, taken, estimator)
    reached, best = value / float(estimator.seconds(work)), best_density(offers, estimator)
    return Instance(len(taken), int(offers.is_due.sum()), estimator.costs.norm, reached, best)


def random_costs(random: np.random.Generator) -> Costs:
    """Memory-bound (a token costs 1 / 300 of a pass) to arithmetic-bound (1 / 10); some pay for sessions too."""
    floor_s, token_s = 0.036, 0.036 / np.exp(random.uniform(np.log(10), np.log(300)))
    session_s = token_s * random.uniform(0, 2) * (random.random() < 0.5)
    memory = line(passes=floor_s, context=1.3e-7 * random.uniform(0, 100))
    arithmetic = line(passes=0.004, sessions=session_s, new_tokens=token_s, new_x_context=token_s * 1e-4)
    return Costs(memory, arithmetic, float(random.choice(_NORMS)))


def random_candidates(random: np.random.Generator) -> Candidates:
    """Sessions that decode, 4 tokens behind to 10 ahead of their schedule at 0 s."""
    num = int(random.integers(1, _MAX_SESSIONS + 1))
    buffered = random.integers(0, _MAX_BUFFERED + 1, num)
    acceptance = random.uniform(0.5, 0.95, num)
    levels = np.arange(1, _MAX_BUFFERED + 1)
    survival = np.where(levels <= buffered[:, None], acceptance[:, None] ** levels, 0.0)
    tpot_s = random.choice(_TPOT_S, num)
    return Candidates(
        rows=np.arange(num),
        num_cached=random.integers(16, 2000, num).astype(np.float64),
        num_uncached=random.choice([1.0, 1.0, 1.0, 2.0, 6.0], num),
        num_buffered=buffered.astype(np.float64),
        needed_s=random.uniform(-4.0, 10.0, num) * tpot_s,
        tpot_s=tpot_s,
        next_draft_s=np.full(num, np.inf),
        ready_s=np.zeros(num),
        opened_s=np.zeros(num),
        tokens_per_turn=np.ones(num),
        num_turns=np.full(num, 50.0),
        num_left=np.full(num, 100.0),
        own_acceptance=np.full(num, 0.75),
        is_lost=(random.random(num) < 0.05).astype(np.float64),
        survival=survival,
        **dict.fromkeys(_OF_HOLDING, np.zeros(num)),  # type: ignore[arg-type]
    )


def offers_of(candidates: Candidates, config: EngineConfig, estimator: Estimator) -> Offers:
    """What the sessions offer at time 0, beside others that need the server."""
    running = Wisp(config, estimator).running(candidates, 0.0)
    return Spare(config, estimator, WispParameters()).offers(running, is_alone=False)


def worth_of(offers: Offers, taken: Ints, estimator: Estimator) -> tuple[float, Floats]:
    """Value and work `[2]` of the pass that takes `taken` levels of each session, int `[S]`."""
    is_taken = offers.levels < taken[:, None]
    return float(offers.value[is_taken].sum()), estimator.work(EMPTY_PASS) + offers.work[:, is_taken].sum(axis=1)


def best_density(offers: Offers, estimator: Estimator) -> float:
    """The highest value per second over all levels of all sessions, those in need with at least their own token.

    Sums over the first and over the second half of the sessions are listed apart and combined: 7^4 x 7^4 passes.
    """
    middle = len(offers.value) // 2
    value, work = _sums(offers, range(middle))
    other_value, other_work = _sums(offers, range(middle, len(offers.value)))
    values = value[:, None] + other_value
    seconds = estimator.seconds(work[:, None] + other_work + estimator.work(EMPTY_PASS))
    return float((values / seconds).max())


def _sums(offers: Offers, sessions: range) -> tuple[Floats, Floats]:
    """Value `[N]` and work `[N, 2]` of every combination of levels of `sessions`."""
    value, work = np.zeros(1), np.zeros((1, 2))
    for i in sessions:
        levels = np.arange(int(offers.is_due[i]), offers.num_levels[i] + 1)
        own_value = np.concatenate([[0.0], np.cumsum(offers.value[i])])[levels]
        own_work = np.concatenate([np.zeros((1, 2)), np.cumsum(offers.work[:, i], axis=1).T])[levels]
        value = (value[:, None] + own_value).reshape(-1)
        work = (work[:, None] + own_work).reshape(-1, 2)
    return value, work
