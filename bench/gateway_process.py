"""A gateway as a user starts it: a process of its own, `wisp-edge serve`, on a free port."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wisp_plugin.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
END_S = 15.0  # limit of waiting for it to end
_SERVING = re.compile(r"serving \S+ on (http://[0-9.:]+)")


@contextmanager
def serving(server: str, *options: str) -> Iterator[str]:
    """The URL of a gateway to the server at HOST:PORT; ended by SIGTERM, which must be enough.

    Raises:
        ConfigError: it does not start; its reason stands on standard error.
    """
    command = [sys.executable, "-m", "edge_runtime.cli", "serve", "--port", "0", "--server", server, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            found = _SERVING.search(process.stdout.readline())
            if not found:
                raise ConfigError("the gateway did not start")
            yield found[1]
        finally:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
