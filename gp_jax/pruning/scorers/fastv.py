"""FastV (arXiv 2403.06764): an image is worth 1/2 tokens after layer 2.

Behind layer K = 2 (our layers 0 and 1) the visual tokens with the least attention go: attention that they receive from the last prompt
token in layer K, mean over heads. Layers 0 and 1 keep every token in their cache, positions stay. The paper speaks of the attention
received from all other tokens; the released code reads the last token's row, and so do we.

Qwen2.5-VL: nothing but the decoder is looked at, so nothing has to be chosen. `Prune.after` moves the cut (K = after + 1).
"""

from gp_jax.pruning.scorers.attention import score as score
