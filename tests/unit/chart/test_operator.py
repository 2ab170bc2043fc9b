"""What an API server and KubeRay's operator make of a release: the fields on which they were seen to stumble."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.chart.rendering import (
    EXAMPLES,
    Object,
    Values,
    example,
    merged,
    of_kind,
    one,
    pod_templates,
    refusal,
    render,
    render_files,
    validate,
)
from xloom.router.routes import ROUTES, Access

GPU_EXAMPLES = [example(file) for file in EXAMPLES if "gpus: " in file.read_text(encoding="utf-8")]
RELEASES = [{}, *map(example, EXAMPLES)]


def groups(values: Values) -> list[Object]:
    """The worker groups of a release."""
    found: list[Object] = one(render(values), "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return found


@pytest.mark.parametrize("values", RELEASES, ids=["defaults", *(file.stem for file in EXAMPLES)])
def test_each_group_owns_the_field_that_the_operator_fills_in(values: Values) -> None:
    """Else Helm 4 conflicts with the operator over the list of groups, which server-side apply takes as one value."""
    assert [each["scaleStrategy"] for each in groups(values)] == [{}] * len(groups(values))


def test_the_account_that_empties_redis_outlives_the_release() -> None:
    """Helm deletes accounts before KubeRay's clean-up pod has run under the head's, and the RayService then hangs."""

    def kept(values: Values) -> set[str]:
        accounts = of_kind(render(values), "ServiceAccount")
        policies = {each["metadata"]["name"]: each["metadata"].get("annotations", {}) for each in accounts}
        return {name for name, found in policies.items() if found.get("helm.sh/resource-policy") == "keep"}

    redis = {"gcsFaultTolerance": {"enabled": True, "redisAddress": "redis:6379"}}
    assert kept(redis) == {"xloom-head"}
    assert kept(redis | {"serviceAccount": {"annotations": {"a": "b"}, "headName": "mine"}}) == {"mine"}
    assert kept({}) == set()


class UniqueKeys(yaml.SafeLoader):
    """YAML in which no mapping has a key twice, of which a server or Helm would keep one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(set(keys)) == len(keys), keys
        return super().construct_mapping(node, deep)


def duplicates(objects: list[Object]) -> list[str]:
    """What the API server refuses for being there twice: variables, volumes and mounts of pods."""
    found = []
    for pod in pod_templates(objects).values():
        containers = [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]
        lists = [[each["name"] for each in pod["spec"].get("volumes", [])], [each["name"] for each in containers]]
        for each in containers:
            lists.append([entry["name"] for entry in each.get("env", [])])
            lists.append([entry["mountPath"] for entry in each.get("volumeMounts", [])])
        found += [name for names in lists for name in set(names) if names.count(name) > 1]
    return found


def test_what_the_user_names_takes_the_place_of_the_charts_own() -> None:
    claim = {"name": "cache", "persistentVolumeClaim": {"claimName": "mine"}}
    mount = {"name": "fast", "mountPath": "/tmp"}
    objects = render(
        {
            "extraEnv": [{"name": "HF_HOME", "value": "/models"}, {"name": "NCCL_DEBUG", "value": "WARN"}],
            "extraVolumes": [claim, {"name": "fast", "emptyDir": {"medium": "Memory"}}],
            "extraVolumeMounts": [mount],
            "workerGroups": [{"name": "cpu", "cpus": 4, "extraEnv": [{"name": "NCCL_DEBUG", "value": "INFO"}]}],
        }
    )
    assert duplicates(objects) == []
    pods = pod_templates(objects)
    for name, debug in {"head": "WARN", "worker cpu": "INFO"}.items():
        spec = pods[name]["spec"]
        env = {each["name"]: each.get("value") for each in spec["containers"][0]["env"]}
        assert (env["HF_HOME"], env["NCCL_DEBUG"], env["HOME"]) == ("/models", debug, "/home/xloom")
        assert claim in spec["volumes"]
        assert mount in spec["containers"][0]["volumeMounts"]


