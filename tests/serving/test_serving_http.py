"""The HTTP interface with OpenAI's own client: answers, streams, refusals, limits, clients that leave, the end."""

import asyncio
import base64
import io
import json
import signal
import threading
import time

import httpx2 as httpx
import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image

from gp_jax import Ladder, Ladders
from gp_jax.serving.lengths import Lengths
from gp_jax.serving.server import Listening, Server, listen
from gp_jax.serving.settings import ServerSettings
from gp_jax.tiny import CONFIG, make_checkpoint

SLOTS, LONGEST = 32, 384
LENGTHS = Lengths(
    Ladders(
        patches=Ladder("patches", (256,)),
        prompt=Ladder("prompt", (LONGEST,)),
        kept=Ladder("kept", (LONGEST,)),
        decode=Ladder("decode", (SLOTS,)),
        batch=Ladder("batch", (1,)),
    ),
    (LONGEST,),
    ((2,),),
    (1000,),
    SLOTS,
    2000,
)
SMALL = CONFIG | {"num_hidden_layers": 2, "selected_layers": [0], "reduce_layer": 0, "le_layers": [0, 1]}
SMALL |= {"vision_config": CONFIG["vision_config"] | {"depth": 2, "fullatt_block_indexes": [1]}, "selected_visual_layers": [1, 0]}


def url(size: tuple[int, int] = (112, 84), seed: int = 0) -> str:
    """A picture as a data: URL."""
    pixels, file = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(text: str = "what is this?", *pictures: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": own}} for own in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    vlm = make_checkpoint(tmp_path_factory.mktemp("http") / "tiny", hf_config=SMALL)
    limits = dict(max_new_tokens=SLOTS, max_pictures=2, max_pixels=20_000, max_body="1M")
    settings = ServerSettings("tiny", max_prompt=LONGEST - 1, port=0, api_key="secret", **limits)
    made = Server.build(settings, vlm, lengths=LENGTHS)
    listener = listen(settings)
    made.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    running = Listening(uvicorn.Config(made.asgi, log_config=None, lifespan="off", timeout_graceful_shutdown=5), made.loop)
    thread = threading.Thread(target=running.run, kwargs=dict(sockets=[listener]))
    made.running, made.thread = running, thread
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield made
    running.should_exit = True
    thread.join(20)
    made.loop.stop()
    made.loop.join(20)
    assert not thread.is_alive() and not made.loop.is_alive()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=60) as found:
        yield found


def complete(client, messages, **options):
    return client.chat.completions.create(model="tiny", messages=messages, **{"temperature": 0, "max_tokens": 12, **options})


@pytest.fixture(scope="module")
def whole(client):
    return complete(client, ask("what is this?", url()), logprobs=True, extra_body={"return_mask": True})


def test_an_answer_equals_the_library(server, whole):
    images, vlm = [Image.open(io.BytesIO(base64.b64decode(url().partition(",")[2])))], server.vlm
    expected = vlm.answer(images, "what is this?", max_new_tokens=12)
    assert whole.choices[0].message.content == expected.text
    usage, details = whole.usage, whole.usage.prompt_tokens_details
    assert (details.visual_tokens, details.kept_tokens) == (12, expected.kept)
    assert usage.completion_tokens == len(expected.tokens) and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    (mask,) = whole.choices[0].message.mask
    np.testing.assert_array_equal(np.array(mask["keep"], bool), expected.keep[0])
    assert np.shape(mask["importance"]) == (3, 4) and whole.choices[0].finish_reason in ("stop", "length")
    entries = whole.choices[0].logprobs.content
    assert entries and all(entry.logprob <= 0 for entry in entries)


