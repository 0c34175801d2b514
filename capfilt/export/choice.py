"""Which of an image's kept texts an export takes: a pure function of texts, rule, seed and the image's sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from capfilt.schema import Source
from capfilt.spec import TextRule


@dataclass(frozen=True, slots=True)
class Caption:
    """A kept text. `captioner` is the card's name, None for the web's; `itm` the filters' mean P(match)."""

    text: str
    source: str
    captioner: str | None
    itm: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A rule, and what a mixture is drawn by."""

    rule: TextRule
    web_probability: float
    seed: int

    def of(self, captions: Sequence[Caption], best: str, sha256: str) -> Caption:
        """One of an image's kept texts.

        Args:
            captions: at least one.
            best: the text that the filter likes best, as the dataset has it.
            sha256: of the image. Copies of one image draw alike, wherever they lie.
        """
        top = next(caption for caption in captions if caption.text == best)
        web = next((caption for caption in captions if caption.source == Source.WEB), None)
        own = [caption for caption in captions if caption.source != Source.WEB]
        if web is None or self.rule in ("best", "all"):
            return top
        if self.rule == "web-first" or not own:
            return web
        return web if draw(self.seed, sha256) < self.web_probability else max(own, key=lambda caption: caption.itm)


def draw(seed: int, sha256: str) -> float:
    """A number in [0, 1) from a seed and an image."""
    digest = hashlib.blake2b(f"{seed}/{sha256}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
