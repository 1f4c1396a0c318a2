"""Which figures the tables of results have: all of them bench/RESULTS.md, those with a name `in_readme` the README."""

from __future__ import annotations

from collections.abc import Callable

from bench.report import format_cell
from bench.result_table import Document, Group, Row, filled
from bench.systems import ABLATIONS, BASELINES, LABELS

_GOALS = {
    "centralized": ">= 2.1; >= 1.94", "sled": ">= 4.1; >= 3.7", "colocated": ">= 0.97; >= 0.97",
    "fixed-edf": ">= 0.97; >= 0.97",
}  # fmt: skip
# By draft, profile, and prompt tokens that a device reads in the time of a draft token (0: in no time).
_ASSUMPTIONS = {
    ("mixed48", "a100-qwen3-32b", 0.0): "as above: `mixed48` draft, smooth maximum of reading and computing",
    ("int4", "a100-qwen3-32b", 0.0): "plain 4-bit draft",
    ("int8", "a100-qwen3-32b", 0.0): "8-bit draft",
    ("mixed48", "a100-qwen3-32b-maximum", 0.0): "reading and computing overlapped perfectly",
    ("mixed48", "a100-qwen3-32b-additive", 0.0): "reading and computing added",
    ("mixed48", "h100-qwen3-32b", 0.0): "profile measured on an H100, with its draft step of 5.5 ms",
    ("mixed48", "a100-qwen3-32b", 10.0): "devices take time to read their prompts",
}


def _against(system: str) -> Callable[[Document], str]:
    """Capacity and peak goodput of WISP / those of `system`."""
    return lambda document: "; ".join(_ratio(document, figure, system) for figure in ("capacity", "goodput"))


def _ratio(document: Document, figure: str, system: str) -> str:
    """WISP / `system`; of the means where it holds nobody with some seed, so that ratios by seed have no bound."""
    key = f"{figure}_vs_{system.replace('-', '_')}"
    if document[key] is not None:
        return filled(f"{{{key}}}", document)
    kept = "capacity" if figure == "capacity" else "peak_goodput"
    ours, others = (document["systems"][name][kept] for name in ("wisp", system))
    return f"{format_cell(ours / others)} (of means)" if others else "no bound"


def _assumption_rows(document: Document) -> dict[tuple[str, str, float], Document]:
    return {(row["draft"], row["profile"], row.get("prefill_factor") or 0.0): row for row in document["sensitivity"]}


def _under(assumption: tuple[str, str, float]) -> Callable[[Document], str]:
    """Cells with WISP's own figures and its ratios under another assumption."""

    def cells(document: Document) -> str:
        rows = _assumption_rows(document)
        if not rows or (strange := rows.keys() - _ASSUMPTIONS.keys()):
            raise ValueError(f"no row is of the assumption {min(strange)}" if rows else "no assumptions")
        if assumption not in rows:  # documents of before the last one
            return " | ".join("----")
        row = rows[assumption]
        pairs = [(row["capacity"], f"{row['goodput']:.0f}")]
        pairs += [(row[f"capacity_vs_{name}"], row[f"goodput_vs_{name}"]) for name in ("centralized", "colocated")]
        texts = ["; ".join(map(format_cell, pair)) for pair in pairs]
        return " | ".join([*texts, format_cell(row["goodput_vs_sled"])])

    return cells


def _checked(document: Document) -> str:
    names = ("round_gain", "throughput_gain", "capacity_gain_free_drafts", "analytic_gain")
    return "; ".join(" / ".join(format_cell(row[name]) for name in names) for row in document["colocated_check"])


def _validated(num_devices: int) -> str:
    names = ("goodput", "commit_gap_ms", "commit_gap_p95_ms", "attainment")
    return "; ".join(f"{{{n}_simulated_{num_devices}}} / {{{n}_live_{num_devices}}}" for n in names)


