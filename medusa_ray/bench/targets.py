"""One target over plain HTTP, apart from the traffic: does it serve, in how many replicas, what does it tokenize?"""

import http.client
import json
import os
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from medusa_ray.bench.prompts import Prompt
from medusa_ray.config import TargetConfig, TrafficConfig, UserError

CHECK_TIMEOUT_S = 10.0
# How texts begin that a template has made; the first are beginning-of-sequence tokens, which tokenizers add too.
BOS_TEXTS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<|begin▁of▁sentence|>", "<|begin|>")
TEMPLATED = (*BOS_TEXTS, "<|im_start|>", "<|start_header_id|>", "<|system|>", "<|user|>", "[INST]")


def endpoint(prompt: Prompt) -> str:
    return "/v1/chat/completions" if prompt.is_chat else "/v1/completions"


def api_key(name: str, target: TargetConfig) -> str | None:
    """The key of a target, from the environment. Raises UserError when it is not there."""
    if target.api_key_env is None:
        return None
    if key := os.environ.get(target.api_key_env):
        return key
    raise UserError(
        f"targets.{name}.api_key_env is {target.api_key_env}, but there is no such environment variable. Export the "
        "key under this name."
    )


def check(name: str, target: TargetConfig, prompt: Prompt, config: TrafficConfig) -> Any:
    """The target's /info, or None where it has none. Raises UserError unless it answers a first prompt."""
    try:
        models = [model["id"] for model in _call(target, "/v1/models", CHECK_TIMEOUT_S)["data"]]
    except urllib.error.HTTPError as error:
        raise UserError(
            f"target {name} answers {error.code} to {target.url}/v1/models, which should list models. Set "
            f"targets.{name}.url to the server's base URL, with its route prefix and without /v1, and "
            "api_key_env where it asks for a key."
        ) from error
    except OSError as error:
        raise UserError(
            f"target {name} does not answer at {target.url}: {getattr(error, 'reason', error)}. Start the "
            f"server, or correct targets.{name}.url."
        ) from error
    except (ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        raise UserError(
            f"target {name} is no OpenAI server: {target.url}/v1/models gives {error!r}. Correct "
            f"targets.{name}.url."
        ) from error
    try:
        ask(target, prompt, config)
    except OSError as error:
        raise UserError(
            f"target {name} does not answer a request for the model {target.model!r}: {_reason(error)}. "
            f"It serves {models}. Correct targets.{name}.model, or what the answer names."
        ) from error
    return info(target)


def info(target: TargetConfig) -> Any:
    """What the target says of itself at /info; None where it has none."""
    try:
        return _call(target, "/info", CHECK_TIMEOUT_S)
    except (OSError, ValueError, http.client.HTTPException):
        return None


def warm_up(name: str, target: TargetConfig, prompts: list[Prompt], config: TrafficConfig) -> None:
    """Sends the warm-up requests all at once, so that the batches they make shrink from num_warmup to one."""
    with ThreadPoolExecutor(max_workers=max(config.num_warmup, 1)) as pool:
        chosen = [prompts[i % len(prompts)] for i in range(config.num_warmup)]
        answers = [pool.submit(ask, target, prompt, config) for prompt in chosen]
    try:
        for answer in answers:
            answer.result()
    except OSError as error:
        raise UserError(
            f"target {name} fails at {config.num_warmup} warm-up requests at once: {_reason(error)}. Lower "
            "num_warmup, or let the server queue more requests."
        ) from error


def ask(target: TargetConfig, prompt: Prompt, config: TrafficConfig) -> Any:
    """What the target answers to one prompt, without a stream. Raises OSError when it does not."""
    settings = {"model": target.model, "temperature": config.temperature, "seed": config.seed}
    key, limit = ("messages", "max_completion_tokens") if prompt.is_chat else ("prompt", "max_tokens")
    body = {**settings, key: prompt.asked, limit: config.max_tokens}
    return _call(target, endpoint(prompt), config.max_seconds, body)


def _call(target: TargetConfig, path: str, timeout_s: float, body: Any = None) -> Any:
    headers = {"Content-Type": "application/json"}
    if target.api_key_env:
        headers["Authorization"] = f"Bearer {os.environ[target.api_key_env]}"
    url = path if "://" in path else f"{target.url}{path}"
    request = urllib.request.Request(url, body and json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        return json.load(response)


def _reason(error: OSError) -> str:
    """What the server said of an error, in OpenAI's form or as it came; else what went wrong on the way."""
    if not isinstance(error, urllib.error.HTTPError):
        return str(error)
    text = error.read().decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return f"{error.code} {text[:300]}".rstrip(".")


# ------------------------------------------------------------------------------------------------ replicas


def replicas(target: TargetConfig) -> tuple[int, int, bool] | None:
    """Replicas that run, that are wanted, and whether their number follows the load; None where nothing tells."""
    try:
        told = _call(target, target.replicas_url or "/info", CHECK_TIMEOUT_S)
        if "applications" in told:
            return _of_serve(told["applications"], urlsplit(target.url).path or "/")
        running = told.get("replicas")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, http.client.HTTPException):
        return None
    if not isinstance(running, int):
        return None
    return running, told.get("wanted_replicas", running), bool(told.get("autoscales", False))


def _of_serve(applications: dict[str, Any], route: str) -> tuple[int, int, bool]:
    """From what Ray Serve's REST API says of the application at this route.

    Of several deployments those count that autoscale, if any do: a router before them would only blur the number.
    """
    (deployments,) = [app["deployments"].values() for app in applications.values() if app["route_prefix"] == route]
    following = [each for each in deployments if each["deployment_config"].get("autoscaling_config")]
    counted = following or list(deployments)
    running = sum(replica["state"] == "RUNNING" for each in counted for replica in each["replicas"])
    return running, sum(each["target_num_replicas"] for each in counted), bool(following)


# ------------------------------------------------------------------------------------------------ the template


def count_double_bos(target: TargetConfig, prompts: list[Prompt]) -> int | None:
    """Prompts that begin with two beginning-of-sequence tokens there, a template's and a tokenizer's.

    Counted by the server's /tokenize where it has one in vLLM's form. Elsewhere a text counts that names such a token
    where the server adds one; of chats nothing is known but that one has been put into a template before.
    """
    templated = [
        prompt for prompt in prompts if prompt.is_chat and _first_content(prompt).startswith(TEMPLATED)
    ]
    try:
        added = _added(target)
        doubled = [prompt for prompt in prompts if added and _tokens(target, prompt)[:2] == added * 2]
        return len({id(prompt) for prompt in doubled + templated})
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        pass
    if prompts[0].is_chat:
        return len(templated) or None
    body = {"model": target.model, "prompt": "a", "max_tokens": 1}
    try:
        num_tokens = _call(target, "/v1/completions", CHECK_TIMEOUT_S, body)["usage"]["prompt_tokens"]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return None
    return sum(str(prompt.asked).startswith(BOS_TEXTS) for prompt in prompts) if num_tokens > 1 else 0


def _first_content(prompt: Prompt) -> str:
    assert not isinstance(prompt.asked, str)
    return prompt.asked[0]["content"].lstrip()


def _added(target: TargetConfig) -> list[int]:
    """The token that the tokenizer puts before any text, in a list; an empty one where it puts none."""
    path, body = "/tokenize", {"model": target.model, "prompt": "a"}
    with_it = _call(target, path, CHECK_TIMEOUT_S, body)["tokens"]
    without = _call(target, path, CHECK_TIMEOUT_S, {**body, "add_special_tokens": False})["tokens"]
    return list(with_it[:1]) if len(with_it) > len(without) else []


def _tokens(target: TargetConfig, prompt: Prompt) -> list[int]:
    key = "messages" if prompt.is_chat else "prompt"
    return list(_call(target, "/tokenize", CHECK_TIMEOUT_S, {"model": target.model, key: prompt.asked})["tokens"])
