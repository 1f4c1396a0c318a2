"""A Qwen3 of given shape with random weights, and its forward over sessions with cached tokens.

Transformers' own model with one registered attention function: new keys and values are written behind the cached
ones in place (DynamicCache would copy the whole cache in every pass), then torch's fused attention runs over all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

from bench.pass_fit import PassFeatures
from wisp_plugin.errors import ConfigError

ATTENTION = "wisp_pass_cost"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_RESERVE_BYTES = 2 << 30  # workspaces of the libraries, fragmentation


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a Qwen3 that its speed depends on."""

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @property
    def layer_params(self) -> int:
        """Parameters of the matrices of one layer."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token keeps in the KV of one layer."""
        return 2 * self.kv_heads * self.head_dim


SHAPES = {  # as published in the models' config.json
    "qwen3-32b": Shape(64, 5120, 64, 8, 128, 25600, 151936),
    "qwen3-0.6b": Shape(28, 1024, 16, 8, 128, 3072, 151936),
    "qwen3-8b": Shape(36, 4096, 32, 8, 128, 12288, 151936),
    "tiny": Shape(4, 64, 4, 2, 16, 128, 512),
}


@dataclass(slots=True)
class _Kv:
    """KV of one pass, by layer: `key` and `value` are [sessions, cached + new, kv_heads, head_dim]."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    num_cached: int
    mask: torch.Tensor  # lower-right causal


class PassModel:
    """The model and one KV buffer per layer, large enough for the largest pass."""

    def __init__(self, model: Qwen3ForCausalLM, shape: Shape, kv_tokens: int) -> None:
        self.shape, self.causal_lm = shape, model
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        self.num_layers = len(model.model.layers)
        size = (2, kv_tokens * shape.kv_values_per_token // 2)
        # Random, not zero: power and with it the clocks of a GPU depend on the data.
        self._kv = [torch.randn(size, device=self.device, dtype=self.dtype) for _ in range(self.num_layers)]

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prepare(self, cell: PassFeatures, tokens: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
        """A function that runs the pass and returns its logits, [sessions, tokens_per_session, vocab].

        `tokens` int64 [sessions, tokens_per_session]; random without. Everything but the forward happens here.
        """
        kv = self._kv_of(cell)
        if tokens is None:
            tokens = self._random_tokens(cell.num_sessions, cell.tokens_per_session)
        positions = torch.arange(cell.cached_tokens, cell.cached_tokens + cell.tokens_per_session, device=self.device)
        positions = positions[None].expand(cell.num_sessions, -1)
        no_mask = {"full_attention": None}  # the attention function brings its own

        @torch.inference_mode()
        def run() -> torch.Tensor:
            hidden = self.causal_lm.model(
                input_ids=tokens, attention_mask=no_mask, position_ids=positions, use_cache=False, pass_kv=kv
            ).last_hidden_state
            return self.causal_lm.lm_head(hidden)

        return run

    def prepare_head(self, num_tokens: int) -> Callable[[], torch.Tensor]:
        """A function that runs what is not layers: embedding, last norm, lm_head for `num_tokens`."""
        tokens = self._random_tokens(1, num_tokens)

        @torch.inference_mode()
        def run() -> torch.Tensor:
            return self.causal_lm.lm_head(self.causal_lm.model.norm(self.causal_lm.model.embed_tokens(tokens)))

        return run

    def _random_tokens(self, *size: int) -> torch.Tensor:
        return torch.randint(self.shape.vocab, size, device=self.device)

    def _kv_of(self, cell: PassFeatures) -> _Kv:
        end = cell.cached_tokens + cell.tokens_per_session
        view = (2, cell.num_sessions, end, self.shape.kv_heads, self.shape.head_dim)
        used = cell.num_sessions * end * self.shape.kv_heads * self.shape.head_dim
        halves = [buffer[:, :used].view(view) for buffer in self._kv]
        layers = [(half[0], half[1]) for half in halves]
        return _Kv(layers, cell.cached_tokens, _lower_right_mask(cell.tokens_per_session, end, self.device))


def _lower_right_mask(num_new: int, end: int, device: torch.device) -> torch.Tensor:
    """Causal mask of the last `num_new` of `end` tokens; on CUDA of the type by which torch takes its flash kernel."""
    if device.type == "cuda":
        return causal_lower_right(num_new, end)
    return torch.ones(num_new, end, dtype=torch.bool, device=device).tril(end - num_new)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    pass_kv: _Kv,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over cached and new tokens; `query` [B, heads, K, head_dim], result [B, K, heads, head_dim]."""
    keys, values = pass_kv.layers[int(module.layer_idx)]
    keys[:, pass_kv.num_cached :] = key.transpose(1, 2)
    values[:, pass_kv.num_cached :] = value.transpose(1, 2)
    out = nn.functional.scaled_dot_product_attention(
        query, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=pass_kv.mask, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def build(shape: Shape, num_layers: int, device: torch.device, dtype: torch.dtype, kv_tokens: int) -> PassModel:
    """`num_layers` layers of `shape`, made on `device` in `dtype` one by one; weights by torch's global seed."""
    AttentionInterface.register(ATTENTION, _attention)
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=False,
    )
    config._attn_implementation = ATTENTION
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return PassModel(model.eval(), shape, kv_tokens)


def resolve_device(name: str) -> torch.device:
    """The device called `name`; ConfigError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"device {name!r} is unknown; allowed: auto, cpu, cuda, cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not there; this torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What the device is called: the GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def layers_that_fit(
    shape: Shape, device: torch.device, dtype: torch.dtype, kv_tokens: int, max_new_tokens: int, asked: int | None
) -> int:
    """Layers to build: `asked`, or as many as the device's free memory holds with KV for `kv_tokens`.

    Raises:
        ConfigError: `asked` is more than the shape has or than fit, or not even one fits.
    """
    bytes_each = dtype.itemsize
    fixed = 2 * shape.vocab * shape.hidden * bytes_each + _RESERVE_BYTES
    fixed += max_new_tokens * (shape.vocab + 4 * shape.intermediate) * 2 * bytes_each  # logits and activations
    per_layer = (shape.layer_params + kv_tokens * shape.kv_values_per_token) * bytes_each
    free = free_bytes(device)
    fit = min(shape.num_layers, int((free - fixed) // per_layer))
    wanted = fit if asked is None else asked
    if wanted > shape.num_layers:
        raise ConfigError(f"{wanted} layers asked for; the shape has {shape.num_layers}")
    if wanted > fit or fit < 1:
        raise ConfigError(
            f"{max(1, wanted)} layers need {(fixed + max(1, wanted) * per_layer) / 2**30:.1f} GiB on {device}, "
            f"{free / 2**30:.1f} are free; at most {max(0, fit)} layers fit"
        )
    return wanted


def free_bytes(device: torch.device) -> int:
    """Free memory of `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text(encoding="utf-8").splitlines() if meminfo.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("cannot tell the free memory of this machine: /proc/meminfo has no line MemAvailable")
