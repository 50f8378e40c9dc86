"""The errors a caller may want to catch. The command line turns each into one line and an exit status."""


class InputError(ValueError):
    """Something the user gave cannot be used: says what was expected, what came and what to do."""


class RunError(RuntimeError):
    """The work itself failed although the input was usable, for instance a full disk."""
