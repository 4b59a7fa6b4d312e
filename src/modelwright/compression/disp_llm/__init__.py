"""DISP-LLM: dimension-independent structural pruning (arXiv 2410.11988)."""

from modelwright.compression.disp_llm.config import DispPruningConfig
from modelwright.compression.disp_llm.hypernetwork import Hypernetwork
from modelwright.compression.disp_llm.search import DispPruner, SelectionSearch

__all__ = ["DispPruner", "DispPruningConfig", "Hypernetwork", "SelectionSearch"]
