"""The built-in small models and tasks, and what `sculpt demo` does with them."""
