"""What changed is redone from the first stale stage, and the outcome is that of a run from scratch, row by row."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import MakeSpec, jpeg, read, write_shard
from deltalake import DeltaTable
from rich.console import Console
from stubs import HashCaptioner, HashFilter, RaisingFilter, load_hash, load_poison

from capfilt.dataset import CuratedDataset, DataFile
from capfilt.errors import ConflictError
from capfilt.fingerprints import run_fingerprints
from capfilt.holder import FOLDER
from capfilt.inputs import list_inputs
from capfilt.pace import Pace, last_paces
from capfilt.pipelines.curate import Execute, Summary, _Driver, _lease, curate, in_process
from capfilt.pipelines.job import Job, LoadModels
from capfilt.pipelines.progress import Display
from capfilt.pipelines.redecide import Redecision, redecisions
from capfilt.plan import Stage, make_plan
from capfilt.receipts import RECEIPTS, Receipt
from capfilt.spec import CurateSpec, Sampling, Thresholds, Withdrawn

BAD: list[bytes | None] = [None, b"", b"<html>", jpeg(1)[:-200]]


def run(spec: CurateSpec, load: Any = load_hash, execute: Execute | None = in_process) -> Summary:
    return curate(spec, load=load, execute=execute, console=Console(file=io.StringIO()))


def no_models(_spec: CurateSpec, _device: str) -> Any:
    raise AssertionError("models are loaded")


class Counting(HashCaptioner):
    """Counts what it writes, over all of its kind."""

    written = 0

    def caption(self, images_BCHW: torch.Tensor, sha256: Sequence[str]) -> list[list[str]]:
        captions = super().caption(images_BCHW, sha256)
        Counting.written += sum(map(len, captions))
        return captions


def load_counting(spec: CurateSpec, _device: str) -> Any:
    captioners = [Counting(card, spec.sampling) for card in spec.captioners]
    return captioners, [HashFilter(card) for card in spec.filters]


def load_captioners_and_raising(spec: CurateSpec, _device: str) -> Any:
    return [HashCaptioner(card, spec.sampling) for card in spec.captioners], [RaisingFilter(c) for c in spec.filters]


def tables(output: str) -> dict[str, list[dict[str, Any]]]:
    """Everything that a dataset holds, without the runs that wrote it."""
    return {name: [{**row, "run": ""} for row in read(output, name)] for name in ("annotations", "pairs", "quarantine")}


def scratch(spec: CurateSpec, load: Any = load_hash) -> dict[str, list[dict[str, Any]]]:
    """What a run of a spec from scratch makes."""
    fresh = spec.model_copy(update={"output": f"{spec.output}-fresh"})
    shutil.rmtree(fresh.output, ignore_errors=True)
    run(fresh, load)
    return tables(fresh.output)


def other_filter(spec: CurateSpec) -> CurateSpec:
    """Another limit of tokens for the fingerprint, another name for the stub's scores."""
    tokens = spec.filters[-1].max_tokens - 1
    card = spec.filters[-1].model_copy(update={"name": f"of-{tokens}-tokens", "max_tokens": tokens})
    return spec.model_copy(update={"filters": (*spec.filters[:-1], card)})


def pair_files(spec: CurateSpec) -> dict[str, str]:
    """The run that wrote each pairs file that the dataset names."""
    paths = DeltaTable(f"{spec.output}/pairs").file_uris()
    return {path.rpartition("/out/")[2]: path.split("-")[-3] for path in paths}


