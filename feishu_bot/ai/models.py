"""The models that a configuration can name: the echo, and a table of OpenAI-compatible providers."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from feishu_bot.ai.chat_model import Finished, ReportedUsage, TextDelta
from feishu_bot.ai.openai_compatible import OpenAICompatible
from feishu_bot.ai.profile import models_of
from feishu_bot.ai.tokens import count_tokens, prompt_tokens
from feishu_bot.ai.vendors import VendorModel, check_vendor
from feishu_bot.config import PROVIDERS, ProviderSettings
from feishu_bot.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from feishu_bot.ai.chat_model import ChatModel, ChatRequest, ModelEvent
    from feishu_bot.config import AISettings, NetworkSettings, Provider

ECHO: Final = "echo"

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

    ``ai.base_url`` and ``ai.api_key`` are for every model without an entry in ``ai.providers`` that says more; a key is
    never sent to another provider than the one of ``ai.model``, or its own.
    """

    def __init__(self, settings: AISettings, *, network: NetworkSettings | None = None) -> None:
        self._settings = settings
        self._network = network
        self._routes: dict[str, tuple[ChatModel, str]] = {}
        self._servers: dict[_Address, ChatModel] = {}

    def check(self, model: str) -> None:
        """Raise ConfigError, with a line that says what is missing, if ``model`` cannot be asked."""
        self._address(model)

    def open(self, model: str) -> None:
        """Make the client that will be asked, also its library. Raises ConfigError."""
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
            address = self._address(model)
            server = self._servers.get(address)
            if server is None:
                server = self._servers[address] = self._connect(address)
            route = self._routes[model] = (server, split_name(model)[1])
        return route

    def _address(self, model: str) -> _Address:
        """Return where a model is asked: as its provider's entry says, else ``ai`` itself, else the table."""
        if model == ECHO:
            return _Address(ECHO, "", "", None)
        settings = self._settings
        provider, name = split_name(model)
        if not name:
            raise ConfigError([f"ai.model: {model}: expected PROVIDER:MODEL such as openai:gpt-4o"])
        own, known = settings.providers.get(provider, ProviderSettings()), PROVIDERS.get(provider)
        is_main = provider == split_name(settings.model)[0]
        network = own.network or self._network
        if (
            known is not None and not known.base_url
        ):  # by its library, to its own address or one that is its own
            url = own.base_url or (settings.base_url if is_main else None) or ""
            key = own.api_key.current or (settings.api_key.current if is_main else "")
            check_vendor(provider, model)
            return _Address(provider, url, _needed(key, model, known), network)
        if own.base_url is not None:
            key = own.api_key.current or (settings.api_key.current if is_main else "")
            return _Address("", own.base_url, key, network)
        if settings.base_url is not None:
            return _Address("", settings.base_url, settings.api_key.current, network)
        if known is None:
            reason = f"ai.base_url is required unless the model is echo or of {', '.join(PROVIDERS)}"
            raise ConfigError([f"ai.model: {model}: {reason}"])
        key = own.api_key.current or (settings.api_key.current if is_main and known.variable else "")
        return _Address("", known.base_url, _needed(key, model, known) if known.variable else key, network)

    def _connect(self, address: _Address) -> ChatModel:
        if address.kind == ECHO:
            return EchoModel()
        timeout_s = self._settings.timeout_s
        if address.kind:
            return VendorModel(
                address.kind, address.url, address.key, timeout_s=timeout_s, network=address.network
            )
        return OpenAICompatible(address.url, address.key, timeout_s=timeout_s, network=address.network)


class _Address(NamedTuple):
    """Where a model is asked. ``kind``: echo, the name of a provider with a library of its own, or nothing."""

    kind: str
    url: str
    key: str
    network: NetworkSettings | None


def _needed(key: str, model: str, provider: Provider) -> str:
    if not key:
        name = split_name(model)[0]
        raise ConfigError(
            [
                f"ai.providers.{name}.api_key: {model} needs a key: here, or in the variable {provider.variable}"
            ]
        )
    return key


def check_models(settings: AISettings) -> list[str]:
    """Return one line for each model of a configuration that cannot be asked; nothing is opened."""
    router, mistakes = ModelRouter(settings), []
    for model in models_of(settings):
        try:
            router.check(model)
        except ConfigError as error:
            mistakes += error.mistakes
    return mistakes


def make_model(settings: AISettings, *, network: NetworkSettings | None = None) -> ModelRouter:
    """Return the models of a configuration, all opened.

    Raises ConfigError: an unknown provider without ``base_url``, a missing key, a URL that is none.
    """
    router = ModelRouter(settings, network=network)
    for model in models_of(settings):
        router.open(model)
    return router
