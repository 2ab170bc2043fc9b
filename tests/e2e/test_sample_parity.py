"""The sample's mixture, served compiled in float32, against PEFT over the same weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from xloom.settings import SAMPLE, load_settings

from ..models import peft_greedy
from .served import Served

pytestmark = pytest.mark.slow

TEXTS = ["def read_lines(path):\n    ", '{"name": "', "The import statement ", "12 + 30 = "]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    # `dtype: auto` may be bfloat16 here; sources become absolute, since the file lies elsewhere.
    shipped = load_settings(None)
    settings = yaml.safe_load((SAMPLE / "settings.yaml").read_text(encoding="utf-8"))
    settings["model"]["source"] = shipped.model.source
    settings["engine"]["dtype"] = "float32"
    settings["adapters"] = [{"name": each.name, "source": each.source} for each in shipped.adapters]
    settings["xlora"] = [entry | {"source": each.source} for entry, each in zip(settings["xlora"], shipped.xlora)]
    served = Served(tmp_path_factory.mktemp("parity"), settings)
    served.wait_ready()
    yield served
    served.stop()


def test_the_mixtures_greedy_tokens_equal_pefts(server: Served) -> None:
    from xloom.sample.evaluate import load_xlora

    tokenizer = PreTrainedTokenizerFast.from_pretrained(SAMPLE / "base")
    oracle, _ = load_xlora(SAMPLE)
    oracle.float()
    for text in TEXTS:
        prompt = tokenizer(text)["input_ids"]
        assert server.greedy("blend", prompt, NEW_TOKENS) == peft_greedy(oracle, prompt, NEW_TOKENS), text
