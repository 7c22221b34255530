"""The server on Ray Serve: two replicas of a tiny store on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from common import load_engine
from tests.helpers import REPOSITORY
from tests.server.live import GOOD, Loop, events

ray: Any = pytest.importorskip("ray", reason="needs the extra ray")
serve: Any = pytest.importorskip("ray.serve", reason="needs the extra ray")

pytestmark = pytest.mark.slow
PORT = 8199


@pytest.fixture(scope="module")
def url(store_path: Path) -> Iterator[str]:
    from moetel.ray import build

    ray.init(
        num_cpus=3,
        object_store_memory=100 << 20,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        args = {
            "store": str(store_path),
            "device": "cpu",
            "replicas": 2,
            "num_cpus": 0.5,
            "max_num_seqs": 4,
            "max_queue": 4,
        }
        serve.run(build(args), name="moetel", route_prefix="/")
        yield f"http://127.0.0.1:{PORT}"
    finally:
        serve.shutdown()
        ray.shutdown()


def test_answers_are_those_of_one_process(url: str, store_path: Path) -> None:
    bodies = [
        GOOD | {"model": m, "prompt": [3, 4, 5 + i]} for m in ("ana", "bob", "ids") for i in (0, 1)
    ]
    loop = Loop(load_engine(store_path, device="cpu"))
    try:
        with loop.serve() as live:
            expected = [live.post("/v1/completions", b).json()["choices"] for b in bodies]
            chat = {"model": "bob", "messages": [{"role": "user", "content": "hi"}]} | {
                "temperature": 0,
                "max_tokens": 5,
            }
            spoken = live.post("/v1/chat/completions", chat).json()["choices"]
    finally:
        loop.close()
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda b: httpx2.post(f"{url}/v1/completions", json=b, timeout=60), bodies)
        )
    assert [f.json()["choices"] for f in found] == expected
    assert httpx2.post(f"{url}/v1/chat/completions", json=chat).json()["choices"] == spoken
    unknown = httpx2.post(f"{url}/v1/completions", json=GOOD | {"model": "none"})
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
    with httpx2.stream("POST", f"{url}/v1/completions", json=bodies[0] | {"stream": True}) as reply:
        *pieces, last = events("".join(reply.iter_text()))
    assert last == "[DONE]"
    text = "".join(json.loads(p)["choices"][0]["text"] for p in pieces)
    assert text == expected[0][0]["text"]


def test_a_flood_gets_429_before_any_status_of_200(url: str) -> None:
    body = GOOD | {"max_tokens": 200, "ignore_eos": True, "stream": True}

    def send(_: int) -> tuple[int, str | None, str]:
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as reply:
            return reply.status_code, reply.headers.get("retry-after"), "".join(reply.iter_text())

    with ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(send, range(40)))
    assert {status for status, _, _ in replies} == {200, 429}
    for status, wait, text in replies:
        if status == 429:
            assert wait is not None and int(wait) >= 1
        else:
            assert events(text)[-1] == "[DONE]"
