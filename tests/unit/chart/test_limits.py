"""New limits of worker groups and a Ray cluster that runs: KubeRay 1.7 gives them to new clusters alone."""

from __future__ import annotations

import json

from tests.pages import blocks
from tests.unit.chart.rendering import ROOT, Object, Values, merged, one, render, render_files

GROUPS: Values = {
    "settings": {"replicas": {"min": 1, "max": 2, "gpus": 1, "cpus": 4}, "router": {"replicas": 2}},
    "workerGroups": [{"name": "routers", "cpus": 1, "routers": True}, {"name": "gpu", "cpus": 5, "gpus": 1}],
}


def cluster(values: Values) -> Object:
    """The Ray cluster that a release makes."""
    return {"spec": one(render(values), "RayService")["spec"]["rayClusterConfig"]}


def patch(there: Object, values: Values) -> list[Object]:
    """What the notes of an upgrade say: the chart's own template, asked through an object in text."""
    given = f'{{{{ include "xloom.limitsPatch" (dict "root" $ "there" (`{json.dumps(there)}` | fromJson)) | quote }}}}'
    extra = f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: said}}\ndata: {{said: {given}}}\n"
    said = one(render(merged(values, {"extraObjects": [extra]})), "ConfigMap")["data"]["said"]
    return json.loads(said) if said else []


def test_a_cluster_that_has_the_limits_needs_no_patch() -> None:
    assert patch(cluster(GROUPS), GROUPS) == []
    assert patch({"spec": {}}, GROUPS) == []


def test_more_replicas_come_with_the_patch_that_lets_their_pods_come() -> None:
    more = merged(GROUPS, {"settings": {"replicas": {"min": 2, "max": 6}, "router": {"replicas": 3}}})
    found = patch(cluster(GROUPS), more)
    assert found == [
        {"op": "add", "path": "/spec/workerGroupSpecs/0/minReplicas", "value": 3},
        {"op": "add", "path": "/spec/workerGroupSpecs/0/maxReplicas", "value": 3},
        {"op": "add", "path": "/spec/workerGroupSpecs/1/minReplicas", "value": 2},
        {"op": "add", "path": "/spec/workerGroupSpecs/1/maxReplicas", "value": 6},
    ]
    after = cluster(GROUPS)
    for each in found:  # as the API server applies it
        _, _, _, index, field = each["path"].split("/")
        after["spec"]["workerGroupSpecs"][int(index)][field] = each["value"]
    assert patch(after, more) == []


def test_a_group_that_is_new_or_elsewhere_is_left_to_kuberay() -> None:
    groups = [*GROUPS["workerGroups"], {"name": "spot", "cpus": 5, "gpus": 1}]
    assert patch(cluster(GROUPS), GROUPS | {"workerGroups": groups}) == []
    assert patch(cluster(GROUPS), GROUPS | {"workerGroups": groups[::-1][1:]}) == []


def test_the_page_and_the_notes_have_the_command() -> None:
    [words] = [words for block in blocks("kubernetes.md") for words in block.commands if "patch" in words]
    assert words[:5] == ["kubectl", "-n", "serving", "patch", "raycluster"]
    [operation] = json.loads(words[words.index("-p") + 1])
    assert operation == {"op": "add", "path": "/spec/workerGroupSpecs/0/maxReplicas", "value": 4}
    notes = (ROOT / "helm" / "xloom" / "templates" / "NOTES.txt").read_text(encoding="utf-8")
    assert "patch raycluster {{ $name }} --type=json -p '{{ . }}'" in notes
    [shown] = [text for file, text in render_files(GROUPS).items() if file.endswith("NOTES.txt")]
    assert "patch raycluster" not in shown  # there is none before
