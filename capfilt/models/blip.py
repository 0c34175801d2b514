"""BLIP's network: a vision transformer, a text transformer that can read images, and their heads.

BLIP section 3.1; salesforce/BLIP, models/vit.py and models/med.py. Parameters are named as transformers names them, so
that a `BlipForConditionalGeneration` or `BlipForImageTextRetrieval` checkpoint loads here, and ours there. What every
text of an image needs of it, keys and values, is projected once (`TextTransformer.look`) and shared by all of them.

B  images    N  texts, a multiple of B where images are read    S  side in pixels    T  image tokens, [CLS] first
L  text tokens    C  text tokens in the cache    W  vision width    D  text width    H  heads    E  width of a head
V  vocabulary
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  torch's own name for it
from torch.utils.checkpoint import checkpoint
from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig

from capfilt.errors import CheckpointError
from capfilt.models import fused

TIED = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
"""Second names of parameters, to their first; a checkpoint may have both or one."""

_WORTH_COMPUTING_AGAIN = 2 * 2**20
"""Bytes of activations; what takes less is kept for the way back: memory is not what a small network lacks."""

TEXTS_AN_IMAGE = 8
"""Texts in the network at a time, for each image of a batch: they take far less memory than their image does."""


class Keys(NamedTuple):
    """Keys and values of one attention: [B, H, T, E] each."""

    keys: Tensor
    values: Tensor


class Cache:
    """Self-attention's keys and values of the tokens so far, in memory taken once.

    Attributes:
        length: tokens held, of each row.
        place_1: the same on the device, int64 [1], for a step that is recorded once and played at any length: it then
            reads all of the memory through :attr:`readable`, whatever the length. None where the host knows it.
    """

    def __init__(self, config: BlipTextConfig, rows: int, tokens: int, like: Tensor) -> None:
        """Take memory for `rows` texts of at most `tokens` tokens, of the device and type of `like`."""
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        shape = (layers, 2, rows, heads, tokens, config.hidden_size // heads)
        self._all = torch.empty(shape, device=like.device, dtype=like.dtype)
        self.length = 0
        self.place_1: Tensor | None = None

    @property
    def room(self) -> int:
        """Tokens there is memory for, of each row."""
        return self._all.shape[4]

    @property
    def readable(self) -> Tensor:
        """bool [1, 1, 1, room]: what the token at `place_1` reads, itself and those before it."""
        assert self.place_1 is not None
        return (torch.arange(self.room, device=self.place_1.device) <= self.place_1).view(1, 1, 1, -1)

    def extend(self, layer: int, keys_NHLE: Tensor, values_NHLE: Tensor) -> Keys:
        """Put new tokens' keys and values behind a layer's others. Returns all of them; `length` is the caller's.

        Raises:
            ValueError: more tokens than there is memory for.
        """
        if self.place_1 is not None:
            for memory_NHCE, new_NHLE in zip(self._all[layer], (keys_NHLE, values_NHLE), strict=True):
                memory_NHCE.index_copy_(2, self.place_1, new_NHLE)
            return Keys(*self._all[layer])
        stop = self.length + keys_NHLE.shape[2]
        if stop > self.room:  # a slice would be cut in silence
            raise ValueError(f"{stop} tokens for a cache of {self.room}")
        own = self._all[layer, :, :, :, :stop]
        own[0, :, :, self.length :] = keys_NHLE
        own[1, :, :, self.length :] = values_NHLE
        return Keys(own[0], own[1])

    def selected(self, rows_N: Tensor) -> Cache:
        """Another, of these rows in this order; a row may come twice."""
        other = copy.copy(self)
        layers, two, _, *rest = self._all.shape
        other._all, other.place_1 = self._all.new_empty(layers, two, len(rows_N), *rest), None
        for new, own in zip(other._all, self._all, strict=True):
            held = own[..., : self.length, :]  # behind it is what nobody wrote
            new[..., : self.length, :] = held.index_select(1, rows_N)
        return other

    def blank(self) -> Cache:
        """Another, as large, that holds nothing: zeros, as a recorded step reads what is not there yet, times 0."""
        other = copy.copy(self)
        other._all, other.length = torch.zeros_like(self._all), 0
        other.place_1 = torch.zeros(1, dtype=torch.int64, device=self._all.device)
        return other

    def load(self, other: Cache) -> None:
        """Hold what another holds, in the first of these rows; the others stay as they are."""
        assert self.place_1 is not None
        held = other._all[..., : other.length, :]  # behind it is what nobody wrote
        self._all[:, :, : held.shape[2], :, : other.length].copy_(held)
        self._all[..., other.length :, :].zero_()  # read times 0: what a batch before left there may be no number
        self.length = other.length
        self.place_1.fill_(other.length)


# --- vision ---


class VisionEmbeddings(nn.Module):
    """Patches and [CLS], each with its learned position."""

    def __init__(self, config: BlipVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        grid = config.image_size // patch
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.zeros(1, grid**2 + 1, width))

    def forward(self, pixels_BCSS: Tensor) -> Tensor:
        """[B, T, W]. A convolution whose patches do not overlap is a matrix product, and faster as one."""
        convolution, images = self.patch_embedding, len(pixels_BCSS)
        patch = convolution.kernel_size[0]
        side = pixels_BCSS.shape[-1] // patch
        pixels_BCspsp = pixels_BCSS.view(images, 3, side, patch, side, patch)
        pixels_BPX = pixels_BCspsp.permute(0, 2, 4, 1, 3, 5).reshape(images, side * side, -1)
        patches_BPW = F.linear(pixels_BPX, convolution.weight.flatten(1), convolution.bias)
        tokens_BTW = torch.cat([self.class_embedding.expand(images, -1, -1), patches_BPW], 1)
        return tokens_BTW + resize_positions(self.position_embedding, side).to(tokens_BTW.dtype)


class VisionLayer(nn.Module):
    """A pre-norm transformer layer; while training, each image skips each branch with probability `drop_path`."""

    def __init__(self, config: BlipVisionConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.heads, self.hidden = config.num_attention_heads, config.intermediate_size
        self.dropout, self.drop_path = config.attention_dropout, 0.0
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "projection": nn.Linear(width, width)})
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, config.intermediate_size), "fc2": nn.Linear(config.intermediate_size, width)}
        )

    def forward(self, x_BTW: Tensor) -> Tensor:
        """[B, T, W] to the same."""
        x_BTW = x_BTW + self._dropped(self.attend(self.layer_norm1(x_BTW)))
        return x_BTW + self._dropped(_feed(self._feed_forward, x_BTW, self.hidden))

    def _feed_forward(self, x_BTW: Tensor) -> Tensor:
        return self.feed(self.layer_norm2(x_BTW))

    def feed(self, normed_BTW: Tensor) -> Tensor:
        """The feed-forward branch."""
        out: Tensor = self.mlp["fc2"](fused.gelu(self.mlp["fc1"], normed_BTW))
        return out

    def attend(self, x_BTW: Tensor) -> Tensor:
        """The attention branch, of normed tokens."""
        batch, tokens, width = x_BTW.shape
        qkv_BT3HE = self.self_attn["qkv"](x_BTW).view(batch, tokens, 3, self.heads, width // self.heads)
        qkv_3BHTE = qkv_BT3HE.permute(2, 0, 3, 1, 4)
        q_BHTE, k_BHTE, v_BHTE = qkv_3BHTE if x_BTW.is_cuda else qkv_3BHTE.contiguous()  # a CPU reads rows a page apart
        p = self.dropout if self.training else 0.0
        mixed_BHTE = fused.attend_all(q_BHTE, k_BHTE, v_BHTE, p)
        out: Tensor = self.self_attn["projection"](mixed_BHTE.transpose(1, 2).flatten(2))
        return out

    def _dropped(self, branch_BTW: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return branch_BTW
        keep_B11 = torch.rand(len(branch_BTW), 1, 1, device=branch_BTW.device) >= self.drop_path
        return branch_BTW * keep_B11 / (1 - self.drop_path)


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al., 2021): all tokens, after a final norm.

    Args:
        drop_path: of the last layer; rises linearly from 0 (BLIP pretrains ViT-L with 0.1).
    """

    def __init__(self, config: BlipVisionConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))}
        )
        self.set_drop_path(drop_path)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.checkpointing = False

    @property
    def layers(self) -> list[VisionLayer]:
        """The layers, first to last."""
        return list(cast("Iterable[VisionLayer]", self.encoder["layers"]))

    def set_drop_path(self, rate: float) -> None:
        """Of the last layer; of the others it rises linearly from 0."""
        for number, layer in enumerate(self.layers):
            layer.drop_path = rate * number / max(1, len(self.layers) - 1)

    def forward(self, pixels_BCSS: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S], S any multiple of the patch size, to tokens [B, T, W]."""
        x_BTW = self.embeddings(pixels_BCSS)
        if not (self.training or torch.is_grad_enabled()):
            return self._forward_only(x_BTW)
        for layer in self.layers:
            x_BTW = _run(layer, x_BTW, again=self.checkpointing and self.training)
        out: Tensor = self.post_layernorm(x_BTW)
        return out

    def _forward_only(self, x_BTW: Tensor) -> Tensor:
        """The same, a residual and the norm after it in one pass."""
        layers = self.layers
        normed_BTW: Tensor = layers[0].layer_norm1(x_BTW)
        for layer, norm in zip(layers, [*(one.layer_norm1 for one in layers[1:]), self.post_layernorm], strict=True):
            x_BTW, normed_BTW = fused.add_norm(x_BTW, layer.attend(normed_BTW), layer.layer_norm2)
            x_BTW, normed_BTW = fused.add_norm(x_BTW, layer.feed(normed_BTW), norm)
        return normed_BTW


def resize_positions(positions_1TW: Tensor, side: int) -> Tensor:
    """Learned positions for a grid of `side` x `side` patches: bicubic, [CLS]'s as it is.

    BLIP goes from 224 to 384 px so (salesforce/BLIP, models/vit.py, interpolate_pos_embed).
    """
    grid = math.isqrt(positions_1TW.shape[1] - 1)
    if grid == side:
        return positions_1TW
    patches_1WGG = positions_1TW[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    resized_1Wss = F.interpolate(patches_1WGG, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions_1TW[:, :1], resized_1Wss.flatten(2).transpose(1, 2)], 1)


# --- text ---


class TextAttention(nn.Module):
    """BERT's attention block: projections, attention, output, residual, norm. Reads itself, or an image."""

    def __init__(self, config: BlipTextConfig, width: int) -> None:
        """`width` is that of what is read."""
        super().__init__()
        own = config.hidden_size
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.self = nn.ModuleDict(
            {"query": nn.Linear(own, own), "key": nn.Linear(width, own), "value": nn.Linear(width, own)}
        )
        self.output = _add_and_norm(config, own)
        self.drop = nn.Dropout(config.hidden_dropout_prob)

    def project(self, read_BTW: Tensor) -> Keys:
        """Keys and values of what is read."""
        return Keys(*(self._split(self.self[name](read_BTW)) for name in ("key", "value")))

    def forward(
        self,
        x_NLD: Tensor,
        read: Keys,
        mask: Tensor | None = None,
        causal: bool = False,
        last_1: Tensor | None = None,
    ) -> Tensor:
        """[N, L, D] to the same.

        Args:
            read: of B images for N texts, N a multiple of B: consecutive texts are of one image, and become queries of
                one attention, so that nothing of the image is copied.
            mask: bool, True where a key may be read; broadcasts to [N, H, L, keys].
            last_1: int64, the last key that the mask lets be read, where it is known on the device alone.
        """
        q_BHME = self._split(self.self["query"](x_NLD).view(len(read.keys), -1, x_NLD.shape[2]))  # M: an image's L's
        p = self.dropout if self.training else 0.0
        mixed_BHME = fused.attend(q_BHME, *read, mask=mask, causal=causal, dropout=p, last_1=last_1)
        out: Tensor = self.output["dense"](mixed_BHME.transpose(1, 2).reshape(x_NLD.shape))
        return fused.normed_sum(x_NLD, self.drop(out), self.output["LayerNorm"])

    def _split(self, x_NLD: Tensor) -> Tensor:
        return x_NLD.view(*x_NLD.shape[:2], self.heads, -1).transpose(1, 2)