def test_the_users_labels_take_the_place_of_the_charts_own() -> None:
    labels = {"app.kubernetes.io/version": "mine", "helm.sh/chart": "none", "team": "serving"}
    others = {"team": "watch", "app.kubernetes.io/version": "other"}
    monitored = {"enabled": True, "labels": others}
    values = {"commonLabels": labels, "metrics": {"podMonitor": monitored, "prometheusRule": monitored}}
    for file, text in render_files(values).items():
        if not file.endswith("NOTES.txt"):
            list(yaml.load_all(text, Loader=UniqueKeys))
    objects = render(values)
    assert one(objects, "RayService")["metadata"]["labels"].items() >= labels.items()
    assert one(objects, "PodMonitor")["metadata"]["labels"].items() >= others.items()


@pytest.mark.parametrize("key", ["app.kubernetes.io/name", "app.kubernetes.io/component", "ray.io/cluster"])
def test_labels_that_pods_are_selected_by_are_not_the_users(key: str) -> None:
    said = f"services, policies and monitors select pods by the label {key}. Choose another label."
    assert said in refusal({"commonLabels": {key: "mine"}})
    assert said in refusal({"head": {"podLabels": {key: "mine"}}})
    assert said in refusal({"workerGroups": [{"name": "cpu", "cpus": 4, "podLabels": {key: "mine"}}]})


NAME = "app.kubernetes.io/name"
MONITORED: Values = {
    "metrics": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}},
    "networkPolicy": {"clients": [{"podSelector": {}}]},
    "podDisruptionBudget": {"enabled": True},
    "settings": {"router": {"replicas": 2}},
    "workerGroups": [{"name": "cpu", "cpus": 4, "maxReplicas": 3}],
}


def selectors(node: Any) -> list[Object]:
    """Every label selector in an object, but the operator's."""
    if isinstance(node, list):
        return [found for each in node for found in selectors(each)]
    if not isinstance(node, dict):
        return []
    found = [found for each in node.values() for found in selectors(each)]
    return [*found, node] if {"matchLabels", "matchExpressions"} & set(node) else found


def test_pods_leave_the_name_that_the_operators_services_select_by() -> None:
    """`…-head-svc` selects `app.kubernetes.io/name: kuberay`, which KubeRay labels pods with that have none."""
    objects = render(MONITORED)
    for name, pod in pod_templates(objects).items():
        assert (NAME in pod["metadata"]["labels"]) is (name == "xloom-test")  # the hook's pod is not KubeRay's
        assert pod["metadata"]["labels"]["app.kubernetes.io/instance"] == "xloom"
    found = [each for each in selectors(objects) if "app.kubernetes.io/instance" in each.get("matchLabels", {})]
    assert len(found) >= 8
    assert not [each for each in found if NAME in each["matchLabels"]]
    assert all("app.kubernetes.io/component" in str(each) or "ray.io/group" in str(each) for each in found)


def test_ids_that_are_null_are_left_to_the_cluster() -> None:
    """OpenShift refuses pods that choose their user, and 0 is root."""
    unset: Values = {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}}
    for pod in pod_templates(render(unset)).values():
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(pod["spec"]["securityContext"])
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    given = pod_templates(render({"podSecurityContext": {"runAsUser": 1000660000}}))["head"]["spec"]["securityContext"]
    assert (given["runAsUser"], given["fsGroup"]) == (1000660000, 1000)


QUANTITIES: dict[str, Values] = {
    "head.memory": {"head": {"memory": "8 Gi"}},
    "head.cpus": {"head": {"cpus": "2 cores"}},
    "a group's memory": {"workerGroups": [{"name": "cpu", "cpus": 4, "memory": "8 Gi"}]},
    "a group's resources": {"workerGroups": [{"name": "a", "cpus": 4, "resources": {"requests": {"rdma/hca": "one"}}}]},
    "the cache": {"persistence": {"cache": {"size": "100GiB"}}},
    "the store": {"persistence": {"store": {"size": "20 Gi"}}},
    "the autoscaler": {"autoscaler": {"resources": {"requests": {"cpu": "200 m"}}}},
    "shared memory": {"head": {"shm": "1 Gi"}},
}


@pytest.mark.parametrize("values", QUANTITIES.values(), ids=QUANTITIES)
def test_quantities_that_the_server_refuses_are_refused_as_the_chart_renders(values: Values) -> None:
    assert "does not match pattern" in refusal(values)


