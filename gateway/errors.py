"""Everything that can go wrong, as RFC 9457 problem details: the one place where HTTP statuses are chosen."""

from typing import Any

from bundle import picture


class Problem(Exception):
    """An error that a caller sees. `detail` says what was wrong and what would be right."""

    status = 500
    title = "Internal error"
    retry_after: int | None = None  # seconds
    cause = ""  # for the log: what a server behind said, in its own terms

    def __init__(self, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        if retry_after is not None:
            self.retry_after = retry_after

    @property
    def type(self) -> str:
        """A URI reference that names the kind of problem."""
        return "/problems/" + self.title.lower().replace(" ", "-")


def untraced(outcome: Any) -> Any:
    """For another thread: a Problem without its traceback. The frames in it have the pictures, and it: a circle."""
    return outcome.with_traceback(None) if isinstance(outcome, Problem) else outcome


class BadRequest(Problem):
    status, title = 400, "Bad request"


class Unauthorized(Problem):
    status, title = 401, "Unauthorized"


class UnknownModel(Problem):
    status, title = 404, "Unknown model"


class TooLarge(Problem):
    status, title = 413, "Too large"


class UnsupportedPicture(Problem):
    status, title = 415, "Unsupported picture"


class DamagedPicture(Problem):
    status, title = 422, "Damaged picture"


class Abandoned(Problem):
    """For the log alone: nobody is there to read it. The status is nginx's own for this."""

    status, title = 499, "Client closed request"

    def __init__(self, detail: str = "the client hung up before its answer was made") -> None:
        super().__init__(detail)


class TooManyRequests(Problem):
    """One client's share, not the gateway's capacity: that is Overloaded."""

    status, title = 429, "Too many requests"


class BadAnswer(Problem):
    """The model server answered something that no retry will mend."""

    status, title = 502, "Model failed"


class Unavailable(Problem):
    """No model server, or none with a working model, right now."""

    status, title, retry_after = 503, "Model unavailable", 2


class ConnectionLost(Unavailable):
    """The call did not reach the model server, or its answer did not arrive: worth one more try."""


class Overloaded(Problem):
    status, title, retry_after = 503, "Overloaded", 1


class TimedOut(Unavailable):
    """The model is there but too slow, or its server holds calls back while it starts."""

    title = "Timed out"


PICTURE_ERRORS = {
    picture.NotAPicture: UnsupportedPicture,
    picture.BrokenPicture: DamagedPicture,
    picture.TooManyPixels: TooLarge,
}


def of_picture(error: picture.PictureError, where: str = "") -> Problem:
    """The problem for a picture that cannot be read; `where` names it among several."""
    return PICTURE_ERRORS[type(error)](f"{where}{error}")
