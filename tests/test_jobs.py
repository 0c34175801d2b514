"""`capfilt submit` and `capfilt job` against a real cluster with its job server, and against what is none."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import jpeg, write_shard
from crash_driver import seen
from ray_cluster import ENVIRONMENT, RayCluster, free_port
from rich.console import Console
from test_crash import Site, build, check_partial, check_whole, table
from test_submit import make_wheel

from capfilt.lease import Lease
from capfilt.pipelines.curate import curate, in_process
from capfilt.spec import load_spec

SLOWLY = ["fragment_rows=5", "captioners.0.batch_size=1", "captioners.0.placement={cpus: 0.5, max_actors: 1}"]
SECRET = "open-sesame-7261"


def capfilt(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, on a machine that can reach the cluster but is not one of its nodes."""
    with start(*arguments, **environment) as process:
        try:
            out, err = process.communicate(timeout=240)
        finally:
            process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "PYTHONPATH", "RAY_USAGE_STATS_ENABLED")
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= {name: ENVIRONMENT[name] for name in names} | {"COLUMNS": "120", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "capfilt", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in own.items() if value},
        cwd="/",
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster(cpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """120 rows in 4 shards, and what a run without Ray makes of them."""
    site = build(tmp_path_factory.mktemp("site"), Path(), images=120, shards=4)
    output = site.folder / "reference"
    curate(load_spec(site.spec, [f"output={output}"]), execute=in_process, console=Console(file=io.StringIO()))
    site.annotations, site.pairs = table(output, "annotations"), table(output, "pairs")
    return site


def submitted(text: str) -> str:
    (job,) = re.findall(r"submitted (\S+) to http", text)
    return str(job)


def until_receipts(follower: subprocess.Popen[str], output: Path, fragments: int) -> None:
    """Wait for so many fragments to be finished."""
    end = time.monotonic() + 120
    while seen(output).receipts < fragments:
        assert follower.poll() is None, follower.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


# --- on a cluster ---


def test_a_spec_goes_there_and_its_end_comes_back(cluster: RayCluster, site: Site, tmp_path: Path) -> None:
    """Its log, its exit code; a wheel and a secret go with it. There is nothing to do: what the run finds of the
    checkpoints that were sent is what it would find here."""
    marks = "\nimport os\nprint('the wheel runs, with', len(os.environ['STORE_PASSWORD']), 'letters')\n"
    wheel = make_wheel(tmp_path, arguments=marks)
    output = site.folder / "reference"
    command = ["submit", str(site.spec), "--address", cluster.job_server, "--set", f"output={output}", "--follow"]
    done = capfilt(*command, "--wheel", str(wheel), "--env", "STORE_PASSWORD", STORE_PASSWORD=SECRET)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"the wheel runs, with {len(SECRET)} letters" in done.stdout
    assert "nothing to do: 4 shards up to date" in done.stdout  # the run's own words
    assert f"output {output}: must be on a disk that all nodes share" in done.stdout
    job = submitted(done.stdout)
    assert done.stderr == f"capfilt: {job}: SUCCEEDED, exit code 0 (done)\n"  # and nothing of Ray's

    status = capfilt("job", "status", job, RAY_ADDRESS=cluster.job_server)
    assert status.returncode == 0, status.stderr
    assert f"{job}: SUCCEEDED, exit code 0 (done)" in status.stdout
    logs = capfilt("job", "logs", job, "--address", cluster.job_server)
    assert logs.returncode == 0, logs.stderr
    assert "nothing to do: 4 shards up to date" in logs.stdout
    assert not any(SECRET in text for text in (done.stdout, status.stdout, logs.stdout))


def test_a_job_of_an_id_is_sent_once_and_again_when_it_failed(cluster: RayCluster, site: Site) -> None:
    """As by a pod that takes the place of one that was evicted, and by one that tries again. What fails here is a run
    that meets another, which `--overlap-ok` makes a success."""
    output = str(site.folder / "held")

    def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
        settings = (f"--set=output={output}", "--id=night", *arguments)
        return capfilt("submit", str(site.spec), "--address", cluster.job_server, *settings)

    with Lease(output, {}, "first"):
        failed = submit("--follow")
        assert failed.returncode == 4, failed.stdout + failed.stderr
        assert submitted(failed.stdout) == "night"
        assert submitted(submit("--overlap-ok").stdout) == "night-2"
        followed = submit("--overlap-ok", "--follow")  # while it runs, or once it has
    assert re.search(rf"night-2 is at {cluster.job_server} already \((PENDING|RUNNING|SUCCEEDED)\)", followed.stdout)
    assert f"{output}: held by run first" in followed.stdout
    assert followed.stderr == "capfilt: night-2: SUCCEEDED, exit code 0 (done)\n"
    assert followed.returncode == 0
    done = submit()
    assert f"night-2 is at {cluster.job_server} already (SUCCEEDED), and is not sent again" in done.stdout


@pytest.mark.slow
def test_a_run_there_is_as_a_run_here(cluster: RayCluster, site: Site) -> None:
    output = site.folder / "submitted"
    command = ["submit", str(site.spec), "--address", cluster.job_server, "--set", f"output={output}", "--follow"]
    done = capfilt(*command, "--env", "STORE_PASSWORD", STORE_PASSWORD=SECRET)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in 4 shards" in done.stdout
    check_whole(site, output)
    records = [path.read_text() for path in (output / "_runs").rglob("*.json")]
    assert records
    assert not any(SECRET in text for text in [done.stdout, done.stderr, *records])


@pytest.mark.slow
def test_exit_codes_of_runs_are_those_of_the_command(cluster: RayCluster, site: Site) -> None:
    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        settings = [f"--set={override}" for override in (f"output={site.folder / 'codes'}", *overrides)]
        return capfilt("submit", str(site.spec), "--address", cluster.job_server, "--follow", *settings)

    spec = run("filters.0.max_tokens=512")  # found out by a worker
    assert spec.returncode == 2, spec.stdout + spec.stderr
    assert "filter.max_tokens: 512 tokens, but" in spec.stdout
    assert "FAILED, exit code 2 (bad usage or spec)" in spec.stderr
    for s in range(3):
        write_shard(site.folder / "sick" / f"{s}.parquet", [b"garbage"] * 30 + [jpeg(s)])
    sick = run(f"input.paths={site.folder / 'sick'}")
    assert sick.returncode == 3, sick.stdout + sick.stderr
    assert "over max_error_fraction" in sick.stdout
    assert "exit code 3 (stopped by the error budget)" in sick.stderr
    gone = run("input.paths=/gone")
    assert gone.returncode == 1, gone.stdout + gone.stderr
    assert "/gone: no such file or directory" in gone.stdout


@pytest.mark.slow
def test_a_stopped_job_commits_what_is_finished_and_resumes(cluster: RayCluster, site: Site) -> None:
    output = site.folder / "stopped"
    settings = [f"output={output}", *SLOWLY]
    command = ["submit", str(site.spec), "--address", cluster.job_server, "--follow"]
    with start(*command, *(f"--set={setting}" for setting in settings)) as follower:
        try:
            until_receipts(follower, output, 2)
            assert follower.stdout is not None
            job = submitted(follower.stdout.readline())
            stopped = capfilt("job", "stop", job, "--address", cluster.job_server)
            out, err = follower.communicate(timeout=60)
        finally:
            follower.kill()
    assert stopped.returncode == 0, stopped.stderr
    assert f"{job}: STOPPED, exit code 130" in stopped.stdout
    assert follower.returncode == 130, out + err
    assert "what was finished is kept" in out  # the run's own last words
    check_partial(site, output)
    assert len(table(output, "annotations")) < 120
    again = capfilt(*command, *(f"--set={setting}" for setting in settings))
    assert again.returncode == 0, again.stdout + again.stderr
    check_whole(site, output)


@pytest.mark.slow
def test_the_loss_of_the_head_is_named_and_a_job_resumes_when_submitted_again(site: Site) -> None:
    output = site.folder / "headless"
    settings = [f"output={output}", *SLOWLY]
    with RayCluster(cpus=2) as cluster:
        command = ["submit", str(site.spec), "--address", cluster.job_server, "--follow"]
        command += [f"--set={setting}" for setting in settings]
        with start(*command) as follower:
            try:
                until_receipts(follower, output, 2)
                cluster.head.kill()
                _, err = follower.communicate(timeout=120)
            finally:
                follower.kill()
        assert follower.returncode == 1
        assert f"no job server answers at {cluster.job_server}" in err
        assert "may have ended with the head" in err
        assert "Traceback" not in err
        check_partial(site, output)
        cluster.start_head()
        again = capfilt(*command)
        assert again.returncode == 0, again.stdout + again.stderr
        check_whole(site, output)


def test_a_token_is_asked_for(cluster: RayCluster, site: Site) -> None:
    for token, have in (("", "none was sent"), ("x" * 40, "ours is not the one")):
        mode = "token" if token else ""
        done = capfilt(
            *("submit", str(site.spec), "--address", cluster.job_server),
            RAY_AUTH_MODE=mode,
            RAY_AUTH_TOKEN=token,
            HOME=str(site.folder),
        )
        assert done.returncode == 1, done.stdout
        assert f"wants a token, and {have}: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_job_that_is_not_known(cluster: RayCluster) -> None:
    for command in (["status"], ["stop"], ["logs"], ["logs", "--follow"]):
        done = capfilt("job", *command, "raysubmit_nobody", "--address", cluster.job_server)
        assert done.returncode == 1, done.stdout
        assert f"no job raysubmit_nobody at {cluster.job_server}" in done.stderr


# --- without one ---


@contextmanager
def answering(code: int, body: object) -> Iterator[str]:
    """A server that gives every request the same answer; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode() if not isinstance(body, bytes) else body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("code", "body", "message"),
    [
        (200, {"ray_version": "2.9.3", "version": "4"}, "runs Ray 2.9.3; capfilt needs 2.60 or a later 2.x"),
        (200, {"ray_version": "3.0.0", "version": "4"}, "runs Ray 3.0.0; capfilt needs 2.60 or a later 2.x"),
        (200, {"version": "of something else"}, "is not a Ray job server"),
        (200, b"<html>", "is not a Ray job server"),
        (404, b"", "is not a Ray job server"),
        (502, b"", "is not a Ray job server"),
    ],
)
def test_what_is_no_job_server_of_ours(code: int, body: object, message: str) -> None:
    with answering(code, body) as address:
        done = capfilt("job", "status", "x", "--address", address)
    assert done.returncode == 1, done.stdout
    assert message in done.stderr
    assert address in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--address", f"127.0.0.1:{free_port()}"], 1, "no job server answers at http://127.0.0.1:"),
        (["--address", "ray://head:10001"], 2, "--address ray://head:10001: give that of the head's job server"),
        ([], 2, "Missing option '--address'"),
        (["--address", "http://nowhere", "--set", "fragment_row=3"], 2, "did you mean fragment_rows?"),
        (["--address", "http://nowhere", "--env", "NOT_SET"], 2, "--env NOT_SET: not set here"),
        (["--address", "http://nowhere", "--id", "a b"], 2, "--id 'a b': write letters, digits"),
        (["--address", "http://nowhere", "--id", ""], 2, "--id '': write letters, digits"),
        (["--address", "http://nowhere", "--wheel", "x.whl"], 1, "x.whl: not a wheel of capfilt"),
    ],
)
def test_what_is_wrong_here_is_said_here(site: Site, arguments: list[str], code: int, message: str) -> None:
    done = capfilt("submit", str(site.spec), *arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
