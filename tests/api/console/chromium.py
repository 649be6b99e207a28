"""A headless Chromium, driven by the DevTools protocol over a pair of pipes: no library needed."""

import asyncio
import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import threading
from concurrent.futures import Future
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
    """One process, of any event loop; messages are JSON, each ended by a zero byte."""

    def __init__(self, path: str, folder: Path) -> None:
        """Start the Chromium at `path`; its profile is in `folder`. Close it at the end."""
        # It expects its pipes as files 3 and 4, which a shell arranges; none of ours is that low.
        self._from_browser, to_us = _pipe()
        from_us, self._to_browser = _pipe()
        shell = f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", shell, path, *_FLAGS, f"--user-data-dir={folder}"],
            pass_fds=(from_us, to_us),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": str(folder)},
        )
        os.close(from_us)
        os.close(to_us)
        self._numbers = itertools.count(1)
        self._answers: dict[int, Future[dict[str, Any]]] = {}
        self._gone = False
        self._lock = threading.Lock()
        """Over the three above."""
        self.events: list[dict[str, Any]] = []
        self._reading = threading.Thread(target=self._read, name="chromium", daemon=True)
        self._reading.start()

    async def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its answer, be it a result or an error."""
        answer: Future[dict[str, Any]] = Future()
        with self._lock:
            number = next(self._numbers)
            if self._gone:
                raise ConnectionError("the browser has gone")
            self._answers[number] = answer
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        await asyncio.to_thread(_write_all, self._to_browser, json.dumps(message).encode() + b"\0")
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.wrap_future(answer)

    async def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        told = await self.call(method, session, **params)
        assert "error" not in told, f"{method}: {told['error']}"
        return told["result"]

    def _read(self) -> None:
        """Take what the browser says, until it closes."""
        text = b""
        while some := os.read(self._from_browser, 1 << 20):
            *messages, text = (text + some).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    with self._lock:
                        answer = self._answers.pop(message["id"])
                    if answer.set_running_or_notify_cancel():
                        answer.set_result(message)
                else:
                    self.events.append(message)
        with self._lock:
            self._gone = True
            for answer in self._answers.values():
                if answer.set_running_or_notify_cancel():
                    answer.set_exception(ConnectionError("the browser has gone"))

    def close(self) -> None:
        """End the process and wait for it; it ends by itself once its pipe is closed."""
        os.close(self._to_browser)
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reading.join(PATIENCE_S)
        assert not self._reading.is_alive(), "the browser has ended, but its pipe is open"
        os.close(self._from_browser)

    async def page(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> "Page":
        """Open an empty page, with nothing stored from those before."""
        context = await self.ask("Target.createBrowserContext")
        target = await self.ask("Target.createTarget", url="about:blank", **context)
        attached = await self.ask("Target.attachToTarget", flatten=True, **target)
        page = Page(self, attached["sessionId"], context["browserContextId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            await page.ask(f"{domain}.enable")
        await page.ask("Emulation.setFocusEmulationEnabled", enabled=True)
        await page.look(width=width, height=height, dark=dark)
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str, context: str) -> None:
        self._browser = browser
        self._session = session
        self._context = context

    async def close(self) -> None:
        """Close the tab, and forget what it stored."""
        await self._browser.ask("Target.disposeBrowserContext", browserContextId=self._context)

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

    async def go_offline(self, offline: bool) -> None:
        """Cut the tab off from the network, or connect it again."""
        rates = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        await self.ask("Network.emulateNetworkConditions", offline=offline, **rates)

    async def go(self, url: str) -> None:
        """Load `url`."""
        await self.ask("Page.navigate", url=url)
        await self.until(f"document.readyState === 'complete' && location.href === {url!r}")

    async def run(self, script: str) -> Any:
        """Return what an expression comes to; promises are awaited."""
        told = await self.ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def until(self, script: str) -> None:
        """Wait until an expression is true; the page itself looks again and again."""
        wait = f"""new Promise((done) => {{
            const look = () => {{
                try {{ if ({script}) return done(true); }} catch {{ /* not there yet */ }}
                setTimeout(look, 20);
            }};
            look();
        }})"""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not await self._came_true(wait):
                    pass  # the page was left for another
        except TimeoutError:
            text = await self.run("document.body.innerText")
            raise AssertionError(f"never true: {script}\n{text}\n{self.complaints()}") from None

    async def _came_true(self, promise: str) -> bool:
        """Return whether it did; it never does if the page that made it is left."""
        told = await self._browser.call(
            "Runtime.evaluate", self._session, expression=promise, awaitPromise=True
        )
        return "error" not in told

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
        await asyncio.to_thread(path.write_bytes, base64.b64decode(told["data"]))

    def complaints(self) -> list[str]:
        """Return errors of scripts, and what the browser logged as one, such as by the CSP.

        But no answers of 4xx: that one is asked for too early, or in vain, is no error of the page.
        """
        found = []
        for event in list(self._browser.events):
            params = event["params"]
            if event.get("sessionId") != self._session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"])[:2000])
            elif event["method"] == "Log.entryAdded":
                entry = params["entry"]
                if entry["level"] == "error" and entry["source"] != "network":
                    found.append(f"{entry['text']} {entry.get('url', '')}")
        return found

    def urls(self) -> list[str]:
        """Return all that the tab has asked the network for."""
        return [
            event["params"]["request"]["url"]
            for event in list(self._browser.events)
            if event["method"] == "Network.requestWillBeSent"
            and event.get("sessionId") == self._session
        ]


def _pipe() -> tuple[int, int]:
    """Return the ends of a pipe, as numbers of at least 10."""
    low = os.pipe()
    reading, writing = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return reading, writing


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
