"""What deploy/ holds, against the schemas of those who will read it, and against what the rest of the project says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from manifests import (
    DEPLOY,
    ROOT,
    launcher,
    manifest,
    mapped_spec,
    overrides,
    pod_templates,
    ray_clusters,
    unit,
)
from ray.autoscaler._private.util import prepare_config, validate_config

from capfilt.errors import ErrorBudgetError, RunInterruptedError, SpecError
from capfilt.spec import load_curate_spec

CRDS = ROOT.parent / "shared" / "kuberay-crds"
VERSIONS = ("1.31", "1.37")
"""Kubernetes' own schemas to validate against."""


# --- schemas ---


@cache
def crd(kind: str) -> jsonschema.Draft202012Validator:
    """The operator's schema of a kind; as the API server's strict mode it refuses what it does not know."""
    if not CRDS.is_dir():
        pytest.skip(f"{CRDS} is not there: KubeRay's custom resource definitions, which the manifests are checked with")
    definition = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)
    (version,) = (version for version in definition["spec"]["versions"] if version["name"] == "v1")
    return jsonschema.Draft202012Validator(_closed(version["schema"]["openAPIV3Schema"]))


def _closed(node: Any) -> Any:
    if isinstance(node, list):
        return [_closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _closed(value) for key, value in node.items()}
    if isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
        node.setdefault("additionalProperties", False)
    return node


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml", "raycluster.yaml"])
def test_kuberay_takes_its_resources(name: str) -> None:
    document = manifest(name)
    crd(document["kind"]).validate(document)


