"""What goes into and comes out of the store's list functions. Plain values; nothing here knows a database."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from feishu_bot.store.schema import OPEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from sqlalchemy import Connection, RowMapping

    from feishu_bot.model import BudgetRefusal, CallUsage, End, InboundMessage, Unit

    StoredRow = Mapping[str, Any] | RowMapping  # a row with all columns, by their names

LEASE_MS = 15_000  # a lane's lease; renewed every third of it while the work goes on


@dataclass(slots=True)
class Transaction:
    """One running transaction. ``after_commit`` runs only if it is committed, on the writer's thread."""

    connection: Connection
    kind: str  # sqlite, postgresql or mariadb
    now_ms: int  # the database's clock
    rerun: bool = False  # an earlier run was lost in its commit: it may have been done
    lease_ms: int = LEASE_MS  # how long what is taken or renewed now is held
    after_commit: list[Callable[[], None]] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------- arrivals


@dataclass(frozen=True, slots=True)
class Arrival:
    """An event to record. ``state`` is ``open``, or the end of an event that needs no answer."""

    account: str
    event_key: str
    lane_key: str
    payload: str
    state: str = OPEN
    reason: str | None = None
    reply_before: int | None = None
    reply: Reply | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """Which message an arrival replies to. If the bot has said that one, ``to_bot`` is recorded instead."""

    to: Quote
    to_bot: Arrival


class Quote(NamedTuple):
    """A message that another one names, and the chat in which both must have been said."""

    account: str
    message_id: str
    chat_id: str
    user_key: str  # tells private chats apart that have no id

    @classmethod
    def of(cls, message: InboundMessage, message_id: str) -> Quote:
        """Return the message with this id in the chat of ``message``."""
        return cls(message.account, message_id, message.chat_id, message.user_key)


class Recorded(StrEnum):
    """What became of an arrival."""

    NEW = "new"
    TO_BOT = "to_bot"  # new, and a reply to the bot
    REPEAT = "repeat"


# ---------------------------------------------------------------------------------------------------- begin


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on a lane, until another token stands in its row."""

    lane_key: str
    owner: str
    token: str


@dataclass(frozen=True, slots=True)
class ConversationState:
    """A conversation as it was when the work on a message began."""

    id: int
    public_id: str
    tenant_id: str
    user_key: str
    agent: str | None
    title: str | None
    summary: str | None
    message_count: int
    total_tokens: int
    last_seq: int
    version: int
    persona: str | None = None
    model: str | None = None
    summarized_to: int = 0  # the last message that the summary tells of


class HistoryRow(NamedTuple):
    """One stored message, as a prompt needs it. ``speaker`` is known where several share a conversation.

    ``tools``: the metadata of a message that calls tools, or is the result of one.
    """

    role: str
    content: str
    tokens: int
    seq: int
    speaker: str | None = None
    tools: str | None = None


class Amounts(NamedTuple):
    """What calls take: tokens, their number, and their cost in millionths of a dollar."""

    tokens: int = 0
    requests: int = 0
    micro_usd: int = 0

    def __add__(self, other: object) -> Amounts:
        if not isinstance(other, Amounts):
            return NotImplemented
        return Amounts(
            self.tokens + other.tokens, self.requests + other.requests, self.micro_usd + other.micro_usd
        )

    def __sub__(self, other: Amounts) -> Amounts:
        return Amounts(
            self.tokens - other.tokens, self.requests - other.requests, self.micro_usd - other.micro_usd
        )


WindowKey = tuple[str, str, int]  # budget, key, window_start


@dataclass(frozen=True, slots=True)
class Charge:
    """One budget row that a call is held against. ``ends_ms`` None: the window never ends.

    ``limit`` (tokens), ``limit_requests`` and ``limit_micro_usd``: None where that is not limited. A ``soft`` one
    counts and never refuses. ``degrade_to``: the model to call instead of one that this refuses. ``watched``: whoever
    is charged wants to hear when it is nearly used up.
    """

    budget: str
    key: str
    window_start: int
    limit: int | None
    ends_ms: int | None
    limit_requests: int | None = None
    limit_micro_usd: int | None = None
    soft: bool = False
    degrade_to: str | None = None
    watched: bool = False

    @property
    def window(self) -> WindowKey:
        return (self.budget, self.key, self.window_start)

    def limits(self, granted: Amounts = Amounts()) -> Iterator[tuple[Unit, int, int]]:  # noqa: B008  # immutable
        """Yield what is limited: the unit, its place in ``Amounts``, and the limit with what was granted."""
        if self.limit is not None:
            yield "tokens", 0, self.limit + granted.tokens
        if self.limit_requests is not None:
            yield "requests", 1, self.limit_requests + granted.requests
        if self.limit_micro_usd is not None:
            yield "cost", 2, self.limit_micro_usd + granted.micro_usd


class Balance(NamedTuple):
    """What a budget row says. ``told``: 1 that it is nearly used up, 2 that it is."""

    used: Amounts = Amounts()
    reserved: Amounts = Amounts()
    granted: Amounts = Amounts()
    told: int = 0


class Standing(NamedTuple):
    """How a watched budget stood when a call was reserved."""

    charge: Charge
    balance: Balance


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A model call to be reserved: ``tokens`` in all, of which ``input_tokens`` are the prompt's.

    ``micro_usd``: what it costs at most; None where the model has no known price.
    """

    model: str
    input_tokens: int
    tokens: int
    charges: tuple[Charge, ...] = ()
    micro_usd: int | None = None

    @property
    def amounts(self) -> Amounts:
        return Amounts(self.tokens, 1, self.micro_usd or 0)