def test_a_stream_equals_the_whole(client, whole):
    chunks = list(complete(client, ask("what is this?", url()), stream=True, stream_options={"include_usage": True}, logprobs=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    tokens = [entry.token for c in chunks if c.choices and c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert tokens == [entry.token for entry in whole.choices[0].logprobs.content]


def test_stop_strings_end_an_answer_in_the_same_place_in_both_ways(client, whole):
    text = whole.choices[0].message.content
    stop = text[3:5]
    one = complete(client, ask("what is this?", url()), stop=[stop, "never said"])
    assert one.choices[0].message.content == text[: text.find(stop)] and one.choices[0].finish_reason == "stop"
    chunks = list(complete(client, ask("what is this?", url()), stop=stop, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == one.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == one.usage.completion_tokens < whole.usage.completion_tokens


def test_seeds_and_rules_are_the_request_s(client):
    draws = [complete(client, ask("tell", url()), temperature=2.0, seed=seed).choices[0].message.content for seed in (1, 1, 2, -5)]
    assert draws[0] == draws[1] != draws[2]
    for extra, kept in (({"prune": None}, 12), ({"prune": {"fixed_remain_ratio": 0.5}}, 6), ({"max_remain_ratio": 0.25}, 3)):
        details = complete(client, ask("tell", url()), extra_body=extra).usage.prompt_tokens_details
        assert details.kept_tokens <= kept if "max_remain_ratio" in extra else details.kept_tokens == kept


def test_a_conversation_with_several_pictures_sees_all_of_them_again(server, client):
    """The second question gets its own glimpse: what the first one dropped can come back. Pictures that were seen skip the tower."""
    first = ask("what is left?", url(seed=1))
    one = complete(client, first, extra_body={"return_mask": True, "prune": {"fixed_remain_ratio": 0.25}})
    talk = [*first, {"role": "assistant", "content": one.choices[0].message.content}, *ask("and beside it, on the right?", url(seed=2))]
    two = complete(client, talk, extra_body={"return_mask": True, "prune": {"fixed_remain_ratio": 0.75}})
    details = two.usage.prompt_tokens_details
    assert (details.visual_tokens, details.vision_cache_hits) == (24, 1)
    masks = two.choices[0].message.mask
    assert len(masks) == 2 and sum(np.sum(mask["keep"]) for mask in masks) == 18
    dropped = ~np.array(one.choices[0].message.mask[0]["keep"], bool)
    assert (np.array(masks[0]["keep"], bool) & dropped).any()
    server.loop.cache.kept.clear()  # the same from a tower that sees them anew
    again = complete(client, talk, extra_body={"return_mask": True, "prune": {"fixed_remain_ratio": 0.75}})
    assert again.choices[0].message.content == two.choices[0].message.content and again.choices[0].message.mask == masks


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
    (dict(tools=[{}]), 400, "tools"),
    (dict(prune={"max_remain_ratoi": 0.1}), 400, "max_remain_ratoi"),
    (dict(prune={"max_remain_ratio": 7}), 400, "max_remain_ratio"),
    (dict(prune={"method": "divprune", "fixed_remain_ratio": 0.5}), 400, "--methods"),
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
    assert server.loop.idle


def test_a_full_server_says_so_at_once_and_answers_the_others(server):
    async def many():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=60) as own:
            options = dict(model="tiny", messages=ask("hello"), max_tokens=SLOTS, temperature=0)
            return await asyncio.gather(*(own.chat.completions.create(**options) for _ in range(24)), return_exceptions=True)

    server.loop.inbox.limit = 4
    try:
        found = asyncio.run(many())
    finally:
        server.loop.inbox.limit = server.settings.queue
    refused = [one for one in found if isinstance(one, openai.RateLimitError)]
    answers = [one.choices[0].message.content for one in found if not isinstance(one, Exception)]
    assert refused and len(refused) + len(answers) == 24 and len(set(answers)) == 1
    assert int(refused[0].response.headers["Retry-After"]) >= 1 and json.loads(refused[0].response.text)["error"]["code"] == "queue_full"


def test_sigterm_finishes_answers_and_takes_no_more(server, client, whole):
    """The last test of this file: the server has ended behind it."""
    answer = iter(complete(client, ask("what is this?", url()), stream=True))
    text = next(answer).choices[0].delta.content
    server.running.handle_exit(signal.SIGTERM, None)
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=20)
    with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
        complete(other, ask())
    assert text + "".join(chunk.choices[0].delta.content or "" for chunk in answer) == whole.choices[0].message.content
    server.thread.join(20)
    assert not server.thread.is_alive()