class TextLayer(nn.Module):
    """Self-attention, attention to the image (skipped where there is none), feed-forward; post-norm, as BERT."""

    def __init__(self, config: BlipTextConfig) -> None:
        super().__init__()
        self.attention = TextAttention(config, config.hidden_size)
        self.crossattention = TextAttention(config, config.encoder_hidden_size)
        self.hidden = config.intermediate_size
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = _add_and_norm(config, config.intermediate_size)
        self.drop = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        x_NLD: Tensor,
        mask: Tensor | None,
        causal: bool,
        image: Keys | None,
        extend: Callable[[Tensor, Tensor], Keys] | None,
        first: bool = False,
        last_1: Tensor | None = None,
    ) -> Tensor:
        """[N, L, D] to the same, or to [N, 1, D] of the `first` tokens alone, which read all the others.

        `extend` adds the new tokens' keys and values to those of the tokens before.
        """
        own = self.attention.project(x_NLD)
        if first:
            x_NLD = x_NLD[:, :1].contiguous()
        x_NLD = self.attention(x_NLD, extend(*own) if extend else own, mask, causal, last_1)
        if image is not None:
            x_NLD = self.crossattention(x_NLD, image)
        hidden = _feed(self._feed_forward, x_NLD, self.hidden)
        return fused.normed_sum(x_NLD, self.drop(hidden), self.output["LayerNorm"])

    def _feed_forward(self, x_NLD: Tensor) -> Tensor:
        out: Tensor = self.output["dense"](fused.gelu(self.intermediate["dense"], x_NLD))
        return out


