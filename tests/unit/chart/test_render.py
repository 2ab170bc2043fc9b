"""The chart lints, renders, and makes only objects that Kubernetes and KubeRay take."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.unit.chart.rendering import (
    CHART,
    EXAMPLES,
    SNAPSHOTS,
    Object,
    Values,
    crd_validator,
    example,
    helm_python,
    merged,
    of_kind,
    one,
    render,
    render_files,
    snapshots,
    validate,
)
from xloom.commands.build import build_config
from xloom.settings import parse_settings

# One value of each line in every combination would be thousands: each is tried alone, and all pairs of lines together.
OPTIONS: list[list[Values]] = [
    [{"autoscaler": {"enabled": False}}, {"autoscaler": {"version": "v1"}}, {"autoscaler": {"resources": {}}}],
    [
        {"gcsFaultTolerance": {"enabled": True, "redisAddress": "redis:6379"}},
        {
            "gcsFaultTolerance": {
                "enabled": True,
                "redisAddress": "rediss://redis:6380",
                "existingSecret": "redis",
                "usernameKey": "user",
            }
        },
    ],
    [
        {"persistence": {"cache": {"storageClass": "fast"}}},
        {"persistence": {"cache": {"type": "claim", "storageClass": "shared"}}},
        {"persistence": {"cache": {"type": "none"}}},
        {"persistence": {"cache": {"type": "claim", "existingClaim": "mine"}, "store": {"existingClaim": "mine-too"}}},
        {"persistence": {"store": {"enabled": False}}},
        {"persistence": {"store": {"accessModes": ["ReadWriteMany"], "storageClass": "shared"}}},
    ],
    [
        {"ingress": {"enabled": True, "className": "nginx", "hosts": [{"host": "a.b"}], "tls": [{"hosts": ["a.b"]}]}},
        {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["a.example.com"]}},
        {
            "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]},
            "loadBalancer": {"provider": "gke"},
        },
        {"service": {"type": "LoadBalancer", "annotations": {"a": "b"}, "spec": {"externalTrafficPolicy": "Local"}}},
    ],
    [
        {"networkPolicy": {"enabled": False}},
        {
            "networkPolicy": {
                "clients": [{"namespaceSelector": {"matchLabels": {"team": "apps"}}}],
                "scrapers": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
                "operatorNamespace": "kuberay",
                "egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"port": 443}]}],
            }
        },
    ],
    [
        {"auth": {"existingSecret": "", "allowAnonymous": True}},
        {"hub": {"existingSecret": "hub", "offline": True}},
        {"rayAuth": {"mode": "disabled"}},
        {"rayAuth": {"existingSecret": "ray-token"}},
    ],
    [
        {
            "metrics": {
                "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
                "serviceMonitor": {"enabled": True},
                "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
            }
        },
        {"metrics": {"serviceMonitor": {"enabled": True}}},
        {"metrics": {"podMonitor": {"enabled": True}}},
    ],
    [
        {
            "extraEnv": [{"name": "AWS_REGION", "value": "eu-west-1"}],
            "extraEnvFrom": [{"secretRef": {"name": "aws"}}],
            "extraVolumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
            "extraVolumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
            "extraObjects": [
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mine"}, "data": {"a": "b"}},
                "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: {{ include \"xloom.fullname\" . }}-more\n",
            ],
            "imagePullSecrets": [{"name": "registry"}],
            "commonLabels": {"team": "serving"},
            "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/xloom"}},
        },
        {"serviceAccount": {"create": False, "headName": "mine", "workerName": "mine"}},
        {"nameOverride": "model", "topologySpreadConstraints": [], "upgradeStrategy": "None"},
        {"terminationGracePeriodSeconds": 100, "rayClusterDeletionDelaySeconds": 500},
    ],
    [
        {
            "head": {
                "podAnnotations": {"a": "b"},
                "podLabels": {"c": "d"},
                "nodeSelector": {"pool": "system"},
                "tolerations": [{"operator": "Exists"}],
                "affinity": {"nodeAffinity": {}},
                "priorityClassName": "high",
                "shm": "",
                "rayStartParams": {"object-store-memory": "1000000000"},
            }
        },
        {
            "workerGroups": [
                {"name": "small", "cpus": 8, "gpus": 1, "minReplicas": 3, "maxReplicas": 4, "podLabels": {"a": "b"}},
                {
                    "name": "large",
                    "cpus": 16,
                    "gpus": 2,
                    "gpuResource": "amd.com/gpu",
                    "minReplicas": 1,
                    "maxReplicas": 2,
                    "extraEnv": [{"name": "NCCL_DEBUG", "value": "WARN"}],
                    "podAnnotations": {"a": "b"},
                    "nodeSelector": {"pool": "gpu"},
                    "affinity": {"nodeAffinity": {}},
                    "runtimeClassName": "nvidia",
                    "priorityClassName": "high",
                    "rayStartParams": {"object-store-memory": "1000000000"},
                },
            ],
            "settings": {"replicas": {"max": 5, "gpus": 1}, "isq": {"method": "gptq"}, "router": {"replicas": 3}},
            "podDisruptionBudget": {"enabled": True, "minAvailable": 2},
        },
    ],
]  # fmt: skip


def grid() -> list[Values]:
    """Each option alone, and each pair of options of different lines."""
    pairs = itertools.combinations(OPTIONS, 2)
    both = [merged(one, other) for left, right in pairs for one, other in itertools.product(left, right)]
    return [option for line in OPTIONS for option in line] + both


@pytest.mark.parametrize("values", [{}, *map(example, EXAMPLES)], ids=["defaults", *(file.stem for file in EXAMPLES)])
def test_examples_lint_render_and_validate(values: Values) -> None:
    report = helm_python.lint(CHART, values, strict=True)
    assert report["errors"] == []
    assert [each["error"] for each in report["messages"]] == ["icon is recommended"]
    validate(render(values))


def test_every_pair_of_options_makes_valid_objects() -> None:
    combinations = grid()
    assert len(combinations) > 200
    for values in combinations:
        objects = render(values)
        validate(objects)
        names = [(each["kind"], each["metadata"]["name"]) for each in objects]
        assert len(names) == len(set(names)), values


def test_the_schema_of_ray_objects_refuses_unknown_fields() -> None:
    service = one(render({}), "RayService")
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["cpus"] = 1
    [error] = crd_validator().iter_errors(service)
    assert "'cpus' was unexpected" in error.message


def test_releases_are_those_on_record() -> None:
    """After a change that is meant: python -m tests.unit.chart.rendering."""
    made = snapshots()
    assert {file.name for file in SNAPSHOTS.iterdir()} == set(made)
    for name, text in made.items():
        assert text == (SNAPSHOTS / name).read_text(encoding="utf-8"), name


def test_every_option_lints() -> None:
    for values in [option for line in OPTIONS for option in line]:
        assert helm_python.lint(CHART, values, strict=True)["errors"] == [], values


def serve_config(objects: list[Object]) -> Object:
    config: Object = yaml.safe_load(one(objects, "RayService")["spec"]["serveConfigV2"])
    return config


JSON_LOGS: Values = {"settings": {"observability": {"logs": {"format": "json", "level": "WARNING"}}}}


@pytest.mark.parametrize(
    "values",
    [{}, JSON_LOGS, *map(example, EXAMPLES)],
    ids=["defaults", "JSON logs", *(file.stem for file in EXAMPLES)],
)
def test_the_serve_config_is_what_xloom_build_would_write(values: Values) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = serve_config(render(values))
    settings = parse_settings(config["applications"][0]["args"], with_keys=False)
    assert config == build_config(settings)
    ServeDeploySchema.model_validate(config)


def test_large_numbers_and_odd_texts_reach_the_settings_unchanged() -> None:
    settings = {
        "engine": {"max_model_len": 4000000, "extra_args": {"a": "yes", "b": "1e3", "c": [1, 2.5], "d": None}},
        "model": {"served_name": "123"},
    }
    args = serve_config(render({"settings": settings}))["applications"][0]["args"]
    assert args["engine"] == settings["engine"]
    assert args["model"] == settings["model"]


def test_pods_have_time_to_drain_and_clusters_to_end() -> None:
    objects = render({"settings": {"replicas": {"drain_timeout_s": 99.5}}})
    spec = one(objects, "RayService")["spec"]
    [group] = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] == 130
    assert spec["rayClusterDeletionDelaySeconds"] == 160
    assert "+ 100))" in group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2]


def test_worker_groups_become_ray_groups_with_their_limits() -> None:
    objects = render(example(CHART / "examples" / "values-llama-70b-tp4.yaml"))
    group, _ = one(objects, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"], group["idleTimeoutSeconds"]) == (1, 2, 1800)
    assert group["rayStartParams"] == {
        "num-cpus": "18",
        "num-gpus": "4",
        "object-store-memory": str(16 * 2**30),  # half of shm
    }
    [container] = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "256Gi", "nvidia.com/gpu": "4"}
    assert container["image"].endswith("-cuda")


@pytest.mark.parametrize(
    ("replicas", "autoscaler", "limits"),
    [
        ({"min": 1, "max": 1}, True, [(1, 1), (0, 1)]),
        ({"min": 3, "max": 7}, True, [(2, 4), (0, 7)]),
        ({"min": 0, "max": 2}, True, [(0, 1), (0, 2)]),
        ({"min": 1, "max": 3}, False, [(2, 2), (3, 3)]),
    ],
)
def test_groups_without_limits_follow_the_replicas(
    replicas: Values, autoscaler: bool, limits: list[tuple[int, int]]
) -> None:
    groups = [{"name": "two", "cpus": 9, "gpus": 2}, {"name": "one", "cpus": 5, "gpus": 1}]
    settings = {"replicas": replicas | {"cpus": 4, "gpus": 1}}
    values = {"settings": settings, "workerGroups": groups, "autoscaler": {"enabled": autoscaler}}
    made = one(render(values), "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert [(each["minReplicas"], each["maxReplicas"]) for each in made] == limits


def test_the_head_takes_no_replica() -> None:
    cluster = one(render({}), "RayService")["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_start_options_of_ones_own_win_but_not_over_the_groups_size() -> None:
    own = {"object-store-memory": "100000000", "num-cpus": "64"}
    [group] = one(
        render({"workerGroups": [{"name": "cpu", "cpus": 3, "shm": "1Gi", "rayStartParams": own}]}), "RayService"
    )["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["rayStartParams"] == {"object-store-memory": "100000000", "num-cpus": "3", "num-gpus": "0"}


def test_each_ray_container_runs_engines_at_normal_priority() -> None:
    cluster = one(render({}), "RayService")["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        env = {each["name"]: each.get("value") for each in group["template"]["spec"]["containers"][0]["env"]}
        assert env["RAY_worker_niceness"] == "0"
        assert env["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "0"


def test_an_upgrades_head_goes_where_a_volume_of_one_node_is() -> None:
    def affinity(values: Values) -> Object | None:
        cluster = one(render(values), "RayService")["spec"]["rayClusterConfig"]
        found: Object | None = cluster["headGroupSpec"]["template"]["spec"].get("affinity")
        return found

    assert affinity({}) is not None
    assert affinity({"persistence": {"store": {"accessModes": ["ReadWriteMany"]}}}) is None
    assert affinity({"head": {"affinity": {"nodeAffinity": {}}}}) == {"nodeAffinity": {}}


def test_claims_stay_when_the_release_goes() -> None:
    claims = of_kind(render({"persistence": {"cache": {"type": "claim"}}}), "PersistentVolumeClaim")
    assert [each["metadata"]["name"] for each in claims] == ["xloom-cache", "xloom-store"]
    assert all(each["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep" for each in claims)


def test_dashboards_become_a_config_map_the_sidecar_finds(tmp_path: Path) -> None:
    folder = tmp_path / "without" / "xloom"
    shutil.copytree(CHART, folder, ignore=shutil.ignore_patterns("dashboards"))
    assert of_kind(render({"metrics": {"dashboards": {"enabled": True}}}, folder=folder), "ConfigMap") == []
    folder = Path(shutil.copytree(folder, tmp_path / "with" / "xloom"))
    board = {"title": "Serving", "templating": {}, "legend": "{{ replica }}"}
    (folder / "files" / "dashboards").mkdir(exist_ok=True)
    (folder / "files" / "dashboards" / "serving.json").write_text(json.dumps(board), encoding="utf-8")
    objects = render({"metrics": {"dashboards": {"enabled": True}}}, folder=folder)
    found = one(objects, "ConfigMap")
    assert json.loads(found["data"]["serving.json"]) == board
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    validate(objects)


def test_the_notes_name_the_next_commands() -> None:
    [notes] = [text for file, text in render_files({}).items() if file.endswith("NOTES.txt")]
    for command in ("kubectl -n serving wait rayservice/xloom", "kubectl -n serving port-forward", "curl http://"):
        assert command in notes
    assert "get secret xloom-keys -o jsonpath='{.data.api-key}'" in notes


def test_the_parts_meet_at_the_same_port_and_names() -> None:
    values = {
        "settings": {"router": {"port": 9000}},
        "ingress": {"enabled": True, "hosts": [{"host": "a.example.com"}]},
    }
    objects = render(values, name="blue")
    service = one(objects, "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    assert service["metadata"]["name"] == "blue-xloom"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        ports = {each["name"]: each["containerPort"] for each in group["template"]["spec"]["containers"][0]["ports"]}
        assert ports["serve"] == 9000
        assert group["template"]["spec"]["serviceAccountName"] in {
            each["metadata"]["name"] for each in of_kind(objects, "ServiceAccount")
        }
    for path in one(objects, "Ingress")["spec"]["rules"][0]["http"]["paths"]:
        assert path["backend"]["service"] == {"name": "blue-xloom-serve-svc", "port": {"number": 9000}}
    env = {each["name"]: each.get("value") for each in one(objects, "Pod")["spec"]["containers"][0]["env"]}
    assert env["URL"] == "http://blue-xloom-serve-svc:9000"


def test_long_release_names_leave_room_for_kuberays() -> None:
    assert len(one(render({}, name="a" * 53), "RayService")["metadata"]["name"]) <= 47
