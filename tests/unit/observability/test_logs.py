from __future__ import annotations

import asyncio
import io
import json
import logging
import logging.config
from collections.abc import Iterator
from datetime import datetime
from logging.handlers import MemoryHandler
from typing import Any

import pytest

from xloom.observability import logs
from xloom.settings import LogSettings

SECRET = "s3cr3t-key"
TOUCHED = ("ray.serve", "xloom", "opentelemetry")


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    before = []
    for name in TOUCHED:
        logger = logging.getLogger(name)
        before.append((logger, list(logger.handlers), logger.propagate, logger.level))
    yield
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def serve_file() -> io.StringIO:
    """What Serve sets up in a replica: its logger, a buffer, and a file behind it."""
    written = io.StringIO()
    logger = logging.getLogger("ray.serve")
    logger.handlers = [MemoryHandler(1, target=logging.StreamHandler(written))]
    logger.setLevel("INFO")
    return written


def configure(format: str = "json", level: str = "INFO", *secrets: str) -> None:
    settings = LogSettings(format=format, level=level)  # type: ignore[arg-type]
    logs.configure(settings, "router", "router-1", [SECRET, *secrets])


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_a_record_is_one_json_line_with_its_room(serve_file: io.StringIO) -> None:
    configure()
    logging.getLogger("xloom.router.dispatch").warning("two\nlines of %s", "text")
    [line] = lines(serve_file)
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    assert line == {
        "level": "WARNING",
        "logger": "xloom.router.dispatch",
        "message": "two\nlines of text",
        "room": "router",
        "id": "router-1",
    }


def test_an_exception_is_a_field_of_its_line(serve_file: io.StringIO) -> None:
    configure()
    try:
        raise ValueError("wrong")
    except ValueError:
        logging.getLogger("xloom.x").exception("failed")
    [line] = lines(serve_file)
    assert line["message"] == "failed"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: wrong")


def test_records_carry_the_fields_given_and_those_of_their_request(serve_file: io.StringIO) -> None:
    configure()
    logger = logging.getLogger("xloom.x")

    async def serve(identity: str) -> None:
        logs.bind(request_id=identity)
        await asyncio.sleep(0)
        await asyncio.create_task(tell())

    async def tell() -> None:
        logger.info("served", extra=logs.fields(tokens=3))

    async def both() -> None:
        await asyncio.gather(serve("one"), serve("two"))
        logger.info("of nobody")

    asyncio.run(both())
    said = lines(serve_file)
    assert [(line.get("request_id"), line.get("tokens")) for line in said] == [("one", 3), ("two", 3), (None, None)]


def test_a_record_keeps_its_request_when_it_is_written_later() -> None:
    written = io.StringIO()
    buffer = MemoryHandler(100, target=logging.StreamHandler(written))
    logging.getLogger("ray.serve").handlers = [buffer]
    configure()

    async def serve() -> None:
        logs.bind(request_id="early")
        logging.getLogger("xloom.x").info("said")

    asyncio.run(serve())
    assert not written.getvalue()
    buffer.flush()
    assert lines(written)[0]["request_id"] == "early"


def test_text_says_the_same_on_one_line(serve_file: io.StringIO) -> None:
    configure("text")
    logging.getLogger("xloom.x").info("ended", extra=logs.fields(request_id="abc", tokens=3))
    [line] = serve_file.getvalue().splitlines()
    assert line.endswith("Z INFO router-1 xloom.x: ended request_id=abc tokens=3")


@pytest.mark.parametrize("format", ["json", "text"])
@pytest.mark.parametrize(
    ("message", "arguments", "told"),
    [
        (f"the key is {SECRET}", (), {}),
        ("the key is %s", (SECRET,), {}),
        ("Authorization: Bearer abc.def-123", (), {}),
        ("headers %s", ({"authorization": "bearer abc.def-123", "more": 1},), {}),
        ("HF_TOKEN=hf_abcdefghijklmn", (), {}),
        ("", (), {"given": f"x{SECRET}x"}),
        ("", (), {"given": [f"{SECRET}"]}),
        ("", (), {"given": {"deep": SECRET}}),
    ],
)
def test_secrets_are_hidden(
    serve_file: io.StringIO, format: str, message: str, arguments: tuple[Any, ...], told: dict[str, Any]
) -> None:
    configure(format)
    logging.getLogger("xloom.x").info(message, *arguments, extra=logs.fields(**told))
    written = serve_file.getvalue()
    assert logs.HIDDEN in written
    for secret in (SECRET, "abc.def-123", "hf_abc"):
        assert secret not in written


