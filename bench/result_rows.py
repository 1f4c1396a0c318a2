"""Lines of the README's table: which figure of which document, what was asked, and the command that makes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report import format_cell

Document = Mapping[str, Any]
_MIX_OPTIONS = " --systems slo-central centralized sled published colocated fixed-edf wisp-edge-only wisp-no-devices"
_ABLATIONS = ("wisp-no-controller", "wisp-no-scheduler", "wisp-no-holding", "wisp-edge-only", "wisp-no-devices")
_ABLATION_OPTIONS = f" --few --seeds 3 --together 2 --systems slo-central {' '.join(_ABLATIONS)}"
_MATRIX_OPTIONS = " --runs medium"
_OTHER_SEEDS = ("centralized", "sled", "colocated")
_OTHER_SEEDS_OPTIONS = f" --few --seed 20 --together 2 --systems {' '.join(_OTHER_SEEDS)}"
_CAPACITY_OPTIONS = " --few --seeds 1 --together 2 --systems centralized colocated"
_NAME = re.compile(r"{(\w+)}")
# Documents that are not called after their command.
_COMMANDS = {**dict.fromkeys(("sensitivity", "ablations", "other_seeds"), "goodput"), "full_speed": "validate"}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table, of figures in the document of `benchmark`."""

    figure: str
    benchmark: str  # NAME or NAME_cuda, for a run on a GPU
    show: str | Callable[[Document], str]  # text with figures by name in braces, or what makes it
    asked: str = ""
    options: str = ""  # of the command, as `make results` gives them

    def text(self, documents: Mapping[str, Document]) -> str:
        """The line in Markdown."""
        document = documents[self.benchmark]
        measured = self.show(document) if callable(self.show) else _filled(self.show, document)
        return f"| {self.figure} | {self.asked or '-'} | {measured} | `{self.command}` |"

    @property
    def command(self) -> str:
        """What makes the document."""
        return f"wisp-bench {self.command_name}{self.options}"

    @property
    def command_name(self) -> str:
        """That of `wisp-bench`."""
        name = self.benchmark.removesuffix("_cuda")
        return _COMMANDS.get(name, name)


def _filled(template: str, document: Document) -> str:
    """`template` with figures by name in braces, with intervals, and those marked that are not what was asked, or what
    the paper has."""
    missed = {line.partition(":")[0] for line in document.get("missed", ())}

    def text(name: str) -> str:
        is_missed = name in missed or document.get(f"{name}_reaches_published") is False
        low, high = document.get(f"{name}_ci") or (None, None)
        interval = None if low is None else f"{format_cell(low)} to {format_cell(high)}"
        notes = ", ".join(note for note in (interval, "missed" if is_missed else None) if note)
        if not isinstance(document[name], int | float | None):
            raise TypeError(f"{name} is {document[name]!r}, no number")
        return format_cell(document[name]) + (f" ({notes})" if notes else "")

    return _NAME.sub(lambda match: text(match.group(1)), template)


_OTHERS = ("centralized", "slo-central", "sled", "published", "colocated", "fixed-edf")  # of the headline


def _against(figure: str, names: Sequence[str] = _OTHERS) -> Callable[[Document], str]:
    """Ratios of WISP to other systems."""
    return lambda document: " / ".join(_ratio(document, figure, name) for name in names)


def _ratio(document: Document, figure: str, system: str) -> str:
    """WISP / `system`; of the means where it holds nobody with some seed, so that ratios by seed have no bound."""
    key = f"{figure}_vs_{system.replace('-', '_')}"
    if document[key] is not None:
        return _filled(f"{{{key}}}", document)
    kept = "capacity" if figure == "capacity" else "peak_goodput"
    ours, others = (document["systems"][name][kept] for name in ("wisp", system))
    return f"{format_cell(ours / others)} (of means)" if others else "no bound"


def _without_parts(figure: str) -> str:
    """What each part brings: WISP against itself without it."""
    return " / ".join(f"{{{figure}_vs_{name.replace('-', '_')}}}" for name in _ABLATIONS)