def spoil(path: Path) -> None:
    """Put rubbish in a file, and leave its size and time: whoever reads it fails, and a listing sees no change."""
    stat = path.stat()
    path.write_bytes(b"\0" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture
def web(tmp_path: Path) -> Path:
    """Three shards of 100 rows, some bad."""
    for s in range(3):
        images: list[bytes | None] = [jpeg(100 * s + i) for i in range(100)]
        images[3], images[50], images[97] = None, b"", b"<html>"
        write_shard(tmp_path / "in" / f"{s:05d}.parquet", images)
    return tmp_path / "in"


# --- the same as from scratch ---


def change(rng: random.Random, spec: CurateSpec, stage: Stage) -> CurateSpec:
    """Another spec, of which no more is stale than `stage` and what comes after it."""
    if stage is Stage.WITHDRAW:
        listed = Path(spec.output).parent / "withdrawn.txt"
        urls = [f"http://example.org/{rng.randrange(3)}/{rng.randrange(120)}.jpg" for _ in range(rng.randint(1, 40))]
        listed.write_text("\n".join([listed.read_text() if listed.exists() else "", *urls]))
        withdrawn = Withdrawn(urls=(str(listed),))
        return spec.model_copy(update={"withdrawn": withdrawn, "fragment_rows": rng.randint(1, 90)})
    update: dict[str, Any] = {
        "thresholds": Thresholds(web=rng.random(), synthetic=rng.random()),
        "keep": rng.choice(["best", "all-above-threshold"]),
        "decision": rng.choice(["mean", "vote"]),
        "fragment_rows": rng.randint(1, 90),
    }
    changed = spec.model_copy(update=update)
    if stage is Stage.CAPTION:
        return changed.model_copy(update={"sampling": spec.sampling.model_copy(update={"seed": rng.randint(1, 99)})})
    return other_filter(changed) if stage is Stage.SCORE else changed


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4))])
def test_a_restart_ends_with_what_a_run_from_scratch_makes(
    make_spec: MakeSpec, tmp_path: Path, stage: Stage, seed: int
) -> None:
    """Random rows, row groups, fragments, ensembles and changes; twice, so that restarts build on restarts."""
    rng = random.Random(f"{stage}{seed}")
    for s in range(rng.randint(1, 3)):
        count = rng.choice([0, 1, rng.randint(2, 120)])
        images = [rng.choice(BAD) if rng.random() < 0.15 else jpeg(1000 * seed + 200 * s + i) for i in range(count)]
        texts = [rng.choice([None, "", "a Cat!", f"text {i}"]) for i in range(count)]
        write_shard(tmp_path / "in" / f"{s}.parquet", images, texts, row_group=rng.randint(1, 70))
    base = make_spec(
        sampling=Sampling(candidates=rng.randint(1, 3)), max_error_fraction=1.0, fragment_rows=rng.randint(1, 90)
    )
    names = rng.sample(["f", "g", "h"], rng.randint(1, 3))
    base = base.model_copy(
        update={"filters": tuple(base.filters[0].model_copy(update={"name": name}) for name in names)}
    )
    run(base)
    spec = base
    for _ in range(2):
        spec = change(rng, spec, stage)
        expected = scratch(spec)
        load = no_models if stage in (Stage.WITHDRAW, Stage.DECIDE) else load_hash
        summary = run(spec, load)
        assert list(summary.stages) == [stage] or not summary.stages  # the same thresholds again, by chance
        assert tables(spec.output) == expected
        states = CuratedDataset.for_reading(spec.output, {}).committed()
        fresh = CuratedDataset.for_reading(f"{spec.output}-fresh", {}).committed()
        assert {s: state.counts for s, state in states.items()} == {s: state.counts for s, state in fresh.items()}
        assert run(spec, no_models).skipped == len(states)


@pytest.mark.usefixtures("web")
def test_what_a_restart_counts_is_what_a_run_from_scratch_counts(make_spec: MakeSpec) -> None:
    base = make_spec()
    run(base)
    for spec in (
        base.model_copy(update={"thresholds": Thresholds(web=0.7, synthetic=0.2)}),
        other_filter(base),
        base.model_copy(update={"keep": "all-above-threshold", "sampling": Sampling(candidates=2)}),
    ):
        again = run(spec)
        fresh = run(spec.model_copy(update={"output": f"{spec.output}-{again.run}"}))
        assert (again.counts, again.reasons) == (fresh.counts, fresh.reasons)


