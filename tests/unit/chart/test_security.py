"""What the chart's pods may do, who may reach them, and where secrets are."""

from __future__ import annotations

import pytest
import yaml

from tests.unit.chart.rendering import EXAMPLES, Object, Values, example, of_kind, one, pod_templates, render
from tests.unit.chart.test_render import grid

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
ALL: list[Values] = [{}, *map(example, EXAMPLES), *grid()[:40]]
SECRETS = {
    "XLOOM_API_KEY": ("xloom-keys", "api-key"),
    "XLOOM_ADMIN_KEY": ("xloom-keys", "admin-key"),
    "HF_TOKEN": ("hub", "token"),
}


def restricted(pod: Object) -> list[str]:
    """What of the restricted Pod Security Standard (Kubernetes 1.37) a pod does not meet."""
    spec = pod["spec"]
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    found += [f"volume {each['name']}" for each in spec.get("volumes", []) if not (set(each) - {"name"}) <= VOLUMES]
    overall = spec["securityContext"]
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        own = container.get("securityContext", {})
        wrong = {
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is not False,
            "privileged": bool(own.get("privileged")),
            "runAsNonRoot": own.get("runAsNonRoot", overall.get("runAsNonRoot")) is not True,
            "runAsUser": own.get("runAsUser", overall.get("runAsUser")) == 0,
            "capabilities": own.get("capabilities") != {"drop": ["ALL"]},
            "seccompProfile": own.get("seccompProfile", overall.get("seccompProfile")) != {"type": "RuntimeDefault"},
            "hostPort": any("hostPort" in port for port in container.get("ports", [])),
            "procMount": "procMount" in own,
        }
        found += [f"{container['name']}: {name}" for name, is_wrong in wrong.items() if is_wrong]
    return found


def test_every_pod_meets_the_restricted_standard() -> None:
    for values in ALL:
        pods = pod_templates(render(values))
        assert len(pods) >= 3  # the head, a worker, the test hook
        assert {name: restricted(pod) for name, pod in pods.items()} == {name: [] for name in pods}


def test_the_check_of_the_standard_sees_what_breaks_it() -> None:
    pod = pod_templates(render({}))["head"]
    container = pod["spec"]["containers"][0]
    container["securityContext"] = {"allowPrivilegeEscalation": True, "capabilities": {"add": ["SYS_PTRACE"]}}
    pod["spec"]["volumes"].append({"name": "disk", "hostPath": {"path": "/"}})
    broken = restricted(pod)
    assert broken == ["volume disk", "ray-head: allowPrivilegeEscalation", "ray-head: capabilities"]


