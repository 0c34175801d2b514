from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipForImageTextRetrieval

from capfilt.errors import SpecError
from capfilt.models.checkpoints import quiet
from capfilt.models.itm import ItmFilter, Score
from capfilt.models.preprocess import normalise
from capfilt.models.tiny import write_tiny_pair
from capfilt.spec import FilterCard, LocalCheckpoint
from capfilt.text import clean

torch.set_num_threads(1)

TEXTS = [
    ["a red circle", "a small blue square on a white background"],
    ["no"],
    [],
    ["zebra, 42%", "", "a dog " * 40],
    ["there is a large yellow star, on pink"],
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pair(tmp_path_factory.mktemp("tiny"))[1]


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    colour = torch.randint(0, 256, (40, 3, 1, 1), generator=generator)
    grain = torch.randint(-40, 41, (40, 3, 32, 32), generator=generator)
    return (colour + grain).clamp(0, 255).to(torch.uint8)


def itm_filter(checkpoint: Path, **fields: Any) -> ItmFilter:
    card = FilterCard(
        role="filter", name="t", checkpoint=LocalCheckpoint(path=str(checkpoint)), image_size=32, **fields
    )
    return ItmFilter(card, "cpu")


def assert_close(ours: list[list[Score]], theirs: list[list[Score]], tolerance: float = 1e-5) -> None:
    assert [len(own) for own in ours] == [len(own) for own in theirs]
    for own, other in zip(ours, theirs, strict=True):
        for one, two in zip(own, other, strict=True):
            assert one == pytest.approx(two, abs=tolerance)


@pytest.mark.parametrize("first_token", ["[CLS]", "[ENC]"])
def test_is_transformers(checkpoint: Path, images: Tensor, first_token: Any) -> None:
    """Both heads against BlipForImageTextRetrieval, a text at a time. It feeds [CLS]; [ENC] is put in by hand."""
    ours = itm_filter(checkpoint, first_token=first_token)
    with quiet():
        theirs = BlipForImageTextRetrieval.from_pretrained(checkpoint, local_files_only=True).eval()
    scores = ours.score(images[:5], TEXTS)
    expected: list[list[Score]] = [[] for _ in TEXTS]
    for image, own in enumerate(TEXTS):
        for text in own:
            ids = ours._blip.tokenizer.encode(text).ids
            cls = torch.tensor([ids[:34] + ids[-1:] if len(ids) > 35 else ids])
            first = cls.clone()
            first[0, 0] = ours._blip.enc if first_token == "[ENC]" else ours._blip.cls
            with torch.inference_mode():
                pixels = normalise(images[image : image + 1], torch.float32)
                itm = theirs(input_ids=first, pixel_values=pixels, use_itm_head=True).itm_score.softmax(-1)[0, 1]
                itc = theirs(input_ids=cls, pixel_values=pixels, use_itm_head=False).itm_score[0, 0]
            expected[image].append(Score(itm.item(), itc.item()))
    assert_close(scores, expected)


def test_first_token_matters(checkpoint: Path, images: Tensor) -> None:
    enc = itm_filter(checkpoint).score(images[:5], TEXTS)
    cls = itm_filter(checkpoint, first_token="[CLS]").score(images[:5], TEXTS)
    both = [pair for a, b in zip(enc, cls, strict=True) for pair in zip(a, b, strict=True)]
    assert all(abs(one.itm - two.itm) > 1e-3 for one, two in both)
    assert all(one.itc == pytest.approx(two.itc, abs=1e-6) for one, two in both)


def test_without_itc(checkpoint: Path, images: Tensor) -> None:
    both, alone = (itm_filter(checkpoint, itc=itc).score(images[:5], TEXTS) for itc in (True, False))
    assert alone == [[Score(score.itm, None) for score in own] for own in both]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_neighbours_and_padding_do_not_matter(checkpoint: Path, images: Tensor, batch_size: int) -> None:
    many = itm_filter(checkpoint, batch_size=batch_size)
    together = many.score(images[:5], TEXTS)
    alone = [[many.score(images[i : i + 1], [[text]])[0][0] for text in own] for i, own in enumerate(TEXTS)]
    assert_close(together, alone)
    backwards = many.score(images[:5].flip(0), TEXTS[::-1])[::-1]
    assert_close(together, backwards)


def test_scores_are_the_images_and_the_texts(checkpoint: Path, images: Tensor) -> None:
    scores = itm_filter(checkpoint).score(images[:2], [["a red circle", "a dog on the grass"]] * 2)
    assert len({round(score.itm, 4) for own in scores for score in own}) == 4
    assert len({round(score.itc, 4) for own in scores for score in own}) == 4


def test_both_decisions_occur(checkpoint: Path, images: Tensor) -> None:
    """What tests and the demo of the pipeline rest on."""
    texts = [["a small red circle on a white background"]] * 40
    scores = [own[0] for own in itm_filter(checkpoint).score(images, texts)]
    assert 0.1 < sum(score.itm >= 0.5 for score in scores) / 40 < 0.9
    assert all(0 <= score.itm <= 1 and -1 <= score.itc <= 1 for score in scores)


@pytest.mark.parametrize(("texts", "batches"), [(1, [4, 2]), (3, [12, 6]), (9, [18, 18, 18]), (40, [32, 8] * 6)])
def test_an_image_is_seen_once_and_texts_are_judged_together(
    checkpoint: Path, images: Tensor, texts: int, batches: list[int]
) -> None:
    judge = itm_filter(checkpoint, batch_size=4)
    network = judge._blip.model
    seen: list[int] = []
    looked: list[int] = []
    read: list[int] = []
    network.vision_model.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    layer = network.text_encoder.layers[0].crossattention.self["key"]
    layer.register_forward_pre_hook(lambda _module, args: looked.append(len(args[0])))
    network.text_encoder.register_forward_pre_hook(lambda _module, args: read.append(len(args[0])))
    own = [f"a dog {number}" for number in range(texts)]
    judge.score(images[:7], [own, own, own, [], own, own, own])
    assert seen == [4, 2]  # the image without texts is not seen
    assert sum(looked) == 6  # keys and values of an image are projected once
    assert read == [size for size in batches for _ in range(2)]  # with the image, and alone


def test_texts_of_other_lengths_are_read_apart(checkpoint: Path, images: Tensor) -> None:
    """A long web text does not pad the captions beside it, and images with long texts go together."""
    judge = itm_filter(checkpoint, batch_size=4)
    read: list[tuple[int, ...]] = []
    judge._blip.model.text_encoder.register_forward_pre_hook(lambda _module, args: read.append(tuple(args[0].shape)))
    short, other, long = "a dog", "a cat", "a dog " * 15
    texts = [[long, short], [other, short], [short, long], [short, other]]
    scores = judge.score(images[:4], texts)
    assert read[::2] == [(4, 4), (4, 32)]  # the shorter text of each image, then the longer
    read.clear()
    judge = itm_filter(checkpoint, batch_size=2)
    judge._blip.model.text_encoder.register_forward_pre_hook(lambda _module, args: read.append(tuple(args[0].shape)))
    again = judge.score(images[:4], texts)
    assert read[::2] == [(4, 4), (2, 4), (2, 32)]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(again), rtol=0, atol=1e-5)
    assert scores[0][0] == pytest.approx(judge.score(images[:1], [[long]])[0][0], abs=1e-5)  # and each its own


