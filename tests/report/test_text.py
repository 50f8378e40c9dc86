"""Names and long texts as people read them."""

import pytest

from convsim_init.report.text import (
    alternatives,
    did_you_mean,
    error_text,
    layer_name,
    printable,
    quoted,
    quoted_layer,
    shortened,
    shown,
    some,
)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("layer1.0.conv1", "layer1.0.conv1"),
        ("größe 大 😀", "größe 大 😀"),
        ('it\'s \\ "here"', 'it\'s \\ "here"'),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x1b[31m\x00\x7f", r"\x1b[31m\x00\x7f"),
        ("\u202e\u2066\u200f\ufeff", r"\u202e\u2066\u200f\ufeff"),
        ("\u2028\x85\xa0", r"\u2028\x85\xa0"),
        ("\udcff\ud800", r"\udcff\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_does_not_print_is_escaped_as_in_a_repr(text, escaped):
    assert printable(text) == escaped
    assert printable(text).isprintable()
    printable(text).encode()
    assert printable(escaped) == escaped


@pytest.mark.parametrize("length", [10, 11, 80])
@pytest.mark.parametrize("characters", [0, 1, 9, 10, 11, 12, 79, 80, 81, 3000])
def test_long_text_loses_its_middle(characters, length):
    text = "".join(chr(ord("a") + index % 26) for index in range(characters))
    short = shortened(text, length)
    assert len(short) == min(characters, length)
    head, dots, tail = short.partition("...")
    assert (
        (short == text) if characters <= length else (dots and text.startswith(head) and text.endswith(tail) and tail)
    )


def test_a_name_is_shown_in_one_short_piece():
    assert shown("") == "''"
    assert shown("a\n" * 3000, 30) == r"a\na\na\na\na\...na\na\na\na\n"
    assert shown(shown("\x1b" * 3000)) == shown("\x1b" * 3000)
    assert (layer_name(""), layer_name("\n")) == ("(the model itself)", r"\n")
    assert (quoted_layer(""), quoted_layer("0")) == ("(the model itself)", "'0'")
    assert (quoted("a\n"), quoted(3), len(quoted("x" * 3000))) == (r"'a\n'", "3", 80)


def test_an_error_is_told_by_its_kind_and_what_it_says_if_anything():
    assert error_text(ValueError("two\n lines")) == "ValueError: two lines"
    assert error_text(AssertionError()) == "AssertionError"
    assert len(error_text(ValueError("x" * 3000))) == 500


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("", ""),
        ("a", "a"),
        ("abcd", "a, b, c, d"),
        ("abcde", "a, b, c, d and 1 more"),
        ("abcdefg", "a, b, c, d and 3 more"),
    ],
)
def test_some_of_many(names, text):
    assert some(iter(names)) == text
    assert some(names, 7) == ", ".join(names)


def test_the_nearest_names_are_offered():
    known = ["conv1", "layer1.0.conv1", "head"]
    assert did_you_mean("con1", known) == ": did you mean conv1?"
    assert did_you_mean("layer1.0.cnv1", known) == ": did you mean layer1.0.conv1?"
    assert did_you_mean("LAYER1.0.Conv1", known) == ": did you mean layer1.0.conv1?"
    assert did_you_mean("xyz", known) == did_you_mean("xyz", []) == ""
    assert did_you_mean("hea\n", ["hea\n\x1b"]) == r": did you mean hea\n\x1b?"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["0"], "the convolution is '0'"),
        (["", "2"], "the convolutions are (the model itself), '2'"),
        (list("012345"), "the convolutions are '0', '1', '2', '3' and 2 more"),
    ],
)
def test_layers_are_offered_in_quotation_marks(names, text):
    assert alternatives("0.weight", names) == text
    assert alternatives("0.weight", names, "key") == text.replace("convolution", "key")


def test_names_without_end_are_compared_in_no_time():
    known = [f"{index}" + "ab" * 3000 for index in range(200)]
    assert did_you_mean("ab" * 3000, known).startswith(": did you mean ")


def test_an_error_that_has_no_text_is_told_by_its_kind():
    class MuteError(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert error_text(MuteError()) == "MuteError"
