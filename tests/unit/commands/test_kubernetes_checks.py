"""What `xloom doctor --kubernetes` says of clusters, through a stand-in for kubectl: there is no cluster here."""

from __future__ import annotations

import copy
import gzip
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from xloom.commands.checks import Finding
from xloom.commands.doctor import diagnose_cluster
from xloom.commands.kubernetes_checks import CHART_FIELDS, check_version, examine_cluster, missing_fields
from xloom.protocol import XloomError

PROGRAM = """#!/usr/bin/env python3
import json, sys
cluster = json.load(open({file!r}))
words = [word for word in sys.argv[1:] if not word.startswith("--request")]
key = " ".join(words[: words.index("-o")]).replace(" -n serving", "")
found = cluster.get(key)
if found is None:
    sys.exit('Error from server (NotFound): "%s" not found' % key)
if isinstance(found, str):
    sys.exit(found)
print(json.dumps(found))
"""
OPERATOR = "get deployments --all-namespaces -l app.kubernetes.io/component=kuberay-operator"
GPU_NODE = {"status": {"allocatable": {"nvidia.com/gpu": "4"}}}
DEFAULT_CLASS = {
    "metadata": {"name": "standard", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}
}
FIELDS = {part: {"properties": {field: {}}} for part, field in CHART_FIELDS.items()}
SCHEMA: dict[str, Any] = {"properties": {"spec": {"properties": {"rayClusterConfig": {"properties": FIELDS}}}}}
READY = {
    "status": {"availableReplicas": 1},
    "spec": {"template": {"spec": {"containers": [{"image": "kuberay/operator:v1.7.0"}]}}},
}
CLUSTER: dict[str, Any] = {
    "version": {"serverVersion": {"major": "1", "minor": "33+"}},
    "get crd rayservices.ray.io": {
        "spec": {"versions": [{"name": "v1", "served": True, "schema": {"openAPIV3Schema": SCHEMA}}]}
    },
    OPERATOR: {"items": [READY]},
    "get secret xloom-keys": {"data": {"api-key": "", "admin-key": ""}},
    "get storageclass": {"items": [DEFAULT_CLASS]},
    "get nodes": {"items": [GPU_NODE, {"status": {}}]},
}


