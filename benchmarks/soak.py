"""Does `moetel serve` bear everything that clients do, for as long as two hours of traffic?

    python -m benchmarks.soak STORE --requests 20000 --extra-tenant it=CHECKPOINT --markdown FILE

Starts `moetel serve` as a process of its own and sends it, many at once: greedy answers, compared
with the first of their kind, sampled ones, streams that are read to their end or left in the
middle, requests whose deadline passes, invalid JSON, bodies that are too long, unknown tenants;
meanwhile a tenant is loaded and unloaded again and again. Its memory is looked at all along. At the
end it gets SIGTERM under load: what it had begun must arrive whole.

Nothing may be lost: each request has one right kind of answer, and every other is a failure of the
    run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.common import Report, add_output, machine, write_output
from common.store import Store

COMPLETIONS = "/v1/completions"
BODY_LIMIT = 20_000
PROMPTS = 40  # different ones of each tenant
TOKENS = 12

# How often each kind of request is sent.
KINDS = {
    "greedy": 50,
    "stream": 15,
    "sampled": 10,
    "left in the middle": 10,
    "deadline": 3,
    "invalid JSON": 5,
    "wrong field": 3,
    "too long": 2,
    "unknown tenant": 2,
}


@dataclass
class Soak:
    """What was seen. wrong: requests that got another answer than they should."""

    client: httpx2.AsyncClient
    tenants: list[str]
    rng: random.Random
    expected: dict[tuple[str, int], str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def send(self, path: str, body: Any) -> tuple[int, bytes]:
        """POST and read the answer. body: bytes, or what is to be JSON. Status 0: the connection
        broke."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            answer = await self.client.post(path, content=content)
        except httpx2.TransportError:
            # A server that refuses a long body may close the connection while it is being sent.
            return 0, b""
        return answer.status_code, answer.content

    async def leave_in_the_middle(self, body: Any) -> None:
        """Read the beginning of a stream and go away."""
        async with self.client.stream("POST", COMPLETIONS, json=body) as answer:
            async for _ in answer.aiter_bytes():
                break

    async def one(self) -> None:
        """One request of a random kind."""
        kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
        tenant = self.rng.choice(self.tenants)
        number = self.rng.randrange(PROMPTS)
        asked: dict[str, Any] = {
            "model": tenant,
            "prompt": prompt(number),
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "temperature": 0,
        }
        self.counts[kind] += 1
        if kind == "invalid JSON":
            bad = self.rng.choice([b"{", b"[]", b"\xff\xfe", b'{"model": }', b"null"])
            await self.refused(kind, 400, bad)
        elif kind == "wrong field":
            await self.refused(kind, 400, {**asked, "temperature": "hot"})
        elif kind == "too long":
            await self.refused(kind, 413, {**asked, "prompt": "1 " * BODY_LIMIT})
        elif kind == "unknown tenant":
            await self.refused(kind, 404, {**asked, "model": "nobody"})
        elif kind == "deadline":
            late = {**asked, "max_tokens": 200, "deadline_ms": 1}
            status, _ = await self.send(COMPLETIONS, late)
            self.check(kind, status in (200, 408), f"status {status}")
        elif kind == "left in the middle":
            await self.leave_in_the_middle({**asked, "max_tokens": 200, "stream": True})
        elif kind == "sampled":
            status, data = await self.send(COMPLETIONS, {**asked, "temperature": 1.0})
            self.check(
                kind,
                status == 200 and tokens_of(data) == TOKENS,
                f"status {status}, {tokens_of(data)} tokens",
            )
        else:
            await self.greedy(kind, tenant, number, asked)

    async def greedy(self, kind: str, tenant: str, number: int, asked: dict[str, Any]) -> None:
        """An answer that must be the same whenever it is asked for and whatever goes on beside
        it."""
        # Ended where the tenant ends it: what it would say after that are ties that any rounding
        # decides.
        asked |= {"stream": kind == "stream", "ignore_eos": False, "max_tokens": 100}
        status, data = await self.send(COMPLETIONS, asked)
        text = streamed_text(data) if kind == "stream" else text_of(data)
        if status != 200 or text is None:
            self.check(kind, False, f"status {status}")
            return
        first = self.expected.setdefault((tenant, number), text)
        self.check(
            kind,
            text == first,
            f"{tenant} answers prompt {number} with {text!r}, before with {first!r}",
        )

    async def refused(self, kind: str, status: int, body: Any) -> None:
        found, data = await self.send(COMPLETIONS, body)
        # What is far too long may be cut off before the refusal is read.
        right = found == status or (kind == "too long" and found == 0)
        self.check(kind, right and (found == 0 or b'"error"' in data), f"status {found}")

    def check(self, kind: str, right: bool, what: str) -> None:
        if not right:
            self.wrong.append(f"{kind}: {what}")


def prompt(number: int) -> str:
    return str(1000 + 37 * number)


def text_of(data: bytes) -> str | None:
    try:
        return str(json.loads(data)["choices"][0]["text"])
    except (ValueError, KeyError, IndexError):
        return None


def tokens_of(data: bytes) -> int | None:
    try:
        return int(json.loads(data)["usage"]["completion_tokens"])
    except (ValueError, KeyError):
        return None


def streamed_text(data: bytes) -> str | None:
    """The text of a whole stream; None if it does not end as it should."""
    events = [e.removeprefix(b"data: ") for e in data.split(b"\n\n") if e]
    if not events or events[-1] != b"[DONE]":
        return None
    return "".join(str(c["text"]) for e in events[:-1] for c in json.loads(e).get("choices", []))


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise OSError(f"no VmRSS of process {pid}")


