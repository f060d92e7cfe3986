"""Models, data and federations small enough for a unit test: `source`, `federation`, `setup`, `context`, `engine`.

Models      random weights from a configuration, 8 experts, D = 32, two sparse layers, a BPE tokenizer; made once
Federation  six clients, three tasks of hand-made sentences, label sets that differ inside a task
Cohort      the same six clients with images of 4 x 4 and small models, of one architecture or of two
"""

import dataclasses
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast, SwitchTransformersConfig

from consilium.core import Client, ClientContext, ClientInfo, ClientState, Payload, Sampling, Server, derive_seed
from consilium.data.task import ClientData, Federation, Split, Task
from consilium.data.tensor import TensorSplit
from consilium.engine.checkpoint import ClientStore
from consilium.engine.local import LocalEngine
from consilium.fit import Fit
from consilium.models.cohort import Cohort
from consilium.moe.build import ModelSource
from consilium.moe.discovery import family_of
from consilium.moe.families import Family
from consilium.setup import Setup, setup_for

root = Path("conftest.py has not said where")
"""Where the models are written; set by conftest.py."""

FORMS = ("classification", "text-to-text")


class _Families(Mapping):
    """Model type -> what is found of its tiny configuration, looked for once."""

    names = (
        "switch_transformers", "olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "phimoe", "deepseek_v2",
        "deepseek_v3", "gpt_oss", "ernie4_5_moe", "glm4_moe",
    )  # fmt: skip

    def __getitem__(self, name: str) -> Family:
        if name not in self.names:
            raise KeyError(name)
        return family_of(configuration(name))

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


FAMILIES = _Families()
"""The families that have oracles written by hand; tests/moe/test_every_mixture.py has all others."""
CASES = [(family, form) for family in FAMILIES for form in FORMS]
"""These families in both forms: what the tests of `moe` are parametrised over."""
CORRECTED = ("deepseek_v3", "ernie4_5_moe", "glm4_moe")
"""Those that correct the choice of experts by a bias."""
GROUPED = ("deepseek_v2", "deepseek_v3", "glm4_moe")
"""Those that choose groups of experts first."""

TASKS = {
    "animal": ("cat", "dog", "fish"),
    "colour": ("blue", "green", "red"),
    "number": ("one", "three", "two"),
}
LABELS = {
    "animal-00": ("cat", "dog", "fish"),
    "animal-01": ("cat", "dog"),
    "colour-00": ("blue", "green", "red"),
    "colour-01": ("green", "red"),
    "number-00": ("one", "three", "two"),
    "number-01": ("one", "two"),
}
SIZES = {"animal-00": 8, "animal-01": 5, "colour-00": 9, "colour-01": 6, "number-00": 7, "number-01": 4}
"""Training examples per client; 4 for validation, 4 for test."""
IDS = tuple(SIZES)

VOCABULARY = 160


# --- models -------------------------------------------------------------------------------------------------------


