"""The image, as far as it can be judged without building it: what it copies, installs and runs as."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest
from dockerfile_parse import DockerfileParser
from manifests import DEPLOY, ROOT


class Line(NamedTuple):
    """One instruction; `value` without comments and continuation marks."""

    instruction: str
    value: str


def lines() -> list[Line]:
    parser = DockerfileParser(str(DEPLOY / "Dockerfile"), cache_content=True)
    found = (Line(entry["instruction"], entry["value"]) for entry in parser.structure)
    return [line for line in found if line.instruction != "COMMENT"]


def final_stage() -> list[Line]:
    starts = [number for number, line in enumerate(lines()) if line.instruction == "FROM"]
    return lines()[starts[-1] :]


def copied() -> list[str]:
    """What is copied from the checkout."""
    words = [shlex.split(line.value) for line in lines() if line.instruction == "COPY"]
    return [source for word in words if not word[0].startswith("--from") for source in word[:-1]]


def context() -> set[str]:
    """The checkout's files that .dockerignore lets through."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return {name for name in tracked if let_through(name)}


def let_through(name: str) -> bool:
    """By .dockerignore, in which the last pattern that matches wins."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    kept = True
    for pattern in patterns:
        glob = pattern.lstrip("!").replace("**/", "*")
        if fnmatch(name, glob) or name.startswith(f"{glob}/"):
            kept = pattern.startswith("!")
    return kept


def test_what_is_copied_is_there_and_let_through() -> None:
    assert set(copied()) == {
        *("constraints.txt", "pyproject.toml", "README.md", "LICENSE", "capfilt", "models", "pipelines")
    }
    files = context()
    for source in copied():
        assert any(name == source or name.startswith(f"{source}/") for name in files), source


def test_the_image_gets_the_whole_package_and_nothing_else() -> None:
    files = context()
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "capfilt").rglob("*.py")}
    assert package | {"capfilt/py.typed"} == {name for name in files if name.startswith("capfilt/")}
    assert not [name for name in files if re.match(r"tests/|benchmarks/|deploy/|\.", name)]
    assert not [name for name in (".env", "runs/demo/curated/x.parquet", "capfilt/core.123") if let_through(name)]


def defaults() -> dict[str, str]:
    """Build arguments, as they are if not given."""
    return dict(line.value.split("=", 1) for line in lines() if line.instruction == "ARG")


def test_the_base_is_pinned() -> None:
    assert re.fullmatch(r"3\.11\.\d+", defaults()["PYTHON"])  # to the patch; the tests run on 3.11, too
    for line in lines():
        if line.instruction == "FROM":
            assert line.value.split()[0] == "python:${PYTHON}-slim-bookworm"


def test_it_does_not_run_as_root() -> None:
    users = [line.value for line in final_stage() if line.instruction == "USER"]
    assert users == ["1000:1000"]
    after = final_stage()[[line.instruction for line in final_stage()].index("USER") :]
    assert {line.instruction for line in after} <= {"USER", "WORKDIR", "CMD"}


def test_a_shell_can_be_started_in_it() -> None:
    """By KubeRay, which overrides the command, and by Ray's launcher, which runs `IMAGE bash` and reads its HOME."""
    assert not [line for line in final_stage() if line.instruction == "ENTRYPOINT"]
    environment = " ".join(line.value for line in final_stage() if line.instruction == "ENV")
    assert "HOME=/home/capfilt " in environment
    assert "RAY_USAGE_STATS_ENABLED=0" in environment
    packages = next(line.value for line in final_stage() if "apt-get install" in line.value)
    assert {"rsync", "openssh-client", "wget"} <= set(packages.split())


def test_every_installation_is_constrained() -> None:
    installs = [line.value for line in lines() if re.match("pip install", line.value)]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in install for install in installs)
    assert '".[${EXTRAS}]"' in installs[-1]


def test_any_run_can_be_run_in_it() -> None:
    """Of whatever kind, in whatever store, but an export for LitData. Other extras are for people who look or build."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(defaults()["EXTRAS"].split(",")) == project["optional-dependencies"].keys() - {
        *("litdata", "view", "docs", "dev")
    }


def device_check(device: str) -> str:
    """The Python of the build's last check."""
    (line,) = (line.value for line in final_stage() if line.value.startswith("python -c"))
    code: str = shlex.split(line)[2]
    return code.replace("${DEVICE}", device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_build_fails_where_torch_does_not_fit_the_device(device: str) -> None:
    import torch

    done = subprocess.run([sys.executable, "-c", device_check(device)], cwd=ROOT, capture_output=True, text=True)
    if (torch.version.cuda is None) == (device == "cpu"):
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 1
        assert f"DEVICE is {device} and torch" in done.stderr


@pytest.mark.slow
def test_its_packages_install(tmp_path: Path) -> None:
    """The RUN lines of the first stage, in a fresh environment: what the image has can be had, by these constraints."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    for name in set(copied()):
        (tmp_path / name).symlink_to(ROOT / name)
    for line in lines():
        if line.value.startswith("pip install"):
            command = line.value.replace("${TORCH_INDEX:+--index-url ${TORCH_INDEX}}", "")
            command = command.replace("${EXTRAS}", defaults()["EXTRAS"])
            subprocess.run(f"venv/bin/python -m {command} --quiet", shell=True, cwd=tmp_path, check=True, timeout=1500)
    code = "import adlfs, boto3, gcsfs, img2dataset, opentelemetry.sdk, ray.job_submission, capfilt, sys; "
    code += "sys.exit(capfilt.__file__.startswith(sys.argv[1]))"
    python = str(tmp_path / "venv/bin/python")
    for command in (
        [tmp_path / "venv/bin/capfilt", "--help"],
        [python, "-c", code, ROOT],
        [python, "-m", "pip", "check"],
    ):
        done = subprocess.run(command, cwd=tmp_path / "venv", env={}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
