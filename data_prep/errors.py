"""The one error class that the command line shows to its user."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and what to do."""
