"""The common set-up of both halves of every method: how clients train, and where models and data come from.

`Setup` holds no weights. It gives a server its initial parameters and the capacities of devices, and a client its live
model and its data as tokens or tensors.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from consilium.core import (
    ClientContext,
    ClientInfo,
    ExpertSet,
    Payload,
    Sampling,
    Scalar,
    derive_seed,
    experts_from_scalars,
    experts_to_scalars,
)
from consilium.data.causal import encode_language
from consilium.data.encode import Encoded, encode
from consilium.data.task import ClientData, Split, Task
from consilium.data.tensor import TensorSplit, of_texts
from consilium.errors import ConfigError, PayloadError
from consilium.fit import Fit
from consilium.models.cohort import Cohort, SplitModel, initial
from consilium.moe.addressing import is_adapter, load_flat, select, travels
from consilium.moe.build import ModelSource
from consilium.moe.gates import NEED_ROWS, Gates, absent_rows, gates_from_scalars, gates_to_scalars
from consilium.moe.layers import Shape
from consilium.moe.lora import add_lora, folded, initial_adapters, is_folded
from consilium.moe.merging import Merging, RobustMean
from consilium.moe.model import TaskModel, text_config
from consilium.moe.rules import FOLDED, FOLDS, PAIRWISE, AdapterMean
from consilium.params import Params, WeightedMean
from consilium.planner import Planner
from consilium.privacy import Privacy, PrivateMean
from consilium.products import quicken

__all__ = ["Setup"]


@dataclass(frozen=True)
class Setup(Planner):
    """The set-up from which both halves of every method are built; it holds no weights.

    Args:
        model: where the model comes from: one mixture of experts, or a cohort of small models.
        fit: how clients train.
        sampling: who takes part in a round.
        seed: seed of the run.
        heads: task -> every label any client has, for the server's table of heads; {} for text-to-text.
        clients: all clients of the federation, as the server knows them.
        shape: shape of one example, for a cohort; () for texts.
        merging: how the server merges updates.
        privacy: what the server may learn about a client and disclose.
        rounds: rounds of the whole run, for schedules; 0: not known.
        layers: weight of each sparse layer when a device's room is divided among them; (): the same for all.
    """

    model: ModelSource | Cohort
    fit: Fit
    sampling: Sampling
    seed: int
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    clients: tuple[ClientInfo, ...] = ()
    shape: tuple[int, ...] = ()
    merging: Merging = field(default_factory=Merging)
    privacy: Privacy = field(default_factory=Privacy)
    rounds: int = 0
    layers: Shape = ()

    def initial_params(self, client: ClientInfo | None = None) -> Params:
        """Return the parameters from which all methods start.

        For a mixture of experts they are the pretrained backbone, and a zero head row for every label of every task. In
        a cohort they are an extractor and head rows with their own initialisation, the same for all clients of one
        architecture.

        They are float32 whatever `model.dtype` is, so that the server loses nothing by rounding from round to round.
        With `fit.lora`, they contain only the router rows of the backbone, and new adapters, the same for all clients.

        Args:
            client: the client that gets the model; None: the model that all clients have.

        Raises:
            ConfigError: for None in a cohort of several architectures.
        """
        if isinstance(self.model, Cohort):
            return self._one_model(client)
        params = self.model.load()
        if self.fit.lora.rank:
            params = {key: tensor for key, tensor in params.items() if travels(key)} | self.initial_adapters()
        for key in list(params):  # one by one, so that memory never holds the model twice
            params[key] = params[key].to(torch.float32)
        return params | self.zero_heads()

    def zero_heads(self) -> Params:
        """Return the initial head rows of mixtures of experts: zeros for every label of every task."""
        heads: Params = {}
        for task, labels in self.heads.items():
            for label in labels:
                heads[f"head.{task}.{label}.weight"] = torch.zeros(text_config(self.model.config).hidden_size)
                heads[f"head.{task}.{label}.bias"] = torch.zeros(())
        return heads

    def initial_adapters(self, *seed: object) -> Params:
        """Return the initial adapters, float32, and, for rules that fold, zeros to add to.

        Args:
            seed: further parts of the seed, for a later restart of the adapters.
        """
        adapters = initial_adapters(self.model.skeleton("", ()), self.fit.lora, derive_seed(self.seed, "lora", *seed))
        adapters = {key: tensor.to(torch.float32) for key, tensor in adapters.items()}
        if self.fit.lora.rule in FOLDS:
            for key in [key for key in adapters if key.endswith(".lora_A")]:
                name = key.removesuffix(".lora_A")
                adapters[f"{name}.{FOLDED}"] = torch.zeros(len(adapters[f"{name}.lora_B"]), adapters[key].shape[1])
        return adapters

    def _one_model(self, client: ClientInfo | None) -> Params:
        if client is None and self.model.world != "cohort":
            raise ConfigError(
                f"the clients have the architectures {self.model.path}, and there is no model that all could share; "
                "give --model.architectures one name, or use a method that lets models differ"
            )
        name = self.model.architectures[0] if client is None else client.architecture
        return {**self.extractor_params(name), **self.head_params(self.model.width_of(name, self.shape))}

    def head_params(self, width: int) -> Params:
        """Return the initial head rows of a cohort's models with representations of this width."""
        params: Params = {}
        for task, labels in self.heads.items():
            head = initial(lambda labels=labels: nn.Linear(width, len(labels)), self.seed, "head", task, width)
            for i, label in enumerate(labels):
                params |= {f"head.{task}.{label}.{leaf}": head[leaf][i].clone() for leaf in ("weight", "bias")}
        return params

    @property
    def common_width(self) -> int:
        """Return d, the width of the representation of every model of a cohort.

        Raises:
            ConfigError: if it differs between architectures.
        """
        widths = {name: self.model.width_of(name, self.shape) for name in self.model.architectures}
        if len(set(widths.values())) > 1:
            raise ConfigError(f"the method exchanges what depends on the width of representations, but it is {widths}")
        return next(iter(widths.values()))

    @property
    def classes(self) -> int:
        """Return C, the number of labels, for methods with one place per label in their messages.

        Raises:
            ConfigError: if clients have different tasks.
        """
        if len(self.heads) != 1:
            raise ConfigError(f"the method is for clients of one task, these have {', '.join(self.heads)}")
        return len(next(iter(self.heads.values())))

    def own_params(self, context: ClientContext) -> Params:
        """Return a client's own model: from its state if it has one there, else with initial weights."""
        if context.state.params:
            return context.state.params
        self.admit_small(lambda: self.model.extractor(context.info.architecture, self.shape), context)
        return select(self.initial_params(context.info), context.data.task.name)

    def extractor_params(self, name: str) -> Params:
        """Return the initial weights of a client's own extractor, by the run's seed and its architecture's name."""
        return initial(lambda: self.model.extractor(name, self.shape), self.seed, "extractor", name)

    def small_params(self) -> Params:
        """Return the initial weights of the shared extractor that clients use next to their own.

        They always differ from those of a client's own extractor, even if the architecture is the same: two equal
        extractors would learn the same, and a gate between them would learn nothing.
        """
        return initial(lambda: self.model.extractor(self.model.small, self.shape), self.seed, "small extractor")

    def public_usage(self, *seed: str) -> dict[str, Tensor]:
        """Return block -> share of public tokens per expert [E], from the model's card; random if the card has none."""
        card_usage, rng = self.model.public_usage(), torch.Generator().manual_seed(derive_seed(self.seed, *seed))
        return {
            block: torch.tensor(card_usage[block]) if block in card_usage else torch.rand(total, generator=rng)
            for block, total in self.model.counts.items()
        }

    def encode(self, context: ClientContext, split: Split | TensorSplit) -> Encoded | TensorSplit:
        """Encode a split of the client's data: token ids for a mixture of experts, a tensor for a cohort; keep tensors.

        Raises:
            BudgetError: if the rows do not fit what the client allows.
            ConfigError, DataError: see `check` and `data.causal`.
        """
        if isinstance(split, TensorSplit):
            return split
        if isinstance(self.model, Cohort):  # every row takes the same room, whatever its length
            context.work.hold(8 * len(split) * self.fit.max_length, "the data as rows of fit.max_length tokens")
        return self._tokens(context.data.task, split)

    def _tokens(self, task: Task, split: Split) -> Encoded | TensorSplit:
        """Encode texts as token ids, see `encode`."""
        self.check(task)
        fit, tokenizer = self.fit, self.model.tokenizer()
        if isinstance(self.model, Cohort):
            tokens = encode(split, task, tokenizer, "classification", fit.max_length, fit.target_length)
            return of_texts(tokens, task.labels, fit.max_length)
        if task.form == "language":
            return encode_language(split, tokenizer, fit.rows, fit.max_length, fit.target_length)
        way = "classification"
        if self.model.form == "text-to-text":
            way = "seq2seq" if self.model.config.is_encoder_decoder else "causal"
        return encode(split, task, tokenizer, way, fit.max_length, fit.target_length)

    def check_data(self, data: ClientData) -> None:
        """Check that this model and `fit` can do a client's task, and can read its first example.

        Raises:
            ConfigError: see `check`.
            ModelError: for a tokenizer that is missing or does not match the model.
            DataError: for texts that cannot be tokenized, e.g. because of a broken chat template.
        """
        self.check(data.task)
        if isinstance(data.train, Split):
            self._tokens(data.task, Split(data.train.texts[:1], data.train.targets[:1]))

    def check(self, task: Task) -> None:
        """Raise ConfigError if this model and `fit` cannot do the task."""
        if task.model_form != self.model.form:
            raise ConfigError(f"task {task.name} is {task.form}, the model is set up for {self.model.form}")
        if isinstance(self.model, Cohort):
            if not self.shape:  # texts
                self.model.tokenizer()
            return
        family = self.model.family
        if task.form == "language" and self.model.config.is_encoder_decoder:
            raise ConfigError(f"{family.name} is an encoder-decoder; instruction data and plain text need a decoder")
        if self.fit.rows != "examples" and task.form != "language":
            raise ConfigError(f"fit.rows is {self.fit.rows!r}; task {task.name} is {task.form}, which takes examples")
        if self.fit.rows == "packed" and not family.packs:
            raise ConfigError(f"fit.rows is 'packed': in {family.name} examples in one row would see each other")
        decodes = self.model.form == "text-to-text" and not self.model.config.is_encoder_decoder
        self.model.check_texts(self.fit.max_length + (self.fit.target_length if decodes else 0))

    def sub_moe(self, params: Params, task: str, held: ExpertSet | None, client: ClientInfo | None = None) -> Payload:
        """Return what a client of `task` needs to build the sub-MoE with the experts `held` (None: all).

        The payload has the group "params", scalars that name the experts and the scale of their gates, and, if
        `fit.gates` needs it, the group "router" with the router rows of the absent experts. The part of the adapters
        that a rule keeps away from the server is left out. The group "base" contains what a rule has added to the
        frozen weights.

        Args:
            client: adapters are cut to this client's rank; None: the full rank.
        """
        groups, scalars = {"params": select(params, task, held)}, {}
        if self.fit.lora.rank:
            groups, scalars = self._adapted(groups["params"], client)
        if held is None:
            return Payload(groups, scalars)
        if self.fit.gates in NEED_ROWS:
            groups["router"] = absent_rows(params, held)
        return Payload(groups, {**self.slice_scalars(held), **scalars})

    def _adapted(self, chosen: Params, client: ClientInfo | None) -> tuple[dict[str, Params], dict[str, Scalar]]:
        """Return groups and scalars of a payload with adapters, see `sub_moe`."""
        lora = self.fit.lora
        rank = lora.rank if client is None else self.rank_of(client)
        base = {key: tensor for key, tensor in chosen.items() if is_folded(key)}
        params = {}
        for key, tensor in ((key, tensor) for key, tensor in chosen.items() if key not in base):
            if is_adapter(key):
                if lora.private and key.endswith(lora.private):
                    continue
                if rank < lora.rank:
                    tensor = tensor[:rank] if key.endswith("_A") else tensor[:, :rank].contiguous()
            params[key] = tensor
        groups = {"params": params, "base": base} if base else {"params": params}
        return groups, {"halves": True} if lora.rule == "alternate" else {}

    def leaving(self, params: Params, model: TaskModel | SplitModel, context: ClientContext) -> Params:
        """Return the part of the trained parameters that leaves a client: of adapters, the halves that a rule merges.

        The rest is kept in `context.private`.

        Args:
            model: the live model of the parameters.
        """
        lora = self.fit.lora
        if not lora.rank or lora.rule in PAIRWISE or lora.rule == "mean":
            return params
        if lora.rule == "share_a":
            private_params = {key: t for key, t in params.items() if is_adapter(key) and key.endswith(lora.private)}
            context.private.params = {**context.private.params, **private_params}
            return {key: t for key, t in params.items() if key not in private_params}
        trained_suffixes = tuple(
            {n.rsplit(".", 1)[1] for n, half in model.adapters.named().items() if half.requires_grad}
        )
        return {key: t for key, t in params.items() if not is_adapter(key) or key.endswith(trained_suffixes)}

    def both_halves(self, params: Params, own: Params) -> Params:
        """Return parameters completed by the halves of adapters that are not sent.

        Args:
            own: the client's halves (`ClientContext.private`); missing halves take their initial values.
        """
        private_suffix = self.fit.lora.private
        if not private_suffix:
            return params
        adapter_names = [key for key in params if is_adapter(key) and not key.endswith(private_suffix)]
        names = [key[: -len(private_suffix)] + private_suffix for key in adapter_names]
        defaults = {} if all(name in params or name in own for name in names) else self.initial_adapters()
        return {name: own.get(name, defaults.get(name)) for name in names} | params

    def slice_scalars(self, held: ExpertSet) -> dict[str, Scalar]:
        """Return the scalars of a payload that name the experts of a sub-MoE and the scale of its gates."""
        scale = self.model.gate_scales(held) if self.fit.gates == "constant" else {}
        return {**experts_to_scalars(held), **gates_to_scalars(scale)}

    def build(
        self,
        params: Params,
        context: ClientContext,
        held: ExpertSet | None = None,
        gates: Gates | None = None,
    ) -> TaskModel | SplitModel:
        """Build the client's live model on its device, with only the `held` experts.

        With `fit.lora` the base is read from the model's own place, and `params` holds only what travels.

        Args:
            gates: gates of a payload, see `gates.gates_from_scalars`; None: gates are not scaled.

        Raises:
            BudgetError: if the model does not fit what the client allows.
            ModelError: for a name that is missing, another shape, or experts that the model does not have.
            PayloadError: for a dtype that the model does not have.
        """
        task, lora = context.data.task, self.fit.lora
        if isinstance(self.model, Cohort):
            return self.split_model(
                lambda: self.model.extractor(context.info.architecture, self.shape), params, context
            )
        self.admit(context, held, "forward")
        _check_dtypes(params, {self.model.torch_dtype, torch.float32})
        if not lora.rank:
            params = self.model.round(params)
            return self.model.build(params, task.name, task.labels, held, gates).to(context.device)
        base = self.model.load(held)
        if lora.rule in FOLDS:
            base = folded(self.model.skeleton("", ()), base, params)
        params = self.both_halves({k: t for k, t in params.items() if not is_folded(k)}, context.private.params)
        params = self.model.round(params)
        model = self.model.build(base | params, task.name, task.labels, held, gates).to(context.device)
        rank = next((len(t) for key, t in params.items() if is_adapter(key) and key.endswith("_A")), lora.rank)
        if not 1 <= rank <= lora.rank:
            raise PayloadError(f"adapters of rank {rank} were sent; fit.lora.rank is {lora.rank}")
        load_flat(add_lora(model, lora.at(rank)), params, held)
        trained_suffixes = lora.trains(context.round)
        if lora.rule == "alternate" and not any(t.any() for key, t in params.items() if key.endswith(".lora_B")):
            trained_suffixes = ("lora_B",)  # A has no gradient before B changes from zero
        for name, half in model.adapters.named().items():
            half.requires_grad_(name.endswith(trained_suffixes))
        return model

    def build_sent(self, payload: Payload, context: ClientContext) -> TaskModel | SplitModel:
        """Build the client's live model from the payload that it was sent, with its experts and gate scales.

        The payload is that of `sub_moe`.

        Raises:
            ModelError, PayloadError: see `build`.
        """
        gates = gates_from_scalars(self.fit.gates, payload.scalars, payload.group("router"))
        params = payload.group("base") | payload.group("params")
        return self.build(params, context, experts_from_scalars(payload.scalars), gates)

    def mean(self, previous: Params, round: int = 0) -> WeightedMean | RobustMean | PrivateMean:
        """Return the mean with which a server merges a round's replies.

        This is the weighted mean (for adapters by `fit.lora.rule`), unless `merging` or `privacy` replaces it.

        Args:
            previous: the server's parameters; the replies are changed versions of them.
            round: number of the round; adapters that a rule restarts are drawn by it.
        """
        lora = self.fit.lora
        if self.privacy.noise:
            private_suffixes = (lora.private,) if lora.private else ()
            shared_params = {
                key: t for key, t in previous.items() if not (is_adapter(key) and key.endswith(private_suffixes))
            }
            return PrivateMean(self.privacy, shared_params, self.cohort)
        mean = WeightedMean()
        if lora.rank:
            seed_parts = (round,) if lora.rule == "stack" else ()
            mean = AdapterMean(lora.rule, lora.scale, lambda: self.initial_adapters(*seed_parts))
        return mean if self.merging.plain else RobustMean(self.merging, previous, mean)

    @property
    def cohort(self) -> int:
        """Return the number of clients that are expected in a round."""
        return min(self.sampling.clients_per_round, len(self.clients))

    def split_model(
        self,
        make: Callable[[], nn.Module],
        params: Params,
        context: ClientContext,
        kind: type[SplitModel] = SplitModel,
        used: SplitModel | None = None,
    ) -> SplitModel:
        """Return a live model on the client's device with weights `params`: `make`'s extractor and the client's head.

        Convolution filters are stored channels last, and torch then uses that layout for the whole computation. On a
        CPU, where `blocked` does not compute them, a step then takes 0.82 of the time.

        Args:
            used: a finished model that was made in the same way, for a client with the same labels; it is refilled.
        """
        model, task = used, context.data.task
        if model is None:
            from accelerate import init_empty_weights
            from transformers.initialization import no_init_weights

            self.admit_small(make, context, kind)
            with init_empty_weights(include_buffers=False), no_init_weights():
                model = kind(make(), task.name, task.labels)
        _check_dtypes(params, {tensor.dtype for tensor in model.state_dict().values()})
        load_flat(model, params)
        if model is used:
            return model
        model.to(context.device)
        for parameter in model.parameters():
            if parameter.dim() == 4:
                # `contiguous` leaves filters of one channel as they are, and with them the layout of all that follows.
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
        return quicken(model)


def _check_dtypes(params: Params, known: Collection[torch.dtype]) -> None:
    for key, tensor in params.items():
        if tensor.dtype not in known:
            raise PayloadError(f"{key!r} is {tensor.dtype}; of this model it must be {', '.join(map(str, known))}")
