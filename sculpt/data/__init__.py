"""Tasks from files: rows, their layouts, folders of data sets, and the order of batches."""
