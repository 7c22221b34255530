"""Answer a prompt as one of a store's tenants would; text appears as it is generated."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from common import Engine, SamplingParams, load_engine
from common.serving.checks import Prompt
from scripts import arguments


def token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write token ids as 1,2,3") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = SamplingParams()
    parser.add_argument("store", type=arguments.path, metavar="STORE")
    parser.add_argument("--tenant", required=True, metavar="NAME")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-ids", type=token_ids, metavar="IDS", help="token ids as 1,2,3")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a user's turn in the tenant's chat template",
    )
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=defaults.temperature, help="0 (the default) is greedy"
    )
    parser.add_argument("--top-k", type=int, default=defaults.top_k)
    parser.add_argument("--top-p", type=float, default=defaults.top_p)
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; repeatable",
    )
    parser.add_argument("--backend", choices=("auto", "torch", "jax"), default="auto")
    arguments.add_engine_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON: text, token ids, timings"
    )


def _prompt(engine: Engine, args: argparse.Namespace) -> Prompt:
    if args.chat and args.prompt is not None:
        return engine.apply_chat_template(args.tenant, [{"role": "user", "content": args.prompt}])
    return args.prompt if args.prompt is not None else list(args.prompt_ids)


def run(args: argparse.Namespace) -> int:
    params = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=args.stop,
    )
    with load_engine(
        args.store, backend=args.backend, device=args.device, dtype=args.dtype
    ) as engine:
        prompt = _prompt(engine, args)
        if args.json or not engine.text(args.tenant).has_tokenizer:
            out = engine.generate(args.tenant, prompt, params)
            text = (
                json.dumps(asdict(out), ensure_ascii=False)
                if args.json
                else " ".join(map(str, out.token_ids))
            )
            sys.stdout.write(text + "\n")
            return 0
        for piece in engine.stream(args.tenant, prompt, params):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    return 0
