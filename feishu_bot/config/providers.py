"""The model providers that are known by name: where they are reached, and which variable holds the key."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, NamedTuple


class Provider(NamedTuple):
    """``base_url`` is that of the OpenAI-compatible face; ``""``: the provider's own protocol, by its library.

    ``variable`` is the environment variable in which the provider's own tools look for the key; ``""``: needs none.
    """

    base_url: str
    variable: str


PROVIDERS: Final = MappingProxyType({
    "openai": Provider("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "deepseek": Provider("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    "qwen": Provider("https://dashscope.aliyuncs.com/compatible-mode/v1", "DASHSCOPE_API_KEY"),
    "kimi": Provider("https://api.moonshot.cn/v1", "MOONSHOT_API_KEY"),
    "moonshot": Provider("https://api.moonshot.cn/v1", "MOONSHOT_API_KEY"),
    "zhipu": Provider("https://open.bigmodel.cn/api/paas/v4", "ZHIPUAI_API_KEY"),
    "doubao": Provider("https://ark.cn-beijing.volces.com/api/v3", "ARK_API_KEY"),
    "siliconflow": Provider("https://api.siliconflow.cn/v1", "SILICONFLOW_API_KEY"),
    "openrouter": Provider("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    "groq": Provider("https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    "mistral": Provider("https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    "xai": Provider("https://api.x.ai/v1", "XAI_API_KEY"),
    "ollama": Provider("http://127.0.0.1:11434/v1", ""),
    "vllm": Provider("http://127.0.0.1:8000/v1", ""),
    "lmstudio": Provider("http://127.0.0.1:1234/v1", ""),
    "anthropic": Provider("", "ANTHROPIC_API_KEY"),
    "google": Provider("", "GEMINI_API_KEY"),
})  # fmt: skip
