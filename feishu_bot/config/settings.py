"""The settings tree: every key of ``config.yaml`` with its type, default and one line of description.

A new key is one field here; the commented file, ``docs/configuration.md``, environment overrides and error
messages follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - pydantic reads the annotations at run time
from datetime import timedelta
from ipaddress import ip_network
from typing import Annotated, Any, ClassVar, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import (
    Field,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from feishu_bot.config.values import (
    BASE_PATH,
    HEADER,
    AlertTarget,
    Count,
    Cron,
    DatabaseUrl,
    Duration,
    Expected,
    FilePath,
    HttpUrl,
    Network,
    Rate,
    Secret,
    Secrets,
    Settings,
    Text,
    TimeZone,
)
from feishu_bot.model import Scope

# --------------------------------------------------------------------------------------------------- tree


class ServerSettings(Settings):
    """Where the server listens and when it says "later"."""

    host: Text = Field("127.0.0.1", description="the address to listen on; 0.0.0.0 for all")
    port: int = Field(8080, ge=0, le=65535, description="0 takes any free port")
    workers: int = Field(1, ge=1, le=256, description="processes on this machine; they share the port")
    max_body_bytes: Count = Field(1048576, description="larger requests are answered 413")
    max_waiting: Count = Field(
        10000, description="more messages waiting than this: webhooks get 503 before the acknowledgement"
    )
    max_waiting_age_s: Count = Field(300, description='older than this, /readyz reports "degraded"')
    min_free_mb: int = Field(200, ge=0, le=2**53, description="less free disk than this: webhooks get 503")
    base_path: Annotated[str, Field(pattern=BASE_PATH), Expected("a path such as /bot, or nothing")] = Field(
        "", description="what all paths begin with, behind a proxy that hands them on whole"
    )
    public_url: HttpUrl | None = Field(
        None, description="how browsers reach the server; https:// makes cookies travel by that alone"
    )
    trusted_proxies: tuple[Network, ...] = Field(
        (), description="reverse proxies whose X-Forwarded-For is believed"
    )
    user_header: Annotated[str, Field(pattern=HEADER), Expected("a header's name")] | None = Field(
        None, description="the header in which a trusted proxy names the user whom it has logged in"
    )
    private_networks: tuple[Network, ...] = Field(
        tuple(map(ip_network, ("127.0.0.0/8", "::1", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))),
        description="who may reach all but /webhook, /ws and /healthz without an admin token",
    )


class ChatSettings(Settings):
    """How the bot behaves in chats."""

    language: Literal["zh", "en"] = Field("zh", description="the bot's own sentences: zh or en")
    command_prefix: Annotated[str, Field(pattern=r"^\S{1,8}$"), Expected("1 to 8 characters, no blanks")] = (
        Field("/", description="what a command begins with")
    )
    enable_private: bool = Field(True, description="answer in private chats")
    enable_in_groups: bool = Field(True, description="answer in groups")
    require_at_in_groups: bool = Field(True, description="in groups only when mentioned; commands too")
    scope: Scope = Field(
        Scope.USER_IN_CHAT, description="who shares a conversation: user, user_in_chat, chat or thread"
    )
    max_message_length: int = Field(
        4000, ge=20, le=1_000_000, description="characters of one message; longer answers are split"
    )
    max_input_tokens: Count = Field(4000, description="a longer question is refused with both numbers")
    answer_within: Duration | None = Field(
        timedelta(hours=6), description="older messages end expired, counted from receipt; null: for ever"
    )
    error_message: str | None = Field(
        None, description="what is said when no answer could be made; null: the built-in sentence"
    )
    admins: tuple[Text, ...] = Field((), description="persons (account:id) who may use operator commands")


class AccessSettings(Settings):
    """Who may talk to the bot."""

    default: Literal["allow", "deny"] = Field("allow", description="for all who are in neither list")
    allow: tuple[Text, ...] = Field((), description="persons, user keys, chats or patterns such as feishu:*")
    deny: tuple[Text, ...] = Field((), description="the same; deny wins over allow")
    outsiders: Literal["ignore", "allow"] = Field(
        "ignore", description="people of another company: ignore or allow"
    )


class PersistenceSettings(Settings):
    """The conversation store."""

    enabled: bool = Field(True, description="false: message texts are not kept, so there is no history")
    db_url: DatabaseUrl = Field(
        "sqlite:///data/conversations.db", repr=False, description="sqlite, postgresql, mysql or mariadb"
    )
    cleanup_days: int = Field(
        30, ge=0, le=36500, description="conversations idle for longer are removed; 0: keep for ever"
    )
    max_history_turns: int = Field(
        20, ge=0, le=100_000, description="a turn is a user message and all that answers it"
    )
    max_history_tokens: int = Field(8000, ge=0, le=2**53, description="history sent to the model")
    warm_sessions: int = Field(
        100, ge=0, le=100_000, description="conversations whose history is read into memory after the start"
    )
    auto_migrate: bool = Field(True, description="bring the schema up to date at start")


class MatchSettings(Settings):
    """Where a rule applies; patterns with * and ?, what is absent matches all."""

    platform: Text | None = Field(None, description="account names")
    chat: Text | None = Field(None, description="chat ids")
    user: Text | None = Field(None, description="persons")


AgentName = Annotated[
    str, Field(pattern=r"^[\w][\w.-]{0,63}$"), Expected("a short name: letters, digits, - and _")
]


class NetworkSettings(Settings):
    """How to reach the outside."""

    proxy: HttpUrl | None = Field(
        None, repr=False, description="an HTTP proxy; null: HTTPS_PROXY and NO_PROXY; never for loopback"
    )
    ca_file: FilePath | None = Field(None, description="a file of certificates to trust, PEM")


class ProviderSettings(Settings):
    """How one provider of models is reached."""

    base_url: HttpUrl | None = Field(None, description="null: the provider's own address")
    api_key: Secrets = Field(Secrets(), description="null: the provider's variable, such as OPENAI_API_KEY")
    network: NetworkSettings | None = Field(None, description="proxy and ca_file for this provider alone")


McpName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_-]{1,32}$"), Expected("1 to 32 letters, digits, - and _")
]


class McpServerSettings(Settings):
    """A server of tools by the Model Context Protocol: a program that is started here, or a URL."""

    command: Text | None = Field(
        None, description="a program that speaks MCP on its standard input and output"
    )
    args: tuple[str, ...] = Field((), description="its arguments")
    env: Mapping[Text, Secret] = Field({}, description="variables of its environment, beside PATH and HOME")
    cwd: FilePath | None = Field(None, description="the folder it runs in")
    url: HttpUrl | None = Field(None, description="instead of a command: a server by streamable HTTP")
    headers: Mapping[Text, Secret] = Field({}, description="sent with every request, e.g. Authorization")
    timeout_s: float = Field(30.0, gt=0, le=3600, description="for one call of a tool")
    tools: tuple[Text, ...] = Field(("*",), description="which of its tools, by its own names, with * and ?")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.command is None) is (self.url is None):
            raise ValueError("expected either command or url")
        return self


PersonaName = Annotated[
    str, Field(pattern=r"^\S(.{0,62}\S)?$"), Expected("a name of at most 64 characters in one line")
]


class AgentSettings(Settings):
    """An agent; what is left out is as in ``ai`` itself."""

    model: Text | None = Field(None, description="as ai.model")
    fallback_models: tuple[Text, ...] | None = Field(None, description="as ai.fallback_models")
    system_prompt: str | None = Field(None, description="as ai.system_prompt")
    persona: Text | None = Field(None, description="a name in ai.personas, whose prompt stands first")
    tools: tuple[Text, ...] | None = Field(None, description="names of tools, with * and ?; [] for none")
    max_output_tokens: Count | None = Field(None, description="as ai.max_output_tokens")
    max_history_turns: int | None = Field(None, ge=0, le=100_000, description="turns sent to the model")
    max_history_tokens: int | None = Field(None, ge=0, le=2**53, description="history sent to the model")
    temperature: float | None = Field(None, ge=0, le=2, description="as ai.temperature")
    summarize: bool | None = Field(None, description="as ai.summarize")
    description: Text | None = Field(None, description="shown by /agent")


class AgentMatchSettings(MatchSettings):
    """Where an agent answers; patterns with * and ?, what is absent matches all."""

    tenant: Text | None = Field(None, description="tenants of accounts")


class AgentRuleSettings(Settings):
    """Which agent answers where nobody has chosen one; the first that matches."""

    match: AgentMatchSettings | None = Field(None, description="platform, chat, user, tenant; null: all")
    agent: AgentName = Field(description="a name in ai.agents, or default")


class PriceSettings(Settings):
    """What a model costs, in US dollars per million tokens."""

    input: float = Field(ge=0, le=1e6, description="tokens of the prompt")
    cached_input: float | None = Field(
        None, ge=0, le=1e6, description="those the provider had at hand; null: as input"
    )
    output: float = Field(ge=0, le=1e6, description="tokens of the answer, with what was thought")


class AISettings(Settings):
    """The model that answers."""

    enabled: bool = Field(True, description="false: only commands and plugins answer")
    model: Text = Field(
        "echo", description="echo, or PROVIDER:MODEL such as openai:gpt-4o or deepseek:deepseek-chat"
    )
    fallback_models: tuple[Text, ...] = Field((), description="asked in this order when the model fails")
    base_url: HttpUrl | None = Field(None, description="any OpenAI-compatible server")
    api_key: Secrets = Field(Secrets(), description="the provider's key")
    providers: Mapping[Text, ProviderSettings] = Field(
        {}, description="name before the colon -> address and key of that provider"
    )
    system_prompt: str = Field("You are a helpful assistant.", description="stands before every history")
    max_output_tokens: Count = Field(1024, description="the longest answer")
    temperature: float | None = Field(None, ge=0, le=2, description="null: the provider's own")
    timeout_s: float = Field(60.0, gt=0, le=3600, description="per attempt")
    images: bool | None = Field(
        None, description="whether the model is given users' pictures; null: if it is known to take them"
    )
    image_detail: Literal["low", "high"] = Field(
        "high", description="how closely it looks: low costs 85 tokens a picture, high up to 1445 (gpt-4o)"
    )
    prices: Mapping[Text, PriceSettings] = Field(
        {}, description='model or pattern such as "openai:gpt-4o*" -> its price, before the built-in table'
    )
    retries: int = Field(
        1, ge=0, le=10, description="further tries after an error that may pass, with growing pauses"
    )
    max_calls: int = Field(
        200, ge=1, le=100_000, description="calls to one model at once, by each process; others wait"
    )
    summarize: bool = Field(False, description="tell the model in short what no longer fits into the history")
    tools: tuple[Text, ...] = Field(
        ("*",), description="which tools of plugins and MCP servers are offered, by name, with * and ?"
    )
    max_tool_rounds: int = Field(
        8, ge=1, le=100, description="how often a model may call tools before it has to answer"
    )
    mcp_servers: Mapping[McpName, McpServerSettings] = Field(
        {}, description="name -> a server of tools, which are called NAME_TOOL"
    )
    agents: Mapping[AgentName, AgentSettings] = Field(
        {}, description='name -> what differs from ai itself, which is the agent "default"'
    )
    agent_for: tuple[AgentRuleSettings, ...] = Field(
        (), description="which agent answers where; the first that matches, else default"
    )
    personas: Mapping[PersonaName, str] = Field(
        {}, description="name -> a system prompt that people choose by /persona"
    )
    conversation_persistence: PersistenceSettings = Field(
        PersistenceSettings(), description="the conversation store"
    )

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        known = {"default", *self.agents}
        for rule in self.agent_for:
            if rule.agent not in known:
                raise ValueError(f"agent_for names {rule.agent!r}, which is not in ai.agents")
        for name, agent in self.agents.items():
            if name == "default":
                raise ValueError('the agent "default" is ai itself')
            if agent.persona is not None and agent.persona not in self.personas:
                raise ValueError(f"the agent {name!r} names a persona that is not in ai.personas")
        return self


class ChatMatchSettings(Settings):
    """Of which conversations a rule speaks; patterns with * and ?, what is absent matches all."""

    platform: Text | None = Field(None, description="account names")
    chat: Text | None = Field(None, description="chat ids")
    type: Literal["private", "group", "channel"] | None = Field(
        None, description="private, group or channel; what a whole chat shares is of both the latter"
    )


class ChatRuleSettings(Settings):
    """What holds in some chats instead of everywhere; the first rule that matches wins."""

    match: ChatMatchSettings | None = Field(None, description="platform, chat, type; null: all")
    scope: Scope | None = Field(None, description="who shares a conversation there; null: as in chat")
    language: Literal["zh", "en"] | None = Field(None, description="the bot's own sentences there")
    require_at_in_groups: bool | None = Field(None, description="whether it must be mentioned there")
    agent: AgentName | None = Field(None, description="who answers there: a name in ai.agents, or default")
    cleanup_days: int | None = Field(
        None, ge=0, le=36500, description="instead of ai.conversation_persistence.cleanup_days; 0: for ever"
    )


class RetentionSettings(Settings):
    """For how long the conversations of some chats are kept."""

    match: ChatMatchSettings | None = Field(None, description="platform, chat, type; null: all")
    days: int = Field(ge=0, le=36500, description="without activity, then they are removed; 0: for ever")


class BudgetSettings(Settings):
    """A limit on tokens, cost or calls; several budgets may apply and all must hold."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"), Expected("a short name")] = (
        Field(description="unique; what was used is counted under it")
    )
    scope: Literal["user", "chat", "platform", "tenant", "global"] = Field(
        "user", description="what is counted together: user (a person), chat, platform, tenant or global"
    )
    window: Literal["minute", "hour", "day", "week", "month", "total"] = Field(
        "day", description="calendar window in schedule.timezone; weeks begin on Monday"
    )
    limit_tokens: Count | None = Field(None, description="input and output tokens together")
    limit_cost_usd: float | None = Field(
        None, ge=0.000001, le=1e9, description="by ai.prices and the built-in table of prices"
    )
    limit_requests: Count | None = Field(None, description="calls of a model")
    match: MatchSettings | None = Field(None, description="platform, chat, user: patterns; null: all")
    on_exceeded: Literal["reject", "degrade", "warn"] = Field(
        "reject", description="reject, degrade (to degrade_to) or warn (goes on); the user is told"
    )
    degrade_to: Text | None = Field(
        None, description="the model then; its calls are not counted here, so bound them by another budget"
    )
    warn_at: float | None = Field(
        None, gt=0, le=1, description="a share such as 0.8: who is counted is told once per window"
    )

    @property
    def limit_micro_usd(self) -> int | None:
        """The limit on costs in millionths of a dollar."""
        return None if self.limit_cost_usd is None else round(self.limit_cost_usd * 1_000_000)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.limit_tokens is None and self.limit_cost_usd is None and self.limit_requests is None:
            raise ValueError("limits nothing: set limit_tokens, limit_cost_usd or limit_requests")
        if (self.degrade_to is not None) is not (self.on_exceeded == "degrade"):
            raise ValueError("degrade_to goes with on_exceeded: degrade")
        return self


