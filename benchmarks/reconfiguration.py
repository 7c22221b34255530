"""What does a tenant switch cost, with every tenant kept ready and with one?

Random tenants share a store; each mode serves the same prompts in turn, once to the tenant that the
last prompt went to and once to the next one. A switch among ready tenants is a look-up and copies
nothing; with one ready tenant the next one's non-expert weights are read from the store's mapped
files and packed anew.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    Report,
    Spread,
    add_output,
    machine,
    write_output,
)
from benchmarks.driving import add_engine, idle, open_engine, rates
from benchmarks.material.random_models import write_random
from benchmarks.material.shape import add_model, shape_of
from common import build_store
from common.serving.backend import Row
from common.serving.engine import Engine

COLUMNS = (
    "ready tenants",
    "switch, ms",
    "bytes copied a switch",
    "GB/s",
    "first token, same tenant, ms",
    "first token after a switch, ms",
    "non-expert memory, MB",
)


@dataclass
class Mode:
    """An engine with so many ready tenants, and what was measured on it, in seconds."""

    engine: Engine
    switch: list[float] = field(default_factory=list)
    stay_first: list[float] = field(default_factory=list)
    switch_first: list[float] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)

    def first_token(self, tenant: str, prompt: tuple[int, ...]) -> tuple[float, float]:
        """Seconds until the first token, and those of them spent on the switch."""
        begun = idle(time.perf_counter)
        batch = self.engine._require_backend().start([Row(tenant, prompt, 1)])
        step = batch.prefill(want_logits=False)
        first_s = idle(time.perf_counter) - begun
        batch.close()
        return first_s, step.reconfiguration_s.get(tenant, 0.0)

    def turn(self, tenant: str, prompt: tuple[int, ...]) -> None:
        """A prompt to a tenant that was not the last one, then to the same again."""
        before = self.engine.stats()
        first, switch = self.first_token(tenant, prompt)
        after = self.engine.stats()
        if after["reconfigurations"] != before["reconfigurations"] + 1:
            raise AssertionError("a turn must be exactly one switch")
        self.switch.append(switch)
        self.switch_first.append(first)
        self.copied.append(after["reconfigured_bytes"] - before["reconfigured_bytes"])
        self.stay_first.append(self.first_token(tenant, prompt)[0])

    def forget(self) -> None:
        for values in (self.switch, self.stay_first, self.switch_first, self.copied):
            values.clear()


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    # Experts take no part in a switch; small ones keep the store quick to write.
    add_model(
        parser,
        mixtral={"num_hidden_layers": 16, "intermediate_size": 256},
        switch={"d_ff": 256},
    )
    add_output(parser)
    add_engine(parser)
    parser.add_argument("--tenants", type=int, default=3, help="at least 2")
    parser.add_argument("--switches", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=20, help="tokens of each prompt")
    args = parser.parse_args(argv)
    if args.tenants < 2:
        parser.error("--tenants must be at least 2: a switch needs another tenant")
    shape = shape_of(args)
    rng = np.random.default_rng(0)
    report = Report("Tenant switch (reconfiguration)", COLUMNS)
    report.note(machine())
    report.note(f"{args.tenants} tenants, {shape}, {args.dtype}; prompts of {args.prompt} tokens")
    rates(args, report)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        root = Path(scratch)
        names = [f"tenant{i}" for i in range(args.tenants)]
        store = build_store(
            root / "store",
            {n: write_random(root / n, shape.config, args.dtype, i) for i, n in enumerate(names)},
            policy="round_robin",
        )
        modes = {
            ready: Mode(open_engine(store, args, ready_tenants=ready))
            for ready in (args.tenants, 1)
        }
        for turn in range(args.switches + args.tenants):
            if turn == args.tenants:  # every tenant has been visited once: warm
                for mode in modes.values():
                    mode.forget()
            prompt = tuple(rng.integers(3, shape.vocab_size, size=args.prompt).tolist())
            for mode in modes.values():
                mode.turn(names[(turn + 1) % args.tenants], prompt)
        for ready, mode in modes.items():
            switch, copied = Spread.of(mode.switch), max(mode.copied)
            report.add(
                **{
                    "ready tenants": "all" if ready == args.tenants else ready,
                    "switch, ms": switch.scaled(1e3),
                    "bytes copied a switch": copied,
                    "GB/s": f"{copied / switch.median / 1e9:.2f}" if copied else "-",
                    "first token, same tenant, ms": Spread.of(mode.stay_first).scaled(1e3),
                    "first token after a switch, ms": Spread.of(mode.switch_first).scaled(1e3),
                    "non-expert memory, MB": f"{mode.engine.stats()['non_expert_bytes'] / 1e6:.0f}",
                }
            )
            mode.engine.close()
    write_output(args, [report], f"Tenant switch, {args.family}")
    return report.rows


if __name__ == "__main__":
    main()
