"""What `capfilt check` finds of a spec's inputs, columns, cards and truths. Runs nothing, writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from capfilt.errors import CheckpointError, InputError
from capfilt.printing import NO_INPUT
from capfilt.spec import (
    AnyCard,
    BootstrapSpec,
    Checkpoint,
    ClassifierCard,
    CurateSpec,
    EndpointCard,
    EvaluateSpec,
    ExportSpec,
    IngestSpec,
    Input,
    LocalCheckpoint,
    PretrainSettings,
    PretrainSpec,
    RunSpec,
    Truth,
)
from capfilt.terminal import counted

if TYPE_CHECKING:
    from capfilt.fragments import Layout
    from capfilt.weights import Complete


def look(loaded: RunSpec) -> Iterator[str]:
    """Look at what a spec names: a line for each thing that was found good.

    Raises:
        CapfiltError: of the first that is not.
    """
    if isinstance(loaded, CurateSpec):
        from capfilt.fingerprints import run_fingerprints

        inputs, layout = _check_input(loaded.input, loaded.output)
        yield inputs
        yield f"columns: image={layout.image} text={layout.text} url={layout.url} key={layout.key}"
        if loaded.withdrawn:
            from capfilt.withdrawn import read_lists

            lists = read_lists(loaded.withdrawn)
            yield f"withdrawn: {counted(len(lists.urls), 'URL')}, {counted(len(lists.keys), 'key')}"
        yield from _check_cards(*loaded.cards.values())
        if loaded.keep_out and (classifier := loaded.keep_out.classifier):
            yield _check_classifier(classifier)
        prints = run_fingerprints(loaded)
        yield f"fingerprints: caption {prints.caption}, score {prints.score}, decide {prints.decide}"
    elif isinstance(loaded, BootstrapSpec):
        yield from (_check_input(source)[0] for source in (loaded.web, loaded.human, loaded.evaluate.pairs) if source)
        yield from _check_starts(loaded.pretrain)
        yield from _check_truths(loaded.truth, loaded.evaluate.truth)
    elif isinstance(loaded, EvaluateSpec):
        if loaded.pairs:
            yield _check_input(loaded.pairs)[0]
        yield from _check_cards(loaded.captioner, *loaded.judges)
        yield from _check_truths(loaded.truth, *(quality.truth for quality in loaded.quality))
    elif isinstance(loaded, IngestSpec):
        from capfilt.ingest import describe

        yield from describe(loaded)
    elif isinstance(loaded, ExportSpec):
        from capfilt.export.driver import look as look_at_export

        yield from look_at_export(loaded)
    else:
        from capfilt.examples import list_parts, oversized

        parts, versions = list_parts(loaded.data)
        rows, files = sum(part.rows for part in parts), len({part.url for part in parts})
        yield f"data: {counted(rows, 'row')} in {counted(files, 'file')}"
        if said := oversized(parts):
            yield said
        yield from (f"dataset {dataset}: version {version} of its pairs" for dataset, version in versions.items())
        yield from _check_starts(loaded) if isinstance(loaded, PretrainSpec) else _check_cards(loaded.start)


def _check_input(source: Input, output: str | None = None) -> tuple[str, Layout]:
    """List an input and read its first footer: a line on it, and its columns."""
    from capfilt.fragments import read_footer
    from capfilt.inputs import list_inputs

    files = list_inputs(source, exclude=output)
    if not files:
        raise InputError(f"{NO_INPUT.format(output=output)}; name others")
    footer = read_footer(files[0], source.columns, source.storage_options)
    size = sum(file.size for file in files)
    line = f"inputs: {counted(len(files), 'file')}, {size:,} bytes; the first has {counted(footer.rows, 'row')}"
    return line, footer.layout


def _check_cards(*cards: AnyCard | None) -> Iterator[str]:
    from capfilt.fingerprints import files_of
    from capfilt.weights import inspect

    for card in cards:
        if isinstance(card, EndpointCard):
            yield f"{card.role} {card.name}: {card.served_model} at {card.base_url}: will be asked when a run begins"
        elif card is not None:
            inspect(card)
            yield f"{card.role} {card.name}: {_whereabouts(card.checkpoint, files_of(card))}"


def _check_classifier(card: ClassifierCard) -> str:
    from capfilt.fingerprints import classifier_files
    from capfilt.weights import inspect_classifier

    inspect_classifier(card)
    return (
        f"classifier {card.name} keeps out {', '.join(card.labels)}: {_whereabouts(card.checkpoint, classifier_files)}"
    )


def _check_starts(settings: PretrainSettings) -> Iterator[str]:
    from capfilt.weights import inspect_starts

    for field, (checkpoint, complete) in inspect_starts(settings).items():
        yield f"{field}: {_whereabouts(checkpoint, complete)}"


def _check_truths(*truths: Truth | None) -> Iterator[str]:
    from capfilt.truth import read_truth

    for truth in truths:
        if truth is not None:
            read_truth(truth)
            yield f"truth: read from {', '.join(truth.labels.paths) if truth.labels else truth.toyweb}"


def _whereabouts(checkpoint: Checkpoint, complete: Complete) -> str:
    """Where a checkpoint is. A local one has been looked at; of a hub's, only the cache is.

    Args:
        complete: raises CheckpointError where a directory lacks what is needed of it.
    """
    from capfilt.weights import cached

    if isinstance(checkpoint, LocalCheckpoint):
        return f"found in {checkpoint.path}"
    name = f"{checkpoint.hub} at {checkpoint.revision[:12]}"
    directory = cached(checkpoint)
    if directory is None:
        return f"{name} is not in the cache: will be fetched from the hub at first use"
    try:
        complete(directory)
    except CheckpointError:
        return f"{name} is in the cache in part: the rest will be fetched from the hub at first use"
    return f"{name} is in the cache: {directory}"
