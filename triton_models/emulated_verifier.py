"""A target that is not there: passes take as long as a profile says, tokens come from a recorded or a made-up text.

For load tests and capacity planning: a real tritonserver with the real scheduler serves hundreds of devices as it
would with that GPU. `wisp_verifier` runs it with

    target = "emulated:PROFILE[,TRACE][,noise=SIGMA][,seed=N]"

PROFILE is a file of `wisp_plugin.profile`, TRACE one of `wisp-edge trace` (without: hashes), SIGMA the lognormal noise
on the time of a pass, mean 1, drawn anew for every N. Neither torch nor a model is loaded, so it starts at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triton_models.emulated_text import VOCAB_SIZE, EmulatedText, HashText, RingText
from wisp_plugin.config import VerifierConfig
from wisp_plugin.coupling import count_accepted
from wisp_plugin.draft_trace import DraftTrace
from wisp_plugin.errors import ConfigError, ModelError
from wisp_plugin.estimator import EMPTY_PASS, Estimator
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.kv_pass import reserve
from wisp_plugin.messages import PassItem, PassOutcome
from wisp_plugin.pass_features import member_features
from wisp_plugin.profile import Profile, load_profile

PREFIX = "emulated:"
FORM = f"{PREFIX}PROFILE.json[,TRACE.npz][,noise=SIGMA][,seed=N]"
MAX_NOISE, MAX_SEED = 1.0, 2**63 - 1
MAX_CONTEXT_TOKENS = 131_072
_NOISE = 2  # tells its random numbers from others of the same seed
_FIRST_CHOOSING_S = 0.02
_CHOOSING_MARGIN, _CHOOSING_MEMORY = 2.0, 0.9  # times what the newest pass took; of what was enough before


def is_emulated(target: str) -> bool:
    """Whether `VerifierConfig.target` names an emulated one."""
    return target.startswith(PREFIX)


@dataclass(frozen=True, slots=True)
class Emulation:
    """What `target` says behind `emulated:`."""

    profile: Path
    trace: Path | None = None
    noise_sigma: float = 0.0
    seed: int = 0  # of the noise

    @classmethod
    def parse(cls, target: str) -> Emulation:
        """Read FORM. Raises ConfigError in one line that says what is allowed."""
        profile, *rest = target.removeprefix(PREFIX).split(",")
        trace, sigma, seed = None, 0.0, 0
        for part in rest:
            name, is_option, value = part.partition("=")
            if name == "noise" and is_option:
                sigma = _sigma(value)
            elif name == "seed" and is_option:
                seed = _seed(value)
            elif part and trace is None and not is_option:
                trace = Path(part).expanduser()
            else:
                raise ConfigError(f"target {target!r} has {part!r}; the form is {FORM}")
        if not profile:
            raise ConfigError(f"target {target!r} names no profile; the form is {FORM}")
        return cls(Path(profile).expanduser(), trace, sigma, seed)

    @property
    def target(self) -> str:
        """The value of `target` that says the same."""
        trace = [str(self.trace)] if self.trace else []
        noise = [f"noise={self.noise_sigma:g}"] if self.noise_sigma else []
        seed = [f"seed={self.seed}"] if self.seed else []
        return PREFIX + ",".join([str(self.profile), *trace, *noise, *seed])


class EmulatedVerifier:
    """`Verifier` and its KV accounting, without KV. Belongs to the engine thread."""

    eos_token_ids: tuple[int, ...] = ()  # a text goes on for as long as it is asked to
    device_name = "emulated"

    def __init__(
        self,
        text: EmulatedText,
        profile: Profile,
        pool: BlockPool,
        noise_sigma: float = 0.0,
        noise_seed: int = 0,
        name: str = PREFIX,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`profile` holds the true costs of a pass; `name` is the target's; `clock` and `sleep` in seconds."""
        self.pool = pool
        self.vocab_size = VOCAB_SIZE
        self.max_context_tokens = min(MAX_CONTEXT_TOKENS, pool.num_tokens)
        self.profile = profile
        self.target_dir, self.dtype_name = name, profile.fingerprint.dtype
        self._text = text
        self._costs, self._noise_sigma = Estimator(profile.costs), noise_sigma
        self._random = np.random.default_rng((noise_seed, _NOISE))
        self._clock, self._sleep = clock, sleep
        self._choosing_s = _FIRST_CHOOSING_S  # before the end of a pass its tokens are chosen

    def run(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        """See `Verifier.run`. Returns when the pass would end, counted from the call: what is computed here is in it.

        Tokens are chosen just before the end: while a GPU computes, Python has time for the answers of the last pass.

        Raises:
            CapacityError: the KV memory cannot hold the pass, or holds less than an item counts on.
        """
        end_s = self._clock() + self.pass_s(items)
        reserve(self.pool, items)
        self._wait_until(end_s - self._choosing_s)
        started_s = self._clock()
        outcomes = [self._choose(item) for item in items]
        took_s = self._clock() - started_s
        self._choosing_s = max(_CHOOSING_MARGIN * took_s, _CHOOSING_MEMORY * self._choosing_s)
        self._wait_until(end_s)
        return outcomes

    def _wait_until(self, end_s: float) -> None:
        while (left_s := end_s - self._clock()) > 0.0:
            self._sleep(left_s)

    def release(self, session: str) -> None:
        """See `Verifier.release`."""
        self.pool.release(session)

    def pass_s(self, items: Sequence[PassItem]) -> float:
        """Seconds that this pass takes, noise included."""
        seconds = float(self._costs.predict(EMPTY_PASS + member_features(items).sum(axis=0)))
        sigma = self._noise_sigma
        return seconds * (math.exp(sigma * self._random.standard_normal() - sigma**2 / 2) if sigma else 1.0)

    def _choose(self, item: PassItem) -> PassOutcome:
        first = item.first_choice_position
        chosen = self._text.tokens(item.sampling.seed, first, first + item.num_choices)
        num_kept = len(item.tokens) - item.num_draft_tokens
        if item.num_draft_tokens:
            num_kept += count_accepted(item.tokens[first:], chosen)
            self.pool.truncate(item.session, num_kept)
        self.pool.remember(item.session, item.tokens[:num_kept])
        logprobs = np.zeros(len(chosen), np.float32) if item.logprobs and item.num_choices else None
        return PassOutcome(item.session, chosen, logprobs)


def load_emulated(config: VerifierConfig) -> EmulatedVerifier:
    """The verifier that `config.target` describes.

    Raises:
        ConfigError: another form, or a file that is missing or malformed.
    """
    emulation = Emulation.parse(config.target)
    profile = load_profile(emulation.profile)
    text: EmulatedText = HashText()
    if emulation.trace is not None:
        try:
            text = RingText.of(DraftTrace.load(emulation.trace).texts)
        except (ModelError, ValueError) as error:
            raise ConfigError(f"target {config.target!r}: {error}") from None
    pool = BlockPool(config.kv_tokens // config.kv_block_tokens, config.kv_block_tokens)
    return EmulatedVerifier(text, profile, pool, emulation.noise_sigma, emulation.seed, config.target)


def _sigma(text: str) -> float:
    try:
        sigma = float(text)
    except ValueError:
        sigma = math.nan
    if not 0.0 <= sigma <= MAX_NOISE:
        raise ConfigError(f"noise of an emulated target is {text!r}; allowed: 0 to {MAX_NOISE:g}")
    return sigma


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > len(str(MAX_SEED)) or int(text) > MAX_SEED:
        raise ConfigError(f"seed of an emulated target is {text!r}; allowed: 0 to {MAX_SEED}")
    return int(text)
