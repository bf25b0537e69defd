"""HTTP on both sides of the proxy: connections from clients, connections to targets, pages."""