def test_a_text_that_an_image_has_twice_has_one_score(checkpoint: Path, images: Tensor) -> None:
    judge = itm_filter(checkpoint)
    scores = judge.score(images[:2], [["a dog", "a cat by the sea", "a dog"], ["a dog"]])
    assert scores[0][0] == scores[0][2] != scores[0][1]
    assert scores[1][0] != scores[0][0]


def test_nothing_to_judge(checkpoint: Path, images: Tensor) -> None:
    judge = itm_filter(checkpoint)
    assert judge.score(images[:0], []) == []
    assert judge.score(images[:3], [[], [], []]) == [[], [], []]


def test_long_texts_are_cut_and_keep_their_end(checkpoint: Path, images: Tensor) -> None:
    judge = itm_filter(checkpoint, max_tokens=8)
    words = "a red circle on a white background"  # 7 words: one too many beside [ENC] and [SEP]
    cut, same, longer = judge.score(images[:1], [[words, words.removesuffix(" background"), words + " with a dog"]])[0]
    assert cut == pytest.approx(same, abs=1e-6)
    assert cut == pytest.approx(longer, abs=1e-6)
    ids, mask = judge._tokens([words, "a"])
    assert ids.shape == (2, 8)
    assert ids[:, 0].tolist() == [judge._blip.enc] * 2
    assert [int(ids[0, -1]), int(ids[1, 2]), int(ids[1, 3])] == [judge._blip.sep, judge._blip.sep, judge._blip.pad]
    assert mask.sum(1).tolist() == [8, 3]


def test_strange_texts(checkpoint: Path, images: Tensor) -> None:
    strange = ["", "x" * 10_000, "word " * 10_000, "一只猫 على العشب", "\U0001f600" * 50, "[SEP] [ENC]", "\x00", "é"]
    for own in itm_filter(checkpoint).score(images[:2], [strange, [clean(text + "\ud800") for text in strange]]):
        assert len(own) == len(strange)
        assert all(0 <= score.itm <= 1 and -1 <= score.itc <= 1 for score in own)


@pytest.mark.parametrize("piece", ["x", "x ", "!", "一"])
def test_a_million_characters(checkpoint: Path, images: Tensor, piece: str) -> None:
    judge = itm_filter(checkpoint)
    start = time.process_time()
    judge.score(images[:1], [[piece * 1_000_000]])
    assert time.process_time() - start < 1


def test_bfloat16(checkpoint: Path, images: Tensor) -> None:
    half = itm_filter(checkpoint, dtype="bfloat16").score(images[:5], TEXTS)
    assert_close(half, itm_filter(checkpoint).score(images[:5], TEXTS), 0.05)


def test_misuse(checkpoint: Path, images: Tensor) -> None:
    judge = itm_filter(checkpoint)
    with pytest.raises(ValueError, match="2 images, texts of 1"):
        judge.score(images[:2], [["a"]])
    with pytest.raises(ValueError, match="expected uint8"):
        judge.score(images[:1].float(), [["a"]])
    with pytest.raises(SpecError, match=r"filter.max_tokens: 129 tokens.*128 positions"):
        itm_filter(checkpoint, max_tokens=129)


def test_broken_weights_are_not_scores(checkpoint: Path, images: Tensor) -> None:
    broken = itm_filter(checkpoint)
    broken._blip.model.itm_head.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        broken.score(images[:1], [["a"]])
