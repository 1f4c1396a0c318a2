"""The pass-cost benchmark: the forward is a transformer's, the fit finds what made the times, the report is whole."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3ForCausalLM

from bench import cli, pass_cost, pass_fit, pass_model
from bench.pass_fit import PassFeatures
from bench.pass_model import SHAPES
from wisp_plugin.errors import ConfigError

TINY = SHAPES["tiny"]
GRID = ("--sessions", "1,4", "--tokens-per-session", "1,3", "--chunks", "8", "--cached", "16,48", "--repeats", "2")
RUN_TINY = ["pass-cost", "--shape", "tiny", "--device", "cpu", "--dtype", "fp32", *GRID]
NUM_CELLS = 2 * (2 * 2 + 1)


def default_grid() -> list[PassFeatures]:
    return pass_cost.grid([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8], [16, 64, 256, 512], [128, 512, 2048])


def tiny_model(kv_tokens: int, num_layers: int = 4) -> pass_model.PassModel:
    torch.manual_seed(5)
    return pass_model.build(TINY, num_layers, torch.device("cpu"), torch.float32, kv_tokens)


def document(text: str) -> dict[str, object]:
    return dict(json.loads(text.splitlines()[-1]))


@pytest.mark.parametrize("num_new", [1, 2, 5])
def test_a_pass_behind_cached_tokens_equals_the_whole_forward(num_new: int) -> None:
    num_cached = 11
    model = tiny_model(kv_tokens=num_cached + num_new)
    tokens = torch.randint(TINY.vocab, (1, num_cached + num_new))
    model.prepare(PassFeatures(1, num_cached, 0), tokens[:, :num_cached])()
    logits = model.prepare(PassFeatures(1, num_new, num_cached), tokens[:, num_cached:])()
    torch.testing.assert_close(logits, plain_logits(model, tokens)[:, num_cached:], atol=1e-5, rtol=1e-4)


def test_sessions_of_a_pass_do_not_mix() -> None:
    model = tiny_model(kv_tokens=3 * 6)
    tokens = torch.randint(TINY.vocab, (3, 6))
    logits = model.prepare(PassFeatures(3, 6, 0), tokens)()
    torch.testing.assert_close(logits, plain_logits(model, tokens), atol=1e-5, rtol=1e-4)


def plain_logits(model: pass_model.PassModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of transformers' own forward with the same weights and its own attention."""
    config = type(model.causal_lm.config)(**{**model.causal_lm.config.to_dict(), "attn_implementation": "sdpa"})
    plain = Qwen3ForCausalLM(config).eval()
    plain.load_state_dict(model.causal_lm.state_dict())
    with torch.inference_mode():
        return plain(tokens).logits


def test_the_mask_type_for_cuda_means_the_same_as_the_mask_for_the_cpu() -> None:
    query, key, value = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    masks = [pass_model._lower_right_mask(3, 9, torch.device(kind)) for kind in ("cpu", "cuda")]
    first, second = (
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.25, enable_gqa=True)
        for mask in masks
    )
    torch.testing.assert_close(first, second)


def test_the_default_grid_spans_the_asked_range() -> None:
    cells = default_grid()
    assert len(cells) == len(set(cells)) == 3 * (7 * 4 + 4)
    assert {cell.num_new_tokens for cell in cells} == {1, 2, 4, 8, 16, 32, 64, 128, 256, 512}
    assert {cell.num_sessions for cell in cells} == {1, 2, 4, 8, 16, 32, 64}


def test_the_published_shape_has_the_published_size() -> None:
    shape = SHAPES["qwen3-32b"]
    num_params = shape.num_layers * shape.layer_params + 2 * shape.vocab * shape.hidden
    assert num_params == pytest.approx(32.8e9, rel=0.01)  # the model card's figure
    layer = pass_model.build(TINY, 1, torch.device("cpu"), torch.float32, 1).causal_lm.model.layers[0]
    assert TINY.layer_params == sum(p.numel() for p in layer.parameters() if p.dim() == 2)


@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 20))
def test_features_count_what_attention_reads(num_sessions: int, num_new: int, num_cached: int) -> None:
    cell = PassFeatures(num_sessions, num_new, num_cached)
    assert cell.context == num_sessions * len(range(num_cached + num_new))
    assert cell.new_x_context == num_sessions * sum(num_cached + i + 1 for i in range(num_new))


