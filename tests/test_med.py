"""MED and its objectives against the paper, put together once more from NumPy and transformers' modules.

The arithmetic of the losses is that of tests/test_losses.py. Networks here have width 32 and no dropout.
"""

from __future__ import annotations

import copy
import gc
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from test_losses import numpy_itc, numpy_itm, numpy_lm, numpy_negatives, numpy_targets
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig

from capfilt.errors import TrainingError
from capfilt.models import blip
from capfilt.models.blip import CaptioningNetwork, RetrievalNetwork, fill, initialise
from capfilt.models.med import (
    Batch,
    CaptionObjective,
    Losses,
    MatchObjective,
    MatchSettings,
    Med,
    PretrainObjective,
    Queue,
    Tokens,
    Twin,
    with_first,
)

torch.set_num_threads(1)
Array = np.ndarray[Any, Any]

PAD, CLS, SEP, DEC, ENC = 0, 1, 2, 38, 39
TOKENS = Tokens(enc=ENC, dec=DEC)


# Small networks and batches -------------------------------------------------------------------------------------------


def config() -> BlipConfig:
    """Two layers of width 32 that read an image of width 48 in 5 tokens; no dropout."""
    text = BlipTextConfig(
        vocab_size=40,
        hidden_size=32,
        encoder_hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        bos_token_id=DEC,
        eos_token_id=SEP,
        sep_token_id=SEP,
    )
    vision = BlipVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        attention_dropout=0.0,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )
    return BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_text_hidden_size=16)


def drawn(network: Any, seed: int = 0) -> Any:
    """The network with weights of which none is zero or one, so that its features and logits differ between rows."""
    generator = torch.Generator().manual_seed(seed)
    initialise(network, generator, std=0.25)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.train()


def random_batch(image_ids: Sequence[int], lengths: Sequence[int], seed: int, longest: int = 0) -> Batch:
    """Texts of so many tokens, [CLS] and [SEP] among them; all pairs of an image have its pixels."""
    generator = torch.Generator().manual_seed(seed)
    looks = torch.randn(max(image_ids) + 1, 3, 16, 16, generator=generator)
    longest = max(longest, *lengths)
    ids = torch.randint(SEP + 1, DEC, (len(lengths), longest), generator=generator)
    ids[:, 0] = CLS
    for row, length in enumerate(lengths):
        ids[row, length - 1], ids[row, length:] = SEP, PAD
    return Batch(looks[list(image_ids)], ids, (ids != PAD).long(), torch.tensor(image_ids))


def rows_of(batch: Batch, rows: slice, longest: int) -> Batch:
    return Batch(batch.pixels[rows], batch.ids[rows, :longest], batch.mask[rows, :longest], batch.image_ids[rows])


def texts_of(batch: Batch, first: int) -> list[list[int]]:
    """Token ids without padding, with this first token."""
    return [[first, *row[1 : sum(mask)]] for row, mask in zip(batch.ids.tolist(), batch.mask.tolist(), strict=True)]


def double(x: Tensor) -> Array:
    result: Array = x.detach().double().numpy()
    return result


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


# The paper once more --------------------------------------------------------------------------------------------------


@dataclass
class Features:
    """Of the unimodal encoders: unit vectors, float64 [B, E] each."""

    images: Array
    texts: Array


@torch.no_grad()
def features(network: RetrievalNetwork, batch: Batch) -> Features:
    images = network.embed_images(network.vision_model(batch.pixels))
    return Features(double(images), double(network.embed_texts(network.text_encoder(batch.ids, batch.mask))))


@torch.no_grad()
def paper_itm(network: RetrievalNetwork, batch: Batch, pool: Batch, temperature: float, noise_2BM: Array) -> float:
    """Each pair alone through the network, negatives of `pool` chosen in NumPy."""
    own, others = features(network, batch), features(network, pool)
    ids, pool_ids = batch.image_ids.tolist(), pool.image_ids.tolist()
    texts, pool_texts = texts_of(batch, ENC), texts_of(pool, ENC)
    text_B = numpy_negatives(own.images @ others.texts.T / temperature, ids, pool_ids, noise_2BM[0])
    image_B = numpy_negatives(own.texts @ others.images.T / temperature, ids, pool_ids, noise_2BM[1])
    pairs = [(pixels, text, 1) for pixels, text in zip(batch.pixels, texts, strict=True)]
    pairs += [(pixels, pool_texts[other], 0) for pixels, other in zip(batch.pixels, text_B, strict=True)]
    pairs += [(pool.pixels[other], text, 0) for text, other in zip(texts, image_B, strict=True)]
    logits = []
    for pixels, text, _ in pairs:
        seen = network.text_encoder.look(network.vision_model(pixels[None]))
        logits.append(double(network.match(network.text_encoder(torch.tensor([text]), None, seen))[0]))
    return numpy_itm(np.stack(logits), [match for *_, match in pairs])


