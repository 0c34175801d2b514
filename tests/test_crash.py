"""Crash proof: `capfilt run` killed again and again, on Ray, with real (tiny) models, ends with the dataset that an
undisturbed run makes, row by row; and a plain Parquet reader sees nothing else.

The kills are drawn from a seed, and spread over the life of a run by what can be seen to happen: the output appears, an
actor starts, fragments are finished, a commit is under way, the vacuum begins. Where they hit is printed (`pytest -s`).
"""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import MakeSpec, jpeg, read, write_shard
from crash_driver import Driver, Moment, Seen, Strike, Victim, deck, seen
from rich.console import Console
from stubs import POISON, load_hash, load_poison

from capfilt.dataset import CuratedDataset
from capfilt.inputs import list_inputs
from capfilt.models.tiny import write_tiny_pair
from capfilt.pipelines.curate import curate, in_process
from capfilt.receipts import RECEIPTS, Receipt
from capfilt.spec import load_spec
from capfilt.toyweb import render

Id = tuple[str, int]
Rows = dict[Id, dict[str, Any]]

SEED = 2026

KILLS: dict[tuple[Victim, Moment], int] = {
    ("driver", "create"): 3,
    ("driver", "start"): 7,
    ("driver", "work"): 10,
    ("driver", "commit"): 8,
    ("driver", "vacuum"): 4,
    ("actor", "load"): 4,
    ("actor", "work"): 8,
    ("both", "load"): 2,
    ("both", "work"): 7,
    ("both", "commit"): 2,
    ("ledger", "work"): 3,
}
"""How many kills of each kind: 58."""

PARTS = 3


def share(part: int) -> dict[tuple[Victim, Moment], int]:
    """A part's kills of each kind: like cards, they are dealt in turn."""
    cards = [kind for kind, count in KILLS.items() for _ in range(count)]
    return dict(Counter(cards[part::PARTS]))


ACTOR_DEATHS = 3
"""Of one driver: a row whose worker dies four times (twice on its fragment, twice on the row alone) is given up."""

SPEC = """
kind: curate
input: {paths: web/shards}
output: nowhere
fragment_rows: 25
sampling: {candidates: 2}
max_error_fraction: 0.3
ray: {num_cpus: 2}
captioners:
- {role: captioner, name: tiny-captioner, checkpoint: {path: models/captioner}, image_size: 32, batch_size: 8,
   placement: {cpus: 0.5, max_actors: 2}}
filters:
- {role: filter, name: tiny-filter, checkpoint: {path: models/filter}, image_size: 32, batch_size: 64,
   placement: {cpus: 0.5}}
"""


@dataclass
class Site:
    """An input, a spec for it, and what an undisturbed run makes of it."""

    folder: Path
    ray_folder: Path
    images: dict[Id, bytes | None]
    broken: set[Id]
    annotations: Rows
    pairs: Rows
    startup: float = 0.0

    @property
    def spec(self) -> Path:
        return self.folder / "spec.yaml"

    def driver(self, output: Path, home: str, overrides: list[str] | None = None) -> Driver:
        return Driver(self.spec, output, self.folder / "homes" / home, overrides or [], self.ray_folder)


def build(folder: Path, ray_folder: Path, images: int, shards: int) -> Site:
    """Render the input, write the models and the spec; the reference is still to come."""
    web = render(folder / "web", images=images, shards=shards, broken=0.06, seed=SEED)
    write_tiny_pair(folder / "models")
    (folder / "spec.yaml").write_text(SPEC)
    bytes_of: dict[Id, bytes | None] = {}
    broken: set[Id] = set()
    names = {Path(file.path).name: file for file in list_inputs(load_spec(folder / "spec.yaml").input)}
    for file in names.values():
        column = pq.read_table(file.path, columns=["jpg"]).column("jpg").to_pylist()
        bytes_of |= {(file.shard, row): image for row, image in enumerate(column)}
    for row in pq.read_table(web.truth).to_pylist():
        if row["broken"] is not None:
            broken.add((names[row["shard"]].shard, row["row"]))
    return Site(folder, ray_folder, bytes_of, broken, {}, {})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, ray_folder: Path) -> Site:
    """1,200 rows in 8 shards; the reference is one undisturbed run on Ray."""
    site = build(tmp_path_factory.mktemp("site"), ray_folder, images=1200, shards=8)
    output = site.folder / "reference"
    with site.driver(output, "reference") as driver:
        assert driver.until(lambda: seen(output).receipts > 0), driver.stderr()
        site.startup = driver.seconds
        assert driver.wait() == 0, driver.stderr()
        print(f"\nreference: first fragment after {site.startup:.1f} s, whole run {driver.seconds:.1f} s")
    driver.reap()
    site.annotations, site.pairs = table(output, "annotations"), table(output, "pairs")
    check_whole(site, output)
    return site