@pytest.mark.parametrize("format", ["json", "text"])
def test_secrets_are_hidden_in_tracebacks(serve_file: io.StringIO, format: str) -> None:
    configure(format)
    try:
        raise ValueError(f"refused: {SECRET}")
    except ValueError:
        logging.getLogger("xloom.x").exception("failed", stack_info=True)
    assert logs.HIDDEN in serve_file.getvalue()
    assert SECRET not in serve_file.getvalue()


def test_a_secret_that_json_would_escape_is_hidden(serve_file: io.StringIO) -> None:
    awkward = 'quo"te\\é'
    configure("json", "INFO", awkward)
    logging.getLogger("xloom.x").info("Bearer %s, %s", awkward, awkward, extra=logs.fields(given=[awkward]))
    [line] = lines(serve_file)
    assert line["message"] == f"Bearer {logs.HIDDEN}, {logs.HIDDEN}"
    assert "quo" not in serve_file.getvalue()


def test_a_key_that_a_client_has_sent_is_hidden_from_then_on(serve_file: io.StringIO) -> None:
    configure("json", "INFO")
    logs.hide("sent-by-a-client")
    logging.getLogger("xloom.x").info("model %s", "sent-by-a-client", extra=logs.fields(given="sent-by-a-client"))
    [line] = lines(serve_file)
    assert line["message"] == f"model {logs.HIDDEN}"
    assert "sent-by-a-client" not in serve_file.getvalue()


def test_the_level_holds_and_serves_own_records_have_the_same_format(serve_file: io.StringIO) -> None:
    configure("json", "WARNING")
    logging.getLogger("xloom.x").info("too quiet")
    logging.getLogger("xloom.x").warning("loud enough")
    logging.getLogger("ray.serve").info("Serve says %s", SECRET)
    assert [(line["logger"], line["message"]) for line in lines(serve_file)] == [
        ("xloom.x", "loud enough"),
        ("ray.serve", f"Serve says {logs.HIDDEN}"),
    ]


def test_a_librarys_records_can_be_taken_over(serve_file: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root, "level", logging.CRITICAL)  # what a library's `basicConfig` may leave
    configure()
    library = logging.getLogger("some_library")
    library.handlers = [logging.StreamHandler(io.StringIO())]
    logs.adopt("some_library")
    logging.getLogger("some_library.part").warning("said")
    assert lines(serve_file)[0]["logger"] == "some_library.part"


def test_a_collector_that_is_away_is_complained_of_once(serve_file: io.StringIO) -> None:
    configure()
    for _ in range(5):
        logging.getLogger("opentelemetry.exporter").error("Failed to export")
        logging.getLogger("xloom.x").error("ours")
    said = [line["message"] for line in lines(serve_file)]
    assert said.count("Failed to export") == 1
    assert said.count("ours") == 5


def test_a_library_that_configures_logging_anew_silences_nobody(serve_file: io.StringIO) -> None:
    configure()
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})  # as vLLM does
    logging.getLogger("xloom.x").info("ours")
    logging.getLogger("ray.serve").info("Serve's")
    assert [line["message"] for line in lines(serve_file)] == ["ours", "Serve's"]


def test_configuring_twice_writes_each_record_once(serve_file: io.StringIO) -> None:
    configure("text")
    configure("json")
    logging.getLogger("xloom.x").info("once")
    assert [line["message"] for line in lines(serve_file)] == ["once"]


def test_serve_is_told_format_and_level() -> None:
    from ray.serve.schema import LoggingConfig

    config = LoggingConfig(**logs.serve_logging(LogSettings(format="json", level="WARNING")))
    assert (config.encoding, config.log_level, config.enable_access_log) == ("JSON", "WARNING", False)