class Cluster:
    """A cluster as kubectl would show it; `without` and `shows` change it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "cluster.json"
        self._values = folder / "values.yaml"
        self.objects = copy.deepcopy(CLUSTER)
        program = folder / "kubectl"
        program.write_text(PROGRAM.format(file=str(self._file)))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def findings(self, **values: Any) -> dict[str, Finding]:
        self._file.write_text(json.dumps(self.objects))
        self._values.write_text(yaml.safe_dump(values))
        return {each.check: each for each in examine_cluster("serving", self._values)}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return Cluster(tmp_path)


def test_a_cluster_with_all_the_chart_needs_passes(cluster: Cluster) -> None:
    found = cluster.findings(workerGroups=[{"name": "gpu", "gpus": 4}])
    assert {each.level for each in found.values()} == {"ok"}
    assert set(found) == {"kubernetes", "kuberay", "secret xloom-keys", "storage", "group gpu"}
    assert found["group gpu"].detail == "1 nodes have 4 nvidia.com/gpu"


def test_what_is_missing_is_named_with_the_command_that_mends_it(cluster: Cluster) -> None:
    for key in ("get crd rayservices.ray.io", "get secret xloom-keys"):
        del cluster.objects[key]
    cluster.objects["get storageclass"] = {"items": [{"metadata": {"name": "fast"}}]}
    found = cluster.findings(hub={"existingSecret": "xloom-hub"}, workerGroups=[{"name": "gpu", "gpus": 8}])
    assert found["kuberay"].level == "fail"
    assert "kubectl apply --server-side" in found["kuberay"].cure
    cure = "kubectl -n serving create secret generic xloom-hub --from-literal=token=..."
    assert (found["secret xloom-hub"].level, found["secret xloom-hub"].cure) == ("fail", cure)
    assert "has no default storage class" in found["storage"].detail
    assert found["storage"].cure.endswith("to one of: fast")
    assert found["group gpu"].level == "warn"  # a pool may start at none


def test_an_operator_that_does_not_run_and_a_crd_that_helm_left_behind_are_told_apart(cluster: Cluster) -> None:
    cluster.objects[OPERATOR] = {"items": []}
    assert cluster.findings()["kuberay"].detail == "its operator does not run"
    cluster.objects["get crd rayservices.ray.io"] = {"spec": {"versions": [{"name": "v1", "served": True}]}}
    assert "older than 1.7" in cluster.findings()["kuberay"].detail


def test_the_crd_of_the_version_that_the_chart_is_for_has_all_it_sets() -> None:
    file = Path(__file__).parents[1] / "chart" / "schemas" / "rayservices.ray.io-1.7.0.json.gz"
    assert missing_fields(json.loads(gzip.decompress(file.read_bytes()))) == []
    older = copy.deepcopy(SCHEMA)
    del older["properties"]["spec"]["properties"]["rayClusterConfig"]["properties"]["authOptions"]["properties"][
        "secretName"
    ]
    assert missing_fields(older) == ["authOptions.secretName"]


def test_one_secret_may_hold_the_entries_of_several_parts(cluster: Cluster) -> None:
    shared = {"existingSecret": "xloom-keys"}
    parts: dict[str, Any] = {"hub": shared, "rayAuth": shared}
    parts["gcsFaultTolerance"] = {"enabled": True, "usernameKey": "user", **shared}
    assert cluster.findings(**parts)["secret xloom-keys"].detail == "it lacks token"
    entries = ("api-key", "token", "password", "user", "auth_token")
    cluster.objects["get secret xloom-keys"] = {"data": dict.fromkeys(entries, "")}
    assert cluster.findings(**parts)["secret xloom-keys"].detail == f"has {', '.join(entries)}"
    del cluster.objects["get secret xloom-keys"]["data"]["user"]
    found = cluster.findings(**parts)["secret xloom-keys"]
    assert found.detail == "it lacks user"
    assert "--from-literal=user=..." in found.cure


def test_a_secret_without_the_entry_that_pods_read_is_noticed(cluster: Cluster) -> None:
    cluster.objects["get secret xloom-keys"] = {"data": {"key": ""}}
    assert cluster.findings()["secret xloom-keys"].detail == "it lacks api-key"


def test_volumes_and_kinds_are_looked_for_where_the_values_ask_for_them(cluster: Cluster) -> None:
    cluster.objects["get storageclass"] = {"items": []}
    none = {"cache": {"type": "none"}, "store": {"enabled": False}}
    assert cluster.findings(persistence=none)["storage"].level == "ok"
    found = cluster.findings(metrics={"podMonitor": {"enabled": True}}, httpRoute={"enabled": True})
    assert found["podmonitors"].level == found["httproutes"].level == "fail"
    cluster.objects["get crd podmonitors.monitoring.coreos.com"] = {}
    assert cluster.findings(metrics={"podMonitor": {"enabled": True}})["podmonitors"].level == "ok"


def test_the_chart_can_not_be_installed_where_something_fails(cluster: Cluster, tmp_path: Path) -> None:
    cluster.findings()
    console = Console(record=True, width=200)
    assert diagnose_cluster(None, "serving", console, as_json=False) == 0
    assert "The chart can be installed in the namespace serving." in console.export_text()
    del cluster.objects["get secret xloom-keys"]
    cluster.findings()
    assert diagnose_cluster(None, "serving", console, as_json=True) == 1
    assert '"installs": false' in console.export_text()


def test_what_this_user_may_not_look_at_is_a_warning_and_the_rest_is_looked_at(cluster: Cluster) -> None:
    said = 'storageclasses.storage.k8s.io is forbidden: User "dev" cannot list resource "storageclasses"'
    cluster.objects["get storageclass"] = f"Error from server (Forbidden): {said}"
    found = cluster.findings(workerGroups=[{"name": "gpu", "gpus": 4}])
    assert (found["storage"].level, found["storage"].detail) == ("warn", said)
    assert {each.level for name, each in found.items() if name != "storage"} == {"ok"}
    assert "group gpu" in found


def test_no_answer_is_an_error_and_no_finding(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.objects["version"] = "The connection to the server localhost:8080 was refused"
    with pytest.raises(XloomError, match="was refused") as caught:
        cluster.findings()
    assert caught.value.code == "no_cluster"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(XloomError, match="kubectl is not installed here"):
        examine_cluster("serving", None)


def test_the_oldest_kubernetes_is_the_charts() -> None:
    chart = yaml.safe_load((Path(__file__).parents[3] / "helm" / "xloom" / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == ">=1.29.0-0"
    assert (check_version((1, 29)).level, check_version((1, 28)).level) == ("ok", "fail")
