"""Replies to text-to-SQL chats -> exact match and execution accuracy.

    python -m medusa_ray.demo.quality --chats 500

measures the base that ships with the package on held-out chats; nothing is trained.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medusa_ray.chat import Chat
from medusa_ray.demo import chats as generator
from medusa_ray.medusa.engine import Engine

BASE = Path(__file__).parent / "base"


def score(chats: Sequence[generator.Chat], replies: Sequence[str]) -> dict[str, Any]:
    """Shares of replies that are the chat's answer, and of those that return what the answer returns."""
    answers = [chat["messages"][-1]["content"] for chat in chats]
    exact = [reply.strip() == answer for reply, answer in zip(replies, answers, strict=True)]
    equivalent = [generator.is_equivalent(chat, reply) for chat, reply in zip(chats, replies, strict=True)]
    return {
        "exact_match": sum(exact) / len(chats),
        "execution_accuracy": sum(equivalent) / len(chats),
        "n": len(chats),
    }


def greedy_replies(base: str, chats: Sequence[generator.Chat]) -> list[str]:
    """The base's greedy reply to each chat's question, computed in fp32."""
    chat = Chat.load(base)
    engine = Engine.load(base, max_batch_size=32, max_total_tokens=512)
    prompts = [chat.prompt_ids(row["messages"][:-1]) for row in chats]
    return [chat.text(done.token_ids) for done in engine.generate(prompts, max_new_tokens=128)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact match and execution accuracy on held-out chats.")
    parser.add_argument("--base", default=str(BASE), help="folder of the base; the shipped one if not given")
    parser.add_argument("--split", choices=("test", "out_of_domain"), default="test")
    parser.add_argument("--chats", type=int, default=500, help="number of chats")
    args = parser.parse_args()
    chats = generator.chats(args.split, args.chats)
    result = score(chats, greedy_replies(args.base, chats))
    print(json.dumps({"base": args.base, "split": args.split, **result}))


if __name__ == "__main__":
    main()
