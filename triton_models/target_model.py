"""Loading of the target: any Hugging Face causal LM, checked and switched to packed attention.

What cannot be right is refused here and not found out in production: a damaged folder, missing weights, a
model whose attention is not plain causal attention. The last check is a trial: after all changes the packed
model must give the logits of the untouched one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from triton_models.compiled import compile_layers
from triton_models.cuda_recorder import CudaRecorder
from triton_models.kv_cache import KvCache
from triton_models.packed_attention import PACKED_ATTENTION, Attention, PackedPass, Span, build_pass, running
from triton_models.packed_linear import can_pack, pack_linears
from triton_models.pass_graphs import SIZES, PassGraphs, record_passes
from triton_models.torch_coupling import warm_up_choice
from wisp_plugin.config import VerifierConfig
from wisp_plugin.errors import ConfigError, ModelError
from wisp_plugin.home import default_target_dir
from wisp_plugin.kv_blocks import BlockPool

# Packed and plain forward differ by rounding only: root mean square of the difference over that of the logits. It is
# 2e-6 in float32 and 0.05 in bfloat16 (of which three quarters are the plain forward's: the packed one is nearer).
_TRIAL_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}
_TRIAL_ENDS = (4, 8, 9)  # of the passes: a prefill, several tokens and one token behind cached ones


@dataclass(frozen=True, slots=True)
class TargetModel:
    """A loaded target and what the verifier has to know about it."""

    model: PreTrainedModel
    source: str  # folder or Hugging Face id
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    num_layers: int
    num_kv_heads: int
    num_query_groups: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    graphs: PassGraphs = field(default_factory=PassGraphs)  # empty where passes are not recorded

    def compute(
        self, input_ids: torch.Tensor, positions: torch.Tensor, packed_pass: PackedPass, keep: torch.Tensor
    ) -> torch.Tensor:
        """One pass, replayed where one of as many rows is recorded: see `forward`."""
        if self.graphs.fits(input_ids.shape[1]):
            return self.graphs.run(input_ids, positions, packed_pass, keep)
        return forward(self.model, input_ids, positions, packed_pass, keep)

    def new_cache(self, pool: BlockPool) -> KvCache:
        """KV memory for all tokens of `pool`."""
        return KvCache(pool, self.num_layers, self.num_kv_heads, self.head_dim, self.dtype, self.device)


def load_target(config: VerifierConfig) -> TargetModel:
    """Load and check the target named by `config`.

    Raises:
        ModelError: the folder is missing or damaged, or the model is of a kind that would be computed wrongly.
        ConfigError: the device does not exist here.
    """
    device = resolve_device(config.device)
    source = resolve_source(config.target)
    model: Any = _load_model(source, _resolve_dtype(config.dtype, device))  # transformers wraps `to`
    target = _describe(model.to(device).eval(), source, device)
    prepare(target, config.compile)
    return target


def prepare(target: TargetModel, compile_choice: str = "auto") -> None:
    """Switch the model to packed attention and, on a CPU, packed weights, on a GPU compiled layers and recorded passes.

    Raises:
        ModelError: the logits change, or what `compile_choice` demands is not possible.
        ConfigError: passes are to be recorded on a CPU.
    """
    if compile_choice == "graphs" and target.device.type != "cuda":
        raise ConfigError(f"parameter 'compile' is 'graphs', but the device is {target.device}; allowed: cuda")
    model = target.model
    tokens = (torch.arange(_TRIAL_ENDS[-1]) * 7919 % target.vocab_size).to(target.device)
    with torch.inference_mode():
        expected = model(input_ids=tokens[None], use_cache=False).logits[0].float()
        model.set_attn_implementation(PACKED_ATTENTION)
        if target.device.type == "cpu" and can_pack(target.dtype) and compile_choice != "always":
            pack_linears(model)
        try:
            _check_logits(target, _trial(target, tokens), expected)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise ModelError(f"{target.source}: this kind of model is not supported: {first_line(error)}") from error
        compile_layers(model, compile_choice, lambda: _check_logits(target, _trial(target, tokens), expected))
        if compile_choice in ("auto", "graphs") and target.device.type == "cuda":
            record_passes(target.graphs, compile_choice, lambda: _record(target, tokens, expected))
    warm_up_choice(expected)  # not within: the compiler tells modes of autograd apart, and serving has none of its own


def _check_logits(target: TargetModel, packed: torch.Tensor, expected: torch.Tensor) -> None:
    difference = float((packed - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-6))
    if not difference <= _TRIAL_TOLERANCE[target.dtype]:
        raise ModelError(
            f"{target.source}: packed and plain forward differ by {difference:.2g} of the logits' size; "
            f"model type {target.model.config.model_type!r} is not plain causal attention"
        )


def _record(target: TargetModel, tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """Record passes of all sizes; then the trial and passes of each size, twice, as a replay must not need the last."""
    target.graphs.record(functools.partial(forward, target.model), target.device, CudaRecorder(target.device), SIZES)
    for _ in range(2):
        _check_logits(target, _trial(target, tokens), expected)
    for size in target.graphs.sizes:
        _check_recorded(target, size)


def _check_recorded(target: TargetModel, size: int) -> None:
    """A prefill of one row less than `size` against the same without graphs."""
    num_rows = size - 1
    pool = BlockPool(size, 1)
    pool.extend("trial", num_rows)
    rows = torch.arange(num_rows, device=target.device)
    span = Span("trial", 0, num_rows)
    packed = build_pass(target.new_cache(pool), [span], target.dtype, target.num_query_groups, True)
    arguments = ((rows * 7919 % target.vocab_size)[None], rows[None], packed, rows)
    expected = forward(target.model, *arguments).float()
    for _ in range(2):
        difference = target.graphs.run(*arguments).float() - expected
        worst = float((difference.square().mean(-1) / expected.square().mean(-1).clamp_min(1e-12)).max().sqrt())
        if not worst <= _TRIAL_TOLERANCE[target.dtype]:  # by row: padding gone wrong may hit a single one
            raise RuntimeError(f"a replay of {num_rows} rows differs by {worst:.2g} from the same pass")


def _trial(target: TargetModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of all `tokens` in three packed passes over a small KV memory, as float32 `[num_tokens, V]`."""
    pool = BlockPool(8, 2)
    cache = target.new_cache(pool)
    logits = []
    for start, end in zip((0, *_TRIAL_ENDS), _TRIAL_ENDS, strict=False):
        pool.extend("trial", end)
        gather = target.device.type != "cpu"
        packed = build_pass(cache, [Span("trial", start, end)], target.dtype, target.num_query_groups, gather)
        positions = torch.arange(start, end, device=target.device)
        logits.append(target.compute(tokens[None, start:end], positions[None], packed, positions - start).float())
    return torch.cat(logits)


