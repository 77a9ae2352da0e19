"""The live page in a real browser, before a real stack: what an operator sees and does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from tests.e2e.test_serve import MODEL, SMALL, Serve, free_port

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
WAIT_SECONDS = 20
PHONE = {"width": 360, "height": 780}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium, or CHROMIUM=PATH")


@pytest.fixture(scope="module")
def stack() -> Iterator[Serve]:
    serve = Serve(*SMALL)
    try:
        yield serve
    finally:
        serve.stop()
        serve.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, errors: bool = False, **options: Any) -> Iterator[Page]:
    """The page, ready. errors: the browser is expected to complain (a status of 401, a connection that broke)."""
    context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
    context.set_default_timeout(1000 * WAIT_SECONDS)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith(url) else None)
    try:
        page.goto(f"{url}/ui")
        yield page
    finally:
        context.close()
    assert errors or not said


def load(stack: Serve, count: int = 6) -> None:
    """Some requests, long enough to be split."""
    for number in range(count):
        prompt = f"{number} import os\n" * 40
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 24, "ignore_eos": True}
        assert httpx.post(f"{stack.url}/v1/completions", json=body, timeout=60).status_code == 200


def fleet(stack: Serve) -> Any:
    return httpx.get(f"{stack.url}/debug/fleet").json()


def never_ends(route: Route) -> None:
    """The chat's request, with an answer that only its reader can end before the context does."""
    body = {**json.loads(route.request.post_data or ""), "ignore_eos": True}
    route.continue_(post_data=json.dumps(body))


def test_figures_cards_and_rows_appear_as_requests_pass(stack: Serve, browser: Browser) -> None:
    with opened(browser, stack.url) as page:
        expect(page.locator("#health-text")).to_have_text("Serving")
        expect(page.locator(".card .name")).to_have_text(["router", "prefill-0", "arena", "decode-0"])
        load(stack)
        expect(page.locator(".requests tbody tr").first).to_contain_text("done, at its limit")
        expect(page.locator(".requests tbody tr").first).to_contain_text("24")
        expect(page.locator(".figure .value").first).to_contain_text("s")  # ms, or s
        page.wait_for_function("document.querySelectorAll('.chart .first').length == 4")
        page.wait_for_function("document.querySelector('.flow.is-tokens.is-on')")
        cached = page.locator(".of-decode .card .bar .soft")
        page.wait_for_function("node => node.clientWidth > 0", arg=cached.element_handle())
        page.locator(".of-decode .card").click()
        expect(page.get_by_role("dialog")).to_contain_text(stack.child("decode-0").grpc_address)


