"""Everything about the package is in pyproject.toml; here is only its compiled form.

With WISP_COMPILED=1 the engine, the scheduler and the sessions of `wisp_plugin` become C extensions, and the clients of
a simulation as well (mypyc compiles typed Python as it is: the same code, the same results to the last digit). That
needs mypy, numpy and a C compiler beside setuptools:

    WISP_COMPILED=1 pip install --no-build-isolation .
"""

from __future__ import annotations

import os
from typing import Any

from setuptools import setup

# What runs for every token, message or pass. Not what checks input of any type (compiled code checks its own way), nor
# what is sent between processes (a compiled frozen dataclass cannot be).
_COMPILED = (
    "acceptance_model", "controller", "coupling", "draft_buffer", "draft_rates", "drafting_verifier",
    "edge_session", "edge_stats", "engine", "expected_drafts", "inbox", "kv_admission", "kv_blocks", "kv_owners",
    "kv_pass", "kv_prefixes", "outbox", "pace", "pass_features", "policies", "roster", "scheduler", "send_window",
    "server_drafts", "server_session", "session_table", "stop_rules", "timeline", "wisp_budget", "wisp_fill",
    "wisp_first_tokens", "wisp_hold", "wisp_offers", "wisp_policy", "wisp_prefill", "wisp_spare", "wisp_turns",
)  # fmt: skip
_COMPILED_SIMULATION = ("sim_client", "sim_colocated", "sim_verifier")


def compiled_modules() -> list[Any]:
    """Their C extensions."""
    from mypyc.build import mypycify

    simulation = [f"bench/{name}.py" for name in _COMPILED_SIMULATION]
    # What they share lies in the package: beside it, where a checkout is installed in place, nothing would find it.
    return mypycify([*(f"wisp_plugin/{name}.py" for name in _COMPILED), *simulation], group_name="wisp_plugin.compiled")


setup(ext_modules=compiled_modules() if os.environ.get("WISP_COMPILED") == "1" else [])
