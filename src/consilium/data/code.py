"""The embedded testbed: clients with code and technical text from one domain or several.

The task is to predict the next token. It is scored in bits per byte of text, and by the share of tokens that rank
first. `domains` lists the texts and marks the public ones. No document of a client is in the public shard or in another
client's training data. The validation and test documents of a domain are the same for all its clients.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from consilium.constraints import PositiveFloat, PositiveInt, check_settings, forbid
from consilium.data.domains import DOMAINS, PRIVATE, PUBLIC, documents, versions
from consilium.data.task import ClientData, Federation, Form, Split, Task
from consilium.errors import DataError
from consilium.kinds import DataSource, Gives

__all__ = ["CodeData"]

Kilobytes = Annotated[int, Ge(4)]

CHUNK = 2_000
"""Approximate number of characters of a piece of a document; documents are dealt in such pieces."""
SHORTEST = {"train": 3_000, "validation": 3_000, "test": 3_000}
"""Minimum number of characters per split; a client with less text in a split is skipped."""


@dataclass(frozen=True)
class CodeData(DataSource):
    """Clients with code and technical text from packages that every installation has.

    Args:
        domains: names of domains; "public" and "private" stand for all of a kind (see `domains.DOMAINS`).
        clients: number of clients, >= 1; under partition "domain" at least one per domain.
        partition: "domain": a client has one domain, and the domains are dealt in turn; "dirichlet": every client has a
            mixture of all domains, drawn from a Dirichlet distribution.
        alpha: concentration of that distribution, > 0; smaller is more skewed.
        train: kilobytes of training text per client on average, >= 4; a client gets 0.5 to 1.5 times this amount.
        validation: kilobytes of validation text per client, >= 4.
        test: kilobytes of test text per client, >= 4.
    """

    form: ClassVar[Form] = "text-to-text"  # This is the form of the model.
    gives: ClassVar[Gives] = "language"
    plain: ClassVar[bool] = True

    domains: tuple[str, ...] = ("private",)
    clients: PositiveInt = 22
    partition: Literal["domain", "dirichlet"] = "domain"
    alpha: PositiveFloat = 0.3
    train: Kilobytes = 24
    validation: Kilobytes = 24
    test: Kilobytes = 80

    def __post_init__(self) -> None:
        check_settings(self, "data.")
        unknown_domains = [name for name in self.domains if name not in DOMAINS and name not in ("public", "private")]
        forbid(
            unknown_domains or not self.domains,
            f"data.domains has {unknown_domains}; allowed are public, private, {', '.join(DOMAINS)}, at least one",
        )
        minimum = len(self.chosen) if self.partition == "domain" else 1
        forbid(
            self.clients < minimum,
            f"data.clients is {self.clients}; it must be at least {minimum}, one per domain",
        )

    @property
    def chosen(self) -> tuple[str, ...]:
        """Return the names of the domains, each once."""
        groups = {"public": [d.name for d in PUBLIC], "private": [d.name for d in PRIVATE]}
        return tuple(dict.fromkeys(name for entry in self.domains for name in groups.get(entry, [entry])))

    def load(self, seed: int) -> Federation:
        """Deal the documents to the clients. Equal seeds and installed versions give equal results.

        Raises:
            DataError: if no client gets text for all of its splits.
        """
        clients, skip_reasons = {}, {}
        pools = {name: _Pool(name, seed) for name in self.chosen}
        for client, shares in self._shares(seed).items():
            rng = random.Random(f"{seed}:{client}")
            sizes = {
                "train": 1000 * self.train * rng.uniform(0.5, 1.5),
                "validation": 1000 * self.validation,
                "test": 1000 * self.test,
            }
            pieces_by_split = {split: [] for split in sizes}
            for domain, share in shares.items():
                for split, size in sizes.items():
                    pieces_by_split[split] += pools[domain].take(split, share * size)
            short_splits = [
                split for split, pieces in pieces_by_split.items() if sum(len(t) for _, t in pieces) < SHORTEST[split]
            ]
            if short_splits:
                skip_reasons[client] = f"too little text for {', '.join(short_splits)}; ask for fewer clients"
            else:
                task = Task("next", "language", (), "token_accuracy")
                clients[client] = ClientData(task, *(_split(pieces_by_split[split]) for split in sizes))
        if not clients:
            raise DataError(f"no client got text ({dict(list(skip_reasons.items())[:3])}); are the packages installed?")
        return Federation(clients, skip_reasons, self.source())

    def source(self) -> dict[str, Any]:
        """Return the origin of the data for a run's records: these settings and the installed versions."""
        return {"type": "CodeData", **asdict(self), "versions": versions()}

    def _shares(self, seed: int) -> dict[str, dict[str, float]]:
        """Return client -> domain -> share of the client's text."""
        names = self.chosen
        if self.partition == "domain":
            domains = [names[i % len(names)] for i in range(self.clients)]
            return {f"{name}-{domains[:i].count(name)}": {name: 1.0} for i, name in enumerate(domains)}
        rng = random.Random(f"{seed}:shares")
        digits = max(2, len(str(self.clients - 1)))
        shares = {}
        for i in range(self.clients):
            draws = [rng.gammavariate(self.alpha, 1.0) for _ in names]
            total = sum(draws) or 1.0
            shares[f"mix-{i:0{digits}d}"] = {
                n: d / total for n, d in zip(names, draws, strict=True) if d > 0.02 * total
            }
        return {
            client: {n: s / sum(client_shares.values()) for n, s in client_shares.items()}
            for client, client_shares in shares.items()
        }


class _Pool:
    """The clients' documents of one domain, shuffled by the seed.

    Training text is dealt once, one document after the other, so that a client owns few documents. Validation and test
    text is shared by all clients. Its pieces are shuffled, so that a few kilobytes represent the domain.
    """

    def __init__(self, domain: str, seed: int):
        # The keys are splits, the values pieces (place, text). Training pieces of one file stay together.
        self._pieces: dict[str, list[tuple[str, str]]] = {}
        for split in ("train", "validation", "test"):
            split_documents = documents(domain, split)
            random.Random(f"{seed}:{domain}:{split}").shuffle(split_documents)
            self._pieces[split] = [piece for d in split_documents for piece in _chunks(d.place, d.text)]
            if split != "train":
                random.Random(f"{seed}:{domain}:{split}:pieces").shuffle(self._pieces[split])
        self._next = 0

    def take(self, split: str, size: float) -> list[tuple[str, str]]:
        """Return pieces (place, text) of `size` characters or slightly more in total; less if the pool is exhausted."""
        pieces, start = self._pieces[split], self._next if split == "train" else 0
        total, end = 0, start
        while end < len(pieces) and total < size:
            total += len(pieces[end][1])
            end += 1
        if split == "train":
            self._next = end
        return pieces[start:end]


def _chunks(place: str, text: str) -> Iterator[tuple[str, str]]:
    """Split a document between lines into pieces of about `CHUNK` characters; yield ("place:line", text) of each."""
    lines, first_line, size = [], 0, 0
    for number, line in enumerate(text.splitlines(keepends=True)):
        lines.append(line)
        size += len(line)
        if size >= CHUNK:
            yield f"{place}:{first_line}", "".join(lines)
            lines, first_line, size = [], number + 1, 0
    if lines:
        yield f"{place}:{first_line}", "".join(lines)


def _split(pieces: Sequence[tuple[str, str]]) -> Split:
    return Split([""] * len(pieces), [text for _, text in pieces], [place for place, _ in pieces])
