"""Exceptions that users see as a message, not as a traceback."""


class UserError(Exception):
    """A wrong input: the message is one line that names the file or flag, what was found and what to do.

    Commands print it without a traceback and exit with code 2.
    """

    def __init__(self, message: str):
        # Library errors quoted in a message may span lines and carry control characters; ours is one line.
        super().__init__(" ".join("".join(c if c.isprintable() else " " for c in message).split()))


class JobError(RuntimeError):
    """The job cannot go on, for a reason that is not in the code. The message says it; a traceback would not."""


class CollectiveError(JobError):
    """A kernel gave up waiting for a peer, or for one of its own blocks. The process's CUDA context is lost."""
