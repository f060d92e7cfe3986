"""The weights that a client was last sent, kept on disk by both ends, so that the next message brings only the changes.

The changes are rounded as in `engine.rounding`:

    q = round(w - h)      is sent; h are the weights that the client holds
    h <- h + q            at both ends, bit for bit; the rounding error is part of the next change

Weights that the client does not hold (experts that are new to it) travel whole. A base is named by its round and its
SHA-256. A client that does not hold the base (because of a new disk, or a message that never came) says so, and is sent
whole weights.

    <folder>/<client>/round-00012.safetensors    the weights that the client holds since round 12
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
        """Return (round, params) of the newest base older than round `number`, or (0, {}) if there is none.

        Bases that an attempt at this round, or at a later round that never counted, left behind are ignored: a resumed
        run continues as the first attempt did.
        """
        for base_round in reversed([n for n in ClientStore(self.folder).rounds(client) if n < number]):
            if params := self.load(client, base_round):
                return base_round, params
        return 0, {}

    def load(self, client: ClientId, since: int) -> Params:
        """Return the base of that round, or {} if it is missing or broken."""
        try:
            return ClientStore(self.folder, {client: since}).load(client).params if since else {}
        except CheckpointError:
            return {}

    def save(self, client: ClientId, params: Params, number: int) -> None:
        """Save the weights that the client holds since round `number`, and remove bases that no resumed run needs."""
        store = ClientStore(self.folder)
        store.save(client, ClientState(params), number)
        store.prune(oldest=number - KEEP - 1)

    def change(self, client: ClientId, number: int, payload: Payload, form: str) -> tuple[Payload, str]:
        """Return the payload that the server sends in place of `payload`, and the name of its base, "" for none.

        The weights that the client will then hold are saved under round `number`, see `sent`.
        """
        if not payload.group("params"):
            return payload, ""
        base_round, base = self.before(client, number)
        sent_payload = rounded(payload, base, form, {})[0] if base else payload
        self.save(client, restored(sent_payload, base).group("params"), number)
        return sent_payload, f"{base_round}:{checksum(base)}" if base else ""

    def sent(self, client: ClientId, number: int, payload: Payload) -> Payload:
        """Return the payload as the client has it after `change`; the server calls this."""
        if not payload.group("params"):
            return payload
        return Payload({**payload.groups, "params": self.load(client, number)}, payload.scalars)

    def received(self, client: ClientId, number: int, payload: Payload, base: str) -> Payload | None:
        """Return the whole payload at the client and save it under round `number`; None if the base is not held here.

        Raises:
            PayloadError: for a change that does not fit the base.
        """
        round_text, _, digest = base.partition(":")
        params = self.load(client, int(round_text)) if round_text.isdecimal() else {}
        if base and (not params or checksum(params) != digest):
            return None
        whole_payload = restored(payload, params)
        self.save(client, whole_payload.group("params"), number)
        return whole_payload
