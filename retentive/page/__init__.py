"""The page to chat with: files that the server hands out, and that a folder for browsers is made of."""

from pathlib import Path

PAGE = Path(__file__).parent
"""The folder of the page's files."""
FILES = sorted(file for file in PAGE.iterdir() if file.suffix in (".css", ".html", ".js", ".svg"))
