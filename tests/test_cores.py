"""How many threads draft unless the user says otherwise."""

from __future__ import annotations

import os

import pytest

from edge_runtime.cli import main
from edge_runtime.cores import drafting_threads


@pytest.mark.parametrize(("usable", "threads"), [({0}, 1), ({0, 3}, 1), ({0, 1, 2, 5}, 3), (set(range(64)), 63)])
def test_one_of_the_usable_cores_is_left_to_who_receives(
    usable: set[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: usable, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    assert drafting_threads() == threads


@pytest.mark.parametrize(("cores", "threads"), [(None, 1), (1, 1), (8, 7)])
def test_without_affinity_all_cores_count(cores: int | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert drafting_threads() == threads


@pytest.mark.parametrize("command", ["generate", "chat", "trace"])
def test_help_names_the_default(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "here 5:" in " ".join(capsys.readouterr().out.split())