@torch.no_grad()
def paper_lm(network: Med | CaptioningNetwork, batch: Batch, prompt: int, smoothing: float) -> float:
    """Each text alone and unpadded through the network."""
    decoder, texts = network.text_decoder, texts_of(batch, DEC)
    logits = []
    for pixels, text in zip(batch.pixels, texts, strict=True):
        seen = decoder.bert.look(network.vision_model(pixels[None]))
        logits.append(double(decoder.logits(decoder.bert(torch.tensor([text]), image=seen, causal=True))[0]))
    return numpy_lm(logits, texts, prompt, smoothing)


def uniform(rows: int, candidates: int, seed: int) -> Array:
    """What an objective draws for a batch of `rows` on all ranks, given a generator of this seed."""
    return double(torch.rand(2, rows, candidates, generator=torch.Generator().manual_seed(seed)))


class Paper:
    """The state of a contrastive objective, kept in NumPy: twin, queue and temperature."""

    def __init__(self, objective: MatchObjective) -> None:
        self.settings = objective.settings
        self.network = RetrievalNetwork(config()).train()  # turns the twin's weights into features
        own = self.network.state_dict()
        self.twin = {name: double(x) for name, x in objective.network.state_dict().items() if name in own}
        self.queue = Features(double(objective.queue.images), double(objective.queue.texts))
        self.queue_ids = [-1] * self.settings.queue
        self.oldest = 0
        self.temperature = self.settings.temperature

    def follow(self, network: RetrievalNetwork) -> None:
        """models/blip_pretrain.py: the clamp and _momentum_update."""
        weights, keep = network.state_dict(), self.settings.momentum
        self.twin = {name: keep * old + (1 - keep) * double(weights[name]) for name, old in self.twin.items()}
        self.temperature = min(max(self.temperature, 0.001), 0.5)

    def twin_features(self, batch: Batch) -> Features:
        self.network.load_state_dict({name: torch.tensor(x).float() for name, x in self.twin.items()})
        return features(self.network, batch)

    def itc(self, network: RetrievalNetwork, batch: Batch, alpha: float) -> tuple[float, float]:
        """The loss, and its derivative by the temperature."""
        own, twin, ids = features(network, batch), self.twin_features(batch), batch.image_ids.tolist()
        images_KE = np.concatenate([twin.images, self.queue.images])
        texts_KE = np.concatenate([twin.texts, self.queue.texts])
        targets = numpy_targets(ids, ids + self.queue_ids, self.settings.by_image)
        # The twin's opinion is a target: the temperature in it is a constant.
        fixed = self.temperature

        def loss(temperature: float) -> float:
            scale = fixed / temperature
            student = (own.images * scale, own.texts * scale)
            return numpy_itc(*student, twin.images, twin.texts, images_KE, texts_KE, targets, fixed, alpha)

        step = 1e-5
        return loss(fixed), (loss(fixed + step) - loss(fixed - step)) / (2 * step)

    def push(self, twin: Features, ids: Sequence[int]) -> None:
        """_dequeue_and_enqueue, row by row."""
        for row, image in enumerate(ids):
            self.queue.images[self.oldest], self.queue.texts[self.oldest] = twin.images[row], twin.texts[row]
            self.queue_ids[self.oldest] = image
            self.oldest = (self.oldest + 1) % self.settings.queue


def objective_of(
    network: Any, smoothing: float = 0.1, queue: int = 7, momentum: float = 0.9, **fields: Any
) -> MatchObjective:
    generator = torch.Generator().manual_seed(5)
    settings = MatchSettings(queue=queue, momentum=momentum, **fields)
    if isinstance(network, Med):
        return PretrainObjective(network, TOKENS, settings, smoothing, generator).train()
    return MatchObjective(network, TOKENS, settings, generator).train()


def step(objective: nn.Module, batch: Batch, alpha: float = 0.4, seed: int = 0) -> Losses:
    losses: Losses = objective(batch, alpha, torch.Generator().manual_seed(seed))
    return losses


# MED ------------------------------------------------------------------------------------------------------------------


def test_encoder_and_decoder_share_everything_but_self_attention() -> None:
    med = Med(config())
    encoder, decoder = (
        dict(part.named_parameters(remove_duplicate=False)) for part in (med.text_encoder, med.text_decoder.bert)
    )
    assert encoder.keys() == decoder.keys()
    apart = {name for name in encoder if encoder[name] is not decoder[name]}
    assert apart == {name for name in encoder if ".attention." in name}
    assert len(apart) == 2 * 10  # layers; query, key, value, dense and norm, each with its bias
    head = med.text_decoder.cls["predictions"]
    assert head.decoder.weight is encoder["embeddings.word_embeddings.weight"]
    assert head.decoder.bias is head.bias


