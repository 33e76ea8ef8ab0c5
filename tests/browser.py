"""A real browser without a window, driven by its debugging protocol."""

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_PATIENCE_S = 60.0


class Browser:
    """One page of Chromium."""

    def __init__(self, width: int = 1280, height: int = 800) -> None:
        assert CHROMIUM
        self._stack = ExitStack()
        self._profile = self._stack.enter_context(
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        )
        command = [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-dev-shm-usage", "--disable-background-networking", "--mute-audio"),
            *("--hide-scrollbars", "--remote-debugging-port=0", f"--window-size={width},{height}"),
            *(f"--user-data-dir={self._profile}", "about:blank"),
        ]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._stack.callback(self._stop)
        try:
            self._link = self._stack.enter_context(connect(self._address(), max_size=None))
        except BaseException:
            self._stack.close()
            raise
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []
        """What the page's console and the browser say against it."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _address(self) -> str:
        """Return where the page's debugger listens."""
        port_file = Path(self._profile, "DevToolsActivePort")
        until_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until_s:
            if port_file.exists() and (lines := port_file.read_text().splitlines()):
                with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
                    for target in json.load(answer):
                        if target["type"] == "page":
                            return str(target["webSocketDebuggerUrl"])
            time.sleep(0.05)
        raise TimeoutError("Chromium does not answer")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return what the browser answers; what it says meanwhile is noted."""
        number = next(self._numbers)
        self._link.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self._link.recv(timeout=_PATIENCE_S))
            if said.get("id") == number:
                assert "error" not in said, said
                return dict(said["result"])
            self._note(said)

    def _note(self, said: dict[str, Any]) -> None:
        if said["method"] == "Log.entryAdded":
            self.complaints.append(said["params"]["entry"]["text"])
        elif said["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(said["params"]["exceptionDetails"]))
        elif said["method"] == "Network.requestWillBeSent":
            self.requests.append(said["params"]["request"]["url"])

    requests: list[str]
    """What it has asked the network for."""

    def open(self, url: str) -> None:
        """Go to a page."""
        self.requests = []
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Return a JavaScript expression's value."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        until_s = time.monotonic() + _PATIENCE_S
        while not self.evaluate(expression):
            assert time.monotonic() < until_s, expression
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                text=key if kind == "keyDown" else "",
                code=f"Key{key.upper()}",
                windowsVirtualKeyCode=ord(key.upper()),
            )

    def screenshot(self, path: Path) -> None:
        """Save a picture of what is seen."""
        picture = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(picture))
