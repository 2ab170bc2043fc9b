"""How tokens are drawn: each step against transformers' own processors where it has one, else by its formula."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as theirs

from xloom.engines.transformers.sampling import Sampler, read_sampling, top_logprobs
from xloom.protocol import XloomError

VOCAB = 50
PROMPT = [3, 4, 4, 9]
MADE = [7, 9, 7]


def sampler(*, eos: tuple[int, ...] = (49,), made: tuple[int, ...] | list[int] = (), **fields: Any) -> Sampler:
    """A sampler that has made some tokens already."""
    options = {"max_tokens": 20} | fields
    found = Sampler(read_sampling(options, VOCAB), PROMPT, eos=eos, max_model_len=64, device=torch.device("cpu"))
    for token in made:
        found._made.append(token)
        found._counts[token] += 1
    return found


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 3


def kept(probabilities: torch.Tensor) -> list[int]:
    return probabilities.nonzero().flatten().tolist()


def test_without_a_temperature_the_likeliest_token_is_taken(logits: torch.Tensor) -> None:
    assert sampler(temperature=0.0).next(logits) == (int(logits.argmax()), None)


def test_repetition_penalty_is_that_of_transformers(logits: torch.Tensor) -> None:
    found = sampler(repetition_penalty=1.7, made=MADE).processed(logits)
    process = theirs.RepetitionPenaltyLogitsProcessor(1.7)
    torch.testing.assert_close(found, process(torch.tensor([PROMPT + MADE]), logits[None].clone())[0])


def test_frequency_and_presence_penalties_count_what_was_made_alone(logits: torch.Tensor) -> None:
    found = sampler(frequency_penalty=0.3, presence_penalty=0.5, made=MADE).processed(logits)
    expected = logits.clone()
    for token, count in Counter(MADE).items():
        expected[token] -= 0.3 * count + 0.5
    torch.testing.assert_close(found, expected)
    assert torch.equal(sampler(frequency_penalty=0.3, presence_penalty=0.5).processed(logits), logits)


@pytest.mark.parametrize(
    ("fields", "warper"),
    [
        ({"top_k": 5}, theirs.TopKLogitsWarper(5)),
        ({"top_p": 0.7}, theirs.TopPLogitsWarper(0.7)),
        ({"min_p": 0.1}, theirs.MinPLogitsWarper(0.1)),
        ({"temperature": 0.5}, theirs.TemperatureLogitsWarper(0.5)),
    ],
    ids=["top_k", "top_p", "min_p", "temperature"],
)
def test_what_narrows_the_choice_is_as_in_transformers(
    logits: torch.Tensor, fields: dict[str, Any], warper: Any
) -> None:
    expected = torch.softmax(warper(torch.tensor([PROMPT]), logits[None].clone())[0], dim=-1)
    torch.testing.assert_close(sampler(**fields).distribution(logits), expected)


def test_all_that_narrows_goes_in_vllms_order(logits: torch.Tensor) -> None:
    found = sampler(temperature=0.7, min_p=0.02, top_k=12, top_p=0.9).distribution(logits)
    expected, ids = logits[None] / 0.7, torch.tensor([PROMPT])
    for warper in (theirs.MinPLogitsWarper(0.02), theirs.TopKLogitsWarper(12), theirs.TopPLogitsWarper(0.9)):
        expected = warper(ids, expected)
    torch.testing.assert_close(found, torch.softmax(expected[0], dim=-1))


def test_a_top_p_near_zero_leaves_one_token(logits: torch.Tensor) -> None:
    assert kept(sampler(top_p=1e-6).distribution(logits)) == [int(logits.argmax())]


def test_bias_and_allowed_tokens_change_the_likeliest(logits: torch.Tensor) -> None:
    assert sampler(temperature=0.0, logit_bias={11: 100.0, 12: -5}).next(logits)[0] == 11
    assert sampler(temperature=0.0, allowed_token_ids=[2, 5]).next(logits)[0] in (2, 5)
    assert sorted(kept(sampler(allowed_token_ids=[2, 5]).distribution(
        sampler(allowed_token_ids=[2, 5]).processed(logits)
    ))) == [2, 5]  # fmt: skip


def test_a_bad_word_is_cut_at_its_last_token() -> None:
    words = {"_bad_words_token_ids": [[7, 9, 7, 30], [31], [9, 32]]}
    processed = sampler(made=MADE, **words).processed(torch.zeros(VOCAB))
    assert [token for token in range(VOCAB) if processed[token] == float("-inf")] == [30, 31]


def test_no_text_ends_before_its_least_length(logits: torch.Tensor) -> None:
    likely_end = logits.clone()
    likely_end[49] = 100
    options = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": [8], "_all_stop_token_ids": [8, 49]}
    assert sampler(**options, made=[1]).next(likely_end)[0] != 49
    done = sampler(**options, made=[1, 2])
    assert done.next(likely_end)[0] == 49
    assert done.end() == ("stop", None)


@pytest.mark.parametrize(
    ("fields", "made", "expected"),
    [
        ({}, [49], ("stop", None)),
        ({"ignore_eos": True}, [49], (None, None)),
        ({"_eos_token_id": 5}, [49], (None, None)),  # what the front end names goes
        ({"_eos_token_id": 5}, [5], ("stop", None)),
        ({"stop_token_ids": [6]}, [6], ("stop", 6)),
        ({"max_tokens": 2}, [1, 2], ("length", None)),
        ({"max_tokens": 2}, [1, 49], ("stop", None)),
        ({"max_tokens": None}, [1] * 59, (None, None)),
        ({"max_tokens": None}, [1] * 60, ("length", None)),  # 4 of prompt, 64 in all
        ({"max_tokens": 1000}, [1] * 60, ("length", None)),
    ],
)
def test_what_ends_a_text(fields: dict[str, Any], made: list[int], expected: tuple[str | None, int | None]) -> None:
    assert sampler(**fields, made=made).end() == expected


def test_a_seed_gives_the_same_tokens_and_none_gives_others(logits: torch.Tensor) -> None:
    def draw(seed: int | None) -> list[int]:
        drawing = sampler(seed=seed, temperature=2.0)
        return [drawing.next(logits)[0] for _ in range(30)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_tokens_are_drawn_by_their_probability(logits: torch.Tensor) -> None:
    drawing = sampler(seed=1, max_tokens=None)
    counts = Counter(drawing.next(logits)[0] for _ in range(4000))
    expected = torch.softmax(logits, dim=-1)
    for token in range(VOCAB):
        assert counts[token] / 4000 == pytest.approx(expected[token].item(), abs=0.03)


def test_log_probabilities_are_the_raw_ones_the_token_first(logits: torch.Tensor) -> None:
    token, found = sampler(temperature=0.0, logprobs=3, logit_bias={11: 100.0}).next(logits)
    raw = torch.log_softmax(logits, dim=-1)
    assert found is not None
    assert token == 11
    assert found.token_ids == [[11, *raw.topk(3).indices.tolist()]]
    assert found.logprobs[0] == pytest.approx([raw[11].item(), *raw.topk(3).values.tolist()])
    assert found.ranks == [int((raw >= raw[11]).sum())]
    assert len(top_logprobs(logits[None], [0], -1).token_ids[0]) == VOCAB + 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"structured_outputs": {"json": "{}"}}, "structured_outputs"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"repetition_detection": {"max_pattern_size": 3}}, "repetition_detection"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"n": 2}, "n"),
        ({"bad_words": ["no"]}, "bad_words"),
        ({"never_heard_of": 1}, "never_heard_of"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(XloomError) as caught:
        read_sampling(fields, VOCAB)
    assert caught.value.code == "unsupported_sampling"
    assert named in caught.value.message


def test_what_concerns_the_text_alone_is_left_to_the_front_end() -> None:
    read_sampling({"stop": ["x"], "output_kind": 1, "skip_clone": True, "detokenize": False, "watermarking": False}, 9)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_p": 0},
        {"max_tokens": 0},
        {"logit_bias": {VOCAB: 1.0}},
        {"allowed_token_ids": [-1]},
        {"_bad_words_token_ids": [[VOCAB]]},
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(XloomError) as caught:
        read_sampling(fields, VOCAB)
    assert caught.value.code == "invalid_sampling"
