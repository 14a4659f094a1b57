"""Select and rank: every candidate is a yes-or-no question of its own, and its prompt a sibling of the others'."""

from __future__ import annotations

from collections.abc import Sequence

from ..core import AtomicResult, Column, EngineLimits, PreparedRow
from ..errors import RowError, TaskError
from ..text import Tokenizer
from .base import Row
from .common import LabelTask, asked_of, label_scores
from .config import CandidatesConfig, RankConfig, SelectConfig
from .labels import softmax
from .prompts import Ask
from .template import texts_of

# The candidate stands as late as the question allows: what comes before it is computed once for all candidates.
_SELECT = "Text: {%s}\n\nDoes the following label apply to the text? Answer {yes} or {no}.\n\nLabel: {candidate}"
_RANK = "Query: {%s}\n\nDoes the following document answer the query? Answer {yes} or {no}.\n\nDocument: {candidate}"
_PLAIN_END = "\n\nAnswer:"


class CandidateTask(LabelTask):
    """Scores every candidate by P(yes) / (P(yes) + P(no)) after its own prompt."""

    reserved = frozenset({"candidate", "yes", "no"})
    builtin = ""

    def __init__(
        self, config: CandidatesConfig, tokenizer: Tokenizer, limits: EngineLimits, columns: Sequence[str] | None = None
    ) -> None:
        source = config.template
        if source is None:
            source = self.builtin % config.text_column + ("" if config.chat else _PLAIN_END)
        read = [config.candidates_column] if config.candidates_column else []
        super().__init__(config, source, tokenizer, limits, list_columns=read)
        self.check_table(columns)
        if "candidate" not in self._prompter.template.names:
            raise TaskError("the template has no {candidate}, so all candidates would get the same prompt; add it")
        self._candidates = config.candidates
        self._column = config.candidates_column
        self._words = (config.yes, config.no)
        self._check_distinct(config.candidates)
        self._prompter.check(self._ask_of(self._neutral_fields(), ("x",)))

    def _probabilities(self, prepared: PreparedRow, results: Sequence[AtomicResult]) -> list[float]:
        return [float(softmax(scores)[0]) for scores in label_scores(prepared, results)]

    def _ask(self, row: Row) -> Ask:
        candidates = self._candidates if self._column is None else tuple(texts_of(row, self._column))
        if not candidates:
            raise RowError(
                "no_candidates", f"column {self._column!r} is an empty list; at least one candidate is needed"
            )
        try:
            self._check_distinct(candidates)
        except TaskError as error:
            raise RowError("duplicate_candidate", str(error)) from error
        return self._ask_of(self._fields(row), candidates)

    def _ask_of(self, fields: dict[str, str], candidates: tuple[str, ...]) -> Ask:
        yes, no = self._words
        shared = {**fields, "yes": yes, "no": no}
        # Fixed candidates belong to the task like its template; those of the row may be cut like its texts.
        cuttable = frozenset(fields) | (frozenset() if self._column is None else {"candidate"})
        variants = tuple({"candidate": candidate} for candidate in candidates)
        return Ask(shared, variants, self._words, self._words, cuttable, candidates)

    def _check_distinct(self, candidates: Sequence[str]) -> None:
        """Nothing by default: a ranking may hold the same text twice."""


class SelectTask(CandidateTask):
    """All candidates at or above the threshold, in the order given."""

    name = "select"
    builtin = _SELECT
    outputs = (Column(name="selected", kind="strings"), Column(name="probabilities", kind="float_map"))

    def __init__(
        self, config: SelectConfig, tokenizer: Tokenizer, limits: EngineLimits, columns: Sequence[str] | None = None
    ) -> None:
        super().__init__(config, tokenizer, limits, columns)
        self._threshold = config.threshold

    def finish(self, prepared: PreparedRow, results: Sequence[AtomicResult]) -> dict[str, object]:
        named = dict(zip(asked_of(prepared).items, self._probabilities(prepared, results), strict=True))
        return self._named([[name for name, value in named.items() if value >= self._threshold], named])

    def _check_distinct(self, candidates: Sequence[str]) -> None:
        double = next((text for i, text in enumerate(candidates) if text in candidates[:i]), None)
        if double is not None:
            raise TaskError(f"candidate {double!r} is given twice; every candidate has one probability")


class RankTask(CandidateTask):
    """Candidates by falling score; of equals, the one given first comes first."""

    name = "rank"
    builtin = _RANK
    outputs = (
        Column(name="ranking", kind="strings"),
        Column(name="ranking_scores", kind="floats"),
        Column(name="ranking_indices", kind="ints"),
    )

    def __init__(
        self, config: RankConfig, tokenizer: Tokenizer, limits: EngineLimits, columns: Sequence[str] | None = None
    ) -> None:
        super().__init__(config, tokenizer, limits, columns)
        self._top_n = config.top_n

    def finish(self, prepared: PreparedRow, results: Sequence[AtomicResult]) -> dict[str, object]:
        scores, items = self._probabilities(prepared, results), asked_of(prepared).items
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[: self._top_n]
        return self._named([[items[i] for i in order], [scores[i] for i in order], order])