class TextEmbeddings(nn.Module):
    """Words and positions; no token types."""

    def __init__(self, config: BlipTextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.drop = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids_NL: Tensor, start: int | Tensor) -> Tensor:
        """[N, L, D] of tokens at positions `start` and on; of one token, at the position that an int64 [1] names.

        Raises:
            ValueError: positions that the table does not have.
        """
        table_PD = self.position_embeddings.weight
        if isinstance(start, Tensor):
            positions_LD = table_PD[start]
        elif (stop := start + ids_NL.shape[1]) <= len(table_PD):
            positions_LD = table_PD[start:stop]
        else:
            raise ValueError(f"{stop} tokens, but {len(table_PD)} positions")
        out: Tensor = self.drop(self.LayerNorm(self.word_embeddings(ids_NL) + positions_LD))
        return out


class TextTransformer(nn.Module):
    """BERT with attention to an image in every layer (salesforce/BLIP, models/med.py).

    Its three functions (BLIP section 3.1) are a matter of the first token, the mask and whether it sees the image:
    unimodal encoder, image-grounded encoder, image-grounded decoder (`causal`).
    """

    def __init__(self, config: BlipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(TextLayer(config) for _ in range(config.num_hidden_layers))}
        )
        self.checkpointing = False

    @property
    def layers(self) -> list[TextLayer]:
        """The layers, first to last."""
        return list(cast("Iterable[TextLayer]", self.encoder["layer"]))

    def look(self, seen_BTW: Tensor) -> list[Keys]:
        """What the texts read of their images: every layer's keys and values.

        On a CPU a head's lie side by side in memory: a decoder reads them at every token, and faster in that order.
        """
        keys = (layer.crossattention.project(seen_BTW) for layer in self.layers)
        return [own if seen_BTW.is_cuda else Keys(*(part.contiguous() for part in own)) for own in keys]

    def forward(
        self,
        ids_NL: Tensor,
        mask_NL: Tensor | None = None,
        image: Sequence[Keys] | None = None,
        *,
        causal: bool = False,
        cache: Cache | None = None,
        first: bool = False,
    ) -> Tensor:
        """Hidden states [N, L, D]; with `first`, [N, 1, D] of the first tokens: of the last layer no more is computed.

        Args:
            mask_NL: true (or 1) where there is a token; none is padding if not given. A decoder needs none: padding on
                the right is never read by what comes before it.
            image: from `look`, of B images; text n is of image n // (N / B).
            causal: each token reads itself and those before it.
            cache: of the tokens before these, which are added to it; L is then 1 unless the cache is empty. Where it
                has a `place_1`, that and `length` are the caller's to raise.

        Raises:
            ValueError: several tokens for a cache that has some; more than there are positions, or room in the cache.
        """
        start = cache.length if cache else 0
        if start and ids_NL.shape[1] != 1:
            raise ValueError(f"{ids_NL.shape[1]} tokens at once after {start} in the cache")
        mask = None if mask_NL is None else mask_NL.bool()[:, None, None, :]
        if causal and mask is not None:
            mask = mask & torch.ones(2 * ids_NL.shape[1:], dtype=torch.bool, device=ids_NL.device).tril()
        causal = causal and mask is None and not start
        place_1 = cache.place_1 if cache else None
        if cache and place_1 is not None:
            mask = cache.readable
        x_NLD = self.embeddings(ids_NL, start if place_1 is None else place_1)
        for n, layer in enumerate(self.layers):
            extend = _extender(cache, n) if cache else None
            seen = image[n] if image is not None else None
            last = first and n + 1 == len(self.layers)
            again = self.checkpointing and self.training
            x_NLD = _run(layer, x_NLD, mask, causal, seen, extend, last, place_1, again=again)
        if cache and place_1 is None:
            cache.length += ids_NL.shape[1]
        return cast("Tensor", x_NLD)


