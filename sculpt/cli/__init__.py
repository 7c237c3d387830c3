"""The `sculpt` command."""
