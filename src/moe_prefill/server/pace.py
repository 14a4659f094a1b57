"""How large the engine's calls may be."""

from __future__ import annotations


class Pace:
    """How many tokens a call may carry to take ``call_s`` seconds, by what calls took so far.

    A call's time is some fixed part and some part for each token, so what a smaller call promises is too little:
    it may raise the number, and only a call of about that size may lower it. ``fixed_s`` is what the smallest call
    takes: where weights are streamed that may be more than was asked for, and a call takes at least twice as long.
    """

    def __init__(self, asked_s: float) -> None:
        self._asked_s = asked_s
        self.fixed_s = 0.0  # set before anything is added
        self.call_tokens: float | None = None  # None: nothing was measured

    @property
    def call_s(self) -> float:
        return max(self._asked_s, 2 * self.fixed_s)

    @property
    def tokens_per_s(self) -> float | None:
        return None if self.call_tokens is None else self.call_tokens / self.call_s

    def add(self, tokens: int, seconds: float) -> None:
        estimate = max(1.0, tokens * self.call_s / max(seconds, 1e-6))
        if self.call_tokens is None:
            self.call_tokens = estimate
        elif estimate >= self.call_tokens or tokens >= self.call_tokens / 2:
            self.call_tokens = min(estimate, 4 * self.call_tokens)  # one odd call does not open the gates

    def seconds(self, tokens: float) -> float:
        """Predicted time of that many tokens; 0 before anything was measured."""
        rate = self.tokens_per_s
        return tokens / rate if rate else 0.0
