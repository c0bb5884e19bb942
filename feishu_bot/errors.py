"""Every error of the product; each class answers "what shall the caller do?".

::

    BotError
    ├── ConfigError            correct the configuration; carries one line per mistake
    ├── StoreError
    │   ├── StoreUnavailable   (ValueError) try again later; nothing was written
    │   ├── TooLarge           (ValueError) store less at once, or let the database server take more
    │   ├── SchemaMismatch     run ``db upgrade``, or a newer program
    │   ├── BackupDamaged      take another backup: this one is not as it was written
    │   ├── RestoreRefused     nothing was changed; the message says what stands in the way
    │   ├── InvalidImport      (ValueError) correct the file at the line it names
    │   ├── ConversationNotFound (ValueError) there is no such conversation
    │   └── MessageNotFound    (ValueError) there is no such message
    ├── OrderRefused           nothing was changed; ``why`` says what stands in the way
    ├── LeaseLost              drop the work: another process has taken it over
    ├── Refused                a request from outside that is not taken
    │   ├── BadSignature       answer 401
    │   ├── BadToken           answer 403
    │   └── BadPayload         answer 400
    ├── DeliveryError
    │   ├── RetryLater         send the same part again after ``after_s``
    │   └── Undeliverable      give the part up; a person may retry it
    ├── ModelError             the model gave no answer; says if it may have been billed
    └── BudgetExceeded         do not call the model; tell the user the numbers
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from feishu_bot.model import BudgetRefusal


class BotError(Exception):
    """The base of all errors of this package."""


class ConfigError(BotError):
    """The configuration cannot be used.

    ``mistakes`` holds one printable line per mistake, without any secret.
    """

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


class StoreError(BotError):
    """The database did not do what was asked."""


class StoreUnavailable(StoreError, ValueError):
    """The database cannot be used now; nothing was written. Try again later.

    ``outcome_unknown``: the connection broke in the commit, so it may have been written all the same.
    """

    def __init__(self, reason: str, *, outcome_unknown: bool = False) -> None:
        super().__init__(reason)
        self.outcome_unknown = outcome_unknown


class TooLarge(StoreError, ValueError):
    """It is more than the database server takes at once; nothing was written. The message names its setting."""


class SchemaMismatch(StoreError):
    """The database's schema is not the one this program knows."""


class BackupDamaged(StoreError):
    """A backup is cut off or altered, or does not hold what the database held."""


class RestoreRefused(StoreError):
    """A backup is not restored; nothing was changed. The message says what stands in the way."""


class InvalidImport(StoreError, ValueError):
    """What was to be imported is damaged or no conversation; the message says where and why.

    Nothing of the conversation it stands in was stored.
    """


class ConversationNotFound(StoreError, ValueError):
    """There is no conversation with this id."""

    def __init__(self, conversation_id: int) -> None:
        super().__init__(f"Conversation not found: {conversation_id}")
        self.conversation_id = conversation_id


class MessageNotFound(StoreError, ValueError):
    """There is no message with this id, or not where it was looked for."""

    def __init__(self, message_id: int) -> None:
        super().__init__(f"Message not found: {message_id}")
        self.message_id = message_id


class OrderRefused(BotError):
    """An operator's order is not carried out; nothing was changed.

    ``why`` is one word for the pages: gone, taken, last_admin.
    """

    def __init__(self, why: str) -> None:
        super().__init__(f"order refused: {why}")
        self.why = why


class LeaseLost(BotError):
    """The lane has another owner by now; what was prepared must be dropped."""


class Refused(BotError):
    """A request from outside is not accepted; nothing of it was stored.

    ``reason`` is for our own log. The peer sees ``status`` and one fixed body.
    """

    status = 400

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BadSignature(Refused):
    """The sender could not prove who it is."""

    status = 401


class BadToken(Refused):
    """The request carries a wrong verification token."""

    status = 403


class BadPayload(Refused):
    """The request is authentic or needs no proof, but cannot be read."""

    status = 400


class DeliveryError(BotError):
    """A platform did not take a part of an answer."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RetryLater(DeliveryError):
    """The platform may take the same part later.

    ``after_s``: seconds the platform asks us to wait, or None for our own back-off.
    ``outcome_unknown``: the request may have arrived all the same (time-out, broken connection).
    ``chat_only``: the cause lies in this chat or part (a limit of the chat), not in the platform as a whole.
    """

    def __init__(
        self,
        reason: str,
        *,
        after_s: float | None = None,
        outcome_unknown: bool = False,
        chat_only: bool = False,
    ) -> None:
        super().__init__(reason)
        self.after_s = after_s
        self.outcome_unknown = outcome_unknown
        self.chat_only = chat_only


class NotConnected(RetryLater):
    """This process has no way to the platform now; another process, or this one later, may have.

    Nothing was sent by this attempt.
    """


class Undeliverable(DeliveryError):
    """The platform will never take this part.

    ``expired``: because its reply window has closed.
    """

    def __init__(self, reason: str, *, expired: bool = False) -> None:
        super().__init__(reason)
        self.expired = expired


class ModelError(BotError):
    """A model call ended without a usable answer.

    ``outcome_unknown``: the provider may have billed the call (time-out, broken stream), so it is booked at
    its whole reservation. ``retry``: the same call may succeed later, after ``after_s`` seconds if given.
    ``kind`` is one word for the record: timeout, unavailable, rate_limited, refused, nonsense, too_long, filtered.
    """

    def __init__(
        self,
        kind: str,
        reason: str,
        *,
        retry: bool = False,
        outcome_unknown: bool = False,
        after_s: float | None = None,
    ) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind = kind
        self.reason = reason
        self.retry = retry
        self.outcome_unknown = outcome_unknown
        self.after_s = after_s


class BudgetExceeded(BotError):
    """A budget does not hold the call that was asked for."""

    def __init__(self, refusal: BudgetRefusal) -> None:
        super().__init__(f"budget {refusal.budget} is used up")
        self.refusal = refusal
