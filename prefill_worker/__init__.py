"""The prefill role: computes prompts and offers their KV; a plain class, without Ray."""
