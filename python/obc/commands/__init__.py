"""The commands of ``obc``: one module each, with ``add`` for its arguments and a function that runs it."""
