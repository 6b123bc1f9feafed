"""Requests of two domains, and their probabilities by independent prompts, which banks and scorers must equal."""

from __future__ import annotations

import numpy as np
import torch

from llmrec_peft.checkpoints.loading import LoadOptions, load_trained
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.requests.item_table import ItemTable
from llmrec_peft.requests.request_domain import RequestDomain
from llmrec_peft.requests.request_encoder import RequestEncoder

CALIBRATION = {"temperature": 1.7, "bias": [0.3, -0.3]}
MOVIES = [f"i{n}" for n in range(8)]
HISTORY = [("i3", "like"), ("i4", "dislike"), ("i5", "like"), ("i0", "like"), ("i6", "dislike")]
SHOP_HISTORY = [({"title": "Socks", "price": 12.5}, "click"), ({"title": "Bottle", "price": 3}, "skip"),
                ({"title": "Lamp", "price": 40.0}, "buy")]  # fmt: skip
SHOP = [{"title": f"Thing {n}", "price": n + 0.5} for n in range(5)]
USER = {"age": 33}


def alone(directory, history, candidates, items=None, user=None, **options):
    """Probabilities of each candidate as a prompt of its own: the loaded bundle, plain attention, no bank."""
    bundle = load_trained(directory, LoadOptions(**options))
    domain = Domain.from_dict(bundle.domain)
    vocabulary = Vocabulary(domain, bundle.tokenizer)
    encoder = RequestEncoder(RequestDomain.of(domain), vocabulary, ItemTable.read(items))
    prefix = encoder.encode_history(history, user)
    logits = []
    for candidate in encoder.encode_events(candidates, "candidates"):
        ids = torch.tensor(np.concatenate([prefix.header, *prefix.events, candidate]))[None].long()
        with torch.no_grad():
            logits.append(bundle.classifier(ids, markers=torch.tensor([ids.shape[1] - 1])).numpy()[0])
    return Calibration.from_dict(bundle.calibration).apply(np.array(logits))
