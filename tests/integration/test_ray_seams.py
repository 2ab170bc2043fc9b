"""What xloom relies on of Ray 2.60 beyond its documented interface: this fails when an upgrade takes it away."""

from __future__ import annotations

import importlib
import inspect
import logging.handlers
import re
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray._common.filters import CoreContextFilter
from ray._private import ray_constants, services, worker
from ray._private.node import Node
from ray.serve._private import constants, logging_utils
from ray.serve._private.common import TimeStampedValue
from ray.serve._private.replica import Replica, UserCallableWrapper
from ray.serve._private.replica_result import ReplicaResult
from ray.serve.config import AutoscalingContext, AutoscalingPolicy
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentBroadcastResponse, DeploymentHandle
from ray.util import metrics

from xloom.adapters import client

ROOT = Path(ray.__file__).parent
# Names in the environment that Ray reads, and where: `launch.py`, the chart and the cluster files set them.
VARIABLES = {
    "RAY_worker_niceness": "_private/ray_constants.py",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "_private/accelerators/accelerator.py",
    "RAY_DEDUP_LOGS": "_private/ray_constants.py",
    "RAY_USAGE_STATS_ENABLED": "_common/usage/usage_constants.py",
    "RAY_SERVE_LOG_TO_STDERR": "serve/_private/constants.py",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "serve/_private/constants.py",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "serve/_private/constants.py",
    "RAY_SERVE_STATUS_GAUGE_REPORT_INTERVAL_S": "serve/_private/constants.py",
}

SIGNATURES: dict[Any, list[str]] = {
    worker.print_to_stdstream: ["data", "ignore_prefix"],
    DeploymentHandle.broadcast: ["self", "method_name", "args", "kwargs"],
    DeploymentBroadcastResponse._fetch_replica_results_async: ["self"],
    ReplicaResult.get_async: ["self"],
    metrics.Counter.__init__: ["self", "name", "description", "tag_keys"],
    metrics.Counter.inc: ["self", "value", "tags"],
    metrics.Gauge.__init__: ["self", "name", "description", "tag_keys"],
    metrics.Gauge.set: ["self", "value", "tags"],
}


def test_version_is_the_one_the_seams_were_read_in() -> None:
    assert ray.__version__.startswith("2.60.")


@pytest.mark.parametrize("name", VARIABLES)
def test_ray_reads_the_environment_by_these_names(name: str) -> None:
    assert f'"{name}"' in (ROOT / VARIABLES[name]).read_text(encoding="utf-8")


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_what_is_called_or_replaced_keeps_its_signature(function: Any) -> None:
    assert list(inspect.signature(function).parameters) == SIGNATURES[function]


def test_the_local_cluster_is_started_with_options_that_are_read() -> None:
    popped = re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(ray.init))
    assert {"_temp_dir", "_node_ip_address"} <= set(popped)
    assert {"namespace", "log_to_driver", "logging_level", "num_cpus", "include_dashboard"} <= set(
        inspect.signature(ray.init).parameters
    )


def test_error_messages_are_printed_by_a_function_that_is_looked_up_each_time() -> None:
    assert "print_to_stdstream" in worker.listen_error_messages.__code__.co_names


def test_the_head_node_has_the_resource_that_the_store_asks_for() -> None:
    assert f'"{HEAD_NODE_RESOURCE_NAME}"' in inspect.getsource(client)


def test_the_period_of_rays_metrics_can_be_read() -> None:
    assert ray._config.metrics_report_interval_ms() > 0


def test_serve_awaits_the_constructor_and_the_destructor_of_a_deployment() -> None:
    for method, called in (("initialize_callable", "__init__"), ("call_destructor", "__del__")):
        function = getattr(UserCallableWrapper, method)
        assert inspect.iscoroutinefunction(inspect.unwrap(function))
        assert re.search(rf"await self\._call_func_or_gen\(\s*self\._callable\.{called},", inspect.getsource(function))
    assert "await self._user_callable_wrapper.call_destructor()" in inspect.getsource(Replica.shutdown)


def test_serve_asks_a_replica_for_the_signals_of_the_policy() -> None:
    assert '"record_autoscaling_stats"' in inspect.getsource(UserCallableWrapper)


def test_the_policy_is_given_what_it_reads() -> None:
    assert {"raw_metrics", "total_num_requests"} <= set(vars(AutoscalingContext))  # properties
    assert {
        "current_num_replicas", "target_num_replicas", "running_replicas", "capacity_adjusted_min_replicas",
        "capacity_adjusted_max_replicas",
    } <= set(inspect.signature(AutoscalingContext.__init__).parameters)  # fmt: skip
    assert TimeStampedValue(1.0, 2.0).value == 2.0
    assert {"policy_function", "policy_kwargs"} <= set(AutoscalingPolicy.__fields__)
    assert "cloudpickle.register_pickle_by_value(policy_module)" in inspect.getsource(
        AutoscalingPolicy.serialize_policy
    )


def test_serve_logs_through_a_buffer_before_a_file() -> None:
    assert constants.SERVE_LOGGER_NAME == "ray.serve"
    source = inspect.getsource(logging_utils.configure_component_logger)
    assert "memory_handler = logging.handlers.MemoryHandler(" in source
    assert "logger.addHandler(memory_handler)" in source
    assert "target" in inspect.signature(logging.handlers.MemoryHandler).parameters
    assert issubclass(logging_utils.ServeCoreContextFilter, CoreContextFilter)
    context = inspect.getsource(CoreContextFilter)
    assert "LogKey.WORKER_ID.value" in context
    assert "LogKey.NODE_ID.value" in context


def test_a_deployment_at_zero_is_told_by_its_error() -> None:
    assert issubclass(DeploymentUnavailableError, Exception)


def test_what_the_chart_and_the_tests_name_is_there() -> None:
    assert callable(services.determine_plasma_store_config)  # why the chart gives /dev/shm its size
    assert ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE == "prom_metrics_service_discovery.json"
    assert "self.all_processes" in inspect.getsource(Node.__init__)
    assert hasattr(worker, "_global_node")
    configuration = importlib.import_module("ray.autoscaler._private.util")
    assert callable(configuration.prepare_config)
    assert callable(configuration.validate_config)
