"""Routes about the server: health, metrics, tokens, tenants that come and go, the end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from common import build_store, load_engine
from common.version import __version__
from scripts.server.settings import ServerSettings
from scripts.server.window import SAMPLES, Window, quantile
from tests import helpers
from tests.common.checkpoints import adapters
from tests.server.live import GOOD, Live, Loop, error, events, wait_for


def test_health_and_version(live: Live) -> None:
    assert live.get("/health").json() == {"status": "ok"}
    assert live.get("/ready").json() == {"status": "ready"}
    assert live.get("/version").json() == {"version": __version__}
    found = live.get("/load").json()
    assert found["server_load"] == 0 and set(found["tenants"]) >= {"ana", "bob", "ids"}


def test_before_the_store_is_loaded(loop: Loop) -> None:
    with loop.serve(loaded=False) as live:
        assert live.get("/health").status_code == 200
        for reply in (
            live.get("/ready"),
            live.get("/v1/models"),
            live.post("/v1/completions", GOOD),
            live.get("/load"),
        ):
            assert error(reply, 503)["code"] == "loading" and reply.headers["retry-after"] == "5"
        assert live.get("/status.json").json()["state"] == "loading"
        assert live.get("/metrics").status_code == 200
        live.app.state.service.attach(loop.engine)
        assert (
            live.get("/ready").status_code == 200
            and live.post("/v1/completions", GOOD).status_code == 200
        )


def test_when_the_engine_has_died(store_path: Path) -> None:
    own = Loop(load_engine(store_path, device="cpu"))
    with own.serve() as live:
        assert live.post("/v1/completions", GOOD).status_code == 200
        own.engine.close()
        assert error(live.get("/health"), 503)["code"] == "engine_stopped"
        assert error(live.get("/ready"), 503) and error(live.post("/v1/completions", GOOD), 503)
        assert live.get("/status.json").json()["state"] == "stopped"
        assert live.get("/metrics").status_code == 200
    own.close()


def test_tokens(live: Live) -> None:
    found = live.post(
        "/tokenize", {"model": "bob", "prompt": "héllo", "return_token_strs": True}
    ).json()
    assert found["count"] == len(found["tokens"]) == 6 and found["max_model_len"] == 4096
    assert len(found["token_strs"]) == 6
    assert live.post("/detokenize", {"model": "bob", "tokens": found["tokens"]}).json() == {
        "prompt": "héllo"
    }
    plain = live.post(
        "/tokenize", {"model": "bob", "prompt": "héllo", "add_special_tokens": False}
    ).json()
    assert plain["tokens"] == found["tokens"]  # this tokenizer adds none
    messages = [{"role": "user", "content": "hi"}]
    assert live.post("/tokenize", {"model": "bob", "messages": messages}).json()["count"] == 4
    assert "either" in error(live.post("/tokenize", {"model": "bob"}), 400)["message"]
    assert error(live.post("/tokenize", {"model": "ids", "prompt": "x"}), 400)
    assert (
        error(live.post("/detokenize", {"model": "bob", "tokens": [9999]}), 400)["param"]
        == "tokens"
    )
    assert live.post("/tokenize", {"model": "bob", "prompt": ""}).json()["tokens"] == []
    assert live.post("/detokenize", {"model": "bob", "tokens": []}).json() == {"prompt": ""}


# Metrics.


def scrape(live: Live) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of their names) -> value."""
    reply = live.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, *(v for _, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


def test_metrics_count_what_was_answered(live: Live) -> None:
    before = scrape(live)
    for _ in range(3):
        live.post("/v1/completions", GOOD | {"ignore_eos": True})
    after = scrape(live)

    def grown(*key: str) -> float:
        return after[key] - before.get(key, 0.0)

    prefix = "moetel_"
    assert grown(prefix + "prompt_tokens_total", "ana") == 15
    assert grown(prefix + "generation_tokens_total", "ana") == 12
    assert grown(prefix + "request_success_total", "length", "ana") == 3
    lookups = grown(prefix + "expert_lookups_total", "ana")
    assert lookups == 3 * (5 + 3) * 2 * 2
    assert (
        grown(prefix + "expert_hits_total", "ana") + grown(prefix + "expert_misses_total", "ana")
        == lookups
    )
    for name, count in (
        ("time_to_first_token_seconds", 3),
        ("inter_token_latency_seconds", 9),
        ("e2e_request_latency_seconds", 3),
        ("request_queue_time_seconds", 3),
        ("request_prefill_time_seconds", 3),
        ("request_decode_time_seconds", 3),
    ):
        assert grown(prefix + name + "_count", "ana") == count
    for name in ("num_requests_running", "num_requests_waiting", "reconfigurations_total"):
        assert (prefix + name, "ana") in after
    assert (prefix + "reconfiguration_seconds_sum", "ana") in after
    assert 0 <= after[(prefix + "kv_cache_usage_perc",)] <= 1
    assert after[(prefix + "reconfigured_bytes_total",)] >= 0
    assert after[(prefix + "tenant_resident", "device", "ana")] == 1
    assert after[(prefix + "device_bytes", "pool")] > 0
    assert {k[1] for k in after if k[0] == prefix + "device_bytes"} == {
        "pool",
        "residual",
        "non_expert",
        "kv",
    }


def test_the_gateways_inference_extension_finds_its_metrics(live: Live) -> None:
    """By the names and labels that it looks for in vLLM."""
    with ThreadPoolExecutor(12) as pool:
        body = GOOD | {"max_tokens": 400, "ignore_eos": True}
        replies = [pool.submit(live.post, "/v1/completions", body) for _ in range(12)]

        def full() -> bool:
            return scrape(live)[("vllm:num_requests_waiting",)] == 4

        wait_for(full)
        found = scrape(live)
        assert found[("vllm:num_requests_running",)] == 8
        assert 0 < found[("vllm:kv_cache_usage_perc",)] <= 1
        assert all(r.result().status_code == 200 for r in replies)
    (info,) = [key for key in found if key[0] == "vllm:lora_requests_info"]
    _, most, ready, waiting = info
    assert int(most) >= 3 and {"ana", "bob", "ids"} <= set(ready.split(","))
    assert waiting == "", "ana waits, and is ready"
    assert time.time() - 60 < found[info] <= time.time()


@pytest.mark.slow
def test_running_requests_show(live: Live, loop: Loop) -> None:
    thread = threading.Thread(
        target=live.post,
        args=("/v1/completions", GOOD | {"max_tokens": 600, "ignore_eos": True, "n": 12}),
    )
    thread.start()
    wait_for(lambda: scrape(live)[("moetel_num_requests_waiting", "ana")] == 4)
    assert scrape(live)[("moetel_num_requests_running", "ana")] == 8
    assert live.get("/load").json()["tenants"]["ana"] == {"running": 8, "waiting": 4}
    assert scrape(live)[("moetel_device_bytes", "kv")] > 0
    thread.join()
    wait_for(lambda: loop.busy() == 0)


# The status page.


def test_status(live: Live) -> None:
    live.post("/v1/completions", GOOD)
    found = live.get("/status.json?tenant=ana").json()
    assert (
        found["state"] == "ready" and found["family"] == "mixtral" and found["memory"]["pool"] > 0
    )
    ana = found["tenants"][0]
    assert (
        ana["name"] == "ana"
        and ana["ttft_p50_ms"] > 0
        and ana["misses"] > 0
        and ana["resident"] == "device"
    )
    assert [len(s) for s in found["series"].values()] == [60] * 3
    shown = found["map"]
    assert (shown["layers"], shown["experts"]) == (2, 4) and [len(r) for r in shown["kinds"]] == [
        4,
        4,
    ]
    assert "".join(shown["kinds"]).count("-") == 2  # 6 slots for 8 positions
    assert "map" not in live.get("/status.json").json()


def test_map_tells_kinds_apart(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tenants = {n: checkpoints[n] for n in ("ana", "bob")}
    for options, letters in (
        ({"policy": "round_robin", "slots": "all"}, {"o"}),
        ({"policy": "round_robin", "slots": 0}, {"-"}),
        ({"policy": "round_robin"}, {"s"}),
        ({}, {"m"}),
    ):
        path = tmp_path / f"store{len(list(tmp_path.iterdir()))}"
        build_store(path, tenants, **options)
        loop = Loop(load_engine(path, device="cpu"))
        with loop.serve() as live:
            shown = live.get("/status.json?tenant=bob").json()["map"]
        loop.close()
        assert set("".join(shown["kinds"])) >= letters, options
        assert ("1" in "".join(shown["residual"])) == (not options)


def test_the_page_needs_nothing_from_elsewhere(live: Live) -> None:
    page = live.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name, kind in (
        ("style.css", "text/css"),
        ("script.js", "text/javascript"),
        ("icon.svg", "image/svg+xml"),
    ):
        part = live.get(f"/page/{name}")
        assert part.status_code == 200 and part.headers["content-type"].startswith(kind)
        assert f"page/{name}" in page.text
        assert "http" not in part.text.replace("http://www.w3.org/2000/svg", "")
    assert "http" not in page.text


def test_the_last_minute() -> None:
    now = 100.0
    window = Window(clock=lambda: now)
    window.add("a", 1, first_s=0.5)
    window.add("a", 4, gap_s=0.1)
    now = 101.0
    window.add("a", 5, gap_s=0.3)
    now = 102.5
    assert window.tenant("a") == {
        "tokens_per_second": 1.0,
        "ttft_p50_ms": 500.0,
        "ttft_p95_ms": 500.0,
    }
    assert window.tenant("b") == {
        "tokens_per_second": 0.0,
        "ttft_p50_ms": None,
        "ttft_p95_ms": None,
    }
    series = window.series(["a", "b"])
    assert series["tokens"][-2:] == [5, 5] and series["itl_mean_ms"][-2:] == [100.0, 300.0]
    assert series["ttft_p50_ms"][-3:] == [None, 500.0, None]
    now = 161.0
    assert window.tenant("a")["ttft_p50_ms"] is None and sum(window.series(["a"])["tokens"]) == 5
    window.add("a", 1)
    assert len(window._buckets["a"]) <= 61
    for _ in range(3000):
        window.add("a", 1, first_s=0.0)
    assert len(window._buckets["a"][161].first.values) == SAMPLES
    assert (
        quantile([], 0.5) is None and quantile([3, 1, 2], 0.5) == 2 and quantile([1, 2], 1.0) == 2
    )


# Tenants come and go.


def test_admin_is_off_unless_enabled(live: Live) -> None:
    body = {"tenant_name": "x", "tenant_path": "/"}
    assert error(live.post("/v1/load_tenant", body), 403)["code"] == "admin_disabled"
    assert (
        "--enable-admin"
        in error(live.post("/v1/unload_tenant", {"tenant_name": "ana"}), 403)["message"]
    )


@pytest.fixture
def admin(checkpoints: dict[str, Path], tmp_path: Path) -> Any:
    """A server of its own whose tenants may change: (live, loop)."""
    tenants = {n: checkpoints[n] for n in ("ana", "bob")}
    build_store(tmp_path / "store", tenants, policy="round_robin", slots=6)
    loop = Loop(load_engine(tmp_path / "store", device="cpu"))
    with loop.serve(
        ServerSettings(enable_admin=True, tenant_roots=(checkpoints["new"].parent,))
    ) as live:
        yield live, loop
    loop.close()


def test_an_adapter_is_loaded_if_its_base_may_be(
    admin: tuple[Live, Loop], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """What an adapter names as its base is no way around --tenant-root."""
    live, _ = admin
    root = checkpoints["new"].parent
    outside = helpers.save(helpers.random_mixtral(5), tmp_path / "outside")
    body = {"tenant_name": "adapter", "tenant_path": str(root / "adapter")}
    adapters.write(root / "adapter", base_model_name_or_path=str(outside))
    found = error(live.post("/v1/load_tenant", body), 403)
    assert "the adapter's base lies outside" in found["message"]
    adapters.write(root / "adapter", base_model_name_or_path="some/base")
    assert "names 'some/base'" in error(live.post("/v1/load_tenant", body), 400)["message"]
    adapters.write(root / "adapter", base_model_name_or_path=str(checkpoints["ana"]))
    reply = live.post("/v1/load_tenant", body)
    assert reply.status_code == 200, reply.text
    assert live.post("/v1/completions", GOOD | {"model": "adapter"}).status_code == 200


def test_a_tenant_is_loaded_and_unloaded(
    admin: tuple[Live, Loop], checkpoints: dict[str, Path]
) -> None:
    live, loop = admin
    before = live.post("/v1/completions", GOOD).json()["choices"]
    reply = live.post(
        "/v1/load_tenant", {"tenant_name": "new", "tenant_path": str(checkpoints["new"])}
    )
    assert reply.status_code == 200 and reply.json() == {
        "tenant_name": "new",
        "status": "loaded",
    }, reply.text
    assert [m["id"] for m in live.get("/v1/models").json()["data"]] == ["ana", "bob", "new"]
    assert live.post("/v1/completions", GOOD | {"model": "new"}).status_code == 200
    assert live.post("/v1/completions", GOOD).json()["choices"] == before
    assert live.get("/status.json?tenant=new").json()["map"]["tenant"] == "new"
    again = live.post(
        "/v1/load_tenant", {"tenant_name": "new", "tenant_path": str(checkpoints["new"])}
    )
    assert "already" in error(again, 400)["message"]
    # Its running request is answered before it goes.
    long = GOOD | {"model": "new", "max_tokens": 500, "ignore_eos": True, "stream": True}
    with live.client.stream("POST", "/v1/completions", json=long) as stream:
        wait_for(lambda: loop.busy() == 1)
        unloaded: list[Any] = []
        thread = threading.Thread(
            target=lambda: unloaded.append(live.post("/v1/unload_tenant", {"tenant_name": "new"}))
        )
        thread.start()
        assert len(events("".join(stream.iter_text()))) == 501
    thread.join(30)
    assert unloaded[0].json() == {"tenant_name": "new", "status": "unloaded"}
    assert error(live.post("/v1/completions", GOOD | {"model": "new"}), 404)
    assert 'model_name="new"' not in live.get("/metrics").text
    assert live.post("/v1/completions", GOOD).json()["choices"] == before


def test_tenants_that_cannot_be_loaded(
    admin: tuple[Live, Loop], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    live, _ = admin
    link = checkpoints["new"].parent / "link"
    link.symlink_to(tmp_path)
    for path in (str(tmp_path), str(checkpoints["new"] / ".." / ".." / "x"), str(link), "/etc"):
        found = error(live.post("/v1/load_tenant", {"tenant_name": "x", "tenant_path": path}), 403)
        assert found["param"] == "tenant_path" and "--tenant-root" in found["message"]
    link.unlink()
    absent = str(checkpoints["new"].parent / "absent")
    assert (
        error(live.post("/v1/load_tenant", {"tenant_name": "x", "tenant_path": absent}), 400)[
            "param"
        ]
        == "tenant_path"
    )
    empty = checkpoints["new"].parent / "empty"
    empty.mkdir(exist_ok=True)
    assert error(live.post("/v1/load_tenant", {"tenant_name": "x", "tenant_path": str(empty)}), 400)
    bad = live.post(
        "/v1/load_tenant", {"tenant_name": "a/b", "tenant_path": str(checkpoints["new"])}
    )
    assert "tenant name" in error(bad, 400)["message"]
    assert (
        error(live.post("/v1/unload_tenant", {"tenant_name": "nobody"}), 404)["code"]
        == "model_not_found"
    )
    assert [m["id"] for m in live.get("/v1/models").json()["data"]] == ["ana", "bob"]


# The end.


def test_draining(loop: Loop) -> None:
    with loop.serve(ServerSettings(drain_timeout_s=20)) as live:
        service = live.app.state.service
        found: list[Any] = []
        body = GOOD | {"max_tokens": 300, "ignore_eos": True}
        thread = threading.Thread(target=lambda: found.append(live.post("/v1/completions", body)))
        thread.start()
        wait_for(lambda: loop.busy() == 1)
        service.start_draining()
        for reply in (
            live.post("/v1/completions", GOOD),
            live.get("/ready"),
            live.get("/v1/models"),
        ):
            assert (
                error(reply, 503)["code"] == "draining"
                and 1 <= int(reply.headers["retry-after"]) <= 20
            )
        assert live.get("/health").status_code == 200 and live.get("/metrics").status_code == 200
        assert live.get("/status.json").json()["state"] == "draining"
        assert loop.run(service.drained(20))
        thread.join(10)
        assert found[0].json()["usage"]["completion_tokens"] == 300


def test_what_does_not_end_is_cancelled(loop: Loop) -> None:
    with loop.serve() as live:
        service = live.app.state.service
        body = GOOD | {"max_tokens": 4000, "ignore_eos": True}
        found: dict[bool, str] = {}

        def send(stream: bool) -> None:
            found[stream] = live.post("/v1/completions", body | {"stream": stream}).text

        threads = [threading.Thread(target=send, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        wait_for(lambda: loop.busy() == 2)
        time.sleep(0.1)
        service.start_draining()
        assert not loop.run(service.drained(0.1))

        async def cancel() -> None:
            service.cancel_all()

        loop.run(cancel())
        for thread in threads:
            thread.join(10)
        assert '"code":"cancelled"' in found[False]
        assert '"code": "cancelled"' in events(found[True])[-2]
        wait_for(lambda: loop.busy() == 0)
