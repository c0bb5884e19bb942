"""The models that a configuration can name: the echo, and a table of OpenAI-compatible providers."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from feishu_bot.ai.chat_model import Finished, ReportedUsage, TextDelta
from feishu_bot.ai.openai_compatible import OpenAICompatible
from feishu_bot.ai.profile import models_of
from feishu_bot.ai.tokens import count_tokens, prompt_tokens
from feishu_bot.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from feishu_bot.ai.chat_model import ChatModel, ChatRequest, ModelEvent
    from feishu_bot.config import AISettings, NetworkSettings

ECHO: Final = "echo"

PROVIDERS: Final = MappingProxyType({
    "openai": "https://api.openai.com/v1",
    "deepseek": "https://api.deepseek.com/v1",
    "moonshot": "https://api.moonshot.cn/v1",
    "qwen": "https://dashscope.aliyuncs.com/compatible-mode/v1",
    "zhipu": "https://open.bigmodel.cn/api/paas/v4",
    "ollama": "http://127.0.0.1:11434/v1",
})  # fmt: skip
_WITHOUT_KEY: Final = frozenset({"ollama"})

# Context windows in tokens by the beginning of the provider's name of a model, the longest match holds. Only
# models whose window is smaller than what a configuration may ask for matter; the rest are bounded by
# ``max_history_tokens``, and by the provider's own error.
_WINDOWS: Final = MappingProxyType({
    "gpt-3.5-turbo": 16_385,
    "gpt-4": 8_192,
    "gpt-4-32k": 32_768,
    "gpt-4-turbo": 128_000,
    "gpt-4o": 128_000,
    "gpt-4.1": 1_047_576,
    "gpt-4.5": 128_000,
    "deepseek-": 65_536,
    "moonshot-v1-8k": 8_192,
    "moonshot-v1-32k": 32_768,
    "moonshot-v1-128k": 131_072,
    "qwen-max": 32_768,
    "glm-4": 128_000,
})  # fmt: skip


def split_name(model: str) -> tuple[str, str]:
    """Return provider and the provider's own name of a model: ``ollama:qwen2:7b`` is ``ollama``, ``qwen2:7b``."""
    provider, colon, name = model.partition(":")
    return (provider, name) if colon else ("", model)


def context_window(model: str) -> int | None:
    """Return how many tokens prompt and answer of ``model`` may have together, or None where that is unknown."""
    name = split_name(model)[1]
    known = max((prefix for prefix in _WINDOWS if name.startswith(prefix)), key=len, default=None)
    return None if known is None else _WINDOWS[known]


class EchoModel:
    """Answers with the last user text itself; its usage is our own count."""

    async def stream(self, request: ChatRequest) -> AsyncIterator[ModelEvent]:
        """Yield the last user text, at once and without any network."""
        text = next((m.content for m in reversed(request.messages) if m.role == "user"), "")
        prompt = request.prompt_tokens
        if prompt is None:
            prompt = prompt_tokens([count_tokens(m.content, ECHO) for m in request.messages])
        output = count_tokens(text, ECHO)
        if text:
            yield TextDelta(text)
        yield ReportedUsage(prompt, output)
        yield Finished("stop")

    async def close(self) -> None:
        """Do nothing: there is nothing open."""


class ModelRouter:
    """One ``ChatModel`` for every name of a configuration: asks the server that the name belongs to.

    With ``base_url`` every model but ``echo`` is asked there. Without it, each provider of the table at its
    own address; the key belongs to the provider of ``ai.model`` and is never sent to another one.
    """

    def __init__(self, settings: AISettings, *, network: NetworkSettings | None = None) -> None:
        self._settings = settings
        self._network = network
        self._routes: dict[str, tuple[ChatModel, str]] = {}
        self._servers: dict[str, ChatModel] = {}

    def check(self, model: str) -> None:
        """Raise ConfigError, with a line that says what is missing, if ``model`` cannot be asked."""
        self._route(model)

    def stream(self, request: ChatRequest) -> AsyncIterator[ModelEvent]:
        """Yield the events of the model that the request names; one that cannot be asked is "refused"."""
        try:
            server, name = self._route(request.model)
        except ConfigError as error:
            raise ModelError("refused", error.mistakes[0]) from None
        return server.stream(request if name == request.model else replace(request, model=name))

    async def close(self) -> None:
        """Close the connections to all servers."""
        for server in self._servers.values():
            await server.close()

    def _route(self, model: str) -> tuple[ChatModel, str]:
        route = self._routes.get(model)
        if route is None:
            provider, name = split_name(model)
            if model == ECHO:
                provider, name, url, key = ECHO, ECHO, "", ""
            else:
                url, key = self._address(model, provider, name)
            server = self._servers.get(url)
            if server is None:
                server = self._servers[url] = self._connect(url, key)
            route = self._routes[model] = (server, name)
        return route

    def _address(self, model: str, provider: str, name: str) -> tuple[str, str]:
        settings = self._settings
        key = settings.api_key.current
        if not name:
            raise ConfigError([f"ai.model: {model}: expected PROVIDER:MODEL such as openai:gpt-4o"])
        if settings.base_url is not None:
            return settings.base_url, key
        if provider not in PROVIDERS:
            reason = f"ai.base_url is required unless the model is echo or of {', '.join(PROVIDERS)}"
            raise ConfigError([f"ai.model: {model}: {reason}"])
        if provider in _WITHOUT_KEY:
            return PROVIDERS[provider], ""
        if provider != split_name(settings.model)[0]:
            reason = f"ai.api_key is for the provider of ai.model ({settings.model})"
            raise ConfigError([f"ai.fallback_models: {model}: {reason}; set ai.base_url to a server of both"])
        if not key:
            raise ConfigError([f"ai.api_key: {model} needs a key"])
        return PROVIDERS[provider], key

    def _connect(self, url: str, key: str) -> ChatModel:
        if not url:
            return EchoModel()
        return OpenAICompatible(url, key, timeout_s=self._settings.timeout_s, network=self._network)


def make_model(settings: AISettings, *, network: NetworkSettings | None = None) -> ModelRouter:
    """Return the model of a configuration with its fallbacks, all checked.

    Raises ConfigError: an unknown provider without ``base_url``, a missing key, a URL that is none.
    """
    router = ModelRouter(settings, network=network)
    for model in models_of(settings):
        router.check(model)
    return router
