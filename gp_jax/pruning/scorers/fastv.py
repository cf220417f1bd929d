"""FastV (arXiv 2403.06764): an image is worth 1/2 tokens after layer 2.

After layer K = 2 (layers 0 and 1 here) the visual tokens with the least attention are dropped: the attention that they receive from the
last prompt token in layer K, mean over heads. Layers 0 and 1 keep every token in their cache, and positions do not change. The paper
describes the attention received from all other tokens; the released code reads the last token's row, and so does this one.

The method reads the decoder only, so it is the same on every model. `Prune.after` moves the cut (K = after + 1).
"""

from gp_jax.pruning.scorers.attention import score as score
