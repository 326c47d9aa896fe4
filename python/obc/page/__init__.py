"""HTML pages: markup that escapes its content, charts, and one self-contained document."""
