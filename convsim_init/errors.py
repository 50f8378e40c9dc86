"""The errors a caller may want to catch. The command line turns each into one line and an exit status."""


class InputError(ValueError):
    """Something the user gave cannot be used: says what was expected, what came and what to do.

    Examples:
        >>> ci.Settings(tolerance=2)
        Traceback (most recent call last):
            ...
        convsim_init.errors.InputError: expected tolerance to be at least 0 and less than 1, got 2
    """


class RunError(RuntimeError):
    """The work itself failed although the input was usable, for instance a full disk.

    Examples:
        >>> issubclass(ci.RunError, RuntimeError)
        True
    """
