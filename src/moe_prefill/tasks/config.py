"""What a user states about a task: frozen records from which the command line, a task file and Python all build."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import TaskError

Normalize = Literal["candidates", "vocabulary"]
Boundary = Literal["strict", "split"]
Truncate = Literal["error", "left", "right", "middle"]
Identifiers = Literal["letters", "digits"]
_IDENTIFIERS: dict[Identifiers, tuple[str, ...]] = {
    "letters": tuple(string.ascii_uppercase),
    "digits": tuple("123456789"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A class: ``word`` is the text that is scored (default: ``name``), ``description`` goes into the prompt."""

    name: str
    word: str | None = None
    description: str | None = None

    @property
    def text(self) -> str:
        return self.name if self.word is None else self.word


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """What all tasks have in common.

    ``template`` is the prompt with ``{column}`` placeholders; None takes the task's built-in one, which reads
    ``text_column``. ``label_prefix`` goes between the context and every candidate; None decides: nothing with ``chat``
    or where the template ends with white space, else one space. ``truncate`` says where the row's longest text is cut
    when the prompt exceeds the limit; "error" cuts nothing. ``chat_date`` (ISO) is what a chat template sees as today.
    """

    template: str | None = None
    text_column: str = "text"
    system: str | None = None
    chat: bool = False
    chat_date: str | None = None
    label_prefix: str | None = None
    boundary: Boundary = "strict"
    truncate: Truncate = "error"
    output_prefix: str = ""

    def __post_init__(self) -> None:
        if self.system is not None and not self.chat:
            raise TaskError("a system prompt needs the chat template: add --chat (chat = true in a task file)")
        one_of("boundary", self.boundary, ("strict", "split"))
        one_of("truncate", self.truncate, ("error", "left", "right", "middle"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyConfig(TaskConfig):
    """One of ``labels`` for every row. ``label_end`` closes every label: a text, or "<eos>" for the end token."""

    labels: tuple[Label, ...]
    normalize: Normalize = "candidates"
    length_normalize: bool = False
    label_end: str | None = None

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        one_of("normalize", self.normalize, ("candidates", "vocabulary"))
        if not self.labels:
            raise TaskError("classify needs labels: give --labels first,second,... (labels = [...] in a task file)")
        need_texts("label", [label.text for label in self.labels])
        names = [label.name for label in self.labels]
        double = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if double is not None:
            raise TaskError(f"label {double!r} is given twice; every label has one probability")
        if len(names) == 1 and self.normalize == "candidates":
            raise TaskError(
                f"label {names[0]!r} is the only one, so its probability is always 1; give more labels, or "
                "--normalize vocabulary for its share of all tokens"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChooseConfig(TaskConfig):
    """One of the row's options. They are fixed (``options``), one a column (``option_columns``), or a list column.

    ``names``: the identifiers that options can have, in order.
    """

    options: tuple[str, ...] = ()
    option_columns: tuple[str, ...] = ()
    options_column: str | None = None
    identifiers: Identifiers = "letters"
    normalize: Normalize = "candidates"

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        one_of("identifiers", self.identifiers, ("letters", "digits"))
        one_of("normalize", self.normalize, ("candidates", "vocabulary"))
        given = sum((bool(self.options), bool(self.option_columns), self.options_column is not None))
        if given != 1:
            raise TaskError(
                "choose takes its options from exactly one of options, option_columns and options_column; "
                f"{given} of them were given"
            )
        need_texts("option", self.options)

    @property
    def names(self) -> tuple[str, ...]:
        return _IDENTIFIERS[self.identifiers]


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidatesConfig(TaskConfig):
    """Common to select and rank: candidates (fixed, or from a list column) and the words that accept and reject one."""

    candidates: tuple[str, ...] = ()
    candidates_column: str | None = None
    yes: str = "Yes"
    no: str = "No"

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        if bool(self.candidates) == (self.candidates_column is not None):
            raise TaskError("candidates come from exactly one of candidates and candidates_column")
        need_texts("candidate", self.candidates)
        need_texts("yes or no", (self.yes, self.no))


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectConfig(CandidatesConfig):
    """All candidates whose probability of ``yes`` is at least ``threshold``."""

    threshold: float = 0.5

    def __post_init__(self) -> None:
        CandidatesConfig.__post_init__(self)
        if not 0.0 <= self.threshold <= 1.0:
            raise TaskError.about("threshold", f"is {self.threshold}; it is a probability between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConfig(CandidatesConfig):
    """The candidates from best to worst; ``top_n`` keeps the best ones only."""

    top_n: int | None = None

    def __post_init__(self) -> None:
        CandidatesConfig.__post_init__(self)
        if self.top_n is not None and self.top_n < 1:
            raise TaskError.about("top_n", f"is {self.top_n}; it is at least 1 (leave it out to keep all)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig(TaskConfig):
    """Log-probabilities of a continuation, of a document, or of given ids at given positions.

    Text: ``continuation`` is a template (default: the text column) and ``template`` the context before it (default:
    none, the continuation is a document). Ids: ``token_ids_column`` holds the prompt as ids, ``positions_column`` the
    asked positions (default: all that have a next token), ``candidate_ids_column`` a list of ids for each of them
    (default: the next token).
    """

    continuation: str | None = None
    token_ids_column: str | None = None
    positions_column: str | None = None
    candidate_ids_column: str | None = None
    top_k: int = 0

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        if not 0 <= self.top_k <= 1000:
            raise TaskError.about("top_k", f"is {self.top_k}; it is between 0 and 1000")
        if self.token_ids_column is None and (self.positions_column or self.candidate_ids_column):
            raise TaskError("positions_column and candidate_ids_column need token_ids_column")
        if self.token_ids_column is not None and (self.template or self.continuation or self.chat):
            raise TaskError("token_ids_column is the whole prompt: it excludes template, continuation and chat")
        if self.chat and self.template is None:
            raise TaskError("score with chat needs a template: it becomes the user's message before the continuation")


def need_texts(what: str, texts: Sequence[str]) -> None:
    """Raise TaskError for a text that is empty or nothing but white space."""
    for i, text in enumerate(texts):
        if not text.strip():
            raise TaskError(f"{what} {i + 1} is {text!r}, which has nothing to score; give it a text")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise TaskError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise TaskError.about(name, f"is {value!r}; it is one of {', '.join(allowed)}")
