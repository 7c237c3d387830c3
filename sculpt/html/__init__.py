"""The report of runs as one HTML file that needs no network and no scripts."""