def test_an_answer_streams_and_stopping_it_frees_the_engine(stack: Serve, browser: Browser) -> None:
    with opened(browser, stack.url) as page:
        page.route("**/v1/chat/completions", never_ends)
        page.get_by_text("Sampling and system prompt").click()
        page.get_by_label("Most tokens").fill("1900")
        page.get_by_label("Temperature").fill("0.7")
        page.get_by_label("System prompt").fill("You are brief.")
        page.get_by_label("Message").fill("What does os.path.join do?")
        with page.expect_request("**/v1/chat/completions") as asked:
            page.keyboard.press("Enter")
        sent: Any = asked.value.post_data_json
        assert [message["role"] for message in sent["messages"]] == ["system", "user"]
        assert (sent["temperature"], sent["max_tokens"]) == (0.7, 1900)
        expect(page.locator(".turn.is-model .text")).not_to_be_empty()
        with stopped(
            stack.child("decode-0").pid
        ):  # it would be done in two seconds, and a busy machine's browser is slow
            expect(page.locator(".log")).to_have_attribute("aria-busy", "true")
            page.get_by_role("button", name="Stop").click()
            expect(page.locator(".turn.is-model .meta")).to_contain_text("stopped")
        deadline = time.monotonic() + WAIT_SECONDS
        while any(worker["num_running"] for worker in fleet(stack)["workers"]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (last, *_) = fleet(stack)["requests"]
        assert last["outcome"] == "closed" and 0 < last["num_output_tokens"] < 1900
        page.get_by_role("button", name="Where its time went").click()
        expect(page.get_by_role("dialog")).to_contain_text("Why there")


def test_a_request_is_opened_and_closed_by_keyboard(stack: Serve, browser: Browser) -> None:
    load(stack, 1)
    with opened(browser, stack.url) as page:
        page.keyboard.press("Tab")
        expect(page.locator(":focus")).to_have_text("Skip to the fleet")
        page.keyboard.press("Enter")
        button = page.locator(".requests tbody button").first
        for _ in range(20):  # past the workers' cards
            page.keyboard.press("Tab")
            if button.evaluate("node => node === document.activeElement"):
                break
        assert button.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        sheet = page.get_by_role("dialog")
        expect(sheet).to_contain_text("First token predicted after")
        expect(sheet.locator(".candidate.is-best")).to_contain_text("decode-0")
        page.keyboard.press("Escape")
        expect(sheet).to_be_hidden()
        expect(button).to_be_focused()


def test_spans_and_the_parts_of_the_first_token_are_drawn(stack: Serve, browser: Browser) -> None:
    load(stack, 1)
    found = httpx.get(f"{stack.url}/debug/route/{fleet(stack)['requests'][0]['id']}").json()
    found[0]["timings"] = {"tokenize": 1.0, "place": 0.5, "queue": 2.5, "prefill": 30.0, "relay": 6.0, "ttft": 40.0}
    found[0]["spans"] = [
        {"name": "http.request", "service": "router", "start_ms": 0, "duration_ms": 100, "parent": None},
        {
            "name": "kv.fetch",
            "service": "decode",
            "start_ms": 25,
            "duration_ms": 50,
            "parent": 0,
            "attributes": {"bytes": 4096, "transport": "<b>shm</b>"},
        },
    ]
    with opened(browser, stack.url) as page:
        page.route("**/debug/route/**", lambda route: route.fulfill(json=found))
        page.locator(".requests tbody button").first.click()
        sheet = page.get_by_role("dialog")
        expect(sheet.get_by_role("heading", name="First token after 40 ms")).to_be_visible()
        expect(sheet.locator(".terms").first).to_contain_text("prefill 30 ms")
        track = sheet.locator(".span .track").nth(1)
        box, piece = track.bounding_box(), track.locator(".piece").bounding_box()
        assert box and piece
        assert (piece["x"] - box["x"]) / box["width"] == pytest.approx(0.25, abs=0.01)
        assert piece["width"] / box["width"] == pytest.approx(0.5, abs=0.01)
        sheet.locator("summary").click()
        expect(sheet.locator(".span dd").last).to_have_text("<b>shm</b>")


def test_dark_is_the_systems_choice_until_somebody_makes_another(stack: Serve, browser: Browser) -> None:
    with opened(browser, stack.url, color_scheme="dark") as page:

        def brightness() -> int:
            return int(page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))

        expect(page.locator("#health-text")).to_have_text("Serving")
        assert brightness() < 40
        assert page.evaluate(FAINT_TEXTS) == []
        page.get_by_role("button", name="Dark theme").click()
        assert brightness() > 200
        page.reload()
        assert brightness() > 200


def test_everything_has_a_name_and_can_be_read(stack: Serve, browser: Browser) -> None:
    load(stack, 1)
    with opened(browser, stack.url) as page:
        expect(page.locator(".requests tbody tr").first).to_be_visible()
        page.get_by_text("Sampling and system prompt").click()
        assert page.evaluate(NAMELESS) == []
        assert page.evaluate(FAINT_TEXTS) == []
        assert page.locator("h1").count() == 1
        assert page.evaluate("document.documentElement.lang") == "en"
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(node => node.id)")
        assert len(ids) == len(set(ids))


