"""The server on Ray Serve: two replicas of a tiny store on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from common import load_engine
from common.errors import RequestError
from tests.server.cluster import Cluster, cluster, two_replicas
from tests.server.live import GOOD, Loop

pytest.importorskip("ray.serve", reason="needs the extra ray")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def ray(store_path: Path) -> Iterator[Cluster]:
    with cluster() as found:
        found.apply(two_replicas(store_path))
        found.settle(2)
        yield found


def post(url: str, path: str, body: dict[str, Any]) -> httpx2.Response:
    return httpx2.post(url + path, json=body, timeout=60)


def test_answers_are_those_of_one_process(ray: Cluster, store_path: Path) -> None:
    hello = [{"role": "user", "content": "hi"}]
    greedy = {"temperature": 0, "max_tokens": 5}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", GOOD | {"model": "ana"}),
        ("/v1/completions", GOOD | {"model": "ids", "prompt": [3, 4]}),
        ("/v1/completions", GOOD | {"model": "bob", "prompt": ["a", "b"], "n": 3, "logprobs": 2}),
        ("/v1/completions", GOOD | {"model": "bob", "echo": True, "prompt_logprobs": 1}),
        ("/v1/completions", GOOD | {"temperature": 1, "seed": 3, "n": 2, "stop": ["q"]}),
        ("/v1/chat/completions", {"model": "bob", "messages": hello, "n": 2} | greedy),
        ("/tokenize", {"model": "bob", "prompt": "héllo"}),
        ("/v1/completions", GOOD | {"model": "none"}),
        ("/v1/completions", GOOD | {"model": "ids", "prompt": "text"}),
        ("/v1/completions", GOOD | {"prompt": [3] * 5000}),
        ("/v1/load_tenant", {"tenant_name": "x", "tenant_path": "/x"}),
    ]
    loop = Loop(load_engine(store_path, device="cpu"))
    try:
        with loop.serve() as live:
            expected = [post(live.url, *b) for b in bodies]
            models = httpx2.get(live.url + "/v1/models").json()
    finally:
        loop.close()
    found = [post(ray.url, *b) for b in bodies]
    assert [(f.status_code, said(f)) for f in found] == [(e.status_code, said(e)) for e in expected]
    names = [m["id"] for m in httpx2.get(ray.url + "/v1/models").json()["data"]]
    assert names == [m["id"] for m in models["data"]]


def said(reply: httpx2.Response) -> Any:
    """What does not differ from request to request."""
    found = reply.json()
    for key in ("id", "created", "metrics"):
        found.pop(key, None)
    return json.loads(json.dumps(found))


def test_arguments_that_are_not_known_are_refused(store_path: Path) -> None:
    from moetel.ray import build

    for args, about in (
        ({"store": str(store_path), "replica": 2}, "replica is not known"),
        ({}, "store is missing"),
        ({"store": str(store_path), "replicas": 0}, "replicas is 0"),
        ({"store": str(store_path), "replicas": 3, "max_replicas": 2}, "at least replicas, 3"),
    ):
        with pytest.raises(RequestError, match=about):
            build(args)
