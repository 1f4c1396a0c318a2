"""The page of the gateway in a real, headless Chromium, against a small server that plays what a test scripts.

Skipped where there is no Chromium (`CHROMIUM` names a browser that is not on PATH). The page against the real gateway
and a real tritonserver is in tests/integration/test_ui_live.py.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import PAGE, browser, tab  # noqa: F401  (fixtures)

WAIT_S = 10.0
END = {"type": "end", "finish_reason": "eos_token", "generated_tokens": 7}
OPEN = {"type": "open", "prompt_tokens": 12, "draft_model": "int8", "rule": "price"}
STATS = {
    "tokens_per_s": 61.3,
    "acceptance_rate": 0.834,
    "wdt_share": 0.271,
    "round_trip_ms": 2.34,
    "choice": "waiting: price",
}
PHONE = {"width": 360, "height": 640}
ORIGINS = ("accepted", "correction", "bonus", "decoded")


class FakeGateway(ThreadingHTTPServer):
    """Serves the page; the answer to `POST /ui/stream` is what a test puts into `events`, until None."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.events: queue.Queue[dict[str, Any] | str | None] = queue.Queue()
        self.requests: list[dict[str, Any]] = []
        self.health = 200
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.left = threading.Event()  # the page has closed a stream

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/ui"

    def play(self, *events: dict[str, Any] | str | None) -> None:
        """Let the stream go on with these; a text is sent as it is."""
        for event in events:
            self.events.put(event)


