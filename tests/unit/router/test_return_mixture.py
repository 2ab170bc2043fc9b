"""What a body asks to see of its mixture's gates."""

from __future__ import annotations

import json
from typing import Any

import pytest

from xloom.protocol import XloomError
from xloom.router.body import check_body
from xloom.router.return_mixture import take_return_mixture, wanted_gates
from xloom.settings import LimitSettings


def taken(body: Any) -> Any:
    take_return_mixture(check_body(json.dumps(body).encode(), LimitSettings()))
    return wanted_gates()


def test_what_is_wanted_is_kept_with_how_many_answers_and_whether_they_have_a_length() -> None:
    assert taken({"prompt": "a", "return_mixture": "tokens"}) == ("tokens", 1, False)
    assert taken({"prompt": ["a", "b"], "n": 3, "max_tokens": 4, "return_mixture": "layers"}) == ("layers", 6, True)
    assert taken({"input": "a", "max_output_tokens": 4, "return_mixture": "layers"}) == ("layers", 1, True)


@pytest.mark.parametrize("body", [{"prompt": "a"}, {"return_mixture": None}, ["return_mixture"], {"é": 1}])
def test_nothing_is_wanted(body: Any) -> None:
    assert taken({"return_mixture": "tokens"}) is not None
    assert taken(body) is None


@pytest.mark.parametrize("wanted", ["gates", 1, True, ["tokens"], {"tokens": 1}])
def test_what_is_not_known_is_refused(wanted: Any) -> None:
    with pytest.raises(XloomError, match="return_mixture") as failure:
        taken({"return_mixture": wanted})
    assert failure.value.code == "invalid_request"
