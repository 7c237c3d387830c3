"""The `sculpt` command: a file for each of its commands."""
