"""Requests of two domains, and their answers by independent prompts: what banks and scorers are measured by."""

from __future__ import annotations

import numpy as np
import torch

from llmrec_peft.checkpoints.merged import load_answering
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.scoring.item_table import Catalogue
from llmrec_peft.scoring.prompts import Prompts

CALIBRATION = {"temperature": 1.7, "bias": [0.3, -0.3]}
MOVIES = [f"i{n}" for n in range(8)]
HISTORY = [("i3", "like"), ("i4", "dislike"), ("i5", "like"), ("i0", "like"), ("i6", "dislike")]
SHOP_HISTORY = [({"title": "Socks", "price": 12.5}, "click"), ({"title": "Bottle", "price": 3}, "skip"),
                ({"title": "Lamp", "price": 40.0}, "buy")]  # fmt: skip
SHOP = [{"title": f"Thing {n}", "price": n + 0.5} for n in range(5)]
USER = {"age": 33}


def alone(directory, history, candidates, items=None, user=None, **options):
    """Each candidate as a prompt of its own through the loaded bundle: plain attention, no bank, no candidate."""
    bundle = load_answering(directory, **options)
    prompts = Prompts(Vocabulary(Domain.from_dict(bundle.domain), bundle.tokenizer), Catalogue.read(items))
    prefix = prompts.prefix(history, user)
    logits = []
    for candidate in prompts.events(candidates, "candidates"):
        ids = torch.tensor(np.concatenate([prefix.header, *prefix.events, candidate]))[None].long()
        with torch.no_grad():
            logits.append(bundle.classifier(ids, markers=torch.tensor([ids.shape[1] - 1])).numpy()[0])
    return Calibration.from_dict(bundle.calibration).apply(np.array(logits))
