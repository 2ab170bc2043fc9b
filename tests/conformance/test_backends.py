"""What every backend must do, on real engines. The last test closes the engine."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest

from xloom.protocol import AdapterRef, XloomError
from xloom.settings import EngineSettings, ModelSettings

from ..models import (
    ADAPTERS,
    VOCAB,
    load_model,
    peft_greedy,
    peft_logits,
    peft_lora,
    peft_xlora,
    tiny_adapter,
    tiny_bundle,
)
from .served import ANSWER_S, Answer, Served, prepared_bundle, wait_for

PROMPT = list(range(40, 75))
PROMPTS = [PROMPT, [256, 5, 9, 200], list(range(100, 160)), [7], list(range(80, 40, -1)), [250, 251, 252] * 9]
NEW_TOKENS = 12
CONTEXT = 128  # served.py's max_model_len


@pytest.fixture(scope="module")
def adapter(served: Served, tmp_path_factory: pytest.TempPathFactory) -> AdapterRef:
    """A plain adapter that stays loaded."""
    folder = tiny_adapter(tmp_path_factory.mktemp("adapters") / "plain", served.model, seed=9, **ADAPTERS[0])
    return served.adapter("plain", folder)


def code_of(served: Served, prompt: list[int], adapter: AdapterRef | None = None) -> str:
    """The code of the error a request is refused with."""
    with pytest.raises(XloomError) as caught:
        served.start(prompt, adapter)
    return caught.value.code


def assert_idle(served: Served) -> None:
    """Nothing runs, waits or holds pages once another request has come to its end."""
    served.generate([5], max_tokens=1)  # an engine may report only when it steps
    stats = served.backend.stats
    wait_for(lambda: (stats().running, stats().waiting, stats().kv_pages_used) == (0, 0, 0), f"idle; it is {stats()}")


def test_it_runs_on_a_device_it_names(served: Served) -> None:
    backend = type(served.backend)
    assert backend.missing() is None
    assert backend.device() in backend.capabilities().devices
    served.call(served.backend.check_health())


def test_greedy_tokens_are_the_models_own(served: Served) -> None:
    model = load_model(served.model)
    for prompt in PROMPTS:
        answer = served.generate(prompt, max_tokens=NEW_TOKENS)
        assert answer.tokens == peft_greedy(model, prompt, NEW_TOKENS)
        assert answer.finish_reason == "length"


def test_tokens_come_as_they_are_made(served: Served) -> None:
    answer = served.generate(PROMPT, max_tokens=40)
    assert len(answer.tokens) == 40
    assert answer.steps[0] < answer.steps[-1]
    assert len(answer.steps) > 4  # an engine that is quicker than its reader may bring several at once


def test_an_adapter_answers_as_peft_does(served: Served, adapter: AdapterRef, tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "plain", served.model, seed=9, **ADAPTERS[0])
    answer = served.generate(PROMPT, adapter, max_tokens=NEW_TOKENS)
    assert answer.tokens == peft_greedy(peft_lora(served.model, folder), PROMPT, NEW_TOKENS)
    assert answer.tokens != served.generate(PROMPT, max_tokens=NEW_TOKENS).tokens


def test_ranks_scales_and_targets_of_all_kinds_are_heeded(served: Served, tmp_path: Path) -> None:
    for number, spec in enumerate(ADAPTERS[1:]):
        folder = tiny_adapter(tmp_path / str(number), served.model, seed=20 + number, **spec)
        ref = served.adapter(f"kind-{number}", folder)
        answer = served.generate(PROMPT, ref, max_tokens=NEW_TOKENS)
        assert answer.tokens == peft_greedy(peft_lora(served.model, folder), PROMPT, NEW_TOKENS)
        served.call(served.backend.remove_adapter(ref))


def test_xlora_answers_as_peft_does_or_is_refused(served: Served, tmp_path: Path) -> None:
    backend = type(served.backend)
    folder = tiny_bundle(tmp_path / "blend", served.model, seed=3)
    if not backend.capabilities().xlora:
        ref = AdapterRef("blend", "0123abcd", "xlora")
        with pytest.raises(XloomError) as caught:
            served.add(ref, prepared_bundle(served.model, folder))
        assert caught.value.code == "unsupported_by_backend"
        load = backend.load(ModelSettings(source=str(served.model)), EngineSettings(), xlora=True, max_lora_rank=32)
        with pytest.raises(XloomError) as caught:
            served.call(load)
        assert caught.value.code == "unsupported_by_backend"
        return
    ref = served.bundle("blend", folder)
    answer = served.generate(PROMPT, ref, max_tokens=NEW_TOKENS)
    assert answer.tokens == peft_greedy(peft_xlora(served.model, folder), PROMPT, NEW_TOKENS)
    assert answer.tokens != served.generate(PROMPT, max_tokens=NEW_TOKENS).tokens
    served.call(served.backend.remove_adapter(ref))


def test_requests_at_once_equal_requests_one_by_one(served: Served, adapter: AdapterRef, tmp_path: Path) -> None:
    kinds: list[AdapterRef | None] = [None, adapter]
    if type(served.backend).capabilities().xlora:
        kinds.append(served.bundle("mixed", tiny_bundle(tmp_path / "mixed", served.model, seed=4)))
    cases = [(prompt, kind) for prompt in PROMPTS for kind in kinds]  # more than run at once
    alone = [served.generate(prompt, kind, max_tokens=NEW_TOKENS).tokens for prompt, kind in cases]
    together: list[Future[Answer]] = [served.start(prompt, kind, max_tokens=NEW_TOKENS)[1] for prompt, kind in cases]
    assert [future.result(ANSWER_S).tokens for future in together] == alone
    assert_idle(served)


def test_an_aborted_request_frees_what_it_held(served: Served) -> None:
    request_id, _ = served.start(PROMPT, max_tokens=CONTEXT - len(PROMPT) - 1)
    wait_for(lambda: bool(served.answers[request_id].tokens), "a first token")
    assert served.backend.stats().running <= 1
    served.abort(request_id)
    assert_idle(served)
    assert served.answers[request_id].finish_reason in (None, "abort")
    served.abort("never-heard-of")


def test_waiting_requests_can_be_aborted(served: Served) -> None:
    started = [served.start(PROMPT, max_tokens=60) for _ in range(16)]  # twice what runs at once
    for request_id, _ in started[1:]:
        served.abort(request_id)
    assert len(started[0][1].result(ANSWER_S).tokens) == 60
    assert_idle(served)


def test_a_removed_adapter_is_gone(served: Served, tmp_path: Path) -> None:
    ref = served.adapter("passing", tiny_adapter(tmp_path / "passing", served.model, seed=12))
    before = served.generate(PROMPT, ref).tokens
    wait_for(lambda: "passing@0123abcd" in served.backend.stats().adapters, "the adapter among the figures")
    served.call(served.backend.remove_adapter(ref))
    assert code_of(served, PROMPT, ref) == "adapter_not_found"
    served.generate(PROMPT, max_tokens=1)
    wait_for(lambda: "passing@0123abcd" not in served.backend.stats().adapters, "the adapter gone from the figures")
    served.call(served.backend.remove_adapter(ref))  # again: ignored
    again = served.adapter("passing", tiny_adapter(tmp_path / "passing", served.model, seed=12))
    assert served.generate(PROMPT, again).tokens == before
    served.call(served.backend.remove_adapter(again))


def test_two_generations_of_one_name_are_two_adapters(served: Served, tmp_path: Path) -> None:
    answers = []
    for generation in (1, 2):
        folder = tiny_adapter(tmp_path / str(generation), served.model, seed=30 + generation)
        served.adapter("other", folder)  # writes the prepared folder
        ref = AdapterRef("versioned", f"{generation}" * 8, "lora")
        served.add(ref, folder.with_name(f"{generation}-prepared"))
        answers.append((ref, served.generate(PROMPT, ref).tokens))
        served.call(served.backend.remove_adapter(AdapterRef("other", "0123abcd", "lora")))
    assert answers[0][1] != answers[1][1]
    for ref, tokens in answers:  # the first is as it was
        assert served.generate(PROMPT, ref).tokens == tokens
        served.call(served.backend.remove_adapter(ref))


def test_an_adapter_it_does_not_hold_is_not_found(served: Served) -> None:
    with pytest.raises(XloomError) as caught:
        served.start(PROMPT, AdapterRef("nobody", "0123abcd", "lora"))
    assert (caught.value.code, caught.value.status) == ("adapter_not_found", 404)


def test_a_broken_adapter_is_refused_and_the_engine_goes_on(served: Served, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    with pytest.raises(XloomError):
        served.add(AdapterRef("broken", "0123abcd", "lora"), tmp_path / "broken")
    assert len(served.generate(PROMPT).tokens) == 16


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ([], "empty_prompt"),
        ([5] * CONTEXT, "context_length_exceeded"),
        ([5] * (3 * CONTEXT), "context_length_exceeded"),
        ([5, VOCAB], "invalid_token"),
        ([-1, 5], "invalid_token"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused_by_code(served: Served, prompt: list[int], code: str) -> None:
    assert code_of(served, prompt) == code


def test_an_error_of_one_request_leaves_the_others(served: Served) -> None:
    alone = served.generate(PROMPT, max_tokens=60).tokens
    _, future = served.start(PROMPT, max_tokens=60)
    assert code_of(served, [5, VOCAB]) == "invalid_token"
    assert code_of(served, PROMPT, AdapterRef("nobody", "0123abcd", "lora")) == "adapter_not_found"
    assert future.result(ANSWER_S).tokens == alone
    assert_idle(served)


def test_the_context_ends_a_request(served: Served) -> None:
    answer = served.generate([5] * (CONTEXT - 8), max_tokens=100)
    assert len(answer.tokens) == 8
    assert answer.finish_reason == "length"


def test_a_listed_token_ends_a_request_with_itself_as_the_reason(served: Served) -> None:
    tokens = served.generate(PROMPT, max_tokens=NEW_TOKENS).tokens
    stop = next(token for token in tokens[2:] if token not in tokens[:2])
    place = tokens.index(stop)
    answer = served.generate(PROMPT, max_tokens=NEW_TOKENS, stop_token_ids=[stop])
    assert answer.tokens == tokens[: place + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


def test_the_end_of_text_ends_a_request_unless_ignored(served: Served) -> None:
    tokens = served.generate(PROMPT, max_tokens=NEW_TOKENS).tokens
    end = next(token for token in tokens[2:] if token not in tokens[:2])
    options = {"ignore_eos": False, "_eos_token_id": end, "_all_stop_token_ids": [end]}
    answer = served.generate(PROMPT, max_tokens=NEW_TOKENS, **options)
    assert answer.tokens == tokens[: tokens.index(end) + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)


def refuses(served: Served, field: str, value: object) -> bool:
    """Whether the backend refuses a sampling field; it must then say which."""
    try:
        served.generate(PROMPT, **{field: value})
    except XloomError as error:
        refusal = error
    else:
        return False
    assert refusal.code == "unsupported_sampling"
    assert field in refusal.message
    return True


def test_a_seed_makes_sampling_reproducible_or_is_refused_by_name(served: Served) -> None:
    options = {"temperature": 1.0, "max_tokens": 24}
    if refuses(served, "seed", 7):
        assert len(served.generate(PROMPT, **options).tokens) == 24
        return
    first = served.generate(PROMPT, seed=7, **options).tokens
    crowd = [served.start(prompt, seed=number, **options)[1] for number, prompt in enumerate(PROMPTS[:4])]
    assert served.generate(PROMPT, seed=7, **options).tokens == first  # others beside it change nothing
    assert served.generate(PROMPT, seed=8, **options).tokens != first
    for future in crowd:
        future.result(ANSWER_S)


@pytest.mark.parametrize(("field", "value"), [("logprobs", 2), ("min_tokens", 4), ("seed", 1)])
def test_what_it_cannot_do_is_refused_by_name(served: Served, field: str, value: object) -> None:
    if refuses(served, field, value):
        return
    answer = served.generate(PROMPT, **{field: value})
    assert len(answer.tokens) == 16
    if field == "logprobs":
        assert [max(scores, key=scores.__getitem__) for scores in answer.logprobs] == answer.tokens


def test_sampling_heeds_top_k(served: Served) -> None:
    greedy = served.generate(PROMPT, max_tokens=NEW_TOKENS).tokens
    assert served.generate(PROMPT, max_tokens=NEW_TOKENS, temperature=1.0, top_k=1).tokens == greedy
    hot = served.generate(PROMPT, max_tokens=NEW_TOKENS, temperature=2.0).tokens
    assert hot != greedy


def test_a_biased_token_is_made_or_the_bias_is_refused(served: Served) -> None:
    if not refuses(served, "logit_bias", {77: 100.0}):
        assert served.generate(PROMPT, max_tokens=4, logit_bias={77: 100.0}).tokens == [77] * 4


def test_penalties_count_the_tokens_made_and_repetition_the_prompts_too(served: Served) -> None:
    model = load_model(served.model)
    prompt = [40] * 6

    def expected(presence: float = 0.0, frequency: float = 0.0, repetition: float = 1.0) -> list[int]:
        made: list[int] = []
        for _ in range(NEW_TOKENS):
            logits = peft_logits(model, prompt + made)[-1].clone()
            for token in set(prompt + made):
                logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
            for token in set(made):
                logits[token] -= presence + frequency * made.count(token)
            made.append(int(logits.argmax()))
        return made

    plain = served.generate(prompt, max_tokens=NEW_TOKENS).tokens
    for penalties in ({"presence": 1.5, "frequency": 0.7}, {"repetition": 1.8}):
        fields = {f"{name}_penalty": value for name, value in penalties.items()}
        found = served.generate(prompt, max_tokens=NEW_TOKENS, **fields).tokens
        assert found == expected(**penalties) != plain


def test_answers_differ_from_prompt_to_prompt(served: Served) -> None:
    """Or the other tests could not tell prompts apart."""
    answers = {tuple(served.generate(prompt, max_tokens=4).tokens) for prompt in PROMPTS}
    assert len(answers) > 3


def test_closing_leaves_no_process_and_no_thread_to_wait_for(served: Served) -> None:
    def helpers() -> list[psutil.Process]:
        return [
            child
            for child in psutil.Process().children(recursive=True)
            if child.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(child.cmdline())
        ]  # Python's own resource tracker lives as long as we do

    served.close()
    wait_for(lambda: not helpers(), "the engine's processes gone", 30)
    waited_for = [thread for thread in threading.enumerate() if not thread.daemon]
    assert waited_for == [threading.main_thread()] or all(
        "asyncio" in thread.name or thread is threading.main_thread() for thread in waited_for
    )