def test_a_phone_scrolls_down_only_and_a_still_page_stays_still(stack: Serve, browser: Browser) -> None:
    load(stack, 2)
    with opened(browser, stack.url, viewport=PHONE, reduced_motion="reduce") as page:
        expect(page.locator(".requests tbody tr").first).to_be_visible()
        page.get_by_text("Sampling and system prompt").click()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.locator(".requests tbody button").first.click()
        expect(page.get_by_role("dialog")).to_contain_text("Why there")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        body = page.locator(".sheet")
        assert body.evaluate("node => node.scrollWidth - node.clientWidth") <= 0
        assert page.locator(".dots[stroke-dashoffset]").count() == 0


def test_a_router_with_keys_shows_nothing_without_one(stack: Serve, browser: Browser) -> None:
    port = free_port()
    workers = [f"--{role}={stack.child(f'{role}-0').grpc_address}" for role in ("prefill", "decode")]
    command = [
        sys.executable,
        "-m",
        "services.router",
        "--port=0",
        f"--http-port={port}",
        "--log-level=error",
        *workers,
    ]
    router = subprocess.Popen(command, env={**os.environ, "RELEVO_API_KEY": "right"})
    url = f"http://127.0.0.1:{port}"
    try:
        until_healthy(url)
        with opened(browser, url, errors=True) as page:
            expect(page.get_by_label("API key", exact=True)).to_be_focused()
            expect(page.locator("main")).to_be_hidden()
            page.get_by_label("API key", exact=True).fill("wrong")
            page.keyboard.press("Enter")
            expect(page.locator("#gate-error")).to_contain_text("not one of this router's")
            page.get_by_label("API key", exact=True).fill("right")
            page.keyboard.press("Enter")
            expect(page.locator(".card .name").first).to_have_text("router")
            page.get_by_role("button", name="What does os.path.join do?").click()
            expect(page.locator(".turn.is-model .meta")).to_contain_text("tok/s")
            page.reload()
            expect(page.locator("main")).to_be_visible()
            page.get_by_role("button", name="Forget key").click()
            expect(page.get_by_label("API key", exact=True)).to_be_visible()
            assert page.locator(".turn").count() == 0, "the conversation goes with the key"
    finally:
        router.send_signal(signal.SIGTERM)
        assert router.wait(20) == 0


def test_the_page_says_that_the_router_is_gone_and_finds_it_again(stack: Serve, browser: Browser) -> None:
    with opened(browser, stack.url, errors=True) as page:
        expect(page.locator("#health-text")).to_have_text("Serving")
        os.kill(stack.child("router").pid, signal.SIGKILL)  # `relevo serve` starts it again
        expect(page.get_by_role("alert")).to_contain_text("Trying again")
        expect(page.locator("#health-text")).to_have_text("Disconnected")
        expect(page.get_by_role("alert")).to_be_hidden(timeout=40_000)
        expect(page.locator("#health-text")).to_have_text("Serving")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def until_healthy(url: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


# What can be operated and has no name for those who don't see it.
NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, select, a, summary, [role=img]')]
  .filter(node => node.checkVisibility())
  .filter(node => !(node.getAttribute('aria-label') || node.labels?.length || node.textContent.trim()))
  .map(node => node.outerHTML.slice(0, 100))"""

# Texts with less contrast to what is behind them than WCAG's 4.5.
FAINT_TEXTS = """() => {
  const pen = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = color => {
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = color; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (let at = node; at; at = at.parentElement) {
      const color = rgba(getComputedStyle(at).backgroundColor);
      if (color[3] > 200) return color;
    }
    return rgba('white');
  };
  const faint = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !node.checkVisibility() || node.closest('noscript, .skip')) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(rgba(node instanceof SVGElement ? style.fill : style.color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push(`${walk.currentNode.data.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return faint;
}"""
