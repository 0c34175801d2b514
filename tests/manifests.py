"""Reads what lies in deploy/, and maps its paths and commands to this checkout."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
SPEC = "/etc/capfilt/curate.yaml"

_PLACES = {
    "input": "s3://my-bucket/laion/*.parquet",
    "output": "s3://my-bucket/laion-curated",
    "captioner": "/opt/capfilt/models/blip-captioning-base.yaml",
    "filter": "/opt/capfilt/models/blip-itm-base-coco.yaml",
}


def manifest(name: str) -> dict[str, Any]:
    """The one document of a file in deploy/kubernetes."""
    (document,) = yaml.safe_load_all((KUBERNETES / name).read_text())
    return dict(document)


def launcher() -> dict[str, Any]:
    """The YAML of Ray's launcher."""
    return dict(yaml.safe_load((DEPLOY / "ray-aws.yaml").read_text()))


def ray_clusters() -> dict[str, dict[str, Any]]:
    """Every RayCluster spec, by the file it stands in."""
    return {
        "raycluster.yaml": manifest("raycluster.yaml")["spec"],
        "rayjob.yaml": manifest("rayjob.yaml")["spec"]["rayClusterSpec"],
        "raycronjob.yaml": manifest("raycronjob.yaml")["spec"]["jobTemplate"]["rayClusterSpec"],
    }


def pod_templates() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template of every manifest, with where it stands."""
    for file in sorted(KUBERNETES.glob("*.yaml")):
        yield from _templates(manifest(file.name), file.name)


def _templates(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
            yield path, node
        for key, value in node.items():
            yield from _templates(value, f"{path}.{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _templates(value, f"{path}.{number}")


def mapped_spec(to: Path, **places: str) -> Path:
    """Write the ConfigMap's spec, the image's paths mapped to the checkout.

    Args:
        to: the file.
        places: what takes the place of its `input`, `output`, `captioner` and `filter`.
    """
    text = manifest("config.yaml")["data"][Path(SPEC).name]
    for name, value in places.items():
        assert _PLACES[name] in text
        text = text.replace(_PLACES[name], value)
    to.write_text(text.replace("/opt/capfilt/", f"{ROOT}/"))
    return to


def mapped_command(command: str, spec: Path) -> list[str]:
    """A manifest's command, with this Python's capfilt and with `spec` for the spec that is mounted."""
    program, *arguments = shlex.split(command)
    assert Path(program).name == "capfilt"
    assert SPEC in arguments
    return [sys.executable, "-m", "capfilt", *(str(spec) if word == SPEC else word for word in arguments)]


def overrides(command: str) -> list[str]:
    """The `--set` assignments of a command."""
    words = shlex.split(command)
    return [value for flag, value in itertools.pairwise(words) if flag == "--set"]


def unit(name: str) -> list[tuple[str, str, str]]:
    """(section, key, value) of each line of a systemd unit, `%i` being `curate`."""
    lines, section = [], ""
    for line in (DEPLOY / "systemd" / name).read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            lines.append((section, key, value.replace("%i", "curate")))
    return lines