@pytest.mark.parametrize(("width", "depth", "heads", "millions"), [(768, 12, 12, "252.7"), (1024, 24, 16, "475.1")])
def test_trainable_parameters(width: int, depth: int, heads: int, millions: str) -> None:
    """At 384 px, heads included; the paper says 252M of the base model."""
    text = BlipTextConfig(
        vocab_size=30524, hidden_size=768, encoder_hidden_size=width, num_attention_heads=12, num_hidden_layers=12
    )
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=384,
        patch_size=16,
    )
    with torch.device("meta"):
        med = Med(
            BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_text_hidden_size=256),
            drop_path=0.1,
        )
    assert f"{sum(p.numel() for p in trainable(med).values()) / 1e6:.1f}" == millions


def test_its_roles_are_whole_networks_that_compute_the_same() -> None:
    med, batch = drawn(Med(config())), random_batch([0, 1, 2], [5, 7, 4], 1)
    captioner, judge = drawn(CaptioningNetwork(config()), 1), drawn(RetrievalNetwork(config()), 2)
    roles = med.roles()
    assert roles.keys() == {"captioner", "filter"}
    fill(captioner, roles["captioner"], "a captioner")
    fill(judge, roles["filter"], "a filter")
    assert roles["captioner"].keys() == captioner.state_dict().keys()
    assert roles["filter"].keys() == judge.state_dict().keys()

    with torch.no_grad():
        seen, dec, enc = med.vision_model(batch.pixels), with_first(batch.ids, DEC), with_first(batch.ids, ENC)
        assert torch.equal(captioner.vision_model(batch.pixels), seen)
        assert torch.equal(judge.vision_model(batch.pixels), seen)
        keys = med.text_encoder.look(seen)  # one look for all
        written = captioner.text_decoder.bert(dec, image=captioner.text_decoder.bert.look(seen), causal=True)
        ours = med.text_decoder.bert(dec, image=keys, causal=True)
        assert torch.equal(captioner.text_decoder.logits(written), med.text_decoder.logits(ours))
        read = judge.text_encoder(enc, batch.mask, judge.text_encoder.look(seen))
        assert torch.equal(judge.match(read), med.match(med.text_encoder(enc, batch.mask, keys)))
        alone = judge.embed_texts(judge.text_encoder(batch.ids, batch.mask))
        assert torch.equal(alone, med.embed_texts(med.text_encoder(batch.ids, batch.mask)))
        assert torch.equal(judge.embed_images(seen), med.embed_images(seen))


def test_a_loaded_med_still_shares() -> None:
    med, other = drawn(Med(config())), Med(config())
    other.load_state_dict(med.state_dict())
    assert len(trainable(other)) == len(trainable(med))
    with torch.no_grad():
        other.text_encoder.layers[1].crossattention.self["key"].weight.zero_()
        other.text_encoder.embeddings.word_embeddings.weight.zero_()
    assert not other.text_decoder.bert.layers[1].crossattention.self["key"].weight.any()
    assert not other.text_decoder.cls["predictions"].decoder.weight.any()


BATCH = ([0, 1, 2, 1], [5, 7, 4, 6])


@pytest.mark.parametrize("made", [Med, RetrievalNetwork, CaptioningNetwork])
def test_gradients_reach_every_trainable_parameter(made: Any) -> None:
    network = drawn(made(config()))
    objective = (
        CaptionObjective(network, TOKENS, 2, 0.1) if made is CaptioningNetwork else objective_of(network, by_image=True)
    )
    objective.follow()
    step(objective, random_batch(*BATCH, 1)).total().backward()
    own = {name for name in trainable(objective) if name != "temperature"}
    assert own == {f"network.{name}" for name in trainable(network)}
    for name, parameter in trainable(objective).items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("key.bias"):  # a softmax does not see what is added to all its logits
            assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("made", [Med, RetrievalNetwork])
def test_what_is_computed_again_gives_the_same_gradients(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, whose draws must come again: all of a small network's activations kept, or none of the large."""
    dropout = config()
    dropout.text_config.hidden_dropout_prob = dropout.text_config.attention_probs_dropout_prob = 0.2

    def slopes() -> dict[str, Tensor]:
        objective = objective_of(drawn(made(dropout)))
        torch.manual_seed(0)
        return gradients(objective, step(objective, random_batch(*BATCH, 1)).total())

    kept = slopes()
    monkeypatch.setattr(blip, "_WORTH_COMPUTING_AGAIN", 0)
    again = slopes()
    assert any(gradient.abs().max() > 0.01 for gradient in kept.values())
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6)


# The twin -------------------------------------------------------------------------------------------------------------


def test_the_twin_is_a_frozen_copy_that_cannot_read_images() -> None:
    med, batch = drawn(Med(config())), random_batch(*BATCH, 1)
    twin = Twin(med, 0.9)
    wanted = ("vision_model.", "text_encoder.", "vision_proj.", "text_proj.")
    theirs = {name: x for name, x in med.state_dict().items() if name.startswith(wanted) and "crossatt" not in name}
    own = twin.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert not {x.data_ptr() for x in own.values()} & {x.data_ptr() for x in theirs.values()}
    assert not trainable(twin)
    image_BE, text_BE = twin.embed(batch)
    same = features(med, batch)
    np.testing.assert_array_equal(double(image_BE), same.images)
    np.testing.assert_array_equal(double(text_BE), same.texts)
    assert not image_BE.requires_grad
    assert not text_BE.requires_grad