@pytest.mark.parametrize("field", ["ports", "type", "selector"])
def test_fields_of_the_service_that_would_be_ignored_are_refused(field: str) -> None:
    assert f"service.spec.{field} is not taken" in refusal({"service": {"spec": {field: "x"}}})


def test_the_spread_counts_one_clusters_pods() -> None:
    """During an upgrade the old cluster's pods would push the new one's elsewhere."""
    [group] = groups({})
    [constraint] = group["template"]["spec"]["topologySpreadConstraints"]
    assert constraint["matchLabelKeys"] == ["ray.io/cluster"]


def test_all_exporters_of_the_head_are_scraped() -> None:
    objects = render(MONITORED)
    endpoints = {each["port"] for each in one(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]}
    ports = {
        each["name"]: each["containerPort"] for each in pod_templates(objects)["head"]["spec"]["containers"][0]["ports"]
    }
    assert {name: ports[name] for name in endpoints} == {"metrics": 8080, "as-metrics": 44217, "dash-metrics": 44227}
    open_ports = [
        port["port"] for rule in one(objects, "NetworkPolicy")["spec"]["ingress"] for port in rule.get("ports", [])
    ]
    assert {8080, 44217, 44227} <= set(open_ports)


def test_pods_take_containers_resources_and_a_scheduler_of_the_users() -> None:
    own = {
        "initContainers": [{"name": "fetch", "image": "fetch"}],
        "sidecars": [{"name": "logs", "image": "logs", "securityContext": {"runAsUser": 7}}],
        "resources": {"requests": {"cpu": "7500m", "rdma/hca": 1}, "limits": {"rdma/hca": 1}},
        "schedulerName": "volcano",
    }
    objects = render({"head": own, "workerGroups": [{"name": "cpu", "cpus": 8, "memory": "16Gi", **own}]})
    validate(objects)
    for name in ("head", "worker cpu"):
        spec = pod_templates(objects)[name]["spec"]
        assert spec["schedulerName"] == "volcano"
        assert [each["name"] for each in spec["initContainers"]] == ["fetch"]
        assert spec["initContainers"][0]["securityContext"]["allowPrivilegeEscalation"] is False
        ray, logs = spec["containers"][:2]
        assert (ray["name"], logs["name"]) == (f"ray-{name.split()[0]}", "logs")  # Ray's is the first, says KubeRay
        assert logs["securityContext"]["runAsUser"] == 7
        assert (ray["resources"]["requests"]["cpu"], ray["resources"]["limits"]["rdma/hca"]) == ("7500m", 1)


def test_an_upgrade_may_move_traffic_in_steps() -> None:
    values: Values = {"upgradeStrategy": "NewClusterWithIncrementalUpgrade"}
    assert "Set incrementalUpgrade.gatewayClassName." in refusal(values)
    values["incrementalUpgrade"] = {"gatewayClassName": "istio", "stepSizePercent": 20}
    assert "needs Ray's autoscaler" in refusal(values | {"autoscaler": {"enabled": False}})
    objects = render(values)
    validate(objects)
    options = {"gatewayClassName": "istio", "stepSizePercent": 20, "intervalSeconds": 30, "maxSurgePercent": 100}
    assert one(objects, "RayService")["spec"]["upgradeStrategy"] == {
        "type": values["upgradeStrategy"],
        "clusterUpgradeOptions": options,
    }


GPU_AND_ROUTERS: Values = {
    "settings": {"router": {"replicas": 2}, "replicas": {"gpus": 1, "min": 1, "max": 4}},
    "workerGroups": [
        {"name": "routers", "cpus": 1, "memory": "4Gi", "routers": True},
        {"name": "gpu", "cpus": 8, "gpus": 1},
    ],
    "podDisruptionBudget": {"enabled": True},
}


def router_settings(objects: list[Object]) -> Object:
    """What the settings of a release say of its routers."""
    config = yaml.safe_load(one(objects, "RayService")["spec"]["serveConfigV2"])
    found: Object = config["applications"][0]["args"]["router"]
    return found


