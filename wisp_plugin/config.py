"""All configuration dataclasses. Every field has a unit in its name, a default and a stated range.

`from_mapping` builds any of them from strings or JSON values (Triton's model parameters, a command line)
and refuses names it does not know, so that a misspelt parameter is an error and never a default.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from wisp_plugin.errors import ConfigError
from wisp_plugin.messages import Slo

T = TypeVar("T")
# Environment variable with a JSON object of settings: how the launcher hands its command line to the Triton model.
SETTINGS_VARIABLE = "WISP_SERVER_CONFIG"
DEFAULT_SLO_CLASS = "default"  # name of the SLO of a session that asks for none
_RESERVED_SLO_CLASSES = (DEFAULT_SLO_CLASS, "custom")  # custom: how reports call an SLO that a client gave in numbers
_MAX_SLO_CLASSES = 16  # each is a label of every metric that is told per class
_SLO_CLASS_FORM = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


@dataclass(frozen=True, slots=True)
class VerifierConfig:
    """The target model and its memory."""

    # Hugging Face id or folder; "default": the embedded model; "emulated:PROFILE.json[,TRACE.npz][,noise=SIGMA]
    # [,seed=N]": none, passes take as long as the profile says and tokens come from the trace (triton_models/
    # emulated_verifier.py)
    target: str = "default"
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: str = "auto"  # auto (fp32 on CPU, the checkpoint's on CUDA) | float32 | bfloat16 | float16
    kv_tokens: int = 32_768  # tokens whose KV is held, over all sessions
    kv_block_tokens: int = 32  # tokens per KV block
    num_threads: int = 0  # of torch; 0: as many as there are cores
    # layers by torch.compile, and passes recorded as CUDA graphs: auto (on a GPU, what works there) | graphs (both, or
    # an error) | always (compiled layers or an error, nothing recorded) | never (neither)
    compile: str = "auto"
    # a small model of the same tokenizer that drafts for sessions whose device has nothing ready (an id or a folder as
    # `target`; empty: only devices draft), its dtype, and the tokens whose KV it holds; 0: as many as the target
    server_draft: str = ""
    server_draft_dtype: str = "auto"
    server_draft_kv_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("dtype", "server_draft_dtype"):
            _check_choice(name, getattr(self, name), ("auto", "float32", "bfloat16", "float16"))
        _check_choice("compile", self.compile, ("auto", "graphs", "always", "never"))
        _check_range("kv_block_tokens", self.kv_block_tokens, 1, 1024)
        _check_range("kv_tokens", self.kv_tokens, 2 * self.kv_block_tokens, 1 << 30)
        _check_range("num_threads", self.num_threads, 0, 1024)
        if self.server_draft_kv_tokens:
            _check_range("server_draft_kv_tokens", self.server_draft_kv_tokens, 2 * self.kv_block_tokens, 1 << 30)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of the serving loop. Every queue has a bound here."""

    policy: str = "wisp"  # scheduling policy, see scheduler.POLICIES
    max_sessions: int = 512  # open at once; one more is answered `overloaded`
    max_pass_tokens: int = 512  # new tokens of one pass; longer prefills are cut into chunks
    max_pass_sessions: int = 256  # sessions of one pass
    max_server_drafts: int = 3  # draft tokens per session and pass that a draft model on the server makes
    max_draft_ahead: int = 64  # draft tokens in front of a session's committed tokens
    max_unacked_tokens: int = 1024  # commits beyond the client's SEEN before a session is paused
    max_queued_messages: int = 16_384  # messages waiting for the engine thread
    linger_s: float = 60.0  # how long a finished or abandoned session can be resumed
    cancel_poll_s: float = 0.25  # how often open streams are asked whether their client left
    ttft_ms: float = 2_000.0  # default SLO: time to the first token
    tpot_ms: float = 200.0  # default SLO: time per further token
    slo_classes: str = ""  # SLOs that clients may name: "NAME=TTFT_MS/TPOT_MS, ...", see parse_slo_classes
    max_load: float = 1.0  # predicted load above which a new session is answered `overloaded`; 0: no limit
    static_batch_sessions: int = 16  # policy fcfs: a batch of this many sessions starts at once
    static_batch_wait_ms: float = 50.0  # policy fcfs: a smaller batch starts this long after its first session
    prefix_sharing: bool = True  # KV of equal beginnings (a common system prompt) is held once
    profile: str = "auto"  # file of an estimator profile; auto: made at the first start and reused
    trace_file: str = ""  # one JSON line per pass goes there; empty: no trace

    def __post_init__(self) -> None:
        for name in ("max_sessions", "max_pass_tokens", "max_pass_sessions", "max_queued_messages"):
            _check_range(name, getattr(self, name), 1, 1 << 24)
        # Our devices draft up to 64 tokens ahead (controller.MAX_AHEAD), whatever the server allows.
        _check_range("max_draft_ahead", self.max_draft_ahead, 64, 4096)
        _check_range("max_server_drafts", self.max_server_drafts, 1, 64)
        # A client that drafts nothing acknowledges every 64 tokens (edge_session.ACK_TOKENS): leave it twice that.
        _check_range("max_unacked_tokens", self.max_unacked_tokens, 128, 1 << 24)
        for name in ("linger_s", "ttft_ms", "tpot_ms"):
            _check_range(name, getattr(self, name), 0.001, 1e7)
        _check_range("cancel_poll_s", self.cancel_poll_s, 0.01, 0.5)
        parse_slo_classes(self.slo_classes)
        _check_range("max_load", self.max_load, 0.0, 100.0)
        _check_range("static_batch_sessions", self.static_batch_sessions, 1, 1 << 24)
        _check_range("static_batch_wait_ms", self.static_batch_wait_ms, 0.0, 60_000.0)


