"""Completions of clients' test texts by the models before and after a federation.

They are for inspection, not for measurement. A simulation writes completions.json for the number of clients in
`Experiment.completions`. A deployment never does, because prompts are text of the sites.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from consilium.core import ClientContext, ClientInfo, ClientState, Payload, Server
from consilium.data.task import Federation
from consilium.errors import ModelError
from consilium.moe.model import TaskModel
from consilium.setup import Setup

__all__ = ["complete", "completions", "spaced"]

PENALTY = 1.2
"""Repetition penalty on the logits of tokens that occurred before; without it small models repeat themselves."""
PROMPT = 240
"""Length of a prompt in characters; it is cut after a line break if there is one in its second half."""
TOKENS = 48
"""Length of a completion in tokens."""


def complete(model: TaskModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int = TOKENS) -> str:
    """Return the greedy continuation of a prompt, with a repetition penalty, ignoring the end of text.

    Args:
        model: a causal language model.
        tokens: length of the continuation; an end-of-text token is not counted.
    """
    encoding = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    device = next(model.parameters()).device
    ids = encoding["input_ids"].to(device)
    model.eval()
    with torch.inference_mode():
        output_ids = model.backbone.generate(
            input_ids=ids,
            attention_mask=encoding["attention_mask"].to(device),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=PENALTY,
        )
    return tokenizer.decode(output_ids[0, ids.shape[1] :], skip_special_tokens=True)


def completions(
    setup: Setup, server: Server, clients: Sequence[ClientInfo], federation: Federation, number: int
) -> list[dict[str, Any]]:
    """Complete the beginning of a test text of some clients, with the initial model and with the delivered one.

    Args:
        clients: `number` of them are taken, evenly spaced in the order of their ids.
        number: >= 1.

    Returns:
        For each client "client", "prompt", "text" (the true continuation), "before" (by the whole public model) and
        "after" (by the model that is delivered to the client). Clients are left out if they are not delivered a whole
        model, or if their task is not text prediction.
    """
    rows = []
    for info in spaced(sorted(clients, key=lambda client: client.id), number):
        data = federation.clients[info.id]
        payload = server.deliver(info)
        if data.task.form != "language" or not payload.group("params"):
            continue
        context = ClientContext(info, data, torch.device("cpu"), setup.seed, ClientState())
        prompt, continuation = _cut(data.test.targets[0])
        row: dict[str, Any] = {"client": info.id, "prompt": prompt, "text": continuation}
        try:
            delivered_model = setup.build_sent(payload, context)
        except ModelError:  # The client is sent only a part, such as its own adapters, and holds the rest itself.
            continue
        row["after"] = complete(delivered_model, setup.model.tokenizer(), prompt)
        del delivered_model
        initial_model = setup.build_sent(Payload({"params": setup.initial_params()}), context)
        row["before"] = complete(initial_model, setup.model.tokenizer(), prompt)
        rows.append(row)
    return rows


def spaced(clients: Sequence[ClientInfo], number: int) -> list[ClientInfo]:
    """Return `number` of the clients, evenly spaced and starting with the first; all if there are fewer."""
    number = min(number, len(clients))
    return [clients[i * len(clients) // number] for i in range(number)]


def _cut(text: str) -> tuple[str, str]:
    """Cut a text into a prompt of at most `PROMPT` characters and up to `PROMPT` characters of what follows."""
    line = text.rfind("\n", PROMPT // 2, PROMPT) + 1
    position = line or min(PROMPT, len(text) // 2)
    return text[:position], text[position : position + PROMPT]
