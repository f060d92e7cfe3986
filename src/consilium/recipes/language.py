"""Your own instructions, conversations or plain text, for a causal language model: one file with named columns.

The experts are trained by adapters of rank 16, with a learning rate for these. To train all parameters, use
--fit.lora.rank 0 --fit.lr 1e-5. A client then needs 16 bytes of memory per parameter in bfloat16 with AdamW.
"""

from pathlib import Path

from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.fedprox import FedProx
from consilium.algorithms.scaffold import SCAFFOLD
from consilium.algorithms.standalone import Standalone
from consilium.core import Sampling
from consilium.data.language import LanguageData
from consilium.experiment import Experiment
from consilium.fit import Fit
from consilium.moe.build import ModelSource
from consilium.moe.lora import Lora
from consilium.recipes import recipe
from consilium.recipes.docstrings import EQUAL_MEMORY

__all__ = ["fedmoe_instructions", "fedmoe_plaintext", "lora_instructions"]


@recipe("fedmoe-instructions", rivals=EQUAL_MEMORY)
def fedmoe_instructions() -> Experiment:
    """FedMoE on instructions: --model.path MODEL --data.path FILE --data.prompt COLUMN --data.response COLUMN.

    For conversations, use --data.messages COLUMN instead. The model is a decoder of any known family; its chat template
    is used if it has one. For longer rows, set --fit.max-length (prompt) and --fit.target-length (answer), in tokens.
    """
    return Experiment(
        name="fedmoe-instructions",
        algorithm=FedMoE(stage1_epochs=1),
        data=LanguageData(path=Path("instructions.jsonl")),
        model=ModelSource("", form="text-to-text", dtype="bfloat16"),
        fit=Fit(lr=1e-4, batch_size=8, max_length=512, target_length=256, label_smoothing=0.0, lora=Lora(rank=16)),
        sampling=Sampling(clients_per_round=5),
        rounds=10,
    )


@recipe("fedmoe-plaintext", rivals=EQUAL_MEMORY)
def fedmoe_plaintext() -> Experiment:
    """FedMoE on plain text, by the next token: --model.path MODEL --data.path FILE --data.text COLUMN.

    Documents are joined and cut into rows of --fit.max-length + --fit.target-length tokens. With --fit.rows documents,
    a row is the beginning of one document. With --fit.rows packed, a row holds several documents, kept apart.
    """
    return Experiment(
        name="fedmoe-plaintext",
        algorithm=FedMoE(stage1_epochs=1),
        data=LanguageData(path=Path("documents.jsonl"), text="text", task="text"),
        model=ModelSource("", form="text-to-text", dtype="bfloat16"),
        fit=Fit(
            lr=1e-4,
            batch_size=8,
            max_length=256,
            target_length=256,
            rows="blocks",
            label_smoothing=0.0,
            lora=Lora(rank=16),
        ),
        sampling=Sampling(clients_per_round=5),
        rounds=10,
    )


@recipe(
    "lora-instructions",
    rivals={"FedProx": FedProx(), "SCAFFOLD": SCAFFOLD(eta_l=0.01), "Standalone": Standalone()},
    compared="FedAvg,FedProx,Standalone",
)
def lora_instructions() -> Experiment:
    """FedAvg of LoRA adapters on instructions, for a dense model or a mixture: --model.path MODEL --data.path FILE
    --data.prompt COLUMN --data.response COLUMN.

    For a GGUF file, add --model.gguf FILE. All linear layers of a dense model are adapted; --fit.lora.targets
    selects fewer.
    """
    return Experiment(
        name="lora-instructions",
        algorithm=FedAvg(),
        data=LanguageData(path=Path("instructions.jsonl")),
        model=ModelSource("HuggingFaceTB/SmolLM2-135M-Instruct", form="text-to-text", dtype="bfloat16"),
        fit=Fit(lr=1e-4, batch_size=8, max_length=512, target_length=256, label_smoothing=0.0, lora=Lora(rank=16)),
        sampling=Sampling(clients_per_round=5),
        rounds=10,
    )