def forward(
    model: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor, attention: Attention, keep: torch.Tensor
) -> torch.Tensor:
    """The one call of the model: `input_ids` and `positions` int64 `[1, T]`; logits `[R, V]` of the rows `keep`."""
    with running(attention):
        output = model(
            input_ids=input_ids, position_ids=positions, use_cache=False, packed_pass=attention, logits_to_keep=keep
        )
    return output.logits[0]


def resolve_device(name: str) -> torch.device:
    """Device of the configuration; ConfigError if it does not exist here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise ConfigError(f"parameter 'device' is {name!r}; allowed: auto, cpu, cuda, cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        num_devices = torch.cuda.device_count()
        raise ConfigError(f"parameter 'device' is {name!r}, but there are {num_devices} CUDA devices here")
    return torch.device(name)


def resolve_source(target: str) -> str:
    """Folder or Hugging Face id of the target; ModelError if a folder is named that does not hold a model."""
    folder = default_target_dir() if target == "default" else Path(target).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)
    if target == "default":
        raise ModelError(f"the default target is not at {folder}; `wisp-server models` prepares it")
    if folder.exists() or target.startswith((".", "/", "~")) or target.count("/") > 1:
        raise ModelError(f"{target} is not a model folder: it has no config.json")
    return target


def _resolve_dtype(name: str, device: torch.device) -> Any:
    """dtype for `from_pretrained`: "auto" is the checkpoint's own, except on a CPU."""
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else "auto"


def _load_model(source: str, dtype: Any) -> PreTrainedModel:
    """`from_pretrained` with its many ways to fail turned into one line, and missing weights made an error."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
        model, info = loaded
    except Exception as error:  # foreign code: OSError, SafetensorError, KeyError, ... and none of them ours
        raise ModelError(f"cannot load the target model {source}: {first_line(error)}") from error
    broken = sorted({*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])})
    if broken:
        raise ModelError(f"{source} is damaged: {len(broken)} weights missing or of the wrong shape, e.g. {broken[0]}")
    return model


def first_line(error: BaseException) -> str:
    """Message of a foreign error as one line of bearable length."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def _describe(model: PreTrainedModel, source: str, device: torch.device) -> TargetModel:
    """Shape of the model from its configuration; ModelError for attention that is not plain causal attention."""
    config = model.config.get_text_config()
    _refuse_special_attention(config, source)
    if model.dtype not in _TRIAL_TOLERANCE:
        raise ModelError(f"{source} is of dtype {model.dtype}; allowed: float32, bfloat16, float16")
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    return TargetModel(
        model=model,
        source=source,
        vocab_size=config.vocab_size,
        max_context_tokens=_max_context_tokens(config, source),
        eos_token_ids=_eos_token_ids(model.generation_config, config),
        num_layers=config.num_hidden_layers,
        num_kv_heads=num_kv_heads,
        num_query_groups=num_heads // num_kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        dtype=model.dtype,
        device=device,
    )


def _refuse_special_attention(config: PretrainedConfig, source: str) -> None:
    """What a short trial cannot show: windows, chunks, and layers that keep another state than keys and values."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None):
        kinds.add("sliding_window")
    if getattr(config, "attention_chunk_size", None):
        kinds.add("chunked attention")
    if kinds:
        raise ModelError(f"{source} uses {', '.join(sorted(kinds))}; allowed: full attention in all layers")


def _max_context_tokens(config: PretrainedConfig, source: str) -> int:
    """Context window. With `longrope` the factors change behind the original window, for all sessions of a pass at
    once; a session's tokens would depend on its neighbours, so the window ends there."""
    rope = getattr(config, "rope_parameters", None) or {}
    limit = getattr(config, "max_position_embeddings", None)
    if rope.get("rope_type") == "longrope":
        limit = rope.get("original_max_position_embeddings", limit)
    if not limit:
        raise ModelError(f"{source}: config.json does not say max_position_embeddings")
    return int(limit)


def _eos_token_ids(generation: GenerationConfig | None, config: PretrainedConfig) -> tuple[int, ...]:
    """End-of-sequence ids; the generation configuration goes before the model's."""
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        found = getattr(config, "eos_token_id", None)
    return tuple(found) if isinstance(found, list | tuple) else () if found is None else (int(found),)
