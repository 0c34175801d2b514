"""A BLIP pair small enough for tests and the demo: random weights, real format. It has learnt nothing."""

from __future__ import annotations

import math
import string
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig

from capfilt.models.blip import CaptioningNetwork, RetrievalNetwork, initialise
from capfilt.models.checkpoints import save

IMAGE_SIZE = 32
WIDTH = 32

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MODES = ("[DEC]", "[ENC]")  # last, as BLIP appends them to bert-base-uncased
_HEARING = {  # (network, cross-attention): gain, by trial
    ("text_decoder", True): 3.0,
    ("text_decoder", False): 1.0,
    ("text_encoder", True): 0.4,
    ("text_encoder", False): 6.0,
}
_WORDS = """
a an the of on in with and at by is are there this that it no two three one
red green blue yellow purple orange white black grey pink brown dark bright
circle square triangle cross star shape dot line
small large big tiny background picture photo image drawing
dog cat man woman child bird tree house car street sky water grass table wall field beach
sitting standing holding looking next near front top left right over under
click to enlarge buy now free shipping not available share your stock royalty loading please wait
"""


def write_tiny_pair(directory: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write two tiny random BLIP checkpoints in the hub's format: a captioner and a filter.

    Vision: 32 px, patch 8. Both towers: width 32, 2 layers, 2 heads. Vocabulary: everyday caption words, and letters,
    digits and marks, so that any ASCII text has tokens. The weights are random, scaled so that captions have entropy
    and depend on the image, and match probabilities fall on both sides of 0.5; what they say of an image means nothing.

    Args:
        directory: made if missing. `captioner` and `filter` in it are replaced, each appearing whole.
        seed: the same seed writes the same bytes, on one version of torch.

    Returns:
        Directories of the captioner and of the filter.
    """
    vocabulary = _vocabulary()
    config = _config(vocabulary)
    with torch.random.fork_rng(devices=[]):  # what modules draw as they are made; all of it is drawn again
        networks: tuple[CaptioningNetwork | RetrievalNetwork, ...] = CaptioningNetwork(config), RetrievalNetwork(config)
    for number, (role, network) in enumerate(zip(("captioner", "filter"), networks, strict=True)):
        _fill(network, torch.Generator().manual_seed(seed * 2 + number), vocabulary)
        save(network, directory / role, vocabulary)
    return directory / "captioner", directory / "filter"


def _vocabulary() -> dict[str, int]:
    letters = string.ascii_lowercase + string.digits
    tokens = [
        *_SPECIAL,
        *_WORDS.split(),
        *letters,
        *string.punctuation,
        *(f"##{letter}" for letter in letters),
        "##s",
        "##ing",
    ]
    return {token: number for number, token in enumerate([*dict.fromkeys(tokens), *_MODES])}


def _config(vocabulary: dict[str, int]) -> BlipConfig:
    text = BlipTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        encoder_hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=vocabulary["[DEC]"],
        pad_token_id=vocabulary["[PAD]"],
        sep_token_id=vocabulary["[SEP]"],
        eos_token_id=vocabulary["[SEP]"],
    )
    vision = BlipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
        initializer_range=0.02,  # the default, 1e-10, starts a vision transformer at nothing
    )
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator, vocabulary: dict[str, int]) -> None:
    """Draw every weight anew, in the order of names: variance 1 / fan-in, then what the roles need."""

    def normal(weight: Tensor, std: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    initialise(model, torch.Generator())  # for the biases and norms
    parameters = sorted(model.named_parameters())  # tied ones once
    for _, weight in parameters:
        if weight.dim() > 1:
            normal(weight, 1 / math.sqrt(weight[0].numel()))
    named = dict(parameters)
    for name, weight in parameters:
        if name.endswith("word_embeddings.weight"):  # also the captioner's output layer: logits of std 2 or so
            normal(weight, 0.35)
        elif name.endswith(
            "attention.output.dense.weight"
        ):  # let position 0 hear the image, and in the filter the text
            tower, cross = name.split(".")[0], ".crossattention." in name
            weight.mul_(_HEARING[tower, cross])
        elif name.endswith("itm_head.weight"):
            normal(weight, 0.3)
    bias = named.get("text_decoder.cls.predictions.bias")
    if bias is not None:
        pieces = [
            number
            for token, number in vocabulary.items()
            if token != "a" and (len(token) == 1 or token.startswith("##"))
        ]
        bias[pieces] = -4.0  # captions of words, not of letters
        bias[vocabulary["[SEP]"]] = 2.5
