"""A model repository with models that are not ours, each with and without the batching strategy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from triton_models.plugin_config import PluginSettings
from triton_models.plugin_install import InstallOptions, install
from wisp_plugin.errors import ModelError

MODEL = Path(__file__).parent / "foreign_model" / "model.py"
MAX_BATCH_SIZE = 32
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: {max_batch_size}
input [ {{ name: "IDS", data_type: TYPE_INT32, dims: [ -1 ], allow_ragged_batch: true }} ]
output [ {{ name: "LENGTH", data_type: TYPE_INT32, dims: [ 1 ] }} ]
instance_group [ {{ count: 1, kind: KIND_CPU }} ]
dynamic_batching {{
  max_queue_delay_microseconds: {delay_us}
  {queue}
}}
parameters {{ key: "base_units" value: {{ string_value: "{base_units}" }} }}
parameters {{ key: "units_per_token" value: {{ string_value: "{units_per_token}" }} }}
parameters {{ key: "unit_s" value: {{ string_value: "{unit_s}" }} }}
"""
QUEUES = {
    "priority": "priority_levels: 2\n  default_priority_level: 2",
    "ahead": "",  # one queue, as Triton has it by default: batches are filled while the instance is busy
    "policy": "default_queue_policy { allow_timeout_override: true }",  # one queue, batches for a free instance only
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a batch costs, in seconds, and how long one unit of work takes on this machine."""

    base_s: float
    token_s: float
    unit_s: float


@dataclass(frozen=True, slots=True)
class Variant:
    """One model of the repository."""

    queue: str  # of QUEUES
    delay_us: int
    has_plugin: bool

    @property
    def name(self) -> str:
        """Of the model."""
        return f"{self.queue}_{self.delay_us}us_{'wisp' if self.has_plugin else 'plain'}"


def unit_seconds() -> float:
    """Median seconds of a unit of work in a process like the model's, one thread."""
    program = (
        "import sys, time, types; sys.modules['triton_python_backend_utils'] = types.ModuleType('none')\n"
        "import runpy; work = runpy.run_path(sys.argv[1])['work']; work(2000); times = []\n"
        "for _ in range(15):\n    start = time.perf_counter(); work(2000); times.append(time.perf_counter() - start)\n"
        "print(sorted(times)[7] / 2000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(MODEL)], capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | ONE_THREAD,
    )  # fmt: skip
    if done.returncode:
        raise ModelError(f"the unit of work cannot be timed: {done.stderr.splitlines()[-1]}")
    return float(done.stdout)


def write_model(repository: Path, variant: Variant, cost: Cost, profile: Path | None) -> None:
    """A model directory; one with the strategy gets it as a user would install it, with `profile`."""
    folder = repository / variant.name
    (folder / "1").mkdir(parents=True)
    shutil.copyfile(MODEL, folder / "1" / "model.py")
    config = _CONFIG.format(
        name=variant.name,
        max_batch_size=MAX_BATCH_SIZE,
        delay_us=variant.delay_us,
        queue=QUEUES[variant.queue],
        base_units=round(cost.base_s / cost.unit_s),
        units_per_token=cost.token_s / cost.unit_s,
        unit_s=cost.unit_s,
    )
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    if variant.has_plugin:
        assert profile is not None, "the strategy needs costs"
        settings = PluginSettings(profile="set by install", tokens_input="IDS")
        install(InstallOptions(folder, settings, profile, write=True), lambda line: None)