def test_an_unknown_field_is_refused() -> None:
    """The check above can fail."""
    document = manifest("rayjob.yaml")
    document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 8
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        crd("RayJob").validate(document)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["config.yaml", "cronjob.yaml", "networkpolicy.yaml"])
def test_kubernetes_takes_its_resources(name: str, version: str) -> None:
    kubernetes_validate.validate(manifest(name), version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_pod(version: str) -> None:
    templates = list(pod_templates())
    assert len(templates) == 3 * 2 + 2 + 1  # heads and workers, submitters, the CronJob's
    for _, template in templates:
        pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": "x", **template.get("metadata", {})}}
        kubernetes_validate.validate(pod, version, strict=True)


POD_MONITOR = {  # of prometheus-operator's definition, the fields that are used; it is not on PyPI
    "type": "object",
    "required": ["selector", "podMetricsEndpoints"],
    "additionalProperties": False,
    "properties": {
        "selector": {"properties": {"matchLabels": {"additionalProperties": {"type": "string"}}}},
        "podTargetLabels": {"type": "array", "items": {"type": "string"}},
        "podMetricsEndpoints": {
            "items": {
                "additionalProperties": False,
                "properties": {
                    "port": {"type": "string"},
                    "interval": {"pattern": r"^\d+s$"},
                    "scrapeTimeout": {"pattern": r"^\d+s$"},
                },
            }
        },
    },
}


def test_prometheus_finds_every_ray_pod() -> None:
    document = manifest("podmonitor.yaml")
    assert (document["apiVersion"], document["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    jsonschema.validate(document["spec"], POD_MONITOR)
    (endpoint,) = document["spec"]["podMetricsEndpoints"]
    wanted = document["spec"]["selector"]["matchLabels"]
    for path, template in pod_templates():
        (container,) = template["spec"]["containers"]
        if container["name"] in ("ray-head", "ray-worker"):
            labels = template["metadata"]["labels"] | {"ray.io/is-ray-node": "yes"}  # which KubeRay adds
            assert wanted.items() <= labels.items(), path
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert ports[endpoint["port"]] == 8080, path  # KubeRay's --metrics-export-port


# --- one story in all of them ---


def test_there_is_one_cluster_in_three_files() -> None:
    clusters = ray_clusters()
    assert clusters["rayjob.yaml"] == clusters["raycronjob.yaml"] == clusters["raycluster.yaml"]
    assert manifest("rayjob.yaml")["spec"] == manifest("raycronjob.yaml")["spec"]["jobTemplate"]


def test_versions_are_those_of_the_project() -> None:
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    images = {container["image"] for _, template in pod_templates() for container in template["spec"]["containers"]}
    images.add(launcher()["docker"]["image"])
    assert images == {f"registry.example.com/capfilt:{version[1]}-cuda"}
    assert {cluster["rayVersion"] for cluster in ray_clusters().values()} == {constraints["ray"]}


def test_no_pod_runs_as_root_or_holds_a_secret() -> None:
    for path, template in pod_templates():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, path
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, path
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }, path
            for variable in container.get("env", ()):
                if re.search("SECRET|TOKEN|PASSWORD|ACCESS_KEY", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], path
            assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container.get("env", ()) or (
                container["name"] == "ray-job-submitter"  # whose environment KubeRay writes
            ), path


def test_gpu_workers_come_from_zero_and_may_be_lost(tmp_path: Path) -> None:
    cluster = ray_clusters()["rayjob.yaml"]
    (group,) = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert (group["replicas"], group["minReplicas"]) == (0, 0)
    worker, head = group["template"]["spec"], cluster["headGroupSpec"]["template"]["spec"]
    assert worker["restartPolicy"] == head["restartPolicy"] == "Never"  # autoscaler v2
    limits = worker["containers"][0]["resources"]["limits"]
    entrypoint = manifest("rayjob.yaml")["spec"]["entrypoint"]
    spec = load_curate_spec(mapped_spec(tmp_path / "curate.yaml"), overrides(entrypoint))
    assert spec.ray.address == "auto"
    card = spec.placement
    assert float(limits["nvidia.com/gpu"]) == card.gpus
    assert float(limits["cpu"]) >= card.cpus
    assert group["maxReplicas"] == card.max_actors
    tolerated = {toleration["key"] for toleration in worker["tolerations"]}
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= tolerated
    affinity = head["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = affinity["nodeSelectorTerms"]
    preferred = worker["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    spot = {
        (expression["key"], *expression["values"])
        for preference in preferred
        for expression in preference["preference"]["matchExpressions"]
    }
    assert {(expression["key"], *expression["values"]) for expression in term["matchExpressions"]} == spot
    assert {expression["operator"] for expression in term["matchExpressions"]} == {"NotIn"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_what_fails_is_tried_again_by_someone() -> None:
    """Ray's jobs are never retried by Ray."""
    assert manifest("rayjob.yaml")["spec"]["backoffLimit"] > 0
    assert manifest("rayjob.yaml")["spec"]["shutdownAfterJobFinishes"] is True  # a retry takes a new cluster
    job = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]
    assert job["backoffLimit"] > 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # as podFailurePolicy needs it
    (container,) = job["template"]["spec"]["containers"]
    disrupted, for_good = job["podFailurePolicy"]["rules"]
    assert (disrupted["action"], for_good["action"]) == ("Ignore", "FailJob")
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert for_good["onExitCodes"]["containerName"] == container["name"]


def test_a_pod_that_takes_the_place_of_another_follows_its_run() -> None:
    """By an id that is the same for all pods of a Job, and another for the next night's."""
    template = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert "--id=$(JOB_NAME)" in container["args"]
    (variable,) = (variable for variable in container["env"] if variable["name"] == "JOB_NAME")
    field = variable["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.labels['batch.kubernetes.io/job-name']"  # which the Job gives its pods


def test_an_overlap_is_no_failure_anywhere() -> None:
    """By one option, in a command without a shell's operators: KubeRay puts it into a shell command of its own."""
    (container,) = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    (start,) = (value for _, key, value in unit("capfilt@.service") if key == "ExecStart")
    entrypoints = (
        manifest("rayjob.yaml")["spec"]["entrypoint"],
        manifest("raycronjob.yaml")["spec"]["jobTemplate"]["entrypoint"],
    )
    for command in (*entrypoints, start, shlex.join(container["args"])):
        assert "--overlap-ok" in shlex.split(command)
    for entrypoint in entrypoints:
        assert not set(entrypoint) & set("|&;<>()$`\\\"'*?[]{}!#\n"), entrypoint


def test_everyone_agrees_on_ray_s_authentication() -> None:
    assert {cluster["authOptions"]["mode"] for cluster in ray_clusters().values()} == {"token"}
    (container,) = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    environment = {variable["name"]: variable for variable in container["env"]}
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    name = manifest("raycluster.yaml")["metadata"]["name"]
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": name, "key": "auth_token"}
    assert f"--address=http://{name}-head-svc:8265" in container["args"]
    assert "--env RAY_AUTH_MODE=token" in launcher()["docker"]["run_options"]


def test_only_its_own_pods_reach_the_ports() -> None:
    spec = manifest("networkpolicy.yaml")["spec"]
    mine = spec["podSelector"]["matchLabels"]
    assert {"podSelector": {"matchLabels": mine}} in spec["ingress"][0]["from"]
    for path, template in pod_templates():
        assert mine.items() <= template["metadata"]["labels"].items(), path


def test_schedules_are_schedules() -> None:
    field = r"(\*|\d+)"
    for name in ("raycronjob.yaml", "cronjob.yaml"):
        assert re.fullmatch(rf"{field}( {field}){{4}}", manifest(name)["spec"]["schedule"]), name
    assert manifest("cronjob.yaml")["spec"]["concurrencyPolicy"] == "Forbid"


# --- one machine, and Ray's launcher ---


def test_systemd_takes_its_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not there")
    for file in (DEPLOY / "systemd").iterdir():
        text = file.read_text()  # systemd-analyze wants the program to be there
        (tmp_path / file.name).write_text(text.replace("/opt/capfilt/venv/bin/capfilt", "/bin/true"))
    done = subprocess.run(
        [analyze, "verify", "--recursive-errors=yes", "./capfilt@.service", "./capfilt@.timer"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_knows_capfilt_s_exit_codes() -> None:
    lines = unit("capfilt@.service")
    values = {key: value for section, key, value in lines if section == "Service"}
    assert (values["Type"], values["Restart"]) == ("oneshot", "on-failure")
    for_good = [SpecError.exit_code, ErrorBudgetError.exit_code]
    assert values["RestartPreventExitStatus"].split() == list(map(str, for_good))
    rule = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][1]
    assert rule["onExitCodes"]["values"] == [*for_good, RunInterruptedError.exit_code]
    assert (values["KillMode"], values["KillSignal"]) == ("mixed", "SIGTERM")  # the driver alone: it commits first
    assert values["User"] != "root"
    assert ("Service", "Environment", "RAY_USAGE_STATS_ENABLED=0") in lines
    (schedule,) = (value for _, key, value in unit("capfilt@.timer") if key == "OnCalendar")
    assert re.fullmatch(r"\*-\*-\* \d\d:\d\d:\d\d", schedule)


def test_ray_s_launcher_takes_its_cluster() -> None:
    config = launcher()
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(config))
    head, workers = (config["available_node_types"][name] for name in ("head", "gpu"))
    assert "InstanceMarketOptions" not in head["node_config"]
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert (workers["min_workers"], head["resources"]) == (0, {"CPU": 0})
    assert config["max_workers"] == workers["max_workers"]
