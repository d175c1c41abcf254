"""The errors that are messages to the user, and `require`, which raises them.

Everything else that goes wrong is a bug and keeps its traceback.
"""


class UserError(ValueError):
    """Something that the user can put right. The message names the flag, the file or the row."""


class MediaError(UserError):
    """A video or an image that cannot be used. The message names the file and the reason."""


class UnusableSample(UserError):
    """A sample that the model cannot take, though its row and its file are sound."""


def require(condition: object, message: str) -> None:
    """Raise UserError with a message for the user unless the condition holds."""
    if not condition:
        raise UserError(message)
