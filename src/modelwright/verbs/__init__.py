"""The verbs of the command line and of recipes, one file each: options, and a ``run`` that imports the work."""

from __future__ import annotations

import importlib
from typing import Any

from modelwright.errors import UserError, did_you_mean

#: What is typed (or named by ``uses:`` in a recipe), and the dataclass behind it.
VERBS: dict[str, str] = {
    "world": "modelwright.verbs.world:World",
    "tokenizer": "modelwright.verbs.tokenizer:TrainTokenizer",
    "tokenize train": "modelwright.verbs.tokenizer:TrainTokenizer",
    "select": "modelwright.verbs.select:Select",
    "select jest": "modelwright.verbs.select_jest:SelectJest",
    "train": "modelwright.verbs.train:Train",
    "train contrastive": "modelwright.verbs.train_contrastive:TrainContrastive",
    "train continual": "modelwright.verbs.train_continual:TrainContinual",
    "train continue": "modelwright.verbs.train_continue:TrainContinue",
    "convert": "modelwright.verbs.convert:Convert",
    "evaluate": "modelwright.verbs.evaluate:Evaluate",
    "evaluate perplexity": "modelwright.verbs.perplexity:Perplexity",
    "evaluate memotrap": "modelwright.verbs.memotrap:MemoTrap",
    "evaluate nq-swap": "modelwright.verbs.nq_swap:NqSwap",
    "evaluate needles": "modelwright.verbs.needles:Needles",
    "evaluate ruler": "modelwright.verbs.needles:Ruler",
    "evaluate hallueditbench": "modelwright.verbs.evaluate_hallueditbench:HalluEditBench",
    "evaluate retrieval": "modelwright.verbs.evaluate_retrieval:Retrieval",
    "edit hallucinations": "modelwright.verbs.edit_hallucinations:EditHallucinations",
    "edit sequence": "modelwright.verbs.edit_sequence:EditSequence",
    "generate": "modelwright.verbs.generate:Generate",
    "heads detect": "modelwright.verbs.heads_detect:HeadsDetect",
    "probe token-counts": "modelwright.verbs.probe_token_counts:TokenCountsVerb",
    "probe token-loss": "modelwright.verbs.probe_token_loss:TokenLoss",
    "sweep weight-decay": "modelwright.verbs.sweep_weight_decay:WeightDecay",
    "probe memorization": "modelwright.verbs.probe_memorization:ProbeMemorization",
    "speculate analyse": "modelwright.verbs.speculate_analyse:SpeculateAnalyse",
    "edit": "modelwright.verbs.edit:EditModel",
    "edit apply": "modelwright.verbs.edit:EditApply",
    "edit revert": "modelwright.verbs.edit:EditRevert",
    "edit statistics": "modelwright.verbs.edit_look:EditStatistics",
    "edit trace": "modelwright.verbs.edit_look:EditTrace",
    "edit train": "modelwright.verbs.edit_train:EditTrain",
    "sweep word2vec": "modelwright.verbs.sweep_word2vec:SweepWord2Vec",
    "prune disp-llm": "modelwright.verbs.prune_disp_llm:PruneDispLlm",
    "prune magnitude": "modelwright.verbs.prune:PruneMagnitude",
    "prune wanda": "modelwright.verbs.prune:PruneWanda",
    "prune slicegpt": "modelwright.verbs.prune:PruneSliceGpt",
    "prune random": "modelwright.verbs.prune:PruneRandom",
    "run": "modelwright.verbs.run:Run",
    "report": "modelwright.verbs.report:Report",
    "verify": "modelwright.verbs.verify:Verify",
}


def load_verb(name: str) -> type[Any]:
    """Imports a verb's dataclass by name.

    Raises:
        UserError: No such verb.
    """
    if name not in VERBS:
        raise UserError(f"There is no verb '{name}': {did_you_mean(name, VERBS)}")
    module, attribute = VERBS[name].split(":")
    return getattr(importlib.import_module(module), attribute)