# --- what must hold ---


def table(output: Path, name: str) -> Rows:
    """A table's rows by (shard, row), each there once, without the run that made it."""
    rows = read(str(output), name)
    ids = Counter((row["shard"], row["row"]) for row in rows)
    twice = [identity for identity, count in ids.items() if count > 1]
    assert not twice, f"{name}: {len(twice)} rows are there more than once: {twice[:5]}"
    return {(row["shard"], row["row"]): {**row, "run": None} for row in rows}


def alike(a: Any, b: Any) -> bool:
    """Equal, scores to 1e-5."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(itertools.starmap(alike, zip(a, b, strict=True)))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-5
    return type(a) is type(b) and a == b


def assert_alike(rows: Mapping[Id, Any], expected: Mapping[Id, Any]) -> None:
    """The same rows as expected, alike."""
    assert sorted(rows) == sorted(expected), "rows are lost or invented"
    different = [(row, expected[identity]) for identity, row in rows.items() if not alike(row, expected[identity])]
    assert not different, f"{len(different)} rows differ, such as\n{different[0][0]}\n{different[0][1]}"


def check_partial(site: Site, output: Path) -> int:
    """Between a death and the next start: whole shards only, right as they are. Commits that pairs are behind by."""
    if not seen(output).annotations:
        return 0
    dataset = CuratedDataset.for_reading(str(output), {})
    annotations, pairs = table(output, "annotations"), table(output, "pairs")
    shards = {shard for shard, _ in annotations}
    assert_alike(annotations, {i: row for i, row in site.annotations.items() if i[0] in shards})
    assert dataset.committed().keys() == shards
    versions = dataset.versions()
    behind = versions["annotations"] - min(versions["pairs"], versions["quarantine"])
    assert 0 <= behind <= 1
    paired = shards if versions["pairs"] == versions["annotations"] else {shard for shard, _ in pairs}
    assert_alike(pairs, {i: row for i, row in site.pairs.items() if i[0] in paired})
    return behind


def check_whole(site: Site, output: Path) -> None:
    """At the end: every input row once, as in the reference, and no reader sees more."""
    annotations, pairs, quarantine = (table(output, name) for name in ("annotations", "pairs", "quarantine"))
    assert sorted(annotations) == sorted(site.images), "rows are lost or invented"
    by_status: dict[str, set[Id]] = defaultdict(set)
    for identity, row in annotations.items():
        by_status[row["status"]].add(identity)
    assert by_status.keys() <= {"kept", "dropped", "error"}
    assert by_status["error"] == {i for i in site.broken if site.images[i] is not None}
    assert pairs.keys() == by_status["kept"]
    assert quarantine.keys() == by_status["error"]
    assert all(row["image"] == site.images[i] for i, row in (pairs | quarantine).items())
    assert_alike(annotations, site.annotations)
    assert_alike(pairs, site.pairs)
    for name, rows in (("annotations", annotations), ("pairs", pairs)):
        assert plain_ids(output / name) == sorted(rows), f"{name}: a plain Parquet reader sees something else"
    assert not (output / RECEIPTS).exists()


def plain_ids(folder: Path) -> list[Id]:
    """(shard, row) of every row that a reader finds who takes every file below a folder, and Delta's log for hidden."""
    files = [path for path in folder.rglob("*") if path.is_file() and "_delta_log" not in path.parts]
    strays = [path for path in files if path.suffix != ".parquet"]
    assert not strays, f"strays: {strays}"
    ids = []
    for path in files:
        shard = path.parent.name.removeprefix("shard=")
        ids += [(shard, row) for row in pq.ParquetFile(path).read(["row"]).column("row").to_pylist()]
    return sorted(ids)


# --- lives ---


