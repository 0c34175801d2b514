"""What a MED starts from: its configuration, and its first weights, random or those of a ViT and a BERT.

BLIP starts ViT-B from DeiT, ViT-L from a ViT trained on ImageNet-21k, and the text transformer from bert-base-uncased
(BLIP section 4.1; salesforce/BLIP, models/blip_pretrain.py). Checkpoints are read as transformers writes `ViTModel`,
`DeiTModel`, `BertModel` and the models with heads on them; on the hub: facebook/deit-base-patch16-224,
google/vit-large-patch16-224-in21k, google-bert/bert-base-uncased.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig

from capfilt.errors import CheckpointError, SpecError
from capfilt.models.blip import initialise, resize_positions
from capfilt.models.checkpoints import read_weights
from capfilt.models.med import Med
from capfilt.models.tokenizer import read_tokenizer
from capfilt.spec import Architecture

_Table = tuple[tuple[str, tuple[str, ...]], ...]
"""Pattern of our names, to the checkpoint's names for it. Several are stacked; with none, the weight stays as drawn."""

_VISION: _Table = (
    (r"embeddings\.class_embedding", ("embeddings.cls_token",)),
    (r"embeddings\.position_embedding", ("embeddings.position_embeddings",)),
    (r"embeddings\.patch_embedding\.(\w+)", (r"embeddings.patch_embeddings.projection.\1",)),
    (
        r"encoder\.layers\.(\d+)\.self_attn\.qkv\.(\w+)",
        tuple(rf"encoder.layer.\1.attention.attention.{part}.\2" for part in ("query", "key", "value")),
    ),
    (r"encoder\.layers\.(\d+)\.self_attn\.projection\.(\w+)", (r"encoder.layer.\1.attention.output.dense.\2",)),
    (r"encoder\.layers\.(\d+)\.layer_norm1\.(\w+)", (r"encoder.layer.\1.layernorm_before.\2",)),
    (r"encoder\.layers\.(\d+)\.layer_norm2\.(\w+)", (r"encoder.layer.\1.layernorm_after.\2",)),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.(\w+)", (r"encoder.layer.\1.intermediate.dense.\2",)),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.(\w+)", (r"encoder.layer.\1.output.dense.\2",)),
    (r"post_layernorm\.(\w+)", (r"layernorm.\1",)),
)
_TEXT: _Table = (
    (r"text_(?:encoder|decoder\.bert)\.encoder\.layer\.\d+\.crossattention\..+", ()),  # BERT sees no images
    (r"text_(?:encoder|decoder\.bert)\.(.+)", (r"\1",)),
    (r"text_decoder\.cls\.predictions\.decoder\.weight", ("embeddings.word_embeddings.weight",)),
    (r"text_decoder\.cls\.predictions\.decoder\.bias", ("cls.predictions.bias",)),
    (r"text_decoder\.(cls\.predictions\..+)", (r"\1",)),
)
_UNUSED = re.compile(
    r"(classifier|cls_classifier|distillation_classifier|pooler|cls\.seq_relationship)\..+"
    r"|embeddings\.(distillation_token|mask_token|position_ids|token_type_embeddings\.weight)"
)
"""What a checkpoint may have that BLIP has not."""

_TIED = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
"""BERT's second names of one weight, to the first."""


def blip_config(architecture: Architecture, image_size: int, tokenizer: Tokenizer) -> BlipConfig:
    """The configuration of an architecture, as transformers reads it.

    BLIP's values where transformers' defaults are others: text heads and dropout (configs/med_config.json), eps 1e-6 of
    the vision transformer (models/vit.py), and its initializer_range, which would be 1e-10. Smoothing is the loss's.

    Args:
        image_size: side in pixels at which positions are learned.
        tokenizer: bert-base-uncased's kind. [DEC] and [ENC] follow its last token, unless it knows them already.

    Raises:
        SpecError: image_size is not a multiple of the patch.
        CheckpointError: the tokenizer lacks a special token.
    """
    vision, text = architecture.vision, architecture.text
    if image_size % vision.patch:
        raise SpecError(f"image_size: {image_size} is not a multiple of architecture.vision.patch, {vision.patch}")
    vocabulary, dec = _vocabulary(tokenizer)
    vision_config = BlipVisionConfig(
        hidden_size=vision.width,
        intermediate_size=vision.mlp,
        num_hidden_layers=vision.depth,
        num_attention_heads=vision.heads,
        image_size=image_size,
        patch_size=vision.patch,
        layer_norm_eps=1e-6,
        initializer_range=0.02,
    )
    text_config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text.width,
        encoder_hidden_size=vision.width,
        intermediate_size=text.mlp,
        num_hidden_layers=text.depth,
        num_attention_heads=text.heads,
        max_position_embeddings=text.positions,
        hidden_dropout_prob=text.dropout,
        attention_probs_dropout_prob=text.dropout,
        bos_token_id=dec,
        pad_token_id=tokenizer.token_to_id("[PAD]"),
        sep_token_id=tokenizer.token_to_id("[SEP]"),
        eos_token_id=tokenizer.token_to_id("[SEP]"),
    )
    return BlipConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_text_hidden_size=architecture.joint,
        initializer_range=0.02,
    )


