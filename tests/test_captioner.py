from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig

from capfilt.errors import CheckpointError, SpecError
from capfilt.models import sampling as draws
from capfilt.models.blip import CaptioningNetwork, initialise
from capfilt.models.captioner import Captioner
from capfilt.models.checkpoints import quiet
from capfilt.models.decoding import Rules, begin
from capfilt.models.packed import pack
from capfilt.models.preprocess import normalise
from capfilt.models.sampling import TIE_TOLERANCE
from capfilt.models.tiny import write_tiny_pair
from capfilt.spec import CaptionerCard, LocalCheckpoint, Sampling

torch.set_num_threads(1)

COUNT = 66


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pair(tmp_path_factory.mktemp("tiny"))[0]


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    colour = torch.randint(0, 256, (COUNT, 3, 1, 1), generator=generator)
    grain = torch.randint(-40, 41, (COUNT, 3, 32, 32), generator=generator)
    return (colour + grain).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def shas() -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(COUNT)]


def captioner(
    checkpoint: Path, sampling: Sampling | None = None, tie_tolerance: float = TIE_TOLERANCE, **fields: Any
) -> Captioner:
    fields = {"image_size": 32, **fields}
    card = CaptionerCard(role="captioner", name="t", checkpoint=LocalCheckpoint(path=str(checkpoint)), **fields)
    return Captioner(card, sampling or Sampling(candidates=2, max_tokens=9), "cpu", tie_tolerance)


@pytest.fixture(scope="module")
def reference(checkpoint: Path, images: Tensor, shas: list[str]) -> list[list[str]]:
    """The canonical captions: each image alone in the network, each candidate alone, nothing compared with anything."""
    alone = captioner(checkpoint, tie_tolerance=0, batch_size=1)
    return [alone.caption(images[i : i + 1], shas[i : i + 1])[0] for i in range(COUNT)]


@pytest.mark.parametrize(
    ("batch_size", "tie_tolerance"),
    [(1, TIE_TOLERANCE), *((size, tolerance) for size in (7, 64) for tolerance in (TIE_TOLERANCE, 0.02, 1e9))],
)
def test_a_row_has_its_captions_in_any_batch(
    checkpoint: Path,
    images: Tensor,
    shas: list[str],
    reference: list[list[str]],
    batch_size: int,
    tie_tolerance: float,
) -> None:
    batched = captioner(checkpoint, tie_tolerance=tie_tolerance, batch_size=batch_size)
    assert batched.caption(images, shas) == reference
    if batch_size == 1:  # alone already
        assert batched.rewritten == 0
    elif tie_tolerance == 1e9:  # every draw is a tie: every caption is written again
        assert batched.rewritten == 2 * COUNT
    elif tie_tolerance == 0.02:  # some are, so two ways of writing agree in one batch
        assert 5 < batched.rewritten < 2 * COUNT - 5


def test_a_row_has_its_captions_among_any_neighbours(
    checkpoint: Path, images: Tensor, shas: list[str], reference: list[list[str]]
) -> None:
    order = list(range(COUNT))
    random.Random(1).shuffle(order)
    batched = captioner(checkpoint, batch_size=16)
    assert batched.caption(images[order], [shas[i] for i in order]) == [reference[i] for i in order]
    some = [3, 40, 41, 9, 3]  # a picture may come twice
    assert batched.caption(images[some], [shas[i] for i in some]) == [reference[i] for i in some]


def test_a_candidate_does_not_know_how_many_there_are(
    checkpoint: Path, images: Tensor, shas: list[str], reference: list[list[str]]
) -> None:
    five = captioner(checkpoint, Sampling(candidates=5, max_tokens=9)).caption(images[:9], shas[:9])
    assert [own[:2] for own in five] == reference[:9]
    assert all(len(set(own)) == 5 for own in five)