def test_two_routers_are_on_two_nodes_in_a_group_of_their_own() -> None:
    """Ray would pack them into one pod, whose loss then takes the whole endpoint away."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _get_custom_resources

    objects = render(GPU_AND_ROUTERS)
    assert router_settings(objects) == {
        "host": "0.0.0.0",
        "replicas": 2,
        "max_per_node": 1,
        "resources": {"xloom_router": 0.01},
    }
    routers, gpu = groups(GPU_AND_ROUTERS)
    given = _get_custom_resources({}, routers["rayStartParams"], "routers")  # as Ray's autoscaler reads it, 2.60
    assert given == {"xloom_router": 1}
    [shown] = shlex.split(routers["rayStartParams"]["resources"])  # as the shell does that starts Ray
    assert json.loads(shown) == given
    assert "resources" not in gpu["rayStartParams"]
    assert [(each["minReplicas"], each["maxReplicas"]) for each in (routers, gpu)] == [(2, 2), (1, 4)]
    # One router needs no other node, or none could be started while it drains.
    assert router_settings(render({})) == {"host": "0.0.0.0"}


def test_the_disruption_budget_counts_routers() -> None:
    """Pods are ready where a router runs: with one pod of two routers, a budget of one would block every drain."""
    budget = one(render(GPU_AND_ROUTERS), "PodDisruptionBudget")["spec"]
    assert budget["minAvailable"] == 1
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"  # engines' pods without a router are never ready
    three = merged(GPU_AND_ROUTERS, {"settings": {"router": {"replicas": 3}}})
    assert one(render(three), "PodDisruptionBudget")["spec"]["minAvailable"] == 2


@pytest.mark.parametrize("values", GPU_EXAMPLES, ids=lambda values: values["settings"]["model"]["served_name"])
def test_the_examples_with_gpus_survive_the_loss_of_a_node(values: Values) -> None:
    assert router_settings(render(values))["replicas"] == 2
    found = {each["groupName"]: each for each in groups(values)}
    assert found["routers"]["minReplicas"] == 2
    [container] = found["routers"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    volumes = found["routers"]["template"]["spec"]["volumes"]
    assert not [each for each in volumes if "ephemeral" in each]  # they fetch a tokeniser, no weights


def test_a_plain_clusters_storage_is_enough() -> None:
    """GKE and EKS have no class that gives ReadWriteMany until somebody adds one, and a claim for it stays Pending."""
    objects = render({})
    claims = of_kind(objects, "PersistentVolumeClaim")
    assert [each["metadata"]["name"] for each in claims] == ["xloom-store"]
    for values in RELEASES:
        for pod in pod_templates(render(values)).values():
            modes = [
                mode
                for volume in pod["spec"].get("volumes", [])
                if "ephemeral" in volume
                for mode in volume["ephemeral"]["volumeClaimTemplate"]["spec"]["accessModes"]
            ]
            assert set(modes) <= {"ReadWriteOnce"}
        for group in groups(values):
            [container] = group["template"]["spec"]["containers"]
            assert re.fullmatch(r"\d+Gi", container["resources"]["requests"]["ephemeral-storage"])


def conflict(there: Object, key: str, volume: Values) -> str:
    """What is said of a claim that is there: the chart's own template, asked through an object in text."""
    text = (
        '{{ include "xloom.claimConflict" (dict "there" (%s | fromJson) "volume" (%s | fromJson) "key" "%s") | quote }}'
    )
    given = text % (f"`{json.dumps(there)}`", f"`{json.dumps(volume)}`", key)
    extra = f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: said}}\ndata: {{said: {given}}}\n"
    said: str = one(render({"extraObjects": [extra]}), "ConfigMap")["data"]["said"]
    return said


def test_a_claim_from_before_that_can_not_become_the_one_wanted_is_said() -> None:
    """Kept claims broke a reinstall with another class or a smaller size, with the server's words for it."""
    spec = {"storageClassName": "standard", "resources": {"requests": {"storage": "20Gi"}}}
    there = {"metadata": {"name": "xloom-store"}, "spec": spec}
    assert conflict(there, "store", {"storageClass": "", "size": "20Gi"}) == ""
    assert conflict(there, "store", {"storageClass": "standard", "size": "1Ti"}) == ""
    said = conflict(there, "store", {"storageClass": "fast", "size": "20Gi"})
    assert said.startswith('The claim xloom-store, kept from before, has the storage class "standard", not "fast".')
    assert "Set persistence.store.storageClass=standard" in said
    said = conflict(there, "store", {"storageClass": "", "size": "20000Mi"})
    assert "has 20Gi, and no claim shrinks to 20000Mi. Set persistence.store.size=20Gi" in said
    [notes] = [text for file, text in render_files({}).items() if file.endswith("NOTES.txt")]
    assert "keep their storage class and at least their size: xloom-store." in notes


