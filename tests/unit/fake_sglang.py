"""A server that answers as SGLang 0.5.23 does, and fails on command as a real one cannot be made to.

tests/sglang holds the engine against the real one; here are only the failures.
"""

import asyncio
import json
import math

from aiohttp import web

VOCAB_SIZE = 32
EOS = 1
TOKENS = [5, 6, 7, EOS]


class FakeServer:
    """`fault(body)` names what becomes of a request, None lets it succeed; `tokens(body)` is the response. `events` is
    what happened, in order."""

    def __init__(self, fault=lambda body: None, version="default", events=None, tokens=lambda body: TOKENS):
        self.fault = fault
        self.tokens = tokens
        self.version = version
        self.events = [] if events is None else events
        self.running = {}  # rid: event of its end
        self.made = 0
        self.hanging = 0
        self.uniform = True
        self.silent = asyncio.Event()  # set: no probe is answered
        self.refusing = False  # as one that has other keys
        self.port = 0
        self._never = asyncio.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    async def start(self):
        app = web.Application()
        for path in ("/server_info", "/get_server_info"):
            app.router.add_get(path, lambda request: self._told({"version": "0.5.23"}))
        app.router.add_get("/model_info", lambda request: self._told({"weight_version": self.version}))
        app.router.add_get("/v1/loads", lambda request: self._told(self._loads()))
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        return self

    async def stop(self):
        await self._runner.cleanup()
        self.running.clear()

    def generated(self):
        """The requests that came, trials left out."""
        return [event for event in self.events if event[0] == "generate" and event[1] == self.url]

    async def _told(self, answer):
        if self.silent.is_set():
            await self._never.wait()
        if self.refusing:
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response(answer)

    def _loads(self):
        return {
            "loads": [
                {
                    "num_running_reqs": len(self.running),
                    "num_waiting_reqs": 0,
                    "decode_moments": [float(self.made)] * 6,
                    "total_prefill_uncached_tokens": self.made,
                }
            ]
        }

    async def _abort(self, request):
        rid = (await request.json())["rid"]
        self.events.append(("abort", self.url, rid))
        for running, end in self.running.items():
            if running.startswith(rid):
                end.set()
        return web.Response()

    async def _generate(self, request):
        if self.refusing:
            return web.json_response({"error": "Unauthorized"}, status=401)
        body = await request.json()
        rid = body["rid"]
        if body["sampling_params"]["temperature"] > 1000:
            self.events.append(("trial", self.url, rid))
            if self.hanging:
                await self._never.wait()
            trial = self._answer(body, [EOS])
            trial["meta_info"]["output_token_logprobs"][0][0] = -math.log(VOCAB_SIZE) if self.uniform else -2.0
            return web.json_response(trial)
        self.events.append(("generate", self.url, rid))
        fault = self.fault(body)
        self.running[rid] = asyncio.Event()
        try:
            return await getattr(self, f"_play_{fault}", self._play)(request, body, fault)
        finally:
            self.running.pop(rid, None)

    def _answer(self, body, tokens):
        self.made += len(tokens)
        return {
            "text": "",
            "output_ids": list(tokens),
            "meta_info": {
                "id": body["rid"],
                "finish_reason": {"type": "stop", "matched": tokens[-1]},
                "completion_tokens": len(tokens),
                "weight_version": self.version,
                "weight_versions": [{"version": self.version, "start": 0, "end": len(tokens)}],
                "output_token_logprobs": [[-0.5 - i, token, None] for i, token in enumerate(tokens)],
            },
        }

    async def _play(self, request, body, fault):
        answer = self._answer(body, self.tokens(body))
        if fault is not None:
            answer = WRONG[fault](answer, answer["meta_info"])
        return web.Response(text=json.dumps(answer), content_type="application/json")

    async def _play_hang(self, request, body, fault):
        """Accepts and never answers; all but generation answers 200."""
        self.hanging += 1
        try:
            await self._never.wait()
        finally:
            self.hanging -= 1

    async def _play_late(self, request, body, fault):
        await asyncio.sleep(0.1)
        return await self._play(request, body, None)

    async def _play_lost(self, request, body, fault):
        """Forgets the request, and goes on with others."""
        self.running.pop(body["rid"])
        await self._never.wait()

    async def _play_slow(self, request, body, fault):
        """Makes tokens until it is aborted, then answers with what there is."""
        self.made += 1
        ticking = asyncio.ensure_future(self._tick())
        try:
            await self.running[body["rid"]].wait()
        finally:
            ticking.cancel()
        answer = self._answer(body, TOKENS[:2])
        answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "Abort in decoding"}
        return web.json_response(answer)

    async def _tick(self):
        while True:
            await asyncio.sleep(0.01)
            self.made += 1

    async def _play_status(self, request, body, fault):
        return web.json_response({"error": {"message": "as told"}}, status=int(fault.removeprefix("status ")))

    async def _play_reset(self, request, body, fault):
        request.transport.abort()
        await self._never.wait()

    async def _play_half(self, request, body, fault):
        whole = json.dumps(self._answer(body, self.tokens(body))).encode()
        response = web.StreamResponse(headers={"Content-Length": str(len(whole)), "Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(whole[: len(whole) // 2])
        request.transport.close()
        return response

    async def _play_torn_sse(self, request, body, fault):
        event = b"data: " + json.dumps(self._answer(body, self.tokens(body))).encode()
        return web.Response(body=event[:60], content_type="text/event-stream")

    async def _play_no_json(self, request, body, fault):
        return web.Response(text="<html>Bad gateway</html>")

    async def _play_empty(self, request, body, fault):
        return web.Response()


for _status in (400, 429, 500, 502, 503):
    setattr(FakeServer, f"_play_status {_status}", FakeServer._play_status)


def _meta(**fields):
    return lambda answer, meta: {**answer, "meta_info": {**meta, **fields}}


def _pairs(change):
    def wrong(answer, meta):
        pairs = change([list(pair) for pair in meta["output_token_logprobs"]])
        return {**answer, "meta_info": {**meta, "output_token_logprobs": pairs}}

    return wrong


def _first(value):
    return _pairs(lambda pairs: [[value, *pairs[0][1:]], *pairs[1:]])


def _token(token):
    def wrong(answer, meta):
        pairs = [[-0.5, token, None], *meta["output_token_logprobs"][1:]]
        return {
            **answer,
            "output_ids": [token, *answer["output_ids"][1:]],
            "meta_info": {**meta, "output_token_logprobs": pairs},
        }

    return wrong


def _cut(answer, meta):
    """What is left of a response after a server ran out of room; tokens, log-probs and spans agree."""
    return {
        **answer,
        "output_ids": answer["output_ids"][:2],
        "meta_info": {
            **meta,
            "completion_tokens": 2,
            "finish_reason": {"type": "length", "length": 2},
            "output_token_logprobs": meta["output_token_logprobs"][:2],
            "weight_versions": [{**meta["weight_versions"][0], "end": 2}],
        },
    }


def _after_the_end(answer, meta):
    ids = [5, EOS, 7, EOS]
    pairs = [[-0.5, token, None] for token in ids]
    return {**answer, "output_ids": ids, "meta_info": {**meta, "output_token_logprobs": pairs}}


def _cut_off(answer, meta):
    told = {
        "completion_tokens": 2,
        "output_token_logprobs": meta["output_token_logprobs"][:2],
        "weight_versions": [{"version": "0", "start": 0, "end": 2}],
        "finish_reason": {"type": "abort", "message": "no room"},
    }
    return {**answer, "output_ids": answer["output_ids"][:2], "meta_info": {**meta, **told}}


def _spans(*spans):
    return _meta(weight_versions=[{"version": "0", "start": start, "end": end} for start, end in spans])


WRONG = {
    "list": lambda answer, meta: [answer],
    "null": lambda answer, meta: None,
    "no meta_info": lambda answer, meta: {"output_ids": answer["output_ids"]},
    "no tokens": lambda answer, meta: {"meta_info": meta},
    "no log-probs": _meta(output_token_logprobs=None),
    "NaN": _first(math.nan),
    "minus infinity": _first(-math.inf),
    "least float": _first(-3.4028234663852886e38),
    "positive": _first(0.25),
    "null log-prob": _first(None),
    "true log-prob": _first(True),
    "text log-prob": _first("-0.5"),
    "bare log-probs": _meta(output_token_logprobs=[-0.5] * 4),
    "a log-prob less": _pairs(lambda pairs: pairs[:-1]),
    "log-probs of others": _pairs(lambda pairs: pairs[::-1]),
    "fewer tokens than told": _meta(completion_tokens=5),
    "not told": _meta(completion_tokens=None),
    "token too large": _token(VOCAB_SIZE),
    "token negative": _token(-1),
    "token no integer": _token(5.0),
    "token true": _token(True),
    "foreign rid": _meta(id="0" * 32),
    "no rid": _meta(id=None),
    "no finish reason": _meta(finish_reason=None),
    "unknown finish": _meta(finish_reason={"type": "tired"}),
    "NaN happened": _meta(finish_reason={"type": "stop", "matched": "NaN happened"}),  # it puts an end token there
    "ended by another": _meta(finish_reason={"type": "stop", "matched": 7}),
    "cut off": _cut,
    "after the end": _after_the_end,
    "no spans": _meta(weight_versions=None),
    "spans too short": _spans((0, 3)),
    "spans too long": _spans((0, 5)),
    "spans with a hole": _spans((0, 1), (2, 4)),
    "spans that overlap": _spans((0, 3), (2, 4)),
    "an empty span": _spans((0, 0), (0, 4)),
    "spans of no version": _meta(weight_versions=[{"version": "new", "start": 0, "end": 4}]),
    "finish abort": _cut_off,
    "old weights": _meta(weight_versions=[{"version": "-1", "start": 0, "end": 4}]),
    "default weights": _meta(weight_versions=[{"version": "default", "start": 0, "end": 4}]),
    "some old weights": _meta(
        weight_versions=[{"version": "0", "start": 0, "end": 3}, {"version": "-1", "start": 3, "end": 4}]
    ),
}
"""Answers that are none."""
