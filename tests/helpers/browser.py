"""Drives a headless Chromium over the pipe of its DevTools protocol, without any further package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
_SECONDS = 60.0  # the longest wait for an answer
# The protocol's pipe is file descriptors 3 and 4. Both ends are first moved away, because they may be these two.
_LAUNCH = """
import fcntl, os, sys
for target, source in [(3, fcntl.fcntl(int(sys.argv[1]), fcntl.F_DUPFD, 10)),
                       (4, fcntl.fcntl(int(sys.argv[2]), fcntl.F_DUPFD, 10))]:
    os.dup2(source, target)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Tab:
    """A page in the browser.

    Attributes:
        requests: the addresses of all requests so far.
        messages: exceptions and console messages so far.
    """

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest = to, back, b""
        self._number, self._session = 0, ""
        self.requests: list[str] = []
        self.messages: list[str] = []

    def open(self, address: str, width: int, height: int, downloads: Path) -> None:
        """Opens an address in a window of the given size; downloads are kept in a folder."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        self.go(address)

    def go(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Returns once an expression is true."""
        end = time.monotonic() + _SECONDS
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}; {self.messages}"

    def press(self, key: str, text: str = "") -> None:
        """Presses and releases a key; `text` is what it types, if anything."""
        codes = {"Tab": 9, "Enter": 13, "Backspace": 8, "ArrowRight": 39}
        code = codes.get(key, ord(key.upper()) if len(key) == 1 else 0)
        known: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": code, "code": key}
        typed = text or ("\r" if key == "Enter" else key if len(key) == 1 else "")
        self.call("Input.dispatchKeyEvent", type="keyDown", text=typed, **known)
        self.call("Input.dispatchKeyEvent", type="keyUp", **known)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read(method)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        method, content = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(content["request"]["url"])
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.messages.append(json.dumps(content)[:500])

    def _read(self, method: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            readable, _, _ = select.select([self._back], [], [], _SECONDS)
            assert readable, f"no answer to {method}"
            more = os.read(self._back, 1 << 16)
            assert more, f"the browser ended during {method}"
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)


@contextmanager
def tab(folder: Path, address: str, *, width: int = 1000, height: int = 800) -> Iterator[Tab]:
    """Opens an address in a new browser with its profile and downloads below `folder`, and closes it at the end."""
    assert BROWSER is not None
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    words = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        "--disable-background-networking", f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe",
    ]  # fmt: skip
    words = [sys.executable, "-c", _LAUNCH, str(command_read), str(answer_write), *words]
    browser = subprocess.Popen(words, pass_fds=(command_read, answer_write), stderr=subprocess.DEVNULL)
    os.close(command_read)
    os.close(answer_write)
    try:
        page = Tab(command_write, answer_read)
        page.open(address, width, height, folder / "downloads")
        yield page
    finally:
        browser.terminate()
        browser.wait(_SECONDS)
        os.close(command_write)
        os.close(answer_read)