class PlatformSettings(Settings):
    """What every platform account has."""

    #: Values of the built-in account that bears the type's name, as they stand in a configuration file,
    #: e.g. ``{"app_id": "${FEISHU_APP_ID:-}"}``.
    builtin: ClassVar[Mapping[str, Any]] = {}

    type: str = Field(description="the platform; default: the account's name")
    enabled: bool = Field(False, description="whether the server runs this account")
    tenant: Text = Field(
        "default", description="whose conversations these are, where several share a database"
    )
    insecure: bool = Field(False, description="true: events are taken without proof of who sent them")
    network: NetworkSettings | None = Field(None, description="proxy and ca_file for this account alone")
    resend_unknown: bool = Field(
        True,
        description="a reply that may have arrived, and that the platform would show twice: sent again with a mark;"
        " false: a dead letter",
    )
    messages_per_s: Rate = Field(None, description="sent by all processes together; null: no limit of ours")
    messages_per_chat_per_s: Rate = Field(None, description="the same, to one chat")

    def missing(self) -> list[str]:
        """Return the keys without which an enabled account cannot prove who sent an event, or answer."""
        return []

    def warnings(self) -> list[str]:
        """Return what the operator should know about an enabled account, one sentence each."""
        if self.insecure:
            return ["insecure: true: events are taken from anybody, without a signature"]
        return []


