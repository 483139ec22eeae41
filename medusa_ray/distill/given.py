"""A shard of prompts -> the chats' own replies, for distill.replies: given."""

from medusa_ray import shards
from medusa_ray.config import RunConfig, UserError
from medusa_ray.distill import rows
from medusa_ray.distill.rows import Facts, Row, reply

TEMPLATE = "template hides the reply"  # the error of a row


class Copier:
    """Copies a shard's replies into its part of distilled/."""

    def __init__(self, config: RunConfig, base: str, prompts: str, distilled: str) -> None:
        from medusa_ray.medusa.base import text_config  # here and not above: it loads transformers

        self.prompts, self.distilled = rows.Prompts(prompts), distilled
        self.over_long, self.most = config.data.over_long, config.distill.max_new_tokens
        base_config = text_config(base, config.model.revision)
        self.max_positions = getattr(base_config, "max_position_embeddings", None) or 2**31

    def __call__(self, shard: shards.Shard) -> Facts:
        prompts = self.prompts.of(shard)
        replies = [self._copy(prompt) for prompt in prompts]
        return rows.write(self.distilled, shard["part"], replies, rows.sources_of(prompts))

    def _copy(self, prompt: Row) -> Row:
        reply_ids = prompt["reference_ids"]
        if prompt["error"] is not None:
            return reply(prompt, error=prompt["error"])
        if not reply_ids and prompt["reference"] is not None:
            return reply(prompt, error=f"{TEMPLATE}: it renders a chat differently once it is answered")
        if not reply_ids:
            return reply(prompt, error="no reply: the chat has no answer")
        room = min(self.most, self.max_positions - len(prompt["prompt_ids"]))
        if len(reply_ids) <= room:
            return reply(prompt, reply_ids, "stop")
        fault = (
            f"too long: a prompt of {len(prompt['prompt_ids'])} tokens and a reply of {len(reply_ids)}, over "
            f"distill.max_new_tokens = {self.most} or the base's {self.max_positions} positions"
        )
        if self.over_long == "error":
            raise UserError(
                f"the chat {prompt['id']} is {fault}. Set data.over_long to truncate or skip, or allow more."
            )
        if self.over_long == "truncate" and room > 0:
            return reply(prompt, reply_ids[:room], "length")
        return reply(prompt, error=fault)
