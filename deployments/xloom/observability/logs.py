"""Logs of xloom's processes: a line a record, as text or JSON, with the request it belongs to and without secrets.

In Serve's replicas the records go where Serve's own go, into its rotating files, in one format with them. Relies on
Ray 2.60: `ray.serve._private.logging_utils.configure_component_logger`, which gives the logger `ray.serve` a
`MemoryHandler` before a file, set up before the deployment's constructor runs.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import MemoryHandler
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xloom.settings import LogSettings

HIDDEN = "***"
_RATE_LIMIT_S = 60.0  # how often OpenTelemetry may say the same
_RAY_CONTEXT = {"node_id": "node", "worker_id": "worker"}  # what Serve's filters put on records when it logs JSON

_bound: ContextVar[Mapping[str, str] | None] = ContextVar("xloom_log_fields", default=None)
_handlers: list[logging.Handler] = []


def bind(**fields: str) -> None:
    """Put these fields into all that this task logs from now on, and the tasks it starts."""
    _bound.set({**(_bound.get() or {}), **fields})


def bound() -> Mapping[str, str]:
    """The fields of the request that this task serves."""
    return _bound.get() or {}


def fields(**values: Any) -> dict[str, Any]:
    """The `extra` of a logging call that adds fields to its record."""
    return {"fields": values}


_met: set[str] = set()  # keys that clients have sent to this process


def hide(secret: str) -> None:
    """Leave a secret out of this process's logs from now on."""
    _met.add(secret)


def holds_key(text: str) -> bool:
    """Whether a client's key is a word of a text: other processes don't know the key, and would log it."""
    return any(re.search(rf"(?<![A-Za-z0-9]){re.escape(key)}(?![A-Za-z0-9])", text) for key in _met)


class Redactor:
    """Hides secrets in text: those it was told, those met since, what follows `Bearer` or looks like a hub token."""

    def __init__(self, secrets: Iterable[str | None] = ()) -> None:
        self._told = {secret for secret in secrets if secret}
        self._compile(frozenset())

    def _compile(self, met: frozenset[str]) -> None:
        self._met = met
        known = [re.escape(each) for each in sorted(self._told | met, key=len, reverse=True)]
        borne = "|".join([*known, r"[^\s\"',;]+"])
        parts = [rf"(?P<scheme>\b(?i:bearer)\s+)(?:{borne})", r"\bhf_[A-Za-z0-9]{8,}", *known]
        self._pattern = re.compile("|".join(parts))

    def __call__(self, text: str) -> str:
        if len(self._met) != len(_met):
            self._compile(frozenset(_met))
        return self._pattern.sub(lambda found: (found["scheme"] or "") + HIDDEN, text)


class _Formatter(logging.Formatter):
    """What both formats share. `member` is the router's or replica's id."""

    def __init__(self, component: str, member: str, redact: Redactor) -> None:
        super().__init__()
        self._component, self._member, self._redact = component, member, redact

    def _clean(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._redact(value)
        if isinstance(value, Mapping):
            return {str(name): self._clean(each) for name, each in value.items()}
        return [self._clean(each) for each in value] if isinstance(value, list | tuple | set) else value

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        return {name: self._clean(value) for name, value in getattr(record, "fields", {}).items()}

    def _trouble(self, record: logging.LogRecord) -> str | None:
        """The traceback, with the stack if one was asked for."""
        parts = [self.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
        if record.stack_info:
            parts.append(record.stack_info)
        return self._redact("\n".join(parts)) if parts else None


class JsonFormatter(_Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, room, id, and the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "level": record.levelname,
            "logger": record.name,
            "message": self._redact(record.getMessage()),
            "room": self._component,
            "id": self._member,
        }
        for attribute, name in _RAY_CONTEXT.items():
            if value := getattr(record, attribute, None):
                line[name] = value
        line |= {name: value for name, value in self._fields(record).items() if name not in line}
        if (trouble := self._trouble(record)) is not None:
            line["exception"] = trouble
        return json.dumps(line, default=lambda value: self._redact(str(value)))


class TextFormatter(_Formatter):
    """Time (UTC), level, id, logger, message, then the fields as `key=value`; a traceback below."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        parts = [f"{moment}Z {record.levelname} {self._member} {record.name}: {self._redact(record.getMessage())}"]
        parts += [f"{name}={value}" for name, value in self._fields(record).items()]
        trouble = self._trouble(record)
        return " ".join(parts) + (f"\n{trouble}" if trouble is not None else "")


class _RequestFields(logging.Filter):
    """Notes on a record which request was served as it was made; the formatter may run later and elsewhere."""

    def filter(self, record: logging.LogRecord) -> bool:
        vars(record)["fields"] = {**bound(), **getattr(record, "fields", {})}
        return True


class _RateLimit(logging.Filter):
    """Lets OpenTelemetry complain of a collector that is away about once a minute, not at each try."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, int], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("opentelemetry"):
            return True
        place, now = (record.pathname, record.lineno), time.monotonic()
        if now - self._said.get(place, -_RATE_LIMIT_S) < _RATE_LIMIT_S:
            return False
        self._said[place] = now
        return True


def configure(settings: LogSettings, component: str, member: str, secrets: Iterable[str | None] = ()) -> None:
    """Give this process's logs their format: those of xloom, and in a Serve replica those of Serve.

    Elsewhere they go to standard error.
    """
    handlers = list(logging.getLogger("ray.serve").handlers) or [logging.StreamHandler()]
    kind = JsonFormatter if settings.format == "json" else TextFormatter
    formatter = kind(component, member, Redactor(secrets))
    for handler in handlers:
        handler.filters = [each for each in handler.filters if not isinstance(each, _RequestFields | _RateLimit)]
        handler.addFilter(_RateLimit())
        handler.addFilter(_RequestFields())
        writer: logging.Handler = handler
        if isinstance(handler, MemoryHandler):
            writer = handler.target or handler
            # `dictConfig`, which vLLM calls at its import and again with each engine's configuration, closes every
            # handler there is: a file opens again, but this one would lose its file for good.
            handler.close = handler.flush  # type: ignore[method-assign]
        writer.setFormatter(formatter)
    _handlers[:] = handlers
    logging.getLogger("xloom").setLevel(settings.level)
    adopt("xloom", "opentelemetry")


def adopt(*names: str) -> None:
    """Have these libraries' loggers write where xloom's write, instead of where they chose; after their import.

    A library without a level of its own gets xloom's: the root logger's is set by whoever calls `basicConfig` first.
    """
    level = logging.getLogger("xloom").level
    for name in names:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(level)
        logger.handlers = list(_handlers)
        logger.propagate = False


def serve_logging(settings: LogSettings) -> dict[str, Any]:
    """Serve's `LoggingConfig` of a deployment: its level, and with JSON what its filters add to records."""
    return {
        "encoding": "JSON" if settings.format == "json" else "TEXT",
        "log_level": settings.level,
        "enable_access_log": False,  # each router asks each replica where it is, all the time
    }
