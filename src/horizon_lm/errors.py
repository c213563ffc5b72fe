"""Errors that a user can act on.

Each has a `message`, a `hint` and the exit code of the command line: 2 configuration or usage, 3 does not
fit, 4 data, 5 checkpoint, 6 non-finite numbers, 7 trained and saved but not uploaded, 75 and 130 stopped from
outside and saved. Our own mistakes are `assert`s.
"""

from __future__ import annotations

import math

from horizon_lm.text import shown


class HorizonError(Exception):
    """The base class. `str()` is the message and, on a second line, the hint, both printable and redacted."""

    exit_code: int = 1
    # Of several ranks: raised on all, and reported by rank 0; or on this one alone, which reports it itself.
    is_shared: bool = False
    is_own: bool = False

    def __init__(self, message: str, hint: str | None = None) -> None:
        message, hint = shown(message), shown(hint) if hint else hint
        super().__init__(message, hint)  # both in `args`, so the error survives pickling
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class ConfigError(HorizonError, ValueError):
    """A setting is unknown, of the wrong type, out of range or in conflict with another."""

    exit_code = 2


class UnsupportedModelError(HorizonError, ValueError):
    """The architecture cannot be streamed layer by layer, so it is rejected rather than trained wrongly."""

    exit_code = 2


class DoesNotFitError(HorizonError):
    """The run needs more host, device or disk space than there is, as predicted or as found while it ran."""

    exit_code = 3


class DataError(HorizonError, ValueError):
    """The training data or the tokenizer cannot be used."""

    exit_code = 4


class CheckpointError(HorizonError):
    """There is no valid checkpoint, or it does not belong to this run."""

    exit_code = 5


class OtherBaseError(CheckpointError):
    """A checkpoint holds an adapter, and the model under it is not the one it was trained on."""


class TornStateError(HorizonError):
    """The weights belong to no step: an update or the loading of a state was cut short.

    Training on them or saving them needs `force=True`.
    """

    exit_code = 5


class NonFiniteError(HorizonError):
    """A loss or a gradient norm is NaN or infinite.

    Attributes:
        loss: that of the step; NaN if unknown.
        grad_norm: that of the step; NaN if unknown.
        num_tokens: target tokens of the step; 0 if unknown.
        state_intact: no weight was updated.
    """

    exit_code = 6
    loss: float = math.nan
    grad_norm: float = math.nan
    num_tokens: int = 0
    state_intact: bool = True


class LossSpikeError(NonFiniteError):
    """A loss is far above earlier ones, and `loss_spike` does not accept it."""


class OutputLostError(HorizonError):
    """Standard output, to which a command prints its result, accepts no more text.

    Attributes:
        exit_code: 3 for a full disk, 2 for an unwritable stream, 1 if the reader of a pipe is gone.
        is_silent: nothing is printed, as the reader is gone.
    """

    is_silent: bool = True


class UploadError(HorizonError):
    """Uploading the model failed after it was trained and saved; the hint says how to upload it later."""

    exit_code = 7


class CallbackError(HorizonError):
    """A callback raised an exception (`__cause__`); the message says where to resume the run."""


class StoppedError(HorizonError):
    """A signal or the deadline stopped the run; the message says what was saved.

    Attributes:
        exit_code: 75 (EX_TEMPFAIL of sysexits.h), or 130 after Ctrl-C.
    """

    exit_code = 75

    def __init__(self, message: str, hint: str | None = None, exit_code: int = 75) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


class RankError(HorizonError):
    """Another rank failed or was lost.

    Attributes:
        ranks: the numbers of those that did, empty if unknown.
        op: that they were at, as far as known.
        is_told: by their own account, so exit_code is that of their error.
    """

    ranks: tuple[int, ...] = ()
    op: str = ""
    is_told: bool = False
