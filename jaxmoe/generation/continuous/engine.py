"""`ContinuousEngine`: requests come and go while it runs, and each is what it would be alone."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxmoe.checks import instance_of
from jaxmoe.distributed import check_same
from jaxmoe.generation.continuous.edits import RowSettings
from jaxmoe.generation.continuous.inputs import decode_inputs, prefill_inputs
from jaxmoe.generation.continuous.job import Job
from jaxmoe.generation.continuous.programs import Chosen, SlotPrograms, slot_programs_of
from jaxmoe.generation.continuous.room import plan_sizes
from jaxmoe.generation.continuous.scheduler import Decode, Prefill, Scheduler
from jaxmoe.generation.programs import Leaves, Record
from jaxmoe.generation.requests import EngineCounts, FinishReason, Request, TokenResult
from jaxmoe.layers import check_usable
from jaxmoe.models import Decoder
from jaxmoe.models.routing import Routing
from jaxmoe.placement.balancer import Balancer


class Launch(NamedTuple):
    """A program under way.

    Attributes:
        chosen: tokens that come out of it; None for a prefill that ends no prompt.
        rows: jobs that get a token, each with its life and its row at the time.
        routing: routing that it tells.
    """

    chosen: Chosen | None
    rows: list[tuple[Job, int, int]]
    routing: Routing | None


class ContinuousEngine:
    """Generates for requests that come and go, with a fixed set of compiled programs.

    Requests are admitted as slots become free. Long prompts are prefilled in chunks, between which the others go on. Keys
    and values lie in pages: a request holds as many as its tokens need, and prompts that begin alike share those of their
    beginning. Where pages run out, the youngest request gives back its own and is computed again later. A request's output
    is what it would be alone, whatever else runs.

    The tokens of a step are handed out while the devices compute the next one. An engine belongs to one thread. Of several
    processes, each makes the same engine, and submits, cancels and steps alike; that they do is checked.

    Args:
        model: model from `jaxmoe.load`.
        num_slots: requests that run at the same time, rounded up to a multiple of the parts of the mesh that have rows of
            their own (dp·ep); None for 16 in each.
        page_size: tokens of a page.
        num_pages: pages of each of these parts; None for as many as most of its free memory holds, or 1 GiB where the
            device does not say, and no more than all slots can use.
        prefill_chunk: most tokens that are prefilled before the others go on; rounded up to whole pages.
        max_length: most tokens of a prompt and its output together; None for the model's number of positions.
        balancer: balancer that moves experts between steps when the devices' loads have become uneven.

    Raises:
        TypeError: the model or the balancer is something else.
        ValueError: a number is out of range, or not a page fits into the memory.
        NotImplementedError: a balancer over several processes, or a model whose routing is being replayed.

    Example:
        >>> engine = ContinuousEngine(model, num_slots=4, max_length=64)
        >>> number = engine.submit(Request(token_ids=[5, 6, 7], max_new_tokens=3))
        >>> tokens = []
        >>> while engine.has_work:
        ...     tokens += [result.token_id for result in engine.step()]
        >>> len(tokens)
        3
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_slots: int | None = None,
        page_size: int = 16,
        num_pages: int | None = None,
        prefill_chunk: int = 256,
        max_length: int | None = None,
        balancer: Balancer | None = None,
    ):
        instance_of("model", model, Decoder, "a model from jaxmoe.load")
        if balancer is not None:
            instance_of("balancer", balancer, Balancer, "a jaxmoe.Balancer")
            if model.mesh.is_multi_process:
                raise NotImplementedError("experts are not rebalanced between processes: leave balancer out")
        check_usable(model)
        self.balancer = balancer
        self._model = model
        self.sizes, layout = plan_sizes(
            model,
            num_slots=num_slots,
            page_size=page_size,
            num_pages=num_pages,
            prefill_chunk=prefill_chunk,
            max_length=max_length,
        )
        self.programs: SlotPrograms = slot_programs_of(model, self.sizes, layout)
        self._bind()
        self._settings = RowSettings(self.programs)
        self._scheduler = Scheduler(self.sizes, self._settings.admit)
        self._store = self.programs.empty(self._leaves)(self._leaves)
        self._token = self.programs.put(np.zeros(self.programs.slots, np.int32))
        self._jobs: dict[int, Job] = {}
        self._under_way: Launch | None = None
        self._next_id = 0
        # What was submitted and canceled since the processes last compared it.
        self._operations: list[Any] = []
        self._prompt_tokens = self._generated_tokens = self._steps = 0

    def submit(self, request: Request) -> int:
        """Let a request wait for its turn.

        Returns:
            Its number, by which results name it; later requests have larger ones.

        Raises:
            ValueError: it could never run: it is too long, has a token outside the vocabulary, or an adapter that the
                model does not hold.
        """
        instance_of("request", request, Request, "a jaxmoe.Request")
        V = self._model.config.vocab_size
        for name in ("token_ids", "eos_token_ids", "logit_bias"):
            beyond = [token for token in getattr(request, name) if token >= V]
            if beyond:
                raise ValueError(f"token ids are from 0 to {V - 1}; got {beyond[0]} in {name}")
        if request.adapter is not None:
            self._model.adapter_ids([request.adapter], 1)
        self._scheduler.check(request)
        job = Job(self._next_id, request)
        self._next_id += 1
        self._jobs[job.id] = job
        self._scheduler.submit(job)
        self._prompt_tokens += len(request.token_ids)
        if self._model.mesh.is_multi_process:
            self._operations.append(dataclasses.replace(request, constraint=None))
        return job.id

    def cancel(self, request_id: int) -> None:
        """End a request: it gets no further token, its slot and pages are free at once. One that has ended is ignored."""
        job = self._jobs.pop(request_id, None)
        if job is not None:
            self._end(job)
        if self._model.mesh.is_multi_process:
            self._operations.append(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs, or a program is under way."""
        return bool(self._jobs) or self._under_way is not None

    @property
    def counts(self) -> EngineCounts:
        """Counts of what the engine holds at this moment, and of what it has done."""
        scheduler = self._scheduler
        return EngineCounts(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            slots=self.programs.slots,
            pages_in_use=sum(pool.in_use for pool in scheduler.pools),
            pages_cached=sum(pool.kept for pool in scheduler.pools),
            pages=self.sizes.groups * self.sizes.pages,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=scheduler.preemptions,
            steps=self._steps,
        )

    def forget_prefixes(self) -> None:
        """Let what was computed so far be shared by no later request."""
        self._scheduler.forget_prefixes()

    def step(self) -> list[TokenResult]:
        """Launch a prefill or a decode step, and hand out the tokens of the one before.

        Returns:
            Tokens, each request's in order; none where nothing came, as of a prefill in the middle of a prompt.

        Raises:
            ValueError: a process has submitted or canceled something else than process 0, or a constraint allows nothing.
            NotImplementedError: a trace is being replayed on the model.
        """
        if not self.has_work:
            return []
        self._agree()
        results: list[TokenResult] = []
        last = self._under_way
        if last is not None and any(job.request.constraint is not None for job, _, _ in last.rows):
            # What may come next depends on the token.
            results += self._hand_out(last)
            last = None
        self._see_model()
        work = self._scheduler.next_work()
        self._under_way = None if work is None else self._launch(work)
        if last is not None:
            results += self._hand_out(last)
        return results

    def _agree(self) -> None:
        if self._operations:
            check_same({"requests and cancellations": self._operations})
            self._operations = []

    def _end(self, job: Job) -> None:
        self._settings.leave(job)
        self._scheduler.end(job)

    def _bind(self) -> None:
        """Take the model's arrays as they are now."""
        check_usable(self._model)
        self._leaves: Leaves = self.programs.bind(self._model)
        self._variables = [
            (variable, variable.get_value()) for _, variable in nnx.to_flat_state(nnx.state(self._model))
        ]

    def _see_model(self) -> None:
        """Take the model's arrays again where they have changed: what was computed with the old ones is not shared on."""
        if self._model.replay is not None:
            raise NotImplementedError("a trace is replayed by jaxmoe.generate; end replay_routing before the next step")
        if any(variable.get_value() is not value or value.is_deleted() for variable, value in self._variables):
            self._bind()
            self._scheduler.forget_prefixes()

    def _launch(self, work: Prefill | Decode) -> Launch:
        self._steps += 1
        jobs = [chunk.job for chunk in work.chunks] if isinstance(work, Prefill) else work.jobs
        adapted = any(job.request.adapter is not None for job in jobs)
        recorder = self._model.recorder
        record: Record = "nothing" if recorder is None and self.balancer is None else "counts"
        if recorder is not None and recorder.token_ids:
            record = "token_ids"
        if isinstance(work, Prefill):
            logits, self._store, routing = self._run_prefill(work, record, adapted)
            ending = [chunk.job for chunk in work.chunks if chunk.ends]
        else:
            logits, self._store, routing = self._run_decode(work, record, adapted)
            ending = jobs
        chosen = self._choose(logits, ending) if ending else None
        return Launch(chosen, [(job, job.life, self.sizes.row_of(job.place)) for job in ending], routing)

    def _run_prefill(self, work: Prefill, record: Record, adapted: bool) -> tuple:
        program = self.programs.prefill_chunk(self._leaves, work.rows, work.size, work.history, record, adapted)
        given = jax.tree.map(self.programs.put, prefill_inputs(work, self.sizes, self._adapter))
        return program(self._leaves, *given, self._store)

    def _run_decode(self, work: Decode, record: Record, adapted: bool) -> tuple:
        program = self.programs.decode_step(self._leaves, work.length, record, adapted)
        given = jax.tree.map(self.programs.put, decode_inputs(work, self.sizes, self._adapter))
        return program(self._leaves, self._token, *given, self._store)

    def _choose(self, logits: jax.Array, jobs: list[Job]) -> Chosen:
        """Launch the choice of a token for each of these jobs."""
        steps = np.zeros((self.programs.slots, 2), np.int32)
        for job in jobs:
            steps[self.sizes.row_of(job.place)] = job.launched - 1, 1
        settings = self._settings
        choice = settings.choice(jobs)
        edits = settings.edits(jobs) if choice.edits else None
        bias, seen = (None, None) if edits is None else edits
        chosen = self.programs.slot_sampler(choice)(
            logits, self._token, self.programs.put(steps), settings.seeds, settings.controls, bias, seen
        )
        if edits is not None:
            settings.seen = chosen.seen
        self._token = chosen.token
        for array in jax.tree.leaves((chosen.token, chosen.logprobs)):
            array.copy_to_host_async()
        return chosen

    def _hand_out(self, launch: Launch) -> list[TokenResult]:
        """Read the tokens of a program, and end the requests that they end."""
        results = []
        if launch.chosen is not None:
            tokens = np.asarray(launch.chosen.token)
            logprobs = jax.tree.map(np.asarray, launch.chosen.logprobs)
            for job, life, row in launch.rows:
                if job.life == life:
                    results.append(self._result(job, int(tokens[row]), row, logprobs))
        self._generated_tokens += len(results)
        if launch.routing is not None:
            self._watch(launch.routing)
        return results

    def _result(self, job: Job, token: int, row: int, logprobs: Any) -> TokenResult:
        request = job.request
        self._scheduler.take_token(job, token)
        if request.constraint is not None:
            request.constraint.accept(token)
        reason: FinishReason | None = None
        if token in request.eos_token_ids:
            reason = "stop"
        elif job.generated == request.max_new_tokens:
            reason = "length"
        if reason is not None:
            del self._jobs[job.id]
            self._end(job)
        chosen, top = None, None
        if request.logprobs is not None:
            chosen = float(logprobs.chosen[row])
            likeliest = zip(logprobs.top_ids[row].tolist(), logprobs.top[row].tolist(), strict=True)
            top = list(likeliest)[: request.logprobs]
        return TokenResult(job.id, token, chosen, top, reason)

    def _watch(self, routing: Routing) -> None:
        """Pass a step's routing on, and move the experts where the balancer wants it."""
        if self._model.recorder is not None:
            self._model.recorder.add(routing)
        if self.balancer is None:
            return
        self.balancer.observe(np.asarray(routing.counts))
        placements = self.balancer.propose(self._model.placements)
        if placements is not None:
            self._model.rebalance(placements, num_nodes=self.balancer.num_nodes, optimizer=self.balancer.optimizer)
            # The logits stay as they are within rounding, and so does what is shared.
            self._bind()

    def _adapter(self, job: Job) -> int:
        name = job.request.adapter
        if name is None:
            return -1
        numbers = self._model.adapter_ids([name], 1)
        assert numbers is not None
        return int(numbers[0])
