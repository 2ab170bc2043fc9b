"""OpenTelemetry traces of one process, sent by OTLP in the background. The packages are the extra `traces`.

The context crosses from router to replica in `TokenRequest.trace`, as W3C's header fields.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from xloom.observability.logs import bind
from xloom.protocol import XloomError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from xloom.settings import TraceSettings

SEND_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 3.0

_MODULES = {
    "http": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
}


def require(settings: TraceSettings) -> None:
    """Raise `XloomError` (traces_not_installed) when traces are asked for and can't be sent."""
    if settings.endpoint is None:
        return
    for name in ("opentelemetry.sdk.trace", _MODULES[settings.protocol]):
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # of a parent
            found = False
        if not found:
            raise XloomError(
                "traces_not_installed",
                f"observability.traces.endpoint is set, and {name.rpartition('.')[0]} is not installed.",
                "pip install 'xloom[traces]', or leave the endpoint out.",
                500,
            )


def start(settings: TraceSettings, component: str, member: str) -> Tracing | None:
    """Tracing of this process; None when no endpoint is set. Raises `XloomError` (traces_not_installed)."""
    if settings.endpoint is None:
        return None
    require(settings)
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return Tracing(
        BatchSpanProcessor(_exporter(settings.endpoint, settings.protocol)), component, member, settings.sample
    )


def _exporter(endpoint: str, protocol: str) -> SpanExporter:
    """Headers and certificates come from the environment, by OpenTelemetry's own names."""
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint=endpoint, timeout=SEND_TIMEOUT_S)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter(endpoint=traces_url(endpoint), timeout=SEND_TIMEOUT_S)


def traces_url(endpoint: str) -> str:
    """Where OTLP over HTTP is sent: a URL with a path as it is, else with OTLP's own path."""
    scheme, _, rest = endpoint.partition("://")
    host, _, path = rest.partition("/")
    return endpoint if path else f"{scheme}://{host}/v1/traces"


class Tracing:
    """Makes this process's spans."""

    def __init__(self, processor: SpanProcessor, component: str, member: str, sample: float = 1.0) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        version = importlib.metadata.version("xloom")
        about = {
            "service.namespace": "xloom",
            "service.name": f"xloom-{component}",
            "service.version": version,
            "service.instance.id": member,
        }
        # Not OpenTelemetry's global provider: libraries in this process have spans of their own, nobody asked for.
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample)), resource=Resource.create(about), shutdown_on_exit=False
        )
        self._processor = processor
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("xloom", version)
        self._propagator = TraceContextTextMapPropagator()

    def http(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]], identity: str) -> HttpSpan:
        """The span of an HTTP request, which continues the client's trace where it sent one."""
        from opentelemetry.trace import SpanKind

        sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        about = {"http.request.method": method, "url.path": path, "xloom.request.id": identity}
        context = self.context({name: sent[name] for name in ("traceparent", "tracestate") if name in sent})
        return HttpSpan(self._tracer.start_span(method, context, SpanKind.SERVER, about), method)

    def context(self, carrier: dict[str, str]) -> Context:
        """The context that another process sent; an empty one where it sent none, or nonsense."""
        from opentelemetry.context import Context

        return self._propagator.extract(carrier, Context())

    def carrier(self, span: Span) -> dict[str, str]:
        """What another process needs to continue below a span."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier

    def child(self, parent: Span, name: str, attributes: dict[str, Any]) -> Span:
        """A span below one of this process."""
        from opentelemetry.trace import set_span_in_context

        return self._tracer.start_span(name, set_span_in_context(parent), attributes=attributes)

    def request(self, name: str, context: Context | None, attributes: dict[str, Any], *, remote: bool) -> Span:
        """A generation's span: below `context`, or below this task's span; `remote`: another process waits for it."""
        from opentelemetry.trace import SpanKind

        kind = SpanKind.SERVER if remote else SpanKind.CLIENT
        return self._tracer.start_span(name, context, kind, attributes)

    def close(self) -> None:
        """Send what is left, for so long; then stop."""
        # A daemon: a collector that hangs must not hold up the process's end.
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(CLOSE_TIMEOUT_S)
        if ending.is_alive() and (exporter := getattr(self._processor, "span_exporter", None)) is not None:
            exporter.shutdown()  # which ends its retries


class HttpSpan(AbstractContextManager[None]):
    """One HTTP request: inside the `with` block it is this task's span, and log lines name it."""

    def __init__(self, span: Span, method: str) -> None:
        self.span, self._method = span, method

    def __enter__(self) -> None:
        from opentelemetry.context import attach
        from opentelemetry.trace import set_span_in_context

        bind(**ids(self.span))
        self._token = attach(set_span_in_context(self.span))

    def __exit__(self, *_: object) -> None:
        from opentelemetry.context import detach

        detach(self._token)

    def end(self, status: int, route: str | None) -> None:
        """It was answered with a status (0: not at all), by the route with this pattern."""
        from opentelemetry.trace import StatusCode

        if route is not None:
            self.span.update_name(f"{self._method} {route}")
            self.span.set_attribute("http.route", route)
        if status:
            self.span.set_attribute("http.response.status_code", status)
        if status == 0 or status >= 500:
            self.span.set_attribute("error.type", str(status) if status else "no_answer")
            self.span.set_status(StatusCode.ERROR)
        self.span.end()


def ids(span: Span) -> dict[str, str]:
    """A span's ids as log lines carry them: hexadecimal."""
    from opentelemetry.trace import format_span_id, format_trace_id

    context = span.get_span_context()
    return {"trace_id": format_trace_id(context.trace_id), "span_id": format_span_id(context.span_id)}