def configuration(model_type: str, **changes) -> PretrainedConfig:
    """The tiny configuration of a family; a new row of `FAMILIES` needs one here."""
    if model_type == "switch_transformers":
        settings = dict(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=16, num_heads=2, num_experts=8, expert_capacity=256,
            num_layers=2, num_sparse_encoder_layers=2, num_decoder_layers=2, num_sparse_decoder_layers=2,
            dropout_rate=0.1, router_jitter_noise=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        return SwitchTransformersConfig(**settings | changes)
    if model_type not in SETTINGS:
        raise NotImplementedError(f"give {model_type} a tiny configuration in tests/tiny.py")
    settings = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=256, attention_dropout=0.1,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return AutoConfig.for_model(model_type, **settings | SETTINGS[model_type] | changes)


LATENT = dict(
    n_routed_experts=8, moe_intermediate_size=16, n_shared_experts=1, num_hidden_layers=3, first_k_dense_replace=1,
    n_group=4, topk_group=2, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip
SETTINGS = {
    "olmoe": dict(num_experts=8),
    "mixtral": dict(num_local_experts=8),
    "qwen2_moe": dict(
        num_experts=8, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_hidden_layers=3,
        mlp_only_layers=[0],
    ),
    "qwen3_moe": dict(num_experts=8, moe_intermediate_size=16, num_hidden_layers=3, mlp_only_layers=[1], head_dim=16),
    "granitemoe": dict(num_local_experts=8, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.3),
    "phimoe": dict(num_local_experts=8, router_jitter_noise=0.3, lm_head_bias=True),
    "deepseek_v2": LATENT | dict(topk_method="group_limited_greedy", topk_group=1),
    "deepseek_v3": LATENT,
    "gpt_oss": dict(
        num_local_experts=8, head_dim=16, sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "ernie4_5_moe": dict(
        moe_num_experts=8, moe_intermediate_size=16, moe_num_shared_experts=1, num_hidden_layers=3,
        moe_layer_start_index=1,
    ),
    "glm4_moe": dict(
        n_routed_experts=8, moe_intermediate_size=16, n_shared_experts=1, num_hidden_layers=3,
        first_k_dense_replace=1, head_dim=16,
    ),
}  # fmt: skip
"""The tiny decoders, where they differ; layers that are not sparse come on top of two that are."""


@cache
def directory(model_type: str, form: str = "classification", dtype: str = "float32", **changes) -> Path:
    """A saved model of that family with its tokenizer. `changes`: of the configuration."""
    extra = "".join(f"-{key}={value}" for key, value in sorted(changes.items()))
    folder = root / f"{model_type}-{form}-{dtype}{extra}"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cls = getattr(transformers, FAMILIES[model_type].classes[form])
        model = cls(configuration(model_type, **changes)).to(getattr(torch, dtype))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):  # zero in a new model
                tensor.data.normal_(std=0.2)
        model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def fewest(model_type: str, ids: tuple[int, ...]) -> tuple[int, ...]:
    """`ids`, and the next ones where a block of that family must keep more."""
    least, more = FAMILIES[model_type].least, list(ids)
    while len(more) < least:
        more.append((more[-1] + 1) % 8)
    return tuple(sorted(more))


def source(model_type: str = "switch_transformers", form: str = "classification", dtype: str = "float32", **changes):
    """A `ModelSource` of such a directory."""
    return ModelSource(str(directory(model_type, form, dtype, **changes)), form, dtype)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the federation's own sentences; <pad> 0, </s> 1, <unk> 2."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    texts = [text for data in federation().clients.values() for text in data.train.texts + data.train.targets]
    special = ["<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


# --- data ---------------------------------------------------------------------------------------------------------


@cache
def federation(form: str = "classification") -> Federation:
    """Six clients; a sentence names its label. Text-to-text clients are asked for the label and a word more."""
    return Federation({client: _client(client, form) for client in IDS})


def _client(client: str, form: str) -> ClientData:
    rng = random.Random(client)
    name, labels = client.split("-")[0], LABELS[client]
    if form == "classification":
        task = Task(name, form, labels, "accuracy")
    else:
        task = Task(name, form, (), "rouge2" if name == "number" else "token_f1")

    def split(size: int) -> Split:
        kinds = [labels[i % len(labels)] for i in range(size)]
        texts = [f"{rng.choice(FILL)} {kind} {' '.join(rng.choices(FILL, k=rng.randint(0, 6)))}" for kind in kinds]
        return Split(texts, kinds if form == "classification" else [f"the {kind} it is" for kind in kinds])

    return ClientData(task, split(SIZES[client]), split(4), split(4))


FILL = ("here", "some", "old", "we", "see", "near", "house", "again", "and", "very")


# --- what a method is given -----------------------------------------------------------------------------------------


def infos(memory: dict[str, int] | int | None = None) -> tuple[ClientInfo, ...]:
    """The six clients as the server knows them. `memory`: bytes of all, or by client (absent: no limit)."""
    of = memory.get if isinstance(memory, dict) else lambda _: memory
    return tuple(ClientInfo(c, SIZES[c], c.split("-")[0], of(c)) for c in IDS)


def setup(
    model: ModelSource | None = None,
    memory: dict[str, int] | int | None = None,
    clients_per_round: int = 3,
    seed: int = 0,
    clients: tuple[ClientInfo, ...] | None = None,
    **fit,
) -> Setup:
    """A new Setup (own ModelSource, nothing shared but files). `fit`: fields of `Fit` other than the tiny ones."""
    model = dataclasses.replace(model or source())
    config = Fit(**dict(batch_size=4, max_length=12, target_length=5) | fit)
    heads = TASKS if model.form == "classification" else {}
    return setup_for(
        model, config, Sampling(clients_per_round), seed, heads, infos(memory) if clients is None else clients
    )


COHORTS = {
    "cohort": Cohort(("mnist-5",), "mlp-3", width=6, kernel=3, padding=1),
    "mixed": Cohort(("mnist-5", "mlp-3"), "mlp-3", width=6, kernel=3, padding=1),
}
"""A tiny cohort for each of the worlds without experts."""


@cache
def images() -> Federation:
    """Six clients of one task; an image is bright in the quarter that its label names, the fourth one is anybody's."""
    rng = torch.Generator().manual_seed(0)
    task = Task("corner", "classification", ("a", "b", "c"), "accuracy")
    y = torch.arange(200) % 3
    x = 0.5 * torch.randn(200, 1, 4, 4, generator=rng)
    for row, kind in enumerate(y.tolist()):
        x[row, 0, 2 * (kind // 2) : 2 * (kind // 2) + 2, 2 * (kind % 2) : 2 * (kind % 2) + 2] += 1
    clients, start = {}, 0
    for client, size in SIZES.items():
        ends = [start + size, start + size + 4, start + size + 8]
        parts = zip([start, *ends[:2]], ends, strict=True)
        clients[client] = ClientData(task, *(TensorSplit(x, y, torch.arange(*part), task.labels) for part in parts))
        start = ends[-1]
    return Federation(clients)


def small_setup(world: str = "mixed", clients_per_round: int = 3, seed: int = 0, **fit) -> Setup:
    """A Setup of a tiny cohort; `fit`: fields of `Fit` other than the tiny ones."""
    model = dataclasses.replace(COHORTS[world])
    plain = dict(batch_size=4, lr=0.1, head_lr=0.1, optimizer="sgd", clip=0.0, label_smoothing=0.0, balance=0.0)
    clients = tuple(
        ClientInfo(c, SIZES[c], "corner", architecture=model.architecture(i)) for i, c in enumerate(sorted(IDS))
    )
    heads = {"corner": ("a", "b", "c")}
    return setup_for(model, Fit(**plain | fit), Sampling(clients_per_round), seed, heads, clients, images().shape)


def small_context(
    client: str = "animal-00", world: str = "mixed", round: int = 1, state: ClientState | None = None
) -> ClientContext:
    """What a client of a tiny cohort owns in that round."""
    return ClientContext(
        info=next(i for i in small_setup(world).clients if i.id == client),
        data=images().clients[client],
        device=torch.device("cpu"),
        seed=derive_seed(0, "client", round, client),
        state=state or ClientState(),
    )


def bytes_for(experts: int, model: ModelSource | None = None, references: int = 0) -> int:
    """Memory with which a client can train exactly so many experts per layer (of the tiny Switch, if not told)."""
    made = setup(model)
    return made.footprint(dict.fromkeys(made.model.counts, experts), references=references).total


def context(
    client: str = "animal-00",
    form: str = "classification",
    seed: int = 0,
    round: int = 1,
    state: ClientState | None = None,
) -> ClientContext:
    """What the client owns in that round."""
    return ClientContext(
        info=next(i for i in infos() if i.id == client),
        data=federation(form).clients[client],
        device=torch.device("cpu"),
        seed=derive_seed(seed, "client", round, client),
        state=state or ClientState(),
    )


def heads(task: str, labels: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Head rows with random values (those of a Setup start from zero)."""
    rng = torch.Generator().manual_seed(1)
    shapes = {"weight": (32,), "bias": ()}
    return {f"head.{task}.{c}.{leaf}": torch.randn(s, generator=rng) for c in labels for leaf, s in shapes.items()}


def batch(
    model: ModelSource, client: str = "animal-00", rows: tuple[int, ...] = (0, 1, 2, 3)
) -> dict[str, torch.Tensor]:
    """A padded batch of the client's training data for that model."""
    return (
        setup(model)
        .encode(context(client, model.form), federation(model.form).clients[client].train)
        .batch(rows, torch.device("cpu"))
    )


def engine(server: Server, client: Client, setup: Setup, folder: Path, strict: bool = False) -> LocalEngine:
    """The local engine over the tiny federation; client states go below `folder`."""
    return LocalEngine(
        server=server,
        client=client,
        infos=setup.clients,
        federation=images() if isinstance(setup.model, Cohort) else federation(setup.model.form),
        store=ClientStore(folder),
        seed=setup.seed,
        strict=strict,
    )


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two Params are equal bit for bit, dtypes and keys included."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def payloads_equal(a: Payload, b: Payload) -> bool:
    """Whether two payloads carry the same bits and the same scalars but for seconds."""
    scalars = [{k: v for k, v in p.scalars.items() if not k.startswith("seconds")} for p in (a, b)]
    return (
        a.groups.keys() == b.groups.keys()
        and scalars[0] == scalars[1]
        and all(same(a.group(g), b.group(g)) for g in a.groups)
    )