@dataclass(frozen=True)
class Kill:
    """A kill that hit.

    Attributes:
        before: what stood on disk when the driver started.
        at: what stood there when the kill came.
        behind: commits that pairs or quarantine lacked after a driver's death.
    """

    life: int
    victim: Victim
    moment: Moment
    seconds: float
    before: Seen
    at: Seen
    behind: int = 0

    @property
    def phase(self) -> str:
        """Where in the run's life it hit."""
        if self.at.closed > self.before.closed:
            return "vacuum"
        if self.at.annotations > max(1, self.before.annotations):
            return "after commits of its own"
        if self.at.receipts > self.before.receipts:
            return "work"
        return "start-up"

    def line(self) -> str:
        return (
            f"life {self.life:3d} {self.victim:6s} at {self.moment:6s} {self.seconds:5.1f} s  {self.phase:24s} "
            f"receipts {self.at.receipts:3d} log {self.at.annotations}/{self.at.pairs}/{self.at.quarantine}"
            + (f" behind {self.behind}" if self.behind else "")
        )


def settings(rng: random.Random) -> list[str]:
    """How a start differs from the last: actors, batch, fragments."""
    fewest, most = rng.choice([(1, 1), (1, 2), (2, 2)])
    return [
        f"captioners.0.placement={{cpus: 0.5, min_actors: {fewest}, max_actors: {most}}}",
        f"captioners.0.batch_size={rng.choice([2, 8, 8, 16])}",
        f"fragment_rows={rng.choice([10, 25, 25, 40, 70])}",
    ]


def live(site: Site, life: int, strikes: list[Strike], rng: random.Random) -> list[Kill]:
    """Start, kill and start again over one output until a driver comes to its end; takes the strikes that hit."""
    output = site.folder / f"life{life}"
    kills: list[Kill] = []
    ghosts: list[Driver] = []
    try:
        for attempt in itertools.count():
            driver = site.driver(output, f"{life}-{attempt}", settings(rng) if attempt else [])
            ghosts.append(driver)
            with driver:
                over = attend(driver, site, life, strikes, kills, fresh=attempt == 0)
            if over:
                break
            kills[-1] = Kill(**{**vars(kills[-1]), "behind": check_partial(site, output)})
            print(kills[-1].line(), flush=True)
            if rng.random() < 0.5:  # else the next one starts beside the dead one's workers
                ghosts.pop().reap()
            while len(ghosts) > 1:
                ghosts.pop(0).reap()
    finally:
        for driver in ghosts:
            driver.reap()
    assert driver.process.returncode == 0, driver.stderr()
    check_whole(site, output)
    shutil.rmtree(output)
    return kills


def attend(driver: Driver, site: Site, life: int, strikes: list[Strike], kills: list[Kill], *, fresh: bool) -> bool:
    """Strike one driver until it is dead (False) or has ended by itself (True)."""
    deaths = 0
    while True:
        fits = (
            strike
            for strike in strikes
            if (strike.victim == "driver" or deaths < ACTOR_DEATHS)
            and (strike.moment not in ("create", "start") or not deaths)
            and (strike.moment != "create" or fresh)
        )
        strike = min(fits, key=lambda strike: strike.moment != "create", default=None)
        if strike is None or not driver.await_moment(strike, site.startup):
            driver.wait()
            return True
        victim = driver.strike(strike)
        if victim is None:
            continue
        strikes.remove(strike)
        kills.append(Kill(life, victim, strike.moment, driver.seconds, driver.first_seen, seen(driver.output)))
        if victim in ("driver", "both"):
            return False
        deaths += victim == "actor"
        print(kills[-1].line(), flush=True)


