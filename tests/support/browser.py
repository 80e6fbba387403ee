"""A headless Chromium, driven over its DevTools protocol: pages, keys, files, screenshots, complaints."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import tempfile
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from tests.support.wait import wait_until

_BOUND_S = 30.0
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}


class Browser:
    """One page of a browser of its own."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._folder = tempfile.TemporaryDirectory(prefix="latentq-chromium-", ignore_cleanup_errors=True)
        self._loop = asyncio.new_event_loop()
        self._calls = 0
        #: Errors of scripts, violated policies, failed loads.
        self.complaints: list[str] = []
        #: Words in complaints that a test means to cause.
        self.expected: list[str] = []

    def __enter__(self) -> Self:
        command = [
            self._program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--remote-debugging-port=0", f"--user-data-dir={self._folder.name}", "--no-first-run",
            "--disable-background-networking", "--hide-scrollbars", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        told = Path(self._folder.name) / "DevToolsActivePort"
        wait_until(lambda: told.exists() and told.read_text().count("\n"), timeout_s=60, what="chromium")
        port = told.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=_BOUND_S) as answer:
            page = next(item for item in json.load(answer) if item["type"] == "page")
        self._loop.run_until_complete(self._connect(page["webSocketDebuggerUrl"]))
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run_until_complete(self._disconnect())
        self._loop.close()
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    # The protocol ---------------------------------------------------------------------------------------

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One call of the protocol."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, params), _BOUND_S))

    def js(self, expression: str) -> Any:
        """What an expression (also a promise) comes to in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    # What a person does ---------------------------------------------------------------------------------

    def open(self, url: str) -> None:
        """Goes to a page."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def until(self, expression: str) -> Any:
        """Waits until an expression is true in the page."""
        return wait_until(lambda: self.js(expression), timeout_s=_BOUND_S, what=f"{expression} in {self.text()[:1500]}")

    def text(self) -> str:
        """What can be read on the page."""
        return str(self.js("document.body?.innerText ?? ''"))

    def press(self, key: str) -> None:
        """A key."""
        code = _KEYS[key]
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **more)

    def type(self, text: str) -> None:
        """Types into what has the focus."""
        self.call("Input.insertText", text=text)

    def focus(self, selector: str) -> None:
        """Reaches an element with the Tab key, as someone without a mouse would."""
        for _ in range(80):
            if self.js(f"document.activeElement?.matches({json.dumps(selector)}) ?? false"):
                return
            self.press("Tab")
        raise AssertionError(f"{selector} cannot be reached with the keyboard")

    def choose_file(self, selector: str, path: Path) -> None:
        """Chooses a file."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def look(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """The size of the screen, and whether it is dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """The page as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def forget(self) -> None:
        """Begins a test: nothing was complained about, nothing is expected."""
        self.complaints.clear()
        self.expected.clear()

    def surprises(self) -> list[str]:
        """Complaints that were not expected."""
        return [item for item in self.complaints if not any(words in item for words in self.expected)]

    # Inside ---------------------------------------------------------------------------------------------

    async def _connect(self, url: str) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(url, max_msg_size=1 << 28)

    async def _disconnect(self) -> None:
        await self._socket.close()
        await self._session.close()

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._calls += 1
        number = self._calls
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return dict(message["result"])
            self._heard(message)

    def _heard(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"])[:500])
        elif message.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