@dataclass(frozen=True, slots=True)
class Planned:
    """What the pipeline wants done with a message. ``decision`` is its own; the store does not look inside.

    ``wait_ms``: not now; look again at that instant (the attempt is not counted).
    """

    decision: Any = None
    call: PlannedCall | None = None
    wait_ms: int | None = None


class Planner(Protocol):
    """Decides, inside the transaction that begins a message, what it needs. Pure and quick: no I/O."""

    history_turns: int

    def tenant(self, account: str) -> str: ...

    def plan(
        self,
        message: InboundMessage,
        conversation: ConversationState | None,
        history: Sequence[HistoryRow],
        *,
        attempt: int,
        received_at: int,
        now_ms: int,
    ) -> Planned: ...

    def degrade(
        self, planned: Planned, history: Sequence[HistoryRow], *, model: str, budget: str, now_ms: int
    ) -> Planned:
        """Plan the same call to ``model``, for ``budget`` does not hold it."""
        ...


@dataclass(frozen=True, slots=True)
class Work:
    """A message whose work has begun: its attempt is counted and its first call reserved (or refused)."""

    lease: Lease
    inbox_id: int
    attempt: int  # since the message was last opened
    run: int  # since it was recorded: numbers its calls in the ledger
    retried: bool
    received_at: int
    message: InboundMessage
    tenant_id: str
    conversation: ConversationState | None
    history: Sequence[HistoryRow]
    planned: Planned
    refusal: BudgetRefusal | None
    more: bool  # other messages wait in the lane behind this one
    standings: tuple[Standing, ...] = ()


class NoWork(StrEnum):
    """Why there was nothing to begin."""

    BUSY = "busy"  # somebody else holds the lane
    IDLE = "idle"  # no open message
    WAIT = "wait"  # the head of the lane waits for something
    AGAIN = "again"  # the lane changed while we looked; look again


# --------------------------------------------------------------------------------------------------- commit


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message to store."""

    role: str
    content: str
    tokens: int
    sender_id: str | None = None
    source_id: str | None = None
    metadata_json: str | None = None
    save_key: str | None = None


@dataclass(frozen=True, slots=True)
class NewConversation:
    """How to make the conversation if there is none with this scope key."""

    public_id: str
    scope_key: str | None
    user_key: str
    platform: str
    chat_id: str | None
    user_id: str | None
    agent: str | None
    title: str | None


@dataclass(frozen=True, slots=True)
class NewPart:
    """One part of an answer for the outbox. ``sent``: the asker fetches it from the record himself.

    ``erase``: the asker has it from memory already, and no text is to be kept.
    """

    kind: str
    part: int
    payload: str
    source: str | None = None  # default: in:<inbox id>
    reply_before: int | None = None
    sent: bool = False
    erase: bool = False


class Change(StrEnum):
    """What a command does to the conversation, in the transaction that ends it; ``detail`` tells where to."""

    ARCHIVE = "archive"
    CLEAR = "clear"
    SWITCH = "switch"  # to the archived conversation with this id
    RENAME = "rename"  # to this title
    FORK = "fork"  # goes on in a copy that ends at this seq
    CUT = "cut"  # removes what stands behind this seq
    AGENT = "agent"  # answers from now on; None: whoever the configuration says
    PERSONA = "persona"
    MODEL = "model"


CHOICES = frozenset({Change.AGENT, Change.PERSONA, Change.MODEL})


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that ending one message means; stored by one transaction."""

    work: Work
    end: End
    reason: str | None = None
    messages: tuple[NewMessage, ...] = ()
    conversation: NewConversation | None = (
        None  # needed with ``messages``, or a choice, where the work found none
    )
    change: Change | None = None
    detail: int | str | None = None  # of the change
    summary: tuple[str, int] | None = None  # of what was said up to this seq
    calls: tuple[CallUsage, ...] = ()
    parts: tuple[NewPart, ...] = ()
    erase: bool = False  # keep no text in the inbox row
    told: Mapping[WindowKey, int] = field(
        default_factory=dict
    )  # of which budgets the speaker is told how they stand


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit did. ``end`` differs from the outcome's where the conversation was deleted meanwhile.

    ``sending``: the first part, already marked as attempting for this process to deliver.
    """

    end: End
    conversation_id: int | None
    conversation_public_id: str | None
    message_ids: tuple[int, ...]
    sending: PartToSend | None


# ------------------------------------------------------------------------------------------------- delivery


@dataclass(frozen=True, slots=True)
class PartToSend:
    """An outbox row that this process may send now, under ``lease``."""

    lease: Lease
    id: int
    source: str
    kind: str
    part: int
    account: str
    payload: str
    attempts: int
    reply_before: int | None
    first_attempt_at: int
    unknown_at: int | None


@dataclass(frozen=True, slots=True)
class SendResult:
    """What became of an attempt. ``state`` pending: try again at ``not_before``."""

    id: int
    state: Literal["sent", "pending", "refused", "dead", "expired"]
    sent_id: str | None = None
    error: str | None = None
    not_before: int = 0
    outcome_unknown: bool = False
    erase: bool = False  # keep no text of a part that was sent
    aside: bool = False  # take it out of its lane, so that it holds up nothing
    attempts: int | None = None  # how many there were, where the platform was not asked: this was none


@dataclass(frozen=True, slots=True)
class SendStep:
    """Record a result, if any, and take the lane's next part."""

    lease: Lease
    result: SendResult | None = None
