"""Profile of a model's shape on this device: the real forward of our verifier with random weights, measured and fitted.

What is timed is what the server does: packed attention over block-wise KV, lm_head, choice of tokens. Weights are
random, because time does not depend on their values. The passes and the fit are those of `wisp-server profile`; the
result is a profile file that the simulator, the planner and the emulated verifier take.

    wisp-bench profile --shape qwen3-32b --device cuda --output bench/profiles/h100-qwen3-32b.json

A file NAME-qwen3-0.6b.json beside NAME-*.json tells simulations what a step of a draft model takes on that device.

With `--layers` only so many layers are built and measured, and the profile says so. `--derive` measures nothing: it
writes the profiles that are derived from published figures (`bench/gpu_profile.py`) into bench/profiles.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.arguments import check_writable, positive_int, whole_number
from bench.gpu_cost import unloaded_pass_s
from bench.gpu_profile import DEFAULT, FOLDER, NORMS, derive
from bench.pass_model import DTYPES, SHAPES, Shape, free_bytes
from bench.report import finish, print_table
from triton_models.profile_command import summary, table
from triton_models.profile_origin import fingerprint
from triton_models.profiling import fit_profile, measure_sweep
from triton_models.target_model import TargetModel, prepare, resolve_device
from triton_models.torch_verifier import TorchVerifier
from wisp_plugin.config import EngineConfig
from wisp_plugin.errors import ConfigError
from wisp_plugin.estimator import FEATURES
from wisp_plugin.home import profile_dir
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.profile import Fingerprint, save_profile

_BLOCK_TOKENS, _CONTEXT = 32, 40960
_LEAST_KV_TOKENS = 2048  # fewer hold no passes to tell their prices apart
_HEADROOM = 1.1  # activations, workspaces, packed copies of one layer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `wisp-bench profile`."""
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="qwen3-32b", help="model shape [qwen3-32b]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--dtype", choices=list(DTYPES), help="of weights and KV [bf16 on CUDA, fp32 on a CPU]")
    add("--layers", type=positive_int, metavar="N", help="build and measure only so many layers")
    add("--kv-tokens", type=whole_number(_LEAST_KV_TOKENS), default=16_384, metavar="N",
        help="tokens whose KV is held [16384]")  # fmt: skip
    add("--seconds", type=float, default=120.0, metavar="S", help="time for measuring [120]")
    add("--seed", type=whole_number(0, 2**63 - 1), default=0, help="of the weights [0]")
    add("--output", type=Path, metavar="FILE", help="the profile [profiles/SHAPE-DEVICE.json in $WISP_HOME]")
    add("--derive", action="store_true", help="write the derived profiles instead")


def main(args: argparse.Namespace) -> int:
    """Measure and write a profile, or derive those of bench/profiles."""
    if args.derive:
        return _derive(args)
    if not 0 < args.seconds <= 86_400:  # also refuses NaN
        raise ConfigError(f"--seconds is {args.seconds}; allowed: above 0, up to a day")
    check_writable("--output" if args.output else "profiles in $WISP_HOME", args.output or profile_dir() / "new.json")
    device = resolve_device(args.device)
    dtype = DTYPES[args.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    target = random_target(args.shape, args.layers, device, dtype, args.kv_tokens, args.seed)
    verifier = TorchVerifier(target, BlockPool(args.kv_tokens // _BLOCK_TOKENS, _BLOCK_TOKENS))
    sweep = measure_sweep(verifier, EngineConfig(), args.seconds, lambda line: print(line, file=sys.stderr, flush=True))
    profile = fit_profile(sweep, fingerprint_of(target))
    path = args.output or profile_dir() / f"{args.shape}-{profile.fingerprint.device}.json".lower().replace(" ", "-")
    save_profile(profile, path)
    print(f"{table(sweep, profile)}\n\n{summary(profile)}\nwritten to {path.name}")
    finish("profile", _figures(profile), vars(args), args.seed)
    return 0


def _figures(profile: Any) -> dict[str, Any]:
    lines = {"memory": profile.costs.memory, "arithmetic": profile.costs.arithmetic}
    prices = {
        f"{line}_ms_per_{feature}": 1e3 * price
        for line, own in lines.items()
        for feature, price in zip(FEATURES, own, strict=True)
        if price
    }
    return {
        "unloaded_pass_ms": 1e3 * unloaded_pass_s(profile.costs),
        "norm": profile.costs.norm,
        "fit_error": profile.measured.fit_error,
        "repeat_noise": profile.measured.repeat_noise,
        "num_passes": profile.measured.num_passes,
        "model": profile.fingerprint.model,
        "device": profile.fingerprint.device,
        **prices,
    }


def random_target(
    name: str, num_layers: int | None, device: torch.device, dtype: torch.dtype, kv_tokens: int, seed: int
) -> TargetModel:
    """A model of the shape with random weights, ready for the verifier.

    Raises:
        ConfigError: more layers than the shape has, or model and KV memory do not fit on the device.
    """
    shape = SHAPES[name]
    layers = shape.num_layers if num_layers is None else num_layers
    if not 1 <= layers <= shape.num_layers:
        raise ConfigError(f"--layers is {layers}; allowed: 1 to {shape.num_layers}")
    _check_memory(shape, layers, device, dtype, kv_tokens)
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(_config(shape, layers))
    finally:
        torch.set_default_dtype(before)
    part = "" if layers == shape.num_layers else f", {layers} of {shape.num_layers} layers"
    source = f"{name}, random weights{part}"
    groups = shape.heads // shape.kv_heads
    target = TargetModel(
        model.eval(), source, shape.vocab, _CONTEXT, (), layers, shape.kv_heads, groups, shape.head_dim, dtype, device
    )
    prepare(target)
    return target


def _config(shape: Shape, num_layers: int) -> Qwen3Config:
    config = Qwen3Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=num_layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=_CONTEXT, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return config


def _check_memory(shape: Shape, layers: int, device: torch.device, dtype: torch.dtype, kv_tokens: int) -> None:
    weights = layers * shape.layer_params + 2 * shape.vocab * shape.hidden
    needed = _HEADROOM * dtype.itemsize * (weights + layers * kv_tokens * shape.kv_values_per_token)
    if needed > free_bytes(device):
        raise ConfigError(
            f"{layers} layers with KV for {kv_tokens} tokens need {needed / 2**30:.1f} GiB on {device}, "
            f"{free_bytes(device) / 2**30:.1f} are free; take --layers or fewer --kv-tokens"
        )


def fingerprint_of(target: TargetModel) -> Fingerprint:
    """What the profile is of: the configuration is the model."""
    config = target.model.config.to_json_string()
    model_hash = hashlib.sha256(config.encode()).hexdigest()[:16]
    return fingerprint(target.source, model_hash, str(target.dtype).removeprefix("torch."), str(target.device))


def _derive(args: argparse.Namespace) -> int:
    rows = []
    for suffix, norm in NORMS.items():
        profile = derive(suffix)
        save_profile(profile, FOLDER / f"{DEFAULT}{suffix}.json")
        rows.append((f"{DEFAULT}{suffix}", norm, 1e3 * unloaded_pass_s(profile.costs)))
    print_table("Derived profiles, nothing measured", ("profile", "norm", "unloaded pass, ms"), rows)
    finish("profile", {"derived": [row[0] for row in rows], "unloaded_pass_ms": [row[2] for row in rows]},
           vars(args), None)  # fmt: skip
    return 0
