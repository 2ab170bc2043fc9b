"""Pods and the GPUs of nodes: who sees them, and which nodes the examples choose."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.chart.rendering import EXAMPLES, ROOT, Values, example, pod_templates, render

VISIBLE = "NVIDIA_VISIBLE_DEVICES"


def visible(values: Values) -> dict[str, str | None]:
    """What each Ray pod says of the GPUs it may see."""
    found = {}
    for name, pod in pod_templates(render(values)).items():
        env = {each["name"]: each.get("value") for each in pod["spec"]["containers"][0].get("env", [])}
        if name.startswith(("head", "worker")):
            found[name] = env.get(VISIBLE)
    return found


def test_a_pod_that_asks_for_no_gpu_sees_none() -> None:
    """The image sets it to all, and NVIDIA's runtime then shows a pod every GPU of its node, whoever has them."""
    assert f"{VISIBLE}=all" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    groups = [{"name": "gpu", "cpus": 8, "gpus": 1}, {"name": "routers", "cpus": 1, "routers": True}]
    values: Values = {"workerGroups": groups, "settings": {"replicas": {"gpus": 1}}}
    assert visible(values) == {"head": "void", "worker gpu": None, "worker routers": "void"}
    assert visible({}) == {"head": None, "worker cpu": None}  # the image for CPUs has no such thing
    own = values | {"extraEnv": [{"name": VISIBLE, "value": "all"}]}
    assert set(visible(own).values()) == {"all"}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_labels_that_nodes_must_have_are_stated(file: Path) -> None:
    """A label that nobody has set leaves pods Pending, and clouds have labels of their own."""
    text = file.read_text(encoding="utf-8")
    values = example(file)
    for group in [values["head"], *values["workerGroups"]]:
        for label in group.get("nodeSelector", {}):
            assert label in text[: text.index("settings:")]
