"""What `helm upgrade` restarts, by kind of change: nothing, engines and routers in their cluster, or a new Ray cluster.

A release is rendered before and after. KubeRay 1.7 makes a new cluster when `rayClusterConfig` is another, but for the
numbers of pods and groups that were added at the end (`GenerateHashWithoutReplicasAndWorkersToDelete`, in its
controllers' utils). Ray Serve 2.60 replaces all replicas of an application whose arguments are others
(`get_app_code_version`).
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import yaml
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.schema import ServeDeploySchema

from tests.unit.chart.rendering import ROOT, Object, Values, merged, one, render

BEFORE: Values = {
    "settings": {
        "model": {"source": "org/model"},
        "adapters": [{"name": "code", "source": "org/code"}],
        "replicas": {"min": 1, "max": 2, "gpus": 1, "cpus": 4},
    },
    "workerGroups": [{"name": "gpu", "cpus": 5, "gpus": 1}],
    "networkPolicy": {"clients": [{"podSelector": {}}]},
}
NOTHING, IN_PLACE, CLUSTER = "nothing", "engines and routers", "a new cluster"


def cluster_hash(service: Object) -> str:
    """What KubeRay compares of two clusters."""
    config = copy.deepcopy(service["spec"]["rayClusterConfig"])
    for group in config["workerGroupSpecs"]:
        for field in ("replicas", "minReplicas", "maxReplicas"):
            group.pop(field, None)
        group.get("scaleStrategy", {}).pop("workersToDelete", None)
    return json.dumps(config, sort_keys=True)


def application_version(service: Object) -> str:
    """What Ray Serve compares of two applications."""
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"])).applications
    version: str = get_app_code_version(application)
    return version


def restarts(after: Values) -> str:
    """What an upgrade from `BEFORE` restarts."""
    old, new = (one(render(values), "RayService") for values in (BEFORE, after))
    kept = len(old["spec"]["rayClusterConfig"]["workerGroupSpecs"])
    trimmed = copy.deepcopy(new)
    del trimmed["spec"]["rayClusterConfig"]["workerGroupSpecs"][kept:]
    if cluster_hash(old) != cluster_hash(trimmed):
        return CLUSTER
    return NOTHING if application_version(old) == application_version(new) else IN_PLACE


def settings(**changed: Any) -> Values:
    return {"settings": changed}


# As docs/kubernetes.md names them.
CHANGES: dict[str, tuple[Values, str]] = {
    "an adapter in `settings.adapters`": (
        settings(adapters=[{"name": "code", "source": "org/code"}, {"name": "law", "source": "org/law"}]),
        IN_PLACE,
    ),
    "`settings.replicas.max`": (settings(replicas={"max": 4}), IN_PLACE),
    "the model, or any other of `settings`": (settings(model={"source": "org/other"}), IN_PLACE),
    "`workerGroups[].minReplicas`, `maxReplicas`": (
        {"workerGroups": [{"name": "gpu", "cpus": 5, "gpus": 1, "minReplicas": 2, "maxReplicas": 6}]},
        NOTHING,
    ),
    "a worker group at the end of the list": (
        {"workerGroups": [{"name": "gpu", "cpus": 5, "gpus": 1}, {"name": "spot", "cpus": 5, "gpus": 1}]},
        NOTHING,
    ),
    "the image, CPUs, memory, environment, volumes of pods": ({"image": {"tag": "0.2.0-cuda"}}, CLUSTER),
    "`settings.router.port`, `settings.replicas.drain_timeout_s`, `stuck_timeout_s`": (
        settings(replicas={"drain_timeout_s": 90}),
        CLUSTER,
    ),
    "the content of a Secret": ({}, NOTHING),
    "`restartedAt`": ({"restartedAt": "2026-11-26"}, CLUSTER),
    "the name of a Secret": ({"auth": {"existingSecret": "other"}}, CLUSTER),
    "service, Ingress, HTTPRoute, network policy, monitors": (
        {"service": {"annotations": {"a": "b"}}, "networkPolicy": {"clients": []}},
        NOTHING,
    ),
}


@pytest.mark.parametrize(("changed", "expected"), CHANGES.values(), ids=CHANGES)
def test_an_upgrade_restarts(changed: Values, expected: str) -> None:
    assert restarts(merged(BEFORE, changed)) == expected


def test_the_documentation_has_the_same_table() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    rows = dict(
        line.strip("| ").split(" | ")[:2] for line in page.splitlines() if line.startswith("| ") and " | " in line
    )
    for change, (_, expected) in CHANGES.items():
        assert rows[change] == expected, change
