"""The layers of the package, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "capfilt"

LAYERS = [
    {
        *("errors", "schema", "spec", "text", "decide", "fingerprints", "weights", "evaluate", "throughput"),
        "calibration",
        *("terminal", "logs", "redaction", "perceptual", "duplicates", "rules", "remedies", "interrupts"),
        "causes",
    },
    {
        *("inputs", "fragments", "writer", "images", "dataset", "receipts", "plan", "pace", "toyweb", "examples"),
        *("stores", "truth", "testset", "quality", "tables", "demo", "holder", "lease", "records", "submit", "report"),
        *("tars", "arrow_streams", "export", "view"),
        *("opener", "delimited", "lists", "url_shards", "account", "shard_store", "ingest"),
        *("withdrawn", "retention", "diff", "damage"),
    },
    {"models"},
    {"pipelines"},
    {
        *("cli", "stage", "printing", "arguments", "completion", "check", "native_noise", "last_words", "__main__"),
        *("run_commands", "dataset_commands", "job_commands", "toy_commands"),
    },
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at the top level) of every import in a file."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, top))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    mine = layer(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    for module, _ in imports(path):
        if module.startswith("capfilt."):
            assert layer(module.split(".")[1]) <= mine, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_lives_in_models_and_ray_in_pipelines(path: Path) -> None:
    home = path.relative_to(PACKAGE).parts[0]
    names = {module.split(".")[0] for module, _ in imports(path)}
    if home not in ("models", "pipelines"):
        assert not names & {"torch", "transformers"}
    if home != "pipelines":
        assert "ray" not in names


HEAVY = "import sys; sys.exit(', '.join(m for m in ('torch', 'ray', 'transformers') if m in sys.modules) or 0)"


@pytest.mark.parametrize(
    "code",
    [
        "import capfilt",
        "import capfilt.dataset, capfilt.plan, capfilt.receipts, capfilt.fragments, capfilt.images, capfilt.toyweb",
        "import capfilt.examples, capfilt.evaluate, capfilt.weights",
        "import capfilt.lease, capfilt.records, capfilt.logs, capfilt.printing",
        "import capfilt.pipelines.ingest",
        "import capfilt.pipelines.evaluate",
        "import capfilt.truth, capfilt.testset, capfilt.quality, capfilt.tables",
        "import capfilt.report, capfilt.report.page",
        "import capfilt.view.server",
        "import capfilt.pace, capfilt.pipelines.curate, capfilt.pipelines.redecide",
        "import capfilt.withdrawn, capfilt.retention, capfilt.diff, capfilt.pipelines.withdraw",
        "from typer.testing import CliRunner as R; from capfilt.cli import app; R().invoke(app, ['--help']).stdout[99]",
    ],
)
def test_importing_loads_neither_torch_nor_ray(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{code}\n{HEAVY}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
