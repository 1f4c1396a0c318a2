"""Servers for the integration tests; the log of each is shown with a test that fails."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.live import Drafting
from edge_runtime.drafter import Drafter
from tests.integration.support import CLASSES, Judge
from triton_models.artifacts import MANIFEST
from triton_models.launcher import make_server
from triton_models.server_process import ServerProcess
from wisp_plugin.home import default_draft_dir, default_target_dir
from wisp_plugin.messages import Mode

SERVERS = pytest.StashKey[list[ServerProcess]]()
ServerFactory = Callable[..., ServerProcess]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SERVERS] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the logs of all servers that are in use to the report of a failure."""
    report = yield
    if report.failed:
        for server in item.config.stash[SERVERS]:
            report.sections.append((f"log of tritonserver on {server.grpc_url}", server.log_tail(60)))
    return report


@pytest.fixture(scope="session", autouse=True)
def default_models() -> None:
    """Fail, and do not skip, without the models: these tests are the proof that the system works."""
    for folder in (default_target_dir(), default_draft_dir("int8"), default_draft_dir("int4")):
        if not (folder / MANIFEST).is_file():
            pytest.fail(f"the default model {folder} is missing; `make setup` makes it", pytrace=False)


def _factory(config: pytest.Config, folder: Path) -> Iterator[ServerFactory]:
    made: list[ServerProcess] = []

    def make(settings: dict[str, Any] | None = None, **options: Any) -> ServerProcess:
        # No admission control (it has tests of its own): on a machine that is busy otherwise it may refuse any session.
        wanted = {"kv_tokens": 8_192, "cancel_poll_s": 0.1, "max_load": 0.0} | (settings or {})
        server = make_server(settings=wanted, log_path=folder / f"triton-{len(made)}.log", **options)
        made.append(server)
        config.stash[SERVERS].append(server)
        return server

    yield make
    for server in made:
        if server.running:
            server.kill()  # its end is not under test, and an orderly one takes three seconds
        config.stash[SERVERS].remove(server)


@pytest.fixture
def make_own_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerFactory]:
    """Makes servers (not started) of one test: `make_own_server(settings, **options of ServerProcess)`."""
    yield from _factory(request.config, tmp_path)


@pytest.fixture(scope="session")
def shared_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, default_models: None
) -> Iterator[ServerProcess]:
    """One server with the default model, as `wisp-server up` starts it, for all tests that leave it as it was."""
    making = _factory(request.config, tmp_path_factory.mktemp("server"))
    server = next(making)({"slo_classes": CLASSES}, models=["wisp_verifier", "wisp_generate"])
    server.start()
    server.wait_ready()
    yield server
    server.stop()  # in order, after all that it has been through
    next(making, None)


@pytest.fixture(scope="session")
def unary_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, default_models: None
) -> Iterator[ServerProcess]:
    """One server with `wisp_verifier_batched`, which remembers four sessions and holds KV of 384 tokens."""
    making = _factory(request.config, tmp_path_factory.mktemp("unary"))
    small = {"kv_tokens": 384, "kv_block_tokens": 32, "max_sessions": 4}
    server = next(making)(small, models=["wisp_verifier_batched"])
    server.start()
    server.wait_ready()
    yield server
    server.stop()  # in order, after all that it has been through
    next(making, None)


@pytest.fixture
def server(shared_server: ServerProcess) -> ServerProcess:
    """The shared server, which must be alive before and after the test."""
    assert shared_server.is_ready(), "the shared server is gone; an earlier test has killed it"
    return shared_server


@pytest.fixture(scope="session")
def judge(default_models: None) -> Judge:
    """The target alone."""
    return Judge()


@pytest.fixture(scope="session")
def drafting(default_models: None) -> Callable[..., Drafting]:
    """`drafting(precision, mode, index)`: one drafter for each precision and index, loaded once."""
    drafters: dict[tuple[str, int], Drafter] = {}

    def get(precision: str, mode: Mode = Mode.FREE, index: int = 0) -> Drafting:
        key = (precision, index)
        if key not in drafters:
            drafters[key] = Drafter.load(default_draft_dir(precision), num_threads=1)
        return Drafting(drafters[key], mode)

    return get
