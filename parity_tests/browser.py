"""Chromium, headless, by the DevTools protocol over a pipe: https://chromedevtools.github.io/devtools-protocol."""

import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The browser reads commands from descriptor 3 and writes to 4; between fork and exec nothing but exec is safe in a process with threads
_START = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"


class Browser:
    """One browser; `open` shows a page in it."""

    def __init__(self, profile: Path) -> None:
        ends = [*os.pipe(), *os.pipe()]
        read, self._write, self._read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
        command = (sys.executable, "-c", _START, str(read), str(write), CHROMIUM, *flags, f"--user-data-dir={profile}")
        self._process = subprocess.Popen(command, pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (*ends, read, write):
            os.close(end)
        self._numbers, self._received, self.events = itertools.count(1), b"", []

    def call(self, method: str, session: str | None = None, **params) -> dict:
        """What a method of the protocol returns; the events that come before it are added to `events`."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, path: Path, width: int = 1200, height: int = 900) -> "Page":
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        page.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + 30
        while page.evaluate("document.readyState") != "complete":
            assert time.monotonic() < deadline, f"{path} does not load: {page.events}"
        return page

    def close(self) -> None:
        os.close(self._write)  # which ends the browser
        try:
            self._process.wait(10)
        finally:
            self._process.kill()
            os.close(self._read)

    def _next(self, seconds: float = 30) -> dict:
        while b"\0" not in self._received:
            assert select.select([self._read], [], [], seconds)[0], "the browser does not answer"
            self._received += (chunk := os.read(self._read, 1 << 16))
            assert chunk, "the browser has gone"
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)


class Page:
    """A page that is open."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **params) -> dict:
        return self._browser.call(method, self._session, **params)

    def evaluate(self, expression: str) -> object:
        """The value of a JavaScript expression, as JSON has it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """A key, as a person presses it."""
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Tab": 9}.get(key, 0)
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def click(self, element: str) -> None:
        """A click of the mouse into the middle of an element, which a JavaScript expression gives."""
        box = f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect(); return b.toJSON() }})({element})"
        b = self.evaluate(box)
        at = {"x": b["x"] + b["width"] / 2, "y": b["y"] + b["height"] / 2, "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", **at)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **at)

    @property
    def events(self) -> list[dict]:
        """All that the page has reported."""
        self.evaluate("0")  # what was reported before it has arrived with it
        return [event for event in self._browser.events if event.get("sessionId") == self._session]

    @property
    def complaints(self) -> list[dict]:
        """What stands in the console, and exceptions, and dialogs."""
        methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
        return [event for event in self.events if event["method"] in methods]

    @property
    def requests(self) -> list[str]:
        """The addresses of all requests."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
