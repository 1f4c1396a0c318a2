"""The sessions of `wisp-bench classes`: prompts, the texts that the target gives to them, and who opens when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from bench.emulated_device import Device
from bench.live import Drafting, make_open, run_session
from bench.prompts import mt_bench_questions
from bench.report import Progress
from edge_runtime.tokenizer import Tokenizer
from wisp_plugin.errors import ConfigError
from wisp_plugin.home import default_draft_dir
from wisp_plugin.messages import Mode, Sampling, Tokens

TIGHT, LOOSE = "tight", "loose"
# In unloaded passes: gaps between the opens of a class, and the first open of a loose session.
TIGHT_EVERY, LOOSE_EVERY, LOOSE_FROM = 10.0, 30.0, 5.0


@dataclass(frozen=True, slots=True)
class Text:
    """What the target gives behind a prompt, and the class of the sessions with that prompt."""

    slo_class: str
    prompt: Tokens
    generated: Tokens


@dataclass(frozen=True, slots=True)
class Drafts:
    """How loose devices draft."""

    tokens_per_s: float
    acceptance: float
    max_ahead: int
    seed: int


def make_prompts(num_tight: int, num_loose: int, loose_tokens: int) -> list[tuple[str, Tokens]]:
    """Class and prompt of every session: the shortest questions of MT-bench for the tight class, then for the loose
    one several questions in one, `loose_tokens` or a little more each.

    Raises:
        ConfigError: the questions are not enough.
    """
    tokenizer = Tokenizer.load(default_draft_dir("int8"))
    questions = sorted(mt_bench_questions(), key=len)

    def encode(text: str) -> Tokens:
        return tokenizer.encode_chat([{"role": "user", "content": text}])

    prompts = [(TIGHT, encode(question)) for question in questions[:num_tight]]
    rest = iter(questions[num_tight:])
    for _ in range(num_loose):
        text = ""
        while len(encode(text)) < loose_tokens:
            question = next(rest, None)
            if question is None:
                raise ConfigError(f"the questions are not enough for {num_loose} prompts of {loose_tokens} tokens")
            text += question + "\n\n"
        prompts.append((LOOSE, encode(text)))
    return prompts


def write_texts(server: str, prompts: Sequence[tuple[str, Tokens]], num_tokens: Mapping[str, int]) -> list[Text]:
    """The texts behind `prompts`, as long as `num_tokens` says for their class, from the server at HOST:PORT."""

    def write(prompt: tuple[str, Tokens]) -> Text:
        slo_class, tokens = prompt
        opened = make_open(tokens, num_tokens[slo_class], Mode.FREE, Sampling())
        return Text(slo_class, tokens, run_session(server, opened, Drafting()).tokens)

    texts = []
    with ThreadPoolExecutor(len(prompts)) as pool, Progress(len(prompts), "texts of the target") as progress:
        for text in pool.map(write, prompts):
            texts.append(text)
            progress.step()
    return texts


def make_devices(texts: Sequence[Text], drafts: Drafts, unloaded_pass_s: float, tight_tokens: int) -> list[Device]:
    """One device per text, in their order. Tight ones are thin clients with `tight_tokens`; the run ends with them."""
    devices = []
    num_opens = {TIGHT: 0, LOOSE: 0}
    for text in texts:
        at = num_opens[text.slo_class]
        num_opens[text.slo_class] += 1
        if text.slo_class == TIGHT:
            opens_s = at * TIGHT_EVERY * unloaded_pass_s
            devices.append(Device(TIGHT, text.prompt, text.generated[:tight_tokens], opens_s, sets_end=True))
        else:
            opens_s = (LOOSE_FROM + at * LOOSE_EVERY) * unloaded_pass_s
            drafting = (drafts.tokens_per_s, drafts.acceptance, drafts.max_ahead, drafts.seed + at)
            devices.append(Device(LOOSE, text.prompt, text.generated, opens_s, False, *drafting))
    return devices
