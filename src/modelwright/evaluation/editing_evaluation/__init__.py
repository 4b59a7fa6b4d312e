"""Editing evaluation: what is left of a model after N edits in a row."""

from modelwright.evaluation.editing_evaluation.abilities import Ability, fact_model_tasks, world_tasks
from modelwright.evaluation.editing_evaluation.sequence import SequentialEditing, State, collapsed
from modelwright.evaluation.editing_evaluation.verdict import advice, stands

__all__ = ["Ability", "SequentialEditing", "State", "advice", "collapsed", "fact_model_tasks", "stands", "world_tasks"]
