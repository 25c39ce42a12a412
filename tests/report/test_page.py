"""A page is complete in itself, and no text of others acts in it."""

import base64
import re
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from minigpt4_runtime.report import chart
from minigpt4_runtime.report.page import (
    Card,
    CardText,
    Gallery,
    Paragraph,
    Span,
    plain,
    render,
    thumbnail,
)
from minigpt4_runtime.report.table import Column, Table

EVIL = '<script>alert(\'x\')</script> " onerror="y" & <b>'


VOID = {"meta", "img", "source"}


class Reader(HTMLParser):
    """Collects tags, addresses and text, and checks that every tag is closed in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.text, self.open = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in {"src", "srcset", "href"}]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page():
    picture = thumbnail(Image.new("RGB", (900, 300), "red"))
    return render(
        EVIL,
        [
            Paragraph(EVIL),
            Table((Column(EVIL), Column("n", ".1f")), ((EVIL, 0.25),), caption=EVIL),
            chart.draw(EVIL, lambda axes: axes.bar([EVIL, "$x^2$"], [1, 2])),
            Gallery(
                EVIL,
                (
                    Card(EVIL, (CardText(EVIL, plain(EVIL), is_best=True),), picture),
                    Card(
                        "no picture", (CardText("", (Span(EVIL, "removed"), Span(EVIL, "added"))),)
                    ),
                ),
            ),
        ],
    )


def test_everything_is_escaped(page):
    read = Reader(page)
    assert "script" not in read.tags
    assert "b" not in read.tags
    # Title, heading, paragraph, caption, heading of a column, cell, caption of the plot, heading of
    # the gallery, card, label, and the three texts.
    assert sum(text == EVIL for text in read.text) == 13


def test_nothing_comes_from_elsewhere(page):
    addresses = Reader(page).addresses
    assert len(addresses) == 3  # A picture, and a plot for the light and for the dark.
    assert all(address.startswith("data:image/") for address in addresses)
    assert "http" not in re.sub(r'"data:[^"]*"', "", page).replace("http-equiv", "")
    assert "default-src 'none'" in page


def test_the_page_is_made_for_phones_and_for_the_dark(page):
    assert 'name="viewport" content="width=device-width' in page
    assert page.count("prefers-color-scheme: dark") == 2


def test_a_thumbnail_is_small_and_keeps_its_shape():
    kind, _, content = thumbnail(Image.new("RGB", (900, 300), "red")).partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(BytesIO(base64.b64decode(content))) as small:
        assert small.size == (360, 120)


def svg_of(url):
    return base64.b64decode(url.removeprefix("data:image/svg+xml;base64,")).decode()


def test_a_plot_is_drawn_for_light_and_dark():
    drawn = chart.draw("Two bars.", lambda axes: axes.bar(["昇腾", "$5"], [1, 2]))
    light, dark = svg_of(drawn.light), svg_of(drawn.dark)
    assert "#333333" in light
    assert "#dddddd" in dark
    # Text stays text, in any script, and dollars are no formula.
    assert ">昇腾</text>" in light
    assert ">$5</text>" in light


def test_the_same_numbers_give_the_same_bytes():
    first, again = (chart.draw("", lambda axes: axes.plot([1, 3, 2])) for _ in range(2))
    assert first == again


def test_a_plot_changes_no_settings_of_others():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    chart.draw("", lambda axes: axes.plot([1, 2]))
    assert dict(mpl.rcParams) == before
