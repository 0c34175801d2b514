"""Exports read by LitData and MosaicML Streaming, in an environment of their own over this one.

Neither can be in the tests' own: LitData wants torchvision, which has to be of torch's own build, and Streaming older
packages. What these tests run of them needs none of that, so they are installed without what they depend on.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("litdata", "lightning-utilities", "obstore")  # of constraints.txt
STREAMING = ("mosaicml-streaming==0.13.0", "brotli==1.2.1", "python-snappy==0.7.3", "cramjam==2.14.0")
STREAMING += ("zstd==1.5.7.2", "catalogue==2.0.10")
WITHOUT_TORCHVISION = "import sys, types; sys.modules['streaming.vision'] = types.ModuleType('streaming.vision')\n"
"""Streaming imports its image datasets, which want torchvision and which no export of ours is read by."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the readers and all that this one has."""
    folder = tmp_path_factory.mktemp("readers")
    venv.create(folder, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    (packages / "tests.pth").write_text(f"{sysconfig.get_path('purelib')}\n{WITHOUT_TORCHVISION}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    command += ["--target", str(packages), "--constraint", str(ROOT / "constraints.txt"), *PACKAGES, *STREAMING]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "Retrying (" in done.stderr:
        pytest.skip("pip reaches no package index")
    assert done.returncode == 0, done.stderr
    return folder / "bin" / "python"


@pytest.mark.parametrize("tests", ["litdata", "mds_by_its_own_reader"])
def test_exports_are_read_by_the_readers_they_are_for(python: Path, tests: str) -> None:
    """tests/test_export.py's own tests, none of them skipped."""
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests, "tests/test_export.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed, \d+ deselected in", done.stdout, re.MULTILINE), done.stdout
