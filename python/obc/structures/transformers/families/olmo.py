"""OLMo 2 and 3, OLMoE, MiniMax-M2, Chameleon, BitNet: norms over all heads of queries, keys or the output."""

from obc.structures.transformers.family import Family, register

register(Family("olmo", head_norms={"q_norm": "queries", "k_norm": "keys", "attn_sub_norm": "queries"}))
