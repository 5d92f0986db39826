"""Chat page: static files that the server serves, and that exports for browsers contain."""

from pathlib import Path

PAGE = Path(__file__).parent
"""Folder of the page's files."""
FILES = sorted(file for file in PAGE.iterdir() if file.suffix in (".css", ".html", ".js", ".svg"))
