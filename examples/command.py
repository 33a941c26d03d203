"""What the command lines of the examples share."""


class Stop(Exception):
    """Ends the program with a message for its user and an exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def positive(kind: type):
    """Returns a reader of positive numbers for argparse, which shows its name in errors."""

    def read(text: str):
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    read.__name__ = f"positive {kind.__name__}"
    return read
