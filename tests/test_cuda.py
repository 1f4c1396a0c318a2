"""What only a CUDA device can show: real graphs give the logits, the choices and the KV of launched kernels.

Where there is none, `test_pass_graphs.py` has the same mechanism with graphs that note operations.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_pass_graphs import items_of
from tests.test_torch_verifier import folder, model_dirs  # noqa: F401
from triton_models.cuda_recorder import CudaRecorder
from triton_models.pass_graphs import SIZES
from triton_models.target_model import forward, load_target
from triton_models.torch_verifier import TorchVerifier
from wisp_plugin.config import VerifierConfig
from wisp_plugin.kv_blocks import BlockPool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# passes of (session, cached, new, drafts): one row, a few, as many as are recorded, more than that
PASSES = (
    [("a", 0, 1, 0)],
    [("a", 1, 7, 6), ("b", 0, 9, 0)],
    [("a", 2, 5, 4), ("b", 9, 60, 0), ("c", 0, 31, 0)],
    [("c", 31, 130, 9), ("d", 0, 126, 0)],
    [("e", 0, 250, 0), ("a", 3, 40, 8)],
)


def verifier_on_cuda(folder: Path, compile_choice: str) -> TorchVerifier:  # noqa: F811
    target = load_target(VerifierConfig(target=str(folder), device="cuda", dtype="float32", compile=compile_choice))
    return TorchVerifier(target, BlockPool(256, 4))


def test_recorded_passes_give_the_logits_choices_and_kv_of_launched_kernels(folder: Path) -> None:  # noqa: F811
    graphed, plain = verifier_on_cuda(folder, "graphs"), verifier_on_cuda(folder, "never")
    assert graphed._target.graphs.sizes == SIZES
    for shapes in PASSES:
        items = items_of(shapes)
        logits, expected = graphed.compute_logits(items), plain.compute_logits(items)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        chosen = [outcome.chosen.tolist() for outcome in graphed.choose(items, logits)]
        assert chosen == [outcome.chosen.tolist() for outcome in plain.choose(items, logits)]
        for item in items:
            for verifier in (graphed, plain):
                verifier.pool.truncate(item.session, item.num_cached + item.num_new_tokens - item.num_draft_tokens)
    for kind in ("keys", "values"):  # of all slots: padded rows have written nothing
        for ours, theirs in zip(getattr(graphed.cache, kind), getattr(plain.cache, kind), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    graphed.cache.check_integrity()


def test_a_replay_repeats_itself_bit_for_bit_in_another_thread(folder: Path) -> None:  # noqa: F811
    verifier, found = verifier_on_cuda(folder, "graphs"), []
    (first,) = items_of([("a", 0, 24, 0)])
    verifier.compute_logits([first])

    def run() -> None:
        item = items_of([("a", 24, 5, 4)])[0]
        found.append(verifier.compute_logits([item]))
        verifier.pool.truncate("a", 24)

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert len(found) == 2
    run()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_recording_that_cuda_refuses_leaves_the_device_usable(model_dirs: dict[str, Path]) -> None:  # noqa: F811
    verifier, calls = verifier_on_cuda(model_dirs["llama"], "never"), 0
    target = verifier._target

    def looks_at_a_value(input_ids: Any, positions: Any, attention: Any, keep: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = forward(target.model, input_ids, positions, attention, keep)
        float(logits[0, 0])  # waits for the device, which a recording may not
        return logits

    with pytest.raises(RuntimeError):
        target.graphs.record(looks_at_a_value, target.device, CudaRecorder(target.device), SIZES)
    assert (calls, target.graphs.sizes) == (2, ())  # the run that warms up, and the one that was recorded
    verifier.compute_logits(items_of([("a", 0, 5, 0)]))
    target.graphs.record(functools.partial(forward, target.model), target.device, CudaRecorder(target.device), (8,))
    assert target.graphs.sizes == (8,)
