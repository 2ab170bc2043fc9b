"""What an API server and KubeRay's operator make of a release: the fields on which they were seen to stumble."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.chart.rendering import EXAMPLES, Object, Values, example, of_kind, one, render

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
