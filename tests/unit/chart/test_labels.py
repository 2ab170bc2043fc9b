"""Labels and names are such as Kubernetes takes, whatever the release and the chart's version are called."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from tests.unit.chart.rendering import CHART, Values, one, render

LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
EVERYTHING: Values = {
    "metrics": {name: {"enabled": True} for name in ("podMonitor", "serviceMonitor", "prometheusRule", "dashboards")},
    "ingress": {"enabled": True, "hosts": [{"host": "a.example.com"}]},
    "loadBalancer": {"provider": "gke"},
}


def labels(node: Any) -> dict[str, str]:
    """Every label in an object, of its pods too."""
    if isinstance(node, list):
        return {key: value for each in node for key, value in labels(each).items()}
    if not isinstance(node, dict):
        return {}
    found = {key: value for each in node.values() for key, value in labels(each).items()}
    return found | node.get("labels", {}) | node.get("matchLabels", {})


def test_a_version_with_build_metadata_makes_valid_labels(tmp_path: Path) -> None:
    """`helm package --version 0.1.0+abc`: a label takes no `+`."""
    folder = Path(shutil.copytree(CHART, tmp_path / "xloom"))
    file = folder / "Chart.yaml"
    text = file.read_text(encoding="utf-8").replace(": 0.1.0\n", ": 0.1.0+git.1a2b3c\n")
    file.write_text(text, encoding="utf-8")
    objects = render(EVERYTHING | {"image": {"tag": "0.1.0-cpu"}}, folder=folder)
    found = labels(objects)
    assert found["helm.sh/chart"] == "xloom-0.1.0_git.1a2b3c"
    assert found["app.kubernetes.io/version"] == "0.1.0_git.1a2b3c"
    assert [value for value in found.values() if not LABEL.fullmatch(value)] == []


def test_the_longest_names_fit() -> None:
    values = EVERYTHING | {"nameOverride": "b" * 62 + "-c"}
    objects = render(values, name="a" * 52 + "z")
    assert [value for value in labels(objects).values() if not LABEL.fullmatch(value)] == []
    names = [each["metadata"]["name"] for each in objects]
    assert max(map(len, names)) <= 63
    # KubeRay 1.7 makes `NAME-xxxxx-head-svc` of a service's name.
    assert len(one(objects, "RayService")["metadata"]["name"]) + len("-xxxxx-head-svc") <= 63
