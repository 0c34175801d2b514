"""`capfilt demo` and `capfilt toyweb`: a web whose truth is known, to try things on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capfilt.arguments import TOYS, examples
from capfilt.completion import specs
from capfilt.errors import CapfiltError, SpecError
from capfilt.printing import print_dataset, print_demo
from capfilt.run_commands import curate_here
from capfilt.spec import Quality, Truth, load_curate_spec
from capfilt.terminal import counted, say

commands = typer.Typer()

_DEMO_SHARDS = 6
_DEMO_SEED = 1_000  # of a web that no checkpoint was trained on


@commands.command(
    rich_help_panel=TOYS,
    epilog=examples("capfilt toyweb runs/toyweb", "capfilt run pipelines/bootstrap-toyweb.yaml"),
)
def toyweb(
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Directory to make web/, human/ and test/ in.")
    ],
    images: Annotated[int, typer.Option(help="Images of the web, each with a text.", min=1)] = 10_000,
    noise: Annotated[
        float, typer.Option(help="Fraction of the web's texts that are not true of their image.", min=0, max=1)
    ] = 0.8,
    human: Annotated[int, typer.Option(help="Clean pairs to train on; 0 for none.", min=0)] = 4_000,
    test: Annotated[
        int, typer.Option(help="Clean pairs to test with; 576 show every scene once, 0 for none.", min=0)
    ] = 576,
    shards: Annotated[int, typer.Option(help="Parquet files of the web, at most one for each image.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of all that is drawn: the same one, the same web.", min=0)] = 0,
) -> None:
    """Render a small learnable web: noisy pairs with their truth, clean pairs, and a test set.

    Reads nothing. Refuses to write where a web is already.
    """
    from capfilt.toyweb import render, render_clean

    try:
        web = render(directory / "web", images=images, noise=noise, shards=shards, seed=seed)
        if human:
            render_clean(directory / "human", images=human, seed=2 * seed + 1)
        if test:
            render_clean(directory / "test", images=test, seed=2 * seed)
    except ValueError as error:
        raise SpecError(f"toyweb: {error}") from None
    except FileExistsError as error:
        raise CapfiltError(str(error)) from None
    say(f"{directory}: {counted(web.images, 'picture')} of the web, {human:,} clean pairs, {test:,} to test with")


@commands.command(rich_help_panel=TOYS, epilog=examples("capfilt demo", "capfilt demo --images 600"))
def demo(
    spec: Annotated[
        Path,
        typer.Argument(
            metavar="SPEC",
            help="The curate spec to run once its inputs are made; the default one is in capfilt's source directory.",
            autocompletion=specs,
        ),
    ] = Path("pipelines/demo.yaml"),
    images: Annotated[
        int | None, typer.Option(help="Images to render; 2400 if not given.", min=_DEMO_SHARDS, show_default=False)
    ] = None,
) -> None:
    """Render a small noisy web, curate it with small trained models, and compare the outcome with the truth.

    Writes the web where the spec's input is, if there is none yet, and the curated dataset to its output. Exit codes
    are those of `capfilt run`.
    """
    from capfilt.dataset import CuratedDataset
    from capfilt.demo import findings
    from capfilt.fragments import read_footer
    from capfilt.inputs import list_inputs
    from capfilt.quality import measure_quality
    from capfilt.toyweb import render

    loaded = load_curate_spec(spec)
    web = Path(loaded.input.paths[0]).parent
    if not (web / "shards").exists():
        count = images or 2400
        say(f"rendering {counted(count, 'image')} of a small noisy web in {web}")
        render(web, images=count, shards=_DEMO_SHARDS, seed=_DEMO_SEED)
    elif images is not None:
        source = loaded.input
        footers = (read_footer(file, source.columns, source.storage_options) for file in list_inputs(source))
        if (there := sum(footer.rows for footer in footers)) != images:
            raise CapfiltError(f"{web} holds {counted(there, 'image')}, not {images:,}; delete it to render it anew")
    ran = curate_here(loaded)
    dataset = CuratedDataset.for_reading(loaded.output, loaded.output_options)
    if not ran.shards:  # what an earlier run did is to be seen as well
        print_dataset(dataset)
    quality = measure_quality(Quality(dataset=loaded.output, truth=Truth(toyweb=str(web))))
    print_demo(quality, findings(dataset, web))
