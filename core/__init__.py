"""Words that every folder shares: ids, errors, config, requests, KV layout, handover, topology."""
