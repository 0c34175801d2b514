"""Image-text retrieval: ITC finds candidates, ITM ranks them anew (salesforce/BLIP, train_retrieval.py, evaluation).

Of CLIP and SigLIP the similarity of their vectors is all there is.

B  images in a batch    I  images of a pool    T  texts of its images, image by image    U  different texts of all
K  candidates    J  width of ITC's vectors    S  side in pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from capfilt.evaluate import Recall, best_candidates, recall_at_k, rerank
from capfilt.models.dual import DualFilter
from capfilt.models.itm import ItmFilter, Tokens
from capfilt.models.squares import Show

KS = (1, 5, 10)

K_TEST = 256
"""Candidates that BLIP reranks on COCO."""

_Ints = npt.NDArray[np.int64]
_Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Retrieved:
    """How well images find their texts, and texts their image.

    Attributes:
        itc: recall by the similarity of the vectors alone: ITC's, CLIP's or SigLIP's.
        itm: recall after ITM has ranked the best `k_test` candidates anew; None where the filter has no ITM.
        images, texts: that took part.
        pools: that they were split into; recall is the mean over all queries of all pools.
        pool_images: images of each.
        left_out_images: of a last pool that was not full.
        k_test: candidates of a query, at most; None without ITM.
    """

    itc: Recall
    itm: Recall | None
    images: int
    texts: int
    pools: int
    pool_images: int
    left_out_images: int
    k_test: int | None


def retrieve(
    filter_: ItmFilter | DualFilter,
    show: Show,
    texts: Sequence[Sequence[str]],
    k_test: int = K_TEST,
    pool: int | None = None,
) -> Retrieved:
    """R@1, 5 and 10 both ways. With ITM every image goes through the vision transformer twice; every candidate pair of
    image and text, whichever of the two found the other, through the ITM head once.

    An image's true texts are its own; a text's true image is the one it came with. Where several images have the same
    text, each still has its own copy, and the others' copies are wrong candidates that score alike, as in BLIP: what
    nobody can tell apart counts as missed.

    Memory is that of a pool's matrices, 28 bytes for each pair of an image and a text: 3.5 GB for COCO's 5,000 images
    and 25,000 texts.

    Args:
        texts: of each image, one or more, cleaned.
        pool: so many images, in order, compete with each other; a last pool of fewer is left out, unless it is the only
            one. All if not given.

    Raises:
        FloatingPointError: the filter's scores are not numbers.
    """
    size = min(pool or len(texts), len(texts))
    starts = range(0, len(texts) - size + 1, size)
    used = len(starts) * size
    unique = list(dict.fromkeys(text for own in texts[:used] for text in own))
    at = {text: number for number, text in enumerate(unique)}
    tokens = filter_.tokens(unique) if isinstance(filter_, ItmFilter) else None
    text_UJ = _embed_texts(filter_, unique, tokens)
    before, after, counts = list[Recall](), list[Recall](), list[int]()
    for start in starts:
        own = texts[start : start + size]
        image_T = np.repeat(np.arange(size), [len(some) for some in own])
        unique_T = np.array([at[text] for some in own for text in some])
        itc_IT = _similarity(filter_, show, start, size, text_UJ)[:, unique_T].astype(np.float64)
        before.append(recall_at_k(itc_IT, image_T, KS))
        if isinstance(filter_, ItmFilter) and tokens is not None:
            after.append(_reranked(filter_, show, start, itc_IT, image_T, unique_T, tokens, k_test))
        counts.append(len(unique_T))
    return Retrieved(
        itc=_mean(before, counts),
        itm=_mean(after, counts) if after else None,
        images=used,
        texts=sum(counts),
        pools=len(starts),
        pool_images=size,
        left_out_images=len(texts) - used,
        k_test=k_test if after else None,
    )


def _embed_texts(filter_: ItmFilter | DualFilter, texts: Sequence[str], tokens: Tokens | None) -> Tensor:
    if isinstance(filter_, ItmFilter):
        return filter_.embed_texts(tokens or filter_.tokens(texts))
    return filter_.embed_texts(texts)


def _similarity(filter_: ItmFilter | DualFilter, show: Show, start: int, size: int, text_UJ: Tensor) -> _Matrix:
    """Of a pool's images, from `start`, and all texts: [I, U]. Equal texts score exactly alike."""
    image_IJ = torch.cat([filter_.embed_images(batch) for batch in show(start, start + size)])
    return (image_IJ @ text_UJ.T).numpy()


def _reranked(
    filter_: ItmFilter,
    show: Show,
    start: int,
    itc_IT: npt.NDArray[np.float64],
    image_T: _Ints,
    unique_T: _Ints,
    tokens: Tokens,
    k_test: int,
) -> Recall:
    """Recall in a pool after ITM has ranked ITC's candidates.

    Args:
        start: the pool's first image.
        image_T: of each text its image in the pool.
        unique_T: of each text its place in `tokens`.
    """
    forth_IK, back_TK = best_candidates(itc_IT, k_test), best_candidates(itc_IT.T, k_test)
    logit_IT = _match(filter_, show, start, tokens, unique_T, _wanted(forth_IK, back_TK))
    forth_IT = rerank(itc_IT, forth_IK, np.take_along_axis(logit_IT, forth_IK, 1))
    forth = recall_at_k(forth_IT, image_T, KS)
    del forth_IT  # as large as the next
    back_TI = rerank(itc_IT.T, back_TK, np.take_along_axis(logit_IT.T, back_TK, 1))
    back = recall_at_k(back_TI.T, image_T, KS)
    return Recall(forth.image_to_text, back.text_to_image)


def _wanted(forth_IK: _Ints, back_TK: _Ints) -> npt.NDArray[np.bool_]:
    """bool [I, T]: pairs of which either is a candidate of the other."""
    wanted_IT = np.zeros((len(forth_IK), len(back_TK)), dtype=bool)
    np.put_along_axis(wanted_IT, forth_IK, True, 1)
    np.put_along_axis(wanted_IT.T, back_TK, True, 1)
    return wanted_IT


def _match(
    filter_: ItmFilter, show: Show, start: int, tokens: Tokens, unique_T: _Ints, wanted_IT: npt.NDArray[np.bool_]
) -> _Matrix:
    """The ITM head's match logits of the wanted pairs, [I, T]; anything elsewhere."""
    logit_IT = np.zeros(wanted_IT.shape, dtype=np.float32)
    image = 0
    for pixels_BCSS in show(start, start + len(wanted_IT)):
        columns = [np.flatnonzero(row_T) for row_T in wanted_IT[image : image + len(pixels_BCSS)]]
        different = [np.unique(unique_T[own], return_inverse=True) for own in columns]
        logits = filter_.match(pixels_BCSS, tokens, [texts.tolist() for texts, _ in different])
        for own, (_, place), logit_N in zip(columns, different, logits, strict=True):
            logit_IT[image, own] = logit_N.numpy()[place]
            image += 1
    return logit_IT


def _mean(pools: Sequence[Recall], texts: Sequence[int]) -> Recall:
    """Of all pools' queries; they have as many images each."""
    return Recall(
        {k: float(np.mean([pool.image_to_text[k] for pool in pools])) for k in KS},
        {k: float(np.average([pool.text_to_image[k] for pool in pools], weights=texts)) for k in KS},
    )
