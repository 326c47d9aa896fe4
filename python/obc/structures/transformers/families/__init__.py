"""The known families: in :mod:`~obc.structures.transformers.families.names` those that are described by names alone,
in every other file one that needs code. Each file registers its own, and nothing else mentions it.
"""

import importlib
import pkgutil

from obc.structures.transformers.families import names  # noqa: F401  (first: its names take precedence)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