@pytest.mark.parametrize("candidates", [1, 4, 20])
@pytest.mark.parametrize("tie_tolerance", [0.0, 0.02])
def test_an_image_is_seen_once_and_candidates_are_written_together(
    checkpoint: Path, images: Tensor, shas: list[str], candidates: int, tie_tolerance: float
) -> None:
    writer = captioner(checkpoint, Sampling(candidates=candidates, max_tokens=9), tie_tolerance, batch_size=8)
    network = writer._blip.model
    seen: list[int] = []
    looked: list[int] = []
    read: list[tuple[int, ...]] = []
    network.vision_model.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    layer = network.text_decoder.bert.layers[0].crossattention.self["key"]
    layer.register_forward_pre_hook(lambda _module, args: looked.append(len(args[0])))
    network.text_decoder.bert.register_forward_pre_hook(lambda _module, args: read.append(tuple(args[0].shape)))
    writer.caption(images[:24], shas[:24])
    assert (writer.rewritten > 0) == (tie_tolerance > 0)
    assert sum(seen) == sum(looked) == 24 + writer.rewritten  # keys and values of an image are projected once
    prompt = len(writer._rules.prompt)
    prompted = [rows for rows, tokens in read if tokens == prompt]  # once for all candidates of an image
    together = [8] * 3 if candidates < 20 else [3, 3, 2] * 3  # 8 texts for each image of a batch, at the most
    assert sorted(prompted, reverse=True) == sorted(together, reverse=True) + [1] * writer.rewritten
    assert max(rows for rows, tokens in read if tokens == 1) == max(together) * candidates
    assert prompt > 1


def test_a_row_beside_no_other_is_not_yet_alone(checkpoint: Path, images: Tensor, shas: list[str]) -> None:
    """Its image went through the network with another: only an image and a candidate without company are exact."""
    writer = captioner(checkpoint, Sampling(candidates=17, max_tokens=9), 1e9, batch_size=2)  # candidates by 16 and 1
    writer.caption(images[:4], shas[:4])
    assert writer.rewritten == 4 * 17


