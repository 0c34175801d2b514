"""MED, the multimodal mixture of encoder-decoder, and what it is trained for (BLIP section 3.1 and 3.2).

One set of weights, three functions. Formulas: capfilt.models.losses. Order of events in a step: salesforce/BLIP,
models/blip_pretrain.py (pretraining), models/blip_retrieval.py (filter), models/blip.py (captioner).

B  rows of this rank    M  rows of all ranks, or of this one    Q  rows in the queue    E  width of the embeddings
S  side in pixels    T  image tokens    L  text tokens    D  width
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import BlipConfig

from capfilt.models.blip import CaptioningNetwork, Keys, RetrievalNetwork, TextDecoder, WordHead, again, unit_vectors
from capfilt.models.losses import (
    contrast,
    hard_negatives,
    itc_loss,
    itm_loss,
    lm_labels,
    lm_loss,
    one_hot_targets,
)
from capfilt.models.tokenizer import with_first


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ids of the first tokens, which choose a function."""

    enc: int
    dec: int


@dataclass(slots=True)
class Batch:
    """Image-text pairs.

    Attributes:
        pixels: float [B, 3, S, S], normalised.
        ids: int64 [B, L], [CLS] first, [SEP] last, padded on the right.
        mask: int64 [B, L], 1 where there is a token.
        image_ids: int64 [B]; pairs of one image have one id.
    """

    pixels: Tensor
    ids: Tensor
    mask: Tensor
    image_ids: Tensor


class Losses(NamedTuple):
    """A step's losses, scalars; None where it is not trained for."""

    itc: Tensor | None = None
    itm: Tensor | None = None
    lm: Tensor | None = None

    def total(self) -> Tensor:
        """Their sum, unweighted (BLIP section 3.2)."""
        return torch.stack([loss for loss in self if loss is not None]).sum()


class Med(RetrievalNetwork):
    """The encoder and the decoder in one: they share everything but the self-attention block.

    As a `RetrievalNetwork` it is the text encoder's two functions; `text_decoder` is the third. Cross-attention is
    shared, so what a text reads of an image (`TextTransformer.look`) serves encoder and decoder alike.
    """

    architecture = "MED"

    def __init__(self, config: BlipConfig, drop_path: float = 0.0) -> None:
        super().__init__(config, drop_path)
        self.text_decoder = TextDecoder(config.text_config)
        words = self.text_encoder.embeddings
        self.text_decoder.bert.embeddings = words
        for own, shared in zip(self.text_decoder.bert.layers, self.text_encoder.layers, strict=True):
            own.crossattention, own.intermediate, own.output = shared.crossattention, shared.intermediate, shared.output
        cast("WordHead", self.text_decoder.cls["predictions"]).decoder.weight = words.word_embeddings.weight

    def roles(self) -> dict[str, dict[str, Tensor]]:
        """Its weights as a captioner's and as a filter's, by the names of those networks."""
        state = self.state_dict()
        only_filter = ("text_encoder.", "vision_proj.", "text_proj.", "itm_head.")
        return {
            "captioner": {name: tensor for name, tensor in state.items() if not name.startswith(only_filter)},
            "filter": {name: tensor for name, tensor in state.items() if not name.startswith("text_decoder.")},
        }


# --- the momentum twin ---