class _Handler(BaseHTTPRequestHandler):
    server: FakeGateway

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/ui":
            self._answer(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif self.path == "/health":
            self._answer(self.server.health, "text/plain", b"")
        elif self.path == "/info":
            self._answer(200, "application/json", json.dumps({"model_id": "SmolLM2-135M-Instruct"}).encode())
        else:
            self._answer(404, "text/plain", b"")

    def do_POST(self) -> None:
        self.server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        assert self.path == "/ui/stream"
        if self.server.refusal is not None:
            status, body = self.server.refusal
            self._answer(status, "application/json", json.dumps(body).encode())
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.close_connection = True
        while (event := self.server.events.get(timeout=WAIT_S)) is not None:
            text = event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n"
            try:
                self.wfile.write(text.encode())
                self.wfile.flush()
            except OSError:
                self.server.left.set()
                return

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    server = FakeGateway()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.play(None, None)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def page(tab: Page, gateway: FakeGateway) -> Page:  # noqa: F811
    """The page, loaded, in a window of a desktop."""
    tab.goto(gateway.url)
    return tab


def draft(start: int, *texts: str, survival: float = 0.8) -> dict[str, Any]:
    return {"type": "draft", "start": start, "texts": list(texts), "survival": [survival] * len(texts)}


def commit(
    start: int, *tokens: tuple[str, str], struck: int = 0, tail: str = "", **stats: Any
) -> dict[str, Any]:
    """A commit of `tokens`, each a text and its origin."""
    listed = [{"text": text, "origin": origin} for text, origin in tokens]
    told = {"start": start, "tokens": listed, "tail": tail, "struck": struck, "stats": STATS | stats}
    return {"type": "commit", **told}


def ask(page: Page, text: str = "Why is the sky blue?") -> None:
    """Type a question and press Enter."""
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def test_tokens_are_coloured_by_origin(page: Page, gateway: FakeGateway) -> None:
    ask(page)
    tokens = (("The", "decoded"), (" sky", "accepted"), (" is", "accepted"), (" blue", "correction"), (".", "bonus"))
    gateway.play(OPEN, commit(0, *tokens), commit(5, tail=" \ufffd"), END, None)
    expect(page.locator(".answer .note")).to_have_text("7 tokens, complete; draft int8, rule price")
    assert page.locator(".answer .text").inner_text() == "The sky is blue. \ufffd"
    shown = [
        (span.text_content(), (span.get_attribute("class") or "").split()[1])
        for span in page.locator(".committed .token").all()
    ]
    assert shown == [(text.strip(), origin) for text, origin in tokens], "the space before a word has no colour"
    looks = {origin: look(page, f".answer .token.{origin} >> nth=0") for origin in ORIGINS}
    assert len({background for background, _ in looks.values()}) == 4
    assert len({line for _, line in looks.values()}) == 4, "underlines tell origins apart without colours"
    assert looks == {origin: look(page, f"#legend .token.{origin}") for origin in ORIGINS}
    assert [page.locator(f"#n-{origin}").text_content() for origin in ORIGINS] == ["2", "1", "1", "1"]


def look(page: Page, selector: str) -> tuple[str, str]:
    """Background and underline of an element when its animation is over."""
    return tuple(
        page.locator(selector).evaluate(
            """async (element) => {
              await Promise.all(element.getAnimations().map((animation) => animation.finished));
              const style = getComputedStyle(element);
              return [style.backgroundColor, `${style.textDecorationLine} ${style.textDecorationStyle}`];
            }"""
        )
    )


def test_a_draft_turns_solid_or_is_struck_out(page: Page, gateway: FakeGateway) -> None:
    page.clock.install()  # so that what is struck out stays until the test lets time pass
    ask(page)
    gateway.play(OPEN, commit(0, ("The", "decoded")), draft(1, " sky", " is", " green"))
    ghosts = page.locator(".chain .ghost")
    expect(ghosts).to_have_text([" sky", " is", " green"])
    assert page.locator(".committed").inner_text() == "The"
    gateway.play(commit(1, (" sky", "accepted")))  # agrees: the chain goes on behind it
    expect(ghosts).to_have_text([" is", " green"])
    expect(page.locator(".committed .was-ghost")).to_have_text(["sky"])
    gateway.play(commit(2, (" is", "accepted"), (" blue", "correction"), struck=1))
    expect(ghosts).to_have_count(0)
    expect(page.locator(".dropped del")).to_have_text([" green"])
    assert "line-through" in page.locator(".dropped del").evaluate("e => getComputedStyle(e).textDecorationLine")
    expect(page.locator(".committed .was-ghost")).to_have_text(["sky", "is"])
    page.clock.run_for(1000)
    expect(page.locator(".dropped del")).to_have_count(0)
    gateway.play(draft(4, " to"), draft(4, " because", " of"))  # the whole chain each time
    expect(ghosts).to_have_text([" because", " of"])
    expect(page.locator("#n-ghost")).to_have_text("2")
    gateway.play(END, None)
    expect(ghosts).to_have_count(0)
    assert page.locator(".answer .text").inner_text() == "The sky is blue"
    assert page.locator("#n-struck").text_content() == "1"


def test_a_chain_that_outruns_what_was_shown(page: Page, gateway: FakeGateway) -> None:
    """Commits of more than the page has seen drafted, of empty parts of characters, and of a decoded draft token."""
    ask(page)
    gateway.play(OPEN, commit(0, ("", "decoded"), ("é", "decoded")), draft(2, "t"))
    gateway.play(commit(2, ("t", "accepted"), ("é", "accepted"), (" d", "bonus")), draft(5, "'", "or"))
    gateway.play(commit(5, ("'", "decoded")))
    expect(page.locator(".chain .ghost")).to_have_text(["or"])
    gateway.play(commit(6, (" eau", "correction"), struck=5), END, None)
    expect(page.locator(".answer .note")).to_contain_text("complete")
    assert page.locator(".committed").inner_text() == "été d' eau"
    assert page.locator(".committed .was-ghost").all_inner_texts() == ["t", "'"]


def test_figures(page: Page, gateway: FakeGateway) -> None:
    ask(page)
    gateway.play(OPEN, commit(0, ("a", "decoded"), acceptance_rate=0.0, wdt_share=0.0))
    expect(page.locator("#tokens_per_s")).to_have_text("61.3")
    assert page.locator("#acceptance_rate").text_content() == "–", "nothing was verified yet"
    gateway.play(draft(1, "b", "c"), commit(1, ("b", "accepted"), ("c", "accepted"), ("d", "bonus")))
    expect(page.locator("#acceptance_rate")).to_have_text("83 %")
    wanted = {"wdt_share": "27 %", "round_trip_ms": "2.3 ms", "choice": "waiting: price", "tokens_per_commit": "2.00"}
    assert {name: page.locator(f"#{name}").text_content() for name in wanted} == wanted
    assert page.locator("#ahead").text_content() == "2"
    points = page.locator(".tile:has(#tokens_per_s) polyline").get_attribute("points")
    assert points is not None
    assert len(points.split()) == 2
    tile = page.get_by_role("group", name="WDT share")
    tip = tile.get_by_role("tooltip")
    expect(tip).to_be_hidden()
    tile.focus()
    expect(tip).to_be_visible()
    expect(tip).to_contain_text("Our own definition")
    controller = page.get_by_role("group", name="controller")
    controller.focus()
    expect(controller.get_by_role("tooltip")).to_contain_text("Now waiting: price.")
    gateway.play(END, None)


def test_settings_reach_the_gateway_and_are_checked(page: Page, gateway: FakeGateway) -> None:
    gateway.play(OPEN, commit(0, ("Hi", "decoded")), END, None)
    ask(page, "Hello")
    expect(page.locator(".answer .note")).to_contain_text("complete")
    hello = {"role": "user", "content": "Hello"}
    defaults = {"max_new_tokens": 256, "temperature": 0, "seed": None, "draft": True}
    assert gateway.requests == [{"messages": [hello], **defaults}]
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("3")
    ask(page, "Go on")
    assert page.get_by_label("Temperature").evaluate("e => e === document.activeElement"), "the wrong value is shown"
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Seed").fill("42")
    page.get_by_label("Max tokens").fill("16")
    page.get_by_label("Draft on this device").uncheck()
    gateway.play(OPEN, commit(0, ("!", "decoded")), END, None)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".answer .note").nth(1)).to_have_text("7 tokens, complete; no drafts")
    history = [hello, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Go on"}]
    changed = {"max_new_tokens": 16, "temperature": 0.7, "seed": 42, "draft": False}
    assert gateway.requests[1:] == [{"messages": history, **changed}]


def test_by_keyboard_alone(page: Page, gateway: FakeGateway) -> None:
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.type("One line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and another")
    page.keyboard.press("Enter")
    gateway.play(OPEN, commit(0, ("A", "decoded")))
    expect(page.locator(".committed")).to_have_text("A")
    assert gateway.requests[0]["messages"][0]["content"] == "One line\nand another"
    page.keyboard.press("Escape")
    expect(page.locator(".answer .note")).to_have_text("stopped")
    for _ in range(100):  # the gateway hears of it when it writes
        gateway.play(draft(1, "x"))
        if gateway.left.wait(0.05):
            break
    assert gateway.left.is_set(), "Esc ends the request"
    page.keyboard.press("Tab")  # on to the button, with a focus that is seen
    assert page.evaluate("document.activeElement.id") == "go"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()


def test_every_control_has_a_name(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea")].filter((e) =>
             !(e.labels?.length || e.textContent.trim() || e.getAttribute("aria-label"))).map((e) => e.outerHTML)"""
    )
    assert nameless == []


def test_a_screen_reader_gets_sentences(page: Page, gateway: FakeGateway) -> None:
    spoken = page.locator("[aria-live=polite] > div")
    ask(page)
    gateway.play(OPEN, commit(0, ("It", "decoded"), (" is", "accepted"), (".", "bonus")), draft(3, " No"))
    gateway.play(commit(3, (" So", "correction"), struck=1))
    expect(spoken).to_have_text(["It is."])
    gateway.play(END, None)
    expect(spoken).to_have_text(["It is.", " So"])
    assert page.locator(".chain").get_attribute("aria-hidden") == "true"
    assert page.locator(".dropped").get_attribute("aria-hidden") == "true"


def test_markup_in_an_answer_is_text(page: Page, gateway: FakeGateway) -> None:
    markup = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><b>bold</b>"
    ask(page, markup)
    gateway.play(OPEN, draft(0, markup), commit(0, (markup, "accepted")), draft(1, markup))
    expect(page.locator(".chain .ghost")).to_have_text([markup])
    gateway.play(commit(1, (markup, "correction"), struck=1, choice=markup), {"type": "error", "error": markup}, None)
    expect(page.get_by_role("alert")).to_contain_text(markup)
    assert page.locator(".committed").text_content() == 2 * markup
    assert page.locator("img, .answer script, .answer b, #panel img").count() == 0
    assert page.title() == "WISP"
    refused = page.evaluate("() => { try { document.body.innerHTML = '<i>x</i>'; } catch (e) { return e.name; } }")
    assert refused == "TypeError", "the page's policy refuses texts as HTML"


FAILURES = {
    "refused": ((422, {"error": "the conversation is too long"}), "The request was refused: the conversation is too"),
    "overloaded": ((429, {"error": "8 requests run"}), "Too many requests at once; try again in a moment: 8 requests"),
    "away": ((503, {"error": "no server at 127.0.0.1:8001"}), "The server is away: no server at 127.0.0.1:8001"),
    "no reason": ((500, {}), "The gateway answered with status 500."),
}


@pytest.mark.parametrize(("refusal", "message"), FAILURES.values(), ids=FAILURES)
def test_a_refusal_is_said_in_plain_words(
    page: Page, gateway: FakeGateway, refusal: tuple[int, dict[str, str]], message: str
) -> None:
    gateway.refusal = refusal
    ask(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text(message)
    gateway.refusal = None
    gateway.play(OPEN, commit(0, ("Hi", "decoded")), END, None)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer .text")).to_have_text(["Hi"])
    expect(page.get_by_role("alert")).to_have_count(0)
    assert gateway.requests[0] == gateway.requests[1]


BROKEN = {
    "ends early": ((OPEN, None), "The answer broke off: the connection was lost."),
    "error": ((OPEN, {"type": "error", "error": "the server is overloaded"}, None), "the server is overloaded"),
    "no JSON": (("data: {]\n\n", None), "The stream was not understood"),
}


@pytest.mark.parametrize(("events", "message"), BROKEN.values(), ids=BROKEN)
def test_a_stream_that_breaks_is_told(page: Page, gateway: FakeGateway, events: tuple[Any, ...], message: str) -> None:
    ask(page)
    gateway.play(*events)
    expect(page.get_by_role("alert")).to_contain_text(message)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_it_says_what_it_waits_for(page: Page, gateway: FakeGateway) -> None:
    page.clock.install()
    ask(page)
    gateway.play(OPEN)
    expect(page.locator(".answer")).to_have_count(1)
    page.clock.run_for(2500)
    expect(page.locator(".answer .note")).to_have_text("waiting for the server")
    gateway.play(commit(0, ("Hi", "decoded")))
    expect(page.locator(".answer .note")).to_have_text("")
    gateway.play(END, None)


def test_pieces_of_events_are_joined(page: Page, gateway: FakeGateway) -> None:
    """Events cut anywhere, CRLF, comments: as the format allows."""
    ask(page)
    text = json.dumps(commit(0, ("né", "decoded")), ensure_ascii=False)
    gateway.play(": hello\r\n\r\n", "data: ", text[:40], text[40:], "\r\n", "\r\n", END, None)
    expect(page.locator(".answer .text")).to_have_text("né")


def test_it_says_when_server_or_gateway_is_away(page: Page, gateway: FakeGateway) -> None:
    state = page.locator("#state")
    expect(state).to_have_text("ready")
    expect(page.locator("#model")).to_have_text("SmolLM2-135M-Instruct")
    gateway.health = 503
    page.reload()
    expect(state).to_have_text("server away")
    gateway.health = 200
    expect(state).to_have_text("ready")  # found out by itself
    page.route("**/ui/stream", lambda route: route.abort())
    page.route("**/health", lambda route: route.abort())
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("Is wisp-edge serve still running?")
    expect(state).to_have_text("gateway away")


def test_a_phone_sized_window(page: Page, gateway: FakeGateway) -> None:
    page.set_viewport_size(PHONE)
    ask(page)
    long = ("word ", "accepted"), ("x" * 300, "correction"), ("\n    indented", "bonus")
    gateway.play(OPEN, commit(0, *(60 * long)), draft(180, *(20 * ("y" * 80,))))
    expect(page.locator(".chain .ghost")).to_have_count(20)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("group", name="WDT share").focus()
    wide = page.evaluate(
        """() => [document.documentElement.scrollWidth, document.documentElement.scrollHeight,
                  document.querySelector("#chat").scrollWidth - document.querySelector("#chat").clientWidth]"""
    )
    assert wide == [PHONE["width"], PHONE["height"], 0]
    outside = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, .tile, .tip, #legend li")]
             .filter((e) => e.getClientRects().length).map((e) => [e, e.getBoundingClientRect()])
             .filter(([e, r]) => !e.closest("#chat") && (r.left < 0 || r.right > innerWidth || r.bottom > innerHeight))
             .map(([e]) => e.outerHTML)"""
    )
    assert outside == []
    page.keyboard.press("Escape")  # stops
    page.keyboard.press("Escape")  # closes the settings
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".answer")).to_have_count(0)
    assert page.locator("#chat").bounding_box()["height"] > 200, "room to read"