@pytest.mark.parametrize("norm", pass_fit.NORMS)
def test_the_fit_finds_the_norm_and_the_times_that_made_the_data(norm: float) -> None:
    cells = default_grid()
    times_ms = [
        ((30 + 0.1 * c.num_sessions + 0.13e-3 * c.context) ** norm
         + (4 + 0.3 * c.num_new_tokens + 2e-6 * c.new_x_context) ** norm) ** (1 / norm)
        for c in cells
    ]  # fmt: skip
    fit = pass_fit.best(pass_fit.fit_norms(cells, times_ms))
    assert fit.norm == norm
    assert fit.figures()["fit_error_max"] < 0.02
    if norm > 1:  # with p = 1 the two bases cannot be told apart
        assert fit.coefficients["memory_base_ms"] == pytest.approx(30, rel=0.05)
        assert fit.coefficients["arithmetic_ms_per_new_token"] == pytest.approx(0.3, rel=0.05)
        assert fit.coefficients["memory_ms_per_1k_context"] == pytest.approx(0.13, rel=0.1)


def test_the_fit_refuses_too_little() -> None:
    cells = default_grid()[: pass_fit.MIN_PASSES]
    with pytest.raises(ValueError, match="at least"):
        pass_fit.fit_norms(cells[:-1], [1.0] * (len(cells) - 1))
    with pytest.raises(ValueError, match="above zero"):
        pass_fit.fit_norms(cells, [0.0] * len(cells))


def test_the_benchmark_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*RUN_TINY, "--layers", "4"]) == 0
    out = capsys.readouterr().out
    report = document(out)
    assert "tiny, 4 of 4 layers" in out
    assert "memory_base_ms" in out
    assert report["benchmark"] == "pass-cost"
    assert report["cells_skipped"] == 0
    assert report["launch_share_median"] is None  # launches are not apart from the work on a CPU
    rows = [dict(zip(report["cell_columns"], row, strict=True)) for row in report["cells"]]  # type: ignore[arg-type,call-overload]
    assert len(rows) == NUM_CELLS
    assert all(0 < row["ms"] == row["ms all layers"] for row in rows)
    assert set(report["fit_error_median_by_norm"]) == {"1", "2", "4", "16"}  # type: ignore[call-overload]


def test_on_a_gpu_the_launches_are_queued_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU only the order can be tested: spin, start, the pass, end, wait."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 12.5

    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"spin {cycles / 2.2e9:g} s"))
    model = tiny_model(kv_tokens=1, num_layers=1)
    assert pass_cost._queued_ms(model, lambda: log.append("pass"), launch_s=0.25) == 12.5
    assert log == ["spin 0.25 s", "record", "pass", "record", "wait"]


def test_layers_left_out_are_scaled_without_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head 2 ms, each of 3 built layers 4 ms: all 4 layers take 2 + 4 * 4 ms."""
    model, cell = tiny_model(kv_tokens=64, num_layers=3), PassFeatures(1, 2, 8)
    head = model.prepare_head

    def named_head(num_tokens: int) -> Callable[[], torch.Tensor]:
        run = head(num_tokens)
        run.is_head = True  # type: ignore[attr-defined]
        return run

    def fake_measure(_: object, run: object, repeats: int) -> tuple[float, float]:
        return (2.0, 2.0) if hasattr(run, "is_head") else (14.0, 15.0)

    monkeypatch.setattr(model, "prepare_head", named_head)
    monkeypatch.setattr(pass_cost, "measure", fake_measure)
    times = pass_cost.measure_cells(model, [cell], repeats=1, budget_s=60, seed=0)
    assert times[cell] == pass_cost.CellTime(ms=14.0, full_ms=18.0, eager_ms=15.0, launch_share=None)


def test_a_spent_budget_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*RUN_TINY, "--budget-s", "0"]) == 0
    out = capsys.readouterr().out
    assert document(out)["cells_skipped"] == NUM_CELLS
    assert "No fit: 0 passes measured" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "5"], "5 layers asked for; the shape has 4"),
        (["--device", "tpu"], "device 'tpu' is unknown; allowed: auto, cpu, cuda, cuda:N"),
        (["--device", "cuda:99"], "device 'cuda:99' is not there"),
    ],
)
def test_what_cannot_work_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*RUN_TINY, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("wisp-bench: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize(
    "arguments", [["--sessions", "1,x"], ["--cached", "0"], ["--seed=-1"], ["--budget-s", "nan"], ["--dtype", "int8"]]
)
def test_malformed_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([*RUN_TINY, *arguments])
    assert arguments[0].partition("=")[0] in capsys.readouterr().err


def test_as_many_layers_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, device = SHAPES["qwen3-32b"], torch.device("cpu")

    def fitting(gib: float, asked: int | None = None) -> int:
        monkeypatch.setattr(pass_model, "free_bytes", lambda _: int(gib * 2**30))
        return pass_model.layers_that_fit(shape, device, torch.bfloat16, 64 * 2056, 512, asked)

    assert fitting(140) == 64
    assert 40 <= fitting(79) < 64  # an A100 of 80 GB
    assert fitting(79, asked=8) == 8
    with pytest.raises(ConfigError, match=r"at most [45]\d layers fit"):
        fitting(79, asked=64)
    with pytest.raises(ConfigError, match="at most 0 layers fit"):
        fitting(4)
