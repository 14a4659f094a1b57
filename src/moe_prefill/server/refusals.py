"""Why a request is not answered: an HTTP status, a stable word, and a message with value, limit and remedy."""

from __future__ import annotations

from ..errors import ModelError, MoePrefillError, PlanError, RowError, TaskError, UsageError, WorkerError


class Refused(MoePrefillError):
    """A request that gets an error for its answer.

    ``code`` is a short stable word, also counted in the metrics. ``param`` names the field at fault. With
    ``retry_after_s`` the same request may succeed later.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


def bad_request(code: str, message: str, param: str | None = None) -> Refused:
    return Refused(400, code, message, param=param)


def too_many(message: str, param: str | None = None) -> Refused:
    """More entries in one request than the server takes: fewer of them would be answered."""
    return Refused(422, "batch_too_large", message, param=param)


def overloaded(message: str, retry_after_s: int) -> Refused:
    return Refused(429, "overloaded", message, retry_after_s=retry_after_s)


def unavailable(code: str, message: str, retry_after_s: int) -> Refused:
    return Refused(503, code, message, retry_after_s=retry_after_s)


def refusal_of(error: Exception) -> Refused:
    """Any error as what the client is told. What is no one's mistake but ours says nothing of its inside."""
    match error:
        case Refused():
            return error
        case RowError():
            return bad_request(error.code, str(error))
        case TaskError():
            return bad_request("bad_task", str(error))
        case WorkerError():
            return unavailable("engine_lost", "the engine is not available; its log says why", 30)
        case UsageError() | ModelError() | PlanError():
            return bad_request(type(error).__name__, str(error))
    return Refused(500, "internal_error", "this is a bug in the server; its log has the details under the request's id")
