"""What captions are like: lengths, vocabulary, the most frequent, n-grams that repeat, loops.

A text's words are those of capfilt.text.clean. To compare datasets of unlike sizes, variety is also counted in a sample
of fixed size: how many different texts (words) are to be expected among so many drawn at random (Hurlbert 1971).
"""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.report.tally import ALL, WEB, Tally

LONGEST = 50
"""Words; longer texts are counted as this long."""

DRAWN_TEXTS, DRAWN_WORDS = 1_000, 10_000

NGRAMS = (2, 3, 4)

_SPAN = 4
_TOP, _EXAMPLES = 20, 8
_SHOWN = 300  # characters of a caption in a table

_WORDS = "string_split(clean, ' ')"


@dataclass(frozen=True)
class Counted:
    """What occurs how often.

    Attributes:
        total, distinct: occurrences, and kinds of them.
        drawn: different ones to be expected among DRAWN_TEXTS, or DRAWN_WORDS, at random; all if there are fewer.
        share: of the most frequent, in [0, 1].
        top: the most frequent with their counts.
    """

    total: int
    distinct: int
    drawn: float
    share: float
    top: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Captions:
    """The texts of one origin that are not empty after clean-up.

    Attributes:
        mean_words: of a text.
        lengths: texts by words, 0 to LONGEST.
        repeated: of the n-grams of all texts, the fraction that the same text holds before; by n.
        loops: texts in which one to four words come three times in a row.
        examples: some of these.
    """

    texts: Counted
    words: Counted
    mean_words: float
    lengths: tuple[int, ...]
    repeated: dict[int, float]
    loops: int
    examples: tuple[str, ...]


def measure_captions(tally: Tally) -> dict[str, Captions]:
    """By origin, the web first."""
    return _measured(tally, f"SELECT origin, clean, {_WORDS} AS words FROM texts WHERE clean <> ''")


def measure_together(tally: Tally, by_origin: dict[str, Captions]) -> Captions | None:
    """Of all captioners together; None where there is none.

    Args:
        by_origin: as :func:`measure_captions` returns them.
    """
    captioners = [own for origin, own in by_origin.items() if origin != WEB]
    if len(captioners) < 2:
        return captioners[0] if captioners else None
    texts = f"FROM texts WHERE clean <> '' AND origin <> '{WEB}'"
    return _measured(tally, f"SELECT '{ALL}' AS origin, clean, {_WORDS} AS words {texts}")[ALL]


def _measured(tally: Tally, worded: str) -> dict[str, Captions]:
    """Of a query's texts, by origin."""
    tally.ask(f"CREATE OR REPLACE VIEW worded AS {worded}")
    tally.ask("CREATE OR REPLACE TABLE counts AS SELECT origin, clean AS what, count(*) AS n FROM worded GROUP BY ALL")
    texts = _counted(tally, DRAWN_TEXTS)
    tally.ask(
        "CREATE OR REPLACE TABLE counts AS SELECT origin, what, count(*) AS n "
        "FROM (SELECT origin, unnest(words) AS what FROM worded) GROUP BY ALL"
    )
    words = _counted(tally, DRAWN_WORDS)
    lengths = _lengths(tally)
    repeated = _repeated(tally)
    loops = _loops(tally)
    return {
        origin: Captions(
            texts[origin],
            words[origin],
            words[origin].total / texts[origin].total,
            lengths[origin],
            repeated[origin],
            *loops.get(origin, (0, ())),
        )
        for origin in sorted(texts, key=lambda name: (name != WEB, name))
    }


def _counted(tally: Tally, drawn: int) -> dict[str, Counted]:
    """Of the table `counts`."""
    sums = tally.ask(
        """
        SELECT origin, any_value(total), count(*), max(n) / any_value(total),
               CASE WHEN any_value(total) <= $drawn THEN count(*) ELSE sum(1 - pow(1 - n / total, $drawn)) END
        FROM (SELECT origin, n, sum(n) OVER (PARTITION BY origin) AS total FROM counts) GROUP BY origin
        """,
        drawn=drawn,
    )
    top: dict[str, list[tuple[str, int]]] = {}
    for origin, what, n in tally.ask(
        """
        SELECT origin, left(what, $shown), n FROM counts
        QUALIFY row_number() OVER (PARTITION BY origin ORDER BY n DESC, what) <= $top ORDER BY origin, n DESC, what
        """,
        **{"shown": _SHOWN, "top": _TOP},
    ):
        top.setdefault(origin, []).append((what, n))
    return {
        origin: Counted(int(total), distinct, float(expected), float(share), tuple(top[origin]))
        for origin, total, distinct, share, expected in sums
    }


def _lengths(tally: Tally) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for origin, words, n in tally.ask(
        "SELECT origin, least(len(words), $most), count(*) FROM worded GROUP BY ALL", most=LONGEST
    ):
        found.setdefault(origin, [0] * (LONGEST + 1))[words] = n
    return {origin: tuple(counts) for origin, counts in found.items()}


def _repeated(tally: Tally) -> dict[str, dict[int, float]]:
    """A text repeats an n-gram only if it repeats one of n - 1, so that each n looks at fewer texts."""
    fractions: dict[str, dict[int, float]] = {}
    for n in NGRAMS:
        source = "worded" if n == NGRAMS[0] else f"repeats_{n - 1}"
        ngrams = f"list_transform(range(1, len(words) - {n - 2}), lambda i: array_to_string(words[i:i + {n - 1}], ' '))"
        tally.ask(
            f"CREATE OR REPLACE TABLE repeats_{n} AS SELECT * FROM "
            f"(SELECT origin, words, len(words) - {n - 1} - list_unique({ngrams}) AS again FROM {source} "
            f" WHERE list_unique(words) < len(words)) WHERE again > 0"
        )
        again = dict(tally.ask(f"SELECT origin, sum(again) FROM repeats_{n} GROUP BY origin"))
        for origin, total in tally.ask(
            f"SELECT origin, sum(greatest(0, len(words) - {n - 1})) FROM worded GROUP BY ALL"
        ):
            fractions.setdefault(origin, {})[n] = float(again.get(origin, 0)) / int(total) if total else 0.0
    return fractions


def _loops(tally: Tally) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Three times in a row: as many words as two times the span equal the one a span before. All repeat a 2-gram."""
    same = "list_transform(range(1, len(words) - {p} + 1), lambda i: if(words[i] = words[i + {p}], '1', '0'))"
    looping = " OR ".join(
        f"contains(array_to_string({same.format(p=p)}, ''), '{'1' * 2 * p}')" for p in range(1, _SPAN + 1)
    )
    tally.ask(
        "CREATE OR REPLACE TABLE loops AS "
        f"SELECT origin, array_to_string(words, ' ') AS clean FROM repeats_{NGRAMS[0]} WHERE {looping}"
    )
    counts = dict(tally.ask("SELECT origin, count(*) FROM loops GROUP BY origin"))
    examples: dict[str, list[str]] = {}
    for origin, text in tally.ask(
        "SELECT origin, left(clean, $shown) FROM (SELECT DISTINCT * FROM loops) "
        "QUALIFY row_number() OVER (PARTITION BY origin ORDER BY hash(clean)) <= $some",
        **{"shown": _SHOWN, "some": _EXAMPLES},
    ):
        examples.setdefault(origin, []).append(text)
    return {origin: (n, tuple(sorted(examples[origin]))) for origin, n in counts.items()}
