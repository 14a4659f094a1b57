"""Where expert banks live and how a layer gets its own: the one seam between the mathematics and weight streaming."""

from .source import BankSource, ResidentBanks

__all__ = ["BankSource", "ResidentBanks"]
