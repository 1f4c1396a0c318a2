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

# Counters hold whole numbers where they are declared as floats, which shows in the text of the metrics endpoint.
_INTERPRETED = {"__init__", "metric_set", "metrics", "telemetry"}


def compiled_modules() -> list[Any]:
    """C extensions of the engine, scheduler, estimator, sessions and controller."""
    from mypyc.build import mypycify

    paths = sorted(path for path in Path("wisp_plugin").glob("*.py") if path.stem not in _INTERPRETED)
    return mypycify([str(path) for path in paths])


setup(ext_modules=compiled_modules() if os.environ.get("WISP_COMPILED") == "1" else [])
