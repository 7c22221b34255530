"""What does the whole path cost at a real model's size, in time and memory, command by command?

Random tenants of a real shape (OLMoE-1B-7B by default) with a tokenizer of words are written. Then
each command of a user runs in a process of its own: build with calibration, inspect, verify, pack,
generate, and serve with one request. Peak memory is that of the process; its own memory leaves out
pages of files that are mapped, which the kernel may drop.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.common import Report, add_output, machine, write_output
from benchmarks.material.random_models import write_random
from benchmarks.material.shape import add_model, shape_of
from common import Store

MOVED = 0.1  # of a fine-tune's weights, beside the base's
WORDS_A_TEXT = 200


class Watched:
    """A command in a process of its own, with the most memory that it had."""

    def __init__(self, arguments: list[str]):
        self._output = tempfile.TemporaryFile("w+")
        self._begun = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.cli", *arguments],
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        self.peak = self.own = 0

    def look(self) -> None:
        """Take note of its memory: bytes resident at the most, and of them its own."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if "VmHWM" in fields:
            self.peak = max(self.peak, int(fields["VmHWM"].split()[0]) * 1024)
            self.own = max(self.own, int(fields["RssAnon"].split()[0]) * 1024)

    def wait(self) -> float:
        """Until it has ended. Returns seconds. Raises RuntimeError with its output if it failed."""
        while self.process.poll() is None:
            self.look()
            time.sleep(0.05)
        taken = time.perf_counter() - self._begun
        if self.process.returncode not in (0, -15):
            self._output.seek(0)
            raise RuntimeError(self._output.read()[-3000:])
        return taken


def write_tenants(work: Path, config: dict[str, Any], count: int, texts: int) -> dict[str, Path]:
    """Checkpoints with a tokenizer of as many words as the vocabulary has, and texts of them."""
    words = {f"w{i}": i for i in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = {}
    for i in range(count):
        path = found[f"tenant{i}"] = work / f"tenant{i}"
        write_random(path, config, "bfloat16", i, moved=MOVED if i else None)
        tokenizer.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"})
        )
        rng = np.random.default_rng(i)
        rows = rng.integers(2, config["vocab_size"], (texts, WORDS_A_TEXT))
        lines = (json.dumps({"text": " ".join(f"w{n}" for n in row)}) for row in rows)
        (work / f"tenant{i}.jsonl").write_text("\n".join(lines))
    return found


def served(store: Path, name: str) -> tuple[Watched, float, float]:
    """A server that answered one request: seconds until it was ready, and until the answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.perf_counter()
    server = Watched(["serve", str(store), "--port", str(port), "--device", "cpu"])
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            server.look()
            if server.process.poll() is not None:
                server.wait()
            try:
                httpx2.get(f"{address}/ready", timeout=2).raise_for_status()
                break
            except httpx2.HTTPError:
                time.sleep(0.1)
        ready = time.perf_counter() - begun
        body = {"model": name, "prompt": "w5 w6 w7", "max_tokens": 16}
        begun = time.perf_counter()
        httpx2.post(f"{address}/v1/completions", json=body, timeout=600).raise_for_status()
        answered = time.perf_counter() - begun
        server.look()
    finally:
        server.process.terminate()
    server.wait()
    return server, ready, answered


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    parser.set_defaults(family="olmoe")
    parser.add_argument("--tenants", type=int, default=2)
    parser.add_argument("--texts", type=int, default=16, help="of calibration, of 200 words")
    parser.add_argument("--policy", default="residual")
    parser.add_argument("--work", type=Path, help="a folder with room; default: a temporary one")
    add_output(parser)
    args = parser.parse_args(argv)
    shape = shape_of(args)
    report = Report(
        "The whole path at a real size",
        ("command", "seconds", "peak memory, GiB", "of it its own, GiB"),
    )
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        paths = write_tenants(work, shape.config, args.tenants, args.texts)
        store, packed = work / "store", work / "packed"

        def row(command: str, run: Watched, seconds: float) -> None:
            report.add(
                command=command,
                seconds=f"{seconds:.1f}",
                **{
                    "peak memory, GiB": f"{run.peak / 2**30:.2f}",
                    "of it its own, GiB": f"{run.own / 2**30:.2f}",
                },
            )

        build = ["build", str(store), "--own-experts", "reference", "--policy", args.policy]
        for name, path in paths.items():
            build += ["--tenant", f"{name}={path}", "--calibrate", f"{name}={work / name}.jsonl"]
        for command, arguments in (
            ("build --calibrate", build),
            ("inspect", ["inspect", str(store)]),
            ("verify", ["verify", str(store)]),
            ("pack", ["pack", str(store), str(packed)]),
        ):
            run = Watched(arguments)
            row(command, run, run.wait())
        opened = Store.open(packed)
        about = opened.describe()
        pool = about["resident_copies"] * about["copy_bytes"] + about["residual_bytes"]
        shutil.rmtree(store)
        for path in paths.values():
            shutil.rmtree(path)
        name = opened.tenants[-1]
        prompt = ["--prompt", "w5 w6 w7", "--max-new-tokens", "16", "--device", "cpu"]
        run = Watched(["generate", str(packed), "--tenant", name, *prompt])
        row("generate, 16 tokens", run, run.wait())
        server, ready, answered = served(packed, name)
        row("serve, until ready", server, ready)
        row("serve, 16 tokens", server, answered)
        report.note(str(shape))
        report.note(
            f"{args.tenants} tenants, policy {args.policy}, {args.texts} texts of {WORDS_A_TEXT} "
            f"words each; pool and residuals {pool / 2**30:.2f} GiB; packed "
            f"{about['bytes_on_disk'] / 2**30:.2f} GiB; {machine()}"
        )
    write_output(args, [report], "The whole path at a real size")
    return report.rows


if __name__ == "__main__":
    main()
