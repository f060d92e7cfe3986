"""What a client holds of the weights that it was last sent, as both ends keep it on disk: the next message brings only
what has changed since, rounded as `engine.rounding` does it.

    q = round(w - h)      what is sent, h what the client holds
    h <- h + q            at both ends, to the bit: what rounding lost is in the next change

Weights that the client does not hold (experts that are new to it) travel whole. A base is named by its round and its
SHA-256. Where a client does not hold it (a new disk, a message that never came) it says so, and is sent the whole.

    <folder>/<client>/round-00012.safetensors    what it holds since round 12
"""

from dataclasses import dataclass
from pathlib import Path

from consilium.core import ClientId, ClientState, Payload
from consilium.engine.checkpoint import KEEP, ClientStore
from consilium.engine.rounding import restored, rounded
from consilium.errors import CheckpointError
from consilium.params import Params, checksum

__all__ = ["Held"]


@dataclass(frozen=True)
class Held:
    """The bases of clients in a folder."""

    folder: Path

    def before(self, client: ClientId, number: int) -> tuple[int, Params]:
        """(Round, params) of the newest base older than round `number`; (0, {}) without one. What an attempt at this
        round or at one that never counted has left is not one: a resumed run goes on from what the first one did."""
        for since in reversed([n for n in ClientStore(self.folder).rounds(client) if n < number]):
            if params := self.load(client, since):
                return since, params
        return 0, {}

    def load(self, client: ClientId, since: int) -> Params:
        """The base of that round; {} if it is lost or broken."""
        try:
            return ClientStore(self.folder, {client: since}).load(client).params if since else {}
        except CheckpointError:
            return {}

    def save(self, client: ClientId, params: Params, number: int) -> None:
        """What the client holds since round `number`; bases that no resumed run could need any more go."""
        store = ClientStore(self.folder)
        store.save(client, ClientState(params), number)
        store.prune(oldest=number - KEEP - 1)

    def change(self, client: ClientId, number: int, payload: Payload, form: str) -> tuple[Payload, str]:
        """At the server: what is to be sent in place of `payload`, and the base it goes by, "" for none.

        What the client will hold is kept as round `number`'s, see `sent`.
        """
        if not payload.group("params"):
            return payload, ""
        since, base = self.before(client, number)
        less = rounded(payload, base, form, {})[0] if base else payload
        self.save(client, restored(less, base).group("params"), number)
        return less, f"{since}:{checksum(base)}" if base else ""

    def sent(self, client: ClientId, number: int, payload: Payload) -> Payload:
        """At the server: the payload as the client has it, after `change`."""
        if not payload.group("params"):
            return payload
        return Payload({**payload.groups, "params": self.load(client, number)}, payload.scalars)

    def received(self, client: ClientId, number: int, payload: Payload, base: str) -> Payload | None:
        """At the client: the payload whole again, kept as round `number`'s; None if the base is not held here.

        Raises:
            PayloadError: for a change that does not fit the base.
        """
        since, _, digest = base.partition(":")
        params = self.load(client, int(since)) if since.isdecimal() else {}
        if base and (not params or checksum(params) != digest):
            return None
        whole = restored(payload, params)
        self.save(client, whole.group("params"), number)
        return whole
