"""The error of everything that brings weights in or hands them out."""

from maxlm.errors import UserError


class ConversionError(UserError):
    """A folder, file or tensor that cannot be converted; the message names it and says what to do."""
