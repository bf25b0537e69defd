"""CPU time, latency and memory of HTTP proxies beside each other; see ``__main__``."""
