"""Speed and memory, ours against the plain formulation, measured side by side in one process."""
