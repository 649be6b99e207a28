"""Moving blocks: who reads which bytes from whom, the two state machines, and the transports."""