def test_the_first_example_needs_nothing_but_kuberay_and_a_secret() -> None:
    [cpu] = [example(file) for file in EXAMPLES if file.stem == "values-cpu"]
    objects = render(cpu)
    assert of_kind(objects, "PersistentVolumeClaim") == []
    pods = pod_templates(objects).values()
    assert not [volume for pod in pods for volume in pod["spec"].get("volumes", []) if "ephemeral" in volume]
    named = {name for pod in pods for name in secrets_of(pod)}
    assert named == {"xloom-keys"}


def secrets_of(node: Any) -> set[str]:
    """The Secrets an object refers to."""
    if isinstance(node, list):
        return {name for each in node for name in secrets_of(each)}
    if not isinstance(node, dict):
        return set()
    own = {node["secretKeyRef"]["name"]} if "secretKeyRef" in node else set()
    return own | {name for each in node.values() for name in secrets_of(each)}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_presume_nothing_that_they_do_not_say(file: Path) -> None:
    """No CRDs but KubeRay's, no Redis, no class, no bucket; each Secret in the lines above the values."""
    objects = render(example(file))
    assert {each["apiVersion"] for each in objects} <= {"v1", "ray.io/v1", "networking.k8s.io/v1", "policy/v1"}
    text = file.read_text(encoding="utf-8")
    above = text[: text.index("settings:")]
    for name in secrets_of(objects):
        assert name in above
    values = text[text.index("settings:") :]
    assert not re.search(r"s3://|gs://|redis|^ +storageClass:", values, re.MULTILINE)


