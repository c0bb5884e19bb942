from __future__ import annotations

import base64

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from feishu_bot.ai.agent import Agent
from feishu_bot.ai.images import image_tokens, most_image_tokens, read_image, takes_images
from feishu_bot.ai.models import make_model
from feishu_bot.ai.tokens import count_tokens, prompt_tokens
from feishu_bot.config import AISettings
from feishu_bot.testing.model import Behaviour, FakeModelServer
from tests.ai.pictures import gif, jpeg, png, webp

MODEL = "openai:gpt-4o"


@pytest.mark.parametrize(
    ("model", "width", "height", "detail", "tokens"),
    [
        (MODEL, 1024, 1024, "high", 765),
        (MODEL, 2048, 4096, "high", 1105),
        (MODEL, 4096, 8192, "low", 85),
        (MODEL, 1, 1, "high", 255),
        (MODEL, 100_000, 1, "high", 85 + 4 * 170),
        ("gpt-4o-mini", 1024, 1024, "high", 2833 + 4 * 5667),
        ("openai:gpt-5", 512, 512, "high", 210),
        ("openai:gpt-4.1-mini", 1024, 1024, "high", 1659),
        ("openai:gpt-4.1-mini", 9000, 9000, "low", 2489),
        ("qwen:qwen-vl-max", 1024, 1024, "high", 765),
    ],
)
def test_a_picture_costs_what_the_providers_documentation_says(model, width, height, detail, tokens):
    assert image_tokens(model, width, height, detail) == tokens


@given(
    st.sampled_from([MODEL, "openai:gpt-4o-mini", "openai:o3", "openai:gpt-5-nano", "x:y"]),
    st.integers(1, 70_000),
    st.integers(1, 70_000),
    st.sampled_from(["low", "high"]),
)
@example(MODEL, 2048, 769, "high")
def test_no_picture_costs_more_than_what_is_reserved_for_one(model, width, height, detail):
    assert 0 < image_tokens(model, width, height, detail) <= most_image_tokens(model, detail)


@pytest.mark.parametrize(
    ("name", "sees"),
    [
        ("openai:gpt-4o", True),
        ("openai:o3", True),
        ("openai:o3-mini", False),
        ("openai:gpt-3.5-turbo", False),
        ("qwen:qwen2.5-vl-72b-instruct", True),
        ("moonshot:moonshot-v1-8k-vision-preview", True),
        ("deepseek:deepseek-chat", False),
        ("router:openai/gpt-4o", True),
        ("echo", False),
    ],
)
def test_a_model_is_given_pictures_if_it_is_known_to_take_them_or_the_settings_say_so(name, sees):
    assert takes_images(name, None) is sees
    assert takes_images(name, True) is (name != "echo")
    assert takes_images(name, False) is False


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (png(40, 30), "png"),
        (gif(40, 30), "gif"),
        (jpeg(40, 30), "jpeg"),
        (webp("VP8 ", 40, 30), "webp"),
        (webp("VP8L", 40, 30), "webp"),
        (webp("VP8X", 40, 30), "webp"),
    ],
)
def test_kind_and_size_of_a_picture_are_read_from_its_bytes(data, kind):
    image = read_image(data, "low")
    assert (image.media_type, image.width, image.height) == (f"image/{kind}", 40, 30)
    for length in range(len(data)):  # cut off, it is a picture of the same size or none; never an accident
        try:
            assert read_image(data[:length], "low").width == 40
        except ValueError:
            continue


@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"\xff\xd8\xff", b"RIFF....WEBPVP8 ", b"GIF89a", png()[:12]]),
)
def test_bytes_that_are_no_picture_are_a_value_error(data, head):
    try:
        image = read_image(head + data, "high")
    except ValueError:
        return
    assert image.width > 0 < image.height


@pytest.fixture
async def server():
    async with FakeModelServer() as running:
        yield running


def settings_of(server, **more):
    return AISettings(model=MODEL, base_url=server.base_url, api_key="k", system_prompt="", **more)


async def answered(settings, plan_with, images, **more):
    agent = Agent(settings, model=make_model(settings), sleep=_no_sleep)
    try:
        plan = agent.plan([], plan_with, count_tokens(plan_with, MODEL), images=len(images))
        reserved = plan.reserve_tokens
        plan = agent.enclose(plan, images)
        assert plan.reserve_tokens == reserved
        return plan, await agent.answer(plan, reserve=_unbounded, **more)
    finally:
        await agent.close()


async def _no_sleep(_: float) -> None:
    pass


async def _unbounded(*, call, model, tokens, cost):
    pass


@pytest.mark.parametrize("detail", ["low", "high"])
async def test_a_picture_travels_as_a_data_url_and_is_counted_as_the_provider_counts_it(server, detail):
    data = png(600, 600)
    plan, answer = await answered(
        settings_of(server, image_detail=detail), "what is it?", [read_image(data, detail)]
    )
    (request,) = server.requests
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    assert request.body["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what is it?"},
                {"type": "image_url", "image_url": {"url": url, "detail": detail}},
            ],
        }
    ]
    assert answer.text == "echo: what is it?"
    words = count_tokens("what is it?", MODEL)
    assert plan.prompt_tokens == prompt_tokens([words + (85 if detail == "low" else 765)])
    assert answer.calls[0].input_tokens == request.prompt_tokens == plan.prompt_tokens
    most = 85 if detail == "low" else 1445
    assert plan.reserve_tokens == prompt_tokens([words + most]) + 1024


async def test_a_picture_without_words_has_no_empty_words_beside_it(server):
    await answered(settings_of(server), "", [read_image(png(), "high")])
    (content,) = [m["content"] for m in server.requests[0].body["messages"]]
    assert [part["type"] for part in content] == ["image_url"]


async def test_a_fallback_that_takes_no_pictures_is_not_asked(server):
    settings = settings_of(server, fallback_models=["openai:gpt-3.5-turbo", "openai:o3"])
    server.script(Behaviour(kind="status", status=400))
    _, answer = await answered(settings, "look", [read_image(png(2000, 2000), "high")])
    assert [r.model for r in server.requests] == ["gpt-4o", "o3"]
    assert answer.text is not None
