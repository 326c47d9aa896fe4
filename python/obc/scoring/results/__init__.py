"""The results of scoring: scores, group scores, kept rows and their storage, the report."""
