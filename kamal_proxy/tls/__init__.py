"""TLS: hellos, certificates and where they come from, contexts, the stream of a connection.

Knows nothing of HTTP. Which certificate a connection gets depends on the services, of which this
package knows no more than their options.
"""
