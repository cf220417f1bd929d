"""The one error that users are meant to read."""


class GlimpseError(ValueError):
    """Bad input or setting: one line that names the file, field or setting at fault."""


class TooLong(GlimpseError):
    """A length is past the last rung of its ladder."""
