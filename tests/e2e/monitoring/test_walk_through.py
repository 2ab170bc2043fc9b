"""The commands of docs/monitoring.md, as a reader of the page runs them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from cluster.local_cluster import free_port
from tests.pages import Reader, to_run
from tests.unit.dashboards.grafana_server import GrafanaServer, grafana_server
from xloom_dashboards.boards import BOARDS

from .conftest import Past
from .prometheus import PROMETHEUS, RULES, configuration

pytestmark = [pytest.mark.slow, PROMETHEUS]

READY = "ready to receive web requests"
LOGGERS = {"xloom.router.requests", "xloom.replica.requests"}


def test_the_commands_of_the_page(past: Past, tmp_path: Path) -> None:
    made = past.watched
    made.wait_replicas(1)
    written = configuration(made.discovery, made.endpoint.url.removeprefix("http://"), RULES)
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(written))
    (tmp_path / "grafana-token").write_text("glsa_editor\n")
    said = []
    with ExitStack() as staying:
        grafana = staying.enter_context(grafana_server(GrafanaServer()))
        names = {
            "/tmp/ray/prom_metrics_service_discovery.json": str(made.discovery),
            "/tmp/ray/session_latest": str(made.cluster.folder / "session_latest"),
            "/tmp/boards": str(tmp_path / "boards"),
            "http://127.0.0.1:8000": made.endpoint.url,
            "127.0.0.1:9090": f"127.0.0.1:{free_port()}",
            "https://grafana.example.com": grafana.url,
        }
        reader = Reader(tmp_path, made.cluster.environment, names)
        for block in to_run("monitoring.md"):
            if block.stays:
                staying.enter_context(reader.running(block, READY))
            else:
                said.append(reader.run(block))
        assert grafana.boards.keys() == {board.uid for board in BOARDS}
    together = "\n".join(said)
    assert "xloom_router_in_flight" in together
    assert "SUCCESS" in together
    assert '"status":"success"' in together
    assert "XloomEndpointDown" in (tmp_path / "boards" / "alerts.yaml").read_text()
    lines = [line for line in together.splitlines() if "checkout-42" in line]
    assert {name for name in LOGGERS if any(f'"{name}"' in line for line in lines)} == LOGGERS
