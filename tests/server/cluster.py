"""Ray Serve on this machine, with replicas that tests kill, and requests that notice any loss."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from tests.helpers import REPOSITORY

APP = "moetel"
TIMEOUT_S = 120
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


Answer = tuple[str, tuple[int, ...]]
"""Text and token ids."""


def answer_of(chunks: list[dict[str, Any]]) -> Answer:
    """What a stream's events, or the one object of a whole answer, say. Fails for errors."""
    assert not [c for c in chunks if "error" in c], chunks[-1]
    choices = [c["choices"][0] for c in chunks]
    assert choices[-1]["finish_reason"] == "length"
    ids = tuple(i for c in choices for i in c["token_ids"])
    return "".join(c["text"] for c in choices), ids


@dataclass(frozen=True)
class Reply:
    """What came of a request. events: of a stream, without the last one if that is `[DONE]`.
    whole: whether the connection was closed as it should be."""

    status: int
    headers: Any
    text: str
    events: list[dict[str, Any]]
    whole: bool

    @property
    def answer(self) -> Answer:
        """Fails for any answer that is not all there."""
        assert self.status == 200 and self.whole, (self.status, self.text[-2000:])
        if not self.events:
            return answer_of([json.loads(self.text)])
        assert self.text.endswith("data: [DONE]\n\n"), self.text[-2000:]
        return answer_of(self.events)


@dataclass(frozen=True)
class Traffic:
    """replies: with the number of the body that each answers."""

    replies: list[tuple[int, Reply]]
    stop: threading.Event

    def wait_for_more(self, number: int) -> None:
        end = time.monotonic() + TIMEOUT_S
        wanted = len(self.replies) + number
        while len(self.replies) < wanted:
            assert time.monotonic() < end, "no replies come any more"
            time.sleep(0.1)


class Cluster:
    """An application on Ray Serve, at `url`."""

    def __init__(self, port: int, metrics_port: int):
        self.url = f"http://127.0.0.1:{port}"
        self.metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"

    def apply(self, args: dict[str, Any], **engine: Any) -> None:
        """Begin to run an application, or to change it, as `serve deploy` does. engine: options of
        that deployment."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        app = {
            "name": APP,
            "route_prefix": "/",
            "import_path": "moetel.ray:build",
            "args": args,
            "runtime_env": {"env_vars": ENVIRONMENT},
            "deployments": [{"name": "engine", **engine}] if engine else [],
        }
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [app]}))

    def states(self, deployment: str = "engine") -> dict[str, int]:
        """State of replicas, as RUNNING -> how many."""
        from ray import serve

        found = serve.status().applications[APP].deployments
        states = found[deployment].replica_states if deployment in found else {}
        return {getattr(k, "value", k): n for k, n in states.items() if n}

    def wait_until(self, condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"it did not happen in time; replicas: {self.states()}"
            time.sleep(0.1)

    def settle(self, replicas: int) -> None:
        """Wait until a change is done, there are so many replicas and no others, and the ingress
        knows."""
        from ray import serve

        def done() -> bool:
            states = self.states(), self.states("ingress")
            status = serve.status().applications[APP].status
            return status == "RUNNING" and states == ({"RUNNING": replicas}, {"RUNNING": 1})

        self.wait_until(done)
        self.reports()  # the first call of this process makes a router, which takes seconds
        time.sleep(1)

    def reports(self) -> list[dict[str, Any]]:
        """What each replica says of itself, see `EngineReplica.report`."""
        from ray import serve

        handle = serve.get_deployment_handle("engine", APP)
        found: list[dict[str, Any]] = handle.broadcast("report").results(timeout_s=30)
        return found

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def send(self, body: dict[str, Any], path: str = "/v1/completions") -> Reply:
        """Post it, and read all of the reply however it ends."""
        pieces: list[str] = []
        with httpx2.stream("POST", self.url + path, json=body, timeout=TIMEOUT_S) as reply:
            try:
                pieces.extend(reply.iter_text())
                whole = True
            except httpx2.HTTPError:
                whole = False
        text = "".join(pieces)
        is_stream = "event-stream" in reply.headers.get("content-type", "")
        lines = text.split("\n\n") if is_stream else []
        data = [e.removeprefix("data: ") for e in lines if e and e != "data: [DONE]"]
        return Reply(reply.status_code, reply.headers, text, [json.loads(d) for d in data], whole)

    @contextmanager
    def sending(self, bodies: list[dict[str, Any]]) -> Iterator[list[Future[Reply]]]:
        """All of them at once; the replies are there when the context ends."""
        with ThreadPoolExecutor(len(bodies)) as pool:
            yield [pool.submit(self.send, body) for body in bodies]

    @contextmanager
    def traffic(self, bodies: list[dict[str, Any]], at_once: int = 6) -> Iterator[Traffic]:
        """These requests again and again, until the context ends and their replies are there."""
        traffic = Traffic([], threading.Event())

        def send(first: int) -> None:
            number = first
            while not traffic.stop.is_set():
                traffic.replies.append(
                    (number % len(bodies), self.send(bodies[number % len(bodies)]))
                )
                number += at_once + 1

        with ThreadPoolExecutor(at_once) as pool:
            senders = [pool.submit(send, first) for first in range(at_once)]
            try:
                yield traffic
            finally:
                traffic.stop.set()
        for sender in senders:
            sender.result()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def cluster(num_cpus: int = 4) -> Iterator[Cluster]:
    """Ray and Serve, started and ended with the context."""
    import ray
    from ray import serve

    port, metrics_port = free_port(), free_port()
    ray.init(
        num_cpus=num_cpus,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": ENVIRONMENT},
        _metrics_export_port=metrics_port,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield Cluster(port, metrics_port)
    finally:
        serve.shutdown()
        ray.shutdown()


def two_replicas(store: Path, **more: Any) -> dict[str, Any]:
    """Arguments of a small application."""
    return {
        "store": str(store),
        "device": "cpu",
        "replicas": 2,
        "num_cpus": 0.5,
        "max_num_seqs": 8,
        "max_queue": 64,
        "kv_cache_bytes": 64 << 20,
    } | more
