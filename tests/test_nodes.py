"""A run on several nodes, each with its own raylet, which die one after the other; and the head, under which all dies.

What the run ends with is what an undisturbed one makes, row by row. Kills are drawn from a seed.
"""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_driver import WORKER, Driver, seen
from ray_cluster import Node, RayCluster
from rich.console import Console
from test_crash import Site, build, check_partial, check_whole, table

from capfilt.pipelines.curate import curate, in_process
from capfilt.spec import load_spec

SEEDS = 5
DEATHS = ("raylet", "node")
"""What dies in turn in the run of each seed."""
HEADS = ("gcs", "head")

SLOWLY = ["fragment_rows=10", "captioners.0.batch_size=1", "filters.0.batch_size=1"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """600 rows in 6 shards, and what a run without Ray makes of them."""
    site = build(tmp_path_factory.mktemp("site"), Path(), images=600, shards=6)
    output = site.folder / "reference"
    curate(load_spec(site.spec, [f"output={output}"]), execute=in_process, console=Console(file=io.StringIO()))
    site.annotations, site.pairs = table(output, "annotations"), table(output, "pairs")
    return site


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    """Three nodes that take work, and a head that takes none."""
    with RayCluster(cpus=0) as cluster:
        for _ in range(3):
            cluster.add_node(cpus=1)
        yield cluster


def drive(site: Site, cluster: RayCluster, output: Path, name: str, *overrides: str) -> Driver:
    """A driver on the head's machine, with an actor for each node."""
    settings = [f"ray={{address: '{cluster.address}'}}", *SLOWLY]
    settings += ["captioners.0.placement={cpus: 0.6, min_actors: 3, max_actors: 3}", *overrides]
    return Driver(site.spec, output, site.folder / name, settings, cluster.folder, cluster.environment())


def until_more(driver: Driver, output: Path, fragments: int) -> None:
    """Wait for so many more fragments to be finished."""
    enough = seen(output).receipts + fragments
    assert driver.until(lambda: seen(output).receipts >= enough), driver.stderr()


def at_work(cluster: RayCluster) -> list[Node]:
    """Nodes that hold a worker of the run."""
    return [node for node in cluster.nodes if node.alive() and node.named(WORKER)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_nodes_and_raylets_that_die_cost_nothing(site: Site, cluster: RayCluster, seed: int) -> None:
    rng, output = random.Random(seed), site.folder / f"nodes-{seed}"
    with drive(site, cluster, output, f"home-{seed}") as driver:
        for what in rng.sample(DEATHS, 2):
            until_more(driver, output, rng.randint(2, 8))
            time.sleep(rng.random())
            node = rng.choice(at_work(cluster))
            if what == "node":
                node.kill()
            else:
                (raylet,) = node.named("raylet")
                raylet.kill()
            print(f"seed {seed}: {what} killed at {driver.seconds:.1f} s, {seen(output)}", flush=True)
            cluster.add_node(cpus=1)  # as an autoscaler would
        assert driver.wait() == 0, driver.stderr()
    check_whole(site, output)


@pytest.mark.slow
@pytest.mark.parametrize("what", HEADS)
def test_a_head_that_dies_is_named_and_the_same_command_resumes(site: Site, cluster: RayCluster, what: str) -> None:
    output = site.folder / what
    with drive(site, cluster, output, f"home-{what}") as driver:
        until_more(driver, output, 5)
        if what == "head":
            cluster.head.kill()
        else:
            (gcs,) = cluster.head.named("gcs_server")
            gcs.kill()
        killed = driver.seconds
        code = driver.wait()
        print(f"{what} killed at {killed:.1f} s; the driver ended {driver.seconds - killed:.1f} s later", flush=True)
    assert code != 0
    lost = "because the head of its cluster, or the Ray of its own node, was lost"
    for _ in range(100):  # another process says it, once this one is gone
        if "the same command then resumes" in driver.stderr():
            break
        time.sleep(0.1)
    assert lost in driver.stderr()
    assert "the same command then resumes" in driver.stderr()
    check_partial(site, output)
    finished = seen(output).receipts
    for node in [cluster.head, *cluster.nodes]:
        node.kill()
    cluster.start_head()
    for _ in range(3):
        cluster.add_node(cpus=1)
    with drive(site, cluster, output, f"home-{what}-again") as driver:
        assert driver.wait() == 0, driver.stderr()
    assert finished
    assert "taken over from an interrupted run" in driver.stdout()
    check_whole(site, output)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="another disk is mounted for one node")
def test_a_node_with_another_disk_at_the_output_writes_nothing_there(site: Site, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    other = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(output)]
    with RayCluster(cpus=0) as cluster:
        cluster.add_node(cpus=3, prefix=other)
        with drive(site, cluster, output, "home-disk") as driver:
            assert driver.wait() == 1, driver.stdout()
    assert f"capfilt: {output}: node " in driver.stderr()
    assert "does not see what the driver wrote there; an output must be on a disk that all nodes" in driver.stderr()
    assert seen(output).receipts == 0
