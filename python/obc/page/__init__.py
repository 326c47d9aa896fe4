"""Pages of HTML: markup that escapes whatever it is given, charts, and one self-contained document."""
