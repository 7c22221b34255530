"""Which requests advance in the next step, and by how much: continuous batching across tenants.

Every step is chosen anew from all requests that are there:

1. *Tenants.* If the device holds fewer tenants' non-expert weights than have requests, a step is
   for those in use. A tenant stays in use for a *turn*, long enough that reconfigurations take at
   most `switch_share` of the time; then the tenant that was served least takes the place of the one
   that was served most.
2. *Places.* The `max_num_seqs` places of a step are shared among tenants by weighted max-min
   fairness: what one does not need goes to the others. A tenant that
   floods the device is held back (`common.serving.flood`). A tenant's own
   requests take its places by priority, then deadline, then arrival. A request that loses its place
   keeps its caches and goes on later.
3. *Tokens.* Each answering request gets one token. What is left of the step's tokens is read of
   prompts, those of the tenant that was served least first; while others answer, at most
   `prefill_chunk` of them, so that a long prompt stalls nobody.
4. *Memory.* A request begins only if the caches have room for it. If those that run outgrow them,
   the one that should go last gives its caches up and is computed again later.

What a tenant was served is counted as in "Fairness in Serving Large Language Models" (arXiv
2401.00588): tokens, an answer's counting more than a prompt's, over the tenant's weight; a tenant
that comes back from idleness starts at the least of those at work, so that nobody saves up service.

Nothing here knows an architecture, a framework or a clock: times are given by the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from common.errors import EngineError, OverloadedError
from common.serving.backend import Backend, Part, Step
from common.serving.flood import Floods
from common.serving.places import first_of, max_min
from common.serving.request import Request
from common.serving.scheduler_options import SchedulerOptions
from common.serving.shared_prefix import waits_for_prefix
from common.serving.turns import Turns

ANSWER_COST = 4.0
"""What a token of an answer counts, a prompt's token counting 1: what providers charge for them,
and about what they cost a batch of a few rows."""


AHEAD = 32
"""Tokens that a request must have room to grow by before it begins, so that it is not put off at
once."""


@dataclass
class _Tenant:
    """A tenant's requests and what it was served."""

    requests: list[Request] = field(default_factory=list)
    served: float = 0.0


class NoRoomError(EngineError):
    """A request that needs more cache than there is, though it has all of it."""

    def __init__(self, request: Request):
        super().__init__(
            f"a request of tenant {request.tenant!r} with {request.unread} tokens needs more cache "
            "than there is; "
            "give the engine more (kv_cache_bytes), or send a shorter one"
        )
        self.request = request


