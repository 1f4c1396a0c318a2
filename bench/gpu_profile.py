"""Profiles of models on GPUs that are derived from published figures, and marked so: nothing in them was measured.

A pass reads all weights once and the KV of its sessions, and computes 2 FLOP per parameter and new token. Peak rates
are those of the data sheet (A100 80 GB SXM: 312 TFLOP/s dense bf16, 2.039 TB/s), times the efficiencies that are stated
below. Three forms of one derivation:

    a100-qwen3-32b            smooth maximum of the two, norm 4: reading and computing overlap well
    a100-qwen3-32b-maximum    norm 32, as good as the plain maximum: they overlap perfectly
    a100-qwen3-32b-additive   norm 1: they do not overlap at all

`wisp-bench profile --derive` writes the files of `bench/profiles`; a test holds that they are what this file derives.
KV memory is not part of a profile: `kv_tokens` tells how many tokens it holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bench.gpu_cost import line, unloaded_pass_s
from wisp_plugin.errors import ConfigError
from wisp_plugin.estimator import Costs
from wisp_plugin.profile import Fingerprint, Measurement, Profile, load_profile

FOLDER = Path(__file__).with_name("profiles")
DEFAULT = "a100-qwen3-32b"
NORMS = {"": 4.0, "-maximum": 32.0, "-additive": 1.0}  # by suffix of the file's name
_BYTES = 2  # of a bf16 number
_DERIVED_ON = "2026-11-25T00:00:00+00:00"
_NOISE = 0.03
_LEAST_PASS_S = 1e-4  # a simulation of shorter ones would have no end
_MOST_PRICE_S = 1e5  # also a thousand times slower (`--dilation`) it is one that a profile may have


@dataclass(frozen=True, slots=True)
class Gpu:
    """Published peaks of a GPU, and the share of them that is assumed to be reached."""

    name: str
    flop_per_s: float
    bytes_per_s: float
    memory_bytes: float
    matrix_efficiency: float = 0.70  # large matrix products in bf16
    attention_efficiency: float = 0.40
    memory_efficiency: float = 0.90
    usable_memory: float = 0.95  # for weights, KV and activations
    activation_bytes: float = 2 * 2.0**30
    pass_overhead_s: float = 0.004  # scheduling, launching, sampling; overlaps with reading


@dataclass(frozen=True, slots=True)
class Llm:
    """What the cost of a model's pass follows from (published configuration)."""

    name: str
    parameters: float
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def kv_bytes_per_token(self) -> int:
        """KV of one token: key and value in every layer."""
        return 2 * self.num_layers * self.kv_heads * self.head_dim * _BYTES

    @property
    def weight_bytes(self) -> float:
        """All weights."""
        return self.parameters * _BYTES


A100 = Gpu("NVIDIA A100 80GB SXM", 312e12, 2.039e12, 79.15 * 2.0**30)
QWEN3_32B = Llm("Qwen3-32B", 32.8e9, 64, 64, 8, 128)  # 256 KiB of KV per token
QWEN3_06B = Llm("Qwen3-0.6B", 0.6e9, 28, 16, 8, 128)  # the draft model that fits, with tied embeddings
_KERNELS_S = 60e-6  # of one small layer, however little it reads: ten kernels under CUDA graphs


def costs_of(llm: Llm, gpu: Gpu, norm: float = 4.0) -> Costs:
    """What a pass costs, see the top of this file."""
    bytes_per_s = gpu.bytes_per_s * gpu.memory_efficiency
    pair_flop = 4.0 * llm.num_layers * llm.heads * llm.head_dim  # query x key and weight x value
    return Costs(
        memory=line(passes=llm.weight_bytes / bytes_per_s, context=llm.kv_bytes_per_token / bytes_per_s),
        arithmetic=line(
            passes=gpu.pass_overhead_s,
            new_tokens=2.0 * llm.parameters / (gpu.flop_per_s * gpu.matrix_efficiency),
            new_x_context=pair_flop / (gpu.flop_per_s * gpu.attention_efficiency),
        ),
        norm=norm,
    )


def draft_step_costs(llm: Llm = QWEN3_06B, gpu: Gpu = A100, norm: float = 4.0) -> Costs:
    """What one step of a small model costs on the server: at least the time of its kernels, one layer after another."""
    costs = costs_of(llm, replace(gpu, pass_overhead_s=0.0), norm)
    floor_s = llm.num_layers * _KERNELS_S
    return Costs((max(costs.memory[0], floor_s), *costs.memory[1:]), costs.arithmetic, norm)


