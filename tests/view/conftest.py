"""A headless Chromium, driven through chromedriver's WebDriver protocol with the standard library alone."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

MISSING = (
    "this test drives a browser and found no {}: install chromium and chromium-driver "
    "(Debian: apt-get install chromium chromium-driver)"
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of an element's id
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "ArrowDown": "\ue015"}


class Browser:
    """One tab. `css` arguments are selectors of the first element that matches."""

    def __init__(self, server: str, binary: str) -> None:
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1500,950"]
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": binary, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self.server = server
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base = f"/session/{session['sessionId']}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self.server + path,
            method=method,
            data=json.dumps(body or {}).encode() if method == "POST" else None,
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path} {body}: {error.read().decode()[:500]}") from None

    def open(self, url: str) -> None:
        self.call("POST", f"{self.base}/url", {"url": url})

    def script(self, text: str, *arguments: Any) -> Any:
        return self.call("POST", f"{self.base}/execute/sync", {"script": text, "args": list(arguments)})

    def _element(self, css: str) -> str:
        found = self.call("POST", f"{self.base}/element", {"using": "css selector", "value": css})
        return str(found[ELEMENT])

    def click(self, css: str) -> None:
        self.call("POST", f"{self.base}/element/{self._element(css)}/click")

    def type(self, css: str, text: str) -> None:
        self.call("POST", f"{self.base}/element/{self._element(css)}/value", {"text": text})

    def press(self, key: str) -> None:
        actions = [{"type": kind, "value": KEYS.get(key, key)} for kind in ("keyDown", "keyUp")]
        source = {"type": "key", "id": "keyboard", "actions": actions}
        self.call("POST", f"{self.base}/actions", {"actions": [source]})

    def text(self, css: str) -> str:
        return str(self.script("return document.querySelector(arguments[0]).textContent", css))

    def texts(self, css: str) -> list[str]:
        found = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return list(self.script(found, css))

    def hash(self) -> str:
        return str(self.script("return decodeURIComponent(location.hash)"))

    def complaints(self) -> list[str]:
        """What the console holds since the last call, warnings and errors alike."""
        return [entry["message"] for entry in self.call("POST", f"{self.base}/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", f"{self.base}/screenshot")))

    def quit(self) -> None:
        self.call("DELETE", self.base)


def _program(*names: str) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(MISSING.format(names[0]))
    return found


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    driver, chromium = _program("chromedriver"), _program("chromium", "chromium-browser", "google-chrome")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    server = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            with suppress(OSError), urllib.request.urlopen(f"{server}/status", timeout=1):
                break
            time.sleep(0.1)
        tab = Browser(server, chromium)
        yield tab
        tab.quit()
    finally:
        process.terminate()
        process.wait(10)
