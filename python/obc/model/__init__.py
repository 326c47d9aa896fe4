"""Facts about a model that everything else stands on."""
