"""`obc demo`: train, score, prune and evaluate small networks on handwritten digits."""
