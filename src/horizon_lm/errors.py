"""Errors that a user can act on.

Each carries what happened (`message`), the way out (`hint`) and the exit code with which the command line
ends (2 configuration or usage, 3 does not fit, 4 data, 5 checkpoint, 6 non-finite numbers, 7 trained and
saved but not uploaded; 75 and 130 for runs that were stopped from outside and saved). Mistakes of our own are
`assert`s, not these.
"""

from __future__ import annotations

import math

from horizon_lm.text import shown


class HorizonError(Exception):
    """Base class; `str()` is the message and, on a second line, the hint. Both are printable and redacted."""

    exit_code: int = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        message, hint = shown(message), shown(hint) if hint else hint
        super().__init__(message, hint)  # both in `args`, so that the error survives pickling
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class ConfigError(HorizonError, ValueError):
    """A setting is unknown, of the wrong type, out of range or in conflict with another."""

    exit_code = 2


class UnsupportedModelError(HorizonError, ValueError):
    """The architecture cannot be streamed layer by layer; refused by name rather than trained wrongly."""

    exit_code = 2


class DoesNotFitError(HorizonError):
    """The run needs more host, device or disk space than there is: found before anything is allocated, or
    where memory or the disk ran out in the middle of it."""

    exit_code = 3


class DataError(HorizonError, ValueError):
    """The training data or the tokenizer cannot be used."""

    exit_code = 4


class CheckpointError(HorizonError):
    """No valid checkpoint, or one that does not belong to this run."""

    exit_code = 5


class TornStateError(HorizonError):
    """The weights are those of no step: an update or the reading of a state was cut short, and could not be
    finished. They are neither trained on nor saved unless with `force=True`."""

    exit_code = 5


class NonFiniteError(HorizonError):
    """A loss or a gradient norm is NaN or infinite.

    loss, grad_norm, num_tokens: of the step, NaN and 0 where not known. state_intact: whether no weight
    has been updated from it.
    """

    exit_code = 6
    loss: float = math.nan
    grad_norm: float = math.nan
    num_tokens: int = 0
    state_intact: bool = True


class LossSpikeError(NonFiniteError):
    """A loss far above those before it, with a policy that does not let it pass."""


class OutputLostError(HorizonError):
    """Standard output, on which a command prints its result, takes no more text.

    exit_code: 3 for a full disk, 2 for a stream that cannot be written to; 1, and nothing is said, where the
    reader of a pipe has gone (is_silent).
    """

    is_silent: bool = True


class UploadError(HorizonError):
    """The trained model is saved, and uploading it failed; the hint says how to do that later."""

    exit_code = 7


class CallbackError(HorizonError):
    """A callback raised an exception (`__cause__`); the message says where the run can be resumed."""


class StoppedError(HorizonError):
    """The run was asked to stop, by a signal or its deadline; the message says what was saved.

    exit_code: 75 (try again later, as sysexits names it), or 130 after Ctrl-C.
    """

    exit_code = 75

    def __init__(self, message: str, hint: str | None = None, exit_code: int = 75) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code