# --- the tests ---


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(PARTS))
def test_fifty_kills_change_nothing(site: Site, part: int) -> None:
    """In parts, each of which has its share of each kind."""
    rng = random.Random(f"{SEED} {part}")
    strikes = deck(rng, share(part))
    kills: list[Kill] = []
    for lives in itertools.count():
        if not strikes:
            break
        assert lives < 40, f"these never hit: {strikes}"
        kills += live(site, 100 * part + lives, strikes, rng)
        rng.shuffle(strikes)
    victims, phases = Counter(kill.victim for kill in kills), Counter(kill.phase for kill in kills)
    print(f"{len(kills)} kills in {lives} lives: {victims}; {phases}; behind {sum(kill.behind for kill in kills)}")
    assert len(kills) >= 17
    assert min(victims[victim] for victim in ("driver", "actor", "both")) >= 2
    assert min(phases[phase] for phase in ("start-up", "work", "after commits of its own")) >= 2
    assert phases["vacuum"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_commits_what_is_finished(site: Site, name: str) -> None:
    """SIGINT to the whole process group, as a terminal sends it; SIGTERM to the driver alone, as a cluster does."""
    output = site.folder / name
    with site.driver(output, name) as driver:
        assert driver.until(lambda: bool(finished(output))), driver.stderr()
        before = finished(output)
        time.sleep(1)  # for the driver to hear of them
        if name == "SIGINT":
            os.killpg(driver.process.pid, signal.SIGINT)
        else:
            driver.process.send_signal(signal.SIGTERM)
        assert driver.wait() == 130, driver.stderr()
    driver.reap()
    assert "Run the same command again to resume" in driver.stderr()
    assert "Traceback" not in driver.stderr()
    assert check_partial(site, output) == 0
    committed = CuratedDataset.for_reading(str(output), {}).committed()
    assert before <= committed.keys() < {shard for shard, _ in site.images}
    with site.driver(output, f"{name}-resumed") as driver:
        assert driver.wait() == 0, driver.stderr()
    driver.reap()
    check_whole(site, output)


def finished(output: Path) -> set[str]:
    """Shards whose every row has a receipt."""
    rows: Counter[str] = Counter()
    whole: dict[str, int] = {}
    for path in (output / RECEIPTS).rglob("*.json"):
        receipt = Receipt.model_validate_json(path.read_text())
        rows[receipt.shard] += receipt.rows
        whole[receipt.shard] = receipt.file_rows
    return {shard for shard in rows if rows[shard] == whole[shard]}


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_poison_row_among_6000_costs_one_row(make_spec: MakeSpec, tmp_path: Path) -> None:
    images = [jpeg(i) for i in range(6000)]
    poison = ("00001", 777)
    for s in range(3):
        texts = [f"text {i} of shard {s}" for i in range(2000)]
        if s == 1:
            texts[poison[1]] = POISON
        write_shard(tmp_path / "in" / f"{s:05d}.parquet", images[2000 * s : 2000 * s + 2000], texts, row_group=500)
    harmless = make_spec(output=str(tmp_path / "harmless"), fragment_rows=1000)
    curate(harmless, load=load_hash, execute=in_process, console=Console(file=io.StringIO()))
    spec = make_spec(fragment_rows=1000)
    summary = curate(spec, load=load_poison, console=Console(file=io.StringIO()))
    assert (summary.counts.rows, summary.counts.errors, summary.reasons["worker_died"]) == (6000, 1, 1)
    expected, rows = table(tmp_path / "harmless", "annotations"), table(tmp_path / "out", "annotations")
    (dead,) = [identity for identity, row in rows.items() if row["reason"] == "worker_died"]
    assert (dead[0][:5], dead[1]) == poison
    assert rows.pop(dead)["texts"][0]["text"] == expected.pop(dead)["texts"][0]["text"] == POISON
    assert len(rows) == 5999
    assert_alike(rows, expected)
    pairs = table(tmp_path / "harmless", "pairs")
    pairs.pop(dead, None)
    assert_alike(table(tmp_path / "out", "pairs"), pairs)
    (quarantined,) = read(spec.output, "quarantine")
    assert quarantined["image"] == images[2000 + poison[1]]


def test_two_kills_change_nothing(tmp_path: Path, ray_folder: Path) -> None:
    """The short form for every test run: a driver, then an actor of the one that resumes."""
    site = build(tmp_path, ray_folder, images=240, shards=4)
    output = tmp_path / "reference"
    curate(load_spec(site.spec, [f"output={output}"]), execute=in_process, console=Console(file=io.StringIO()))
    site.annotations, site.pairs = table(output, "annotations"), table(output, "pairs")
    check_whole(site, output)
    strikes = [Strike("driver", "work", 0.3, 0.2, 0), Strike("actor", "work", 0.1, 0.2, 0)]
    kills = live(site, 0, strikes, random.Random(SEED))
    assert [kill.victim for kill in kills] == ["driver", "actor"]
