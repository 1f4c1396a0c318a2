"""`wisp-server install-plugin` on a model directory; the library is a stand-in, the live test has the real one."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.test_plugin_config import CONFIG
from triton_models import cli, plugin_install
from triton_models.plugin_install import LIBRARY, PROFILE
from wisp_plugin.estimator import Costs
from wisp_plugin.profile import Fingerprint, Measurement, Profile, save_profile


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory with versions 1 and 12."""
    library = tmp_path / "built.so"
    library.write_bytes(b"the library")
    monkeypatch.setattr(plugin_install, "build_library", lambda progress: library)
    folder = tmp_path / "mine"
    for version in ("1", "12"):
        (folder / version).mkdir(parents=True)
    (folder / "config.pbtxt").write_text(CONFIG)
    return folder


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A profile."""
    path = tmp_path / "given.json"
    costs = Costs((1e-3, 0, 0, 0, 0, 0), (0, 0, 1e-5, 0, 0, 0))
    how = Measurement(10, 1, 0.0, 0.0, 1.0, "now", "test")
    save_profile(Profile(Fingerprint("mine", "", "any", "cpu", 0, {}), costs, 1.1, 0.1, how), path)
    return path


def run(*arguments: object) -> int:
    return cli.main(["install-plugin", *map(str, arguments)])


def test_without_write_the_lines_are_printed_only(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model_dir, "--base-us", 100, "--per-token-us", 2, "--tokens-input", "IDS") == 0
    assert (model_dir / "12" / LIBRARY).read_bytes() == b"the library"
    assert not (model_dir / "1" / LIBRARY).exists()
    assert (model_dir / "config.pbtxt").read_text() == CONFIG
    printed = capsys.readouterr().out
    assert 'key: "WISP_TOKENS_INPUT" value: { string_value: "IDS" }' in printed
    assert "run this again with --write" in printed


def test_with_write_the_file_gets_them_and_a_backup_is_kept(model_dir: Path, profile: Path) -> None:
    assert run(model_dir, "--profile", profile, "--slo-ms", 80, "--version", 1, "--write") == 0
    assert (model_dir / "1" / LIBRARY).is_file()
    assert (model_dir / PROFILE).read_bytes() == profile.read_bytes()
    assert (model_dir / "config.pbtxt.bak").read_text() == CONFIG
    assert f'string_value: "{PROFILE}"' in (model_dir / "config.pbtxt").read_text()


def test_without_write_the_report_says_that_the_model_will_not_load(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    will_not_load = "the model will not load again until these lines are in its config.pbtxt"
    assert run(model_dir, "--base-us", 100) == 0
    assert will_not_load in capsys.readouterr().out
    assert run(model_dir, "--base-us", 100, "--write") == 0
    assert will_not_load not in capsys.readouterr().out
    assert run(model_dir, "--base-us", 100) == 0
    assert "has these lines already" in capsys.readouterr().out
    assert run(model_dir, "--base-us", 200) == 0
    assert "put these lines in place of those in" in capsys.readouterr().out


@pytest.mark.parametrize("refused", [PROFILE, "config.pbtxt.bak", "config.pbtxt"])
def test_the_library_comes_last(
    model_dir: Path, profile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: str
) -> None:
    """The version folder can be written, the model folder cannot (root writes anywhere, so this is played)."""
    replace = Path.replace

    def replace_unless_refused(path: Path, target: Path) -> Path:
        if target.name == refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_unless_refused)
    assert run(model_dir, "--profile", profile, "--write") == 2
    assert f"{model_dir / refused} cannot be written: Permission denied" in capsys.readouterr().err
    assert not (model_dir / "12" / LIBRARY).exists()
    assert (model_dir / "config.pbtxt").read_text() == CONFIG
    assert not list(model_dir.rglob(".*"))  # nothing half-written is left


def test_the_first_backup_is_kept_and_further_ones_are_numbered(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_path = model_dir / "config.pbtxt"
    texts = [config_path.read_text()]
    for base_us, backup in ((100, "config.pbtxt.bak"), (200, "config.pbtxt.bak.1"), (300, "config.pbtxt.bak.2")):
        assert run(model_dir, "--base-us", base_us, "--write") == 0
        assert f"what it was before is {backup}:" in capsys.readouterr().out
        assert (model_dir / backup).read_text() == texts[-1]
        texts.append(config_path.read_text())
    assert (model_dir / "config.pbtxt.bak").read_text() == CONFIG
    config_path.write_text(CONFIG)
    assert run(model_dir, "--base-us", 100, "--write") == 0
    assert len(list(model_dir.glob("*.bak*"))) == 3  # the first holds the same already


def test_line_ends_mode_and_link_stay(model_dir: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared.pbtxt"
    shared.write_bytes(CONFIG.replace("\n", "\r\n").encode())
    shared.chmod(0o640)
    (model_dir / "config.pbtxt").unlink()
    (model_dir / "config.pbtxt").symlink_to(shared)
    assert run(model_dir, "--base-us", 100, "--write") == 0
    lines = shared.read_bytes().split(b"\n")
    assert len(lines) > CONFIG.count("\n") + 3
    assert all(line.endswith(b"\r") for line in lines[:-1])
    assert (shared.stat().st_mode & 0o777, (model_dir / "config.pbtxt").is_symlink()) == (0o640, True)


def test_a_configuration_is_never_seen_half_written(model_dir: Path) -> None:
    opened = (model_dir / "config.pbtxt").open(encoding="utf-8")  # whoever reads while it is changed
    with opened:
        assert run(model_dir, "--base-us", 100, "--write") == 0
        assert opened.read() == CONFIG


def test_a_configuration_that_is_not_utf_8_is_refused_in_a_line(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model_dir / "config.pbtxt").write_bytes(b"# caf\xe9\n" + CONFIG.encode())
    assert run(model_dir, "--base-us", 100) == 2
    expected = f"wisp-server: {model_dir / 'config.pbtxt'} cannot be read: byte 5 is not UTF-8; allowed: UTF-8 text\n"
    assert capsys.readouterr().err == expected


def test_an_unreadable_configuration_is_refused_in_a_line(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for name in ("read_bytes", "read_text", "open"):
        monkeypatch.setattr(Path, name, refuse)
    assert run(model_dir, "--base-us", 100) == 2
    assert capsys.readouterr().err == f"wisp-server: {model_dir / 'config.pbtxt'} cannot be read: Permission denied\n"


@pytest.mark.parametrize("name", ["²", "٣", "013", "12.old"])
def test_only_what_triton_takes_for_a_version_is_one(model_dir: Path, name: str) -> None:
    (model_dir / name).mkdir()
    assert run(model_dir, "--base-us", 100) == 0
    assert (model_dir / "12" / LIBRARY).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--version", 3, "--base-us", 1], "has no version 3; allowed: 1, 12"),
        (["--base-us", 1, "--tokens-input", "NOPE"], "no input of the model"),
        (["--profile", "/nowhere/p.json"], "cannot be read"),
        ([], "give --profile FILE"),
    ],
)
def test_what_cannot_work_changes_nothing(
    model_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[object], message: str
) -> None:
    before = sorted(model_dir.rglob("*"))
    assert run(model_dir, *arguments, "--write") == 2
    assert message in capsys.readouterr().err
    assert sorted(model_dir.rglob("*")) == before
    assert (model_dir / "config.pbtxt").read_text() == CONFIG


def test_a_folder_without_a_configuration_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--base-us", 1) == 2
    assert "is no model directory: it has no config.pbtxt" in capsys.readouterr().err


@pytest.fixture
def ours(model_dir: Path) -> Path:
    """The same, configured for the strategy as our own model is."""
    parameter = f'parameters {{ key: "WISP_PROFILE" value: {{ string_value: "{PROFILE}" }} }}\n'
    (model_dir / "config.pbtxt").write_text(CONFIG + parameter)
    (model_dir / plugin_install.FIRST_PROFILE).write_text("first")
    return model_dir


def test_a_model_of_ours_gets_library_and_first_profile(ours: Path) -> None:
    plugin_install.prepare(ours, print)
    assert (ours / "12" / LIBRARY).read_bytes() == b"the library"
    assert (ours / PROFILE).read_text() == "first"


def test_a_profile_that_is_there_is_kept(ours: Path) -> None:
    (ours / PROFILE).write_text("measured")
    plugin_install.prepare(ours, print)
    assert (ours / PROFILE).read_text() == "measured"


def test_a_model_without_the_strategy_is_left_alone(model_dir: Path) -> None:
    before = sorted(model_dir.rglob("*"))
    plugin_install.prepare(model_dir, print)
    assert sorted(model_dir.rglob("*")) == before


def test_without_a_compiler_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WISP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tmp_path / "mine" / "1"
    folder.mkdir(parents=True)
    (folder.parent / "config.pbtxt").write_text(CONFIG)
    assert run(folder.parent, "--base-us", 1) == 2
    assert "make is missing; install it" in capsys.readouterr().err
