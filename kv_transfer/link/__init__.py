"""What the transports without UCX share: a connection and a thread per peer, authenticated."""
