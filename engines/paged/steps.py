"""One step: from the scheduler's plan to a call of the runner, and from its output to deltas, chunks and ends of legs.

Owns no state but the order of these. A step that fails ends its legs, and nothing else.
"""

import asyncio
import logging
from collections import Counter

from engines.paged.leg import Leg, StopRule
from engines.paged.legs import LegTable
from engines.paged.plan import Plan, Work
from engines.paged.runner import ModelRunner, Sampled, SampleSpec, ScoreSpec, StepOutput, StepSlice
from engines.paged.scheduler import Scheduler
from engines.paged.sequence import Status, TokenSequence
from engines.paged.store_jobs import StoreJobs
from kvcore.clock import Clock
from kvcore.errors import EngineError, FormStuckError, KVFerryError
from nodeapi.messages import FinishReason, TokenDelta

_log = logging.getLogger("engines")


class Stepper:
    """`begin` a plan, then `run` it if it has work. Writes into the streams of legs, and closes those that end."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        legs: LegTable,
        store_jobs: StoreJobs,
        stop_rule: StopRule,
        *,
        clock: Clock,
        counters: Counter[str],
        max_unread: int,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._legs = legs
        self._store_jobs = store_jobs
        self._stop_rule = stop_rule
        self._clock = clock
        self._counters = counters
        self._max_unread = max_unread

    def begin(self, plan: Plan) -> None:
        """Start what the plan says, beside the step itself."""
        now = self._clock.now()
        for sequence in plan.loads:
            leg = self._legs[sequence.request_id]
            leg.scheduled = now
            self._store_jobs.start_load(leg, sequence)
        for sequence in [*(item.sequence for item in plan.work), *plan.fully_cached]:
            leg = self._legs[sequence.request_id]
            if leg.started is None:
                leg.started = now
                leg.scheduled = now if leg.scheduled is None else leg.scheduled
                self._counters["cached_tokens"] += sequence.num_cached or 0
                self._counters["approximate_tokens"] += sequence.num_approximate
                self._store_jobs.start_save(leg, sequence)
        for sequence in plan.fully_cached:
            self._end_prefill(self._legs[sequence.request_id])
        if plan.out_of_blocks:  # a load that waits for another node may hold the blocks that are missing here
            for leg in self._legs:
                if leg.load is not None:
                    leg.end_handoff()

    async def run(self, plan: Plan) -> None:
        """Run the step. Cancelled, it is closed and its sequences are removed, but their legs are not."""
        legs = [self._legs[item.sequence.request_id] for item in plan.work]
        try:
            if plan.moves:
                await self._runner.move(plan.moves, plan.fresh)
            block_size = self._scheduler.blocks.block_size
            output = await self._runner.execute([step_slice(item, block_size) for item in plan.work])
        except asyncio.CancelledError:
            self._scheduler.fail(plan)
            raise
        except Exception as error:  # the boundary of the requests in this step
            _log.exception("event=step_failed requests=%d", len(plan.work))
            self._scheduler.fail(plan)
            for leg in legs:
                if self._legs.get(leg.request_id) is leg:  # else it ended meanwhile, and the id may be another's
                    self._legs.fail(leg, EngineError(f"the model failed on a step: {error}"))
            return
        self._apply(plan, output)

    def _apply(self, plan: Plan, output: StepOutput) -> None:
        self._scheduler.complete(plan)
        scores = output.scores or [None] * len(plan.work)
        for item, samples, scored in zip(plan.work, output.samples, scores, strict=True):
            self._counters["prefill_tokens"] += item.num_tokens - bool(samples)
            self._counters["decode_tokens"] += len(samples)
            # 1. Removed while the step ran: its samples are nobody's.
            # 2. It has drawn tokens: they go to the reader.
            # 3. A part of a prompt: there is more to compute, or another part of the step computed it.
            # 4. A prefill leg's last part: it ends when its chunks are saved.
            # 5. All is computed and tokens are wanted, but none was drawn, or some of the prompt's logprobs were not
            #    told: the logits were not numbers, or the grammar let none come.
            if item.sequence.status is Status.FINISHED:
                continue
            leg = self._legs[item.sequence.request_id]
            self._store_jobs.save_full_chunks(leg, item.sequence)
            if scored is not None:
                leg.scores.append(scored)
                item.sequence.num_scored += len(scored)
            if samples and (item.sequence.num_computed > item.sequence.num_prompt or not item.sequence.scores_left):
                self._emit(leg, item.sequence, samples)
            elif item.sequence.num_left or item.end < item.sequence.num_computed:
                continue
            elif leg.is_prefill:
                self._end_prefill(leg)
            else:
                self._legs.fail(leg, _why_none(item.sequence))

    def _emit(self, leg: Leg, sequence: TokenSequence, samples: list[Sampled]) -> None:
        """Append the drawn tokens and tell the reader. Several samples: the prompt's end, where completions fork."""
        now = self._clock.now()
        leg.computed = now if leg.computed is None else leg.computed
        if leg.scores:
            for piece in [piece for scores in leg.scores for piece in scores.pieces()]:
                leg.stream.put_nowait(TokenDelta(prompt_logprobs=piece, info=leg.info_once(now)))
            leg.scores.clear()
        sequences = [sequence]
        for child, copy in self._scheduler.fork(sequence) if len(samples) > 1 else []:
            if copy is not None:
                self._runner.copy_block(*copy)
            sequences.append(child)
            leg.sequences.append(child)
        for drawing, sampled in zip(sequences, samples, strict=True):
            token_id = drawing.next_token(sampled.token_id) if drawing.forced else sampled.token_id
            drawing.tokens.append(token_id)
            reason = self._stop_rule.reason(drawing)
            if sampled.distribution is not None:
                leg.distributions.append(sampled.distribution)
            delta = TokenDelta(
                index=drawing.indices[0],
                token_ids=[token_id],
                logprobs=None if sampled.logprob is None else [sampled.logprob],
                finish_reason=reason,
                stop_token_id=token_id if reason is FinishReason.STOP else None,
                info=None if leg.info_sent else leg.info_once(now),
            )
            leg.stream.put_nowait(delta)
            if reason is not None:
                self._remove(leg, drawing)
        leg.update_paused(self._max_unread)
        if leg.finished:
            self._legs.close(leg)

    def _remove(self, leg: Leg, sequence: TokenSequence) -> None:
        if leg.kept is not None:
            leg.kept = list(sequence.block_table)
            self._scheduler.blocks.retain(leg.kept)
        self._scheduler.remove(sequence)

    def _end_prefill(self, leg: Leg) -> None:
        """All is computed; the leg ends when its chunks are saved."""
        leg.computed = self._clock.now()
        self._remove(leg, leg.first)
        if leg.save is not None:
            leg.save.close()
        else:
            leg.set_saved()


