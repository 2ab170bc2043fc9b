"""A release whose endpoint is open starts only where that is meant, and one with keys needs nothing more."""

from __future__ import annotations

import pytest
import yaml

from tests.unit.chart.rendering import Values, one, render
from xloom.protocol import XloomError
from xloom.router.exposure import check_exposure
from xloom.settings import RouterSettings, parse_settings

OPEN: Values = {"auth": {"existingSecret": "", "allowAnonymous": True}}


def router(values: Values) -> RouterSettings:
    """What a pod's router is given, the keys of the Secret apart."""
    config = yaml.safe_load(one(render(values), "RayService")["spec"]["serveConfigV2"])
    return parse_settings(config["applications"][0]["args"], with_keys=False).router


def test_an_open_endpoint_is_said_to_be_meant() -> None:
    """As the first command of docs/kubernetes.md has it: without, every router would refuse to start."""
    check_exposure(router(OPEN))
    assert router(OPEN).allow_anonymous


@pytest.mark.parametrize("values", [{}, {"auth": {"allowAnonymous": True}}], ids=["keys", "keys, and open besides"])
def test_where_there_are_keys_a_router_without_them_does_not_start(values: Values) -> None:
    given = router(values)
    with pytest.raises(XloomError) as caught:
        check_exposure(given)
    assert caught.value.code == "endpoint_without_keys"
    check_exposure(given.model_copy(update={"api_key": "k"}))
