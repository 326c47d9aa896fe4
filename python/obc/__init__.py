"""obc: structural pruning by Optimal Brain Connection (arXiv 2508.05521)."""

from obc import backends, ops, reference
from obc.backends import use_backend

__all__ = ["backends", "ops", "reference", "use_backend"]
