"""What leaves a step of its gates: each prompt's rows once, and the rows that tokens are sampled from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from xloom.vllm.plugin import GATES
from xloom.vllm.plugin.gate_records import GateRecords
from xloom.vllm.plugin.gate_reports import GateReports, Told, with_gates
from xloom.vllm.plugin.gates import SlotRouting
from xloom.vllm.plugin.pairs import LAYERS_ARG, scaling_id

from .routings import routing

MODULES = ["layers.0.q", "layers.0.k", "layers.2.q"]  # none in the layer between
ROUTING = SlotRouting(routing(MODULES, [[(0, 2), (1, 2)]] * 3))


@pytest.fixture
def lora(tmp_path: Path) -> LoRARequest:
    description = {"format": 1, "kind": "fixed", "adapter_names": ["code", "docs"]}
    (tmp_path / "xlora.json").write_text(json.dumps(description))
    return LoRARequest("blend@1", 7, str(tmp_path))


def new(name: str, lora: LoRARequest, prompt: int, **extra: Any) -> Any:
    sampling = SamplingParams(extra_args=extra or None)
    return SimpleNamespace(
        req_id=name, lora_request=lora, prompt_token_ids=list(range(prompt)), sampling_params=sampling
    )


def told(reports: GateReports, spans: list[tuple[str, int, int]], gates: torch.Tensor) -> dict[str, Told]:
    reports.clear()
    reports.add(ROUTING, spans, gates)
    step = reports.take()
    return {} if step is None else step.read()


def test_rows_of_a_prompt_are_told_once_and_the_last_is_the_answers(lora: LoRARequest) -> None:
    reports, gates = GateReports(torch.device("cpu")), torch.rand(6, 3, 2)
    reports.begin(new("a", lora, 6))
    first = told(reports, [("a", 0, 4)], gates[:4])["a"]
    assert first.token is None
    assert first.prompt == pytest.approx(gates[:4].mean(1).sum(0).numpy(), abs=1e-6)
    assert told(reports, [("a", 0, 4)], gates[:4]) == {}  # preempted, and computed again
    last = told(reports, [("a", 2, 4)], gates[2:])["a"]
    assert last.prompt_tokens == 1
    assert last.prompt == pytest.approx(gates[4].mean(0).numpy(), abs=1e-6)
    assert last.token == pytest.approx(gates[5].mean(0).numpy(), abs=1e-6)
    assert last.layers is None
    after = told(reports, [("a", 6, 1)], gates[:1])["a"]
    assert (after.prompt, after.prompt_tokens) == (None, 0)
    assert after.token is not None
    reports.drop("a")
    assert len(reports) == 0


def test_requests_of_one_mixture_share_a_step_with_scaling_sequences(lora: LoRARequest) -> None:
    reports, gates = GateReports(torch.device("cpu")), torch.rand(7, 3, 2)
    for each in (new("a", lora, 2), new("b", lora, 5, **{LAYERS_ARG: True}), new(scaling_id("b"), lora, 5)):
        reports.begin(each)
    found = told(reports, [("a", 1, 1), (scaling_id("b"), 0, 2), ("b", 2, 4)], gates)
    assert set(found) == {"a", "b"}
    assert found["a"].token == pytest.approx(gates[0].mean(0).numpy(), abs=1e-6)
    assert found["b"].prompt_tokens == 2
    assert found["b"].prompt == pytest.approx(gates[3:5].mean(1).sum(0).numpy(), abs=1e-6)
    layers = found["b"].layers
    assert layers is not None
    assert layers[0] == pytest.approx(gates[6, :2].mean(0).numpy(), abs=1e-6)
    assert np.isnan(layers[1]).all()
    assert layers[2] == pytest.approx(gates[6, 2].numpy(), abs=1e-6)


def test_constants_that_are_the_same_in_all_rows(lora: LoRARequest) -> None:
    reports = GateReports(torch.device("cpu"))
    reports.begin(new("a", lora, 4, **{LAYERS_ARG: True}))
    found = told(reports, [("a", 0, 4)], torch.tensor([0.5, -1.0]).expand(4, 3, 2))["a"]
    assert found.token == pytest.approx([0.5, -1.0])
    assert found.prompt == pytest.approx([1.5, -3.0])
    assert found.layers is not None
    assert found.layers[[0, 2]] == pytest.approx(np.array([[0.5, -1.0]] * 2))


def test_outputs_carry_them_now_or_once_they_have_come(lora: LoRARequest) -> None:
    class Late(AsyncModelRunnerOutput):
        def get_output(self) -> ModelRunnerOutput:
            return ModelRunnerOutput(["a"], {"a": 0})

    reports = GateReports(torch.device("cpu"))
    reports.begin(new("a", lora, 1))
    for output in (ModelRunnerOutput(["a"], {"a": 0}), Late()):
        reports.add(ROUTING, [("a", 0, 1)], torch.ones(1, 3, 2))
        given = with_gates(output, reports.take())
        given = given.get_output() if isinstance(output, Late) else given
        assert getattr(given, GATES)["a"].token == pytest.approx([1.0, 1.0])
    assert with_gates(None, None) is None


def test_they_leave_the_scheduler_with_their_tokens(lora: LoRARequest) -> None:
    records = GateRecords()
    request: Any = SimpleNamespace(request_id="a", lora_request=lora)
    records.begin(request)
    rows = np.array([0.25, 0.75], np.float32)
    assert records.take({"a": Told(None, None, np.array([1.0, 2.0]), 2)}) == {}

    def sent(given: Told, tokens: list[int]) -> Any:
        output = EngineCoreOutput("a", tokens)
        records.attach(records.take({"a": given}), {0: EngineCoreOutputs(outputs=[output])})
        return (output.kv_transfer_params or {}).get(GATES)

    assert sent(Told(rows, None, np.array([2.0, 1.0]), 1), []) is None  # its token was dropped
    first = sent(Told(rows, None), [5])
    assert first[:2] == [rows.tobytes(), b""]
    assert np.frombuffer(first[2], np.float32) == pytest.approx([1.0, 1.0])
    assert first[3:] == [3, ["code", "docs"]]
    assert len(records) == 0
    assert sent(Told(rows, None), [6]) == [rows.tobytes()]
    assert sent(Told(rows, np.stack([rows, rows])), [7]) == [rows.tobytes(), rows.tobytes() * 2]
