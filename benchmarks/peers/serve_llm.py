"""A peer: Ray's own `ray.serve.llm` over the same vLLM engine, as its documentation deploys it.

Usage: python -m benchmarks.peers.serve_llm ARGUMENTS.json
"""

from __future__ import annotations

from typing import Any

from ray import serve

from .cluster import run_until_interrupted


def application(arguments: dict[str, Any]) -> serve.Application:
    """The Serve application."""
    from ray.serve.llm import LLMConfig, build_openai_app

    engine = dict(arguments)
    names = engine.pop("served_model_name")
    config = LLMConfig(
        model_loading_config={"model_id": names[0], "model_source": engine.pop("model")},
        accelerator_config={"kind": "cpu"},
        deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}, "max_ongoing_requests": 1000},
        engine_kwargs=engine,
    )
    app: serve.Application = build_openai_app({"llm_configs": [config]})
    return app


if __name__ == "__main__":
    run_until_interrupted(application)
