"""What benchmarks share: statistics, the machine's description and bandwidth, random Mixtrals
written in seconds."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def scaled(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


def ratios(slower: Sequence[float], faster: Sequence[float]) -> Spread:
    """How many times as fast the second is, pair by pair of neighbouring measurements."""
    return Spread.of([a / b for a, b in zip(slower, faster, strict=True)])


@dataclass
class Report:
    """Rows of a table, printed as they come, and written as Markdown or JSON."""

    title: str
    columns: Sequence[str]
    notes: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print("  ".join(f"{name}: {row[name]}" for name in self.columns), flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def markdown(self) -> str:
        lines = [f"## {self.title}", ""]
        if self.rows:
            lines += ["| " + " | ".join(self.columns) + " |", "|" + " --- |" * len(self.columns)]
            lines += [
                "| " + " | ".join(str(row[c]) for c in self.columns) + " |" for row in self.rows
            ]
            lines.append("")
        return "\n".join([*lines, *(f"- {note}" for note in self.notes), ""])

    def to_json(self) -> dict[str, Any]:
        rows = [
            {k: v.__dict__ if isinstance(v, Spread) else v for k, v in row.items()}
            for row in self.rows
        ]
        return {"title": self.title, "notes": self.notes, "rows": rows}


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write every row here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")


def write_output(args: argparse.Namespace, reports: Sequence[Report], heading: str) -> None:
    if args.json:
        args.json.write_text(json.dumps([r.to_json() for r in reports], indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text("\n".join([f"# {heading}", "", *(r.markdown() for r in reports)]))


def machine() -> str:
    """Processor, cores, threads, memory, versions, date."""
    name = platform.processor() or platform.machine()
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
            if line.startswith("flags"):
                flags = set(line.split(":", 1)[1].split())
                break
    except OSError:
        pass
    wide = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    import transformers

    return (
        f"{date.today()}, {name}, {os.cpu_count()} cores ({', '.join(wide)}), "
        f"{torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )


def peak_rss_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


Clock = Callable[[], float]


def take_clock(parser: argparse.ArgumentParser) -> None:
    """An option for machines that other work shares; see `clock_of`."""
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and its CPU's time: other work counts less",
    )


def clock_of(args: argparse.Namespace) -> Clock:
    """What to measure with. Sets torch to one thread for CPU time, as waiting threads would spend
    it, too."""
    if not args.cpu_time:
        return time.perf_counter
    torch.set_num_threads(1)
    return time.process_time


def seconds(call: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    start = clock()
    call()
    return clock() - start


def memory_bandwidth(
    size_bytes: int = 1 << 30, repeats: int = 9, clock: Clock = time.perf_counter
) -> float:
    """Bytes a second of a plain read by all threads (a sum over more than the caches hold): the
    best of several."""
    data = torch.ones(size_bytes // 4)
    data.sum()
    return size_bytes / min(seconds(data.sum, clock) for _ in range(repeats))


@dataclass(frozen=True)
class Shape:
    """A Mixtral's sizes; the defaults are the 'mini' of 1.5 B parameters."""

    hidden_size: int = 1024
    intermediate_size: int = 3584
    num_hidden_layers: int = 16
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    vocab_size: int = 32000

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def config(self) -> dict[str, Any]:
        return self.__dict__ | {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "head_dim": self.head_dim,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        }

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size

    def step_weights(self, experts_hit: float) -> float:
        """Weights that a decode step reads when `experts_hit` different experts are hit a layer;
        embeddings aside."""
        kv = self.num_key_value_heads * self.head_dim
        attention = 2 * self.hidden_size**2 + 2 * self.hidden_size * kv
        layer = (
            attention
            + self.hidden_size * self.num_local_experts
            + experts_hit * self.expert_weights
        )
        return self.num_hidden_layers * layer + self.vocab_size * self.hidden_size

    def prefill_flops(self, tokens: int) -> float:
        """Multiplications and additions of a prompt's products; attention scores and the one head
        row aside."""
        return (
            2
            * tokens
            * (self.step_weights(self.num_experts_per_tok) - self.vocab_size * self.hidden_size)
        )


def add_shape(parser: argparse.ArgumentParser, default: Shape = Shape()) -> None:
    for name, value in default.__dict__.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}"
        )


def shape_of(args: argparse.Namespace) -> Shape:
    return Shape(**{name: getattr(args, name) for name in Shape().__dict__})


def write_random(
    path: Path, shape: Shape, dtype: torch.dtype, seed: int = 0, moved: float = 0.0
) -> Path:
    """Write a random checkpoint, a shard a layer. Routers get unit noise, so that tokens spread
    over experts.

    Each tensor repeats one block of noise from another start: fresh noise for gigabytes would take
    minutes.
    moved: how far all other weights are from those of the same seed with moved = 0, as a share of
        these.
    """
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    block = torch.empty(1 << 20).normal_(generator=generator)
    if moved:
        block += moved * torch.empty_like(block).normal_(
            generator=torch.Generator().manual_seed(int(1e6 * moved))
        )
    weight_map: dict[str, str] = {}
    total = 0

    def noise(*size: int, std: float = 0.02) -> torch.Tensor:
        count = torch.Size(size).numel()
        shifted = block.roll(int(torch.randint(len(block), (1,), generator=generator)))
        return (shifted.repeat(-(-count // len(block)))[:count] * std).to(dtype).view(size)

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, path / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(t.numel() * t.element_size() for t in tensors.values())

    hidden, inter = shape.hidden_size, shape.intermediate_size
    kv = shape.num_key_value_heads * shape.head_dim
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        router = torch.empty(shape.num_local_experts, hidden).normal_(generator=generator).to(dtype)
        tensors = {f"{prefix}.block_sparse_moe.gate.weight": router}
        for name, rows, columns in (
            ("q", hidden, hidden),
            ("k", kv, hidden),
            ("v", kv, hidden),
            ("o", hidden, hidden),
        ):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = noise(rows, columns)
        for name in ("input", "post_attention"):
            tensors[f"{prefix}.{name}_layernorm.weight"] = torch.ones(hidden, dtype=dtype)
        for expert in range(shape.num_local_experts):
            for name, size in (
                ("w1", (inter, hidden)),
                ("w2", (hidden, inter)),
                ("w3", (inter, hidden)),
            ):
                tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = noise(*size)
        shard(f"layer-{layer}.safetensors", tensors)
    vocab = (shape.vocab_size, hidden)
    rest = {"model.embed_tokens.weight": noise(*vocab, std=1.0), "lm_head.weight": noise(*vocab)}
    shard("rest.safetensors", rest | {"model.norm.weight": torch.ones(hidden, dtype=dtype)})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(
        json.dumps(shape.config | {"dtype": str(dtype).removeprefix("torch.")})
    )
    return path
