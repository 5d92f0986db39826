"""Text of HTML pages by the standard library's parser, without markup, scripts and styles."""

import re
from html.parser import HTMLParser

# Elements that end a line of text, and elements whose content is no text.
_BLOCKS = re.compile(
    "address|article|aside|blockquote|br|d[dlt]|div|fig(caption|ure)|footer|form|h[1-6r]|header|li|main|nav|ol|p|pre|"
    "section|table|t[dhr]|title|ul"
)
_SILENT = frozenset(("script", "style", "template", "noscript"))


class _HTMLText(HTMLParser):
    """Collects a page's text in `parts`, with a line break before and after every block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = self.verbatim = 0  # open elements whose content is no text, or kept verbatim

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.silent += tag in _SILENT
        self.verbatim += tag == "pre"
        if _BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        # Never below 0: pages contain end tags without a start.
        self.silent = max(0, self.silent - (tag in _SILENT))
        self.verbatim = max(0, self.verbatim - (tag == "pre"))
        if _BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.silent:
            return
        if not self.verbatim:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith((" ", "\n")):
                data = data.lstrip()  # as in browsers: one space between words, none at the start of a line
        if data:
            self.parts.append(data)


def strip_html(page: str) -> str:
    """Returns the text of an HTML page without scripts and styles: one line per block, single blank lines."""
    parser = _HTMLText()
    parser.feed(page)
    parser.close()
    lines: list[str] = []
    for line in "".join(parser.parts).split("\n"):
        line = line.rstrip()
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines).strip("\n")
