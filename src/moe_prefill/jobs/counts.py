"""What is counted while rows are answered: kept with every part, so that a resumed job reports the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counts:
    """Rows, errors by code, notes by name, and pairs of gold and given answers (``None``: the row has an error)."""

    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    pairs: Counter[tuple[str, str | None]] = field(default_factory=Counter)

    @property
    def num_errors(self) -> int:
        return self.errors.total()

    def add(self, other: Counts) -> None:
        """Add another part's counts to these."""
        self.rows += other.rows
        self.errors.update(other.errors)
        self.notes.update(other.notes)
        self.pairs.update(other.pairs)

    def to_json(self) -> dict[str, object]:
        return {
            "rows": self.rows,
            "errors": dict(sorted(self.errors.items())),
            "notes": dict(sorted(self.notes.items())),
            "pairs": sorted(([*pair, n] for pair, n in self.pairs.items()), key=repr),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Counts:
        """Read what ``to_json`` wrote."""
        rows, errors, notes, pairs = (data[name] for name in ("rows", "errors", "notes", "pairs"))
        assert isinstance(rows, int)
        assert isinstance(errors, dict)
        assert isinstance(notes, dict)
        assert isinstance(pairs, list)
        return cls(rows, Counter(errors), Counter(notes), Counter({(gold, given): n for gold, given, n in pairs}))

    @classmethod
    def total(cls, counts: Iterable[Counts]) -> Counts:
        """The sum of all parts' counts."""
        result = cls()
        for one in counts:
            result.add(one)
        return result
