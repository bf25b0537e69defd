"""UDP services, beside ``http``, which must not know of it, nor it of ``http``.

Nothing is imported here, so that the command line gets the options without the server.
"""
