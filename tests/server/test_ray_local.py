"""`moetel serve STORE --ray`: a command that starts Ray, serves, and ends with it."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest

from common.errors import RequestError
from scripts.cli import make_parser
from scripts.commands.serve import add_arguments
from scripts.ray.local import application_arguments
from scripts.ray.settings import RaySettings
from scripts.server.process import ServeError
from tests.helpers import REPOSITORY


def arguments_of(*options: str) -> dict[str, Any]:
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    args = make_parser()[0].parse_args(["serve", "STORE", "--ray", *options])
    return application_arguments(args, defaults.get_default)


def test_options_become_arguments_of_the_application() -> None:
    options = ["--replicas", "2", "--max-num-seqs", "8", "--reasoning-parser", "qwen3"]
    found = arguments_of(*options, "--no-watch", "--drain-timeout", "5", "--dtype", "float32")
    settings = RaySettings.of(found)
    assert (settings.replicas, settings.max_num_seqs, settings.drain_timeout_s) == (2, 8, 5.0)
    assert settings.reasoning_parser == "qwen3" and not settings.watch
    assert settings.dtype == "float32" and Path(settings.store).is_absolute()


@pytest.mark.parametrize(
    "option",
    [
        ["--enable-admin"],
        ["--prefill-chunk", "7"],
        ["--tenant-weight", "a=2"],
        ["--no-enable-prefix-caching"],
        ["--generation-config", "vllm"],
        ["--tenant", "a=PATH"],
    ],
    ids=str,
)
def test_options_without_a_meaning_on_ray_are_refused(option: list[str]) -> None:
    name = option[0].replace("--no-", "--")
    with pytest.raises(ServeError, match=f"{name} has no effect with --ray"):
        arguments_of(*option)


def test_ray_chooses_gpus() -> None:
    with pytest.raises(ServeError, match="Ray says which GPU"):
        arguments_of("--device", "cuda:1")


@pytest.mark.parametrize("name", ["tool_call_parser", "reasoning_parser"])
def test_formats_that_nobody_knows_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"args: {name} is 'guess'; give one of '"):
        RaySettings.of({"store": "STORE", name: "guess"})


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_serves_and_ends_when_answers_are_whole(four_tenants: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'moetel[ray]'")
    command = [sys.executable, "-m", "scripts.cli", "serve", str(four_tenants), "--ray"]
    process = subprocess.Popen(
        [
            *command,
            "--replicas",
            "2",
            "--port",
            "0",
            "--device",
            "cpu",
            "--kv-cache-bytes",
            "64MiB",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "moetel serves" in line)
        url = re.findall(r"http://\S+", line)[0]
        body = {"model": "ids", "prompt": [3, 4], "max_tokens": 5, "temperature": 0}
        for tenant in ("ana", "bob", "ids", "new"):
            reply = httpx2.post(f"{url}/v1/completions", json=body | {"model": tenant}, timeout=60)
            assert reply.status_code == 200, reply.text
        long = body | {"max_tokens": 1500, "stream": True, "ignore_eos": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=long, timeout=120) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [text for text in lines if text.startswith("data: {")]
        last = json.loads(rest[-1].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length", last
        # What is printed meanwhile has to be read.
        threading.Thread(target=process.stdout.read, daemon=True).start()
        assert process.wait(120) == 0
    finally:
        process.kill()
