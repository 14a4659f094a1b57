"""OpenTelemetry, when asked for: one span a request, under the caller's trace, with the stages' times as attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from ..errors import UsageError
from .service import Answer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


class Tracer(Protocol):
    """Told of every reply; times are nanoseconds since 1970."""

    def replied(
        self, path: str, answer: Answer, request_id: str, headers: Mapping[str, str], begin_ns: int, end_ns: int
    ) -> None: ...

    def close(self) -> None: ...


class NoTracer:
    """Nobody asked."""

    def replied(
        self, path: str, answer: Answer, request_id: str, headers: Mapping[str, str], begin_ns: int, end_ns: int
    ) -> None: ...

    def close(self) -> None: ...


class OpenTelemetry:
    """Spans by a provider of OpenTelemetry's SDK. Nothing of a prompt and no tenant is in them."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("moe_prefill.server")
        self._propagator = TraceContextTextMapPropagator()

    def replied(
        self, path: str, answer: Answer, request_id: str, headers: Mapping[str, str], begin_ns: int, end_ns: int
    ) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        times = answer.timings
        span = self._tracer.start_span(
            path,
            context=self._propagator.extract(dict(headers)),
            kind=SpanKind.SERVER,
            start_time=begin_ns,
            attributes={
                "http.route": path,
                "http.response.status_code": answer.status,
                "error.type": answer.code,
                "moe_prefill.request_id": request_id,
                "moe_prefill.prompt_tokens": answer.prompt_tokens,
                "moe_prefill.tokenize_s": times.tokenize_s,
                "moe_prefill.queue_s": times.queue_s,
                "moe_prefill.inference_s": times.inference_s,
            },
        )
        if answer.status >= 500:
            span.set_status(Status(StatusCode.ERROR, answer.code))
        span.end(end_ns)

    def close(self) -> None:
        """Send what is not yet sent."""
        self._provider.shutdown()


def tracer_of(endpoint: str | None) -> Tracer:
    """Spans to an OTLP endpoint over HTTP, such as http://collector:4318/v1/traces. Raises UsageError."""
    if endpoint is None:
        return NoTracer()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise UsageError("--otlp-endpoint needs OpenTelemetry: pip install 'moe-prefill[otel]'") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "moe-prefill"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return OpenTelemetry(provider)
