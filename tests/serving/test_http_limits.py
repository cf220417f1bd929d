"""Refusals, limits, clients that leave, a full queue and the end, over HTTP with OpenAI's own client. Answers are scripted."""

import asyncio
import json
import signal
import time

import httpx2 as httpx
import openai
import pytest
from http_tools import ANSWER, SLOTS, ask, complete, running, scripted, url

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(scripted(tmp_path_factory.mktemp("tiny"))) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=60) as found:
        yield found


def test_whole_streamed_and_stopped(client):
    one = complete(client, ask("what?", url()), max_tokens=SLOTS, logprobs=True, extra_body={"return_mask": True})
    assert one.choices[0].message.content == ANSWER and one.choices[0].finish_reason == "stop"
    assert [entry.token for entry in one.choices[0].logprobs.content] == list(ANSWER)
    assert one.usage.prompt_tokens_details.visual_tokens == 12 and one.usage.completion_tokens == len(ANSWER)
    mask = one.choices[0].message.mask[0]
    assert mask["rows"] == 3 and sum(map(sum, mask["keep"])) == 12 and (mask["picture"], mask["area"]) == (0, [0, 0, 1, 1])
    for stop, text, count in ((", a", "a red house", 14), (["zz", " t"], "a red house, a", 16), ("house,x", ANSWER, len(ANSWER))):
        options = dict(max_tokens=SLOTS, stop=stop, stream=True, stream_options={"include_usage": True})
        chunks = list(complete(client, ask(), **options))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
        assert chunks[-1].usage.completion_tokens == count
    assert complete(client, ask(), max_tokens=3).choices[0].finish_reason == "length"


def refusal(client, **changed):
    body = {"model": "tiny", "messages": ask(), "max_tokens": 4, **changed}
    answer = httpx.post(f"{client.base_url}chat/completions", json=body, headers={"Authorization": "Bearer secret"})
    assert "base64," not in answer.text.replace("data:image/png;base64,...", "")
    return answer.status_code, answer.json()["error"]


