"""transformers' `generate` behind the OpenAI API, a request at a time: how it is compared over HTTP.

    python tests/generate_server.py BASE PORT [NUM_LOOKUP_TOKENS]

Tokens to look up in the prompt are guesses as Medusa's are; 0 makes none. Greedy, streamed.
"""

import json
import sys
import threading
from http.server import ThreadingHTTPServer
from typing import Any

import torch
from stand_in import Handler
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer


class Generate(Handler):
    tokenizer: Any = None
    model: Any = None
    num_lookup = 0
    turn = threading.Lock()

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "base"}]})

    def do_POST(self) -> None:
        if not self.path.endswith("/v1/chat/completions"):
            return self.send_error(404)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = self.tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        options = {"prompt_lookup_num_tokens": self.num_lookup} if self.num_lookup else {}
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        found: list[torch.Tensor] = []

        def generate() -> None:
            found.append(
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=body["max_completion_tokens"],
                    do_sample=False,
                    streamer=streamer,
                    **options,
                )
            )

        with self.turn:  # prompt lookup takes one sequence
            thread = threading.Thread(target=generate)
            thread.start()
            texts = []
            if body.get("stream"):
                self.send_response(200)
                self.end_headers()
            for text in streamer:
                texts.append(text)
                if body.get("stream") and text:
                    self.event({"choices": [{"index": 0, "delta": {"content": text}}]})
            thread.join()
        usage = {"prompt_tokens": ids.shape[1], "completion_tokens": found[0].shape[1] - ids.shape[1]}
        if not body.get("stream"):
            message = {"role": "assistant", "content": "".join(texts)}
            return self.reply(200, {"choices": [{"index": 0, "message": message}], "usage": usage})
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # its own 5 would reset connections of a benchmark that opens many at once


def main() -> None:
    base, port, *more = sys.argv[1:]
    torch.set_num_threads(1)
    Generate.tokenizer = AutoTokenizer.from_pretrained(base)
    Generate.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    Generate.num_lookup = int(more[0]) if more else 0
    Server(("127.0.0.1", int(port)), Generate).serve_forever()


if __name__ == "__main__":
    main()