def test_the_network_is_as_it_was_after_a_twin_is_made() -> None:
    """Order too: an optimiser's state and drawn weights go by the order of parameters."""
    med = Med(config())
    names, parameters = list(med.state_dict()), list(med.parameters())
    Twin(med, 0.9)
    assert list(med.state_dict()) == names
    assert all(one is other for one, other in zip(med.parameters(), parameters, strict=True))


@pytest.mark.parametrize("momentum", [0.995, 0.5, 0.0, 1.0])
def test_the_twin_keeps_so_much_of_itself(momentum: float) -> None:
    med = drawn(Med(config()))
    twin = Twin(med, momentum)
    expected = {name: double(x) for name, x in twin.named_parameters()}
    for seed in (1, 2, 3):
        drawn(med, seed)
        twin.follow(med)
        weights = dict(med.named_parameters())
        expected = {name: momentum * x + (1 - momentum) * double(weights[name]) for name, x in expected.items()}
        for name, x in twin.named_parameters():
            np.testing.assert_allclose(double(x), expected[name], rtol=1e-6, atol=1e-6)


def test_the_twin_and_the_queue_get_no_gradients_and_the_twin_moves_only_when_told() -> None:
    objective = objective_of(drawn(Med(config())))
    before = copy.deepcopy(objective.twin.state_dict())
    step(objective, random_batch(*BATCH, 1)).total().backward()
    assert all(parameter.grad is None for parameter in objective.twin.parameters())
    assert not any(buffer.requires_grad for buffer in objective.queue.buffers())
    with torch.no_grad():
        for parameter in objective.network.parameters():
            parameter.add_(1)
    assert all(torch.equal(x, before[name]) for name, x in objective.twin.state_dict().items())
    objective.follow()
    assert not any(torch.equal(x, before[name]) for name, x in objective.twin.state_dict().items())


# The queue ------------------------------------------------------------------------------------------------------------