class JobSettings(Settings):
    """A job that runs by the clock, once over all processes."""

    enabled: bool = Field(True, description="false: only by command")
    cron: Cron = Field(description="standard crontab, 0 and 7 are Sunday")


class CleanupJobSettings(JobSettings):
    """When the cleanup runs; whoever only switches it off need not repeat the time."""

    cron: Cron = Field("0 3 * * *", description="standard crontab, 0 and 7 are Sunday")


class BackupJobSettings(JobSettings):
    """When and where backups are made."""

    cron: Cron = Field("30 3 * * *", description="standard crontab, 0 and 7 are Sunday")
    directory: FilePath = Field("data/backups", description="where they lie; best on another disk")
    keep: int = Field(7, ge=1, le=100_000, description="how many stay; the oldest are removed")


class ScheduleSettings(Settings):
    """When jobs run."""

    timezone: TimeZone = Field("Asia/Shanghai", description="of jobs and of budget windows")
    cleanup: CleanupJobSettings = Field(
        CleanupJobSettings(), description="removes conversations idle for cleanup_days"
    )
    backup: BackupJobSettings = Field(
        BackupJobSettings(), description="backs the database up and tries the backup out"
    )
    retention: tuple[RetentionSettings, ...] = Field(
        (), description="instead of cleanup_days, before chats; the first rule that matches wins"
    )

    @property
    def zone(self) -> ZoneInfo:
        """The time zone itself."""
        return ZoneInfo(self.timezone)


