"""The three losses of BLIP's pretraining as functions of features and logits (BLIP section 3.2).

Formulas: salesforce/BLIP, models/blip_pretrain.py and models/blip_retrieval.py; the momentum terms are ALBEF's (Li et
al., "Align before Fuse", NeurIPS 2021, section 3.2 and equation 6).

B  rows of this rank    M  candidate rows: of this rank or of all    Q  rows in the queue    E  width of the embeddings
K  B or M, then Q: all candidates of a contrast    N  texts    L  text tokens    V  vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  torch's own name for it

from capfilt.errors import TrainingError

PRIOR_COLLAPSE = 0.6365
"""ITM loss of a model that has learnt only that one pair in three matches: -(1/3 ln 1/3 + 2/3 ln 2/3)."""

IGNORED = -100
"""Label of a token that no loss is taken on."""

NEGATIVE_FLOOR = 1e-4
"""Added to a softmax over negatives, so that none is impossible (models/blip_pretrain.py)."""


def one_hot_targets(own_B: Tensor, candidates_K: Tensor) -> Tensor:
    """Rows of the same image share the mass of a target equally (models/blip_retrieval.py).

    Args:
        own_B, candidates_K: image ids, int64. Every row must be among the candidates.

    Returns:
        float32 [B, K], rows that sum to 1.
    """
    same_BK = (own_B[:, None] == candidates_K[None]).float()
    return same_BK / same_BK.sum(1, keepdim=True)


class Contrast(NamedTuple):
    """The two directions of image-text contrast.

    Attributes:
        image_to_text, text_to_image: logits [B, K], cosine over temperature.
    """

    image_to_text: Tensor
    text_to_image: Tensor


def contrast(image_BE: Tensor, text_BE: Tensor, images_KE: Tensor, texts_KE: Tensor, temperature: Tensor) -> Contrast:
    """Cosines over the temperature, of rows with candidates.

    Float32 under autocast too: a cosine in bfloat16 is off by 0.002, which the temperature makes nats of.

    Args:
        image_BE, text_BE: unit vectors of this rank's rows.
        images_KE, texts_KE: unit vectors of the candidates. In ITC the momentum twin's, of the batch and of the queue.
        temperature: above 0.
    """
    with torch.autocast(image_BE.device.type, enabled=False):
        return Contrast(image_BE @ texts_KE.T / temperature, text_BE @ images_KE.T / temperature)


def itc_loss(student: Contrast, teacher: Contrast, targets_BK: Tensor, alpha: float) -> Tensor:
    """Image-text contrastive loss against soft targets, mean of both directions.

    Cross-entropy with alpha * softmax(teacher) + (1 - alpha) * target.

    Args:
        student: with gradients.
        teacher: the momentum twin's own contrast; the pseudo-targets.
        targets_BK: rows that sum to 1.
        alpha: in [0, 1].
    """
    losses = []
    for logits_BK, soft_BK in zip(student, teacher, strict=True):
        mixed_BK = alpha * soft_BK.detach().softmax(1) + (1 - alpha) * targets_BK
        losses.append(-(F.log_softmax(logits_BK, 1) * mixed_BK).sum(1).mean())
    return (losses[0] + losses[1]) / 2


def hard_negatives(logits_BM: Tensor, own_B: Tensor, candidates_M: Tensor, noise_BM: Tensor) -> Tensor:
    """One negative for each row, drawn in proportion to softmax(logits) + 1e-4, never of the row's own image.

    Args:
        logits_BM: similarity of each row with each candidate.
        own_B, candidates_M: image ids.
        noise_BM: uniform in (0, 1): the draw is a Gumbel race, so that equal noise gives an equal draw on any number of
            ranks.

    Returns:
        int64 [B], positions among the candidates.

    Raises:
        TrainingError: a row has no candidate of another image.
    """
    same_BM = own_B[:, None] == candidates_M[None]
    if bool(same_BM.all(1).any()):
        raise TrainingError(
            "a batch holds pairs of one image only, so that matching has no negatives: raise batch_size, or take "
            "data of more images"
        )
    weights_BM = logits_BM.detach().float().softmax(1) + NEGATIVE_FLOOR
    race_BM = weights_BM.log() - torch.log(-torch.log(noise_BM))
    return race_BM.masked_fill(same_BM, -torch.inf).argmax(1)


def itm_loss(logits_N2: Tensor, positives: int) -> Tensor:
    """Image-text matching loss: cross-entropy of N pairs, of which the first `positives` match (class 1)."""
    labels_N = (torch.arange(len(logits_N2), device=logits_N2.device) < positives).long()
    return F.cross_entropy(logits_N2.float(), labels_N)


def lm_labels(ids_NL: Tensor, mask_NL: Tensor, prompt: int) -> Tensor:
    """Labels [N, L] of a language model: the tokens, but for padding, the first token and `prompt` tokens after it.

    Args:
        prompt: tokens of the prompt, [DEC] not counted (models/blip.py, BLIP_Decoder: prompt_length).
    """
    labels_NL = ids_NL.masked_fill(mask_NL == 0, IGNORED)
    labels_NL[:, : 1 + prompt] = IGNORED
    return labels_NL


def lm_loss(logits_NLV: Tensor, labels_NL: Tensor, smoothing: float) -> Tensor:
    """Language-modelling loss: cross-entropy of each next token, with label smoothing, mean over labelled tokens.

    Args:
        labels_NL: aligned with the input; position l is predicted from l - 1.
        smoothing: in [0, 1): mass spread over the vocabulary.
    """
    logits_NV, labels_N = logits_NLV[:, :-1].flatten(0, 1).float(), labels_NL[:, 1:].flatten()
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, label_smoothing=smoothing)
