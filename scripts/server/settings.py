"""What `moetel serve` is told, apart from the engine's own options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scripts.server.keys import KeyRing

MIN_REQUEST_BYTES = 2**20
"""The default bound of a request's body is at least so much."""

REQUEST_BYTES_PER_TOKEN = 32
"""Room in that bound for each token of the longest context: a prompt's text or its ids, JSON's
escapes included."""


@dataclass(frozen=True)
class ServerSettings:
    """keys: who may call, None: everybody.
    enable_admin: whether tenants can be loaded and unloaded. tenant_roots: directories that they
        are loaded from;
        empty: any.
    rate_limit: requests a minute for each key, or for each tenant without keys; None: no limit.
    max_request_bytes: longest body; None: by the longest context.
    max_sequences: most answers that one request asks for, its prompts times `n`.
    drain_timeout_s: how long running requests may go on after the first signal to stop.
    tool_call_parser: the format of calls that models make by themselves, a name of
        `scripts.server.tools.PARSERS`; None: they make none.
    reasoning_parser: how models mark what they think before they answer, a name of
        `scripts.server.reasoning.FORMATS`; None: it is part of the answer.
    watch_store: whether changes that others make to the store are served.
    generation_config: whether the tenants' generation_config.json gives defaults for sampling.
    allowed_origins, allowed_methods, allowed_headers: what pages of other origins may do, `*`:
        anything; no origins: nothing.
    """

    keys: KeyRing | None = None
    enable_admin: bool = False
    tenant_roots: tuple[Path, ...] = ()
    rate_limit: int | None = None
    max_request_bytes: int | None = None
    max_sequences: int = 1024
    drain_timeout_s: float = 30.0
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    watch_store: bool = True
    generation_config: bool = True
    allowed_origins: tuple[str, ...] = ("*",)
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)

    def body_limit(self, context: int) -> int:
        """Bytes of a request's body, for tenants whose longest context is so many tokens."""
        if self.max_request_bytes is not None:
            return self.max_request_bytes
        return max(MIN_REQUEST_BYTES, REQUEST_BYTES_PER_TOKEN * context)