def _vocabulary(tokenizer: Tokenizer) -> tuple[int, int]:
    """Tokens with [DEC] and [ENC], and the id of [DEC] (salesforce/BLIP, models/blip.py, init_tokenizer)."""
    known = tokenizer.get_vocab()
    modes = ("[DEC]", "[ENC]") if "[DEC]" in known or "[ENC]" in known else ()
    missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *modes) if token not in known]
    if missing:
        raise CheckpointError(f"the tokenizer lacks {', '.join(missing)}; take that of a BERT, bert-base-uncased say")
    size = max(known.values()) + 1
    return (size, known["[DEC]"]) if modes else (size + 2, size)


def initial_med(
    architecture: Architecture,
    image_size: int,
    tokenizer: Tokenizer,
    generator: torch.Generator,
    *,
    vision: Path | None,
    text: Path | None,
    allow_pickle: bool,
    std: float = 0.02,
) -> Med:
    """A MED before its first step, on the CPU.

    Args:
        image_size, tokenizer: as :func:`blip_config` takes them.
        generator: draws what no checkpoint gives, the same whichever are given.
        vision: directory of a ViT's or DeiT's checkpoint (`checkpoints.locate`, with `weight_files`: it needs no
            tokenizer); random if not given.
        text: directory of a BERT's; random if not given.
        allow_pickle: read a pytorch_model.bin where there are no safetensors.
        std: of random weights.

    Raises:
        SpecError, CheckpointError: as :func:`blip_config`, :func:`take_vision` and :func:`take_text`.
    """
    network = Med(blip_config(architecture, image_size, tokenizer), architecture.vision.drop_path)
    initialise(network, generator, std)
    if vision is not None:
        take_vision(network, vision, allow_pickle)
    if text is not None:
        take_text(network, text, tokenizer, allow_pickle)
    return network


# --- weights of others ---


