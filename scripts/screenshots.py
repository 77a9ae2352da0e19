"""docs/img/ui-*.png: the live page before a real stack under some load.

    python -m scripts.screenshots

Starts `relevo serve` with two prefill and two decode workers, asks it things for a minute, and looks at the page with
chromium (Debian's, or CHROMIUM=PATH).
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
from playwright.async_api import Browser, Page, async_playwright

FOLDER = Path(__file__).parents[1] / "docs" / "img"
TEXT = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text().split()
MAX_BYTES = 300_000
NUM_CLIENTS = 5
START_SECONDS = 120
LOAD_SECONDS = 75  # before the first picture: so that the charts have something to show
WIDE = (1440, 940)
PHONE = (390, 844)


async def main() -> None:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        sys.exit("no chromium: apt-get install chromium, or CHROMIUM=PATH")
    FOLDER.mkdir(parents=True, exist_ok=True)
    async with serving() as url, asyncio.TaskGroup() as group:
        clients = [group.create_task(ask_on_and_on(url, number)) for number in range(NUM_CLIENTS)]
        await asyncio.sleep(LOAD_SECONDS)
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            await take_all(browser, url)
            await browser.close()
        for client in clients:
            client.cancel()


async def take_all(browser: Browser, url: str) -> None:
    for name, scheme in (("light", "light"), ("dark", "dark")):
        async with opened(browser, url, WIDE, scheme) as page:
            await page.get_by_role("button", name="What does os.path.join do?").click()
            await page.locator(".turn.is-model .meta", has_text="tok/s").wait_for()
            await page.locator("#message").blur()
            await take(page, f"ui-{name}")
    async with opened(browser, url, WIDE, "light") as page:
        rows = page.locator(".requests tbody tr", has_text="done").filter(has_text="prefill")
        await rows.first.get_by_role("button").click()
        await page.locator(".candidate").first.wait_for()
        await take(page, "ui-waterfall")
    async with opened(browser, url, PHONE, "dark", scale=2) as page:
        await take(page, "ui-phone")


@asynccontextmanager
async def opened(browser: Browser, url: str, size: tuple[int, int], scheme: str, scale: int = 1) -> AsyncIterator[Page]:
    page = await browser.new_page(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if scheme == "dark" else "light",
        device_scale_factor=scale,
    )
    try:
        await page.goto(f"{url}/ui")
        await page.locator(".requests tbody tr").first.wait_for()
        await asyncio.sleep(3)  # until flows have been seen
        yield page
    finally:
        await page.close()


async def take(page: Page, name: str) -> None:
    path = FOLDER / f"{name}.png"
    await page.screenshot(path=path)
    if optimizer := shutil.which("pngquant"):
        smaller = await asyncio.create_subprocess_exec(
            optimizer, "--force", "--skip-if-larger", "--output", str(path), str(path)
        )
        await smaller.wait()
    size = path.stat().st_size
    print(f"{path}: {size / 1000:.0f} KB")
    if size > MAX_BYTES:
        print(f"warning: that is more than {MAX_BYTES / 1000:.0f} KB")


async def ask_on_and_on(url: str, number: int) -> None:
    """A client: questions of different lengths, some of which begin alike."""
    draw = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while True:
            start, length = draw.randrange(0, 900, 30), draw.choice((8, 30, 120, 300))
            content = " ".join(TEXT[start : start + length])
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": draw.choice((16, 64, 160))}
            reply = await client.post("/v1/chat/completions", json=body)
            reply.raise_for_status()
            await asyncio.sleep(0.8 * draw.random())


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [
        "--prefill",
        "2",
        "--decode",
        "2",
        "--dtype",
        "float32",
        "--kv-cache-memory",
        "128MiB",
        "--kv-arena",
        "96MiB",
    ]
    command = [sys.executable, "-m", "relevo.cli", "serve", *options, "--port", str(port)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(START_SECONDS), httpx.AsyncClient() as client:
            while True:
                with suppress(httpx.TransportError):
                    if (await client.get(f"{url}/health")).status_code == 200:
                        break
                await asyncio.sleep(0.5)
        yield url
    finally:
        process.terminate()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(main())
