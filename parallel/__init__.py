"""One model over many ranks: the mesh, the groups of ranks, and what they do together."""
