"""Read the authors' own checkpoints, `.pth` files of salesforce/BLIP: pretraining, captioning, retrieval."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from capfilt.errors import CheckpointError
from capfilt.models.blip import fill, resize_positions
from capfilt.models.checkpoints import read_pickle, weights_in

_POSITIONS = "vision_model.embeddings.position_embedding"
_LAYER = r"visual_encoder\.blocks\.(\d+)\."
_OURS = r"vision_model.encoder.layers.\1."

NAMES = (
    (r"visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed$", _POSITIONS),
    (r"visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (_LAYER + r"norm1\.", _OURS + "layer_norm1."),
    (_LAYER + r"attn\.qkv\.", _OURS + "self_attn.qkv."),
    (_LAYER + r"attn\.proj\.", _OURS + "self_attn.projection."),
    (_LAYER + r"norm2\.", _OURS + "layer_norm2."),
    (_LAYER + r"mlp\.", _OURS + "mlp."),
    (r"visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"(text_encoder|text_decoder|vision_proj|text_proj|itm_head)\.", r"\1."),
)
"""How a name of theirs begins, and how ours does (salesforce/BLIP, models/vit.py and models/med.py)."""

_LEFT_OUT = re.compile(
    r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\..*"  # the momentum twin
    r"|(image|text|idx|ptr)_queue|queue_ptr|temp"
    r"|.*\.position_ids"
)


class Weights(NamedTuple):
    """A checkpoint of the authors'.

    Attributes:
        ours: the network's weights by our names, which are transformers'.
        rest: what only its training needs, by their names: momentum twin, queues, temperature.
    """

    ours: dict[str, Tensor]
    rest: dict[str, Tensor]


def read(file: Path) -> Weights:
    """Read a `.pth`: a pickle, of which nothing but weights is read and no code runs.

    Raises:
        CheckpointError: no such file, broken, not weights, or a name that BLIP's three kinds of checkpoint do not have.
    """
    content = read_pickle(file)
    if isinstance(content, dict) and "model" in content:  # beside it: optimiser, epoch, configuration
        content = content["model"]
    weights = Weights({}, {})
    for name, weight in weights_in(content, file).items():
        if _LEFT_OUT.fullmatch(name):
            weights.rest[name] = weight
        else:
            weights.ours[_renamed(name, file)] = weight
    return weights


def _renamed(name: str, file: Path) -> str:
    for theirs, ours in NAMES:
        renamed, found = re.subn("^" + theirs, ours, name)
        if found:
            return renamed
    raise CheckpointError(f"{file}: {name} is of no pretraining, captioning or retrieval checkpoint of BLIP")


def fill_from(network: nn.Module, file: Path) -> None:
    """Fill a network from a `.pth`, positions interpolated where it has another image size.

    Args:
        network: a captioner may be filled from the decoder of a pretraining checkpoint, a filter from its encoder:
            parts that the network does not have are passed over, but it must get all of its own.

    Raises:
        CheckpointError: as :func:`read` and :func:`capfilt.models.blip.fill`.
    """
    parts = {name for name, _ in network.named_children()}
    state = {name: weight for name, weight in read(file).ours.items() if name.split(".")[0] in parts}
    own = network.state_dict().get(_POSITIONS)
    if own is not None and _POSITIONS in state:
        state[_POSITIONS] = resize_positions(state[_POSITIONS], math.isqrt(own.shape[1] - 1))
    fill(network, state, str(file))