def test_new_stale_and_changed_shards_in_one_run(make_spec: MakeSpec, web: Path) -> None:
    """Each restarts where it must, and they are committed together."""
    spec = make_spec()
    shutil.move(web / "00002.parquet", web.parent)
    run(spec)
    shutil.move(web.parent / "00002.parquet", web)  # new
    write_shard(web / "00001.parquet", [jpeg(9000 + i) for i in range(30)])  # changed
    spec = spec.model_copy(update={"thresholds": Thresholds(web=0.3, synthetic=0.6)})
    summary = run(spec)
    assert {stage: pace.rows for stage, pace in summary.stages.items()} == {Stage.DECIDE: 100, Stage.CAPTION: 130}
    assert summary.shards == 3
    assert tables(spec.output) == scratch(spec)


# --- decide ---


def test_a_threshold_that_changes_no_text_leaves_pairs_alone_and_reads_no_image(make_spec: MakeSpec, web: Path) -> None:
    spec = make_spec(thresholds=Thresholds(web=0.5, synthetic=0.5))
    run(spec)
    scores = sorted(text["itm"] for row in read(spec.output) for text in row["texts"] if text["itm"] is not None)
    above = next(score for score in scores if score >= 0.5)
    below = max(score for score in scores if score < 0.5)
    before, pairs = read(spec.output, "pairs"), pair_files(spec)
    for path in web.iterdir():
        spoil(path)
    for threshold in (above, (above + below) / 2):
        spec = spec.model_copy(update={"thresholds": Thresholds(web=threshold, synthetic=threshold)})
        summary = run(spec, no_models)
        decided = summary.stages[Stage.DECIDE]
        assert (decided.rows, decided.images, decided.copied, decided.captions) == (300, 0, 0, 0)
    assert pair_files(spec) == pairs
    assert read(spec.output, "pairs") == before
    assert len({row["decide_fingerprint"] for row in read(spec.output)}) == 1
    assert CuratedDataset.for_writing(spec.output, {}).vacuum(0) > 0
    assert read(spec.output, "pairs") == before


def test_only_files_of_which_a_text_changed_are_written_and_only_new_rows_read(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(120)], row_group=10)
    spec = make_spec(thresholds=Thresholds(web=0.5, synthetic=1.0), fragment_rows=40)
    run(spec)
    files = pair_files(spec)
    assert len(files) == 3
    rows = read(spec.output)
    row = next(row for row in rows[40:80] if row["texts"][0]["itm"] >= 0.5)
    highest = max(row["texts"][0]["itm"] for row in rows if row["texts"][0]["itm"] < 0.5)
    (raised,) = [row["row"] for row in rows if row["texts"][0]["itm"] == highest]
    spec = spec.model_copy(update={"thresholds": Thresholds(web=highest, synthetic=1.0)})
    summary = run(spec, no_models)
    decided, after = summary.stages[Stage.DECIDE], pair_files(spec)
    span = raised // 40
    assert decided.images == 1
    assert decided.copied == sum(row["status"] == "kept" for row in rows[40 * span : 40 * span + 40])
    assert len(files.keys() & after.keys()) == 2
    assert after.keys() - files.keys() == {path for path in after if summary.run in path}
    assert row["row"] in [pair["row"] for pair in read(spec.output, "pairs")]
    assert tables(spec.output) == scratch(spec)


def test_pairs_that_lose_rows_are_copied_without_the_input(make_spec: MakeSpec, web: Path) -> None:
    spec = make_spec(thresholds=Thresholds(web=0.2, synthetic=0.2), keep="all-above-threshold")
    run(spec)
    strict = spec.model_copy(update={"thresholds": Thresholds(web=0.9, synthetic=0.7)})
    expected = scratch(strict)
    for path in web.iterdir():
        spoil(path)
    summary = run(strict, no_models)
    assert summary.stages[Stage.DECIDE].images == 0
    assert summary.stages[Stage.DECIDE].copied == len(expected["pairs"]) > 0
    assert tables(strict.output) == expected