class Scheduler:
    """Holds all unfinished requests, and says what the next step does. Drives `Backend.begin`,
    `fits` and `end`."""

    def __init__(self, backend: Backend, options: SchedulerOptions):
        self._backend, self.options = backend, options
        self._tenants: dict[str, _Tenant] = {}
        self._turns = Turns(backend, options.switch_share, self.served)
        self._numbers = 0
        self._floods = Floods(backend, options, self.requests)
        self._began_at = 0.0
        self.preemptions = 0

    # Requests come and go.

    def add(self, request: Request, *, bounded: bool = True) -> None:
        """Take a request. bounded: refuse it if the queue is full. Raises OverloadedError."""
        if bounded:
            self._refuse_if_full(request.tenant)
        self._numbers += 1
        request.number = self._numbers
        mine = self._tenants.setdefault(request.tenant, _Tenant())
        if not mine.requests:
            others = [t.served for t in self._tenants.values() if t.requests]
            mine.served = max(mine.served, min(others, default=mine.served))
        mine.requests.append(request)
        self._floods.arrived(request)

    def _refuse_if_full(self, tenant: str) -> None:
        bound = self.options.max_queue_per_tenant
        mine = self.waiting(tenant)
        if bound is not None and mine >= bound:
            raise OverloadedError(
                f"{mine} requests of tenant {tenant!r} wait already; try again later", mine
            )
        total = sum(self.waiting(t) for t in self._tenants)
        if total >= self.options.max_queue:
            raise OverloadedError(f"{total} requests wait already; try again later", total)

    def remove(self, request: Request) -> None:
        """Forget a request, finished or not, and free its caches."""
        self._give_up(request)
        mine = self._tenants.get(request.tenant)
        if mine is not None and request in mine.requests:
            mine.requests.remove(request)
            if request.finish_reason in ("stop", "length"):
                self._floods.demand.answered(request)

    def forget_tenant(self, tenant: str) -> None:
        """Drop the account of a tenant without requests."""
        assert not self.requests(tenant)
        self._tenants.pop(tenant, None)
        self._floods.demand.forget(tenant)
        self._turns.forget(tenant)

    def requests(self, tenant: str | None = None) -> list[Request]:
        """All unfinished requests, or those of a tenant."""
        names = self._tenants if tenant is None else [tenant]
        return [r for n in names if n in self._tenants for r in self._tenants[n].requests]

    def waiting(self, tenant: str) -> int:
        """Requests of which nothing was read yet."""
        return sum(r.started_at is None for r in self.requests(tenant))

    def expired(self, now: float) -> list[Request]:
        """Requests whose deadline has passed."""
        return [r for r in self.requests() if r.deadline <= now]

    @property
    def has_work(self) -> bool:
        return any(t.requests for t in self._tenants.values())

    def served(self, tenant: str) -> float:
        """What a tenant was served, in prompt tokens over its weight."""
        return self._tenants[tenant].served if tenant in self._tenants else 0.0

    @property
    def flooding(self) -> frozenset[str]:
        """Tenants that flooded the device in the last step and were held to their shares of it."""
        return self._floods.tenants

    # A step.

    def next(self, now: float, *, alone: bool = False) -> list[tuple[Request, Part]]:
        """The requests of the next step, and what each does. Empty only if there is no request.

        alone: nobody waits for these answers one by one, so prompts are read in as large pieces as
        a step takes, and no place stays free.
        Raises NoRoomError.
        """
        active = [name for name, tenant in self._tenants.items() if tenant.requests]
        if not active:
            return []
        self._floods.passed(now, active)
        in_use = self._turns.choose(active, now)
        given = self._choose_places(in_use, now, alone)
        ranked = [r for name in in_use for r in first_of(self._tenants[name].requests, given[name])]
        answering = [r for r in ranked if r.sequence is not None and r.unread == 0]
        parts = self._answer(answering)
        # Those that were put off just now are read again from their beginning, after those that
        # kept their caches.
        reading = [r for r in ranked if r not in parts]
        room = self.options.max_num_batched_tokens - len(parts)
        if parts and not alone:
            room = min(room, self._floods.chunk)
        self._read(reading, parts, room)
        if not parts:
            parts = self._make_progress(ranked, room)
        for request in parts:
            if request.started_at is None:
                request.started_at = now
                self._floods.began(request)
        self._floods.charge(parts)
        self._began_at = now
        return list(parts.items())

    def done(self, parts: Sequence[tuple[Request, Part]], step: Step, now: float) -> None:
        """Count what a step served, how far reading got and, from what the clock was at `next`, how
        long it took."""
        for request, part in parts:
            # Computing again what was given up is not charged to who gave it up.
            cost = 0.0 if request.preemptions else float(part.read)
            request.unread -= part.read
            if request.unread == 0:
                cost += ANSWER_COST
            self._tenants[request.tenant].served += cost / self.options.weight(request.tenant)
        for name, seconds in step.reconfiguration_s.items():
            if name in self._tenants:
                self._turns.switched(name, seconds)
        if self._backend.prefetches and any(step.reconfiguration_s.values()):
            return  # copies run beside the step: what of its time they took is not known
        computing_s = now - self._began_at - sum(step.reconfiguration_s.values())
        tenants = len({request.tenant for request, _ in parts})
        self._floods.times.add(
            tenants, len(parts), sum(part.read for _, part in parts), max(0.0, computing_s)
        )

    # Places.

    def _choose_places(self, names: Sequence[str], now: float, alone: bool) -> dict[str, int]:
        """How many places each tenant has."""
        wanted = {n: min(len(self._tenants[n].requests), self.options.limit(n)) for n in names}
        shares = self._shares(wanted, now)
        flooding = frozenset() if alone else self._floods.flooding(wanted, shares)
        if not flooding:
            self._floods.end()
            return self._max_min(wanted, self.options.max_num_seqs)
        calm = {n: count for n, count in wanted.items() if n not in flooding}
        places = self._floods.places(flooding, calm, sum(shares[n] for n in flooding), now)
        held = self._max_min({n: wanted[n] for n in flooding}, places)
        return self._max_min(calm | held, self.options.max_num_seqs)

    def _max_min(self, wanted: Mapping[str, int], places: int) -> dict[str, int]:
        return max_min(wanted, places, self.options.weight, self.served)

    def _shares(self, names: Iterable[str], now: float) -> dict[str, float]:
        """Each tenant's share of the device by weight, beside all that lately asked for something.

        A tenant that happens to have no request now has its share all the same: others' steps would
        else grow and shrink with its pauses. Where tenants take turns those of others are no
        concern of a step.
        """
        here = set(names)
        asking = here | self._floods.demand.tenants(now)
        if len(asking) > self._backend.max_ready_tenants:
            asking = here
        total = sum(self.options.weight(n) for n in asking)
        return {n: self.options.weight(n) / total for n in here}

    # Tokens and memory.

    def _answer(self, answering: Sequence[Request]) -> dict[Request, Part]:
        """One token for each, after putting off as many requests as the caches' room demands."""
        going = list(answering)
        while going:
            parts = {r: self._part(r) for r in going}
            if self._backend.fits(list(parts.values())):
                return parts
            victim = self._victim(keep=going[:1])
            if victim is None:
                return {}
            self._put_off(victim)
            if victim in going:
                going.remove(victim)
        return {}

    def _part(self, request: Request, read: int = 0) -> Part:
        assert request.sequence is not None
        token_id = -1 if read else request.next_token
        return Part(
            request.sequence,
            read,
            token_id,
            request.wants_logits and read in (0, request.unread),
            request.lacking_prompt_logprobs if read else None,
        )

    def _read(self, reading: Sequence[Request], parts: dict[Request, Part], room: int) -> None:
        """Fill the step's room with pieces of prompts; a request that does not fit holds up its
        tenant's later ones.

        One whose beginning is just being computed for another waits to find it in the cache.
        """
        queues: dict[str, list[Request]] = {}
        for request in reading:
            queues.setdefault(request.tenant, []).append(request)
        counts = {name: self._tenants[name].served for name in queues}
        flood_room = self._floods.room()
        while queues and room > 0:
            name = min(queues, key=lambda n: counts[n])
            floods = name in self._floods.tenants
            if floods and not flood_room:
                del queues[name]
                continue
            request = queues[name].pop(0)
            if not queues[name]:
                del queues[name]
            if waits_for_prefix(request, parts, self._backend.prefix_block):
                continue
            most = min(room, flood_room) if floods else room
            if self._begin(request, most, parts, set(reading)):
                piece = parts[request].read
                room -= piece
                flood_room -= piece if floods else 0
                counts[name] += piece / self.options.weight(name)
            else:
                queues.pop(name, None)

    def _start(self, request: Request) -> None:
        """Begin its sequence. What the cache holds of it need not be read."""
        request.sequence = self._backend.begin(request.row())
        found = self._backend.cached(request.sequence)
        request.unread -= found
        if request.started_at is None:
            request.num_cached_tokens = found

    def _begin(
        self, request: Request, most: int, parts: dict[Request, Part], placed: set[Request]
    ) -> bool:
        """Add a piece of a request's prompt to the step, if the caches have room for it.

        most: tokens of the piece. placed: requests that have a place in this step; others that wait
            with their caches may have to give them up.
        """
        begun = request.sequence is None
        while True:
            if request.sequence is None:
                self._start(request)
            part = self._part(request, min(request.unread, most))
            # One that begins must find room for all of its prompt and to grow; one that goes on,
            # for this step.
            needed = self._part(request, request.unread) if begun else part
            if self._backend.fits([*parts.values(), needed], AHEAD if begun else 0):
                parts[request] = part
                return True
            served = self._tenants[request.tenant].served
            victim = self._victim(keep=[*parts, *placed])
            if victim is None or self._tenants[victim.tenant].served <= served:
                if begun:
                    self._give_up(request)
                return False
            self._put_off(victim)

    def _make_progress(self, ranked: Sequence[Request], room: int) -> dict[Request, Part]:
        """The step of a device whose caches are full of requests that may not go on: the first of
        `ranked` goes."""
        first = min(ranked, key=lambda r: (self._tenants[r.tenant].served, r.order))
        while True:
            if first.sequence is None:
                self._start(first)
            part = self._part(first, min(first.unread, room)) if first.unread else self._part(first)
            if self._backend.fits([part]):
                return {first: part}
            victim = self._victim(keep=[first])
            if victim is None:
                self._give_up(first)
                raise NoRoomError(first)
            self._put_off(victim)

    def _victim(self, keep: Iterable[Request]) -> Request | None:
        """Whose caches to give up: of the tenant that was served most, the request that should go
        last."""
        kept = set(keep)
        having = [r for r in self.requests() if r.sequence is not None and r not in kept]
        return max(having, key=lambda r: (self._tenants[r.tenant].served, r.order), default=None)

    def _put_off(self, request: Request) -> None:
        self._give_up(request)
        request.preemptions += 1
        self.preemptions += 1

    def _give_up(self, request: Request) -> None:
        """Free a request's caches; all that it has is to be read again."""
        if request.sequence is not None:
            self._backend.end([request.sequence])
            request.sequence = None
        request.unread = request.row().unread
