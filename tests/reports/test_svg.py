import re
from xml.etree import ElementTree

from rankwise.reports.svg import colour, picture


def draw(axes) -> None:
    axes.plot([0, 1, 2], [1, 3, 2], "o-", color=colour("tuned"))
    axes.set_xlabel("cost in $ < 3 & more $")


def test_the_page_decides_the_colours():
    drawn = picture("a", "a line", draw)
    assert "var(--tuned)" in drawn
    assert "var(--muted)" in drawn
    assert not re.search(r"#[0-9a-f]{6}", drawn)


def test_a_picture_is_named_for_those_who_cannot_see_it():
    for svg in str(picture("a", "loss < 3", draw)).split("</svg>")[:-1]:
        root = ElementTree.fromstring(f"{svg}</svg>")
        assert root.get("role") == "img"
        title = root.find("title")
        assert title is not None
        assert title.text == "loss < 3"
        assert root.get("aria-labelledby") == title.get("id")


def test_words_stay_words():
    assert ">cost in $ &lt; 3 &amp; more $</text>" in picture("a", "a line", draw)
    assert "font-family" not in picture("a", "a line", draw)


def test_wide_and_narrow_are_drawn_and_one_size_serves_both():
    assert re.findall(r'class="plot (\w+)"', picture("a", "t", draw)) == ["wide", "narrow"]
    assert re.findall(r'viewBox="0 0 (\d+) (\d+)"', picture("a", "t", draw, (370, 170))) == [("370", "170")]


def test_the_same_figures_make_the_same_file():
    assert picture("a", "t", draw) == picture("a", "t", draw)
