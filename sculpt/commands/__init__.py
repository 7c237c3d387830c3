"""What each `sculpt` command does with its arguments and what it prints."""
