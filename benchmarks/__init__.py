"""Benchmarks: a package, because Opacus installs one of this name, which a folder without this file loses to."""
