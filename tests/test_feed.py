"""Pairs to batches: order, what is passed over, views and texts that the seed decides, and taking up again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import jpeg

from capfilt.errors import TrainingError
from capfilt.examples import Pair
from capfilt.images import decode
from capfilt.models.feed import Feed, Place, Texts
from capfilt.models.preprocess import normalise, resize
from capfilt.models.tokenizer import bert_tokenizer
from capfilt.spec import Augment, Images

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "picture", "of"]
TOKENIZER = bert_tokenizer({word: number for number, word in enumerate(WORDS)})
TEXTS = Texts(TOKENIZER, cls=2, sep=3, pad=0, max_tokens=6)


def pair(number: int, *texts: str) -> Pair:
    data = jpeg(number)
    return Pair(data, hashlib.sha256(data).digest(), texts or ("a red cat",))


def feed(batch: int, **changes: Any) -> Feed:
    given = {"random_views": None, "seed": 0, "limits": Images(), "threads": 2, "device": torch.device("cpu")}
    return Feed(changes.pop("texts", TEXTS), 16, batch, **{**given, **changes})


def numbered(pairs: list[Pair | None], epoch: int = 0, start: int = 0) -> Iterator[tuple[Place, Pair | None]]:
    for row, one in enumerate(pairs[start:], start + 1):
        yield Place(epoch, row), one


def test_a_text_keeps_its_ends() -> None:
    assert TEXTS.ids("A red, red CAT!") == [2, 5, 6, 1, 6, 3]
    assert TEXTS.ids("") == [2, 3]
    assert Texts(TOKENIZER, 2, 3, 0, 8, prompt=(5, 9, 10)).ids("blue cat") == [2, 5, 9, 10, 7, 8, 3]
    assert Texts(TOKENIZER, 2, 3, 0, 99, words=2).ids("red cat blue cat") == [2, 6, 8, 3]


def test_batches_come_in_order_and_a_rest_is_left() -> None:
    pairs: list[Pair | None] = [pair(n, ["red", "a blue cat"][n % 2]) for n in range(7)]
    got = list(feed(3).batches(numbered(pairs)))
    assert [place for _, place in got] == [Place(0, 3), Place(0, 6)]
    first = got[0][0]
    assert first.ids.tolist() == [[2, 6, 3, 0, 0], [2, 5, 7, 8, 3], [2, 6, 3, 0, 0]]
    assert first.mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert first.image_ids.tolist() == [one.image_id for one in pairs[:3] if one]
    expected = torch.stack([resize(decode(one.image, Images()).rgb, 16) for one in pairs[:3] if one])
    assert torch.equal(first.pixels, normalise(expected, torch.float32))


def test_what_cannot_be_used_is_passed_over() -> None:
    bad = Pair(b"<html>", bytes(32), ("a cat",))
    pairs: list[Pair | None] = [None, pair(0), bad, None, pair(1), bad, pair(2), pair(3), None]
    got = list(feed(2).batches(numbered(pairs)))
    assert [place.row for _, place in got] == [5, 8]
    assert [batch.image_ids.tolist() for batch, _ in got] == [
        [pair(n).image_id for n in own] for own in ((0, 1), (2, 3))
    ]
    assert list(feed(2).batches(numbered([bad, None]))) == []


def test_a_text_of_which_nothing_is_left_is_passed_over() -> None:
    """It would be trained on as [CLS][SEP], which says nothing of the image."""
    nothing = [pair(n, text) for n, text in enumerate(["!!!", "   ", "#", "\u200b", "\x00"])]
    pairs: list[Pair | None] = [*nothing, pair(5), pair(6, "red")]
    for texts in (TEXTS, replace(TEXTS, prompt=(5, 9, 10), max_tokens=9)):
        one = feed(2, texts=texts)
        ((batch, place),) = one.batches(numbered(pairs))
        assert place == Place(0, 7)
        assert batch.image_ids.tolist() == [pair(5).image_id, pair(6).image_id]
        assert one.passed_over == {"no_text": 5}


def test_a_pair_with_an_empty_text_has_the_draw_it_had() -> None:
    pairs: list[Pair | None] = [pair(n, "red", "!!!") for n in range(40)]
    drawn = [one.text(0, 0, row) for row, one in enumerate(pairs, 1) if one]
    ((batch, _),) = feed(drawn.count("red")).batches(numbered(pairs))
    assert batch.image_ids.tolist() == [pair(n).image_id for n, text in enumerate(drawn) if text == "red"]


@pytest.mark.parametrize("views", [None, Augment()])
def test_a_resumed_feed_goes_on_as_if_it_had_not_stopped(views: Augment | None) -> None:
    pairs: list[Pair | None] = [pair(n, "red", "blue", "cat") if n % 4 else None for n in range(24)]
    whole = list(feed(3, random_views=views).batches(numbered(pairs, epoch=2)))
    place = whole[1][1]
    rest = list(feed(3, random_views=views, threads=1).batches(numbered(pairs, epoch=2, start=place.row)))
    assert len(rest) == len(whole) - 2 == 4
    for (one, _), (other, _) in zip(whole[2:], rest, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.ids, other.ids)


def test_seed_and_epoch_choose_views_and_texts() -> None:
    pairs: list[Pair | None] = [pair(n, "red", "blue") for n in range(20)]

    def batch(seed: int, epoch: int) -> Any:
        return next(feed(20, random_views=Augment(), seed=seed).batches(numbered(pairs, epoch)))[0]

    base = batch(0, 0)
    for seed, epoch in ((1, 0), (0, 1)):
        other = batch(seed, epoch)
        assert not torch.equal(base.pixels, other.pixels)
        assert not torch.equal(base.ids, other.ids)
    assert torch.equal(base.pixels, batch(0, 0).pixels)


def test_what_was_passed_over_is_counted_by_reason() -> None:
    bad = Pair(b"<html>", bytes(32), ("a cat",))
    one = feed(2)
    rows: list[Pair | None] = [pair(0), None, bad, pair(1), bad]
    assert len(list(one.batches(numbered(rows)))) == 1
    assert one.passed_over == {"no_text": 1, "not_an_image": 2}


def test_an_epoch_without_a_usable_pair_ends_in_words() -> None:
    def endless() -> Iterator[tuple[Place, Pair | None]]:
        for epoch in range(100):
            yield from numbered([None] * 5, epoch)

    with pytest.raises(TrainingError, match=r"a whole epoch holds no pair that can be used\. Rows: no_text 11"):
        list(feed(2).batches(endless()))


def test_a_pair_that_comes_twice_in_an_epoch_has_two_views() -> None:
    views = Augment(min_scale=0.5, operations=0)
    same: list[Pair | None] = [pair(0), pair(0)]
    (batch, _), *_ = feed(2, random_views=views).batches(numbered(same))
    assert not torch.equal(batch.pixels[0], batch.pixels[1])