class AlertSettings(Settings):
    """Where the operator is told that something is wrong; each kind at most once an hour."""

    to: AlertTarget = Field(description="an account, or the URL of a Feishu custom bot")
    secret: Secret | None = Field(None, description="the custom bot's, if its signature check is on")
    chat: Text | None = Field(None, description="with an account: the chat's id")
    on: tuple[Literal["dead", "budget", "backup", "queue", "disk", "tokens", "conversations"], ...] = Field(
        ("dead", "budget", "backup", "queue", "disk", "tokens", "conversations"),
        description="dead letters, budgets nearly used up, failed backups, messages that wait too long, the disk",
    )
    tokens: Count | None = Field(None, description="tells when a day (schedule.timezone) takes more tokens")
    conversations: Count | None = Field(None, description="tells when there are more conversations")


class PluginSettings(Settings):
    """The operator's plugins."""

    directory: FilePath = Field("plugins", description="where they lie")
    enabled: tuple[Text, ...] = Field(("hello",), description="names, in the order in which they are asked")
    settings: Mapping[str, Mapping[str, Any]] = Field(
        {}, repr=False, description="name -> that plugin's own part"
    )


class AdminSettings(Settings):
    """The console, for operators in a browser."""

    enabled: bool = Field(True, description="whether there is a console at /admin")


