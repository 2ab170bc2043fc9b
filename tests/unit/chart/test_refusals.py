"""Values that can't work are refused as the chart renders, with what to do."""

from __future__ import annotations

import pytest

from tests.unit.chart.rendering import Values, refusal, render

TWO_ROUTERS: Values = {
    "settings": {"router": {"replicas": 2}},
    "workerGroups": [{"name": "cpu", "cpus": 4, "maxReplicas": 3}],
}
GPU = {"name": "gpu", "cpus": 8, "gpus": 2, "maxReplicas": 2}

REFUSED: dict[str, tuple[Values, str]] = {
    "key in the settings": (
        {"settings": {"router": {"api_key": "sk-1"}}},
        "settings.router.api_key would be written in clear into the RayService. Leave it out, put it in a Secret, and "
        "name that in auth.existingSecret (entry: auth.apiKey).",
    ),
    "admin key in the settings": (
        {"settings": {"router": {"admin_key": "sk-1"}}},
        "settings.router.admin_key would be written in clear",
    ),
    "key among the front end's options": (
        {"settings": {"router": {"front_end_args": {"api_key": ["sk-1"]}}}},
        "settings.router.front_end_args.api_key would be written in clear",
    ),
    "open to all by accident": ({"auth": {"existingSecret": ""}}, "or set auth.allowAnonymous=true"),
    "key in the environment": (
        {"extraEnv": [{"name": "XLOOM_API_KEY", "value": "sk-1"}]},
        "XLOOM_API_KEY must not be set in extraEnv. Use auth.existingSecret.",
    ),
    "token in a group's environment": (
        {"workerGroups": [{"name": "cpu", "cpus": 4, "extraEnv": [{"name": "HF_TOKEN", "value": "hf"}]}]},
        "HF_TOKEN must not be set in extraEnv. Use hub.existingSecret.",
    ),
    "Redis in the environment": (
        {"extraEnv": [{"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}]},
        "Use gcsFaultTolerance.redisAddress.",
    ),
    "two ways in": (
        {
            "ingress": {"enabled": True, "hosts": [{"host": "a"}]},
            "httpRoute": {"enabled": True, "parentRefs": [{"name": "a"}]},
        },
        "ingress.enabled and httpRoute.enabled exclude each other. Turn one of them off.",
    ),
    "ingress without a host": ({"ingress": {"enabled": True}}, "Set ingress.hosts"),
    "route without a gateway": ({"httpRoute": {"enabled": True}}, "Set httpRoute.parentRefs"),
    "endpoint on loopback": ({"settings": {"router": {"host": "127.0.0.1"}}}, "the chart sets 0.0.0.0"),
    "privileged port": ({"settings": {"router": {"port": 80}}}, "Use 8000, or another above 1023."),
    "Ray's port": ({"settings": {"router": {"port": 8265}}}, "8265 is one of Ray's own ports"),
    "port of an exporter": ({"settings": {"router": {"port": 44227}}}, "44227 is one of Ray's own ports"),
    "number as the text that makes a new cluster": ({"restartedAt": 1764172800}, "restartedAt"),
    "relative model": (
        {"settings": {"model": {"source": "./model"}}},
        'settings.model.source: the source "./model" is relative to your machine. Use a hub id',
    ),
    "relative adapter": (
        {"settings": {"adapters": [{"name": "code", "source": "./code"}]}},
        'settings.adapters, code: the source "./code" is relative to your machine.',
    ),
    "killed while it drains": (
        {"terminationGracePeriodSeconds": 60},
        "terminationGracePeriodSeconds (60) must be above settings.replicas.drain_timeout_s + 15 (75)",
    ),
    "cluster gone before its pods": (
        {"terminationGracePeriodSeconds": 300, "rayClusterDeletionDelaySeconds": 300},
        "rayClusterDeletionDelaySeconds (300) must be above terminationGracePeriodSeconds (300)",
    ),
    "more GPUs than the engine is given": (
        {"workerGroups": [GPU], "settings": {"replicas": {"gpus": 1}, "engine": {"tensor_parallel_size": 2}}},
        "tensor_parallel_size is 2 but settings.replicas.gpus is 1. Set settings.replicas.gpus to 2.",
    ),
    "no GPU given": (
        {"workerGroups": [GPU], "settings": {"engine": {"tensor_parallel_size": 2}}},
        "tensor_parallel_size is 2 but settings.replicas.gpus is 0: the engine would see no GPU.",
    ),
    "more GPUs than a pod has": (
        {"workerGroups": [GPU], "settings": {"replicas": {"gpus": 4}, "engine": {"tensor_parallel_size": 4}}},
        "tensor_parallel_size is 4 but no worker group has that many GPUs in a pod (most: 2). Raise workerGroups",
    ),
    "GPUs on CPU pods": (
        {"settings": {"replicas": {"gpus": 1}}},
        "settings.replicas.gpus is 1 but no worker group has that many GPUs",
    ),
    "more CPUs than a pod has": (
        {"settings": {"replicas": {"cpus": 16}}},
        "settings.replicas.cpus is 16 but no worker group has that many CPUs in a pod (most: 3).",
    ),
    "more replicas than room": (
        {"settings": {"replicas": {"max": 4}}, "workerGroups": [{"name": "cpu", "cpus": 3, "maxReplicas": 1}]},
        "settings.replicas.max is 4 but the worker groups can hold 1 replicas of 2 CPUs and 0 GPUs. Raise "
        "workerGroups[].maxReplicas, or lower settings.replicas.max.",
    ),
    "more replicas than standing pods": (
        {
            "autoscaler": {"enabled": False},
            "workerGroups": [GPU | {"minReplicas": 1}],
            "settings": {"replicas": {"max": 3, "gpus": 1}},
        },
        "can hold 2 replicas of 2 CPUs and 1 GPUs. Raise workerGroups[].minReplicas (autoscaler.enabled is false)",
    ),
    "no room for the router": (
        {"settings": {"replicas": {"cpus": 3}}},
        "1 replicas of 3 CPUs and 1 routers of 0.1 need 3.1 CPUs, and the worker groups have 3. Raise",
    ),
    "as many routers kept as there are": (
        {"podDisruptionBudget": {"enabled": True, "minAvailable": 2}, **TWO_ROUTERS},
        "2 can't do both with minAvailable 2. Raise settings.router.replicas, or lower minAvailable.",
    ),
    "more routers than pods": (
        {"settings": {"router": {"replicas": 3}}, "workerGroups": [{"name": "cpu", "cpus": 4, "maxReplicas": 2}]},
        "settings.router.replicas is 3, one for a pod, and there are 2 pods at most for routers.",
    ),
    "more routers than pods for them": (
        {
            "settings": {"router": {"replicas": 2}, "replicas": {"gpus": 1}},
            "workerGroups": [GPU, {"name": "routers", "cpus": 1, "routers": True, "maxReplicas": 1}],
        },
        "settings.router.replicas is 2, one for a pod, and there are 1 pods at most for routers.",
    ),
    "only groups for routers": (
        {"workerGroups": [{"name": "routers", "cpus": 1, "routers": True}]},
        "Every worker group has routers=true, so there is none for engines.",
    ),
    "routers on GPUs": ({"workerGroups": [GPU, GPU | {"name": "b", "routers": True}]}, "b: routers need no GPU"),
    "engines in the routers' pods": (
        {"workerGroups": [{"name": "a", "cpus": 4}, {"name": "b", "cpus": 2, "routers": True}]},
        "workerGroups, b: engines of 2 CPUs would be placed beside the routers.",
    ),
    "no worker group": ({"workerGroups": []}, "Add an entry to workerGroups."),
    "limits the wrong way round": (
        {"workerGroups": [{"name": "cpu", "cpus": 4, "minReplicas": 3, "maxReplicas": 2}]},
        "workerGroups, cpu: minReplicas (3) is above maxReplicas (2).",
    ),
    "two groups of a name": ({"workerGroups": [GPU, GPU]}, 'Two worker groups are called "gpu".'),
    "idle time of the old autoscaler": (
        {"autoscaler": {"version": "v1"}, "workerGroups": [{"name": "cpu", "cpus": 4, "idleTimeoutSeconds": 9}]},
        "idleTimeoutSeconds needs autoscaler.version=v2.",
    ),
    "one node's volume for all": (
        {"persistence": {"cache": {"type": "claim", "accessModes": ["ReadWriteOnce"]}}},
        "its accessModes must have ReadWriteMany. Set that with a storage class that can, or "
        "persistence.cache.type=ephemeral or none.",
    ),
    "store beside its volume": (
        {"settings": {"store": {"path": "/data"}}},
        "settings.store.path is /data, which is not on the store's volume.",
    ),
    "fault tolerance without Redis": ({"gcsFaultTolerance": {"enabled": True}}, "Set gcsFaultTolerance.redisAddress"),
    "budget that blocks every drain": (
        {"podDisruptionBudget": {"enabled": True}},
        "keeps at least one router, and lets another go: 1 can't do both with minAvailable 0. Raise",
    ),
    "accounts without names": ({"serviceAccount": {"create": False}}, "Name the accounts that exist"),
    "alerts without figures": (
        {"metrics": {"prometheusRule": {"enabled": True}}},
        "metrics.prometheusRule needs the figures of the PodMonitor. Set metrics.podMonitor.enabled.",
    ),
    "name Kubernetes refuses": ({"fullnameOverride": "7b"}, "must start with a lower-case letter"),
}

# By values.schema.json, whose words are the validator's.
OUTSIDE_THE_SCHEMA: dict[str, tuple[Values, str]] = {
    "unknown value": ({"workerGroup": []}, "workerGroup"),
    "unknown value below": ({"image": {"registry": "a"}}, "registry"),
    "unknown key of a group": ({"workerGroups": [{"name": "cpu", "gpu": 1}]}, "gpu"),
    "group without a name": ({"workerGroups": [{"cpus": 4}]}, "name"),
    "unknown setting": ({"settings": {"engine": {"max_len": 1}}}, "max_len"),
    "setting of another type": ({"settings": {"replicas": {"min": "one"}}}, "min"),
    "setting out of range": ({"settings": {"engine": {"paged_attention": {"gpu_memory_fraction": 2}}}}, "fraction"),
    "unknown method": ({"settings": {"isq": {"method": "magic"}}}, "isq"),
    "adapter without a source": ({"settings": {"adapters": [{"name": "a"}]}}, "source"),
    "unknown kind of cache": ({"persistence": {"cache": {"type": "hostPath"}}}, "type"),
    "odd size of shared memory": ({"head": {"shm": "1G"}}, "shm"),
    "number as start option": ({"head": {"rayStartParams": {"object-store-memory": 1}}}, "object-store-memory"),
}


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED)
def test_values_that_cannot_work_are_refused_with_the_cure(values: Values, message: str) -> None:
    assert message in refusal(values)


@pytest.mark.parametrize(("values", "word"), OUTSIDE_THE_SCHEMA.values(), ids=OUTSIDE_THE_SCHEMA)
def test_values_outside_the_schema_are_refused(values: Values, word: str) -> None:
    message = refusal(values)
    assert "schema" in message
    assert word in message


def test_what_is_just_enough_is_taken() -> None:
    render({"terminationGracePeriodSeconds": 76, "rayClusterDeletionDelaySeconds": 77})
    render({"settings": {"replicas": {"cpus": 2.9}}})
    render({"workerGroups": [GPU], "settings": {"replicas": {"max": 7, "gpus": 0.5}}})
