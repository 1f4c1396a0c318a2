"""The draft model beside a torch target: the target's own tokens, and what is refused at load."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.factories import make_open, session_id
from tests.fakes import FakeClock, FakeReply
from tests.test_lossless import naive
from tests.tiny_model import hf_folder, make_tokenizer
from triton_models import server_draft
from triton_models.emulated_verifier import EmulatedVerifier
from triton_models.engine_parts import build_engine, load_draft
from triton_models.server_draft import ServerDraft, load_server_draft
from triton_models.torch_verifier import load_verifier
from wisp_plugin.config import EngineConfig, VerifierConfig
from wisp_plugin.errors import ConfigError
from wisp_plugin.estimator import Costs, Estimator
from wisp_plugin.messages import Sampling, Tokens

SAMPLED = Sampling(seed=3, temperature=0.8, top_p=0.95)
COSTS = Costs(memory=(0.01, 0, 0, 0, 0, 0), arithmetic=(0, 0, 1e-4, 0, 0, 0))
STEP = Costs(memory=(1e-4, 0, 0, 0, 0, 0), arithmetic=(0, 0, 0, 0, 0, 0))


def config(**values: object) -> VerifierConfig:
    return VerifierConfig(target=str(hf_folder()), device="cpu", kv_tokens=2048, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED])
def test_a_real_draft_model_gives_the_targets_own_tokens_in_fewer_passes(sampling: Sampling) -> None:
    target, draft = load_verifier(config()), load_verifier(config(dtype="bfloat16"))
    beside = ServerDraft(draft, Estimator(STEP))
    engine = build_engine(target, EngineConfig(), Estimator(COSTS), lambda: None, server_draft=beside)
    engine._clock = engine._verifier._clock = FakeClock()  # type: ignore[attr-defined]  # a step takes what STEP says
    prompts: list[Tokens] = [np.array(prompt, np.int32) for prompt in ([5, 9, 200, 31], [7] * 9, [300, 2])]
    replies = [FakeReply() for _ in prompts]
    for number, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        opened = make_open(prompt, 16, session=session_id(number), sampling=sampling)
        engine.submit(opened, reply)
    for _ in range(100):
        if not engine.step():
            break
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.tokens == naive(prompt, sampling, 16)
    totals = engine.telemetry.totals
    assert totals.server_accepted_tokens > 16
    assert totals.commits < 0.7 * totals.committed_tokens
    assert not draft.pool.sessions()


class TestLoading:
    def test_without_a_name_there_is_none(self) -> None:
        assert load_draft(config(), EngineConfig(), load_verifier(config())) is None

    def test_settings_are_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server_draft, "ensure_profile", lambda *_: _Profile())
        wanted = config(server_draft=str(hf_folder()), server_draft_dtype="bfloat16", server_draft_kv_tokens=256)
        found = load_server_draft(wanted, EngineConfig(), load_verifier(config()))
        assert found.model.dtype_name == "bfloat16"
        assert found.model.pool.num_tokens == 256

    def test_another_vocabulary_is_refused(self, tmp_path: Path) -> None:
        other = tmp_path / "other"
        shutil.copytree(hf_folder(), other)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<more>"])
        tokenizer.save(str(other / "tokenizer.json"))
        with pytest.raises(ConfigError, match=r"^server_draft .* has the vocabulary .*, allowed: the target's "):
            load_server_draft(config(server_draft=str(other)), EngineConfig(), load_verifier(config()))

    def test_an_emulated_target_has_none(self) -> None:
        emulated = EmulatedVerifier.__new__(EmulatedVerifier)
        with pytest.raises(ConfigError, match="needs a real target"):
            load_server_draft(config(server_draft=str(hf_folder())), EngineConfig(), emulated)

    @pytest.mark.parametrize(
        ("name", "value"), [("server_draft_dtype", "int8"), ("server_draft_kv_tokens", 7), ("max_server_drafts", 0)]
    )
    def test_values_out_of_range(self, name: str, value: object) -> None:
        kind = EngineConfig if name == "max_server_drafts" else VerifierConfig
        with pytest.raises(ConfigError, match=name):
            kind(**{name: value})  # type: ignore[arg-type]


class _Profile:
    def estimator(self) -> Estimator:
        return Estimator(STEP)