def test_a_shard_whose_new_rows_cannot_be_read_stays_as_it_was_and_is_named(make_spec: MakeSpec, web: Path) -> None:
    spec = make_spec(thresholds=Thresholds(web=0.9, synthetic=0.9), max_error_fraction=0.5)
    run(spec)
    before = tables(spec.output)
    loose = spec.model_copy(update={"thresholds": Thresholds(web=0.1, synthetic=0.1)})
    expected = scratch(loose)
    spoil(web / "00001.parquet")
    summary = run(loose, no_models)
    assert list(summary.failures) == [str(web / "00001.parquet")]
    assert "not readable as Parquet" in summary.failures[str(web / "00001.parquet")]
    assert summary.shards == 2
    after = tables(spec.output)
    for name, rows in after.items():
        expected_rows = [row for row in expected[name] if not row["shard"].startswith("00001")]
        stayed = [row for row in before[name] if row["shard"].startswith("00001")]
        assert [row for row in rows if not row["shard"].startswith("00001")] == expected_rows
        assert [row for row in rows if row["shard"].startswith("00001")] == stayed


def test_an_image_that_is_not_the_one_that_was_scored_is_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Its file kept size and time, which is all that a local listing tells."""
    path = write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(50)])
    table = pq.read_table(path)
    pq.write_table(table, path, compression="none")
    spec = make_spec(thresholds=Thresholds(web=1.0, synthetic=1.0), max_error_fraction=1.0)
    run(spec)
    stat = path.stat()
    rows = [*range(20), 21, 20, *range(22, 50)]
    pq.write_table(table.set_column(3, "jpg", table["jpg"].take(rows)), path, compression="none")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    for changed in (
        spec.model_copy(update={"thresholds": Thresholds(web=0.0, synthetic=0.0)}),
        other_filter(spec),
    ):
        summary = run(changed)
        assert "row 20 is not the image that was" in summary.failures[str(path)]
        assert (summary.shards, summary.counts.rows) == (0, 0)


def test_annotations_that_cannot_be_read_fail_their_shard(make_spec: MakeSpec, web: Path) -> None:
    spec = make_spec(max_error_fraction=0.5)
    run(spec)
    (first, *_) = sorted(Path(spec.output, "annotations").glob("shard=00001*/*.parquet"))
    spoil(first)
    for changed in (spec.model_copy(update={"keep": "all-above-threshold"}), other_filter(spec)):
        summary = run(changed)
        assert list(summary.failures) == [str(web / "00001.parquet")]
        assert first.name in summary.failures[str(web / "00001.parquet")]
        assert summary.shards == 2


FAKE_TORCH = """
import os
open(os.path.join(os.path.dirname(__file__), "imported"), "a").write(f"{os.getpid()}\\n")
raise ImportError("torch is imported")
"""

RETHRESHOLD = """
import io, sys, capfilt
from rich.console import Console
spec = capfilt.load_spec(sys.argv[1], ["thresholds={web: 0.3, synthetic: 0.3}"])
summary = capfilt.run(spec, console=Console(file=io.StringIO()))
assert not {"torch", "transformers", "ray.data"} & set(sys.modules), sorted(sys.modules)
print(summary.stages["decide"].rows)
"""


@pytest.mark.usefixtures("web")
def test_a_new_threshold_imports_no_torch_in_driver_or_workers(make_spec: MakeSpec, tmp_path: Path) -> None:
    """On a Ray of its own, where `import torch` leaves a mark and fails."""
    spec = make_spec()
    run(spec)
    expected = scratch(spec.model_copy(update={"thresholds": Thresholds(web=0.3, synthetic=0.3)}))
    fake = tmp_path / "fake" / "torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(FAKE_TORCH)
    (tmp_path / "spec.yaml").write_text(json.dumps(spec.model_dump(mode="json")))
    paths = os.pathsep.join([str(fake.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", RETHRESHOLD, str(tmp_path / "spec.yaml")],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["300"]
    assert not (fake / "imported").exists()
    assert tables(spec.output) == expected


# --- score ---


@pytest.mark.usefixtures("web")
def test_a_new_filter_regenerates_no_caption_and_a_new_captioner_all(make_spec: MakeSpec) -> None:
    spec = make_spec(sampling=Sampling(candidates=2))
    Counting.written = 0
    summary = run(spec, load_counting)
    usable = 3 * 97
    assert Counting.written == summary.stages[Stage.CAPTION].captions == 2 * usable
    for changed in (
        other_filter(spec),
        spec.model_copy(update={"filters": (*spec.filters, spec.filters[0].model_copy(update={"name": "second"}))}),
    ):
        Counting.written = 0
        summary = run(changed, load_counting)
        scored = summary.stages[Stage.SCORE]
        assert (Counting.written, scored.captions, scored.rows) == (0, 0, 300)
        assert tables(spec.output) == scratch(changed)
    Counting.written = 0
    again = spec.model_copy(update={"sampling": Sampling(candidates=2, seed=1)})
    summary = run(again, load_counting)
    assert Counting.written == summary.stages[Stage.CAPTION].captions == 2 * usable
    assert tables(spec.output) == scratch(again)


def test_rows_that_a_filter_raised_on_are_judged_by_the_next_one(make_spec: MakeSpec, tmp_path: Path) -> None:
    texts = [f"t{i}" for i in range(50)]
    texts[7], texts[31] = "raise", "nan"
    write_shard(tmp_path / "in" / "0.parquet", [*(jpeg(i) for i in range(49)), b"<html>"], texts)
    spec = make_spec()
    assert run(spec, load_captioners_and_raising).counts.errors == 3
    changed = other_filter(spec)
    assert run(changed).counts.errors == 1
    assert tables(spec.output) == scratch(changed)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_row_that_kills_the_new_filters_worker_costs_one_row(make_spec: MakeSpec, tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(100)]
    texts[77] = "kill the worker"
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(100)], texts)
    spec = make_spec(fragment_rows=50)
    run(spec)
    changed = other_filter(spec)
    summary = run(changed, load_poison, None)
    assert (summary.counts.rows, summary.counts.errors) == (100, 1)
    (dead,) = [row for row in read(spec.output) if row["status"] == "error"]
    assert (dead["row"], dead["reason"], dead["texts"][0]["text"]) == (77, "worker_died", "kill the worker")
    rest = [row for row in tables(spec.output)["annotations"] if row["row"] != 77]
    assert rest == [row for row in scratch(changed)["annotations"] if row["row"] != 77]


def test_one_changed_shard_of_a_hundred_is_redone(make_spec: MakeSpec, tmp_path: Path) -> None:
    for s in range(100):
        write_shard(tmp_path / "in" / f"{s:03d}.parquet", [jpeg(s), jpeg(1000 + s)])
    spec = make_spec()
    run(spec)
    before = read(spec.output)
    write_shard(tmp_path / "in" / "042.parquet", [jpeg(5000)])
    summary = run(spec)
    assert (summary.shards, summary.skipped, summary.counts.rows) == (1, 99, 1)
    assert [row for row in read(spec.output) if not row["shard"].startswith("042")] == [
        row for row in before if not row["shard"].startswith("042")
    ]


# --- on Ray, and interrupted ---


@pytest.mark.usefixtures("local_ray", "web")
def test_restarts_on_ray_end_as_in_a_plain_loop(make_spec: MakeSpec) -> None:
    spec = make_spec()
    run(spec)
    for changed in (
        spec.model_copy(update={"thresholds": Thresholds(web=0.2, synthetic=0.9)}),
        other_filter(spec),
    ):
        summary = run(changed, execute=None)
        assert summary.counts.rows == 300
        assert tables(spec.output) == scratch(changed)


class Stop(BaseException):
    """Stands for the driver's death."""


