"""The names of metrics that Ray 2.60, Ray Serve and vLLM 0.32 export. A test looks for each in their sources.

Ray forgets a gauge that is not set again within two export periods: only those that Serve keeps setting are here.
Serve sets its own every 10 s (`RAY_SERVE_STATUS_GAUGE_REPORT_INTERVAL_S`), and Ray exports every 10 s.
"""

from __future__ import annotations

# ray/serve/_private/{deployment_state,application_state,replica}.py; Ray's exporter puts `ray_` in front, and
# `_total` behind counters that do not end in it.
REPLICA_HEALTHY = "ray_serve_deployment_replica_healthy"  # 1 or 0 for each deployment, application and replica
DEPLOYMENT_STATUS = "ray_serve_deployment_status"  # 1 failed, 2 unhealthy, 3 updating, 4 and 5 scaling, 6 healthy
APPLICATION_STATUS = "ray_serve_application_status"  # 5 deploying, 6 running
HEALTH_CHECK_FAILURES = "ray_serve_health_check_failures_total"
REPLICA_STARTUP_MS = "ray_serve_replica_startup_latency_ms"  # histogram

# ray/dashboard/modules/reporter/reporter_agent.py: one series a node, or a GPU.
NODE_CPU = "ray_node_cpu_utilization"  # per cent
NODE_CPUS = "ray_node_cpu_count"
NODE_MEMORY_USED = "ray_node_mem_used"  # bytes
NODE_MEMORY = "ray_node_mem_total"
NODE_DISK_USED = "ray_node_disk_usage"  # bytes
NODE_DISK_FREE = "ray_node_disk_free"
NODE_RECEIVED = "ray_node_network_receive_speed"  # bytes a second
NODE_SENT = "ray_node_network_send_speed"
GPU_BUSY = "ray_node_gpus_utilization"  # per cent
GPU_MEMORY_USED = "ray_node_gram_used"  # mebibytes
GPU_MEMORY_FREE = "ray_node_gram_available"

# vllm/v1/metrics/loggers.py through ray_wrappers.py: `vllm:` becomes `ray_vllm_`.
PROMPT_LENGTH = "ray_vllm_request_prompt_tokens"  # histogram
ANSWER_LENGTH = "ray_vllm_request_generation_tokens"  # histogram
QUEUE_TIME = "ray_vllm_request_queue_time_seconds"  # histogram, as the two below; of replicas, the last of routers
PREFILL_TIME = "ray_vllm_request_prefill_time_seconds"
DECODE_TIME = "ray_vllm_request_decode_time_seconds"

COUNTERS = (HEALTH_CHECK_FAILURES,)
HISTOGRAMS = (REPLICA_STARTUP_MS, PROMPT_LENGTH, ANSWER_LENGTH, QUEUE_TIME, PREFILL_TIME, DECODE_TIME)
GAUGES = (
    REPLICA_HEALTHY, DEPLOYMENT_STATUS, APPLICATION_STATUS,
    NODE_CPU, NODE_CPUS, NODE_MEMORY_USED, NODE_MEMORY, NODE_DISK_USED, NODE_DISK_FREE, NODE_RECEIVED, NODE_SENT,
    GPU_BUSY, GPU_MEMORY_USED, GPU_MEMORY_FREE,
)  # fmt: skip
NAMES = COUNTERS + HISTOGRAMS + GAUGES
