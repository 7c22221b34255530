"""What `args` of a Ray Serve application may say."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.errors import RequestError
from scripts.server.keys import KeyRing
from scripts.server.reasoning import FORMATS
from scripts.server.settings import ServerSettings
from scripts.server.tools import PARSERS


@dataclass(frozen=True)
class RaySettings:
    """store: its directory, seen by every node. backend, device, dtype, kv_cache_bytes,
    ready_tenants: as of `load_engine`; None: its default. max_*: as of `moetel serve`.
    replicas: engines. max_replicas: if more, Serve adds and removes replicas between the two.
    num_cpus, num_gpus: what each replica takes of its node.
    api_keys, rate_limit, tool_call_parser, reasoning_parser: as of `moetel serve`.
    watch: whether changes of the store are followed.
    drain_timeout_s: how long a replica that has to go may take for the answers that it has begun.
    """

    store: str
    backend: str = "auto"
    device: str = "auto"
    dtype: str | None = None
    kv_cache_bytes: int | None = None
    ready_tenants: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_queue: int = 256
    replicas: int = 1
    max_replicas: int | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    api_keys: str | None = None
    rate_limit: int | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    watch: bool = True
    drain_timeout_s: float = 60.0

    @classmethod
    def of(cls, args: dict[str, Any]) -> RaySettings:
        """Raises RequestError that names what is unknown or missing."""
        known = [f.name for f in fields(cls)]
        for name in args:
            if name not in known:
                raise RequestError(f"args: {name} is not known; give some of {', '.join(known)}")
        if not args.get("store"):
            raise RequestError("args: store is missing; give the store's directory")
        found = cls(**args)
        for name in ("max_num_seqs", "max_queue", "replicas"):
            value = getattr(found, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RequestError(f"args: {name} is {value!r}; give a whole number above 0")
        for name, names in (("tool_call_parser", PARSERS), ("reasoning_parser", FORMATS)):
            value = getattr(found, name)
            if value is not None and value not in names:
                raise RequestError(
                    f"args: {name} is {value!r}; give one of {', '.join(map(repr, names))}"
                )
        if found.max_replicas is not None and found.max_replicas < found.replicas:
            raise RequestError(
                f"args: max_replicas is {found.max_replicas}; give at least replicas, "
                f"{found.replicas}"
            )
        return found

    def server(self) -> ServerSettings:
        """Raises KeyFileError."""
        keys = None if self.api_keys is None else KeyRing.read(Path(self.api_keys))
        return ServerSettings(
            keys=keys,
            rate_limit=self.rate_limit,
            max_sequences=self.max_queue,
            tool_call_parser=self.tool_call_parser,
            reasoning_parser=self.reasoning_parser,
            watch_store=False,
        )
