"""Measurements: nothing here is imported by the packages or collected by plain `pytest`."""
