"""The admin API on the Unix socket: ``api`` serves it, ``client`` calls it, ``messages`` travel.

Nothing is imported here, so that the client stays free of the server.
"""
