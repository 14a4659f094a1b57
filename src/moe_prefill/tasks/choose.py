"""One of a row's options, by the identifier that the prompt gives to each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core import AtomicResult, Column, EngineLimits, PreparedRow
from ..errors import RowError, TaskError
from ..text import Tokenizer
from .base import Row
from .common import LabelTask, asked_of, label_scores
from .config import ChooseConfig
from .labels import softmax
from .prompts import Ask
from .template import as_text, need_text, texts_of

_PLAIN = "{%s}\n\n{options}\n\nAnswer:"
_CHAT = "{%s}\n\n{options}\n\nReply with the letter or digit of the right option only."


class ChooseTask(LabelTask):
    """The option whose identifier is most probable after the prompt; the first of equals wins."""

    name = "choose"
    reserved = frozenset({"options"})
    outputs = (
        Column(name="choice", kind="string"),
        Column(name="choice_index", kind="int"),
        Column(name="choice_text", kind="string"),
        Column(name="probability", kind="float"),
        Column(name="probabilities", kind="float_map"),
    )

    def __init__(
        self, config: ChooseConfig, tokenizer: Tokenizer, limits: EngineLimits, columns: Sequence[str] | None = None
    ) -> None:
        source = config.template
        if source is None:
            source = (_CHAT if config.chat else _PLAIN) % config.text_column
        read = (*config.option_columns, *([config.options_column] if config.options_column else []))
        vocabulary = config.normalize == "vocabulary"
        super().__init__(config, source, tokenizer, limits, vocabulary=vocabulary, list_columns=read)
        self.check_table(columns)
        self._config = config
        self._identifiers = config.names
        fixed = len(config.options) or len(config.option_columns)
        if fixed > len(self._identifiers):
            raise TaskError(self._too_many(fixed))
        options = config.options or ("x",) * (fixed or len(self._identifiers))
        self._prompter.check(self._ask_of(self._neutral_fields(), list(options)))

    def finish(self, prepared: PreparedRow, results: Sequence[AtomicResult]) -> dict[str, object]:
        scores = label_scores(prepared, results)[0]
        values = np.exp(scores) if self._config.normalize == "vocabulary" else softmax(scores)
        best = int(np.argmax(scores))
        ask = asked_of(prepared)
        named = dict(zip(ask.names, values.tolist(), strict=True))
        return self._named([ask.names[best], best, ask.items[best], float(values[best]), named])

    def _ask(self, row: Row) -> Ask:
        return self._ask_of(self._fields(row), self._row_options(row))

    def _row_options(self, row: Row) -> list[str]:
        config = self._config
        if config.options:
            return list(config.options)
        if config.options_column is not None:
            options = texts_of(row, config.options_column)
        else:
            options = _column_options(row, config.option_columns)
        if not options:
            raise RowError("no_options", "the row has no options; at least one is needed")
        if len(options) > len(self._identifiers):
            raise RowError("too_many_options", self._too_many(len(options)))
        return options

    def _ask_of(self, fields: dict[str, str], options: list[str]) -> Ask:
        names = self._identifiers[: len(options)]
        lines = (f"{name}. {option}" for name, option in zip(names, options, strict=True))
        return Ask({**fields, "options": "\n".join(lines)}, ({},), names, names, frozenset(fields), tuple(options))

    def _too_many(self, count: int) -> str:
        return (
            f"{count} options are more than the {len(self._identifiers)} identifiers "
            f"{self._identifiers[0]} to {self._identifiers[-1]}; "
            "use letters (up to 26), or the task rank, which takes any number of candidates"
        )


def _column_options(row: Row, names: Sequence[str]) -> list[str]:
    """One option a column; rows may have fewer options than there are columns, at the end."""
    filled = [i for i, name in enumerate(names) if as_text(row.get(name)).strip()]
    last = filled[-1] + 1 if filled else 0
    return [need_text(row.get(name), f"column {name!r}") for name in names[:last]]
