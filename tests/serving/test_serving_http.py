"""The HTTP interface with OpenAI's own client equals the library: answers, streams, stop strings, seeds, rules, conversations."""

import base64
import io

import numpy as np
import openai
import pytest
from http_tools import LONGEST, SLOTS, SMALL, ask, complete, running, settings, url
from PIL import Image

from gp_jax import Ladder, Ladders
from gp_jax.serving.lengths import Lengths
from gp_jax.serving.server import Server
from gp_jax.tiny import make_checkpoint

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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    vlm = make_checkpoint(tmp_path_factory.mktemp("http") / "tiny", hf_config=SMALL)
    with running(Server.build(settings(), vlm, lengths=LENGTHS)) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def whole(client):
    return complete(client, ask("what is this?", url()), logprobs=True, top_logprobs=3, extra_body={"return_mask": True})


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
    assert all(len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token for entry in entries)


def test_a_stream_equals_the_whole(client, whole):
    options = dict(stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=3)
    chunks = list(complete(client, ask("what is this?", url()), **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    entries = [entry for c in chunks if c.choices and c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    expected = whole.choices[0].logprobs.content
    assert [(own.token, [top.token for top in own.top_logprobs]) for own in entries] == [
        (own.token, [top.token for top in own.top_logprobs]) for own in expected
    ]
    assert [own.logprob for own in entries] == pytest.approx([own.logprob for own in expected], abs=1e-5)


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
