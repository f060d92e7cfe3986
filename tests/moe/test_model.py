"""TaskModel: pooling ignores padding, targets line up with what predicts them, generation does not see the padding."""

import pytest
import tiny
import torch

ROWS = (0, 1, 2, 3)


def built(model_type, form):
    source = tiny.source(model_type, form)
    labels = tiny.TASKS["animal"] if form == "classification" else ()
    return source, source.build(source.load() | tiny.heads("animal", labels), "animal", labels).eval()


@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_the_head_sees_the_mean_of_the_real_positions(model_type):
    source, model = built(model_type, "classification")
    batch = tiny.batch(source, rows=ROWS)
    assert (batch["attention_mask"] == 0).any(), "this batch has no padding to ignore"
    with torch.no_grad():
        logits, labels = model(batch)
        hidden = model.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        for row in ROWS:
            real = hidden[row, : int(batch["attention_mask"][row].sum())]
            torch.testing.assert_close(logits[row], model.head(real.mean(0)))
            torch.testing.assert_close(logits[row], model(tiny.batch(source, rows=(row,)))[0][0], rtol=1e-4, atol=1e-5)
    assert labels.tolist() == batch["labels"].tolist() == [0, 1, 2, 0]


def test_a_causal_model_is_asked_for_the_next_token():
    """The targets are the answer's tokens, and each logit is of the position before; the prompt is not predicted."""
    source, model = built("olmoe", "text-to-text")
    batch = tiny.batch(source, rows=(0,))
    answer = [*source.tokenizer()("the cat it is", add_special_tokens=False)["input_ids"][:4], 1]
    with torch.no_grad():
        logits, labels = model(batch)
        everything = model.backbone(input_ids=batch["input_ids"]).logits[0]
    assert labels.tolist() == answer == batch["input_ids"][0, -5:].tolist()
    torch.testing.assert_close(logits, everything[-6:-1])


def test_an_encoder_decoder_is_asked_for_every_target_token():
    source, model = built("switch_transformers", "text-to-text")
    batch = tiny.batch(source, rows=ROWS)
    with torch.no_grad():
        logits, labels = model(batch)
    assert labels.tolist() == [token for row in batch["labels"].tolist() for token in row if token != -100]
    assert logits.shape == (len(labels), tiny.VOCABULARY)


@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_generation_does_not_depend_on_the_batch(model_type):
    source, model = built(model_type, "text-to-text")
    setup, context = tiny.setup(source), tiny.context(form="text-to-text")
    data = setup.encode(context, context.data.train)

    def answers(rows):
        ids = model.generate(data.batch(rows, torch.device("cpu"), prompt=True), 5)
        assert ids.shape[1] <= 5
        return source.tokenizer().batch_decode(ids, skip_special_tokens=True)

    assert answers(ROWS) == [answers((row,))[0] for row in ROWS]


def test_masks():
    for model_type, form in tiny.CASES:
        source, model = built(model_type, form)
        batch = tiny.batch(source)
        masks = model.masks(batch)
        assert torch.equal(masks["encoder"], batch["attention_mask"] == 1)
        assert (
            ("decoder" in masks) == model.encoder_decoder == (model_type == "switch_transformers" and not model.labels)
        )


@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_logits_are_those_of_the_whole_model(model_type):
    """No labels, no cache, and for a causal model no logits but the asked ones: the same numbers and gradients."""
    source, model = built(model_type, "text-to-text")
    batch = tiny.batch(source, rows=ROWS)
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    if model.encoder_decoder:
        whole = model.backbone(input_ids=ids, attention_mask=mask, labels=labels).logits
    else:
        whole = model.backbone(input_ids=ids, attention_mask=mask).logits[:, :-1]
        labels = labels[:, 1:]
    slopes = []
    for logits, targets in ((whole[labels != -100], labels[labels != -100]), model(batch)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, targets).backward()
        slopes.append(
            (logits.detach(), targets, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        )
    (old, old_targets, old_slopes), (new, new_targets, new_slopes) = slopes
    assert torch.equal(old_targets, new_targets)
    torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)
    assert old_slopes.keys() == new_slopes.keys()
    for name, slope in old_slopes.items():
        torch.testing.assert_close(new_slopes[name], slope, rtol=1e-5, atol=1e-6)