def test_a_nucleus_wider_than_the_race(
    checkpoint: Path, images: Tensor, shas: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many tokens race changes no caption: where more may be in the nucleus, they do."""
    sampling = Sampling(candidates=2, max_tokens=9, temperature=2.0)
    expected = captioner(checkpoint, sampling).caption(images[:20], shas[:20])
    monkeypatch.setattr(draws, "WIDTH", 2)
    assert captioner(checkpoint, sampling).caption(images[:20], shas[:20]) == expected


def test_what_a_caption_depends_on(
    checkpoint: Path, images: Tensor, shas: list[str], reference: list[list[str]]
) -> None:
    assert len({text for own in reference for text in own}) > 1.9 * COUNT
    same = captioner(checkpoint)
    other_picture = same.caption(images[1:9], shas[:8])
    other_sha = same.caption(images[:8], shas[1:9])
    other_seed = captioner(checkpoint, Sampling(candidates=2, max_tokens=9, seed=1)).caption(images[:8], shas[:8])
    for other in (other_picture, other_sha, other_seed):
        assert sum(a == b for a, b in zip(other, reference[:8], strict=True)) <= 1


def test_sha_as_bytes_and_memory_layout(
    checkpoint: Path, images: Tensor, shas: list[str], reference: list[list[str]]
) -> None:
    interleaved = images.to(memory_format=torch.channels_last)
    assert captioner(checkpoint).caption(interleaved, [bytes.fromhex(sha) for sha in shas]) == reference


@pytest.mark.parametrize("prompt", ["a picture of ", ""])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_cold_sampling_is_transformers_greedy_search(
    checkpoint: Path, images: Tensor, shas: list[str], prompt: str, penalty: float
) -> None:
    """Prompt, positions, cache, penalty, minimum length and the end: all as transformers does it."""
    sampling = Sampling(temperature=1e-5, top_p=1, repetition_penalty=penalty, min_tokens=5, max_tokens=14)
    ours = captioner(checkpoint, sampling, 0, prompt=prompt)
    with quiet():
        theirs = BlipForConditionalGeneration.from_pretrained(checkpoint, local_files_only=True).eval()
    for model in (ours._blip.model, theirs):
        model.text_decoder.cls.predictions.bias.data[ours._blip.sep] += 2.5  # greedy captions end, some early
    prompt_ids = torch.tensor([[*ours._rules.prompt, 0]])  # generate() cuts the last, meant for [SEP]
    with quiet(), torch.inference_mode():
        ids = theirs.generate(
            pixel_values=normalise(images[:20], torch.float32),
            input_ids=prompt_ids.repeat(20, 1),
            do_sample=False,
            repetition_penalty=penalty,
            min_new_tokens=5,
            max_new_tokens=14,
            suppress_tokens=ours._rules.banned_V.nonzero().flatten().tolist(),
        )
    new = ids[:, len(ours._rules.prompt) :].tolist()
    expected = [ours._text([token for token in row if token not in (ours._blip.sep, ours._blip.pad)]) for row in new]
    assert [own[0] for own in ours.caption(images[:20], shas[:20])] == expected
    assert len({len(text.split()) for text in expected}) > 2


@pytest.mark.parametrize("beams", [1, 3])
def test_descriptions_are_transformers_search(checkpoint: Path, images: Tensor, beams: int) -> None:
    """Whatever the batch; and the sampler's temperature, nucleus and seed do not matter."""
    plain = Sampling(min_tokens=2, max_tokens=12, repetition_penalty=1.1)
    hot = plain.model_copy(update={"temperature": 5.0, "top_p": 0.2, "seed": 3, "candidates": 2})
    ours = captioner(checkpoint, plain)
    with quiet(), torch.inference_mode():
        theirs = BlipForConditionalGeneration.from_pretrained(checkpoint, local_files_only=True).eval()
        ids = theirs.generate(
            pixel_values=normalise(images[:20], torch.float32),
            input_ids=torch.tensor([[*ours._rules.prompt, 0]]).repeat(20, 1),
            do_sample=False,
            num_beams=beams,
            repetition_penalty=1.1,
            min_new_tokens=2,
            max_new_tokens=12,
            suppress_tokens=ours._rules.banned_V.nonzero().flatten().tolist(),
        )
    new = ids[:, len(ours._rules.prompt) :].tolist()
    expected = [ours._text([token for token in row if token not in (ours._blip.sep, ours._blip.pad)]) for row in new]
    assert len(set(expected)) > 5
    for writer in (ours, captioner(checkpoint, plain, batch_size=2), captioner(checkpoint, hot, batch_size=7)):
        assert writer.describe(images[:20], beams=beams) == expected
    assert ours.describe(images[:0], beams=beams) == []


def test_no_marks_in_captions(checkpoint: Path, images: Tensor, shas: list[str]) -> None:
    hot = Sampling(temperature=10, top_p=1, min_tokens=12, max_tokens=12, candidates=4)
    captions = captioner(checkpoint, hot).caption(images, shas)
    words = {word for own in captions for text in own for word in text.split()}
    assert len(words) > 200
    assert not any(mark in word for word in words for mark in ("pad]", "unk]", "cls]", "sep]", "mask]", "dec]", "enc]"))
    assert not any(word.isupper() for word in words)
    assert all(text == " ".join(text.split()) and text for own in captions for text in own)


def test_prompt_is_not_in_the_caption_and_matters(checkpoint: Path, images: Tensor, shas: list[str]) -> None:
    with_prompt = captioner(checkpoint, prompt="a picture of ").caption(images[:20], shas[:20])
    without = captioner(checkpoint, prompt="").caption(images[:20], shas[:20])
    assert with_prompt != without
    assert not any(text.startswith("a picture of") for own in with_prompt for text in own)


def test_lengths(checkpoint: Path, images: Tensor, shas: list[str]) -> None:
    short = captioner(checkpoint, Sampling(min_tokens=0, max_tokens=1, candidates=3)).caption(images, shas)
    lengths = {len(text.split()) for own in short for text in own}
    assert lengths == {0, 1}  # the end token may come at once, and the caption is empty
    long = captioner(checkpoint, Sampling(min_tokens=30, max_tokens=30))
    counts = [len(long._blip.ids(own[0])) for own in long.caption(images, shas)]
    assert max(counts) <= 30
    assert min(counts) > 20  # pieces join words: fewer tokens when read again


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_k": 5, "top_p": 1.0}, {"top_p": 0.01}])
def test_narrow_sampling(checkpoint: Path, images: Tensor, shas: list[str], settings: dict[str, Any]) -> None:
    sampling = Sampling(candidates=2, max_tokens=8, **settings)
    many, alone = captioner(checkpoint, sampling), captioner(checkpoint, sampling, 0, batch_size=1)
    assert many.caption(images[:12], shas[:12]) == alone.caption(images[:12], shas[:12])
    if settings != {"top_k": 5, "top_p": 1.0}:
        assert all(first == second for first, second in many.caption(images[:12], shas[:12]))


def test_bfloat16_writes(checkpoint: Path, images: Tensor, shas: list[str]) -> None:
    half = captioner(checkpoint, dtype="bfloat16", tie_tolerance=1e9)
    captions = half.caption(images[:5], shas[:5])
    assert half.rewritten == 0
    assert captions == half.caption(images[:5], shas[:5])  # the same batch: the same captions
    assert all(text for own in captions for text in own)


def test_nothing_to_write(checkpoint: Path) -> None:
    assert captioner(checkpoint).caption(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), []) == []