def _why_none(sequence: TokenSequence) -> KVFerryError:
    """Another node's engine would get no further with the same grammar; with logits it may."""
    if sequence.matcher is not None and sequence.matcher.problem:
        return FormStuckError(f"the form that was asked for: {sequence.matcher.problem}")
    return EngineError("the model's logits are not numbers; a wider model.dtype may help")


def step_slice(item: Work, block_size: int) -> StepSlice:
    """What the runner is to compute, and what to draw if these are the last tokens of a sequence that wants any."""
    sequence, start = item.sequence, item.start
    end = start + item.num_tokens
    sample = None
    if sequence.sampling is not None and end == len(sequence.tokens):
        prompt = sequence.tokens[: sequence.num_prompt]
        sample = SampleSpec(
            sequence.sampling, sequence.indices, prompt, sequence.output, sequence.whole, sequence.matcher
        )
    kept = bool(sequence.holes) and sequence.keeps_rest(end, block_size)
    tokens = sequence.tokens[start:end]
    score = _score(sequence, start, end) if start < sequence.num_prompt else None
    return StepSlice(tokens, start, sequence.block_table, sample, kept, score, sequence.adapter)


def _score(sequence: TokenSequence, start: int, end: int) -> ScoreSpec | None:
    """What of the prompt's logprobs this part of a sequence gives: at each position that of the next token."""
    first, last = max(start, sequence.num_scored), min(end, sequence.num_prompt - 1)
    if not sequence.scores_left or first >= last:
        return None
    assert sequence.sampling is not None and sequence.sampling.prompt_logprobs is not None
    return ScoreSpec(first - start, sequence.tokens[first + 1 : last + 1], sequence.sampling.prompt_logprobs)
