"""What users should know though nothing failed; the command shows it."""


class SculptWarning(UserWarning):
    """Something was done, or left out, that its owner should know of."""