GROUPS = (
    Group("Against other systems, each at the best of its settings: five seeds", "goodput",
          "goodput --systems slo-central centralized sled published colocated fixed-edf wisp-edge-only wisp-no-devices",
          tuple(
              Row(f"{LABELS[name]}: capacity; peak goodput", _against(name), _GOALS.get(name, ""),
                  "" if name == "slo-central" else f"capacity; peak goodput against {LABELS[name]} (simulated)")
              for name in BASELINES
          )),
    Group("The same with five other seeds", "other_seeds",
          "goodput --few --seed 20 --together 2 --systems centralized sled colocated",
          tuple(
              Row(f"{LABELS[name]}: capacity; peak goodput", _against(name), _GOALS[name])
              for name in ("centralized", "sled", "colocated")
          )),
    Group("What the parts of WISP bring, WISP against itself without one: three seeds", "ablations",
          "goodput --few --seeds 3 --together 2 --systems slo-central wisp-no-controller wisp-no-scheduler "
          "wisp-no-holding wisp-edge-only wisp-no-devices",
          tuple(Row(f"{LABELS[kind.name]}: capacity; peak goodput", _against(kind.name)) for kind in ABLATIONS)),
    Group("Other assumptions, one seed: capacity; peak goodput", "sensitivity",
          "goodput --few --seeds 1 --sensitivity --systems centralized sled",
          tuple(Row(label, _under(assumption)) for assumption, label in _ASSUMPTIONS.items()),
          ("WISP: devices; tokens per second", "against centralized serving", "against co-located speculation",
           "goodput against SLED")),
    Group("Co-located speculation if its drafts were free, against theory", "capacity",
          "capacity --few --seeds 1 --together 2 --systems centralized colocated", (
        Row("1; 2; 4 drafts: gain in rounds / tokens per busy second / capacity / what theory says", _checked),
    )),
    Group("One kind of session at a time: the matrix, 108 cells", "matrix",
          "matrix --full --few --runs medium --cells 108 --recheck 5 --state bench/results/matrix-parts.jsonl", (
        Row("against the best other system of each cell: worst capacity; peak goodput",
            "{matrix_min_capacity}; {matrix_min_goodput}", ">= 0.97; >= 0.97",
            "capacity; peak goodput against the best other system, worst of 108 kinds of sessions (simulated)"),
        Row("cells below 0.97, each run on five seeds",
            lambda d: f"{len(d['cells_lost_capacity'])}; {len(d['cells_lost_goodput'])} of {d['cells']}", "0; 0"),
        Row("the worst without co-located speculation among the others",
            "{matrix_min_capacity_without_colocated}; {matrix_min_goodput_without_colocated}"),
        Row("against WISP as published, geometric mean (of so many cells in which it has anything)",
            "{capacity_vs_published_gm} ({capacity_vs_published_gm_cells}); {goodput_vs_published_gm} "
            "({goodput_vs_published_gm_cells})", ">= 1.3; >= 1.3"),
        Row("the same, median", "{capacity_vs_published_gm_median}; {goodput_vs_published_gm_median}"),
        Row("the same with fast devices",
            "{capacity_vs_published_gm_fast_devices}; {goodput_vs_published_gm_fast_devices}"),
        Row("median over the cells against centralized / SLED",
            "{capacity_vs_centralized_median}; {goodput_vs_centralized_median} / {capacity_vs_sled_median}; "
            "{goodput_vs_sled_median}"),
        Row("share of the cells with 2.1; 1.94 times centralized / 4.1; 3.7 times SLED",
            "{capacity_vs_centralized_share}; {goodput_vs_centralized_share} / {capacity_vs_sled_share}; "
            "{goodput_vs_sled_share}"),
    )),
    Group("Speed of the simulator", "simulator", "simulator", (
        Row("a minute of 1,000 devices, some forty of them served at a time as KV memory is full",
            "{core_s_1000} s of one core", "<= 60 s"),
    )),
    Group("Simulated and live", "validate", "validate", (
        Row("simulated / live with 32 emulated devices: goodput; median, p95 ms between commits; attainment",
            _validated(32), "at most 10 % apart"),
        Row("the same with 128 devices", _validated(128), "at most 10 % apart"),
        Row("largest difference of these", "{max_error}", "<= 0.10",
            "simulation against a real tritonserver with 32 and 128 emulated devices: largest difference"),
    )),
    Group("Simulated and live at full speed", "full_speed", "validate --dilation 1", (
        Row("largest difference", "{max_error}", "<= 0.10"),
        Row("32 / 128 devices: commits per second; ms between two passes; ms on a commit's way out of the server",
            "{commits_per_s_32} / {commits_per_s_128}; {between_ms_32} / {between_ms_128}; {way_ms_32} / {way_ms_128}"),
    )),
    Group("The scheduler in virtual time", "scheduler", "scheduler", (
        Row("decision with 64 / 1,024 sessions", "{plan_us_64} / {plan_us_1024} us", "<= 200 / <= 3000 us"),
        Row("value per second of a pass against exhaustive search", "{density_vs_optimum}", ">= 0.95"),
        Row("devices at 95 % SLO attainment, against centralized serving", "{capacity_vs_continuous} times", ">= 2.0"),
        Row("same arrivals at 90 % of the centralized capacity: attainment", "{attainment_wisp}", ">= 0.95"),
        Row("goodput there against SLED / SLED with chunked prefill / EDF / continuous with the same drafts",
            "{goodput_vs_fcfs} / {goodput_vs_fcfs_chunked} / {goodput_vs_edf} / {goodput_vs_continuous}",
            ">= 1.25 / >= 1.25 / >= 1 / >= 1"),
        Row("interference of the tight class there, against SLED / SLED with chunked prefill (not published)",
            "{interference_ratio} / {interference_ratio_chunked}", "<= 0.5 / -"),
        Row("peak goodput against plain goodput density", "{goodput_vs_density}", ">= 0.95"),
        Row("holding: tokens per second of server time, slow devices", "{hold_gain} times", ">= 1.2"),
    )),
    Group("Two SLO classes on a live server, 8 sessions", "classes", "classes --quick", (
        Row("attainment of the tight class, `wisp` / `fcfs`", "{attainment_tight_wisp} / {attainment_tight_fcfs}",
            "met / missed"),
        Row("attainment of the loose class", "{attainment_loose_wisp} / {attainment_loose_fcfs}", "met / -"),
    )),
    Group("The estimator", "estimator", "estimator", (
        Row("error on held-out ragged passes, worse of fp32 and bf16",
            "{mape} % (noise of repeated equal passes {repeat_noise} %)", "<= 10 %, or noise + 5",
            "estimator: error on passes that it has not seen"),
        Row("passes slower than the quantile prediction", "{late_rate} %", "3 to 7 %"),
    )),
    Group("Shared prefixes", "prefix", "prefix", (
        Row("16 sessions with one system prompt of 300 tokens: KV / prefill time against one and the private parts",
            "{kv_ratio} / {prefill_ratio}", "<= 1.3"),
    )),
    Group("The controller over recorded traces", "controller", "controller", (
        Row("`sync`, `ratio` against the best fixed draft length of each of 12 settings: worst / geometric mean, 4-bit",
            "{speed_vs_best_fixed_min} / {speed_vs_best_fixed_gm}", ">= 1.03 / >= 1.08"),
        Row("the same, 8-bit draft",
            "{speed_vs_best_fixed_min_int8} / {speed_vs_best_fixed_gm_int8}", ">= 0.99 / >= 1.03"),
        Row("`ratio` against fixed length 8, 4-bit / 8-bit draft",
            "{speed_vs_fixed8} / {speed_vs_fixed8_int8}", ">= 1.15 / >= 1.2"),
        Row("`ratio` against an oracle that knows the first rejection, 4-bit / 8-bit",
            "{oracle_share} / {oracle_share_int8}", ">= 0.80 / -"),
        Row("acceptance rate against fixed 8, 4-bit draft", "{acceptance_gain_vs_fixed8} times", ">= 1.5"),
        Row("wasted drafting time cut against fixed 8: mean / where link and pass are short, 4-bit",
            "{wdt_cut_vs_fixed8} / {wdt_cut_low_delay}", ">= 0.4 / >= 0.6"),
        Row("`free` with rule `price` against `sync` with `ratio`: worst / geometric mean, 4-bit",
            "{free_vs_sync_min} / {free_vs_sync_gm}", ">= 1 / >= 1.3"),
        Row("`free` against plain decoding: worst of 12 settings, 4-bit", "{free_vs_decode_min}", ">= 0.99"),
        Row("draft tokens per committed one against the oracle's: at the speed of `sync` / where plain decoding is as "
            "fast", "{drafting_cost_parity} / {drafting_cost_idle}", "<= 4 / <= 1.6"),
        Row("acceptance model: AUC / of the best single statistic / calibration error, 4-bit",
            "{auc} / {auc_best_single} / {ece}", "first >= second; <= 0.05"),
        Row("a decision", "{decision_us} us", "<= 60 us"),
    )),
    Group("One device on a slow link, live", "link", "link --quick", (
        Row("40 ms round trip, one core each side, 8-bit draft: `free` against `sync`", "{free_speedup} times",
            ">= 1.3", "one device behind a round trip of 40 ms, live: `free` against `sync`"),
    )),
    Group("The batching strategy in a Triton of another model", "plugin", "plugin --rounds 1 --seconds 15", (
        Row("two priorities: late requests with it / without",
            "{violation_ratio} ({violations_wisp} / {violations_plain})", "<= 0.5",
            "batching strategy in a Triton of another model: late requests with it / without"),
        Row("throughput; one queue: late requests; equal sizes: throughput",
            "{throughput_ratio}; {violation_ratio_fifo}; {throughput_ratio_equal}", ">= 0.9; <= 1; >= 0.98"),
        Row("a decision", "{decision_us} us", "<= 2 us"),
    )),
    Group("The gateway", "gateway", "gateway --rounds 1 --first-bytes 80", (
        Row("32 streams against the same sessions without it; most / fewest tokens when the first one ends",
            "{throughput_ratio}; {fairness}", ">= 0.9; <= 1.5"),
        Row("what it adds to the first byte; 2,000 fuzzed requests: internal errors",
            "{first_byte_cost_ms} ms; {internal_errors}", "<= 3 ms; 0"),
    )),
    Group("Text in, text out: prompt lookup against none", "generate", "generate --prompts 2 --rounds 1", (
        Row("live: questions / code / copying with a change",
            "{lookup_questions} / {lookup_code} / {lookup_copy} times", "- / - / >= 1.3"),
        Row("replay of 51 greedy texts, a draft token costing 0.05 / 0.1 / 0.2 passes; slowest text",
            "{lookup_replay_greedy_0.05} / {lookup_replay_greedy_0.1} / {lookup_replay_greedy_0.2}; "
            "{lookup_replay_worst}", "-; >= 0.98"),
    )),
    Group("Exactness on a GPU: real tritonserver, recorded passes", "lossless_cuda",
          "lossless --device cuda --prompts 8 --tokens 48 --seeds 2 --sessions 8 --distribution-seeds 2000", (
        Row("sessions equal to the target alone / ties / mismatches; cells in which no draft came in time",
            lambda d: filled(f"{{sessions_equal}} of {{sessions}} / {len(d['ties'])} / {{mismatches}}; "
                             f"{{cells_without_verified_drafts}} of {len(d['cells'])}", d), "all / - / 0; 0"),
    )),
    Group("Forward pass on a GPU", "engine_cuda", "engine --device cuda", (
        Row("packed forward of the 135M target, recorded, against transformers' padded one",
            "{packed_ms} / {padded_ms} ms: {packed_speedup} times", ">= 1.3"),
    )),
    Group("A large model's pass on a GPU", "profile_cuda",
          "profile --shape qwen3-32b --device cuda --kv-tokens 24576 --seconds 70", (
        Row("pass of a model of Qwen3-32B's shape, one session; error of the fitted profile",
            lambda d: f"{d['unloaded_pass_ms']:.1f} ms; {100 * d['fit_error']:.1f} %"),
    )),
)  # fmt: skip
