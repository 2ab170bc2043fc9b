"""What Ray Serve is told of routers and engines."""

from __future__ import annotations

from typing import Any, cast

import pytest

from xloom.app import Placing, build
from xloom.autoscaling.policy import Targets, decide
from xloom.settings import Settings


def deployments(settings: Settings) -> dict[str, Any]:
    """What Serve is given, by name."""
    router = build(settings, cast(Any, None), 64, Placing(1.0, loopback=False))._bound_deployment
    engine = router.init_args[0]._bound_deployment
    return {each.name: each for each in (router, engine)}


def test_routers_stay_apart_and_where_they_are_sent_and_end_their_streams() -> None:
    pytest.importorskip("vllm")
    routers = {"replicas": 2, "max_per_node": 1, "resources": {"edge": 0.01}}
    given = Settings.model_validate({"router": routers, "replicas": {"drain_timeout_s": 300}})
    router = deployments(given)["router"]
    config = router._replica_config
    assert (router.num_replicas, config.max_replicas_per_node) == (2, 1)
    assert config.ray_actor_options["resources"] == {"edge": 0.01}
    assert router._deployment_config.graceful_shutdown_timeout_s > 300


def test_a_deployment_that_may_stop_its_engines_begins_with_one() -> None:
    """On Kubernetes traffic goes over to a new cluster once its deployments are healthy: with an engine, so that
    routers' pods are ready long before."""
    pytest.importorskip("vllm")
    engine = deployments(Settings.model_validate({"replicas": {"min": 0, "max": 2}}))["engine"]
    assert engine._deployment_config.autoscaling_config.initial_replicas == 1
    alone = {"target": 1, "lowest": 0, "highest": 2, "targets": Targets(8, 0.8)}
    assert decide([], current=0, **alone).replicas == 1  # until it has come up
