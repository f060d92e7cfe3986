"""A method without a model: server state, client state, a structure and events, in milliseconds a round.

Only the process of `forkserver` imports it: a registered method would be taken up by the tests over the registry.
"""

from dataclasses import dataclass

import torch

from consilium.core import Algorithm, Client, Payload, Server

SIZE = 50
"""Numbers in the model, and in what a client remembers."""


@dataclass(frozen=True)
class Toy(Algorithm):
    """Every client adds its draw and what it remembers of its earlier ones."""

    def server(self, setup):
        return ToyServer(setup)

    def client(self, setup):
        return ToyClient()


class ToyServer(Server):
    def __init__(self, setup):
        self.setup, self.params, self.log = setup, {"w": torch.zeros(SIZE)}, []
        self.map = {client.id: {"block": (0,)} for client in setup.clients}

    def configure(self, round, clients):
        chosen = self.setup.sampling.choose(clients, round, self.setup.seed)
        return {client.id: self.deliver(client) for client in chosen}

    def aggregate(self, round, replies):
        for client, reply in replies:
            self.params = {"w": self.params["w"] + reply.group("params")["w"]}
            self.map[client] = {"block": tuple(range(len(self.map[client]["block"]) + 1))}
            self.log.append({"event": "grow", "client": client, "experts": len(self.map[client]["block"])})
        return {"sum": float(self.params["w"].sum())}

    def deliver(self, client):
        return Payload({"params": self.params})

    def state(self):
        sizes = {f"size/{client}": len(held["block"]) for client, held in self.map.items()}
        return Payload({"params": self.params}, sizes)

    def restore(self, state):
        self.params = state.group("params")
        self.map = {key[5:]: {"block": tuple(range(n))} for key, n in state.scalars.items()}

    def structure(self):
        return dict(self.map)

    def usage(self):
        return {client: {"block": [float(self.params["w"][0])]} for client in self.map}

    def events(self):
        log, self.log = self.log, []
        return log


class ToyClient(Client):
    def train(self, payload, context):
        generator = torch.Generator().manual_seed(context.seed)
        before = context.state.params.get("own", torch.zeros(SIZE))
        own = before + torch.rand(SIZE, generator=generator)
        context.state.params["own"] = own
        context.state.scalars["rounds"] = context.state.scalars.get("rounds", 0) + 1
        return Payload({"params": {"w": own}}, {"num_examples": 1, "train_loss": float(own.sum())})

    def evaluate(self, payload, context):
        return Payload(scalars={"score": float(payload.group("params")["w"].frac().mean()), "examples": 1})
