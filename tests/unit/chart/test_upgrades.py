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


def restarts(after: Values, before: Values = BEFORE) -> str:
    """What an upgrade restarts."""
    old, new = (one(render(values), "RayService") for values in (before, after))
    kept = len(old["spec"]["rayClusterConfig"]["workerGroupSpecs"])
    trimmed = copy.deepcopy(new)
    del trimmed["spec"]["rayClusterConfig"]["workerGroupSpecs"][kept:]
    if cluster_hash(old) != cluster_hash(trimmed):
        return CLUSTER
    return NOTHING if application_version(old) == application_version(new) else IN_PLACE


def settings(**changed: Any) -> Values:
    return {"settings": changed}


GPU: Values = {"name": "gpu", "cpus": 5, "gpus": 1}
VOLUME = {"name": "models", "persistentVolumeClaim": {"claimName": "models"}}

# As docs/kubernetes.md names them; each of the changes by itself.
CHANGES: dict[str, tuple[list[Values], str]] = {
    "an adapter in `settings.adapters`": (
        [settings(adapters=[{"name": "code", "source": "org/code"}, {"name": "law", "source": "org/law"}])],
        IN_PLACE,
    ),
    "`settings.replicas.max`": ([settings(replicas={"max": 4})], IN_PLACE),
    "the model, or any other of `settings`": (
        [
            settings(model={"source": "org/other"}),
            settings(engine={"max_model_len": 4096}),
            settings(router={"limits": {"keep_alive_s": 700}}),
            settings(replicas={"min": 2}),
        ],
        IN_PLACE,
    ),
    "`workerGroups[].minReplicas`, `maxReplicas`": (
        [{"workerGroups": [GPU | {"minReplicas": 2, "maxReplicas": 6}]}],
        NOTHING,
    ),
    "a worker group at the end of the list": ([{"workerGroups": [GPU, GPU | {"name": "spot"}]}], NOTHING),
    "the image, CPUs, memory, environment, volumes of pods": (
        [
            {"image": {"tag": "0.2.0-cuda"}},
            {"workerGroups": [GPU | {"cpus": 6}]},
            {"head": {"memory": "16Gi"}},
            {"extraEnv": [{"name": "NCCL_DEBUG", "value": "WARN"}]},
            {"extraVolumes": [VOLUME], "extraVolumeMounts": [{"name": "models", "mountPath": "/models"}]},
        ],
        CLUSTER,
    ),
    "`settings.router.port`, `settings.replicas.drain_timeout_s`, `stuck_timeout_s`": (
        [
            settings(router={"port": 9000}),
            settings(replicas={"drain_timeout_s": 90}),
            settings(replicas={"stuck_timeout_s": 30}),
        ],
        CLUSTER,
    ),
    "the content of a Secret": ([{}], NOTHING),
    "`restartedAt`": ([{"restartedAt": "2026-11-26"}], CLUSTER),
    "the name of a Secret": ([{"auth": {"existingSecret": "other"}}], CLUSTER),
    "service, Ingress, HTTPRoute, network policy, monitors": (
        [
            {"service": {"annotations": {"a": "b"}}},
            {"networkPolicy": {"clients": []}},
            {"ingress": {"enabled": True, "hosts": [{"host": "a.example.com"}]}},
            {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}},
            {"metrics": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}},
        ],
        NOTHING,
    ),
}
CASES = [(row, changed, expected) for row, (changes, expected) in CHANGES.items() for changed in changes]


@pytest.mark.parametrize(("changed", "expected"), [each[1:] for each in CASES], ids=[each[0] for each in CASES])
def test_an_upgrade_restarts(changed: Values, expected: str) -> None:
    before, after = render(BEFORE), render(merged(BEFORE, changed))
    assert (before != after) is bool(changed)  # else nothing would be compared
    assert restarts(merged(BEFORE, changed)) == expected


def test_a_group_at_another_place_or_one_that_goes_makes_a_new_cluster() -> None:
    two = merged(BEFORE, {"workerGroups": [GPU, GPU | {"name": "spot"}]})
    assert restarts(merged(BEFORE, {"workerGroups": [GPU | {"name": "spot"}, GPU]})) == CLUSTER
    assert restarts(BEFORE, two) == CLUSTER


def test_the_documentation_has_the_same_table() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    rows = dict(
        line.strip("| ").split(" | ")[:2] for line in page.splitlines() if line.startswith("| ") and " | " in line
    )
    for change, (_, expected) in CHANGES.items():
        assert rows[change] == expected, change
