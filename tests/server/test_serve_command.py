"""`moetel serve` as a process: start, signals, what goes wrong before it starts."""

from __future__ import annotations

import argparse
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from common import EngineError, Store, build_store
from common.serving.engine import Engine
from scripts import cli
from scripts.commands import serve as command
from scripts.server.keys import new_key
from tests import helpers
from tests.server.live import events, wait_for

GOOD = {"model": "ana", "prompt": "hello", "temperature": 0, "ignore_eos": True}


class Process:
    def __init__(self, process: subprocess.Popen[str], first: str):
        self.process, self.first = process, first
        self.url = re.findall(r"http://\S+", first)[0]

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; returns the exit code and the log."""
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=240)
        return self.process.returncode, log


@contextmanager
def serving(store: Path, *arguments: str) -> Iterator[Process]:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "scripts.cli",
            "serve",
            str(store),
            "--port",
            "0",
            "--device",
            "cpu",
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=helpers.REPOSITORY,
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first, process.communicate()[1]
        yield Process(process, first)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_sigterm_under_load(store_path: Path) -> None:
    """All answers that were begun arrive whole, new ones are refused, the exit code is 0."""
    # Twelve long answers, four at a time: on a busy machine they take longer than the default.
    with serving(store_path, "--max-num-seqs", "4", "--drain-timeout", "200") as server:
        assert re.fullmatch(
            r"moetel serves 3 tenants \(ana, bob, ids\) at http://127\.0\.0\.1:\d+\n", server.first
        )
        expected = httpx2.post(
            f"{server.url}/v1/completions", json=GOOD | {"max_tokens": 800}, timeout=200
        )
        text = expected.json()["choices"][0]["text"]
        texts = []

        def send(stream: bool) -> None:
            body = GOOD | {"max_tokens": 800, "stream": stream}
            with httpx2.Client(timeout=200) as client:
                if not stream:
                    texts.append(
                        client.post(f"{server.url}/v1/completions", json=body).json()["choices"][0][
                            "text"
                        ]
                    )
                    return
                with client.stream("POST", f"{server.url}/v1/completions", json=body) as reply:
                    *found, last = events("".join(reply.iter_text()))
                assert last == "[DONE]"
                texts.append("".join(json.loads(e)["choices"][0]["text"] for e in found))

        with ThreadPoolExecutor(12) as pool:
            sent = [pool.submit(send, bool(i % 2)) for i in range(12)]
            wait_for(lambda: httpx2.get(f"{server.url}/load").json()["server_load"] == 12)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx2.get(f"{server.url}/ready").status_code == 503)
            refused = httpx2.post(f"{server.url}/v1/completions", json=GOOD)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            for each in sent:
                each.result(200)
        assert texts == [text] * 12
        _, log = server.process.communicate(timeout=30)
        assert server.process.returncode == 0, log
        assert "stopping: 12 requests are being answered" in log and "Traceback" not in log
        assert "hello" not in log


@pytest.mark.slow
def test_a_second_signal_does_not_wait(store_path: Path) -> None:
    with serving(store_path, "--log-level", "warning") as server, ThreadPoolExecutor(1) as pool:
        body = GOOD | {"max_tokens": 4000}
        sent = pool.submit(httpx2.post, f"{server.url}/v1/completions", json=body, timeout=240)
        wait_for(lambda: httpx2.get(f"{server.url}/load").json()["server_load"] == 1)
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: httpx2.get(f"{server.url}/ready").status_code == 503)
        code, log = server.stop(signal.SIGINT)
        assert code == 0 and "1 requests are cancelled" in log and "Traceback" not in log
        assert sent.result().json()["error"]["code"] == "cancelled"


@pytest.mark.slow
def test_options_have_effect(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert cli.main(["build", str(store), f"--tenant=ana={checkpoints['ana']}"]) == 0
    secret, line = new_key(["bob"])
    (tmp_path / "keys").write_text(line)
    with serving(
        store,
        *(
            "--tenant",
            f"ana={checkpoints['ana']}",
            "--tenant",
            f"bob={checkpoints['bob']}",
            "--max-model-len",
            "100",
        ),
        *(
            "--kv-cache-bytes",
            "1MiB",
            "--tenant-weight",
            "bob=2",
            "--tenant-limit",
            "ana=1",
            "--max-queue",
            "3",
        ),
        *("--default-tenant-limit", "2", "--max-interference", "0"),
        *(
            "--api-keys",
            str(tmp_path / "keys"),
            "--max-request-bytes",
            "2000",
            "--prefill-chunk",
            "16",
        ),
    ) as server:
        assert Store.open(store).tenants == ("ana", "bob")
        headers = {"Authorization": f"Bearer {secret}"}
        models = httpx2.get(f"{server.url}/v1/models", headers=headers).json()["data"]
        assert [(m["id"], m["max_model_len"]) for m in models] == [("bob", 100)]

        def ask(**fields: Any) -> httpx2.Response:
            body = GOOD | {"model": "bob"} | fields
            return httpx2.post(
                f"{server.url}/v1/completions", json=body, headers=headers, timeout=240
            )

        assert ask(max_tokens=500).json()["usage"]["total_tokens"] == 100
        assert "at most 3 in one request" in ask(n=4).json()["error"]["message"]
        assert ask(prompt="x" * 3000).status_code == 413
        code, log = server.stop()
        assert code == 0 and secret not in log


@pytest.mark.parametrize("flags, cached", [([], 32), (["--no-enable-prefix-caching"], 0)], ids=str)
def test_the_prefix_cache_can_be_switched_off(
    store_path: Path, flags: list[str], cached: int
) -> None:
    with _load(store_path, *flags) as engine:
        for found in (0, cached):
            assert engine.generate("ana", "p" * 40).num_cached_tokens == found


def test_an_engine_without_a_prefix_cache_refuses_it(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    tenant = helpers.REPOSITORY / "examples" / "tenants" / "switch" / "fr"
    build_store(tmp_path / "store", {"fr": tenant})
    for flag in ("--enable-prefix-caching", "--no-enable-prefix-caching"):
        with pytest.raises(EngineError, match="no option 'enable_prefix_caching'"):
            _load(tmp_path / "store", flag)


def _load(store: Path, *flags: str) -> Engine:
    """What a server with these flags answers with."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command._load(parser.parse_args([str(store), "--device", "cpu", "--no-warm-up", *flags]))


