"""Markdown of people and models, made into HTML that cannot do anything."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feishu_bot.web.rendering import MAX_CHARS, render

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java&#115;cript:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](vbscript:msgbox)",
    "<javascript:alert(1)>",
    "![x](https://example.org/pixel.png)",
    '[x](https://example.org "onmouseover=alert(1)")',
    '[x](https://example.org/"onmouseover="alert(1))',
    '```"><script>alert(1)</script>\ncode\n```',
    "```x onclick=alert(1)\ncode\n```",
    "`<script>alert(1)</script>`",
    "<a href='https://example.org' onclick='alert(1)'>x</a>",
    "<style>*{display:none}</style>",
    "<iframe src=//example.org></iframe>",
    "<form action=//example.org><input name=password></form>",
    "[x]: javascript:alert(1)\n\n[x]",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "\\<script>alert(1)</script>",
    "<!-- --><script>alert(1)</script>",
    "a\n\n    <script>alert(1)</script>",
    "| <script>alert(1)</script> |\n|-|\n| <img src=x onerror=alert(1)> |",
]


class Found(HTMLParser):
    """The elements and attributes that a browser would make."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes = set(), []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs


ALLOWED = {
    "p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "em", "strong", "s", "del", "code", "pre", "blockquote",
    "ul", "ol", "li", "a", "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip


def check_harmless(html):
    found = Found(html)
    assert found.tags <= ALLOWED
    for name, value in found.attributes:
        assert name in {"href", "title", "rel", "target", "class", "start", "align"}, name
        if name == "href":
            assert not re.match(r"\s*(javascript|data|vbscript)", value or "", re.IGNORECASE)


@pytest.mark.parametrize("text", ATTACKS)
def test_no_text_becomes_an_element_that_does_anything(text):
    check_harmless(render(text))


@given(st.text(alphabet="<>&\"'`[]()!*_#|-=:/\\ \njavscriptonerimg1", max_size=200))
def test_nor_does_any_mixture_of_signs(text):
    check_harmless(render(text))


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**bold** and *thin*", "<p><strong>bold</strong> and <em>thin</em></p>"),
        ("one\ntwo", "<p>one<br>\ntwo</p>"),
        ("- a\n- b", "<ul>\n<li>a</li>\n<li>b</li>\n</ul>"),
        ("```python\nx < 1\n```", '<pre><code class="language-python">x &lt; 1\n</code></pre>'),
        ("**注意：**请看", "<p><strong>注意：</strong>请看</p>"),
        ("这是**“重点”**。*强调*，2 * 3 * 4", "<p>这是<strong>“重点”</strong>。<em>强调</em>，2 * 3 * 4</p>"),
        ("**「标题」**内容 **b**", "<p><strong>「标题」</strong>内容 <strong>b</strong></p>"),
        ("~~gone~~", "<p><s>gone</s></p>"),
        (
            "[a](https://example.org)",
            '<p><a href="https://example.org" target="_blank" rel="noopener noreferrer nofollow">a</a></p>',
        ),
    ],
)
def test_markdown_looks_as_it_is_meant(text, html):
    assert render(text).strip() == html


def test_a_very_long_text_is_shown_as_it_is():
    text = "**<b>** " * MAX_CHARS
    assert render(text).startswith("<pre>**&lt;b&gt;** ")


@pytest.mark.parametrize("sign", ["[", "*a ", ">", "`", "- ", "[a](", "<", "![[", "_a__b"])
def test_what_nests_deeply_ends(sign):
    check_harmless(render(sign * (MAX_CHARS // len(sign))))