def test_motion_and_colours_follow_the_users_wishes(browser: Browser, gateway: FakeGateway) -> None:  # noqa: F811
    papers = set()
    for scheme, motion in (("light", "no-preference"), ("dark", "reduce")):
        context = browser.new_context(color_scheme=scheme, reduced_motion=motion)
        page = context.new_page()
        page.goto(gateway.url)
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert contrast_faults(page) == []
        ask(page)
        gateway.play(OPEN, draft(0, "a"), commit(0, ("b", "correction"), struck=1))
        expect(page.locator(".committed")).to_have_text("b")
        name = page.locator(".caret").evaluate("e => getComputedStyle(e).animationName")
        assert (name == "none") == (motion == "reduce")
        gateway.play(END, None)
        context.close()
    assert len(papers) == 2


def contrast_faults(page: Page) -> list[str]:
    """Texts of the legend and the panel whose contrast (WCAG 2) is below 4.5."""
    return page.evaluate(
        """() => {
          const channels = (text) => text.match(/[\\d.]+/g).map(Number);
          const light = (text) => channels(text).slice(0, 3).map((c) => c / 255)
            .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
          const paper = (e) => {
            for (; e; e = e.parentElement) {
              const color = getComputedStyle(e).backgroundColor;
              if (channels(color)[3] !== 0) return color;
            }
          };
          return [...document.querySelectorAll("#legend span, .name, .value, #welcome div, #state, .keys, #go")]
            .filter((e) => e.getClientRects().length && e.textContent.trim())
            .map((e) => [e.textContent, light(getComputedStyle(e).color), light(paper(e))])
            .filter(([, a, b]) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5).map(([text]) => text);
        }"""
    )