def test_misuse(checkpoint: Path, images: Tensor, shas: list[str]) -> None:
    good = captioner(checkpoint)
    with pytest.raises(ValueError, match="3 images, 2 sha256"):
        good.caption(images[:3], shas[:2])
    with pytest.raises(ValueError, match="sha256"):
        good.caption(images[:1], ["abcd"])
    with pytest.raises(ValueError, match="expected uint8"):
        good.caption(images[:1, :, :16, :16], shas[:1])
    with pytest.raises(SpecError, match=r"captioner.prompt and sampling.max_tokens: \d+ tokens.*128 positions"):
        captioner(checkpoint, Sampling(max_tokens=26), prompt="q." * 51)
    captioner(checkpoint, Sampling(max_tokens=26), prompt="q." * 50 + "x")  # 1 + 101 + 26 = 128


def test_broken_weights_are_not_captions(checkpoint: Path, images: Tensor, shas: list[str]) -> None:
    broken = captioner(checkpoint)
    broken._blip.model.vision_model.post_layernorm.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        broken.caption(images[:2], shas[:2])


def test_a_vocabulary_of_marks(checkpoint: Path, tmp_path: Path) -> None:
    marks = shutil.copytree(checkpoint, tmp_path / "marks")
    (marks / "tokenizer.json").unlink()
    size = len((marks / "vocab.txt").read_text().splitlines())
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (marks / "vocab.txt").write_text("\n".join(special + [f"[unused{i}]" for i in range(size - 7)]))
    with pytest.raises(CheckpointError, match="no words"):
        captioner(marks)


@pytest.mark.slow
def test_base_size_logits_agree_between_batch_shapes() -> None:
    """Measures TIE_TOLERANCE: random weights at base size, scaled to the entropy of a real captioner's start."""
    text = BlipTextConfig(num_attention_heads=12).to_dict()
    network = CaptioningNetwork(BlipConfig(text_config=text, vision_config=BlipVisionConfig().to_dict())).eval()
    initialise(network, torch.Generator().manual_seed(0))
    for name, weight in network.requires_grad_(False).named_parameters():
        if "word_embeddings" in name:
            weight.mul_(8)
        elif weight.dim() > 1 and "embeddings" not in name:
            weight.mul_(2.5)
    pack(network)
    banned = torch.zeros(text["vocab_size"], dtype=torch.bool)
    rules = Rules([30522, 1037, 3861, 1997], 102, banned, Sampling(max_tokens=6))

    def logits(pixels: Tensor, candidates: int) -> Tensor:
        """[images x candidates, steps, V]"""
        with torch.inference_mode():
            seen = network.vision_model(pixels)
            first, follow = begin(network.text_decoder, network.text_decoder.bert.look(seen), rules)
            rows = torch.arange(len(pixels)).repeat_interleave(candidates)
            steps = [first[rows]]
            for step, token in enumerate((2051, 2003, 5003, 1012, 2040)):
                steps.append(follow(torch.full((len(rows),), token), None if step else rows))
        return torch.stack(steps, 1)

    pixels = torch.randn(4, 3, 384, 384, generator=torch.Generator().manual_seed(1))
    alone = [logits(pixels[i : i + 1], 1) for i in range(4)]
    worst = 0.0
    for images, candidates in ((4, 1), (3, 1), (4, 3), (1, 2), (2, 5)):
        batch = logits(pixels[:images], candidates)
        error = batch - torch.cat([alone[image] for image in range(images) for _ in range(candidates)])
        worst = max(worst, (error.amax(-1) - error.amin(-1)).max().item())
    spread = alone[0].std(-1).mean().item()
    print(f"\nlogits of std {spread:.2f}: differences differ by {worst:.1e} at most between batches and alone")
    assert 3 < spread < 6
    assert 0 < worst < TIE_TOLERANCE
