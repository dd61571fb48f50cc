"""The error whose message is for the user: what was given, what was expected, what to type instead."""


class UserError(ValueError):
    """A mistake in what was asked for; the command line prints the message without a traceback."""
