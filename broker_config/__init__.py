"""What producers and workers must agree on: settings, errors, messages, keys, connections, blobs, catalogue.

Imports neither torch nor diffusers, nor `producer`, nor `worker`.
"""
