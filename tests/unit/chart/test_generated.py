"""README.md and values.schema.json are what values.yaml says; alerts have a heading, and figures that exist."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.unit.chart.rendering import CHART, ROOT, Object, Values, merged, one, render
from xloom.settings import Settings
from xloom_dashboards.alerts import ALERTS
from xloom_dashboards.boards import BOARDS
from xloom_dashboards.kubernetes import KUBERNETES_ALERTS

MONITORED = {
    "metrics": {
        "podMonitor": {"enabled": True},
        "serviceMonitor": {"enabled": True},
        "prometheusRule": {"enabled": True},
    }
}


CHART_VALUES: Values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


def rules(values: Values | None = None) -> list[Object]:
    """The alerts of a release that has all monitors."""
    [group] = one(render(merged(MONITORED, values or {})), "PrometheusRule")["spec"]["groups"]
    found: list[Object] = group["rules"]
    return found


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The scripts of helm/, imported as they run: from their own folder."""
    monkeypatch.syspath_prepend(str(ROOT / "helm"))
    names = ("commented", "readme", "schema")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def test_the_readme_is_what_the_values_say(scripts: dict[str, ModuleType]) -> None:
    assert scripts["readme"].main(["--check"]) == 0


def test_the_schema_is_what_the_values_and_the_settings_say(scripts: dict[str, ModuleType]) -> None:
    assert scripts["schema"].main(["--check"]) == 0


def test_a_stale_file_is_noticed(
    scripts: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, constant in (("readme", "README"), ("schema", "SCHEMA")):
        stale = tmp_path / name
        stale.write_text("old", encoding="utf-8")
        monkeypatch.setattr(scripts[name], constant, stale)
        assert scripts[name].main(["--check"]) == 1
        assert f"python helm/{name}.py" in capsys.readouterr().err
        assert scripts[name].main([]) == 0
        assert scripts[name].main(["--check"]) == 0


def test_a_key_without_a_comment_is_refused(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text("# Said\na: 1\nb:\n  c: 2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape("b.c has no comment")):
        scripts["commented"].read_values(file)


def test_the_schema_knows_every_setting() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    assert set(schema["$defs"]["Settings"]["properties"]) == set(Settings.model_fields)
    assert schema["$defs"]["ModelSettings"]["properties"]["source"] == {"type": "string"}
    text = json.dumps(schema)
    assert '"default"' not in text
    assert str(ROOT) not in text


def test_each_alert_has_a_summary_and_a_heading_in_the_documentation() -> None:
    page = CHART_VALUES["metrics"]["prometheusRule"]["runbookUrl"]
    headings = {
        line.lstrip("# ").strip().lower()
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines()
        if line.startswith("#")
    }
    for rule in rules():
        linked, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert linked == page
        assert anchor == rule["alert"].lower()
        assert anchor in headings
        assert rule["annotations"]["summary"].endswith(".")


def test_alerts_are_those_of_the_table_narrowed_to_the_release() -> None:
    found = rules({"settings": {"replicas": {"target_queue_depth": 5}}})
    assert [rule["alert"] for rule in found] == [alert.name for alert in (*ALERTS, *KUBERNETES_ALERTS)]
    ours = 'namespace="serving",job="serving/xloom"'  # what the PodMonitor of the release gives its series
    for rule, alert in zip(found, ALERTS, strict=False):
        assert rule["expr"] == alert.expr.replace("SCOPE", ours).replace("QUEUE_LIMIT", "10")
        assert (rule["for"], rule["annotations"]["summary"]) == (alert.hold, alert.summary)
        assert rule["labels"] == {"severity": alert.severity, "namespace": "serving", "service": "xloom"}
        scopes = re.findall(r"\bray_\w+\{([^}]*)\}", rule["expr"])
        assert scopes
        assert all(scope.startswith(ours) for scope in scopes)


def test_the_boards_are_in_the_chart_and_rendered_as_they_are() -> None:
    config = one(render({"metrics": {"dashboards": {"enabled": True}}}), "ConfigMap")
    assert {name: json.loads(text) for name, text in config["data"].items()} == {
        board.file: board.json() for board in BOARDS
    }
    assert sum(map(len, config["data"].values())) < 2**20  # what a ConfigMap holds


def test_monitors_select_what_the_chart_labels() -> None:
    objects = render(MONITORED)
    service = one(objects, "RayService")["spec"]
    endpoint = one(objects, "ServiceMonitor")["spec"]
    assert endpoint["selector"]["matchLabels"].items() <= service["serveService"]["metadata"]["labels"].items()
    assert endpoint["endpoints"][0]["port"] == service["serveService"]["spec"]["ports"][0]["name"]
    pods = one(objects, "PodMonitor")["spec"]
    cluster = service["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        labels = group["template"]["metadata"]["labels"]
        assert pods["selector"]["matchLabels"].items() <= labels.items()
        ports = {each["name"] for each in group["template"]["spec"]["containers"][0]["ports"]}
        assert pods["podMetricsEndpoints"][0]["port"] in ports
    policy = one(objects, "NetworkPolicy")["spec"]["ingress"]
    assert {"protocol": "TCP", "port": 8080} in [port for rule in policy for port in rule.get("ports", [])]
