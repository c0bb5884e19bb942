"""The makers' own code, by name."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lark_oapi as lark
    from botpy.api import BotAPI
    from botpy.connection import ConnectionState
    from lark_oapi.api.im.v1 import (
        CreateMessageReactionRequest,
        CreateMessageReactionRequestBody,
        CreateMessageRequest,
        CreateMessageRequestBody,
        Emoji,
        EventMessage,
        EventSender,
        GetMessageResourceRequest,
        MentionEvent,
        P2ImMessageReceiveV1,
        P2ImMessageReceiveV1Data,
        ReplyMessageRequest,
        ReplyMessageRequestBody,
        UserId,
    )
    from lark_oapi.core.model import RawRequest
    from lark_oapi.event.callback.model.p2_card_action_trigger import P2CardActionTriggerResponse

__all__ = [
    "BotAPI",
    "ConnectionState",
    "CreateMessageReactionRequest",
    "CreateMessageReactionRequestBody",
    "CreateMessageRequest",
    "CreateMessageRequestBody",
    "Emoji",
    "EventMessage",
    "EventSender",
    "GetMessageResourceRequest",
    "MentionEvent",
    "P2CardActionTriggerResponse",
    "P2ImMessageReceiveV1",
    "P2ImMessageReceiveV1Data",
    "RawRequest",
    "ReplyMessageRequest",
    "ReplyMessageRequestBody",
    "UserId",
    "lark",
]