def dying_after(units: int) -> Execute:
    def execute(job: Job, work: Iterator[Any], load: LoadModels) -> Iterator[list[Receipt]]:
        for n, receipts in enumerate(in_process(job, work, load)):
            if n >= units:
                raise Stop
            yield receipts

    return execute


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize("stage", [Stage.DECIDE, Stage.SCORE])
@pytest.mark.parametrize("after", [1, 5, *(pytest.param(after, marks=pytest.mark.slow) for after in (0, 8))])
def test_a_dead_driver_costs_what_was_in_flight(make_spec: MakeSpec, stage: Stage, after: int) -> None:
    spec = make_spec()
    run(spec)
    changed = spec.model_copy(update={"thresholds": Thresholds(web=0.6, synthetic=0.3)})
    changed = other_filter(changed) if stage is Stage.SCORE else changed
    expected = scratch(changed)
    with pytest.raises(Stop):
        run(changed, execute=dying_after(after))
    assert sum(1 for _ in Path(spec.output, RECEIPTS).rglob("*.json")) == after + 1
    summary = run(changed.model_copy(update={"fragment_rows": 33}))
    assert summary.adopted_rows > 0
    assert summary.adopted_rows + summary.stages[stage].rows == summary.counts.rows  # whole shards were committed
    assert tables(spec.output) == expected
    assert not Path(spec.output, RECEIPTS).exists()


