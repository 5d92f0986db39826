"""Text of a page without markup, in lines as a reader sees them."""

from retentive.data.html import strip_html


def test_html_keeps_the_text_only():
    page = (
        "<!DOCTYPE html><html><head><title>T &amp; U</title><style>p {}</style>"
        "<script>if (a < b) x()</script></head><body>\n  <h1>Head\n line</h1>\n<p>Some <b>bold</b>, and\n  "
        "wrapped.<br>New</p><pre>  a\n    b</pre><!-- no --><ul><li>1<li>2</ul></body>"
    )
    assert strip_html(page) == "T & U\n\nHead line\n\nSome bold, and wrapped.\nNew\n\n  a\n    b\n\n1\n2"
