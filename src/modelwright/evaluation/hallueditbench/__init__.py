"""HalluEditBench: does an edit really correct what a model has wrong? Any model, five dimensions, single edits."""

from modelwright.evaluation.hallueditbench.hallucinations import Hallucination, find_hallucinations
from modelwright.evaluation.hallueditbench.items import Item, read_items
from modelwright.evaluation.hallueditbench.run import SingleEditing
from modelwright.evaluation.hallueditbench.scores import Scores, advice, score

__all__ = ["Hallucination", "Item", "Scores", "SingleEditing", "advice", "find_hallucinations", "read_items", "score"]
