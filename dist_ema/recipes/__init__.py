"""Training techniques around an average: each module one recipe, each correct on several ranks.

batchnorm   population statistics for the weights that are in the model now (precise BN)
distill     soft targets from a teacher, fixed or the average itself
fixres      fine-tune the classifier at the resolution of the test
"""

__all__ = ()
