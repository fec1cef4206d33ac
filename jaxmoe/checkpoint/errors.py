"""The error of an unusable checkpoint, and the list that gathers several before raising one."""

_SHOWN = 4


class CheckpointError(ValueError):
    """A checkpoint, or what is asked of it, breaks a rule; the message gives rule, value and way out."""


class Problems:
    """Problems found by one check, raised together so that a user repairs them in one go.

    Example:
        >>> problems = Problems("the load plan of /models/tiny")
        >>> problems.add("tensor 'a' is missing")
        >>> problems.raise_if_any()
        Traceback (most recent call last):
        ...
        jaxmoe.checkpoint.errors.CheckpointError: the load plan of /models/tiny has 1 problem: tensor 'a' is missing
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        """Note one problem."""
        self.found.append(problem)

    def raise_if_any(self) -> None:
        """Raise what was found, in one line: the first few in full and all of them counted.

        Raises:
            CheckpointError: at least one problem was added.
        """
        if not self.found:
            return
        shown = self.found[:_SHOWN]
        if len(self.found) > _SHOWN:
            shown.append(f"and {len(self.found) - _SHOWN} more")
        count = f"{len(self.found)} problem{'s' if len(self.found) > 1 else ''}"
        raise CheckpointError(f"{self.subject} has {count}: {'; '.join(shown)}")