def draft_step_on(profile: str, norm: float) -> Costs:
    """The same on the device of a profile: as measured there (DEVICE-qwen3-0.6b.json beside it), else as derived above.

    Raises:
        ConfigError: the profile was measured, but no step of a draft model on that device.
    """
    measured = _measured_step(profile)
    if not knows_draft_step(profile):
        raise ConfigError(
            f"profile {profile!r} was measured, and what drafting costs on its server is not known; measure that too, "
            f"with --shape {QWEN3_06B.name.lower()}, and put {measured.name} beside it"
        )
    return load_profile(measured).costs if measured.is_file() else draft_step_costs(norm=norm)


def knows_draft_step(profile: str) -> bool:
    """True if `draft_step_on` knows the device of a profile: the derived A100, or one with a measured step."""
    return _measured_step(profile).is_file() or is_derived(find_profile(profile))


def _measured_step(profile: str) -> Path:
    path = _path_of(profile)
    return path.with_name(f"{path.stem.partition('-')[0]}-{QWEN3_06B.name.lower()}.json")


def kv_tokens(llm: Llm = QWEN3_32B, gpu: Gpu = A100, draft: Llm | None = None, draft_share: float = 1.0) -> int:
    """Tokens whose KV fits beside the weights; with `draft`, beside both, and the draft model has KV of `draft_share`
    as many."""
    models = [llm, *([draft] if draft else [])]
    free = gpu.usable_memory * gpu.memory_bytes - gpu.activation_bytes - sum(m.weight_bytes for m in models)
    if free <= 0:
        raise ConfigError(f"{llm.name} does not fit into the memory of {gpu.name}")
    return int(free / (llm.kv_bytes_per_token + (draft_share * draft.kv_bytes_per_token if draft else 0.0)))


def derive(suffix: str = "") -> Profile:
    """The profile of Qwen3-32B on an A100 in one of the forms of NORMS."""
    gpu, llm = A100, QWEN3_32B
    how = (
        f"derived, not measured: {llm.parameters:g} parameters in bf16; {gpu.flop_per_s / 1e12:g} TFLOP/s x "
        f"{gpu.matrix_efficiency:g} (attention {gpu.attention_efficiency:g}); {gpu.bytes_per_s / 1e12:g} TB/s x "
        f"{gpu.memory_efficiency:g}; {1e3 * gpu.pass_overhead_s:g} ms of overhead per pass"
    )
    return Profile(
        Fingerprint(llm.name, how, "bfloat16", f"{gpu.name} (derived)", 0, {}),
        costs_of(llm, gpu, NORMS[suffix]),
        margin=1.05,
        noise=_NOISE,
        measured=Measurement(0, 0, 0.0, 0.0, 0.0, _DERIVED_ON, "bench/gpu_profile.py"),
    )


def find_profile(name_or_path: str) -> Profile:
    """A profile of `bench/profiles` by name, or a file.

    Raises:
        ConfigError: there is no such profile, or it is malformed.
    """
    path = _path_of(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in FOLDER.glob("*.json")))
        raise ConfigError(f"profile {name_or_path!r} is no file and not among those shipped: {names}")
    profile = load_profile(path)
    pass_s, price_s = unloaded_pass_s(profile.costs), max(*profile.costs.memory, *profile.costs.arithmetic)
    if not pass_s >= _LEAST_PASS_S:
        raise ConfigError(f"profile {name_or_path!r} has passes of {pass_s:g} s; allowed: from {_LEAST_PASS_S:g} s")
    if price_s > _MOST_PRICE_S:
        raise ConfigError(f"profile {name_or_path!r} has a price of {price_s:g} s; allowed: up to {_MOST_PRICE_S:g} s")
    return profile


def _path_of(name_or_path: str) -> Path:
    """The file of a shipped profile, or the path as given. Raises ConfigError for what no file can be called."""
    shipped = FOLDER / f"{name_or_path}.json"
    try:
        return shipped if shipped.is_file() else Path(name_or_path).expanduser()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: of a user that is not there
        raise ConfigError(f"--profile: {error}; a name of bench/profiles or a file is needed") from None


def is_derived(profile: Profile) -> bool:
    """True if nothing in the profile was measured."""
    return profile.measured.num_passes == 0
