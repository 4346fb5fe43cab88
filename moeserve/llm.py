"""Offline generation on the online path: the same ranks, front-end and text, without HTTP.

with LLM(tensor_parallel_size=4, moe_expert_parallel_size=4) as llm:
    for answer in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32, temperature=0)):
        print(answer.text)
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from moeserve.config import EngineConfig, parse
from moeserve.eplb.load import ExpertLoad
from moeserve.eplb.types import Placement
from moeserve.messages import EngineStats, SamplingParams, TokenLogprob
from moeserve.online.balancer import OnlineBalancer
from moeserve.plan import check_local_ranks, make_plan
from moeserve.server.errors import ApiError
from moeserve.server.frontend import Frontend
from moeserve.server.generation import Generation
from moeserve.serving import running_engine, server_settings, until_ready, with_tokenizer

Result = TypeVar("Result")


@dataclass
class Answer:
    """What one prompt was continued with. finish_reason: "stop" or "length"."""

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    routed_experts: bytes | None = None


class LLM:
    """A running engine in this program. Settings are those of `moeserve serve`, as keyword arguments.

    Raises ValueError for a setting that cannot be, RuntimeError with a rank's traceback when one fails.
    """

    def __init__(self, model: str | Path | None = None, **settings: Any):
        if model is not None:
            settings["model"] = str(model)
        plan = make_plan(parse(EngineConfig, settings))
        check_local_ranks(plan, plan.layout.world_size)
        self.plan, self.tokenizer = with_tokenizer(plan)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="moeserve", daemon=True)
        self._thread.start()
        self._exit = contextlib.AsyncExitStack()
        try:
            self._frontend = self._call(self._start())
        except BaseException:
            self.close()
            raise

    async def _start(self) -> Frontend:
        # A list of prompts is no crowd of clients: all of them are taken, and take what time they need.
        settings = replace(
            server_settings(self.plan),
            max_queued_requests=sys.maxsize,
            max_queued_tokens=None,
            request_timeout=None,
        )
        engine = running_engine(self.plan, self.tokenizer, settings)
        frontend = await self._exit.enter_async_context(engine)
        await until_ready(frontend)
        if frontend.dead.is_set():
            await self._exit.aclose()  # raises with the cause
        return frontend

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 - immutable
        stop: Sequence[str] = (),
    ) -> list[Answer]:
        """Continue each prompt (text or token ids); one params for all, or one each. Answers in the same order.

        Raises ValueError when one of them cannot run: then none does. RuntimeError when the engine has died.
        """
        for name, given in (("prompts", prompts), ("stop", stop)):
            if isinstance(given, str):
                raise ValueError(f"{name} = {given!r:.60}: must be a list; put it in brackets")
        if not all(stop):
            raise ValueError(f"stop = {list(stop)}: an empty text would stop everything; leave it out")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"params: {len(each)} given for {len(prompts)} prompts; give one, or one each")
        ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        for index, prompt in enumerate(ids):
            if not prompt:
                raise ValueError(f"prompts[{index}] is empty; give a token at least")
        return self._call(self._generate(ids, each, stop))

    async def _generate(
        self, prompts: list[list[int]], params: list[SamplingParams], stop: Sequence[str]
    ) -> list[Answer]:
        generations: list[Generation] = []
        try:
            for prompt, own in zip(prompts, params, strict=True):
                generations.append(self._frontend.submit([prompt], own, stop=stop))
            return list(await asyncio.gather(*map(self._answer, prompts, generations)))
        except ApiError as error:
            raise (ValueError if error.status == 400 else RuntimeError)(str(error)) from None
        finally:
            for generation in generations:
                generation.cancel()

    async def _answer(self, prompt: list[int], generation: Generation) -> Answer:
        answer = Answer(prompt)
        while deltas := await generation.next():
            for delta in deltas:
                answer.text += delta.text
                answer.token_ids += delta.token_ids
                answer.logprobs += delta.logprobs or []
                answer.prompt_logprobs = delta.prompt_logprobs or answer.prompt_logprobs
                answer.routed_experts = delta.routed_experts or answer.routed_experts
                answer.finish_reason = delta.finish_reason
        if generation.error is not None:
            raise generation.error
        return answer

    def replica_stats(self) -> list[EngineStats]:
        """The last word of each attention replica on what it has done."""
        return self._frontend.replica_stats()

    def expert_load(self) -> ExpertLoad | None:
        """What the ranks have counted, up to the last second or two; None before that or without experts."""

        async def read() -> ExpertLoad | None:
            balance = self._frontend.balance
            return None if balance is None else balance.expert_load()

        return self._call(read())

    def balance_status(self) -> dict[str, Any] | None:
        """What /eplb/status answers; None without experts."""

        async def read() -> dict[str, Any] | None:
            balance = self._frontend.balance
            return None if balance is None else balance.status()

        return self._call(read())

    def rebalance(self) -> None:
        """Decide now on the windows counted so far, however little it brings; balance_status tells what came of it.

        Raises ValueError where the placement stays (layer_updates_per_iter = 0), Busy where it cannot be done now.
        """

        async def ask() -> None:
            self._online().rebalance()

        self._call(ask())

    def apply_placement(self, placement: Placement) -> None:
        """Bring this placement into force while generating; raises as rebalance does."""

        async def order() -> None:
            online = self._online()
            online.apply(await asyncio.to_thread(online.plan, placement))

        self._call(order())

    def _online(self) -> OnlineBalancer:
        balance = self._frontend.balance
        if balance is None or balance.online is None:
            raise ValueError(
                "moe_config.load_balancer.layer_updates_per_iter = 0: the placement stays; give 1 or more"
            )
        return balance.online

    def close(self) -> None:
        """End the ranks. Raises RuntimeError with a rank's traceback when the engine had died."""
        if self._thread.is_alive():
            try:
                self._call(self._exit.aclose())
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()

    def _call(self, job: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(job, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C: the job's own failure has nothing left to cancel
            future.cancel()
            raise

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