@torch.no_grad()
def take_vision(network: Med, directory: Path, allow_pickle: bool) -> None:
    """Start the vision transformer from a ViT's weights, or a DeiT's.

    A distilled DeiT's second token is dropped. Positions are interpolated to the network's image size. Query, key and
    value become one projection.

    Raises:
        CheckpointError: not such a checkpoint, of another architecture, a pickle that is not allowed, or a weight is
            missing or not known.
    """
    config = network.config.vision_config
    _check_config(directory, ("vit", "deit"), config.num_attention_heads)
    given = _read(directory, r"(?:vit|deit)\.", allow_pickle)
    name = "embeddings.position_embeddings"
    if (positions_1TW := given.get(name)) is not None:
        if "embeddings.distillation_token" in given:
            positions_1TW = torch.cat([positions_1TW[:, :1], positions_1TW[:, 2:]], 1)
        patches = positions_1TW.shape[1] - 1
        if math.isqrt(patches) ** 2 != patches:
            raise CheckpointError(f"{directory}: positions of {patches} patches, which are no square grid")
        given[name] = resize_positions(positions_1TW.float(), config.image_size // config.patch_size)
    _take(network.vision_model.state_dict(), _VISION, given, directory)


@torch.no_grad()
def take_text(network: Med, directory: Path, tokenizer: Tokenizer, allow_pickle: bool) -> None:
    """Start the text transformer from a BERT's weights: encoder and decoder alike, and the head that writes.

    What the BERT does not have stays as it is: attention to images, the rows of [DEC] and [ENC], the head if it is a
    BERT without one. Token types are dropped, as BLIP does, whose embeddings have none (salesforce/BLIP, models/med.py,
    BertEmbeddings): what BERT adds to every word, the row of type 0, is missing at the start.

    Args:
        tokenizer: the network's. Compared with the directory's, if it has one.

    Raises:
        CheckpointError: as :func:`take_vision`; or of another vocabulary.
    """
    config = network.config.text_config
    _check_config(directory, ("bert",), config.num_attention_heads)
    _check_vocabulary(directory, tokenizer)
    given = _read(directory, r"bert\.", allow_pickle)
    for second, first in _TIED.items():
        if (tensor := given.pop(second, None)) is not None and not torch.equal(tensor, given.get(first, tensor)):
            raise CheckpointError(f"{directory}: {first} and {second} differ, but in BLIP they are one")
    writes = any(name.startswith("cls.predictions.") for name in given)
    parts = ("text_encoder.", "text_decoder." if writes else "text_decoder.bert.")
    own = {name: weight for name, weight in network.state_dict().items() if name.startswith(parts)}
    for name, ours in (
        ("embeddings.word_embeddings.weight", "text_encoder.embeddings.word_embeddings.weight"),
        ("cls.predictions.bias", "text_decoder.cls.predictions.bias"),
    ):
        if name in given and len(given[name]) == config.vocab_size - 2:
            given[name] = torch.cat([given[name].float(), own[ours][-2:]])
    _take(own, _TEXT, given, directory)


def _take(own: Mapping[str, Tensor], table: _Table, given: Mapping[str, Tensor], source: Path) -> None:
    """Copy a checkpoint's weights into ours, by a table that knows all of ours.

    Raises:
        CheckpointError: a weight is missing, of another shape, or neither used nor among the known rest.
    """
    sources = {name: _sources(name, table) for name in own}
    used = {theirs for names in sources.values() for theirs in names}
    unknown = {name for name in given if name not in used and not _UNUSED.fullmatch(name)}
    for what, wrong in (("lacks", used - given.keys()), ("has also", unknown)):
        if wrong:
            raise CheckpointError(f"{source}: it {what} {_listed(wrong)}; is it of another architecture or depth?")
    for name, names in sources.items():
        if names:
            stacked = torch.cat([given[theirs] for theirs in names])
            if stacked.shape != own[name].shape:
                raise CheckpointError(
                    f"{source}: {' + '.join(names)} is {list(stacked.shape)}, but the architecture's is "
                    f"{list(own[name].shape)}"
                )
            own[name].copy_(stacked)


def _sources(name: str, table: _Table) -> list[str]:
    for pattern, sources in table:
        if match := re.fullmatch(pattern, name):
            return [match.expand(source) for source in sources]
    raise AssertionError(f"{name} is in no row of the table")


def _listed(names: Iterable[str]) -> str:
    some = sorted(names)
    return ", ".join(some[:5]) + (f", ... ({len(some)} in all)" if len(some) > 5 else "")


def _read(directory: Path, prefix: str, allow_pickle: bool) -> dict[str, Tensor]:
    """A checkpoint's weights by name, without the prefix that models with a head have.

    BERTs of 2018, bert-base-uncased among them, call the weight and bias of a norm gamma and beta.
    """
    modern = {"gamma": "weight", "beta": "bias"}
    renamed = {}
    for name, tensor in read_weights(directory, allow_pickle).items():
        stem, dot, last = re.sub(rf"^{prefix}", "", name).rpartition(".")
        renamed[stem + dot + (modern.get(last, last) if "LayerNorm" in stem else last)] = tensor
    return renamed


def _check_config(directory: Path, kinds: tuple[str, ...], heads: int) -> None:
    """Refuse what no weight's name or shape tells."""
    file = directory / "config.json"
    try:
        raw: dict[str, Any] = dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: not a model configuration: {error}") from error
    wanted = {"model_type": kinds, "num_attention_heads": (heads,), "hidden_act": ("gelu",)}
    if "bert" in kinds:
        wanted["position_embedding_type"] = ("absolute", None)
    for name, expected in wanted.items():
        if raw.get(name) not in expected:
            raise CheckpointError(f"{file}: {name} is {raw.get(name)}, expected {' or '.join(map(str, expected))}")


def _check_vocabulary(directory: Path, tokenizer: Tokenizer) -> None:
    """Refuse a BERT whose words have other ids: its embeddings would be those of other words, and no shape tells."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        return
    ours, theirs = tokenizer.get_vocab(), read_tokenizer(directory).get_vocab()
    strange = [token for token, number in theirs.items() if ours.get(token) != number]
    if strange:
        raise CheckpointError(
            f"{directory}: its vocabulary is not the network's: {len(strange)} tokens have another id or none, "
            f"{strange[0]!r} for one; train with this directory's tokenizer"
        )
