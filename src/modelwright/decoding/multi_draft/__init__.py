"""Multi-draft speculative sampling: several drafts verified at once, with the target's exact law (arXiv 2410.18234)."""

from modelwright.decoding.multi_draft.decoding import MultiDraftDecoding, Stats
from modelwright.decoding.multi_draft.drafts import AssistantDrafts, EarlyExitDrafts, PromptLookupDrafts, early_exit
from modelwright.decoding.multi_draft.laws import optimal_acceptance
from modelwright.decoding.multi_draft.options import MultiDraftOptions
from modelwright.decoding.multi_draft.verifiers import (
    VERIFIERS,
    Verifier,
    VerifyResult,
    acceptance_probability,
    multi_draft_verify,
    selection_distribution,
)

__all__ = [
    "VERIFIERS",
    "AssistantDrafts",
    "EarlyExitDrafts",
    "MultiDraftDecoding",
    "MultiDraftOptions",
    "PromptLookupDrafts",
    "Stats",
    "Verifier",
    "VerifyResult",
    "acceptance_probability",
    "early_exit",
    "multi_draft_verify",
    "optimal_acceptance",
    "selection_distribution",
]