def _checked(document: Document) -> str:
    names = ("round_gain", "throughput_gain", "capacity_gain_free_drafts", "analytic_gain")
    return "; ".join(" / ".join(f"{row[name]:.3f}" for name in names) for row in document["colocated_check"])


def _on_h100(document: Document) -> str:
    row = next(row for row in document["sensitivity"] if row["profile"].startswith("h100"))
    names = ("centralized", "sled", "colocated")
    ratios = [f"{format_cell(row[f'capacity_vs_{n}'])} / {format_cell(row[f'goodput_vs_{n}'])}" for n in names]
    return "; ".join(ratios)


def _replayed(document: Document) -> str:
    gains = [format_cell(document[f"lookup_replay_greedy_{cost}"]) for cost in (0.05, 0.1, 0.2)]
    return f"{' / '.join(gains)}; {format_cell(document['lookup_replay_worst'])}"


def _validated(num_devices: int) -> str:
    names = ("goodput", "commit_gap_ms", "commit_gap_p95_ms", "attainment")
    return "; ".join(f"{{{n}_simulated_{num_devices}}} / {{{n}_live_{num_devices}}}" for n in names)


ROWS = (
    Row("estimator: error on held-out ragged passes, worse of fp32 and bf16", "estimator",
        "{mape} % (noise of repeated equal passes {repeat_noise} %)", "<= 10 %, or noise + 5"),
    Row("passes slower than the quantile prediction", "estimator", "{late_rate} %", "3 to 7 %"),
    Row("decision with 64 / 1,024 sessions", "scheduler", "{plan_us_64} / {plan_us_1024} us", "<= 200 / 3000 us"),
    Row("value per second of a pass against exhaustive search", "scheduler", "{density_vs_optimum}", ">= 0.95"),
    Row("devices at 95 % SLO attainment, against centralized serving", "scheduler",
        "{capacity_vs_continuous} times", ">= 2.0"),
    Row("same arrivals at 90 % of the centralized capacity: attainment", "scheduler", "{attainment_wisp}", ">= 0.95"),
    Row("goodput there against SLED / SLED with chunked prefill / EDF / continuous with the same drafts", "scheduler",
        "{goodput_vs_fcfs} / {goodput_vs_fcfs_chunked} / {goodput_vs_edf} / {goodput_vs_continuous}",
        ">= 1.25 / - / 1 / 1"),
    Row("interference of the tight class there, against SLED / SLED with chunked prefill (not published)",
        "scheduler", "{interference_ratio} / {interference_ratio_chunked}", "<= 0.5"),
    Row("peak goodput against plain goodput density", "scheduler", "{goodput_vs_density}", ">= 0.95"),
    Row("holding: tokens per second of server time, slow devices", "scheduler", "{hold_gain} times", ">= 1.2"),
    Row("live, 8 sessions of two classes: attainment of the tight one, `wisp` / `fcfs`", "classes",
        "{attainment_tight_wisp} / {attainment_tight_fcfs}", "met / missed", " --quick"),
    Row("the same run: attainment of the loose class", "classes",
        "{attainment_loose_wisp} / {attainment_loose_fcfs}", "", " --quick"),
    Row("16 sessions with one system prompt of 300 tokens: KV / prefill time against one and the private parts",
        "prefix", "{kv_ratio} / {prefill_ratio}", "<= 1.3"),
    Row("`sync`, `ratio` against the best fixed draft length of each of 12 settings: worst / geometric mean, 4-bit",
        "controller", "{speed_vs_best_fixed_min} / {speed_vs_best_fixed_gm}", ">= 1.03 / 1.08"),
    Row("the same, 8-bit draft", "controller",
        "{speed_vs_best_fixed_min_int8} / {speed_vs_best_fixed_gm_int8}", ">= 0.99 / 1.03"),
    Row("`ratio` against fixed length 8, 4-bit / 8-bit draft", "controller",
        "{speed_vs_fixed8} / {speed_vs_fixed8_int8}", ">= 1.15 / 1.2"),
    Row("`ratio` against an oracle that knows the first rejection, 4-bit / 8-bit", "controller",
        "{oracle_share} / {oracle_share_int8}", ">= 0.80 / -"),
    Row("acceptance rate against fixed 8, 4-bit draft", "controller", "{acceptance_gain_vs_fixed8} times",
        ">= 1.5"),
    Row("wasted drafting time cut against fixed 8: mean / where link and pass are short, 4-bit", "controller",
        "{wdt_cut_vs_fixed8} / {wdt_cut_low_delay}", ">= 0.4 / 0.6"),
    Row("`free` with rule `price` against `sync` with `ratio`: worst / geometric mean, 4-bit", "controller",
        "{free_vs_sync_min} / {free_vs_sync_gm}", ">= 1 / 1.3"),
    Row("`free` against plain decoding: worst of 12 settings, 4-bit", "controller", "{free_vs_decode_min}", ">= 0.99"),
    Row("draft tokens per committed one against the oracle's: at the speed of `sync` / where plain decoding is as fast",
        "controller", "{drafting_cost_parity} / {drafting_cost_idle}", "<= 4 / 1.6"),
    Row("acceptance model: AUC / of the best single statistic / calibration error, 4-bit", "controller",
        "{auc} / {auc_best_single} / {ece}", "- / - / <= 0.05"),
    Row("a decision of the controller", "controller", "{decision_us} us", "<= 60 us"),
    Row("live, 40 ms round trip, one core each side, 8-bit draft: `free` against `sync`", "link",
        "{free_speedup} times", ">= 1.3", " --quick"),
    Row("batching strategy, two priorities: late requests with it / without", "plugin",
        "{violation_ratio} ({violations_wisp} / {violations_plain})", "<= 0.5", " --rounds 1 --seconds 15"),
    Row("the same run: throughput; one queue: late requests; equal sizes: throughput", "plugin",
        "{throughput_ratio}; {violation_ratio_fifo}; {throughput_ratio_equal}", ">= 0.9; <= 1; >= 0.98",
        " --rounds 1 --seconds 15"),
    Row("a decision of the strategy", "plugin", "{decision_us} us", "<= 2 us", " --rounds 1 --seconds 15"),
    Row("simulated, a mix on a derived A100 profile: capacity / centralized, our scheduler without drafts, SLED, WISP "
        "as published, co-located, fixed length with EDF", "goodput", _against("capacity"),
        ">= 2.1 / - / 4.1 / - / 0.97 / 0.97", _MIX_OPTIONS),
    Row("the same: peak goodput", "goodput", _against("goodput"), ">= 1.94 / - / 3.7 / - / 0.97 / 0.97",
        _MIX_OPTIONS),
    Row("the same with sessions of other seeds (20 to 24): capacity / centralized, SLED, co-located", "other_seeds",
        _against("capacity", _OTHER_SEEDS), ">= 2.1 / 4.1 / 0.97", _OTHER_SEEDS_OPTIONS),
    Row("those seeds: peak goodput", "other_seeds", _against("goodput", _OTHER_SEEDS), ">= 1.94 / 3.7 / 0.97",
        _OTHER_SEEDS_OPTIONS),
    Row("the mix, three seeds: capacity of WISP / of WISP without its controller, scheduler, holding, draft model on "
        "the server, drafts of devices", "ablations", _without_parts("capacity"), "", _ABLATION_OPTIONS),
    Row("the same: peak goodput", "ablations", _without_parts("goodput"), "", _ABLATION_OPTIONS),
    Row("co-located speculation if its 1; 2; 4 drafts were free: gain in rounds / tokens per busy second / capacity / "
        "what theory says", "capacity", _checked, "", _CAPACITY_OPTIONS),
    Row("the same mix on the profile measured on an H100: capacity / goodput against centralized; SLED; "
        "co-located", "sensitivity",
        _on_h100, "", " --few --seeds 1 --sensitivity --systems centralized sled"),
    Row("the matrix, 12 cells: WISP / best other, worst capacity / goodput; the same without co-located "
        "speculation", "matrix",
        "{matrix_min_capacity} / {matrix_min_goodput}; {matrix_min_capacity_without_colocated} / "
            "{matrix_min_goodput_without_colocated}", ">= 0.97; -", _MATRIX_OPTIONS),
    Row("the same cells: capacity / goodput against WISP as published, geometric means (of so many cells in which it "
        "has anything); those with fast devices", "matrix",
        "{capacity_vs_published_gm} ({capacity_vs_published_gm_cells}) / {goodput_vs_published_gm} "
        "({goodput_vs_published_gm_cells}); {capacity_vs_published_gm_fast_devices} / "
        "{goodput_vs_published_gm_fast_devices}", ">= 1.3; -", _MATRIX_OPTIONS),
    Row("the same cells, each with one class: median of capacity / goodput against centralized; SLED", "matrix",
        "{capacity_vs_centralized_median} / {goodput_vs_centralized_median}; "
            "{capacity_vs_sled_median} / {goodput_vs_sled_median}", "", _MATRIX_OPTIONS),
    Row("share of those cells with 2.1 / 1.94 times centralized; 4.1 / 3.7 times SLED", "matrix",
        "{capacity_vs_centralized_share} / {goodput_vs_centralized_share}; "
            "{capacity_vs_sled_share} / {goodput_vs_sled_share}", "", _MATRIX_OPTIONS),
    Row("simulator: a minute of 1,000 devices, some forty of them served at a time as KV memory is full", "simulator",
        "{core_s_1000} s of one core", "<= 60 s"),
    Row("simulated / live (`make compiled`) with 32 emulated devices: goodput; median, p95 ms between commits; "
        "attainment", "validate", _validated(32), "10 % apart"),
    Row("the same with 128 devices", "validate", _validated(128), "10 % apart"),
    Row("the same two: largest difference", "validate", "{max_error}", "<= 0.10"),
    Row("the same at full speed, 32 / 128 devices: largest difference; commits per second, ms between two passes and "
        "on a commit's way out of the server", "full_speed",
        "{max_error}; {commits_per_s_32} / {commits_per_s_128}, {between_ms_32} / {between_ms_128}, "
        "{way_ms_32} / {way_ms_128}", "<= 0.10; -", " --dilation 1"),
    Row("gateway: 32 streams against the same sessions without it; most / fewest tokens when the first one ends",
        "gateway", "{throughput_ratio}; {fairness}", ">= 0.9; <= 1.5", " --rounds 1 --first-bytes 80"),
    Row("gateway: what it adds to the first byte; 2,000 fuzzed requests: internal errors", "gateway",
        "{first_byte_cost_ms} ms; {internal_errors}", "<= 3 ms; 0", " --rounds 1 --first-bytes 80"),
    Row("`wisp_generate`, prompt lookup against none, live: questions / code / copying with a change", "generate",
        "{lookup_questions} / {lookup_code} / {lookup_copy} times", "pays", " --prompts 2 --rounds 1"),
    Row("the same, replay of 51 greedy texts, a draft token costing 0.05 / 0.1 / 0.2 passes; slowest text", "generate",
        _replayed, "pays; >= 0.98", " --prompts 2 --rounds 1"),
    Row("H100, real tritonserver, recorded passes: sessions equal to the target alone / ties / mismatches; cells in "
        "which the target was too quick for any draft", "lossless_cuda",
        lambda d: f"{d['sessions_equal']} of {d['sessions']} / {len(d['ties'])} / {d['mismatches']}; "
        f"{d['cells_without_verified_drafts']} of {len(d['cells'])}", "all / - / 0; 0",
        " --device cuda --prompts 8 --tokens 48 --seeds 2 --sessions 8 --distribution-seeds 2000"),
    Row("H100: packed forward of the 135M target, recorded, against transformers' padded one", "engine_cuda",
        "{packed_ms} / {padded_ms} ms: {packed_speedup} times", ">= 1.3 on a CPU", " --device cuda"),
    Row("H100: pass of a model of Qwen3-32B's shape, one session; error of the fitted profile", "profile_cuda",
        lambda d: f"{d['unloaded_pass_ms']:.1f} ms; {100 * d['fit_error']:.1f} %", "",
        " --shape qwen3-32b --device cuda --kv-tokens 24576 --seconds 70"),
)  # fmt: skip
