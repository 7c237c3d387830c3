"""Results of runs as tables, pictures and one page."""
