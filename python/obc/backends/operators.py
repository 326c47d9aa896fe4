"""The operators that every backend has, by name."""

OPERATORS = ("channel_dot", "weight_dot", "weight_dot_list", "weight_moments", "fold", "end_row")
