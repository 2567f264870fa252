"""What the user can mend."""


class UserError(ValueError):
    """Something the user can mend: one sentence with the value and the remedy. The command ends with status 2."""
