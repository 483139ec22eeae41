"""The OpenAI protocol, without a server: requests, replies, and the responses that carry them."""

from medusa_ray.openai_api.replies import Reply
from medusa_ray.openai_api.requests import (
    AnyRequest,
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Incoming,
    TokenizeRequest,
    check_num_stop,
    check_stop,
    explain,
    num_new_tokens,
    parse,
)
from medusa_ray.openai_api.responses import Envelope, error_body, error_events, model_list

__all__ = [
    "AnyRequest",
    "ApiError",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "Envelope",
    "Incoming",
    "Reply",
    "TokenizeRequest",
    "check_num_stop",
    "check_stop",
    "error_body",
    "error_events",
    "explain",
    "model_list",
    "num_new_tokens",
    "parse",
]
