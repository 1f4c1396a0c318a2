"""Engine: what a pass of the torch verifier costs, without a scheduler, a server or a wire.

Measures, on the target model: a mixed pass of 8 sessions (20 to 400 cached tokens, 1 to 9 new ones) packed into
one row, against transformers' padded [B, K] forward of the same batch; the choice of tokens by coupling;
the cost of decoding and of verifying 2 to 16 tokens for one session; and where the time goes.

packed_speedup compares with transformers as it comes (sdpa, left-padded DynamicCache, eager nn.Linear);
ragged_speedup gives transformers our packed weights as well, so that it shows the gain of not padding alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from bench import report
from bench.prompts import mt_bench_questions
from triton_models.packed_linear import can_pack, pack_linears
from triton_models.torch_coupling import choose_tokens
from triton_models.torch_verifier import TorchVerifier, choice_contexts, load_verifier
from wisp_plugin.config import VerifierConfig
from wisp_plugin.messages import PassItem, Sampling

TARGETS = {"packed_speedup": ">= 1.3", "max_abs_logit_diff": "<= 1e-4", "choice_ms_per_row": "<= 0.3"}
_NUM_SESSIONS, _MIN_CONTEXT, _MAX_CONTEXT, _MAX_NEW = 8, 20, 400, 9
_PASS_TOKENS = (1, 2, 4, 8, 16)
_PASS_CONTEXT = 200
_SAMPLED = Sampling(seed=1, temperature=1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench engine`."""
    parser.add_argument("--target", default="default", help="Hugging Face id or folder (default: the embedded model)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N [%(default)s]")
    parser.add_argument("--rounds", type=int, default=15, help="repetitions of every measurement; medians are shown")
    parser.add_argument("--seed", type=int, default=0, help="of the contexts and lengths of the mixed pass")
    parser.add_argument("--quick", action="store_true", help="5 repetitions")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: one per core")


