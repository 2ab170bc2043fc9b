"""What becomes of a request whose replica is lost."""

from __future__ import annotations

from typing import Any

import pytest

from xloom.protocol import TokenRequest, XloomError
from xloom.router.replay import MAX_ATTEMPTS, replay


def request(**sampling: Any) -> TokenRequest:
    return TokenRequest("r", [1, 2, 3], sampling)


def test_it_goes_on_from_the_tokens_so_far_with_smaller_limits() -> None:
    went_on = replay(request(max_tokens=10, min_tokens=6), [7, 8], attempts=1)
    assert went_on.prompt_token_ids == [1, 2, 3, 7, 8]
    assert went_on.sampling == {"max_tokens": 8, "min_tokens": 4}
    assert went_on.num_client_tokens == 3


def test_the_first_request_is_left_as_it_was() -> None:
    first = request(max_tokens=10, min_tokens=6)
    replay(first, [7, 8], attempts=1)
    assert first == request(max_tokens=10, min_tokens=6)


def test_without_tokens_it_starts_again_whatever_its_parameters() -> None:
    first = request(presence_penalty=1.0, structured_outputs={"regex": "a"}, prompt_logprobs=1)
    assert replay(first, [], attempts=1) == first


@pytest.mark.parametrize(
    "field",
    [
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"structured_outputs": {"json": {}}},
        {"prompt_logprobs": 1},
        {"bad_words": ["x"]},
    ],
    ids=lambda field: next(iter(field)),
)
def test_state_over_generated_tokens_can_not_be_moved(field: dict[str, Any]) -> None:
    with pytest.raises(XloomError) as caught:
        replay(request(max_tokens=10, **field), [7], attempts=1)
    assert caught.value.code == "replica_lost"
    assert caught.value.status == 503


def test_repetition_penalty_and_logprobs_can_be_moved() -> None:
    assert replay(request(max_tokens=10, repetition_penalty=1.2, logprobs=5), [7], 1).sampling["max_tokens"] == 9


def test_it_is_given_up_after_the_last_attempt() -> None:
    replay(request(max_tokens=10), [7], MAX_ATTEMPTS - 1)
    with pytest.raises(XloomError) as caught:
        replay(request(max_tokens=10), [7], MAX_ATTEMPTS)
    assert caught.value.code == "replica_lost"