BAD = [
    (dict(model="other"), 404, "other"),
    (dict(messages=[]), 400, "at least one message"),
    (dict(messages=[{"role": "robot", "content": "x"}]), 400, "messages[0].role"),
    (dict(messages=[{"role": "user", "content": ""}]), 400, "messages[0].content is empty"),
    (dict(messages=[{"role": "assistant", "content": "x"}]), 400, "last message"),
    (dict(messages=ask("<|image_pad|>")), 400, "placeholder"),
    (dict(messages=ask("x", "file:///etc/passwd")), 400, "only data: URLs"),
    (dict(messages=ask("x", "https://example.com/a.png")), 400, "fetches no pictures"),
    (dict(messages=ask("x", "data:image/png;base64,????")), 400, "not valid base64"),
    (dict(messages=ask("x", "data:image/png;base64,aGVsbG8=")), 400, "not an image"),
    (dict(messages=ask("x", url((200, 200)))), 400, "more than the limit of 20000"),
    (dict(messages=ask("x", url(), url(), url())), 400, "--max-pictures"),
    (dict(messages=ask("x" * 400)), 400, "longer than"),
    (dict(max_tokens=33), 400, "--max-new-tokens"),
    (dict(max_tokens="4"), 400, "max_tokens"),
    (dict(temperature=-1), 400, "temperature"),
    (dict(top_p=2), 400, "top_p"),
    (dict(stop=[1]), 400, "stop"),
    (dict(n=2), 400, "n is not supported"),
    (dict(top_logprobs=3), 400, "top_logprobs needs logprobs"),
    (dict(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (dict(tools=[{}]), 400, "tools"),
    (dict(prune={"max_remain_ratoi": 0.1}), 400, "max_remain_ratoi"),
    (dict(prune={"max_remain_ratio": 7}), 400, "max_remain_ratio"),
    (dict(prune={"method": "divprune", "fixed_remain_ratio": 0.5}), 400, "--methods"),
    (dict(prune={"look": {"shaer": 0.1}}), 400, "prune.look has no field 'shaer'"),
    (dict(prune={"look": {"windows": []}}), 400, "prune.look has no field 'windows'"),
    (dict(prune={"look": {"share": 2}}), 400, "prune.look: share"),
    (dict(prune={"look": 3}), 400, "prune.look must be an object"),
]


@pytest.mark.parametrize(("changed", "status", "words"), BAD, ids=[words for _, _, words in BAD])
def test_refusals_name_what_is_wrong(client, changed, status, words):
    found, error = refusal(client, **changed)
    assert found == status and words in error["message"] and set(error) == {"message", "type", "param", "code"}, error


def test_bodies_routes_and_keys(server, client):
    key = {"Authorization": "Bearer secret"}
    where = f"{server.url}/v1/chat/completions"
    for body in (b"{", b"[]", b'{"messages": NaN}', b"[" * 100_000, b"\xff"):
        assert httpx.post(where, content=body, headers=key).status_code == 400
    assert httpx.post(where, content=b" " * 2_000_000, headers=key).status_code == 413
    assert httpx.get(f"{server.url}/nowhere").json()["error"]["code"] == "not_found"
    assert httpx.get(where).status_code == 405
    for path in ("v1/models", "metrics"):
        assert httpx.get(f"{server.url}/{path}").status_code == 401
        assert httpx.get(f"{server.url}/{path}", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{server.url}/health").status_code == 200 and httpx.get(f"{server.url}/ready").json() == {"ready": True}
    text = httpx.get(f"{server.url}/metrics", headers=key).text
    for name in ("vllm:num_requests_running", "vllm:time_to_first_token_seconds_count", "vllm:generation_tokens_total"):
        assert f"{name}{{" in text
    assert "gp_jax:kept_visual_tokens_total" in text and "gp_jax:vision_cache_hits_total" in text


def test_clients_that_leave_free_their_places(server, client):
    before = server.loop.left  # answers that ended at a stop string

    async def leave():
        body = {"model": "tiny", "messages": ask("go on"), "max_tokens": SLOTS, "stream": True}
        async with httpx.AsyncClient(headers={"Authorization": "Bearer secret"}) as own:
            for _ in range(6):
                async with own.stream("POST", f"{server.url}/v1/chat/completions", json=body) as answer:
                    async for _ in answer.aiter_lines():
                        break

    asyncio.run(leave())
    end = time.monotonic() + 20
    while not server.loop.idle and time.monotonic() < end:
        time.sleep(0.02)
    assert server.loop.idle and server.loop.left == before + 6


def test_a_full_server_says_so_at_once_and_answers_the_others(server):
    async def many():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=60) as own:
            options = dict(model="tiny", messages=ask("hello"), max_tokens=SLOTS, temperature=0)
            return await asyncio.gather(*(own.chat.completions.create(**options) for _ in range(24)), return_exceptions=True)

    server.loop.inbox.limit = 4
    try:
        found = asyncio.run(many())
    finally:
        server.loop.inbox.limit = 8
    refused = [one for one in found if isinstance(one, openai.RateLimitError)]
    answers = [one.choices[0].message.content for one in found if not isinstance(one, Exception)]
    assert refused and len(refused) + len(answers) == 24 and len(set(answers)) == 1
    assert int(refused[0].response.headers["Retry-After"]) >= 1 and json.loads(refused[0].response.text)["error"]["code"] == "queue_full"


def test_sigterm_finishes_answers_and_takes_no_more(server, client):
    """The last test of this file: the server has ended behind it."""
    answer = iter(complete(client, ask("what is this?", url()), stream=True))
    text = next(answer).choices[0].delta.content
    server.running.handle_exit(signal.SIGTERM, None)
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=20)
    with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
        complete(other, ask())
    assert text + "".join(chunk.choices[0].delta.content or "" for chunk in answer) == ANSWER[:12]
    server.thread.join(20)
    assert not server.thread.is_alive()
