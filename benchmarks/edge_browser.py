"""A browser's row in `python -m benchmarks edge`: a folder of `export --to browser` in headless Chromium.

A file server sends it with the headers of an isolated page, so that the engine may use threads. The time to first token
counts from the opening of the page, with an empty cache. Memory is the engine's.
"""

import http.server
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# No background requests. No sandbox: it opens only these pages, and containers may have no user but root.
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
WORKER = Path(__file__).with_suffix(".js")
PAGE = b"<!doctype html><title>bench</title>"
TALK = """async (task) => {
  const worker = new Worker("edge_browser.js", { type: "module" }), began = performance.now(), said = {};
  task.description = await (await fetch("model.json")).json();
  return new Promise((resolve, reject) => {
    worker.onerror = (event) => reject(new Error(event.message));
    worker.onmessage = ({ data }) => {
      Object.assign(said, data);
      if (data.logits) said.first = performance.now() - began;
      if (data.reading) resolve(said);
    };
    worker.postMessage(task);
  });
}"""


def find_browser() -> str | None:
    """Path of an installed Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, an empty page and the worker."""

    def log_message(self, *_: Any) -> None:
        pass

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def do_GET(self) -> None:
        own = {"/": (PAGE, "text/html"), f"/{WORKER.name}": (WORKER.read_bytes(), "text/javascript")}.get(self.path)
        if own is None:
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", own[1])
        self.send_header("Content-Length", str(len(own[0])))
        self.end_headers()
        self.wfile.write(own[0])


def measure(folder: Path, *, prompt: int, tokens: int, steps: int) -> dict[str, Any]:
    """Measure the numbers of a row.

    Raises:
        RuntimeError: the browser failed; has its error.
    """
    from playwright.sync_api import sync_playwright

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=find_browser(), args=FLAGS)
            page = browser.new_page()
            began = time.perf_counter()
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            opened = time.perf_counter() - began
            said = page.evaluate(TALK, {"prompt": prompt, "tokens": tokens, "steps": steps})
            browser.close()
    finally:
        server.shutdown()
        server.server_close()
    return {
        "logits": said["logits"],
        "first_seconds": opened + said["first"] / 1e3,
        "read_per_second": 1e3 * tokens / said["reading"],
        "write_per_second": 1e3 * steps / said["writing"],
        "peak_bytes": said["bytes"],
        "threads": said["threads"],
    }