@pytest.mark.usefixtures("web")
def test_receipts_of_other_cuts_are_not_taken_for_files_of_a_shard(make_spec: MakeSpec) -> None:
    """A run that captions to the new thresholds dies, one at the old ones completes: its files are cut otherwise."""
    old = make_spec(fragment_rows=100)
    new = old.model_copy(update={"thresholds": Thresholds(web=0.6, synthetic=0.3), "fragment_rows": 25})
    with pytest.raises(Stop):
        run(new, execute=dying_after(2))

    def dies_after_commits(job: Job, work: Iterator[Any], load: LoadModels) -> Iterator[list[Receipt]]:
        yield from in_process(job, work, load)
        raise Stop

    with pytest.raises(Stop):
        run(old, execute=dies_after_commits)
    assert list(Path(old.output, RECEIPTS).rglob("*.json"))
    summary = run(new, no_models)
    assert (summary.stages[Stage.DECIDE].rows, summary.adopted_rows) == (300, 0)
    assert tables(old.output) == scratch(new)


@pytest.mark.usefixtures("web")
def test_a_shard_that_another_run_committed_since_the_plan_is_not_built_on(make_spec: MakeSpec) -> None:
    spec = make_spec()
    run(spec)
    rethreshold = spec.model_copy(update={"thresholds": Thresholds(web=0.6, synthetic=0.3)})
    both = spec.model_copy(
        update={"thresholds": rethreshold.thresholds, "filters": other_filter(spec).filters, "fragment_rows": 7}
    )

    def overtaken(job: Job, work: Iterator[Any], load: LoadModels) -> Iterator[list[Receipt]]:
        receipts = list(in_process(job, work, load))
        shutil.rmtree(Path(spec.output) / FOLDER)  # as in a store that cannot create a file where there is none
        run(both)
        yield from receipts

    with pytest.raises(ConflictError, match=r"another run|taken over"):
        run(rethreshold, execute=overtaken)
    assert tables(spec.output) == scratch(both)


