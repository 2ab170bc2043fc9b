"""New limits of worker groups and a Ray cluster that runs: KubeRay 1.7 gives them to new clusters alone."""

from __future__ import annotations

import json
import re

from tests.pages import blocks
from tests.unit.chart.rendering import Object, Values, chart, merged, one, render

GROUPS: Values = {
    "settings": {"replicas": {"min": 1, "max": 2, "gpus": 1, "cpus": 4}, "router": {"replicas": 2}},
    "workerGroups": [{"name": "routers", "cpus": 1, "routers": True}, {"name": "gpu", "cpus": 5, "gpus": 1}],
}


def cluster(values: Values) -> Object:
    """The Ray cluster that a release makes."""
    return {"spec": one(render(values), "RayService")["spec"]["rayClusterConfig"]}


def notes(values: Values, *, upgrade: bool) -> str:
    """What Helm says at the end."""
    files = chart().render(values, name="xloom", namespace="serving", is_upgrade=upgrade, is_install=not upgrade)
    [text] = [text for file, text in files.items() if file.endswith("NOTES.txt")]
    return str(text)


def patch(values: Values) -> list[Object]:
    """The patch that the notes of an upgrade have."""
    [found] = re.findall(r"patch raycluster --type=json -p '(.*)'", notes(values, upgrade=True))
    operations: list[Object] = json.loads(found)
    return operations


def applied(operations: list[Object], groups: list[Object]) -> bool:
    """Whether the API server takes the patch, and what it then makes of the groups."""
    for each in operations:
        _, _, _, index, field = each["path"].split("/")
        if each["op"] == "add":
            groups[int(index)][field] = each["value"]
        elif groups[int(index)][field] != each["value"]:
            return False
    return True


def test_the_patch_gives_a_running_cluster_the_limits_of_the_values() -> None:
    more = merged(GROUPS, {"settings": {"replicas": {"min": 2, "max": 6}, "router": {"replicas": 3}}})
    running = cluster(GROUPS)["spec"]["workerGroupSpecs"]
    wanted = cluster(more)["spec"]["workerGroupSpecs"]
    limits = [[each["minReplicas"], each["maxReplicas"]] for each in wanted]
    assert limits == [[3, 3], [2, 6]]
    assert applied(patch(more), running)
    assert [[each["minReplicas"], each["maxReplicas"]] for each in running] == limits


def test_the_patch_does_nothing_to_a_cluster_of_other_groups() -> None:
    other = GROUPS | {"workerGroups": GROUPS["workerGroups"][::-1]}
    assert not applied(patch(other), cluster(GROUPS)["spec"]["workerGroupSpecs"])


def test_the_page_and_the_notes_have_the_command() -> None:
    [words] = [words for block in blocks("kubernetes.md") for words in block.commands if "patch" in words]
    assert words[:5] == ["kubectl", "-n", "serving", "patch", "raycluster"]
    [operation] = json.loads(words[words.index("-p") + 1])
    assert operation in [each | {"value": 4} for each in patch(GROUPS)]
    shown = notes(GROUPS, upgrade=True)
    assert "get rayservice xloom -o jsonpath='{.status.activeServiceStatus.rayClusterName}')" in shown
    assert words[-1] in shown
    assert "patch raycluster" not in notes(GROUPS, upgrade=False)  # an installation has none that runs
