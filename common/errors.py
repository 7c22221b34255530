"""The few exceptions that users of Moetel meet. Each message names what is at fault and says how to
mend it."""

from __future__ import annotations


class MoetelError(Exception):
    """Base of every error that Moetel raises on purpose; the command line prints it without a
    traceback."""


class CheckpointError(MoetelError):
    """A checkpoint that cannot be read: a missing or damaged file, a tensor of another shape, an
    unsupported config."""


class StoreError(MoetelError):
    """A store that cannot be built, opened or changed."""


class PlanError(MoetelError, ValueError):
    """A plan that contradicts itself, or a budget that cannot be met."""


class RequestError(MoetelError, ValueError):
    """A request that cannot be answered: a bad prompt, a bad option, token ids out of range."""


class UnknownTenantError(RequestError, KeyError):
    """The named tenant is not in the store."""

    def __init__(self, tenant: object, known: tuple[str, ...]):
        super().__init__(f"no tenant {tenant!r} in this store; it holds: {', '.join(known)}")

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class OverloadedError(RequestError):
    """Too many requests wait already.

    Attributes:
        waiting: how many.
        retry_after_s: seconds after which there is likely room, None if nothing is known.
    """

    def __init__(self, message: str, waiting: int, retry_after_s: float | None = None):
        super().__init__(message)
        self.waiting, self.retry_after_s = waiting, retry_after_s


class DeadlineError(RequestError):
    """A request's deadline passed before its answer was whole.

    Attributes:
        generation: what there was of it.
    """

    def __init__(self, message: str, generation: object = None):
        super().__init__(message)
        self.generation = generation


class EngineError(MoetelError):
    """An engine that cannot be loaded or used: no such backend or device, or already closed."""


class TenantUnavailableError(EngineError):
    """A tenant of the store whose files cannot be used; the others are served. why: what is wrong,
    and the mend."""

    def __init__(self, tenant: str, why: str):
        super().__init__(f"tenant {tenant!r} cannot answer this: {why}")
        self.tenant, self.why = tenant, why
