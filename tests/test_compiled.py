"""Layers compiled by torch.compile: the same logits, and what happens where compilation is not possible."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.test_torch_verifier import CONFIGS, SAMPLED, plain_logits, plain_model, random_tokens
from triton_models import torch_coupling
from triton_models.compiled import compile_layers, compiled_on_device
from triton_models.target_model import load_target
from triton_models.torch_verifier import TorchVerifier
from wisp_plugin.config import VerifierConfig
from wisp_plugin.errors import ConfigError, ModelError
from wisp_plugin.kv_blocks import BlockPool
from wisp_plugin.messages import PassItem


class Layers(nn.Module):
    """A model to the eyes of `compile_layers`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))


def failing_trial() -> None:
    raise RuntimeError("no C compiler\nand more lines")


def test_compiled_layers_give_the_logits_of_plain_transformers(tmp_path: Path) -> None:
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(tmp_path)
    target = load_target(VerifierConfig(target=str(tmp_path), device="cpu", compile="always"))
    verifier, plain = TorchVerifier(target, BlockPool(64, 4), gather=True), plain_model(tmp_path)
    shapes = [(5, 1, 0), (8, 5, 4), (3, 2, 1), (0, 12, 0)]  # cached, new, drafts
    tokens = [random_tokens(i, cached + new) for i, (cached, new, _) in enumerate(shapes)]
    for i, (cached, _, _) in enumerate(shapes):
        if cached:
            verifier.run([PassItem(f"s{i}", tokens[i][:cached], 0, 0, SAMPLED, is_prefill_chunk=True)])
    items = [PassItem(f"s{i}", tokens[i], cached, drafts, SAMPLED) for i, (cached, _, drafts) in enumerate(shapes)]
    expected = [plain_logits(plain, item.tokens, item.num_cached)[-item.num_choices :] for item in items]
    torch.testing.assert_close(verifier.compute_logits(items), torch.cat(expected), rtol=1e-4, atol=1e-4)
    one = PassItem("s0", np.append(tokens[0], np.int32(3)), len(tokens[0]), 0, SAMPLED)
    logits = plain_logits(plain, one.tokens, one.num_cached)
    torch.testing.assert_close(verifier.compute_logits([one]), logits, rtol=1e-4, atol=1e-4)


def test_where_compilation_fails_the_layers_run_as_they_did(caplog: pytest.LogCaptureFixture) -> None:
    model = Layers()
    with caplog.at_level(logging.WARNING):
        assert not compile_layers(model.to("meta"), "auto", failing_trial)
    assert caplog.messages == [
        "the target cannot be compiled here (RuntimeError: no C compiler): its layers run uncompiled, which is slower"
    ]
    assert all(layer._compiled_call_impl is None for layer in model.layers)


def test_who_asks_for_compilation_is_told_that_it_failed() -> None:
    with pytest.raises(ModelError, match=r"cannot be compiled here \(RuntimeError: no C compiler\); allowed: compile="):
        compile_layers(Layers(), "always", failing_trial)
    with pytest.raises(ConfigError, match="compile"):
        VerifierConfig(compile="yes")


def test_a_compiled_model_that_is_wrong_is_not_used() -> None:
    def wrong() -> None:
        raise ModelError("packed and plain forward differ")

    with pytest.raises(ModelError, match="differ"):
        compile_layers(Layers().to("meta"), "auto", wrong)


@pytest.mark.parametrize("choice", ["auto", "never"])
def test_on_a_cpu_nothing_is_compiled_unasked(choice: str) -> None:
    assert not compile_layers(Layers(), choice, failing_trial)


def test_a_model_has_chosen_tokens_before_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    monkeypatch.setattr(torch_coupling, "_choose_on_host", lambda logits, row: rows.append(row.position) or 0)
    torch_coupling.warm_up_choice(torch.zeros(2, 5))
    assert len(rows) == 1 + 2


def test_a_function_is_not_compiled_for_a_cpu() -> None:
    calls: list[bool] = []

    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(torch.compiler.is_compiling())
        return 2 * x

    assert compiled_on_device(double)(torch.ones(2)).tolist() == [2, 2]
    assert calls == [False]


def test_compilation_works_where_the_locale_is_ascii_as_in_tritons_stub() -> None:
    code = (
        "import locale, torch; from triton_models import compiled, torch_coupling\n"
        "assert locale.getpreferredencoding(False) != 'UTF-8'\n"
        "print(compiled.compiled_on_device(lambda x: 2 * x)(torch.ones(2, device='meta')).device)\n"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "meta"
    assert "runs uncompiled" not in done.stderr
