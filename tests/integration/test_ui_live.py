"""The page in a real Chromium on the real gateway and a real tritonserver: an answer, and where its tokens are from."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser import browser, tab  # noqa: F401  (fixtures)
from triton_models.processes import free_ports
from triton_models.server_process import ServerProcess

pytestmark = [pytest.mark.integration, pytest.mark.alone]
ROOT = Path(__file__).resolve().parents[2]
QUESTION = "Explain in a few sentences why the sky is blue."
NUM_TOKENS = 32
ORIGINS = ("accepted", "bonus", "correction", "decoded")


@contextmanager
def gateway(server: str, *args: str) -> Iterator[str]:
    """`wisp-edge serve` on a free port; yields the address of its page."""
    port = free_ports().http
    options = ("--server", server, "--port", str(port), "--threads", "1", "--server-wait", "1", *args)
    command = [sys.executable, "-m", "edge_runtime.cli", "serve", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("wisp-edge: serving")
            yield f"http://127.0.0.1:{port}/ui"
        finally:
            process.terminate()


def answer(page: Page, text: str) -> str:
    """Ask, wait for the end, return the whole text of the last answer."""
    number = page.locator(".answer").count()
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator(".answer .note").nth(number)).to_have_text(re.compile(r"\d+ tokens, "), timeout=60_000)
    return str(page.locator(".answer .committed").nth(number).inner_text())


def test_an_answer_with_its_speculation(server: ServerProcess, tab: Page) -> None:  # noqa: F811
    with gateway(server.grpc_url) as address:
        tab.goto(address)
        expect(tab.locator("#state")).to_have_text("ready")
        tab.get_by_role("button", name="Settings").click()
        tab.get_by_label("Max tokens").fill(str(NUM_TOKENS))
        tab.keyboard.press("Escape")
        tab.evaluate("""() => { window.most = 0; new MutationObserver(() => {
            window.most = Math.max(window.most, document.querySelectorAll(".chain .ghost").length); })
            .observe(document.querySelector("#chat"), { childList: true, subtree: true }); }""")
        drafted = answer(tab, QUESTION)
        counts = {origin: int(tab.locator(f"#n-{origin}").inner_text()) for origin in ORIGINS}
        assert counts["accepted"] > 0
        assert sum(counts.values()) in (NUM_TOKENS, NUM_TOKENS + 1)  # one more: the held back rest of a text
        assert tab.evaluate("window.most") > 0, "ghost text was shown"
        for figure in ("tokens_per_s", "acceptance_rate", "wdt_share", "round_trip_ms", "choice"):
            assert tab.locator(f"#{figure}").inner_text() != "–", figure
        tab.get_by_role("button", name="New chat").click()
        tab.get_by_role("button", name="Settings").click()
        tab.get_by_label("Draft on this device").uncheck()
        tab.keyboard.press("Escape")
        assert answer(tab, QUESTION) == drafted, "drafts change nothing but the speed"
        assert tab.locator("#n-accepted").inner_text() == "0"


def test_the_server_is_away(tab: Page) -> None:  # noqa: F811
    with gateway(f"127.0.0.1:{free_ports().grpc}", "--no-draft") as address:
        tab.goto(address)
        expect(tab.locator("#state")).to_have_text("server away")
        tab.get_by_label("Message").fill("Hello")
        tab.keyboard.press("Enter")
        expect(tab.get_by_role("alert")).to_contain_text("no server at", timeout=20_000)
