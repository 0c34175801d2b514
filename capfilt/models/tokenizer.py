"""bert-base-uncased's tokenizer as BLIP uses it: texts <-> token ids, and the ids that select a function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from capfilt.errors import CheckpointError

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, from tokenizer.json or else from vocab.txt.

    Returns:
        Without padding and truncation, and reading `[SEP]` and its like in a text as plain characters: web captions are
        other people's text, and one that spells [SEP] must not become one. Safe to use from several threads.

    Raises:
        CheckpointError: the file is not a tokenizer.
    """
    file = directory / "tokenizer.json"
    try:
        if file.is_file():
            tokenizer: Tokenizer = Tokenizer.from_file(str(file))
        else:
            file = directory / "vocab.txt"
            tokenizer = bert_tokenizer(models.WordPiece.read_file(str(file)))
    except Exception as error:
        raise CheckpointError(f"{file}: not a tokenizer: {error}; fetch it again, or name another") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def bert_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    """bert-base-uncased's tokenizer over another vocabulary. Adds no [CLS] or [SEP] of its own."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.add_special_tokens([token for token in _SPECIAL if token in vocabulary])
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return tokenizer


def token_ids(tokenizer: Tokenizer, config: Any, directory: Path) -> dict[str, int]:
    """Ids of the special tokens: dec, enc, cls, sep, pad.

    The hub's tokenizers are plain BERT's, 30522 tokens; the networks know two more, [DEC] and then [ENC]
    (salesforce/BLIP, models/blip.py, init_tokenizer).

    Args:
        config: the checkpoint's BlipTextConfig.
        directory: for the message.

    Raises:
        CheckpointError: tokenizer and configuration disagree.
    """
    ids = {
        "dec": config.bos_token_id,
        "enc": tokenizer.token_to_id("[ENC]") or config.bos_token_id + 1,
        "cls": tokenizer.token_to_id("[CLS]"),
        "sep": tokenizer.token_to_id("[SEP]"),
        "pad": tokenizer.token_to_id("[PAD]"),
    }
    wrong = [name for name, token in ids.items() if token is None or not 0 <= token < config.vocab_size]
    if wrong or ids["sep"] != config.sep_token_id or tokenizer.get_vocab_size() > config.vocab_size:
        raise CheckpointError(
            f"{directory}: tokenizer and config.json disagree: special tokens {ids}, sep_token_id "
            f"{config.sep_token_id}, {tokenizer.get_vocab_size()} tokens for a vocabulary of {config.vocab_size}"
        )
    return ids


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Texts' ids and mask, int64 [N, L], padded on the right to the longest; the mask is 1 where there is text."""
    longest = max(map(len, rows))
    ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def with_first(ids_NL: Tensor, token: int) -> Tensor:
    """The texts with another first token: [CLS], [ENC] and [DEC] choose the network's function."""
    return torch.cat([torch.full_like(ids_NL[:, :1], token), ids_NL[:, 1:]], 1)
