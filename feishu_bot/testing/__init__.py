"""Fakes that ship with the product: platform servers and a model server, for tests and demonstrations."""
