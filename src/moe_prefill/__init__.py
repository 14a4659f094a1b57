"""Prefill-only scoring with Mixture-of-Experts language models.

    from moe_prefill import Engine

    engine = Engine("path/or/hub-id")
    engine.classify(["You won a prize!"], labels=["spam", "ham"])

Importing the package imports neither torch nor a server; ``Engine`` does when it is built.
"""

from .api import Choice, Classification, Engine, Ranking, Scoring, Selection

__version__ = "0.1.0"

__all__ = ["Choice", "Classification", "Engine", "Ranking", "Scoring", "Selection", "__version__"]