def test_the_queue_starts_as_unit_vectors_of_no_image() -> None:
    queue, same, other = (Queue(200, 16, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    for rows in (queue.images, queue.texts):
        assert rows.shape == (200, 16)
        np.testing.assert_allclose(np.linalg.norm(rows.numpy(), axis=1), 1, rtol=1e-6)
        assert rows.mean(0).abs().max() < 5 / math.sqrt(200 * 16)  # they point everywhere
    assert (queue.ids == -1).all()
    assert queue.position == 0
    assert not torch.equal(queue.images, queue.texts)
    assert torch.equal(queue.images, same.images)
    assert torch.equal(queue.texts, same.texts)
    assert not torch.equal(queue.images, other.images)


def test_a_queue_of_a_table_to_check_by_eye() -> None:
    queue = Queue(5, 4, torch.Generator().manual_seed(0))
    start = queue.images[:, 0].clone()

    def push(*ids: int) -> None:
        rows = torch.tensor(ids)[:, None].expand(-1, 4).float()
        queue.push(rows, -rows, torch.tensor(ids))

    push(10, 11, 12)
    assert queue.ids.tolist() == [10, 11, 12, -1, -1]
    assert torch.equal(queue.images[3:, 0], start[3:])
    push(13, 14, 15)  # wraps: the oldest goes
    assert queue.ids.tolist() == [15, 11, 12, 13, 14]
    push(20, 21, 22, 23, 24, 25, 26)  # more than it holds: the last five stay
    assert sorted(queue.ids.tolist()) == [22, 23, 24, 25, 26]
    push(30)  # in the place of the oldest
    assert sorted(queue.ids.tolist()) == [23, 24, 25, 26, 30]
    assert torch.equal(queue.images[:, 3], queue.ids.float())
    assert torch.equal(queue.texts[:, 3], -queue.ids.float())


@given(st.integers(1, 6), st.lists(st.integers(1, 13), max_size=6))
def test_the_queue_holds_the_last_rows(rows: int, pushes: list[int]) -> None:
    queue, pushed = Queue(rows, 4, torch.Generator().manual_seed(0)), 0
    ring = [-1] * rows
    for count in pushes:
        ids = torch.arange(pushed, pushed + count)
        queue.push(ids[:, None].expand(-1, 4).float(), ids[:, None].expand(-1, 4).float() / 2, ids)
        for image in ids.tolist():
            ring[image % rows] = image
        pushed += count
    assert queue.ids.tolist() == ring
    assert queue.position == pushed % rows
    real = queue.ids >= 0
    assert torch.equal(queue.images[real, 0], queue.ids[real].float())
    assert torch.equal(queue.texts[real, 0], queue.ids[real].float() / 2)


# Objectives -----------------------------------------------------------------------------------------------------------

STEPS = [  # image ids, lengths of texts, alpha; a queue of 7 wraps in the second step
    ([0, 1, 2, 1], [5, 7, 4, 6], 0.0),
    ([3, 0, 4, 5], [6, 3, 9, 5], 0.1),
    ([1, 1, 6, 2], [4, 8, 5, 5], 0.2),
    ([7, 3, 0, 8], [7, 7, 7, 7], 0.3),
    ([2, 9, 2, 4], [3, 5, 8, 6], 0.4),
    ([5, 6, 1, 0], [5, 4, 6, 9], 0.4),
]


@pytest.mark.parametrize(
    ("made", "fields"),
    [
        (Med, {"temperature": 0.49}),  # pretraining; the temperature climbs out of its range
        (Med, {"temperature": 0.07, "across_ranks": True}),  # one rank: all ranks' rows are its own
        (RetrievalNetwork, {"temperature": 0.1, "by_image": True}),  # the filter
    ],
)
def test_several_steps_are_the_papers(made: Any, fields: dict[str, Any]) -> None:
    """Losses, queue, twin and temperature of six steps of plain SGD; only the student's weights are taken over."""
    objective = objective_of(drawn(made(config())), **fields)
    paper = Paper(objective)
    rate, heat_rate = 0.02, 0.03
    optimiser = torch.optim.SGD(
        [
            {"params": list(trainable(objective.network).values()), "lr": rate},
            {"params": [objective.temperature], "lr": heat_rate},
        ]
    )
    hottest = drift = 0.0
    for number, (ids, lengths, alpha) in enumerate(STEPS):
        batch = random_batch(ids, lengths, number)
        hottest = max(hottest, objective.temperature.item())
        objective.follow()
        paper.follow(objective.network)
        assert objective.temperature.item() == pytest.approx(paper.temperature, abs=1e-5)

        losses = step(objective, batch, alpha, seed=number)
        itc, slope = paper.itc(objective.network, batch, alpha)
        noise_2BB = uniform(len(ids), len(ids), number)
        assert losses.itc is not None
        assert losses.itm is not None
        assert losses.itc.item() == pytest.approx(itc, abs=2e-5)
        itm = paper_itm(objective.network, batch, batch, paper.temperature, noise_2BB)
        assert losses.itm.item() == pytest.approx(itm, abs=2e-5)
        if isinstance(objective.network, Med):
            assert losses.lm is not None
            assert losses.lm.item() == pytest.approx(paper_lm(objective.network, batch, 0, 0.1), abs=2e-5)
        else:
            assert losses.lm is None
        together = sum(loss.item() for loss in losses if loss is not None)
        assert losses.total().item() == pytest.approx(together, rel=1e-6)

        twin = paper.twin_features(batch)
        drift = max(drift, np.abs(twin.images - features(objective.network, batch).images).max())
        paper.push(twin, ids)
        np.testing.assert_allclose(double(objective.queue.images), paper.queue.images, atol=1e-5)
        np.testing.assert_allclose(double(objective.queue.texts), paper.queue.texts, atol=1e-5)
        assert objective.queue.ids.tolist() == paper.queue_ids

        optimiser.zero_grad()
        losses.total().backward()
        optimiser.step()
        paper.temperature -= heat_rate * slope
    assert drift > 0.01  # the twin is not the student
    if fields["temperature"] == 0.49:
        assert hottest > 0.51  # it was out of its range


def test_the_temperature_stays_in_its_range() -> None:
    objective = objective_of(drawn(RetrievalNetwork(config())))
    for value, clamped in ((-1.0, 0.001), (0.0005, 0.001), (0.2, 0.2), (0.6, 0.5)):
        with torch.no_grad():
            objective.temperature.fill_(value)
        objective.follow()
        assert objective.temperature.item() == pytest.approx(clamped)


@pytest.mark.parametrize(("prompt", "smoothing"), [(0, 0.0), (2, 0.1)])
def test_captioning_is_the_papers(prompt: int, smoothing: float) -> None:
    network, batch = drawn(CaptioningNetwork(config())), random_batch(*BATCH, 1)
    objective = CaptionObjective(network, TOKENS, prompt, smoothing).train()
    objective.follow()
    losses = step(objective, batch)
    assert (losses.itc, losses.itm) == (None, None)
    assert losses.lm is not None
    assert losses.lm.item() == pytest.approx(paper_lm(network, batch, prompt, smoothing), abs=2e-5)
    assert losses.total().item() == losses.lm.item()
    assert losses.lm.item() != pytest.approx(paper_lm(network, batch, prompt + 1, smoothing), abs=1e-3)


def test_a_batch_of_one_image_is_refused() -> None:
    objective = objective_of(drawn(RetrievalNetwork(config())))
    with pytest.raises(TrainingError, match=r"pairs of one image only.* raise batch_size"):
        step(objective, random_batch([3, 3], [4, 5], 1))


def test_a_loaded_objective_goes_on_as_the_first_would() -> None:
    first, second = objective_of(drawn(Med(config()))), objective_of(drawn(Med(config()), 1))
    for number in range(2):
        drawn(first.network, number)
        first.follow()
        step(first, random_batch(*BATCH, number))
    second.load_state_dict(first.state_dict())
    for objective in (first, second):
        objective.follow()
    one, other = (step(objective, random_batch(*BATCH, 7)) for objective in (first, second))
    assert [loss.item() for loss in one if loss is not None] == [loss.item() for loss in other if loss is not None]


def test_a_step_under_autocast_is_near_one_in_float32() -> None:
    batch = random_batch([0, 1], [5, 7], 1)  # two rows: the other is the only negative
    exact, rough = (objective_of(drawn(Med(config())), temperature=0.2) for _ in range(2))
    expected = step(exact, batch)
    with torch.autocast("cpu", torch.bfloat16):
        losses = step(rough, batch)
    for one, other in zip(losses, expected, strict=True):
        assert one is not None
        assert other is not None
        assert one.dtype == torch.float32
        assert one.item() == pytest.approx(other.item(), rel=0.05)
    losses.total().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in trainable(rough).values())
    assert rough.queue.images.dtype == torch.float32
    np.testing.assert_allclose(np.linalg.norm(double(rough.queue.images), axis=1), 1, rtol=1e-6)
    torch.testing.assert_close(rough.queue.texts, exact.queue.texts, rtol=0, atol=0.05)


class Held:
    """A tensor that the way back needs."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def unpack(self) -> Tensor:
        return self.tensor


def test_the_contrast_keeps_no_candidates_for_the_way_back() -> None:
    objective, every = objective_of(drawn(Med(config())), queue=7), WeakSet[Held]()

    def pack(x: Tensor) -> Held:
        every.add(held := Held(x))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, Held.unpack):
        losses = step(objective, random_batch(*BATCH, 1), 0.3, seed=3)
    gc.collect()
    kept = [held.tensor.shape for held in every]
    assert kept
    assert not [shape for shape in kept if 4 + 7 in shape]
    losses.total().backward()


# transformers' modules, as the authors' code puts them together -------------------------------------------------------


def test_one_look_for_all_gives_the_losses_and_gradients_of_separate_passes() -> None:
    """What our step saves changes nothing: transformers' networks run every pair anew, its image's tokens copied."""
    from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

    med, batch, alpha, smoothing = drawn(Med(config())), random_batch(*BATCH, 1), 0.3, 0.1
    objective = objective_of(med, smoothing, temperature=0.2)
    drawn(objective.twin, 9)  # a twin that thinks otherwise
    start = copy.deepcopy(objective.state_dict())
    losses = step(objective, batch, alpha, seed=3)
    losses.total().backward()

    judge, captioner = BlipForImageTextRetrieval(config()).train(), BlipForConditionalGeneration(config()).train()
    judge.load_state_dict(med.roles()["filter"])
    captioner.load_state_dict(med.roles()["captioner"])
    captioner.text_decoder.label_smoothing = smoothing
    temperature = torch.tensor(0.2, requires_grad=True)

    seen_BTD = judge.vision_model(pixel_values=batch.pixels).last_hidden_state
    hidden = judge.text_encoder(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
    image_BE = nn.functional.normalize(judge.vision_proj(seen_BTD[:, 0]), dim=-1)
    text_BE = nn.functional.normalize(judge.text_proj(hidden[:, 0]), dim=-1)
    with torch.no_grad():
        image_m_BE, text_m_BE = objective.twin.embed(batch)
    itc = torch.zeros(())
    for own, own_m, theirs_m, queue in (
        (image_BE, image_m_BE, text_m_BE, start["queue.texts"]),
        (text_BE, text_m_BE, image_m_BE, start["queue.images"]),
    ):
        candidates = torch.cat([theirs_m, queue]).T
        soft = alpha * (own_m @ candidates / 0.2).softmax(1) + (1 - alpha) * torch.eye(4, 4 + 7)
        itc = itc - ((own @ candidates / temperature).log_softmax(1) * soft).sum(1).mean() / 2

    ids, noise_2BB = batch.image_ids.tolist(), uniform(4, 4, 3)
    text_B = numpy_negatives(double(image_BE @ text_BE.T / 0.2), ids, ids, noise_2BB[0])
    image_B = numpy_negatives(double(text_BE @ image_BE.T / 0.2), ids, ids, noise_2BB[1])
    enc, every = with_first(batch.ids, ENC), list(range(4))
    read = judge.text_encoder(
        input_ids=enc[every + text_B + every],
        attention_mask=batch.mask[every + text_B + every],
        encoder_hidden_states=seen_BTD[every + every + image_B],
    ).last_hidden_state
    itm = nn.functional.cross_entropy(judge.itm_head(read[:, 0]), torch.tensor([1] * 4 + [0] * 8))

    dec = with_first(batch.ids, DEC)
    lm = captioner.text_decoder(
        input_ids=dec,
        attention_mask=batch.mask,
        encoder_hidden_states=captioner.vision_model(pixel_values=batch.pixels).last_hidden_state,
        labels=dec.masked_fill(dec == PAD, -100),
    ).loss.mean()

    for ours, theirs in zip(losses, (itc, itm, lm), strict=True):
        assert ours is not None
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    (itc + itm + lm).backward()
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert objective.temperature.grad is not None
    torch.testing.assert_close(objective.temperature.grad, temperature.grad, **close)
    expected: dict[int, Tensor] = {}  # of our parameters, each the sum over the names that it has there
    names = dict(med.named_parameters(remove_duplicate=False))
    for network in (judge, captioner):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            own_id = id(names[name])
            expected[own_id] = expected[own_id] + parameter.grad if own_id in expected else parameter.grad
    assert expected.keys() == {id(parameter) for parameter in med.parameters()}
    for name, parameter in med.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[id(parameter)], **close, msg=lambda m, n=name: f"{n}: {m}")


# Two ranks ------------------------------------------------------------------------------------------------------------

RANKS, ROWS = 2, 3
# Image 1 is on both ranks. Each rank has the same number of labelled tokens, but not the same longest text.
GLOBAL = (([0, 1, 2, 1, 3, 4], [6, 4, 5, 8, 4, 3]), ([5, 1, 0, 6, 5, 7], [7, 3, 4, 4, 4, 6]))
LONGEST = ((6, 8), (7, 6))  # of each batch's halves: a rank pads no further than it must
CASES: dict[str, dict[str, Any]] = {
    "pretraining": {},
    "filter": {"by_image": True, "across_ranks": True},
}


def global_objective(case: str) -> MatchObjective:
    objective = objective_of(drawn(Med(config())), temperature=0.2, queue=11, **CASES[case])
    drawn(objective.twin, 9)
    return objective


def global_batch(number: int) -> Batch:
    return random_batch(*GLOBAL[number], seed=number)


def half(batch: Batch, number: int, rank: int) -> Batch:
    return rows_of(batch, slice(rank * ROWS, (rank + 1) * ROWS), LONGEST[number][rank])


def gradients(objective: MatchObjective, loss: Tensor) -> dict[str, Tensor]:
    own = trainable(objective)
    found = torch.autograd.grad(loss, list(own.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(own, found, strict=True))


def rank_main(rank: int, directory: str) -> None:
    """Both cases on one of two ranks; what came out goes to a file."""
    warnings.simplefilter("error")  # pytest's setting does not come this far
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=240)
    )
    results: dict[str, list[dict[str, Any]]] = {}
    for case in CASES:
        objective = global_objective(case)
        wrapped = DistributedDataParallel(copy.deepcopy(objective))
        results[case] = []
        for number in range(len(GLOBAL)):
            batch = half(global_batch(number), number, rank)
            losses = step(objective, batch, seed=number)
            averaged = {name: gradients(objective, loss) for name, loss in losses._asdict().items()}
            for found in averaged.values():
                for gradient in found.values():
                    dist.all_reduce(gradient)
                    gradient /= RANKS
            wrapped.zero_grad()
            step(wrapped, batch, seed=number).total().backward()
            results[case].append(
                {
                    "losses": {name: loss.item() for name, loss in losses._asdict().items()},
                    "gradients": averaged,
                    "wrapped": {name: p.grad for name, p in trainable(wrapped.module).items()},
                    "queue": copy.deepcopy(objective.queue.state_dict()),
                }
            )
    torch.save(results, Path(directory) / f"{rank}.pt")
    dist.destroy_process_group()


Results = list[dict[str, list[dict[str, Any]]]]
"""Of each rank, case and batch: losses, gradients, queue."""


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What came out on each rank."""
    directory = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("GLOO_SOCKET_IFNAME", "lo")
        ranks = spawn(rank_main, (str(directory),), nprocs=RANKS, join=False)
    try:
        for _ in range(RANKS):  # it returns when one of them ends, too
            if ranks.join(timeout=240):
                break
        else:
            pytest.fail("the ranks did not end in time")
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()
    return [torch.load(directory / f"{rank}.pt") for rank in range(RANKS)]


def mean_loss(ranks: Results, case: str, number: int, loss: str) -> float:
    return float(np.mean([rank[case][number]["losses"][loss] for rank in ranks]))


def on_one_rank(case: str) -> list[tuple[MatchObjective, Batch, Losses, dict[str, dict[str, Tensor]]]]:
    """Of each batch: the objective before it, the batch, the losses and their gradients."""
    objective, results = global_objective(case), []
    for number in range(len(GLOBAL)):
        before, batch = copy.deepcopy(objective), global_batch(number)
        losses = step(objective, batch, seed=number)
        found = {name: gradients(objective, loss) for name, loss in losses._asdict().items()}
        results.append((before, batch, losses, found))
    return results


def assert_same_gradients(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_write_as_one(on_two_ranks: Results, case: str) -> None:
    """LM is a mean over a rank's labelled tokens: as one rank's only where all ranks have as many, as here."""
    for number, (_, batch, losses, found) in enumerate(on_one_rank(case)):
        counts = batch.mask[:, 1:].sum(1)
        assert counts[:ROWS].sum() == counts[ROWS:].sum()
        assert losses.lm is not None
        assert mean_loss(on_two_ranks, case, number, "lm") == pytest.approx(losses.lm.item(), abs=1e-5)
        assert_same_gradients(on_two_ranks[0][case][number]["gradients"]["lm"], found["lm"])


def test_two_ranks_match_as_one_when_negatives_are_of_all_ranks(on_two_ranks: Results) -> None:
    """Gradients too: those of another rank's images come back to it."""
    for number, (before, batch, losses, found) in enumerate(on_one_rank("filter")):
        assert losses.itm is not None
        assert mean_loss(on_two_ranks, "filter", number, "itm") == pytest.approx(losses.itm.item(), abs=1e-5)
        assert_same_gradients(on_two_ranks[0]["filter"][number]["gradients"]["itm"], found["itm"])
        # Negatives did come from the other rank: a rank alone has another loss.
        noise = uniform(RANKS * ROWS, RANKS * ROWS, number)
        for rank in range(RANKS):
            some, own = slice(rank * ROWS, (rank + 1) * ROWS), half(batch, number, rank)
            expected = paper_itm(before.network, own, batch, 0.2, noise[:, some])
            alone = paper_itm(before.network, own, own, 0.2, noise[:, some, some])
            found_loss = on_two_ranks[rank]["filter"][number]["losses"]["itm"]
            assert found_loss == pytest.approx(expected, abs=2e-5)
            assert found_loss != pytest.approx(alone, abs=1e-3)


def test_two_ranks_match_otherwise_when_negatives_are_of_a_rank(on_two_ranks: Results) -> None:
    """As published for pretraining: a rank's negatives are its own rows, so the loss depends on who has which."""
    for number, (before, batch, losses, _) in enumerate(on_one_rank("pretraining")):
        assert losses.itm is not None
        assert mean_loss(on_two_ranks, "pretraining", number, "itm") != pytest.approx(losses.itm.item(), abs=1e-3)
        noise = uniform(RANKS * ROWS, ROWS, number)
        for rank in range(RANKS):
            own = half(batch, number, rank)
            expected = paper_itm(before.network, own, own, 0.2, noise[:, rank * ROWS : (rank + 1) * ROWS])
            assert on_two_ranks[rank]["pretraining"][number]["losses"]["itm"] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_contrast_with_their_own_rows_and_the_queue_of_all(on_two_ranks: Results, case: str) -> None:
    """The published candidates are those: fewer than one rank would have, so another loss."""
    paper = Paper(global_objective(case))
    twin = global_objective(case).twin.state_dict()
    paper.twin = {name: double(twin[name]) if name in twin else x for name, x in paper.twin.items()}
    for number, (before, batch, losses, _) in enumerate(on_one_rank(case)):
        assert losses.itc is not None
        assert losses.itc.item() == pytest.approx(paper.itc(before.network, batch, 0.4)[0], abs=2e-5)
        assert mean_loss(on_two_ranks, case, number, "itc") != pytest.approx(losses.itc.item(), abs=1e-2)
        for rank in range(RANKS):
            expected, _ = paper.itc(before.network, half(batch, number, rank), 0.4)
            assert on_two_ranks[rank][case][number]["losses"]["itc"] == pytest.approx(expected, abs=2e-5)
        paper.push(paper.twin_features(batch), batch.image_ids.tolist())
        for rank in range(RANKS):
            queue = on_two_ranks[rank][case][number]["queue"]
            np.testing.assert_allclose(double(queue["images"]), paper.queue.images, atol=1e-5)
            np.testing.assert_allclose(double(queue["texts"]), paper.queue.texts, atol=1e-5)
            assert queue["ids"].tolist() == paper.queue_ids
            assert queue["position"] == paper.oldest


@pytest.mark.parametrize("case", CASES)
def test_wrapped_ranks_step_alike(on_two_ranks: Results, case: str) -> None:
    """DistributedDataParallel averages what we averaged by hand, and leaves both ranks with one gradient."""
    for one, other in zip(on_two_ranks[0][case], on_two_ranks[1][case], strict=True):
        together = {
            name: sum((one["gradients"][loss][name] for loss in Losses._fields), torch.zeros(()))
            for name in one["wrapped"]
        }
        assert_same_gradients(one["wrapped"], together)
        assert_same_gradients(one["wrapped"], other["wrapped"])