class LogSettings(Settings):
    """What is logged, and how."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        "INFO", description="DEBUG, INFO, WARNING, ERROR or CRITICAL"
    )
    format: Literal["console", "json"] = Field("console", description="console or json")

    @field_validator("level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value


class BotSettings(Settings):
    """The whole configuration."""

    server: ServerSettings = Field(ServerSettings(), description="where the server listens")
    chat: ChatSettings = Field(ChatSettings(), description="how the bot behaves in chats")
    access: AccessSettings = Field(AccessSettings(), description="who may talk to the bot")
    chats: tuple[ChatRuleSettings, ...] = Field(
        (), description="what holds in some chats; the first rule that matches wins"
    )
    ai: AISettings = Field(AISettings(), description="the model that answers")
    budgets: tuple[BudgetSettings, ...] = Field(
        (BudgetSettings(name="daily-user", limit_tokens=100_000),),
        description="limits on tokens; several may apply, all must hold",
    )
    budget_margin: float = Field(
        1.15, ge=1, le=10, description="factor on reservations for models whose own encoding is not at hand"
    )
    network: NetworkSettings = Field(NetworkSettings(), description="how to reach the outside")
    platforms: Mapping[str, SerializeAsAny[PlatformSettings]] = Field(
        {}, description="account name -> settings; several accounts of one type are allowed"
    )
    schedule: ScheduleSettings = Field(ScheduleSettings(), description="when jobs run")
    alerts: tuple[AlertSettings, ...] = Field((), description="who is told when something is wrong")
    plugins: PluginSettings = Field(PluginSettings(), description="the operator's plugins")
    admin: AdminSettings = Field(AdminSettings(), description="the console at /admin")
    logging: LogSettings = Field(LogSettings(), description="what is logged, and how")

    @model_validator(mode="after")
    def _agents_exist(self) -> Self:
        for number, chat in enumerate(self.chats):
            if chat.agent is not None and chat.agent not in {"default", *self.ai.agents}:
                raise ValueError(f"chats.{number} names the agent {chat.agent!r}, which is not in ai.agents")
        return self

    @field_validator("budgets")
    @classmethod
    def _unique(cls, budgets: tuple[BudgetSettings, ...]) -> tuple[BudgetSettings, ...]:
        if len({budget.name for budget in budgets}) < len(budgets):
            raise ValueError("two budgets have one name, so they would count together")
        return budgets
