"""vLLM's OpenAI front end over our router: text in, token requests out to a dispatcher."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xloom.adapters.manifest import Manifest
    from xloom.router.dispatch import Dispatcher
    from xloom.settings import Settings


class VLLMFrontEnd:
    """`xloom.router.front_end.FrontEnd`, made of vLLM's application."""

    def __init__(self, app: Any, engine: Any, models: Any) -> None:
        self.app = app
        self._engine, self._models = engine, models

    def take(self, manifest: Manifest) -> None:
        """Serve a manifest's entries from now on."""
        self._models.take(manifest)
        self._engine.take(manifest)

    def reword(self, message: str) -> str:
        """A message of vLLM's with settings for its flags."""
        from xloom.vllm.front_end.wording import in_settings

        return in_settings(message)

    async def check_health(self) -> None:
        """Raise when the engine client no longer works."""
        await self._engine.check_health()

    def shutdown(self) -> None:
        """End the engine client's tasks."""
        self._engine.shutdown()


# vLLM's switches for routes, keys and logs of its own: none of them is a setting of a router.
_UNHEEDED = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_SERVER_DEV_MODE",
    "VLLM_ENABLE_COHERE_API",
    "VLLM_TORCH_PROFILER_DIR",
    "VLLM_API_KEY",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
    "VLLM_LORA_RESOLVER_CACHE_DIR",
    "VLLM_LORA_RESOLVER_HF_REPO_LIST",
)


def _need_no_device() -> None:
    """On a node without a GPU a build for GPUs finds no device, and vLLM's options can't be read without one.

    As `vllm.entrypoints.cli.main` does for `vllm bench` (0.32): CPU's platform in place of none.
    """
    from vllm import platforms

    if platforms.current_platform.is_unspecified():
        from vllm.platforms.cpu import CpuPlatform

        platforms.current_platform = CpuPlatform()


async def open_front_end(settings: Settings, dispatcher: Dispatcher) -> VLLMFrontEnd:
    """The front end of one router. vLLM is imported here and not before: a driver only hands this function on."""
    # vLLM looks for a device as it is imported; the front end needs none.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    for name in _UNHEEDED:
        os.environ.pop(name, None)
    _need_no_device()
    from xloom.vllm.front_end.app import build_front_end
    from xloom.vllm.front_end.core_client import RoutedCoreClient
    from xloom.vllm.front_end.engine_client import RoutedEngineClient, front_end_config

    config = await asyncio.to_thread(front_end_config, settings)
    engine = RoutedEngineClient(config, RoutedCoreClient(dispatcher), settings.router.limits)
    app, models = await build_front_end(engine, settings)
    return VLLMFrontEnd(app, engine, models)
