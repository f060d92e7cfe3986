"""The testbed's data: who gets which text, and that nobody gets another's."""

import pytest

from consilium.data import code
from consilium.data.code import CodeData
from consilium.data.domains import Document
from consilium.errors import ConfigError, DataError


@pytest.fixture
def texts(monkeypatch):
    """Every domain has 40 documents a split, of 4 kB, all different."""

    def made(domain: str, *shards: str) -> list[Document]:
        def text(shard: str, i: int) -> str:
            return "".join(f"{domain} {shard} {i} {j:04d}\n" for j in range(200))

        return [
            Document(domain, shard, f"{domain}/{shard}{i}:0", text(shard, i)) for shard in shards for i in range(40)
        ]

    monkeypatch.setattr(code, "documents", made)


def test_a_client_has_one_domain_and_nobody_elses_text(texts):
    federation = CodeData(domains=("cuda", "yaml"), clients=6, train=20).load(0)
    assert sorted(federation.clients) == ["cuda-0", "cuda-1", "cuda-2", "yaml-0", "yaml-1", "yaml-2"]
    seen: set[str] = set()
    for client, data in federation.clients.items():
        mine = data.train.targets
        assert all(text.startswith(client.partition("-")[0]) for text in mine)
        assert not seen & set(mine)
        seen |= set(mine)
        assert 10_000 <= sum(map(len, mine)) <= 30_000 + 2 * code.CHUNK
        assert data.test.targets == federation.clients[client[:-1] + "0"].test.targets
        assert not (set(data.test.targets) | set(data.validation.targets)) & seen


def test_mixtures_follow_the_dirichlet_distribution(texts):
    federation = CodeData(domains=("private",), clients=8, partition="dirichlet", alpha=0.1, train=12, test=20).load(3)
    kinds = [{text.split()[0] for text in data.train.targets} for data in federation.clients.values()]
    assert len(federation.clients) == 8 and all(1 <= len(found) <= 11 for found in kinds)
    assert min(map(len, kinds)) < max(map(len, kinds))


def test_equal_seeds_deal_equally(texts):
    data = CodeData(domains=("cuda",), clients=3)
    assert data.load(1).clients == data.load(1).clients
    assert data.load(1).clients != data.load(2).clients


def test_a_client_without_text_is_skipped_with_a_reason(texts):
    federation = CodeData(domains=("cuda",), clients=12, train=40).load(0)
    assert federation.skipped and "too little text for train" in next(iter(federation.skipped.values()))


def test_no_text_at_all(monkeypatch):
    monkeypatch.setattr(code, "documents", lambda *a: [])
    with pytest.raises(DataError, match="no client got text"):
        CodeData(domains=("cuda",), clients=1).load(0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"domains": ("perl",)}, r"\['perl'\]"),
        ({"domains": ()}, "at least one"),
        ({"partition": "iid"}, "one of domain, dirichlet"),
        ({"train": 1}, "data.train is 1; it must be at least 4"),
        ({"clients": 3}, "at least 12, one per domain"),
        ({"alpha": 0.0}, "data.alpha is 0"),
    ],
)
def test_what_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        CodeData(**changes)