@pytest.mark.usefixtures("web")
def test_a_plan_that_another_run_overtook_before_it_began_is_refused(make_spec: MakeSpec) -> None:
    """What is on record is of another filter now: to decide from it would mislabel its scores."""
    spec = make_spec()
    run(spec)
    changed = spec.model_copy(update={"thresholds": Thresholds(web=0.6, synthetic=0.3)})
    prints = run_fingerprints(changed)
    plan = make_plan(changed, prints, CuratedDataset.committed_in(spec.output, {}))
    run(other_filter(spec))
    dataset, job = CuratedDataset.for_writing(spec.output, {}), Job(changed, prints, "late")
    summary, display = Summary("late", spec.output, prints), Display(console := Console(file=io.StringIO()), 1)
    with pytest.raises(ConflictError, match="another run committed 0000"):
        _Driver(job, dataset, plan, display, summary, _lease(changed, "late", console)).run(in_process, load_hash)
    assert tables(spec.output) == scratch(other_filter(spec))


class Deadly:
    """A unit that kills the worker that looks at it."""

    def __init__(self, unit: Redecision) -> None:
        self._unit = unit

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # as pickle asks, before there is a unit
            raise AttributeError(name)
        return getattr(self._unit, name)

    @property
    def annotations(self) -> DataFile:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("dead")


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray", "web")
def test_a_file_that_kills_its_workers_is_given_up_and_the_others_of_its_batch_are_not(make_spec: MakeSpec) -> None:
    import ray

    from capfilt.pipelines.ray_tasks import run_tasks

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    spec = make_spec()
    run(spec)
    changed = spec.model_copy(update={"thresholds": Thresholds(web=0.6, synthetic=0.3)})
    dataset, files = CuratedDataset.for_writing(spec.output, {}), list_inputs(spec.input)
    held = dataset.files([file.shard for file in files])
    was = {shard: state.provenance for shard, state in dataset.committed().items()}
    units: list[Any] = [unit for file in files for unit in redecisions(file, held[file.shard], was[file.shard])]
    units[1] = Deadly(units[1])
    job = Job(changed, run_fingerprints(changed), "run", Stage.DECIDE)
    receipts = [receipt for finished in run_tasks(job, iter(units)) for receipt in finished]
    assert sorted(receipt.start for receipt in receipts) == sorted(unit.start for unit in units)
    (failed,) = [receipt for receipt in receipts if receipt.failure]
    assert failed.failure
    assert failed.failure.startswith(f"{units[1].name}: the worker died on it again and again")


# --- pace ---


@pytest.mark.usefixtures("web")
def test_runs_leave_their_pace_by_stage(make_spec: MakeSpec) -> None:
    spec = make_spec()
    assert last_paces(CuratedDataset(spec.output, {}).runs()) == {}
    first = run(spec)
    second = run(other_filter(spec))
    paces = last_paces(CuratedDataset(spec.output, {}).runs())
    assert {stage: run for stage, (run, _) in paces.items()} == {Stage.CAPTION: first.run, Stage.SCORE: second.run}
    (_, pace) = paces[Stage.SCORE]
    assert pace == second.stages[Stage.SCORE]
    assert (pace.rows, pace.images, pace.captions) == (300, 297, 0)
    Path(spec.output, "_runs", second.run, "summary.json").write_text("{")
    assert last_paces(CuratedDataset(spec.output, {}).runs()).keys() == {Stage.CAPTION}


@pytest.mark.parametrize(
    ("pace", "rate"),
    [
        (Pace(), None),
        (Pace(rows=100, seconds=10.0, first_rows=100, first_seconds=10.0), 10.0),
        (Pace(rows=300, seconds=12.0, first_rows=100, first_seconds=10.0), 25.0),  # two seconds tell nothing
        (Pace(rows=1100, seconds=20.0, first_rows=100, first_seconds=10.0), 100.0),
    ],
)
def test_the_start_is_no_part_of_the_pace(pace: Pace, rate: float | None) -> None:
    assert pace.rate == rate
