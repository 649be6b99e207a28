"""A headless Chromium, driven by the DevTools protocol over a pair of pipes: no library needed."""

import asyncio
import base64
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

PATIENCE_S = 60
"""For anything that the browser is asked: it may share two busy cores with all other tests."""
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # as root, and in containers, it has none to offer
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)


def find_chromium() -> str | None:
    """Return the path of a Chromium that is installed: CHROMIUM's, or one on the PATH."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """One process; messages are JSON, each ended by a zero byte."""

    def __init__(self, reader: asyncio.StreamReader, to_browser: int) -> None:
        self._reader = reader
        self._to_browser = to_browser
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.events: list[dict[str, Any]] = []

    async def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = len(self._answers) + 1
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await asyncio.to_thread(_write_all, self._to_browser, json.dumps(message).encode() + b"\0")
        async with asyncio.timeout(PATIENCE_S):
            told = await answer
        assert "error" not in told, f"{method}: {told['error']}"
        return told["result"]

    async def read(self) -> None:
        """Take what the browser says, until it closes."""
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
                if "id" in message:
                    self._answers[message["id"]].set_result(message)
                else:
                    self.events.append(message)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionError("the browser has gone"))

    async def page(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> "Page":
        """Open an empty page, with nothing stored from those before."""
        context = await self.ask("Target.createBrowserContext")
        target = await self.ask("Target.createTarget", url="about:blank", **context)
        attached = await self.ask("Target.attachToTarget", flatten=True, **target)
        page = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            await page.ask(f"{domain}.enable")
        await page.look(width=width, height=height, dark=dark)
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol for this tab."""
        return await self._browser.ask(method, self._session, **params)

    async def look(self, *, width: int, height: int, dark: bool) -> None:
        """Set the window's size in CSS pixels, and what the system's theme is."""
        await self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.ask("Emulation.setEmulatedMedia", features=[scheme])

    async def go(self, url: str) -> None:
        """Load `url`."""
        await self.ask("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def run(self, script: str) -> Any:
        """Return what an expression comes to; promises are awaited."""
        told = await self.ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def until(self, script: str) -> None:
        """Wait until an expression is true; the page looks at each of its frames."""
        wait = f"""new Promise((done) => {{
            const look = () => {{ if ({script}) done(true); else setTimeout(look, 20); }};
            look();
        }})"""
        try:
            await self.run(wait)
        except TimeoutError:
            text = await self.run("document.body.innerText")
            raise AssertionError(f"never came true: {script}\n{text}\n{self.complaints()}") from None

    async def press(self, key: str, *, code: int = 0, modifiers: int = 0) -> None:
        """Press and let go of a key."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            await self.ask(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code={" ": "Space"}.get(key, key),
                windowsVirtualKeyCode=code,
                modifiers=modifiers,
                **({"text": text} if text and kind == "keyDown" and not modifiers else {}),
            )

    async def type(self, text: str) -> None:
        """Type into what has the focus."""
        await self.ask("Input.insertText", text=text)

    async def picture(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        told = await self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))

    def complaints(self) -> list[str]:
        """Return errors of scripts, and what the browser logged as one, such as by the CSP."""
        found = []
        for event in self._browser.events:
            params = event["params"]
            if event.get("sessionId") != self._session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"])[:2000])
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return found

    def urls(self) -> list[str]:
        """Return all that the tab has asked the network for."""
        return [
            event["params"]["request"]["url"]
            for event in self._browser.events
            if event["method"] == "Network.requestWillBeSent"
            and event.get("sessionId") == self._session
        ]


@contextlib.asynccontextmanager
async def browser(path: str, folder: Path) -> AsyncIterator[Browser]:
    """Run a Chromium whose profile is in `folder`."""
    from_us, to_browser = os.pipe()
    from_browser, to_us = os.pipe()
    # It expects its pipes as files 3 and 4, which only a shell can promise it here.
    command = f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}'
    process = await asyncio.create_subprocess_exec(
        "/bin/bash",
        "-c",
        command,
        path,
        *_FLAGS,
        f"--user-data-dir={folder}",
        pass_fds=(from_us, to_us),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env=os.environ | {"HOME": str(folder)},
    )
    os.close(from_us)
    os.close(to_us)
    reader = asyncio.StreamReader(limit=64 << 20)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(from_browser, "rb", 0)
    )
    it = Browser(reader, to_browser)
    reading = asyncio.create_task(it.read())
    try:
        yield it
    finally:
        with contextlib.suppress(OSError, ConnectionError, TimeoutError):
            await it.ask("Browser.close")
        os.close(to_browser)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        await reading
        transport.close()


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
