"""Everything about the package is in pyproject.toml; here is only its compiled form.

With WISP_COMPILED=1 the modules of `wisp_plugin` become C extensions (mypyc compiles typed Python as it is: the same
code, the same results to the last digit). That needs mypy, numpy and a C compiler beside setuptools:

    WISP_COMPILED=1 pip install --no-build-isolation .
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from setuptools import setup

# What is not done for every token: classes that are sent between processes (a compiled frozen dataclass cannot be) or
# read their own annotations, and counters, which hold whole numbers though they are declared as floats.
_INTERPRETED = {
    "__init__", "chat_template", "config", "cost_fit", "estimator", "metric_set", "metrics", "profile", "telemetry",
    "wisp_parameters",
}  # fmt: skip


def compiled_modules() -> list[Any]:
    """C extensions of the engine, scheduler, estimator, sessions and controller."""
    from mypyc.build import mypycify

    paths = sorted(path for path in Path("wisp_plugin").glob("*.py") if path.stem not in _INTERPRETED)
    return mypycify([str(path) for path in paths])


setup(ext_modules=compiled_modules() if os.environ.get("WISP_COMPILED") == "1" else [])
