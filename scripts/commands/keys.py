"""Make API keys for `moetel serve --api-keys FILE`: `moetel keys new --tenant fr >> FILE`.

The line for the file goes to standard output and tells only the key's hash; the key itself goes to
standard error, this once.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from scripts.server.keys import ALL, new_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser("new", help="make a key", description=__doc__)
    new.add_argument(
        "--tenant",
        action="append",
        default=[],
        metavar="NAME",
        help=f"a tenant that the key may use; repeatable; {ALL!r} for all, also those added later",
    )
    new.add_argument(
        "--admin",
        action="store_true",
        help="may load and unload tenants and read metrics; all tenants unless named",
    )
    new.add_argument("--name", metavar="TEXT", help="what logs call the key; made up if left out")
    new.set_defaults(parser=new)


def run(args: argparse.Namespace) -> int:
    if not args.tenant and not args.admin:
        args.parser.error(f"give --tenant NAME (or --tenant '{ALL}' for all), or --admin")
    secret, line = new_key(args.tenant or [ALL], args.admin, args.name)
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"The key, shown only now; clients send it as 'Authorization: Bearer KEY':\n{secret}",
        markup=False,
    )
    return 0
