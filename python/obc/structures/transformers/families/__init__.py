"""The known families, one per file. Each file registers its own family, and nothing else mentions it.

The file of the usual names comes first, so that its names take precedence.
"""

import importlib
import pkgutil

_USUAL = "usual"
for _name in sorted(
    (module.name for module in pkgutil.iter_modules(__path__)), key=lambda name: (name != _USUAL, name)
):
    importlib.import_module(f"{__name__}.{_name}")