def test_a_stall_of_a_router_leaves_its_pod_in_the_endpoint() -> None:
    """KubeRay's own probe, which it adds where there is none, takes a pod out after one answer over 2 s."""
    objects = render({"settings": {"replicas": {"stuck_timeout_s": 22}}})
    pods = pod_templates(objects)
    for name in ("head", "worker cpu"):
        ray = pods[name]["spec"]["containers"][0]
        assert ray["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert ray["livenessProbe"]["failureThreshold"] == 120
    probe = pods["worker cpu"]["spec"]["containers"][0]["readinessProbe"]
    ports = {each["name"] for each in pods["worker cpu"]["spec"]["containers"][0]["ports"]}
    assert probe["httpGet"] == {"path": "/-/healthz", "port": "serve"}
    assert "serve" in ports
    assert probe["timeoutSeconds"] >= 5
    assert probe["failureThreshold"] * probe["periodSeconds"] > 22  # then the watchdog has started it anew
    own = pod_templates(render({"probes": {"failureThreshold": 7}}))["worker cpu"]["spec"]["containers"][0]
    assert own["readinessProbe"]["failureThreshold"] == 7


def test_ray_answers_where_the_probes_ask() -> None:
    from ray.dashboard import http_server_agent
    from ray.dashboard.modules.reporter import healthz_agent

    assert '"/api/healthz"' in inspect.getsource(healthz_agent)
    assert '"/api/healthz"' in inspect.getsource(http_server_agent)  # without the cluster's token
    assert ROUTES["/-/healthz"] is Access.OPEN


def test_the_operator_reaches_the_head_however_it_was_installed() -> None:
    """KubeRay's Helm chart and its kustomize bases give its pod different names, and the same component."""
    policy = one(render({}), "NetworkPolicy")["spec"]
    peers = [rule["from"] for rule in policy["ingress"] if {"protocol": "TCP", "port": 8265} in rule.get("ports", [])]
    assert peers == [
        [
            {
                "podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}},
                "namespaceSelector": {},
            }
        ]
    ]


def test_the_autoscaler_reaches_the_api_server_where_egress_is_narrowed() -> None:
    https = {"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}], "ports": [{"protocol": "TCP", "port": 443}]}
    narrowed: Values = {"networkPolicy": {"egress": [https]}}

    def heads(values: Values) -> list[Object]:
        policies = of_kind(render(values), "NetworkPolicy")
        return [each["spec"] for each in policies if each["metadata"]["name"] == "xloom-head"]

    [head] = heads(narrowed)
    labels = pod_templates(render(narrowed))["head"]["metadata"]["labels"]
    assert head["podSelector"]["matchLabels"].items() <= labels.items()
    assert head["policyTypes"] == ["Egress"]
    [rule] = head["egress"]
    assert rule == {"ports": [{"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 6443}]}
    server = [{"ipBlock": {"cidr": "203.0.113.7/32"}}]
    [head] = heads({"networkPolicy": {"egress": [https], "apiServer": server}})
    assert head["egress"][0]["to"] == server
    assert heads({}) == []
    assert heads(narrowed | {"autoscaler": {"enabled": False}}) == []


HOSTS: Values = {"ingress": {"enabled": True, "hosts": [{"host": "a.example.com"}, {"host": "b.example.com"}]}}
ROUTE: Values = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}}


def test_figures_stay_off_public_routes() -> None:
    """`/metrics` is open to whoever reaches the router, for scrapers inside the cluster."""
    assert ROUTES["/metrics"] is Access.OPEN
    rules = one(render(HOSTS), "Ingress")["spec"]["rules"]
    assert [[path["path"] for path in rule["http"]["paths"]] for rule in rules] == [["/v1", "/ready"]] * 2
    [rule] = one(render(ROUTE), "HTTPRoute")["spec"]["rules"]
    assert [each["path"]["value"] for each in rule["matches"]] == ["/v1", "/ready"]
    for path in ("/", "/metrics", "/metrics/"):
        assert "would let /metrics, which is answered without a key, out to everyone" in refusal(
            {"publicPaths": [path]}
        )
        host = {"host": "a.example.com", "paths": [path]}
        assert "ingress.hosts, a.example.com: paths" in refusal({"ingress": {"enabled": True, "hosts": [host]}})


def test_load_balancers_ask_a_router_whether_it_is_ready() -> None:
    """At `/` a router answers 401 or 404, by which every pod is unhealthy."""
    drain: Values = {"settings": {"replicas": {"drain_timeout_s": 90}}}
    aws = one(render(merged(HOSTS | drain, {"loadBalancer": {"provider": "aws"}})), "Ingress")["metadata"][
        "annotations"
    ]
    assert aws["alb.ingress.kubernetes.io/healthcheck-path"] == "/ready"
    assert aws["alb.ingress.kubernetes.io/target-group-attributes"] == "deregistration_delay.timeout_seconds=90"
    own = {"ingress": {"annotations": {"alb.ingress.kubernetes.io/healthcheck-path": "/health"}}}
    annotations = one(render(merged(merged(HOSTS, own), {"loadBalancer": {"provider": "aws"}})), "Ingress")["metadata"]
    assert annotations["annotations"]["alb.ingress.kubernetes.io/healthcheck-path"] == "/health"

    gke: Values = {"loadBalancer": {"provider": "gke"}, **drain}
    objects = render(ROUTE | gke)
    target = {"group": "", "kind": "Service", "name": "xloom-serve-svc"}
    check, policy = one(objects, "HealthCheckPolicy")["spec"], one(objects, "GCPBackendPolicy")["spec"]
    assert (check["targetRef"], policy["targetRef"]) == (target, target)
    assert check["default"]["config"]["httpHealthCheck"]["requestPath"] == "/ready"
    assert policy["default"] == {"timeoutSec": 3600, "connectionDraining": {"drainingTimeoutSec": 90}}
    objects = render(HOSTS | gke)
    assert one(objects, "BackendConfig")["spec"]["healthCheck"]["requestPath"] == "/ready"
    service = one(objects, "RayService")["spec"]["serveService"]["metadata"]["annotations"]
    assert json.loads(service["cloud.google.com/backend-config"]) == {"default": "xloom"}
    for values in (HOSTS, ROUTE):
        assert not [
            each for each in render(values) if "gke" in each["apiVersion"] or "cloud.google" in each["apiVersion"]
        ]
