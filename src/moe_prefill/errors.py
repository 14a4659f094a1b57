"""Errors that a user can cause, each with the value met, the limit and the remedy.

Two kinds of failure exist in this project. A user's mistake raises one of the classes below, before any work is lost.
A programmer's mistake fails an ``assert`` with the facts. ``RowError`` is special: it belongs to one row of a table, is
written to that row's error column, and never stops its neighbours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Self


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The closest of ``names`` as a remark behind an unknown one, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class MoePrefillError(Exception):
    """Base of every error meant for a user's eyes; ``exit_code`` is what the command line returns for it.

    ``setting``: the field of a config that the message begins with; the command line names its flag there.
    """

    exit_code = 1
    setting: str | None = None

    @classmethod
    def about(cls, setting: str, text: str) -> Self:
        """An error whose message is the name of a setting and ``text``."""
        error = cls(f"{setting} {text}")
        error.setting = setting
        return error


class UsageError(MoePrefillError):
    """Options that contradict each other, are out of range, or name something that does not exist."""

    exit_code = 2


class InputError(MoePrefillError):
    """The input table cannot be read: missing, unreadable, empty, not UTF-8, or without a column that is needed."""

    exit_code = 3


class TaskError(MoePrefillError):
    """The task cannot be carried out for any row: labels that clash, unknown placeholders, too many options."""

    exit_code = 4


class ModelError(MoePrefillError):
    """The checkpoint cannot be used: unsupported architecture or field, missing or damaged tensors, wrong shapes."""

    exit_code = 5


class PlanError(MoePrefillError):
    """The model, or one request, does not fit the memory that it was given."""

    exit_code = 6


class OutputError(MoePrefillError):
    """The output exists, cannot be written, or belongs to another job."""

    exit_code = 7


class WorkerError(MoePrefillError):
    """A worker process of the group is gone, hangs, or did not answer in time; its rows have not been lost."""

    exit_code = 8


class Overloaded(MoePrefillError):
    """The frontend's queue is full. ``retry_after_s`` is the predicted time until what is queued has been computed."""

    exit_code = 9

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RowError(MoePrefillError):
    """One row cannot be answered.

    ``code`` is a short stable word for counting (``empty_text``, ``too_long``, ``label_boundary``, ...); the message
    says what was met, what the limit is and what helps.
    """

    exit_code = 1

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def kept(self) -> RowError:
        """This error, to be kept as a row's answer: without the frames that it came through, whose texts and ids would
        stay in memory as long as it does.
        """
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self
