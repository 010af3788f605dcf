"""Losses, one a file, for this trainer and any other."""

from .info_nce import InfoNCELoss
from .karma import KarmaLoss, LossParts, image_distance
from .text import frozen_decoder_loss, text_loss, text_losses
from .weighted import Terms, WeightedLoss

__all__ = ["InfoNCELoss", "KarmaLoss", "LossParts", "Terms", "WeightedLoss", "frozen_decoder_loss", "image_distance",
           "text_loss", "text_losses"]