async def tenants_come_and_go(soak: Soak, name: str, checkpoint: str, stop: asyncio.Event) -> int:
    """Load and unload a tenant until `stop`; how often."""
    times = 0
    while not stop.is_set():
        for path, body in (
            ("/v1/load_tenant", {"tenant_name": name, "tenant_path": checkpoint}),
            ("/v1/unload_tenant", {"tenant_name": name}),
        ):
            status, data = await soak.send(path, body)
            soak.check(path, status == 200, f"status {status}: {data[:200]!r}")
            asked = {"model": name, "prompt": "7", "max_tokens": 4, "ignore_eos": True}
            status, _ = await soak.send(COMPLETIONS, asked)
            soak.check(
                path,
                status == (200 if path == "/v1/load_tenant" else 404),
                f"then its request gets {status}",
            )
        times += 1
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 5)
    return times


async def run(args: argparse.Namespace, soak: Soak, pid: int, report: Report) -> None:
    start = time.perf_counter()
    left = args.requests
    memory: list[float] = []

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await soak.one()

    async def watch(stop: asyncio.Event) -> None:
        while not stop.is_set():
            memory.append(resident_mib(pid))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), max(0.2, args.requests / 50_000))

    stop = asyncio.Event()
    watching = asyncio.create_task(watch(stop))
    changing = None
    if args.extra_tenant:
        name, _, checkpoint = args.extra_tenant.partition("=")
        changing = asyncio.create_task(tenants_come_and_go(soak, name, checkpoint, stop))
    await asyncio.gather(*(client() for _ in range(args.concurrency)))
    stop.set()
    await watching
    changes = await changing if changing else 0
    took = time.perf_counter() - start
    for kind in KINDS:
        report.add(what=kind, number=soak.counts[kind])
    report.add(what="tenant loaded and unloaded", number=changes)
    report.add(what="wrong answers", number=len(soak.wrong))
    fifth = max(1, len(memory) // 5)
    early, late = (
        sorted(part)[len(part) // 2] for part in (memory[fifth : 2 * fifth], memory[-fifth:])
    )
    report.add(what="seconds", number=f"{took:.0f}")
    report.add(what="requests a second", number=f"{args.requests / took:.0f}")
    report.add(what="server's memory, second fifth of the time, median, MiB", number=f"{early:.1f}")
    report.add(what="server's memory, last fifth, median, MiB", number=f"{late:.1f}")
    report.add(
        what="growth a thousand requests, KiB",
        number=f"{(late - early) * 1024 / (0.7 * args.requests / 1e3):.1f}",
    )


async def sigterm_under_load(soak: Soak, process: subprocess.Popen[str], report: Report) -> None:
    """Whoever's answer had begun gets all of it; the process ends with 0."""

    async def whole() -> bool | None:
        body = {
            "model": soak.rng.choice(soak.tenants),
            "prompt": "12",
            "max_tokens": 100,
            "ignore_eos": True,
        }
        # Status 0: it came when the door was shut already.
        status, data = await soak.send(COMPLETIONS, {**body, "stream": True})
        return None if status in (0, 503) else streamed_text(data) is not None

    asked = [asyncio.create_task(whole()) for _ in range(24)]
    await asyncio.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    found = await asyncio.gather(*asked)
    code = await asyncio.to_thread(process.wait, 60)
    begun = [f for f in found if f is not None]
    report.add(what="SIGTERM: answers under way, all whole", number=f"{len(begun)}, {all(begun)}")
    report.add(what="SIGTERM: exit status", number=code)
    soak.check("SIGTERM", all(begun) and code == 0, f"{begun}, exit status {code}")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "store", type=Path, help="its tenants have tokenizers; --extra-tenant changes it"
    )
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument(
        "--extra-tenant", metavar="NAME=CHECKPOINT", help="load and unload it all along"
    )
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    args = parser.parse_args(argv)
    flags = f"--port 0 --enable-admin --max-request-bytes {BODY_LIMIT} --log-level error"
    command = [sys.executable, "-m", "scripts.cli", "serve", str(args.store), *flags.split()]
    command += ["--dtype", "float32"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout is not None
    report = Report(
        f"Soak of moetel serve, {args.requests} requests, {args.concurrency} at once",
        ("what", "number"),
    )
    try:
        line = process.stdout.readline()
        if "://" not in line:
            raise SystemExit(f"the server did not start: {line!r}")

        async def everything() -> Soak:
            # A connection a request: those that are kept open would be cut by a stop.
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
            url = line[line.index("http://") :].strip()
            async with httpx2.AsyncClient(
                base_url=url,
                limits=limits,
                timeout=None,
                headers={"Content-Type": "application/json"},
            ) as client:
                tenants = list(Store.open(args.store).tenants)
                soak = Soak(client, tenants, random.Random(args.seed))
                await run(args, soak, process.pid, report)
                await sigterm_under_load(soak, process, report)
                return soak

        soak = asyncio.run(everything())
    finally:
        process.kill()
        process.wait()
    report.note(f"{machine()}; `python -m benchmarks.soak {args.store} --requests {args.requests}`")
    for wrong in soak.wrong[:20]:
        report.note(f"wrong: {wrong}")
    write_output(args, [report], "Soak")
    if soak.wrong:
        raise SystemExit(f"{len(soak.wrong)} requests got a wrong answer, such as: {soak.wrong[0]}")
    return report.rows


if __name__ == "__main__":
    main()