class Twin(nn.Module):
    """The momentum twin: a slow copy of the network's unimodal encoders, without what it never uses (reading images).

    Args:
        network: what it follows.
        momentum: it keeps so much of itself at every update.
    """

    def __init__(self, network: RetrievalNetwork, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        parts = (network.vision_model, network.text_encoder, network.vision_proj, network.text_proj)
        with _without_cross_attention(network):
            self.vision_model, self.text_encoder, self.vision_proj, self.text_proj = copy.deepcopy(parts)
        self.requires_grad_(False)

    @torch.no_grad()
    def follow(self, network: RetrievalNetwork) -> None:
        """One step towards the network: momentum * self + (1 - momentum) * network."""
        theirs = dict(network.named_parameters())
        names, own = zip(*self.named_parameters(), strict=True)
        torch._foreach_lerp_(list(own), [theirs[name] for name in names], 1 - self.momentum)

    @torch.no_grad()
    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit vectors of images and texts, float32 [B, E] each."""
        seen_BTD = self.vision_model(batch.pixels)
        hidden_BLD = self.text_encoder(batch.ids, batch.mask)
        return unit_vectors(self.vision_proj, seen_BTD), unit_vectors(self.text_proj, hidden_BLD)


@contextmanager
def _without_cross_attention(network: RetrievalNetwork) -> Iterator[None]:
    """Takes the cross-attention out of a network's text encoder for a while."""
    layers = network.text_encoder.layers
    kept = [layer.crossattention for layer in layers]
    for layer in layers:
        layer.register_module("crossattention", None)  # keeps its place, which a deleted one would lose
    try:
        yield
    finally:
        for layer, own in zip(layers, kept, strict=True):
            layer.crossattention = own


class Queue(nn.Module):
    """The twin's features of the last rows, of all ranks: more candidates than a batch has.

    Starts as random unit vectors that belong to no image (salesforce/BLIP, models/blip_pretrain.py).
    """

    images: Tensor
    texts: Tensor
    ids: Tensor
    position: Tensor

    def __init__(self, rows: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        for name in ("images", "texts"):
            drawn = torch.randn(rows, width, generator=generator)
            self.register_buffer(name, nn.functional.normalize(drawn, dim=1))
        self.register_buffer("ids", torch.full((rows,), -1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, images_ME: Tensor, texts_ME: Tensor, ids_M: Tensor) -> None:
        """Put rows in the place of the oldest; all ranks push the same."""
        rows = len(self.ids)
        at = (self.position + torch.arange(len(ids_M), device=ids_M.device)) % rows
        at = at[-rows:]
        self.images[at], self.texts[at], self.ids[at] = images_ME[-rows:], texts_ME[-rows:], ids_M[-rows:]
        self.position.copy_((self.position + len(ids_M)) % rows)


# --- objectives ---


@dataclass(frozen=True, slots=True)
class MatchSettings:
    """How contrast and matching are trained. Defaults are pretraining's (BLIP section 3.2 and appendix).

    Attributes:
        queue: rows.
        by_image: targets of the contrast are shared by all rows of one image, as the filter is fine-tuned; one-hot as
            published for pretraining if not.
        across_ranks: negatives are drawn from the rows of all ranks, as the filter is fine-tuned on COCO.
    """

    queue: int = 57_600
    momentum: float = 0.995
    temperature: float = 0.07
    by_image: bool = False
    across_ranks: bool = False


class MatchObjective(nn.Module):
    """ITC + ITM: what the filter is fine-tuned for, and two thirds of pretraining.

    Args:
        generator: for the queue's start.
    """

    def __init__(
        self, network: RetrievalNetwork, tokens: Tokens, settings: MatchSettings, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.network, self.tokens, self.settings = network, tokens, settings
        self.twin = Twin(network, settings.momentum)
        self.queue = Queue(settings.queue, network.text_proj.out_features, generator)
        self.temperature = nn.Parameter(torch.tensor(settings.temperature))

    def follow(self) -> None:
        """Move the twin; once for each step of the optimiser, before its first batch."""
        self.twin.follow(self.network)
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)

    def forward(self, batch: Batch, alpha: float, noise: torch.Generator) -> Losses:
        """A batch's losses; the twin's features of it enter the queue.

        Args:
            alpha: weight of the twin's opinion in the contrast's targets.
            noise: draws the negatives; in the same state on every rank.
        """
        seen_BTD = self.network.vision_model(batch.pixels)
        keys = self.network.text_encoder.look(seen_BTD)
        itc, itm = self._itc_and_itm(batch, seen_BTD, keys, alpha, noise)
        return Losses(itc, itm)

    def _itc_and_itm(
        self, batch: Batch, seen_BTD: Tensor, keys: Sequence[Keys], alpha: float, noise: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        network = self.network
        image_BE = network.embed_images(seen_BTD)
        text_BE = network.embed_texts(network.text_encoder(batch.ids, batch.mask))
        image_m_BE, text_m_BE = self.twin.embed(batch)

        def loss(image_BE: Tensor, text_BE: Tensor, temperature: Tensor) -> Tensor:
            images_KE = torch.cat([image_m_BE, self.queue.images])
            texts_KE = torch.cat([text_m_BE, self.queue.texts])
            student = contrast(image_BE, text_BE, images_KE, texts_KE, temperature)
            teacher = contrast(image_m_BE, text_m_BE, images_KE, texts_KE, temperature.detach())
            return itc_loss(student, teacher, self._targets(batch.image_ids), alpha)

        itc = with_slopes_at_once(loss, image_BE, text_BE, self.temperature)
        itm = self._itm(batch, image_BE, text_BE, seen_BTD, keys, noise)
        self.queue.push(*(gathered(rows) for rows in (image_m_BE, text_m_BE, batch.image_ids)))
        return itc, itm

    def _targets(self, image_ids_B: Tensor) -> Tensor:
        if self.settings.by_image:
            return one_hot_targets(image_ids_B, torch.cat([image_ids_B, self.queue.ids]))
        return torch.eye(len(image_ids_B), len(image_ids_B) + len(self.queue.ids), device=image_ids_B.device)

    def _itm(
        self,
        batch: Batch,
        image_BE: Tensor,
        text_BE: Tensor,
        seen_BTD: Tensor,
        keys: Sequence[Keys],
        noise: torch.Generator,
    ) -> Tensor:
        network, encoder, rows = self.network, self.network.text_encoder, len(batch.ids)
        ids_BL = with_first(batch.ids, self.tokens.enc)
        pool = _Pool(ids_BL, batch.mask, batch.image_ids, image_BE.detach(), text_BE.detach())
        if self.settings.across_ranks:
            pool = pool.of_all_ranks()
        noise_2BM = _own_rows(torch.rand(2, rows * _size(), len(pool.image_ids), generator=noise), rows)
        draws_2BM = noise_2BM.clamp(1e-7, 1 - 1e-7).to(seen_BTD.device)
        own, heat = batch.image_ids, self.temperature.detach()
        # Student with student, as models/blip_retrieval.py; in models/blip_pretrain.py the candidates are the twin's.
        alike = contrast(image_BE.detach(), text_BE.detach(), pool.image_embeds, pool.text_embeds, heat)
        text_B = hard_negatives(alike.image_to_text, own, pool.image_ids, draws_2BM[0])
        image_B = hard_negatives(alike.text_to_image, own, pool.image_ids, draws_2BM[1])
        gathers = self.settings.across_ranks and _size() > 1
        seen_MTD: Tensor | None = _GatheredWithGradient.apply(seen_BTD) if gathers else None  # type: ignore[no-untyped-call]

        def third() -> Tensor:
            """Each text with another's image."""
            if seen_MTD is not None:
                other = encoder.look(seen_MTD[image_B])
            else:
                other = [Keys(layer.keys[image_B], layer.values[image_B]) for layer in keys]
            return network.match(encoder(ids_BL, batch.mask, other))

        copied = sum(part.nbytes for layer in keys for part in layer)
        third_B2 = again(third, kept=copied, draws=True)  # its copies of keys are not kept
        # Each image with its own text and with another's: two texts an image, which read the same keys. Last, as it
        # takes the most memory, which the way back then frees first.
        two_ids, two_mask = _side_by_side(ids_BL, batch.mask, pool.ids[text_B], pool.mask[text_B])
        both_N2 = network.match(encoder(two_ids, two_mask, keys))
        return itm_loss(torch.cat([both_N2[0::2], both_N2[1::2], third_B2]), rows)


class PretrainObjective(MatchObjective):
    """ITC + ITM + LM, of one MED (BLIP section 3.2)."""

    network: Med

    def __init__(
        self, network: Med, tokens: Tokens, settings: MatchSettings, smoothing: float, generator: torch.Generator
    ) -> None:
        super().__init__(network, tokens, settings, generator)
        self.smoothing = smoothing

    def forward(self, batch: Batch, alpha: float, noise: torch.Generator) -> Losses:
        """See MatchObjective."""
        seen_BTD = self.network.vision_model(batch.pixels)
        keys = self.network.text_encoder.look(seen_BTD)  # the decoder's too: cross-attention is shared
        # First, so that the way back comes to it last: ITM's activations are gone by then.
        lm = _caption_loss(self.network.text_decoder, batch, keys, self.tokens.dec, 0, self.smoothing)
        itc, itm = self._itc_and_itm(batch, seen_BTD, keys, alpha, noise)
        return Losses(itc, itm, lm)


class CaptionObjective(nn.Module):
    """LM: what the captioner is fine-tuned for.

    Args:
        prompt: tokens of the prompt at the start of every text, [CLS] not counted; no loss is taken on them.
    """

    def __init__(self, network: CaptioningNetwork, tokens: Tokens, prompt: int, smoothing: float) -> None:
        super().__init__()
        self.network, self.tokens, self.prompt, self.smoothing = network, tokens, prompt, smoothing

    def follow(self) -> None:
        """It has no twin."""

    def forward(self, batch: Batch, _alpha: float, _noise: torch.Generator) -> Losses:
        """A batch's loss."""
        decoder = self.network.text_decoder
        keys = decoder.bert.look(self.network.vision_model(batch.pixels))
        return Losses(lm=_caption_loss(decoder, batch, keys, self.tokens.dec, self.prompt, self.smoothing))


def with_slopes_at_once(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """A loss of small inputs whose gradients are taken at once, so that nothing else of it is kept for the way back.

    The contrast with the queue keeps all its candidates and logits otherwise: over 100 MiB at the published 57,600.
    """
    if not torch.is_grad_enabled():
        return loss(*inputs)
    own = [x.detach().requires_grad_() for x in inputs]
    value = loss(*own)
    slopes = torch.autograd.grad(value, own)
    # Worth nothing, but with the loss's gradient.
    zero = torch.stack([((x - x.detach()) * slope).sum() for x, slope in zip(inputs, slopes, strict=True)]).sum()
    return value.detach() + zero


def _caption_loss(
    decoder: TextDecoder, batch: Batch, keys: Sequence[Keys], dec: int, prompt: int, smoothing: float
) -> Tensor:
    ids_BL = with_first(batch.ids, dec)
    labels_BL = lm_labels(ids_BL, batch.mask, prompt)
    return lm_loss(decoder.logits(decoder.bert(ids_BL, image=keys, causal=True)), labels_BL, smoothing)


def _side_by_side(ids_BL: Tensor, mask_BL: Tensor, others_BL: Tensor, masks_BL: Tensor) -> tuple[Tensor, Tensor]:
    """[2B, L]: each row, then its other."""
    longest = max(ids_BL.shape[1], others_BL.shape[1])
    pairs = ((ids_BL, others_BL), (mask_BL, masks_BL))
    ids, mask = (torch.stack([_padded(one, longest) for one in pair], 1).flatten(0, 1) for pair in pairs)
    return ids, mask


def _padded(x_BL: Tensor, length: int) -> Tensor:
    """Zeros on the right: padding of a mask, and of ids that a mask hides."""
    return nn.functional.pad(x_BL, (0, length - x_BL.shape[1]))


# --- ranks ---


@dataclass(frozen=True, slots=True)
class _Pool:
    """Where negatives come from: texts that begin with [ENC], and detached unit vectors."""

    ids: Tensor
    mask: Tensor
    image_ids: Tensor
    image_embeds: Tensor
    text_embeds: Tensor

    def of_all_ranks(self) -> _Pool:
        longest = torch.tensor(self.ids.shape[1], device=self.ids.device)
        if _size() > 1:
            dist.all_reduce(longest, dist.ReduceOp.MAX)
        ids, mask = (_padded(x, int(longest)) for x in (self.ids, self.mask))
        return _Pool(*(gathered(x) for x in (ids, mask, self.image_ids, self.image_embeds, self.text_embeds)))


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _own_rows(x_2MK: Tensor, rows: int) -> Tensor:
    """This rank's rows of what was drawn for all."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return x_2MK[:, rank * rows : (rank + 1) * rows]


@torch.no_grad()
def gathered(x_B: Tensor) -> Tensor:
    """Rows of all ranks, in the order of ranks; every rank has as many."""
    if _size() == 1:
        return x_B
    parts = [torch.empty_like(x_B) for _ in range(_size())]
    dist.all_gather(parts, x_B.contiguous())
    return torch.cat(parts)


class _GatheredWithGradient(torch.autograd.Function):
    """As `gathered`; what the losses of all ranks ask of a row comes back to the rank that has it.

    salesforce/BLIP, models/blip_retrieval.py, GatherLayer.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x_B: Tensor) -> Tensor:  # noqa: ARG004  torch passes it
        return gathered(x_B)

    @staticmethod
    def backward(ctx: FunctionCtx, slope_M: Tensor) -> Tensor:  # noqa: ARG004
        slope_M = slope_M.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(slope_M)
        return slope_M.chunk(_size())[dist.get_rank()]