def parse_slo_classes(text: str) -> dict[str, Slo]:
    """The SLO classes of `EngineConfig.slo_classes` by name, in its order; empty text names none.

    Example: "interactive=500/60, relaxed=3000/250" (ttft and tpot in ms). Numbers are bounded as `ttft_ms` and
    `tpot_ms` are; names have the form of `check_slo_class`, and "default" and "custom" are taken.

    Raises:
        ConfigError: an entry of another form, a number out of range, a name twice or taken, too many classes.
    """
    classes: dict[str, Slo] = {}
    for entry in text.split(",") if text.strip() else ():
        slo = _parse_slo_class(entry.strip())
        if slo.name in classes:
            raise ConfigError(f"parameter 'slo_classes' has {slo.name!r} twice")
        classes[slo.name] = slo
    if len(classes) > _MAX_SLO_CLASSES:
        raise ConfigError(f"parameter 'slo_classes' has {len(classes)} classes; allowed: {_MAX_SLO_CLASSES}")
    return classes


def _parse_slo_class(entry: str) -> Slo:
    name, _, numbers = entry.partition("=")
    try:
        ttft_ms, tpot_ms = (float(number) for number in numbers.split("/"))
    except ValueError:
        raise ConfigError(f"parameter 'slo_classes' has {entry!r}; the form is NAME=TTFT_MS/TPOT_MS, ...") from None
    name = name.strip()
    check_slo_class(name)
    if name in _RESERVED_SLO_CLASSES:
        raise ConfigError(f"parameter 'slo_classes' names {name!r}, which is taken; choose another name")
    _check_range(f"slo_classes: ttft_ms of {name}", ttft_ms, 0.001, 1e7)
    _check_range(f"slo_classes: tpot_ms of {name}", tpot_ms, 0.001, 1e7)
    return Slo(ttft_ms, tpot_ms, name)


def check_slo_class(name: str) -> None:
    """Refuse what cannot be the name of an SLO class.

    Raises:
        ConfigError: not a lower-case letter and then up to 31 of a-z, 0-9, '_', '-'.
    """
    if not _SLO_CLASS_FORM.fullmatch(name):
        raise ConfigError(f"SLO class {name!r}; allowed: a lower-case letter, then up to 31 of a-z, 0-9, '_', '-'")


def from_mapping(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build the dataclass `kind` from `values`; strings are converted to the field's type.

    Raises:
        ConfigError: an unknown name, a value of the wrong type or out of range.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"unknown parameter {unknown[0]!r}; allowed: {', '.join(sorted(fields))}")
    types = typing.get_type_hints(kind)
    return kind(**{name: _convert(name, value, types[name]) for name, value in values.items()})


def _convert(name: str, value: Any, wanted: type) -> Any:
    """`value` as `wanted` (bool, int, float or str)."""
    try:
        if wanted is bool:
            text = str(value).lower()
            if text not in _TRUE | _FALSE:
                raise ValueError
            return text in _TRUE
        if wanted is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        return wanted(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"parameter {name!r} must be {wanted.__name__}, not {value!r}") from None


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise ConfigError(f"parameter {name!r} is {value}; allowed: {low} to {high}")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"parameter {name!r} is {value!r}; allowed: {', '.join(allowed)}")
