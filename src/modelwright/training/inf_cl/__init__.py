"""Inf-CL: contrastive losses of any batch size without the matrix of all pairs (arXiv 2410.17243)."""

from modelwright.training.inf_cl.loss import (
    InfCLLoss,
    InfoNCELoss,
    SigmoidLoss,
    tiled_contrastive_loss,
    tiled_info_nce_loss,
    tiled_sigmoid_loss,
)

__all__ = [
    "InfCLLoss",
    "InfoNCELoss",
    "SigmoidLoss",
    "tiled_contrastive_loss",
    "tiled_info_nce_loss",
    "tiled_sigmoid_loss",
]
