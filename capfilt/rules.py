"""What becomes of a row whose texts are scored: the filters' verdicts, and the lists of what is kept out. Pure.

A domain keeps its subdomains out, too; both sides are compared in ASCII (IDNA). A word or phrase is whole words, of
letters, marks and digits, compared in Unicode's compatibility form without regard to case.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import idna
import regex

from capfilt.decide import Text, decide, row_outcome, withheld
from capfilt.schema import Reason, Status
from capfilt.spec import CurateSpec, KeepOut

_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+")


class Rules:
    """The rules of a spec, ready to judge rows by."""

    def __init__(self, spec: CurateSpec) -> None:
        self._thresholds, self._decision, self._keep = spec.effective_thresholds, spec.decision, spec.keep
        lists = spec.keep_out or KeepOut()
        self._least_unsafe = lists.classifier.threshold if lists.classifier else None
        self._domains = frozenset(lists.domains)
        self._phrases: dict[str, list[list[str]]] = defaultdict(list)  # by their first word
        for phrase in lists.words:
            words = words_of(phrase)
            self._phrases[words[0]].append(words)

    def judge(
        self, texts: Sequence[Text], url: str | None, unsafe: float | None = None
    ) -> tuple[list[Text], Status, Reason | None]:
        """Judge a row.

        Args:
            texts: scored, as capfilt.decide.decide takes them.
            unsafe: what the classifier says of the image, as stored.

        Returns:
            The texts with their verdicts, and the row's.

        Raises:
            ValueError: as decide.
        """
        barred = {n for n, text in enumerate(texts) if self._phrases and text.text and self.bars_text(text.text)}
        verdicts = decide(texts, self._thresholds, self._decision, self._keep, barred)
        status, reason = row_outcome(verdicts)
        if status is Status.KEPT and (out := self._bars_row(url, unsafe)):
            return withheld(verdicts, out), Status.DROPPED, out
        return verdicts, status, reason

    def _bars_row(self, url: str | None, unsafe: float | None) -> Reason | None:
        if self._domains and url and self.bars_url(url):
            return Reason.KEPT_OUT_DOMAIN
        if self._least_unsafe is not None and unsafe is not None and unsafe >= self._least_unsafe:
            return Reason.KEPT_OUT_IMAGE
        return None

    def bars_url(self, url: str) -> bool:
        """Whether a URL's host is one of the domains, or under one."""
        return any(domain in self._domains for domain in _suffixes(_host(url)))

    def bars_text(self, text: str) -> bool:
        """Whether a text has one of the words or phrases."""
        words = words_of(text)
        return any(
            words[n : n + len(phrase)] == phrase
            for n, word in enumerate(words)
            if word in self._phrases
            for phrase in self._phrases[word]
        )


def words_of(text: str) -> list[str]:
    """The words of a text, as they are compared."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words: list[str] = _WORD.findall(folded)
    return words


def _host(url: str) -> str:
    """A URL's host in ASCII; empty where it has none. One that no registry would take stays as it is."""
    try:
        host = urlsplit(url.strip()).hostname or urlsplit(f"//{url.strip()}").hostname or ""
    except ValueError:  # a bracket without its fellow
        return ""
    host = host.rstrip(".")
    try:
        return host if host.isascii() else idna.encode(host, uts46=True).decode()
    except idna.IDNAError:
        return host


def _suffixes(host: str) -> Iterator[str]:
    while host:
        yield host
        host = host.partition(".")[2]
