"""The OpenAI protocol, without a server: requests, replies, and the responses that carry them."""

from medusa_ray.openai_api.replies import Reply
from medusa_ray.openai_api.requests import (
    NEUTRAL,
    AnyRequest,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Incoming,
    check_num_stop,
    check_stop,
    explain,
    num_new_tokens,
    parse,
)
from medusa_ray.openai_api.responses import Envelope, error_body, error_events, model_list

__all__ = [
    "NEUTRAL",
    "AnyRequest",
    "ApiError",
    "ChatRequest",
    "CompletionRequest",
    "Envelope",
    "Incoming",
    "Reply",
    "check_num_stop",
    "check_stop",
    "error_body",
    "error_events",
    "explain",
    "model_list",
    "num_new_tokens",
    "parse",
]
