"""Rows of CSV and TSV: no quote takes another row with it."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.delimited import cut_rows
from capfilt.errors import InputError


def rows(text: str, mark: str, names: tuple[str, ...] = ()) -> list[list[str]]:
    return list(cut_rows("l", io.BytesIO(text.encode()), mark, names))


@pytest.mark.parametrize(
    ("line", "row"),
    [
        ("http://a/2\tplain\n", ["http://a/2", "plain"]),
        ('http://a/2\t"unclosed quote\n', ["http://a/2", '"unclosed quote']),
        ('http://a/2\tclosed" only\n', ["http://a/2", 'closed" only']),
        ('http://a/2\t5" nails, "best"\n', ["http://a/2", '5" nails, "best"']),
        ('http://a/2\t"so" they say\n', ["http://a/2", '"so" they say']),
        ('http://a/2\t"\n', ["http://a/2", '"']),
        ('http://a/2\t"as a ""whole"" one"\n', ["http://a/2", 'as a "whole" one']),
        ('"http://a/2"\t"a\ttab"\n', ["http://a/2", "a\ttab"]),
        ('http://a/2\t"two\nlines"\n', ["http://a/2", "two\nlines"]),
        ('http://a/2\t"two\r\n\r\nparagraphs"\r\n', ["http://a/2", "two\r\n\r\nparagraphs"]),
        ("http://a/2\t\n", ["http://a/2", ""]),
    ],
)
def test_a_quote_in_a_tsv_is_a_character_unless_a_field_is_quoted_whole(line: str, row: list[str]) -> None:
    before, after = ["url", "caption"], ["http://a/3", "z"]
    assert rows("\ufeffurl\tcaption\n\n" + line + "http://a/3\tz\n", "\t") == [before, row, after]
    assert rows("url\tcaption\n" + line.removesuffix("\n"), "\t") == [before, row]  # the last one


@pytest.mark.parametrize(
    ("mark", "text", "message"),
    [
        (",", 'url,text\nhttp://a/1,"open\nhttp://a/2,b\nhttp://a/3,c\n', "line 2 opens a quote, .* line 3 is a row"),
        (",", 'url,text\nhttp://a/1,"open\nhttp://a/2,close"\n', "line 2 opens a quote, and within it line 3 is a row"),
        (",", 'text,url\n"open,http://a/1\nclose",http://a/2\n', "line 2 opens a quote, and within it line 3 is a row"),
        (",", 'url,text\nhttp://a/1,"open\nhttp://a/2,"b, c"\n', "line 2 has 3 fields, and its header 2"),
        (",", 'url\n\n"http://a/1\nhttp://a/2\n', "line 3 opens a quote, and within it line 4 is a row of its own"),
        (",", 'url,text\nhttp://a/1,a\nhttp://a/2,"open\n', "line 3 opens a quote that nothing closes; close it"),
        (",", 'url,text\nhttp://a/1,"a\nb\nc"\nhttp://a/2\n', "line 5 has 1 field, and its header 2; mend that line"),
        ("\t", 'url\ttext\tx\nhttp://a/1\t"open\nhttp://a/2\tb\tx\n', "line 2 opens a quote, .* line 3 is a row"),
        ("\t", 'url\ttext\tx\nhttp://a/1\t"open\n', "line 2 opens a quote that nothing closes"),
        ("\t", "url\ttext\nhttp://a/1\ta\tb\n", "line 2 has 3 fields, and its header 2"),
    ],
)
def test_what_would_lose_a_row_names_its_line(mark: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rows(text, mark)


@pytest.mark.parametrize("mark", [",", "\t"])
def test_a_text_of_several_lines_may_come_first(mark: str) -> None:
    text = f'text{mark}url\n"two\nlines"{mark}http://a/1\n"three\n\nlines"{mark}"http://a/2"\nz{mark}http://a/3\n'
    assert rows(text, mark)[1:] == [["two\nlines", "http://a/1"], ["three\n\nlines", "http://a/2"], ["z", "http://a/3"]]


def test_a_text_of_several_lines_may_hold_commas_and_addresses() -> None:
    text = 'url,caption,x\nhttp://a/1,"Hello, world\nsee, please,\nhttp://b/ for more",1\nhttp://a/2,b,2\n'
    assert rows(text, ",")[1:] == [
        ["http://a/1", "Hello, world\nsee, please,\nhttp://b/ for more", "1"],
        ["http://a/2", "b", "2"],
    ]


def test_a_data_url_may_be_long() -> None:
    long = "data:image/png;base64," + "A" * 300_000
    assert rows(f'url,text\n"{long}",a\n', ",")[1] == [long, "a"]


FIELD = st.text(st.sampled_from("ab\"',\n ü"))  # of a tab in several lines of a TSV one cannot be sure


@pytest.mark.parametrize("mark", [",", "\t"])
@settings(deadline=None)
@given(texts=st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=5))
def test_what_python_writes_quoted_is_read_as_it_was(mark: str, texts: list[tuple[str, str]]) -> None:
    written = io.StringIO(newline="")
    table = [["a", "url", "b"], *([a, f"http://x/{n}", b] for n, (a, b) in enumerate(texts))]
    csv.writer(written, delimiter=mark, lineterminator="\n").writerows(table)
    assert rows(written.getvalue(), mark) == table
