"""What is left after scoring: scores, group scores, kept rows and where they are stored, the report."""
