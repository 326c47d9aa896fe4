"""The families that obc knows, one a file: each file registers its own, and nothing else names it.

The file of the usual names comes first: names that it gives count before those of others.
"""

import importlib
import pkgutil

_USUAL = "usual"
for _name in sorted(
    (module.name for module in pkgutil.iter_modules(__path__)), key=lambda name: (name != _USUAL, name)
):
    importlib.import_module(f"{__name__}.{_name}")
