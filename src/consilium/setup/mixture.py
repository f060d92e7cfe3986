"""The set-up for one mixture of experts, or dense language model, that all clients share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.core import (
    ClientContext,
    ClientInfo,
    ExpertSet,
    Payload,
    Scalar,
    derive_seed,
    experts_from_scalars,
    experts_to_scalars,
)
from consilium.data.causal import encode_language
from consilium.data.encode import Encoded, encode
from consilium.data.task import Split, Task
from consilium.errors import ConfigError, PayloadError
from consilium.moe.addressing import is_adapter, load_flat, select, travels
from consilium.moe.gates import NEED_ROWS, Gates, absent_rows, gates_from_scalars, gates_to_scalars
from consilium.moe.lora import add_lora, folded, initial_adapters, is_folded
from consilium.moe.model import TaskModel, text_config
from consilium.moe.rules import FOLDED, FOLDS, PAIRWISE, AdapterMean
from consilium.params import Params, WeightedMean
from consilium.setup.base import EVALUATION, check_dtypes
from consilium.setup.planner import Planner

__all__ = ["MixtureSetup"]


@dataclass(frozen=True)
class MixtureSetup(Planner):
    """The set-up of a mixture of experts; see `Setup` for the fields."""

    def initial_params(self, client: ClientInfo | None = None) -> Params:
        """Return the parameters from which all methods start.

        They are the pretrained backbone, and a zero head row for every label of every task.

        They are float32 whatever `model.dtype` is, so that the server loses nothing by rounding from round to round.
        With `fit.lora`, they contain only the router rows of the backbone, and new adapters, the same for all clients.
        """
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

    def public_usage(self, *seed: str) -> dict[str, Tensor]:
        """Return block -> share of public tokens per expert [E], from the model's card; random if the card has none."""
        card_usage, rng = self.model.public_usage(), torch.Generator().manual_seed(derive_seed(self.seed, *seed))
        return {
            block: torch.tensor(card_usage[block]) if block in card_usage else torch.rand(total, generator=rng)
            for block, total in self.model.counts.items()
        }

    @property
    def evaluation_rows(self) -> int:
        """Return the number of rows of an evaluation batch.

        A causal language model takes no more rows than in training, because its logits need memory for every token and
        every entry of the vocabulary.
        """
        causal = self.model.form == "text-to-text" and not self.model.config.is_encoder_decoder
        return self.fit.batch_size * (1 if causal else EVALUATION)

    def tokens(self, context: ClientContext, split: Split) -> Encoded:
        """Encode texts of the client as token ids, see `encode`."""
        return self._read_first(context.data.task, split)

    def _read_first(self, task: Task, split: Split) -> Encoded:
        self.check(task)
        fit, tokenizer = self.fit, self.model.tokenizer()
        if task.form == "language":
            return encode_language(split, tokenizer, fit.rows, fit.max_length, fit.target_length)
        way = "classification"
        if self.model.form == "text-to-text":
            way = "seq2seq" if self.model.config.is_encoder_decoder else "causal"
        return encode(split, task, tokenizer, way, fit.max_length, fit.target_length)

    def check(self, task: Task) -> None:
        """Raise ConfigError if this model and `fit` cannot do the task."""
        if task.model_form != self.model.form:
            raise ConfigError(f"task {task.name} is {task.form}, the model is set up for {self.model.form}")
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

    def leaving(self, params: Params, model: TaskModel, context: ClientContext) -> Params:
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
    ) -> TaskModel:
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
        self.admit(context, held, "forward")
        check_dtypes(params, {self.model.torch_dtype, torch.float32})
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

    def build_sent(self, payload: Payload, context: ClientContext) -> TaskModel:
        """Build the client's live model from the payload that it was sent, with its experts and gate scales.

        The payload is that of `sub_moe`.

        Raises:
            ModelError, PayloadError: see `build`.
        """
        gates = gates_from_scalars(self.fit.gates, payload.scalars, payload.group("router"))
        params = payload.group("base") | payload.group("params")
        return self.build(params, context, experts_from_scalars(payload.scalars), gates)

    def _merged_params(self, previous: Params) -> Params:
        private_suffixes = (self.fit.lora.private,) if self.fit.lora.private else ()
        return {key: t for key, t in previous.items() if not (is_adapter(key) and key.endswith(private_suffixes))}

    def _plain_mean(self, round: int) -> WeightedMean:
        lora = self.fit.lora
        if not lora.rank:
            return WeightedMean()
        seed_parts = (round,) if lora.rule == "stack" else ()
        return AdapterMean(lora.rule, lora.scale, lambda: self.initial_adapters(*seed_parts))
