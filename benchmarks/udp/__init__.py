"""CPU time per relayed datagram, beside nginx and a bare relay in C: see ``__main__``."""
