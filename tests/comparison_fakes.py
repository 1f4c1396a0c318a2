"""Made-up results of the comparison, and what its commands print."""

from __future__ import annotations

import json
from typing import Any

from bench.best import Best
from bench.systems import SYSTEMS


def best_of(system: str, held: int, tokens: float) -> Best:
    """A system that holds so many devices, with so many tokens per second at its peak."""
    setting = str(SYSTEMS[system].settings[0])
    return Best(system, held, setting, {"attainment": 1.0}, tokens, held, setting, {"attainment": 0.9}, [])


def document_of(output: str) -> dict[str, Any]:
    """The last line of a command."""
    return dict(json.loads(output.splitlines()[-1]))
