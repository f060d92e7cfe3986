"""Compressed replies: the change since the client was sent its weights, in bfloat16 or int8, with error feedback.

Group "params" of a reply becomes the difference d = w_k - w + e_k. Here w_k are the trained weights, w the weights that
the client was sent, and e_k the rounding error of the client's earlier replies (Seide et al. 2014, Karimireddy et al.
2019, https://arxiv.org/abs/1901.09847):

    bf16    q = d as bfloat16                                 half the bytes of float32
    int8    q = round(127 d / s) with s the largest |d| of each row, float32    a quarter of them

Then e_k <- d - q stays with the client until it takes part again. The server adds q to what it sent. Other groups, and
weights that were not sent to the client, travel unchanged.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from consilium.core import Payload
from consilium.errors import PayloadError
from consilium.params import Like, Params

__all__ = ["restored", "rounded", "travelling"]

CHANGE, SCALE = "params.change", "params.scale"


def travelling(expected: Mapping[str, Mapping[str, Like]], form: str) -> Mapping[str, Mapping[str, Like]]:
    """Return the tensors that may arrive, group -> name, so that `restored` yields the expected ones."""
    if form == "exact" or "params" not in expected:
        return expected
    params, dtype = expected["params"], torch.bfloat16 if form == "bf16" else torch.int8
    changes = {key: Like(like.shape, dtype) for key, like in params.items()}
    return {**expected, CHANGE: changes, SCALE: {key: Like((None,), torch.float32) for key in params}}


def rounded(
    reply: Payload, sent: Mapping[str, Tensor], form: str, lost: Mapping[str, Tensor]
) -> tuple[Payload, Params]:
    """Round a reply; return the reply to send, and the rounding errors to keep.

    Args:
        sent: the weights that the client was sent.
        form: "exact", "bf16" or "int8".
        lost: flat name -> rounding error of earlier replies, float32; errors of weights that this reply does not hold
            are kept.
    """
    if form == "exact" or not reply.group("params"):
        return reply, dict(lost)
    rounding_errors: Params = dict(lost)
    groups = {**reply.groups, "params": {}, CHANGE: {}, SCALE: {}}
    for key, tensor in reply.group("params").items():
        if key not in sent or sent[key].shape != tensor.shape or not tensor.is_floating_point():
            groups["params"][key] = tensor
            continue
        change = tensor.float() - sent[key].float()
        if key in lost and lost[key].shape == change.shape:
            change += lost[key]
        if form == "bf16":
            groups[CHANGE][key] = change.bfloat16()
        else:
            scale = _rows(change).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
            groups[CHANGE][key] = (_rows(change) / scale[:, None]).round().to(torch.int8).reshape(change.shape)
            groups[SCALE][key] = scale
        rounding_errors[key] = change - _back(groups[CHANGE][key], groups[SCALE].get(key))
    return Payload(groups, reply.scalars), rounding_errors


def restored(reply: Payload, sent: Mapping[str, Tensor]) -> Payload:
    """Return the reply in the form that the server half receives: whole weights in the dtypes that were sent.

    Raises:
        PayloadError: for a change of a weight that was not sent or has another shape, or for a scale that does not fit
            it.
    """
    if CHANGE not in reply.groups:
        return reply
    params, scales = reply.group("params"), reply.group(SCALE)
    for key, change in reply.group(CHANGE).items():
        if key not in sent or sent[key].shape != change.shape or key in params:
            raise PayloadError(f"a change of {key!r} {tuple(change.shape)}, which was not sent, or returned twice")
        scale = scales.pop(key, None)
        fits = change.dtype == torch.bfloat16 and scale is None
        if scale is not None and change.dtype == torch.int8:
            fits = scale.dtype == torch.float32 and scale.shape == (len(_rows(change)),)
        if not fits:
            raise PayloadError(f"the change of {key!r} is {change.dtype}, which its scale does not fit")
        params[key] = (sent[key].float() + _back(change, scale)).to(sent[key].dtype)
    if scales:
        raise PayloadError(f"a scale of {next(iter(scales))!r}, which has no change")
    groups = {group: tensors for group, tensors in reply.groups.items() if group not in (CHANGE, SCALE)}
    return Payload({**groups, "params": params}, reply.scalars)


def _rows(tensor: Tensor) -> Tensor:
    """Return a tensor as a matrix [R, C]; a vector becomes one row, and all dimensions but the first are flattened."""
    return tensor.reshape(len(tensor), -1) if tensor.dim() > 1 and tensor.numel() else tensor.reshape(1, -1)


def _back(change: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return change.float()
    return (_rows(change).float() * scale[:, None]).reshape(change.shape)
