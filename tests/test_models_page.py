"""What the page of the models shows, held against the program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from feishu_bot.ai.models import check_models
from feishu_bot.ai.profile import make_profiles
from feishu_bot.config import PROVIDERS, AgentSettings, load

PAGE = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
KEYS = dict.fromkeys(re.findall(r"\$\{(\w+)", PAGE), "sk-test")


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_example_is_a_configuration_whose_models_can_be_asked(tmp_path, example):
    (tmp_path / "config.yaml").write_text(example)
    settings = load(folder=tmp_path, platform_settings={}, environ=KEYS).settings
    assert check_models(settings.ai) == []
    assert make_profiles(settings.ai)


def test_every_provider_is_on_the_page_with_its_address_and_variable():
    rows = {row[0]: row[1:] for row in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)}
    assert rows == {
        name: (
            f"`{p.base_url}`" if p.base_url else "its own, by its library",
            f"`{p.variable}`" if p.variable else "none",
        )
        for name, p in PROVIDERS.items()
    }


def test_every_key_of_an_agent_is_on_the_page():
    (keys,) = re.findall(r"^An agent's keys: (.*?)\.$", PAGE, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`(\w+)`", keys)) == set(AgentSettings.model_fields)
