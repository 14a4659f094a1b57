"""A small machine and requests for the tests of the frontend."""

from functools import cache

import numpy as np

from moe_prefill.blocks import BlockHasher
from moe_prefill.core import AtomicRequest
from moe_prefill.costmodel import Batch, batch_flops
from moe_prefill.forest import SharingRule
from moe_prefill.frontend import Limits, make_ticket
from moe_prefill.simulate import Machine
from tests.costmodel.models import machine_profile, model_spec

HASHER = BlockHasher("test")
RULE = SharingRule(min_saved=8, merge_cost=0.05, gather_cost=0.01)


@cache
def machine(**changes) -> Machine:
    """A machine whose sweeps have up to 2,048 tokens and whose T is a quarter of that."""
    spec = model_spec(hidden_size=256)
    full = batch_flops(spec, Batch.uniform(2048, 64))
    facts = {
        "spec": spec,
        "profile": machine_profile(),
        "precision": "float32",
        "sweep_tokens": 2048,
        "kv_blocks": 40,
        "limits": Limits(saturated=full // 4, full=3 * full // 2),
        "rule": RULE,
    }
    return Machine(**{**facts, **changes})


def ticket(tokens, id=0, *, arrival_s=0.0, tenant="", salt="", private=False):
    """A request that asks two candidates after its last token."""
    request = AtomicRequest.candidates(np.asarray(tokens, np.int32), [0, 1], salt=salt)
    return make_ticket(
        request, HASHER, id=id, vocab_size=97, tenant=tenant, private=private, arrival_s=float(arrival_s)
    )


def tickets(sequences, arrivals=None):
    arrivals = arrivals if arrivals is not None else [0.0] * len(sequences)
    return [ticket(seq, id, arrival_s=at) for id, (seq, at) in enumerate(zip(sequences, arrivals, strict=True))]


def rng_tokens(rng, count):
    return rng.integers(2, 97, count)


def families(rng, families, members, prefix, suffix):
    """Shuffled sequences: each family shares a prefix."""
    made = []
    for _ in range(families):
        shared = rng_tokens(rng, prefix)
        made += [np.concatenate([shared, rng_tokens(rng, suffix)]) for _ in range(members)]
    return [made[index] for index in rng.permutation(len(made))]