def _extender(cache: Cache, layer: int) -> Callable[[Tensor, Tensor], Keys]:
    return lambda keys, values: cache.extend(layer, keys, values)


def _add_and_norm(config: BlipTextConfig, width: int) -> nn.ModuleDict:
    dense = nn.Linear(width, config.hidden_size)
    return nn.ModuleDict({"dense": dense, "LayerNorm": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)})


def _run(layer: nn.Module, *inputs: Any, again: bool) -> Tensor:
    """A layer's output; with `again`, its activations are computed once more on the way back instead of kept."""
    out: Tensor = checkpoint(layer, *inputs, use_reentrant=False) if again else layer(*inputs)
    return out


def again(function: Callable[..., Tensor], *inputs: Tensor, kept: int, draws: bool = False) -> Tensor:
    """A function's output; what it keeps for the way back is its inputs alone, and it is computed once more there.

    Its last product is not computed again: nothing needs it.

    Args:
        kept: bytes it would keep otherwise; where they are few, it does.
        draws: random numbers, as dropout does.
    """
    if not torch.is_grad_enabled() or kept < _WORTH_COMPUTING_AGAIN:
        return function(*inputs)
    out: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=draws)
    return out


def _feed(function: Callable[[Tensor], Tensor], x_NLD: Tensor, width: int) -> Tensor:
    """A feed-forward layer of a hidden width."""
    return again(function, x_NLD, kept=x_NLD.shape[:-1].numel() * x_NLD.element_size() * width)


