"""Fused pieces of contrastive recommender training as plain functions of tensors; needs torch only.

>>> import torch
>>> from karma_kernels import info_nce
>>> info_nce(torch.eye(2), torch.eye(2), scale=1.0)
tensor(0.3133)
"""

from .info_nce import info_nce
from .soft_prompt import embed_prompt, insert_soft_tokens, soft_prompt

__all__ = ["embed_prompt", "info_nce", "insert_soft_tokens", "soft_prompt"]
