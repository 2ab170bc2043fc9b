"""What an API server and KubeRay's operator make of a release: the fields on which they were seen to stumble."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.chart.rendering import EXAMPLES, Object, Values, example, of_kind, one, pod_templates, render

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
    """`…-head-svc` selects `app.kubernetes.io/name: kuberay`, which KubeRay labels pods with that have no such label."""
    objects = render(MONITORED)
    for name, pod in pod_templates(objects).items():
        assert (NAME in pod["metadata"]["labels"]) is (name == "xloom-test")  # the hook's pod is not KubeRay's
        assert pod["metadata"]["labels"]["app.kubernetes.io/instance"] == "xloom"
    found = [each for each in selectors(objects) if "app.kubernetes.io/instance" in each.get("matchLabels", {})]
    assert len(found) >= 8
    assert not [each for each in found if NAME in each["matchLabels"]]
    assert all("app.kubernetes.io/component" in str(each) or "ray.io/group" in str(each) for each in found)
