"""The card (README.md) of an exported model: its content, its training, its scores, and how to load it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consilium.escape import markdown, markdown_code, python_literal
from consilium.experiment import Experiment
from consilium.export.deployed import Deployed
from consilium.moe.families import Family

__all__ = ["card", "private"]

TAGS = {
    "classification": "feature-extraction",  # the head is a file of its own, which no pipeline of transformers reads
    "text-to-text": "text-generation",
    "conversation": "text-generation",
    "document": "text-generation",
}


def card(deployed: Deployed, format: str, family: Family, notes: list[str]) -> str:
    """Return the text of the card, preceded by YAML for model hubs."""
    experiment = deployed.experiment
    owner = f"client {deployed.client}" if deployed.client else "all clients together"
    sections = [
        _front(deployed, format),
        f"# {markdown(experiment.name)}: the model of {markdown(owner)}\n",
        f"{_origin(deployed, family)}\n",
        "\n".join(_facts(deployed)) + "\n",
        *(["\n".join(f"Note: {note}." for note in notes) + "\n"] if notes else []),
        f"## Use\n\n`DIR` is this directory.\n\n{_use(deployed, format, family)}",
    ]
    return "\n".join(sections)


def _front(deployed: Deployed, format: str) -> str:
    lines = {
        "library_name": {"transformers": "transformers", "adapter": "peft", "consilium": "consilium"}[format],
        "pipeline_tag": "text2text-generation" if _encoder_decoder(deployed) else TAGS[deployed.kind],
        "tags": ["consilium", "federated-learning", "mixture-of-experts"],
    }
    base = _base(deployed)
    if "/" in base:
        lines = {"base_model": base, **lines}
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()) + "---\n"


def _base(deployed: Deployed) -> str:
    """Return the base's name on the hub, or the name of its directory without the path, which is this machine's."""
    path = deployed.experiment.model.path
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists()
    return path if on_hub else Path(path).name


def _encoder_decoder(deployed: Deployed) -> bool:
    return deployed.kind == "text-to-text" and bool(deployed.experiment.model.config.is_encoder_decoder)


def _origin(deployed: Deployed, family: Family) -> str:
    experiment = deployed.experiment
    base = _base(deployed)
    method = type(experiment.algorithm).__name__
    clients_text = f" of {deployed.clients} clients" if deployed.clients else ""
    return (
        f"{markdown_code(base)} ({family.name}), fine-tuned by {method} in {deployed.rounds} rounds{clients_text} with "
        f"Consilium: the data stayed with the clients. {private(deployed.privacy, experiment)}"
    )


def private(told: Mapping[str, Any] | None, experiment: Experiment) -> str:
    """Return the sentences on the privacy that was spent, as the summary records it."""
    if not told:
        if experiment.privacy.noise:
            return "Client-level differential privacy was used; the server's summary.json tells what was spent."
        return "No differential privacy was used."
    guarantee = f"epsilon {told['epsilon']:.4g} at delta {told['delta']:.4g}"
    if told.get("warning"):
        guarantee += f" (delta is not well below one over the number of clients: {told['warning']})"
    if "weights" not in told["covers"]:
        return f"No differential privacy of the weights was used; of the clients' usage of experts: {guarantee}."
    covers, neighbours, sampling = map(markdown, (" and ".join(told["covers"]), told["neighbours"], told["sampling"]))
    return (
        f"Client-level differential privacy of the {covers}: {guarantee}; neighbours differ by {neighbours}, "
        f"{sampling} sampling at rate {told['rate']:.3g}, noise multiplier "
        f"{told['noise']:g}, clipping norm {told['clip']:g}. Labels, tasks and numbers of examples are not covered."
    )


def _facts(deployed: Deployed) -> list[str]:
    """Return a table of data, scores, experts and training."""
    experiment = deployed.experiment
    sizes = ", ".join(f"{n} {split}" for split, n in deployed.sizes.items())
    data = type(experiment.data).__name__
    path = getattr(experiment.data, "path", None)
    rows = {"Data": f"{data}{f' {Path(path).name}' if path else ''}: {sizes} examples"}
    for task, (metric, score) in deployed.scores.items():
        score_text = "not scored" if score is None else f"{score:.3f}"
        examples = "its own test examples" if deployed.client else "test examples, mean over the clients"
        rows[f"Task {task}"] = f"{metric} {score_text} on {examples}"
        if labels := deployed.labels.get(task):
            suffix = f" and {len(labels) - 12} more" if len(labels) > 12 else ""
            rows[f"Labels of {task}"] = ", ".join(labels[:12]) + suffix
    counts = experiment.model.counts
    expert_counts = {block: len((deployed.held or {}).get(block, range(n))) for block, n in counts.items()}
    rows["Experts per layer"] = (
        f"{', '.join(str(n) for n in expert_counts.values())} of {', '.join(str(n) for n in counts.values())}"
    )
    fit = experiment.fit
    lora = f", LoRA of rank {fit.lora.rank} on the experts" if fit.lora.rank else ""
    momentum = f" with momentum {fit.momentum:g}" if fit.momentum else ""
    rows["Training"] = f"{fit.optimizer}{momentum}, learning rate {fit.lr:g}, {fit.epochs} epoch(s) a round{lora}"
    rows["Texts"] = f"cut to {fit.max_length} tokens in training"
    return [
        "| | |",
        "|---|---|",
        *(f"| {markdown(key)} | {markdown(value)} |" for key, value in rows.items()),
    ]


SERVING_DENSE = """
The files are in PEFT's layout for linear layers, which programs that serve LoRA read as they are (vLLM, SGLang,
text-generation-inference): one base model, with an adapter per site.
"""
SERVING_EXPERTS = """
The files are in PEFT's layout for the parameters of experts (`target_parameters`). vLLM reads it since its pull
requests 41384 and 52194, SGLang since 25528; earlier versions refuse it or pass over it without a word. Other programs
serve the merged model of `--format transformers`, of which the tensors have the names and shapes of the base's.
"""


def _use(deployed: Deployed, format: str, family: Family) -> str:
    model = deployed.experiment.model
    chat = "chat DIR" if deployed.kind == "conversation" else 'predict DIR --text "..."'
    class_name = family.classes[model.form]
    if format == "consilium":
        lines = ["from pathlib import Path", "from consilium.moe.files import load_sub_moe", ""]
        lines += ['source, model, held = load_sub_moe(Path("DIR"))']
        return f"{_code(lines)}\nOr `consilium {chat}`.\n"
    head_lines = _head(deployed)
    if format == "adapter":
        lines = ["from peft import PeftModel", f"from transformers import AutoTokenizer, {class_name}", ""]
        base = python_literal(_base(deployed))
        lines += [f"base = {class_name}.from_pretrained({base})"]
        lines += [] if family.dense else ['base.config.model_type = "custom"']
        lines += ['model = PeftModel.from_pretrained(base, "DIR").eval()']
        if family.dense:
            text = SERVING_DENSE
        else:
            lines += [f"base.config.model_type = {python_literal(model.config.model_type)}"]
            text = '\n`"custom"` keeps PEFT 0.21 from taking the names of experts for those of other layers.\n'
            text += SERVING_EXPERTS
        return _code([*lines, 'tokenizer = AutoTokenizer.from_pretrained("DIR")', *head_lines]) + text
    lines = [f"from transformers import AutoTokenizer, {class_name}", ""]
    lines += [f'model = {class_name}.from_pretrained("DIR").eval()', 'tokenizer = AutoTokenizer.from_pretrained("DIR")']
    if not head_lines:
        lines += ['inputs = tokenizer("...", return_tensors="pt")']
        if deployed.kind == "conversation":
            lines[-1] = (
                'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "..."}], '
                'add_generation_prompt=True, return_tensors="pt", return_dict=True)'
            )
        new_tokens = deployed.experiment.fit.target_length
        lines += [f"ids = model.generate(**inputs, max_new_tokens={new_tokens}, do_sample=False)"]
        lines += ["print(tokenizer.decode(ids[0], skip_special_tokens=True))"]
    return f"{_code([*lines, *head_lines])}\nOr `consilium {chat}`.\n"


def _head(deployed: Deployed) -> list[str]:
    """Return the lines that apply the head in plain torch."""
    if not deployed.labels:
        return []
    task = next(iter(deployed.labels))
    length = deployed.experiment.fit.max_length
    return [
        "",
        "import json",
        "from pathlib import Path",
        "from safetensors.torch import load_file",
        "",
        'head, labels = load_file("DIR/head.safetensors"), json.loads(Path("DIR/labels.json").read_text())',
        f'inputs = tokenizer(["..."], padding=True, truncation=True, max_length={length}, return_tensors="pt")',
        'hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)',
        "pooled = (hidden * mask).sum(1) / mask.sum(1)",
        f"logits = pooled @ head[{python_literal(f'{task}.weight')}].T + head[{python_literal(f'{task}.bias')}]",
        f"print([labels[{python_literal(task)}][i] for i in logits.argmax(-1)])",
    ]


def _code(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```\n"
