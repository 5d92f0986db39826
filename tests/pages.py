"""Pages in a real headless Chromium, as users have them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest

pytest.importorskip("playwright", reason="a browser is driven by pip install playwright")

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from benchmarks import edge_browser

FLAGS = [*edge_browser.FLAGS, "--disable-quic", "--disable-component-update", "--disable-sync"]
FLAGS += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a microphone that beeps
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 640}
expect.set_options(timeout=20_000)


@contextmanager
def launched() -> Iterator[Browser]:
    """Launches a browser."""
    if (path := edge_browser.find_browser()) is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page, and a user's actions on it."""

    page: Page
    sent: list[dict] = field(default_factory=list)
    """Bodies of the completion requests it sent."""

    def __getitem__(self, id: str) -> Locator:
        return self.page.locator(f"#{id}")

    def settings(self, **values) -> None:
        narrow = self["more"].is_visible()
        if narrow:
            self["more"].click()
        for id, value in values.items():
            self[id].fill(str(value))
        if narrow:
            self["more"].click()

    def say(self, text: str) -> str:
        """Sends a message and returns the whole answer."""
        expect(self["send"]).to_be_visible()  # the previous answer has ended
        self["input"].fill(text)
        self.page.keyboard.press("Enter")
        expect(self["log"]).to_have_attribute("aria-busy", "false")
        return self.answers()[-1]

    def answers(self) -> list[str]:
        """Returns all answers as the model wrote them, which the page shows as Markdown."""
        return self.page.locator(".model").evaluate_all("blocks => blocks.map((block) => block.source)")

    def read(self) -> int:
        return int(self["read"].text_content().replace(",", ""))


@contextmanager
def visits(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """`visit(url, …)` opens a page; at the end checks that it contacted no other host and nothing failed."""
    with ExitStack() as stack:

        def open_page(url: str, viewport=DESK, model: str | None = "retnet", **options) -> Visit:
            context = browser.new_context(viewport=viewport, **options)
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(20_000)
            here = Visit(page)
            failures, asked = [], []
            page.on("pageerror", lambda error: failures.append(str(error)))
            page.on("console", lambda m: failures.append(m.text) if "Failed to load resource" not in m.text else None)
            page.on("request", lambda request: asked.append(request.url))
            page.on("request", lambda r: here.sent.append(r.post_data_json) if "completions" in r.url else None)
            stack.callback(lambda: check(failures, asked, url))
            page.goto(url)
            if model:
                expect(here["model"]).to_have_text(model)
            return here

        def check(failures: list[str], asked: list[str], url: str) -> None:
            assert failures == []
            assert [u for u in asked if not u.removeprefix("blob:").startswith(url)] == []

        yield open_page
