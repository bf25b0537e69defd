"""Tests of kamal_proxy. `scripted` plays targets and clients, `running` starts proxies."""
