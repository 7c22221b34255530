"""What goes wrong in a replica: errors of ours, which its asker raises, and losses, after which
another replica answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from common.errors import EngineError, MoetelError, OverloadedError


class ReplicaLostError(EngineError):
    """The replica is gone, or its engine has stopped. Another one can answer."""


@dataclass(frozen=True)
class Failure:
    """An error of ours, to be raised elsewhere: Ray wraps exceptions that a replica raises, and
    their fields would be lost.

    is_lost: whether the replica can answer nobody any more.
    """

    kind: type[MoetelError]
    args: tuple[Any, ...]
    state: dict[str, Any]
    is_lost: bool = False

    @classmethod
    def of(cls, error: MoetelError, is_lost: bool = False) -> Failure:
        return cls(type(error), error.args, dict(vars(error)), is_lost)

    def error(self) -> MoetelError:
        found = self.kind.__new__(self.kind, *self.args)
        found.args = self.args
        vars(found).update(self.state)
        return ReplicaLostError(str(found)) if self.is_lost else found


async def received(call: Callable[[], Any]) -> AsyncIterator[Any]:
    """What a replica sends. Raises the errors that come in `Failure`s, ReplicaLostError,
    OverloadedError, or EngineError for a failure of the replica's code.

    call: asks Ray Serve; returns its DeploymentResponseGenerator.
    """
    stream = None
    try:
        stream = call()
        async for item in stream:
            if isinstance(item, Failure):
                raise item.error()
            yield item
    except BackPressureError as error:
        raise OverloadedError("all replicas are full; try again", 0, 1.0) from error
    except RayTaskError as error:  # raised by code that ran there
        raise EngineError(f"a replica failed ({error})") from error
    except (RayError, DeploymentUnavailableError) as error:
        raise ReplicaLostError(f"{type(error).__name__}: {error}") from error
    except asyncio.CancelledError:
        # Ray says so as well where the replica's end cancelled what it did.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ReplicaLostError("it was cancelled in the replica") from None
    finally:
        # If it failed, this raises the same once more.
        if stream is not None:
            with suppress(RayError, RayServeException):
                stream.cancel()
