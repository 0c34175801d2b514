"""Whether a checkpoint fits its card, by config.json and the list of files: before a weight is read, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from capfilt.errors import CheckpointError, SpecError
from capfilt.fingerprints import classifier_files, files_of, tokenizer_files, weight_files
from capfilt.spec import (
    AnyCard,
    CaptionerCard,
    Checkpoint,
    ClassifierCard,
    DualCard,
    EndpointCard,
    FilterCard,
    HubCheckpoint,
    LocalCheckpoint,
    PretrainSettings,
)

Complete = Callable[[Path], list[Path]]
"""Lists the files that are needed of a checkpoint; raises CheckpointError where a directory lacks one."""

ARCHITECTURES = {"captioner": "BlipForConditionalGeneration", "filter": "BlipForImageTextRetrieval"}
"""What a config.json of the hub calls the network of each role."""

DEFAULT_PATCH = 16
"""transformers' BlipVisionConfig.patch_size: a config.json may leave out what is the default."""


def inspect(card: AnyCard, directory: Path | None = None) -> None:
    """Refuse a checkpoint that its card cannot use. Whether the weights themselves are whole, only loading tells.

    An endpoint's card has none: what it serves, only asking it tells.

    Args:
        directory: where the whole checkpoint is. If not given, the card's path, or what the hub's cache holds of it;
            what the cache lacks is not inspected, and the hub is not asked.

    Raises:
        CheckpointError: files are missing, config.json cannot be read, the network is not the role's or the card's
            kind, or the weights are a pickle that the card does not allow.
        SpecError: the card's image_size is no multiple of the patch size.
    """
    if isinstance(card, EndpointCard):
        return
    in_part = directory is None and isinstance(card.checkpoint, HubCheckpoint)
    directory = directory or _directory(card.checkpoint)
    if directory is None:
        return
    for file in _files(directory, files_of(card), in_part):
        if file.suffix == ".bin" and not card.allow_pickle:
            raise CheckpointError(
                f"{file}: a pickle, which the card does not allow; convert it to model.safetensors, or set "
                "allow_pickle: true (it is read as weights only, no code runs)"
            )
    if isinstance(card, CaptionerCard | FilterCard):
        _check_patches(card, directory)
    else:
        kind = _config(directory / "config.json").get("model_type")
        if not isinstance(kind, str) or (isinstance(card, DualCard) and kind != card.model):
            raise CheckpointError(
                f"{directory / 'config.json'}: model_type is {kind!r}, and {card.name} is a card of `model: "
                f"{card.model}`; name another checkpoint, or another model"
            )


def _directory(checkpoint: Checkpoint) -> Path | None:
    """Where a checkpoint is, or what the hub's cache holds of it; None where that is nothing."""
    return cached(checkpoint) if isinstance(checkpoint, HubCheckpoint) else Path(checkpoint.path)


def _files(directory: Path, complete: Complete, in_part: bool) -> list[Path]:
    try:
        return complete(directory)
    except CheckpointError:
        if not in_part:
            raise
        return []


def inspect_classifier(card: ClassifierCard) -> None:
    """Refuse an image classifier that its card cannot use, as far as the hub's cache or its directory tells.

    Raises:
        CheckpointError: files are missing, config.json cannot be read or is of another kind of network, or there are
            no safetensors.
        SpecError: it knows none such label.
    """
    directory = _directory(card.checkpoint)
    if directory is None:
        return
    try:
        files = _files(directory, classifier_files, isinstance(card.checkpoint, HubCheckpoint))
        config = _config(directory / "config.json")
    except CheckpointError as error:
        raise CheckpointError(f"keep_out.classifier: {error}") from None
    if pickles := [file for file in files if file.suffix == ".bin"]:
        raise CheckpointError(
            f"keep_out.classifier: {pickles[0]}: a pickle; convert it to model.safetensors, or name another checkpoint"
        )
    named = config.get("architectures")
    declared = [str(name) for name in named] if isinstance(named, list) else []
    if declared and not any("ForImageClassification" in name for name in declared):
        raise CheckpointError(
            f"keep_out.classifier: {directory / 'config.json'}: an image classifier is a ...ForImageClassification; "
            f"this is a {', '.join(declared)}; name another checkpoint"
        )
    if isinstance(labels := config.get("id2label"), dict):
        check_labels(card, map(str, labels.values()))


def check_labels(card: ClassifierCard, known: Iterable[str]) -> None:
    """Raise SpecError where a classifier knows no such label as its card names."""
    known = list(known)
    if unknown := [label for label in card.labels if label not in known]:
        raise SpecError(f"keep_out.classifier.labels: {card.name} has no label {unknown[0]}; it has {', '.join(known)}")


def _check_patches(card: CaptionerCard | FilterCard, directory: Path) -> None:
    patch = _patch_size(directory / "config.json", card.role)
    if card.image_size % patch:
        raise SpecError(
            f"{card.name}: image_size {card.image_size} is not a multiple of the patch size {patch} of {directory}; "
            f"{max(1, card.image_size // patch) * patch} is"
        )


def inspect_starts(settings: PretrainSettings) -> dict[str, tuple[Checkpoint, Complete]]:
    """Refuse directories that lack what pretraining starts from. The hub is not asked.

    Returns:
        Each checkpoint by its field, with what is needed of it.

    Raises:
        CheckpointError: no tokenizer or no weights there; the field is named.
    """
    starts: dict[str, tuple[Checkpoint | None, Complete]] = {
        "tokenizer": (settings.tokenizer, tokenizer_files),
        "initial.vision": (settings.initial.vision, weight_files),
        "initial.text": (settings.initial.text, weight_files),
    }
    given = {field: (checkpoint, files) for field, (checkpoint, files) in starts.items() if checkpoint}
    for field, (checkpoint, files) in given.items():
        if isinstance(checkpoint, LocalCheckpoint):
            try:
                files(Path(checkpoint.path))
            except CheckpointError as error:
                raise CheckpointError(f"{field}: {error}") from None
    return given


def cached(checkpoint: HubCheckpoint) -> Path | None:
    """Where the hub's cache holds a checkpoint, or a part of it that has config.json."""
    from huggingface_hub import try_to_load_from_cache  # a local checkpoint does not pay for it

    config = try_to_load_from_cache(checkpoint.hub, "config.json", revision=checkpoint.revision)
    return Path(config).parent if isinstance(config, str) else None


def _patch_size(file: Path, role: str) -> int:
    """The patch size that a config.json names, if its network is the role's."""
    architecture = ARCHITECTURES[role]
    config = _config(file)
    try:
        kind = config.get("model_type")
        declared = [str(name) for name in config.get("architectures") or [architecture]]
        patch = (config.get("vision_config") or {}).get("patch_size", DEFAULT_PATCH)
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{file}: not a model configuration: {error}") from error
    if kind != "blip" or architecture not in declared:
        raise CheckpointError(
            f"{file}: a {role} is a {architecture}; this is a {', '.join(declared)} ({kind}); name another checkpoint"
        )
    if not isinstance(patch, int) or patch < 1:
        raise CheckpointError(f"{file}: vision_config.patch_size is {patch}, expected one number above 0")
    return patch


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a model configuration: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: not a model configuration: {type(config).__name__}")
    return config
