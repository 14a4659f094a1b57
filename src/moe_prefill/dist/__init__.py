"""How the ranks of a group meet: a store on the loopback, and process groups of torch.distributed on request."""

from .process_group import open_process_group
from .store import open_store

__all__ = ["open_process_group", "open_store"]
