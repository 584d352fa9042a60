"""A headless Chromium, told what to do by its DevTools protocol over a pipe: nothing to install beside it."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_S = 30.0
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), " ": (32, " "), "ArrowRight": (39, "")}
REFUSING = ("/tokenize", "/v1/chat/completions", "/v1/models")
FLAGS = [
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--force-color-profile=srgb",
]  # fmt: skip
# The middle of an element, which two frames in a row show at the same place.
STEADY = """async (selector) => {
    const element = [...document.querySelectorAll(selector)].at(-1);
    element.scrollIntoView({ block: "nearest" });
    for (let before = ""; ;) {
        const { x, y, width, height } = element.getBoundingClientRect();
        if (`${x} ${y}` === before) return [x + width / 2, y + height / 2];
        before = `${x} ${y}`;
        await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
    }
}"""


class Browser:
    """A Chromium behind two pipes: messages of JSON that end in NUL."""

    def __init__(self, sender: int, receiver: int) -> None:
        self.sender, self.receiver = sender, receiver
        self.events: list[dict[str, Any]] = []
        self._rest, self._number = b"", 0

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command. What happens meanwhile is kept in `events`."""
        self._number += 1
        message = {
            "id": self._number,
            "method": method,
            "params": params,
            **({"sessionId": session} if session else {}),
        }
        left = memoryview(json.dumps(message).encode() + b"\0")
        while left:
            left = left[os.write(self.sender, left) :]
        end = time.monotonic() + TIMEOUT_S
        while True:
            found = self._message(end)
            if found.get("id") != self._number:
                self.events.append(found)
                continue
            assert "error" not in found, (method, found["error"])
            result: dict[str, Any] = found["result"]
            return result

    def _message(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self.receiver], [], [], max(0.0, end - time.monotonic()))[0], (
                "Chromium does not answer"
            )
            part = os.read(self.receiver, 1 << 20)
            assert part, "Chromium has ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    @contextmanager
    def page(self, url: str, width: int = 1100, height: int = 760) -> Iterator[Page]:
        """A page of a context of its own: no other's storage. At its end nothing has gone wrong in it."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.open(url)
        try:
            yield page
        finally:
            self.call("Target.disposeBrowserContext", browserContextId=context)


class Page:
    """A tab: scripts run in it, and it is clicked and typed at as by hand."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def js(self, code: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in found, (code, found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, code: str, timeout_s: float = TIMEOUT_S) -> Any:
        """The value of an expression once it is one that counts as true."""
        end = time.monotonic() + timeout_s
        while (found := self.js(code)) in (None, False, 0, ""):  # an element is {}
            assert time.monotonic() < end, (code, self.js("document.body.innerText"))
            time.sleep(0.02)
        return found

    def text(self, selector: str) -> str:
        """What is to be read at the last element of a selector; "" where there is none."""
        return str(self.js(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)?.textContent.trim() ?? ''"))

    def until_text(self, selector: str, part: str) -> str:
        """The text at a selector once a part is in it."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)?.textContent.trim() ?? ''"
        return str(self.until(f"({found}).includes({json.dumps(part)}) && ({found})"))

    def click(self, selector: str) -> None:
        """Click with the mouse in the middle of the last element of a selector, once it does not move any more."""
        place = self.js(f"({STEADY})({json.dumps(selector)})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def fill(self, selector: str, text: str) -> None:
        """Text in the place of what is in a field, which has the focus afterwards."""
        self.js(f"((one) => {{ one.focus(); one.select(); }})(document.querySelector({json.dumps(selector)}))")
        self.type(text) if text else self.call(
            "Input.dispatchKeyEvent", type="keyDown", key="Delete", windowsVirtualKeyCode=46
        )

    def type(self, text: str) -> None:
        """Text where the focus is."""
        self.call("Input.insertText", text=text)

    def key(self, name: str, shift: bool = False) -> None:
        """A key, pressed and let go."""
        code, text = KEYS[name]
        same = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", **same, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **same)

    def choose(self, selector: str, *files: Path) -> None:
        """Files, as if chosen in the dialog that a file field opens."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, **features: str) -> None:
        """Media features, as color_scheme="dark"."""
        values = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=values)

    def picture(self) -> bytes:
        """What is to be seen, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    @property
    def problems(self) -> list[str]:
        """Exceptions, and what the browser complained of: a broken policy, a file that did not come; not what the API refused."""
        self.js("0")
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(event["params"]["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded":
                entry = event["params"]["entry"]
                is_refusal = entry["source"] == "network" and entry["url"].endswith(REFUSING)
                if entry["level"] in ("error", "warning") and not is_refusal:
                    found.append(json.dumps(entry))
            elif event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] in ("error", "warning"):
                found.append(json.dumps(event["params"]["args"]))
        return found

    @property
    def hosts(self) -> set[str]:
        """Schemes and hosts that were asked for anything."""
        events = [e for e in self.browser.events if e.get("sessionId") == self.session]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return {"/".join(url.split("/")[:3]) for url in urls if not url.startswith(("data:", "blob:"))}


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser that keeps its files in a folder, and ends with the block."""
    assert CHROMIUM is not None
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    # It reads at 3 and writes at 4: numbers above 9 cannot be in each other's way.
    reads, writes = fcntl.fcntl(to_read, fcntl.F_DUPFD, 10), fcntl.fcntl(from_write, fcntl.F_DUPFD, 10)
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "-", *command],
            pass_fds=(reads, writes), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
    for one in (to_read, from_write, reads, writes):
        os.close(one)
    browser = Browser(to_write, from_read)
    try:
        yield browser
    finally:
        try:
            browser.call("Browser.close")
            process.wait(10)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()
        os.close(to_write)
        os.close(from_read)