class WordHead(nn.Module):
    """BERT's masked-language head: hidden states to logits over words, by the word embeddings themselves."""

    def __init__(self, config: BlipTextConfig, words: nn.Embedding) -> None:
        super().__init__()
        width = config.hidden_size
        self.transform = nn.ModuleDict(
            {"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=config.layer_norm_eps)}
        )
        self.decoder = nn.Linear(width, config.vocab_size)
        self.decoder.weight = words.weight
        self.bias = self.decoder.bias

    def forward(self, x_NLD: Tensor) -> Tensor:
        """Logits [N, L, V]."""
        hidden = self.transform["LayerNorm"](fused.gelu(self.transform["dense"], x_NLD))
        logits: Tensor = self.decoder(hidden)
        return logits


# --- networks ---


class TextDecoder(nn.Module):
    """The text transformer with the head that writes."""

    def __init__(self, config: BlipTextConfig) -> None:
        super().__init__()
        self.bert = TextTransformer(config)
        self.cls = nn.ModuleDict({"predictions": WordHead(config, self.bert.embeddings.word_embeddings)})

    def logits(self, x_NLD: Tensor) -> Tensor:
        """Logits [N, L, V] of the words that come next."""
        out: Tensor = self.cls["predictions"](x_NLD)
        return out


class CaptioningNetwork(nn.Module):
    """Vision transformer and image-grounded decoder: transformers' `BlipForConditionalGeneration`."""

    architecture = "BlipForConditionalGeneration"

    def __init__(self, config: BlipConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.vision_model = VisionTransformer(config.vision_config, drop_path)
        self.text_decoder = TextDecoder(config.text_config)


class RetrievalNetwork(nn.Module):
    """Vision transformer, text encoder, ITC and ITM heads: transformers' `BlipForImageTextRetrieval`."""

    architecture = "BlipForImageTextRetrieval"

    def __init__(self, config: BlipConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        _check(config)
        width, vision, shared = config.text_config.hidden_size, config.vision_config.hidden_size, _joint_width(config)
        self.config = config
        self.vision_model = VisionTransformer(config.vision_config, drop_path)
        self.text_encoder = TextTransformer(config.text_config)
        self.vision_proj = nn.Linear(vision, shared)
        self.text_proj = nn.Linear(width, shared)
        self.itm_head = nn.Linear(width, 2)

    def embed_images(self, seen_BTW: Tensor) -> Tensor:
        """Unit vectors for ITC, float32 [B, joint width]."""
        return unit_vectors(self.vision_proj, seen_BTW)

    def embed_texts(self, hidden_NLD: Tensor) -> Tensor:
        """Unit vectors for ITC, float32 [N, joint width], of the unimodal encoder's output."""
        return unit_vectors(self.text_proj, hidden_NLD)

    def match(self, hidden_NLD: Tensor) -> Tensor:
        """ITM logits [N, 2] of the image-grounded encoder's output; class 1 is a match."""
        logits: Tensor = self.itm_head(hidden_NLD[:, 0])
        return logits


def unit_vectors(projection: nn.Linear, x_BTD: Tensor) -> Tensor:
    """Of the first tokens, projected; float32."""
    return F.normalize(projection(x_BTD[:, 0]).float(), dim=-1)


def _joint_width(config: BlipConfig) -> int:
    return int(config.image_text_hidden_size)


def _check(config: BlipConfig) -> None:
    """Refuse what the network would compute otherwise than the configuration says."""
    text, vision = config.text_config, config.vision_config
    counts = (
        ("vision_config.image_size", vision.image_size),  # transformers' may be a pair
        ("vision_config.patch_size", vision.patch_size),
        ("vision_config.num_attention_heads", vision.num_attention_heads),
        ("text_config.num_attention_heads", text.num_attention_heads),
    )
    for name, value in counts:
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config.json: {name} is {value}, expected one number above 0")
    wanted = (
        ("text_config.hidden_act", text.hidden_act, "gelu"),
        ("vision_config.hidden_act", vision.hidden_act, "gelu"),
        ("text_config.encoder_hidden_size", text.encoder_hidden_size, vision.hidden_size),
        ("vision_config.image_size % patch_size", vision.image_size % vision.patch_size, 0),
        ("vision_config.hidden_size % num_attention_heads", vision.hidden_size % vision.num_attention_heads, 0),
        ("text_config.hidden_size % num_attention_heads", text.hidden_size % text.num_attention_heads, 0),
    )
    for name, value, expected in wanted:
        if value != expected:
            raise CheckpointError(f"config.json: {name} is {value}, expected {expected}")


@torch.no_grad()
def initialise(network: nn.Module, generator: torch.Generator, std: float = 0.02) -> None:
    """Draw every weight anew: normal of `std` cut at two deviations; biases 0, norms 1.

    The published initialisation (salesforce/BLIP, models/vit.py, models/med.py). transformers' configuration would
    start the vision transformer at nothing: its initializer_range is 1e-10.
    """
    norms = {id(p) for module in network.modules() if isinstance(module, nn.LayerNorm) for p in [module.weight]}
    for name, parameter in network.named_parameters():
        if id(parameter) in norms:
            parameter.fill_(1)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)


def fill(network: nn.Module, state: Mapping[str, Tensor], source: str, *, keep: bool = False) -> None:
    """Copy a checkpoint's weights into a network, every one of them and nothing else.

    Args:
        state: by transformers' names; one of two tied names is enough, and `position_ids` of old files are passed over.
        source: for the message.
        keep: the network's parameters become these tensors themselves, of whatever type and memory they are.

    Raises:
        CheckpointError: weights are missing, unexpected, of another shape, or not one where they are tied.
    """
    own = network.state_dict()
    given = {name: tensor for name, tensor in state.items() if not name.endswith(".position_ids")}
    for second, first in TIED.items():
        either = given.get(first, given.get(second))
        if either is not None:
            if not torch.equal(given.get(second, either), either):
                raise CheckpointError(f"{source}: {first} and {second} differ, but in BLIP they are one")
            given[first] = given[second] = either
    wrong = {
        "missing": own.keys() - given.keys(),
        "unexpected": given.keys() - own.keys(),
        "mismatched": {name for name in own.keys() & given.keys() if own[name].shape != given[name].shape},
    }
    for what, keys in wrong.items():
        if keys := keys - TIED.keys():
            listed = ", ".join(sorted(keys)[:5]) + (", ..." if len(keys) > 5 else "")
            kind = getattr(network, "architecture", type(network).__name__)
            raise CheckpointError(f"{source}: {len(keys)} {what} keys for a {kind}: {listed}")
    network.load_state_dict({name: given[name] for name in own}, assign=keep)