def main(args: argparse.Namespace) -> int:
    """Exit code 1 if the packed forward is not equal to the padded one; speed depends on the machine."""
    if args.quick:
        args.rounds = 5
    figures = run(args)
    missed = report.check_targets(figures, TARGETS)
    config = {"target": args.target, "device": args.device, "rounds": args.rounds}
    config |= {"threads": torch.get_num_threads(), "dtype": "float32"}
    report.finish("engine", {**figures, "missed": missed}, config, args.seed)
    return 1 if any("max_abs_logit_diff" in line for line in missed) else 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, print the tables, return the figures."""
    config = VerifierConfig(target=args.target, device=args.device, dtype="float32", num_threads=args.threads)
    verifier = load_verifier(config)
    items = mixed_batch(verifier, args.seed)
    for item in items:
        verifier.run([PassItem(item.session, item.tokens[: item.num_cached], 0, 0, _SAMPLED, is_prefill_chunk=True)])
    figures = measure_packing(verifier, items, args.rounds)
    figures |= measure_choice(verifier, items, args.rounds)
    figures |= measure_pass_sizes(verifier, items[0].session, args.rounds)
    figures |= measure_shares(verifier, items, figures["packed_ms"], figures["choice_ms_per_row"])
    return figures


def mixed_batch(verifier: TorchVerifier, seed: int) -> list[PassItem]:
    """8 sessions on pieces of MT-bench text; every new token but the first is a draft token."""
    tokenizer = AutoTokenizer.from_pretrained(verifier.target_dir)
    text = np.array(tokenizer("\n\n".join(mt_bench_questions())).input_ids, dtype=np.int32)
    rng = np.random.default_rng(seed)
    contexts = rng.permutation(np.linspace(_MIN_CONTEXT, _MAX_CONTEXT, _NUM_SESSIONS).astype(int))
    news = rng.permutation(np.linspace(1, _MAX_NEW, _NUM_SESSIONS).astype(int))
    items = []
    for i, (context, new) in enumerate(zip(contexts.tolist(), news.tolist(), strict=True)):
        start = int(rng.integers(0, len(text) - context - new))
        items.append(PassItem(f"bench{i}", text[start : start + context + new], context, new - 1, _SAMPLED))
    return items


@dataclass(frozen=True)
class PaddedBatch:
    """The batch as a user of transformers would hold it: KV left-padded to S, new tokens right-padded to K."""

    input_ids: torch.Tensor  # int64 [B, K]
    positions: torch.Tensor  # int64 [B, K]
    mask: torch.Tensor  # int64 [B, S + K]
    cache: DynamicCache

    def forward(self, model: PreTrainedModel) -> torch.Tensor:
        """Logits [B, K, V]. The cache is cut back afterwards by `reset`."""
        return model(
            input_ids=self.input_ids,
            position_ids=self.positions,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        ).logits

    def reset(self) -> None:
        """Drop what a forward has appended."""
        self.cache.crop(-self.input_ids.shape[1])


def padded_batch(model: PreTrainedModel, items: Sequence[PassItem]) -> PaddedBatch:
    """Prefill every session alone with transformers and pad the results together."""
    num_cached = max(item.num_cached for item in items)
    num_new = max(item.num_new_tokens for item in items)
    ids = torch.zeros((len(items), num_new), dtype=torch.int64)
    mask = torch.zeros((len(items), num_cached + num_new), dtype=torch.int64)
    caches = []
    for b, item in enumerate(items):
        tokens = torch.from_numpy(item.tokens.astype(np.int64))
        prefix = tokens[None, : item.num_cached].to(model.device)
        caches.append(model(input_ids=prefix, use_cache=True).past_key_values)
        ids[b, : item.num_new_tokens] = tokens[item.num_cached :]
        mask[b, num_cached - item.num_cached : num_cached + item.num_new_tokens] = 1
    positions = torch.tensor([item.num_cached for item in items])[:, None] + torch.arange(num_new)
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        keys = torch.cat([_left_pad(own.layers[layer].keys, num_cached) for own in caches])
        values = torch.cat([_left_pad(own.layers[layer].values, num_cached) for own in caches])
        cache.update(keys, values, layer)
    ids, positions, mask = (part.to(model.device) for part in (ids, positions, mask))
    return PaddedBatch(ids, positions, mask, cache)


def _left_pad(part: torch.Tensor, length: int) -> torch.Tensor:
    """`[1, H, S, D]` -> `[1, H, length, D]`."""
    return torch.nn.functional.pad(part, (0, 0, length - part.shape[2], 0))


@torch.inference_mode()
def measure_packing(verifier: TorchVerifier, items: Sequence[PassItem], rounds: int) -> dict[str, Any]:
    """Packed against padded, alternately; and how far their logits are apart."""
    plain, tuned = (_plain_model(verifier) for _ in range(2))
    if verifier.device_name == "cpu" and can_pack(torch.float32):
        pack_linears(tuned)
    batch = padded_batch(plain, items)
    expected = batch.forward(plain)
    batch.reset()
    rows = torch.cat([expected[b, : item.num_new_tokens] for b, item in enumerate(items)])
    difference = float((verifier.compute_logits(items) - rows).abs().max())

    def timed_padded(model: PreTrainedModel) -> float:
        elapsed_ms = _time_ms(lambda: batch.forward(model))
        batch.reset()
        return elapsed_ms

    times = _medians(
        {
            "packed": lambda: _time_ms(lambda: verifier.compute_logits(items)),
            "padded": lambda: timed_padded(plain),
            "padded_our_weights": lambda: timed_padded(tuned),
        },
        rounds,
    )
    num_padded = len(items) * batch.input_ids.shape[1]
    num_new = sum(item.num_new_tokens for item in items)
    rows_shown = [
        ("packed (ours)", num_new, times["packed"], 1.0),
        ("padded, transformers", num_padded, times["padded"], times["padded"] / times["packed"]),
        ("padded, our weights", num_padded, times["padded_our_weights"], times["padded_our_weights"] / times["packed"]),
    ]
    report.print_table("Mixed pass of 8 sessions", ("forward", "tokens", "ms", "ours is faster by"), rows_shown)
    return {
        "packed_ms": times["packed"],
        "padded_ms": times["padded"],
        "padded_our_weights_ms": times["padded_our_weights"],
        "packed_speedup": times["padded"] / times["packed"],
        "ragged_speedup": times["padded_our_weights"] / times["packed"],
        "max_abs_logit_diff": difference,
    }


def measure_choice(verifier: TorchVerifier, items: Sequence[PassItem], rounds: int) -> dict[str, Any]:
    """Choosing tokens at temperature 1 without filters, on the logits of the mixed pass."""
    logits = verifier.compute_logits(items)
    rows = [row for item in items for row in choice_contexts(item)]
    choice_ms = _medians({"choice": lambda: _time_ms(lambda: choose_tokens(logits, rows))}, rounds)["choice"]
    return {"choice_ms_per_row": choice_ms / len(rows)}


def measure_pass_sizes(verifier: TorchVerifier, session: str, rounds: int) -> dict[str, Any]:
    """Forward and choice for one session: decoding (1 token) and verifying drafts."""
    drawn = np.random.default_rng(0).integers(0, verifier.vocab_size, _PASS_CONTEXT + max(_PASS_TOKENS))
    tokens = drawn.astype(np.int32)
    verifier.release(session)
    verifier.run([PassItem(session, tokens[:_PASS_CONTEXT], 0, 0, _SAMPLED, is_prefill_chunk=True)])

    def timed_pass(num_new: int) -> Callable[[], float]:
        item = PassItem(session, tokens[: _PASS_CONTEXT + num_new], _PASS_CONTEXT, num_new - 1, _SAMPLED)
        return lambda: _time_ms(lambda: verifier.run([item]))

    times = _medians({str(num_new): timed_pass(num_new) for num_new in _PASS_TOKENS}, rounds)
    report.print_table(
        f"One session, {_PASS_CONTEXT} cached tokens: forward and choice",
        ("new tokens", "ms", "times one token"),
        [(int(name), value, value / times["1"]) for name, value in times.items()],
    )
    verifier.release(session)
    return {"pass_ms_by_new_tokens": times}


def measure_shares(
    verifier: TorchVerifier, items: Sequence[PassItem], packed_ms: float, choice_ms_per_row: float
) -> dict[str, Any]:
    """Shares of the mixed pass by the profiler; `other` is norms, rotary embedding, activation, indices and Python."""
    fresh = PassItem(items[0].session, items[0].tokens[: items[0].num_cached], 0, 0, _SAMPLED, is_prefill_chunk=True)
    verifier.run([fresh])  # its KV was given up for the pass sizes
    on_cpu = verifier.device_name == "cpu"
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU] if on_cpu else [kinds.CPU, kinds.CUDA]) as profile:
        profiled_ms = _time_ms(lambda: verifier.compute_logits(items))
    own_us = "cpu_time_total" if on_cpu else "device_time_total"
    events = {event.key: getattr(event, own_us) / 1000 for event in profile.key_averages()}
    attention = events.get("aten::scaled_dot_product_attention", 0.0) / profiled_ms
    linear = sum(events.get(name, 0.0) for name in ("mkldnn::_linear_pointwise", "aten::linear")) / profiled_ms
    choice_ms = choice_ms_per_row * sum(item.num_choices for item in items)
    forward = packed_ms / (packed_ms + choice_ms)
    shares = {"linear": linear * forward, "attention": attention * forward, "choice": 1 - forward}
    shares["other"] = 1 - sum(shares.values())
    report.print_table("Shares of the mixed pass", ("part", "share"), list(shares.items()))
    return {"shares": shares}


def _plain_model(verifier: TorchVerifier) -> PreTrainedModel:
    """The target as transformers gives it."""
    return AutoModelForCausalLM.from_pretrained(
        verifier.target_dir, dtype=torch.float32, attn_implementation="sdpa"
    ).to(verifier.device_name).eval()


def _medians(fns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of each function's own time in ms, called alternately, after two unmeasured rounds."""
    report.alternate(fns, 2)
    return {name: report.median(values) for name, values in report.alternate(fns, rounds).items()}


def _time_ms(fn: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    fn()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # a forward returns before it is done
    return (time.perf_counter() - start_s) * 1000
