"""A headless Chromium that tests type and click in, driven over a pipe (Chrome DevTools Protocol)."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
)
# Chromium reads commands from descriptor 3 and writes to descriptor 4.
TRAMPOLINE = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execvp(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """One page of a browser.

    Args:
        folder: the folder for the browser's profile.
        address: the page.
    """

    def __init__(self, folder: Path, address: str) -> None:
        (read, self.commands), (self.events, write) = os.pipe(), os.pipe()
        inherited = [fcntl.fcntl(end, fcntl.F_DUPFD, 50) for end in (read, write)]
        flags = [*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAMPOLINE, *map(str, inherited), "chromium", *flags],
            pass_fds=inherited,
            stderr=subprocess.DEVNULL,
        )
        for end in (read, write, *inherited):
            os.close(end)
        self.number = 0
        self.received = b""
        self.session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete'")  # before, no script listens to keys

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.session = {}
        self.call("Browser.close")
        self.process.wait(30)
        os.close(self.commands)
        os.close(self.events)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Run a command of the protocol, and return its result."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while True:
            while b"\0" not in self.received:
                part = os.read(self.events, 1 << 16)
                assert part, "the browser has ended"
                self.received += part
            message, _, self.received = self.received.partition(b"\0")
            answer = json.loads(message)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> Any:
        """Return the value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(f"(value => value instanceof Node || value)({script})")):
            assert time.monotonic() < end, f"{script} is still {value!r}"
            time.sleep(0.05)
        return value

    def type(self, text: str) -> None:
        """Type a text into the focused field, and press Enter."""
        self.call("Input.insertText", text=text)
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)
