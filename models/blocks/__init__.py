"""The parts that decoders are assembled from, shared by all families."""
