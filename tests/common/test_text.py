"""What a terminal would act upon or hide becomes visible; everything else stays as it was."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.text import one_line, visible, visible_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("carcinoma [nos]", "carcinoma [nos]"),
        ("Übergangs-Nävus 上皮", "Übergangs-Nävus 上皮"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b2J", r"\x9b2J"),
        ("a\rb\bc\x00", r"a\rb\x08c\x00"),
        ("abc\u202edef", r"abc\u202edef"),
        ("a\u200bb", r"a\u200bb"),
        ("half \udc80", r"half \udc80"),
        ("two\nlines\tmore\u2028still", r"two\nlines\tmore\u2028still"),
    ],
)
def test_what_a_terminal_would_act_upon_becomes_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_lines_and_tabs_of_our_own_texts_are_kept() -> None:
    assert visible_lines("error: a\n  b\tc\x1b") == "error: a\n  b\tc\\x1b"


@given(st.text(alphabet=st.characters(codec=None)))
def test_nothing_that_is_shown_is_unprintable(text: str) -> None:
    assert visible(text).isprintable()
    assert visible(visible(text)) == visible(text)
    assert all(c.isprintable() or c in "\n\t" for c in visible_lines(text))


@given(st.text(), st.integers(1, 400))
def test_a_reason_is_one_line_of_bounded_length(text: str, limit: int) -> None:
    line = one_line(text, limit)
    assert line.isprintable()
    assert len(line) <= limit
    if len(visible(text)) <= limit:
        assert line == visible(text)


def test_a_long_reason_says_that_it_was_cut() -> None:
    assert one_line("x" * 10**6) == "x" * 299 + "…"
