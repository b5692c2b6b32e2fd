"""Losses of two peers that distil each other: NT-Xent and similarity distillation, over the batch of all ranks.

ntxent_loss     the contrastive loss of one peer
mutual_loss     both peers: NT-Xent and the KL between their similarity distributions, in one call
similarity_kl   the two KL terms alone
"""

from kernels.mutual import MutualLoss, SimilarityKL, mutual_loss, ntxent_loss, similarity_kl

__all__ = ["MutualLoss", "SimilarityKL", "mutual_loss", "ntxent_loss", "similarity_kl"]