def test_no_container_can_write_to_its_image() -> None:
    for values in ALL:
        for pod in pod_templates(render(values)).values():
            for container in pod["spec"]["containers"]:
                assert container["securityContext"]["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize("name", ["head", "worker cpu"])
def test_ray_finds_the_folders_it_writes_to(name: str) -> None:
    container = pod_templates(render({}))[name]["spec"]["containers"][0]
    assert {"/tmp", "/home/xloom", "/dev/shm", "/var/cache/xloom", "/var/lib/xloom"} == {
        each["mountPath"] for each in container["volumeMounts"]
    }


def test_only_the_autoscalers_container_has_a_token() -> None:
    for values in ALL:
        objects = render(values)
        for account in of_kind(objects, "ServiceAccount"):
            assert account["automountServiceAccountToken"] is False
        for pod in pod_templates(objects).values():
            assert pod["spec"]["automountServiceAccountToken"] is False
            tokens = {each["name"] for each in pod["spec"].get("volumes", []) if "projected" in each}
            holders = {
                container["name"]
                for container in pod["spec"]["containers"]
                for mount in container.get("volumeMounts", [])
                if mount["name"] in tokens
            }
            assert holders <= {"autoscaler"}


def test_the_chart_grants_no_rights() -> None:
    """KubeRay makes the one role there is, the autoscaler's, for the head's account; workers have another."""
    for values in ALL:
        objects = render(values)
        assert not [each for each in objects if "rbac" in each["apiVersion"]]
        pods = pod_templates(objects)
        head = pods["head"]["spec"]["serviceAccountName"]
        if not values.get("serviceAccount"):
            others = {pod["spec"]["serviceAccountName"] for name, pod in pods.items() if name != "head"}
            assert head not in others


def test_keys_come_from_secrets_and_are_written_nowhere() -> None:
    objects = render({"hub": {"existingSecret": "hub"}})
    pods = pod_templates(objects)
    for name in ("head", "worker cpu"):
        env = {each["name"]: each for each in pods[name]["spec"]["containers"][0]["env"]}
        for variable, (secret, key) in SECRETS.items():
            reference = env[variable]["valueFrom"]["secretKeyRef"]
            assert (reference["name"], reference["key"]) == (secret, key)
    test = {each["name"] for each in pods["xloom-test"]["spec"]["containers"][0]["env"]}
    assert test & set(SECRETS) == {"XLOOM_API_KEY"}


def test_no_secret_is_rendered_and_none_is_in_a_config_map_or_the_serve_config() -> None:
    for values in ALL:
        objects = render(values)
        assert of_kind(objects, "Secret") == []
        own = [
            each for each in of_kind(objects, "ConfigMap") if not each["metadata"]["name"].endswith(("mine", "-more"))
        ]
        texts = [yaml.safe_dump(each) for each in own] + [one(objects, "RayService")["spec"]["serveConfigV2"]]
        for text in texts:
            assert "api_key" not in text
            assert "admin_key" not in text
            assert "secret" not in text.lower()


def test_redis_password_comes_from_a_secret() -> None:
    values = {"gcsFaultTolerance": {"enabled": True, "redisAddress": "redis:6379", "existingSecret": "redis"}}
    options = one(render(values), "RayService")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert options["redisPassword"] == {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}


def test_only_the_endpoint_is_open_to_others() -> None:
    policy = one(render({}), "NetworkPolicy")["spec"]
    inside, endpoint, operator = policy["ingress"]
    own = {"app.kubernetes.io/instance": "xloom"}
    assert policy["podSelector"]["matchLabels"] == own
    assert inside["from"][0]["podSelector"]["matchLabels"] == own
    assert len(inside["from"]) == 1
    assert endpoint == {"ports": [{"protocol": "TCP", "port": 8000}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert [peer["podSelector"]["matchLabels"] for peer in operator["from"]] == [
        {"app.kubernetes.io/component": "kuberay-operator"}
    ]
    assert policy["policyTypes"] == ["Ingress"]


def test_clients_narrow_the_endpoint_and_the_test_still_reaches_it() -> None:
    client = {"namespaceSelector": {"matchLabels": {"team": "apps"}}}
    objects = render({"networkPolicy": {"clients": [client], "operatorNamespace": "kuberay"}})
    _, endpoint, operator = one(objects, "NetworkPolicy")["spec"]["ingress"]
    assert endpoint["from"][0] == client
    labels = endpoint["from"][1]["podSelector"]["matchLabels"]
    assert labels.items() <= one(objects, "Pod")["metadata"]["labels"].items()
    assert operator["from"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kuberay"}


def test_the_network_policy_covers_every_ray_pod_but_not_the_test() -> None:
    objects = render({})
    selector = one(objects, "NetworkPolicy")["spec"]["podSelector"]
    [expression] = selector["matchExpressions"]
    for name, pod in pod_templates(objects).items():
        labels = pod["metadata"]["labels"]
        assert selector["matchLabels"].items() <= labels.items()
        assert (labels[expression["key"]] in expression["values"]) is (name != "xloom-test")


def test_ray_asks_for_a_token_unless_told_otherwise() -> None:
    def cluster(mode: str) -> Object:
        found: Object = one(render({"rayAuth": {"mode": mode}}), "RayService")["spec"]["rayClusterConfig"]
        return found

    assert cluster("token")["authOptions"] == {"mode": "token"}
    off = cluster("disabled")
    assert "authOptions" not in off
    env = off["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "RAY_AUTH_MODE", "value": "disabled"} in env
