"""What a training spec trains: a network with its objective, how it reads texts, and the checkpoints it ends as."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from capfilt.errors import SpecError
from capfilt.fingerprints import tokenizer_files, weight_files
from capfilt.models import checkpoints
from capfilt.models.blip import (
    CaptioningNetwork,
    RetrievalNetwork,
    TextAttention,
    TextTransformer,
    VisionTransformer,
    fill,
    resize_positions,
)
from capfilt.models.feed import PRETRAINING_WORDS, Texts
from capfilt.models.initial import initial_med
from capfilt.models.med import CaptionObjective, MatchObjective, MatchSettings, Med, PretrainObjective, Tokens
from capfilt.models.tokenizer import read_tokenizer, token_ids
from capfilt.spec import (
    CaptionerCard,
    Checkpoint,
    Contrast,
    FilterCard,
    FinetuneCaptionerSpec,
    FinetuneFilterSpec,
    PretrainSpec,
    TrainSpec,
    load_card,
)
from capfilt.text import MAX_WORDS

Card = TypeVar("Card", CaptionerCard, FilterCard)
Network = TypeVar("Network", CaptioningNetwork, RetrievalNetwork)


@dataclass(frozen=True, slots=True)
class Trainee:
    """A network about to be trained.

    Attributes:
        objective: with the network in it, on the device.
        texts: how texts become tokens.
        tokenizer: directory of the tokenizer, which checkpoints carry on.
    """

    objective: CaptionObjective | MatchObjective
    texts: Texts
    tokenizer: Path
    contrast: Contrast = field(default=Contrast(alpha=0))


def trainee(spec: TrainSpec, device: torch.device) -> Trainee:
    """What a spec starts with; the same weights on every rank.

    Raises:
        CheckpointError: a checkpoint that it starts from cannot be used.
        SpecError: `max_tokens` does not fit the network's positions, or a field does not fit a checkpoint.
    """
    if isinstance(spec, PretrainSpec):
        return _pretrain(spec, device)
    return _captioner(spec, device) if isinstance(spec, FinetuneCaptionerSpec) else _filter(spec, device)


def _pretrain(spec: PretrainSpec, device: torch.device) -> Trainee:
    initial = spec.initial
    directory = checkpoints.locate(spec.tokenizer, allow_pickle=False, complete=tokenizer_files)
    tokenizer = read_tokenizer(directory)
    generator = torch.Generator().manual_seed(spec.seed)

    def weights(checkpoint: Checkpoint | None) -> Path | None:
        if checkpoint is None:
            return None
        return checkpoints.locate(checkpoint, initial.allow_pickle, complete=weight_files)

    med = initial_med(
        spec.architecture,
        spec.image_size,
        tokenizer,
        generator,
        vision=weights(initial.vision),
        text=weights(initial.text),
        allow_pickle=initial.allow_pickle,
        std=initial.std,
    ).to(device)
    _set_checkpointing(med, spec.checkpointing)
    ids = token_ids(tokenizer, med.config.text_config, directory)
    tokens = Tokens(enc=ids["enc"], dec=ids["dec"])
    objective = PretrainObjective(med, tokens, _settings(spec.contrast), spec.smoothing, generator).to(device)
    texts = Texts(tokenizer, ids["cls"], ids["sep"], ids["pad"], spec.max_tokens, words=PRETRAINING_WORDS)
    _check_length(spec, med)
    return Trainee(objective, texts, directory, spec.contrast)


def _captioner(spec: FinetuneCaptionerSpec, device: torch.device) -> Trainee:
    loaded = checkpoints.load(_to_train(spec.start, spec), str(device))
    network = _prepared(loaded.model, spec)
    prompt = tuple(loaded.ids(spec.prompt))
    if len(prompt) + 3 > spec.max_tokens:
        raise SpecError(f"max_tokens: {spec.max_tokens} leave no room for a text after the prompt's {len(prompt)}")
    texts = Texts(loaded.tokenizer, loaded.cls, loaded.sep, loaded.pad, spec.max_tokens, prompt, MAX_WORDS)
    objective = CaptionObjective(network, Tokens(loaded.enc, loaded.dec), len(prompt), spec.smoothing)
    return Trainee(objective, texts, checkpoints.locate(spec.start.checkpoint, spec.start.allow_pickle))


def _filter(spec: FinetuneFilterSpec, device: torch.device) -> Trainee:
    loaded = checkpoints.load(_to_train(spec.start, spec), str(device))
    network = _prepared(loaded.model, spec)
    texts = Texts(loaded.tokenizer, loaded.cls, loaded.sep, loaded.pad, spec.max_tokens, words=MAX_WORDS)
    generator = torch.Generator().manual_seed(spec.seed)
    tokens = Tokens(loaded.enc, loaded.dec)
    objective = MatchObjective(network, tokens, _settings(spec.contrast), generator).to(device)
    return Trainee(objective, texts, checkpoints.locate(spec.start.checkpoint, spec.start.allow_pickle), spec.contrast)


def _to_train(card: Card, spec: FinetuneCaptionerSpec | FinetuneFilterSpec) -> Card:
    return card.model_copy(update={"image_size": spec.image_size, "dtype": "float32"})


def _prepared(network: Network, spec: FinetuneCaptionerSpec | FinetuneFilterSpec) -> Network:
    """A loaded network ready to be fine-tuned: positions of its new image size, dropout, checkpointing."""
    network.requires_grad_(True)
    _check_length(spec, network)
    _set_checkpointing(network, spec.checkpointing)
    vision = network.vision_model
    side = spec.image_size // network.config.vision_config.patch_size
    with torch.no_grad():
        resized = resize_positions(vision.embeddings.position_embedding, side)
    vision.embeddings.position_embedding = torch.nn.Parameter(resized)
    network.config.vision_config.image_size = spec.image_size
    vision.set_drop_path(spec.drop_path)
    if spec.dropout is not None:
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = spec.dropout
            elif isinstance(module, TextAttention):
                module.dropout = spec.dropout
    return network


def _settings(contrast: Contrast) -> MatchSettings:
    return MatchSettings(
        queue=contrast.queue,
        momentum=contrast.momentum,
        temperature=contrast.temperature,
        by_image=contrast.by_image,
        across_ranks=contrast.across_ranks,
    )


def _check_length(spec: TrainSpec, network: CaptioningNetwork | RetrievalNetwork) -> None:
    positions = network.config.text_config.max_position_embeddings
    if spec.max_tokens > positions:
        raise SpecError(f"max_tokens: {spec.max_tokens}, but the network has {positions} positions; lower it")


def _set_checkpointing(network: CaptioningNetwork | RetrievalNetwork, checkpointing: bool) -> None:
    for module in network.modules():
        if isinstance(module, VisionTransformer | TextTransformer):
            module.checkpointing = checkpointing


# --- what a run ends as ---

ROLES = {"pretrain": ("captioner", "filter"), "finetune-captioner": ("captioner",), "finetune-filter": ("filter",)}
"""Kind of spec -> roles of the cards it ends with; each card is `<output>/<role>.yaml`."""


def write_checkpoints(spec: TrainSpec, trained: Trainee) -> None:
    """Write the checkpoints of a finished run and, last, their cards; each appears whole.

    A pretrained MED is written as what it is used as: a captioner without a prompt, and a filter.
    """
    output, network = Path(spec.output), trained.objective.network
    if isinstance(network, Med):
        roles = network.roles()
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            parts: dict[str, CaptioningNetwork | RetrievalNetwork] = {
                "captioner": CaptioningNetwork(network.config),
                "filter": RetrievalNetwork(network.config),
            }
        for role, part in parts.items():
            checkpoints.materialise(part, "cpu")
            fill(part, roles[role], f"the trained {role}")
    else:
        parts = {ROLES[spec.kind][0]: network}
    for role, part in parts.items():
        checkpoints.save(part, output / role, trained.tokenizer)
    for role in parts:
        _write_card(spec, role)


def _write_card(spec: TrainSpec, role: str) -> None:
    card: dict[str, Any] = {
        "name": f"{spec.name}-{role}",
        "role": role,
        "checkpoint": {"path": role},
        "image_size": spec.image_size,
        "licence": spec.licence or ("unknown" if isinstance(spec, PretrainSpec) else spec.start.licence),
    }
    if role == "captioner":
        card["prompt"] = spec.prompt if isinstance(spec, FinetuneCaptionerSpec) else ""
    else:
        card |= {"first_token": "[ENC]", "max_tokens": spec.max_tokens}
    heading = f"# Written by the {spec.kind} run {spec.name}; run.json beside it says what it was trained on.\n"
    staged = Path(spec.output) / f".{role}.yaml"
    staged.write_text(heading + yaml.safe_dump(card, sort_keys=False), encoding="utf-8")
    load_card(staged)  # curate will
    staged.replace(staged.with_name(f"{role}.yaml"))
