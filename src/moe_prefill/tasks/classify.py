"""One of a fixed set of labels for every row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core import AtomicResult, Column, EngineLimits, PreparedRow
from ..text import Tokenizer
from .base import Row
from .common import LabelTask, label_lengths, label_scores
from .config import ClassifyConfig, Label
from .labels import Float64Array, softmax
from .prompts import Ask

_PLAIN = "Classify the text.\n{labels}\n\nText: {%s}\n\nLabel:"
_CHAT = "Classify the text.\n{labels}\n\nText: {%s}\n\nReply with the label only."


class ClassifyTask(LabelTask):
    """The label whose tokens have the largest sum of log-probabilities after the prompt; the first of equals wins."""

    name = "classify"
    reserved = frozenset({"labels"})
    outputs = (
        Column(name="predicted_label", kind="string"),
        Column(name="probability", kind="float"),
        Column(name="probabilities", kind="float_map"),
    )

    def __init__(
        self, config: ClassifyConfig, tokenizer: Tokenizer, limits: EngineLimits, columns: Sequence[str] | None = None
    ) -> None:
        source = config.template
        if source is None:
            source = (_CHAT if config.chat else _PLAIN) % config.text_column
        super().__init__(
            config,
            source,
            tokenizer,
            limits,
            label_end=config.label_end,
            vocabulary=config.normalize == "vocabulary",
        )
        self.check_table(columns)
        self._config = config
        self._names = tuple(label.name for label in config.labels)
        self._texts = tuple(label.text for label in config.labels)
        self._block = labels_block(config.labels)
        self._prompter.check(self._ask_of(self._neutral_fields()))

    def finish(self, prepared: PreparedRow, results: Sequence[AtomicResult]) -> dict[str, object]:
        scores = label_scores(prepared, results)[0]
        if self._config.length_normalize:
            scores = scores / label_lengths(prepared)
        values = np.exp(scores) if self._config.normalize == "vocabulary" else softmax(scores)
        best = int(np.argmax(scores))
        named = dict(zip(self._names, values.tolist(), strict=True))
        return self._named([self._names[best], float(values[best]), named])

    def notes(self, prepared: PreparedRow, results: Sequence[AtomicResult]) -> tuple[str, ...]:
        if not self._config.length_normalize:
            return ()
        return _length_note(label_scores(prepared, results)[0], label_lengths(prepared))

    def _ask(self, row: Row) -> Ask:
        return self._ask_of(self._fields(row))

    def _ask_of(self, fields: dict[str, str]) -> Ask:
        cuttable = frozenset(fields)
        return Ask({**fields, "labels": self._block}, ({},), self._names, self._texts, cuttable)


def labels_block(labels: Sequence[Label]) -> str:
    """How a prompt lists labels: on one line, or one a line where any has a description."""
    if any(label.description for label in labels):
        return "\n".join(
            f"- {label.text}: {label.description}" if label.description else f"- {label.text}" for label in labels
        )
    return "Labels: " + ", ".join(label.text for label in labels)


def _length_note(scores: Float64Array, lengths: Float64Array) -> tuple[str, ...]:
    changed = int(np.argmax(scores)) != int(np.argmax(scores / lengths))
    return ("length_normalisation_changed",) if changed else ()