# Before it starts.


def test_help_is_quick() -> None:
    """Neither the command line nor its help loads the server's packages."""
    code = """
import sys
from scripts import cli
try:
    cli.main(sys.argv[1:])
except SystemExit:
    print(sorted(sys.modules))
"""
    for arguments in (["--help"], ["serve", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            cwd=helpers.REPOSITORY,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        loaded = done.stdout.splitlines()[-1]
        assert not any(
            f"'{name}'" in loaded
            for name in ("fastapi", "starlette", "uvicorn", "prometheus_client", "torch")
        )


def test_without_the_extra(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", str(store_path)]) == 1
    assert "pip install 'moetel[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--api-keys", "absent"], "absent: cannot be read"),
        (["--host", "0.0.0.0", "--enable-admin"], "give --api-keys FILE"),
        (["--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid"),
        (["--port", "TAKEN"], "choose another --host or --port"),
    ],
)
def test_what_cannot_be_served(
    store_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = [a.replace("TAKEN", str(taken.getsockname()[1])) for a in arguments]
        assert cli.main(["serve", str(store_path), *arguments]) == 1
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--port", "70000"], "0 to 65535"),
        (["--tenant-weight", "fr"], "write NAME=NUMBER"),
        (["--tenant-limit", "fr=x"], "write NAME=NUMBER"),
        (["--default-tenant-limit", "0"], "whole number from 1"),
        (["--kv-cache-bytes", "many"], "no size"),
        (["--max-num-seqs", "0"], "whole number from 1"),
        (["--drain-timeout", "-1"], "give seconds"),
        (["--allowed-origins", '["a", 1]'], "JSON list of texts"),
        (["--allowed-origins", "[a]"], "JSON list of texts"),
        (["--generation-config", "some/path"], "invalid choice"),
        (["--tenant", "a=~nobody-here/x"], "home directory"),
        (["--tenant", "fr"], "write NAME=CHECKPOINT"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", "store", *arguments])
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "is no store"),
        (["--tenant-weight", "nobody=2"], "no tenant 'nobody'"),
        (["--backend", "jax"], "does not serve"),
    ],
)
def test_a_store_that_cannot_be_loaded(
    store_path: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    store = store_path if arguments else tmp_path
    done = subprocess.run(
        [sys.executable, "-m", "scripts.cli", "serve", str(store), "--port", "0", *arguments],
        capture_output=True,
        text=True,
        cwd=helpers.REPOSITORY,
        timeout=240,
    )
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )
