"""Text at the edge: the OpenAI HTTP API, the public gRPC API, and the gateway behind both."""
