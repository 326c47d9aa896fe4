"""Facts about a model that all other packages build on."""
