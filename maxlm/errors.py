"""The error whose message is for the user: what was given, what was expected, what to type instead."""


class UserError(ValueError):
    """A mistake in what was asked for; the command line prints the message without a traceback.

    exit_code: the one that the process leaves with.
    """

    exit_code = 1
