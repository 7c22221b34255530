"""An answer that begins anew on another replica: what was given out already is left out."""

from __future__ import annotations

from common.errors import EngineError
from common.serving.request import Output


class Replay:
    """The outputs of one answer, whichever replicas they come from."""

    def __init__(self, streamed: bool):
        """streamed: whether the reader has what was given out, so that it has to stay true."""
        self._streamed = streamed
        self._given: list[tuple[tuple[int, ...], str]] = []
        self._number = 0

    def restart(self) -> None:
        """Another replica answers from the start."""
        self._number = 0

    def news(self, output: Output) -> Output | None:
        """The output; None if it was given out before. Raises EngineError if that was another."""
        number, self._number = self._number, self._number + 1
        found = tuple(output.token_ids), output.text
        is_last = output.generation is not None
        if number >= len(self._given):
            self._given.append(found)
            return output
        if self._streamed and (is_last or found != self._given[number]):
            raise EngineError(
                "a replica was lost amid the answer, and another one answers otherwise; ask again"
            )
        return output if is_last else None
