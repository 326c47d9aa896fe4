"""Pruning a model in one call: criteria, selection, structure, compensation."""
