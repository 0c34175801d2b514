"""Identities: of a checkpoint's weights, and of a run's three stages. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capfilt.errors import CheckpointError
from capfilt.perceptual import HASH_CODE
from capfilt.spec import (
    AnyCard,
    CaptionerCard,
    ClassifierCard,
    CurateSpec,
    DualCard,
    EndpointCard,
    FilterCard,
    GeneratorCard,
    HubCheckpoint,
    KeepOut,
    LocalCheckpoint,
)

CAPTION_CODE = 2
"""Raise it when preprocessing, prompting or sampling changes what any image's caption is."""

SCORE_CODE = 2
"""Raise it when clean-up, tokenisation or the filter's arithmetic changes any score."""

DECIDE_CODE = 1
"""Raise it when the rules of capfilt.decide change any decision."""

_WITHDRAWN = re.compile(r"-[0-9a-f]{16}")

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)

PROCESSOR_FILES = (
    *dict.fromkeys((*TOKENIZER_FILES, *_VOCABULARIES)),
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""What makes images and texts into the input of a model of transformers."""

_WEIGHTS = (  # as transformers looks for them: one file before shards, safetensors before pickle
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """What made a row's columns, 16 hex digits each. A stage is stale where its fingerprint differs.

    Attributes:
        caption: of each captioner in order weights, prompt and image size; sampling, preprocessing, image column.
        score: caption, of each filter in order weights and how it reads a text, text column, columns that are recorded
            (these change no score, but are read from the input, which a decision from the scores on record is not);
            whether perceptual hashes are.
        decide: score, thresholds, how filters decide together, which texts stay, which copies, what is kept out. On
            record it ends, where rows of the shard are dropped as copies, with `+` and a digest of these (see
            capfilt.duplicates); before that it has, where rows of it are withdrawn, `-` and a digest of these.
    """

    caption: str
    score: str
    decide: str


def without_copies(decide: str) -> str:
    """A decide fingerprint without what it says of the rows that are dropped as copies of others."""
    return decide.partition("+")[0]


def run_fingerprints(spec: CurateSpec) -> Fingerprints:
    """The three fingerprints of a run. Reads local checkpoints whole (about 1 GB/s).

    Not in them: batch size, placement, fragment size, quarantine, names, paths. They change no row's
    result. (The names are recorded with texts and scores: a shard keeps those that its cards had when it was curated.)

    Raises:
        CheckpointError: as :func:`fingerprint`.
    """
    kept_out = spec.keep_out or KeepOut()
    classifier = kept_out.classifier
    caption = _digest(
        code=CAPTION_CODE,
        captioners=[_identity(card) for card in spec.captioners],
        sampling=spec.sampling.model_dump(mode="json"),
        max_pixels=spec.images.max_pixels,
        max_bytes=spec.images.max_bytes,
        image_column=spec.input.columns.image,
    )
    score = _digest(
        code=SCORE_CODE,
        caption=caption,
        filters=[_identity(card) for card in spec.filters],
        text_column=spec.input.columns.text,
        recorded_columns=[spec.input.columns.url, spec.input.columns.key],
        **_if_given(
            perceptual_hash=HASH_CODE if spec.duplicates and spec.duplicates.near_bits is not None else None,
            classifier=None if classifier is None else _classifier(classifier),
        ),
    )
    decide = _digest(
        code=DECIDE_CODE,
        score=score,
        thresholds=[own.model_dump(mode="json") for own in spec.effective_thresholds],
        decision=spec.decision,
        keep=spec.keep,
        **_if_given(
            duplicates=spec.duplicates and spec.duplicates.model_dump(mode="json"),
            domains=kept_out.domains or None,
            words=kept_out.words or None,
            unsafe=None if classifier is None else classifier.threshold,
        ),
    )
    return Fingerprints(caption, score, decide)


def files_seen(spec: CurateSpec) -> str:
    """What this machine says of the files of a spec's local checkpoints without reading them, as 16 hex digits.

    Where it is what it was, on the same machine since the same start, the system knows of nothing that was written to
    them: their fingerprints are what they were. Each is opened: a network's file system then asks its server.

    Raises:
        CheckpointError: as :func:`fingerprint`.
    """
    files = [file.absolute() for checkpoint, listed in _local(spec) for file in listed(Path(checkpoint.path))]
    looks = [(str(file), _stat(file)) for file in files]
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        start = ""
    return _digest(
        machine=[socket.gethostname(), start],
        files=[[name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in looks],
    )


def _stat(file: Path) -> os.stat_result:
    with file.open("rb") as opened:
        return os.fstat(opened.fileno())


def _local(spec: CurateSpec) -> Iterator[tuple[LocalCheckpoint, Callable[[Path], list[Path]]]]:
    """Every checkpoint that is a directory, and what lists the files that matter in it."""
    cards: list[AnyCard | ClassifierCard] = [*spec.captioners, *spec.filters]
    if spec.keep_out and spec.keep_out.classifier:
        cards.append(spec.keep_out.classifier)
    for card in cards:
        if not isinstance(card, EndpointCard) and isinstance(card.checkpoint, LocalCheckpoint):
            yield card.checkpoint, files_of(card)


def with_withdrawn(decide: str, rows: Sequence[int]) -> str:
    """The decide fingerprint of a shard of which these rows are withdrawn, if any: with `-` and a digest of them."""
    own = without_withdrawn(decide)
    return f"{own[:16]}-{_digest(withdrawn=sorted(rows))}{own[16:]}" if rows else own


def without_withdrawn(decide: str) -> str:
    """A decide fingerprint without what it says of withdrawn rows."""
    return _WITHDRAWN.sub("", decide)


def _identity(card: AnyCard) -> dict[str, Any]:
    """What a card says that changes what its model writes or scores. BLIP's never had a `model`."""
    match card:
        case CaptionerCard():
            seen = {"image_size": card.image_size, "dtype": card.dtype}
            return {"weights": fingerprint(card.checkpoint), "prompt": card.prompt, **seen}
        case FilterCard():
            read = {"first_token": card.first_token, "max_tokens": card.max_tokens, "itc": card.itc}
            seen = {"image_size": card.image_size, "dtype": card.dtype}
            return {"weights": fingerprint(card.checkpoint), **read, **seen}
        case GeneratorCard():
            asked: dict[str, Any] = {"prompt": card.prompt, "chat": card.chat, "dtype": card.dtype}
        case EndpointCard():
            asked = {"served_model": card.served_model, "revision": card.revision, "prompt": card.prompt}
            asked |= {"parameters": card.parameters, "longest_side": card.longest_side}
        case DualCard():
            asked = {"unit": card.unit, "scale": card.scale, "bias": card.bias, "dtype": card.dtype}
    if not isinstance(card, EndpointCard):
        asked["weights"] = fingerprint(card.checkpoint, model_files)
    if not isinstance(card, DualCard):
        asked["sampling"] = card.sampling.model_dump(exclude_none=True)
    return {"model": card.model, **asked}


def _classifier(card: ClassifierCard) -> dict[str, Any]:
    return {
        "weights": fingerprint(card.checkpoint, classifier_files),
        "image_size": card.image_size,
        "labels": card.labels,
    }


def fingerprint(
    checkpoint: HubCheckpoint | LocalCheckpoint, files: Callable[[Path], Sequence[Path]] | None = None
) -> str:
    """Identity of a checkpoint's weights, configuration and tokenizer.

    Args:
        files: lists what is needed of a directory; :func:`checkpoint_files` if not given.

    Returns:
        `hub:ID@REVISION`, or `sha256:HEX` over names and contents of a directory's files. A copy elsewhere is the same;
        the hub's files in a directory are not the same as the hub.

    Raises:
        CheckpointError: the directory or one of its files is missing.
    """
    if isinstance(checkpoint, HubCheckpoint):
        return f"hub:{checkpoint.hub}@{checkpoint.revision}"
    whole = hashlib.sha256()
    for file in sorted((files or checkpoint_files)(Path(checkpoint.path))):
        with file.open("rb") as stream:
            whole.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def files_of(card: AnyCard | ClassifierCard) -> Callable[[Path], list[Path]]:
    """Lists the files of a card's checkpoint; raises CheckpointError where a directory lacks one."""
    if isinstance(card, ClassifierCard):
        return classifier_files
    return checkpoint_files if isinstance(card, CaptionerCard | FilterCard) else model_files


def checkpoint_files(directory: Path) -> list[Path]:
    """The files of a checkpoint that a model is made from: config.json, weights, tokenizer.

    Raises:
        CheckpointError: as :func:`weight_files` and :func:`tokenizer_files`, or config.json is missing.
    """
    files = weight_files(directory)
    return [_config_file(directory), *files, *tokenizer_files(directory)]


def _config_file(directory: Path) -> Path:
    config = directory / "config.json"
    if not config.is_file():
        raise CheckpointError(
            f"{config}: no such file; a checkpoint directory holds config.json, weights and a tokenizer"
        )
    return config


def model_files(directory: Path) -> list[Path]:
    """The files that transformers makes a model other than BLIP from: config.json, weights, processor and tokenizer.

    Raises:
        CheckpointError: as :func:`checkpoint_files`, or nothing there says how images are prepared.
    """
    files = [*weight_files(directory), _config_file(directory)]
    if not any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise CheckpointError(
            f"{directory}: neither preprocessor_config.json nor processor_config.json; the directory is incomplete: "
            "fetch it again"
        )
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(f"{directory}: no tokenizer.json, nor another form of a vocabulary; fetch it again")
    return files + [directory / name for name in PROCESSOR_FILES if (directory / name).is_file()]


def classifier_files(directory: Path) -> list[Path]:
    """The files of an image classifier.

    Raises:
        CheckpointError: one is missing.
    """
    found = [*weight_files(directory), *(directory / name for name in ("config.json", "preprocessor_config.json"))]
    if lost := [file for file in found if not file.is_file()]:
        raise CheckpointError(
            f"{lost[0]}: no such file; an image classifier has config.json, weights and that: fetch it again"
        )
    return found


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a checkpoint's tokenizer.

    Raises:
        CheckpointError: both forms of the vocabulary are missing.
    """
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not any(file.name in ("tokenizer.json", "vocab.txt") for file in files):
        raise CheckpointError(
            f"{directory}: neither tokenizer.json nor vocab.txt; copy the tokenizer there, or name a directory that "
            "has one"
        )
    return files


def weight_files(directory: Path) -> list[Path]:
    """The weights of a checkpoint: one file, or an index and its shards; safetensors before pickle.

    Raises:
        CheckpointError: no directory, no weights, a shard of the index is missing, or the index cannot be read.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; checkpoint.path names a directory in the hub's format")
    for name in _WEIGHTS:
        first = directory / name
        if first.is_file():
            return [first, *_shards(first)] if name.endswith(".index.json") else [first]
    raise CheckpointError(
        f"{directory}: no weights; expected model.safetensors (or {', '.join(_WEIGHTS[1:])}): fetch it again, or name "
        "another directory"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        shards = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not an index of weight files: {error!r}; fetch it again") from error
    for shard in shards:
        if shard.parent != index.parent or not shard.is_file():
            raise CheckpointError(
                f"{index}: names {shard.name}, which is not beside it; the download is incomplete: fetch it again"
            )
    return shards


def _if_given(**fields: Any) -> dict[str, Any]:
    """What came later than the fingerprints, and leaves those alone that do without it."""
    return {name: value for name, value in fields.items() if value is not None}


def _digest(**fields: Any) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()
