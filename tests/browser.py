"""Pages in a headless Chromium, driven through its DevTools pipe: their width, their errors, what axe-core finds.

Nothing is downloaded. Chromium is looked for on the PATH; axe-core is `node_modules/axe-core/axe.min.js` of the
checkout, or the file that DINOREG_AXE names.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(os.environ.get("DINOREG_AXE", ROOT / "node_modules" / "axe-core" / "axe.min.js"))
# Rules of the WCAG and axe's own of good practice.
AUDIT = "axe.run(document, {resultTypes: ['violations']}).then(found => JSON.stringify(found.violations.map("
AUDIT += "each => [each.id, each.help, each.nodes.slice(0, 3).map(node => node.html.slice(0, 200))])))"


class Browser:
    """One tab; a context manager. `errors` are what the console and the network complained of since the last `open`."""

    def __init__(self, profile: Path) -> None:
        (read, self._out), (self._in, write) = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        command = [str(CHROMIUM), *options, "--no-first-run", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        shell = f'exec "$0" "$@" 3<&{read} 4>&{write}'
        with open(profile.with_suffix(".log"), "wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", shell, *command], pass_fds=(read, write), stdout=log, stderr=log
            )
        os.close(read)
        os.close(write)
        self._buffer, self._count, self._session = b"", 0, ""
        self.errors: list[str] = []

    def __enter__(self) -> Browser:
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)  # Chromium ends with its pipe
        self._process.wait(30)
        os.close(self._in)

    def call(self, method: str, until: str = "", **parameters: Any) -> dict[str, Any]:
        """The result of a method of the DevTools protocol, once the event `until` has come, too."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        result: dict[str, Any] | None = None
        waiting = bool(until)
        while result is None or waiting:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result = answer["result"]
            waiting = waiting and answer.get("method") != until
            self._note(answer)
        return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._in, 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _note(self, answer: dict[str, Any]) -> None:
        found = answer.get("params", {})
        if answer.get("method") == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.errors.append(found["entry"]["text"])
        elif answer.get("method") == "Runtime.exceptionThrown":
            self.errors.append(found["exceptionDetails"]["text"])
        elif answer.get("method") == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.errors.append(str(found["args"]))

    def open(self, page: Path, width: int, theme: str) -> None:
        """Show a page in a window `width` pixels wide, with the system's theme "light" or "dark"."""
        self.errors.clear()
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", until="Page.loadEventFired", url=page.resolve().as_uri())

    def value(self, expression: str) -> Any:
        """The value of JavaScript, awaited where it is a promise."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def violations(self) -> list[Any]:
        """What axe-core finds: (rule, what it asks for, the first elements that break it)."""
        self.value(f"{AXE.read_text()}; undefined")
        found: list[Any] = json.loads(self.value(AUDIT))
        return found

    def picture(self, path: Path) -> None:
        """Save the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
