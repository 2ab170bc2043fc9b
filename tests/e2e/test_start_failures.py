"""A deployment whose engine can't start says why, wherever one looks: HTTP, `xloom status`, the terminal."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from ..models import tiny_model
from .served import API_KEY, Served, wait_until

pytestmark = [pytest.mark.slow]
LACKS = "model.layers.1.self_attn.k_proj.weight"
TOLD_S = 180.0  # an engine's start, on a busy machine
ENDS_S = 300.0  # and those that Serve tries again


def test_the_workers_own_cause_and_its_cure_are_told_everywhere(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    weights = load_file(model / "model.safetensors")
    del weights[LACKS]  # found where the weights are loaded: in the engine's worker
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    engine = {"max_model_len": 256, "compile": False, "paged_attention": {"max_blocks": 64}}
    served = Served(tmp_path, {"model": {"source": str(model)}, "engine": engine})
    try:

        def is_told() -> bool:
            assert served.process.poll() is None, served.printed()
            try:
                return LACKS in served.http.get("/xloom/status", timeout=5).json().get("start_failure", "")
            except (httpx.TransportError, ValueError):
                return False

        wait_until(is_told, TOLD_S, "a status that names the cause", 0.5)
        said = served.command("status").stdout
        asked = {"model": "base", "prompt": [1, 2, 3], "max_tokens": 1}
        answer = served.http.post("/v1/completions", json=asked, headers={"Authorization": f"Bearer {API_KEY}"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "no_replica_ready"
        wait_until(lambda: served.process.poll() is not None, ENDS_S, "the end of xloom serve", 0.5)
        assert served.process.returncode == 2
        for told in (said, answer.json()["error"]["message"], served.printed()):
            line = " ".join(told.split())
            assert LACKS in line
            assert "download it again, as safetensors. [model_not_loadable]" in line
    except BaseException:
        print(served.log())
        raise
    finally:
        served.kill()
