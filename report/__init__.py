"""The page and the numbers that a person reads: tables, plots, one self-contained HTML file."""
